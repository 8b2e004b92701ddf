//! Clones that differ a little are sealed as differences from one image, and their views show exactly their roots.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::view::{ViewRig, at_step, done, must, signal, told};
use pagefold_testfs::rig::RigFs;
use rustix::process::Signal;

/// (mode, owner, size, links, mtime, bytes) of everything below `root`; directories without size and links.
type Shown = BTreeMap<PathBuf, (u32, u32, u64, u64, (i64, i64), Vec<u8>)>;

fn shown(root: &Path) -> Shown {
    let (mut all, mut todo) = (Shown::new(), vec![root.to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("readable").path();
            let meta = path.symlink_metadata().expect("there");
            let (size, links) = if meta.is_dir() { (0, 0) } else { (meta.len(), meta.nlink()) };
            let bytes = if meta.is_file() { fs::read(&path).expect("readable") } else { Vec::new() };
            if meta.is_dir() {
                todo.push(path.clone());
            }
            let short = path.strip_prefix(root).expect("below").to_owned();
            all.insert(
                short,
                (meta.mode(), meta.uid(), size, links, (meta.mtime(), meta.mtime_nsec()), bytes),
            );
        }
    }
    all
}

fn drifted_views_show_their_roots(fs: RigFs) {
    let rig = ViewRig::new(fs);
    let one = rig.make_dir("one");
    for n in 0..200u32 {
        let dir = one.join(format!("dir{}", n % 8));
        fs::create_dir_all(&dir).expect("room on the rig");
        fs::write(dir.join(format!("f{n}")), n.to_le_bytes().repeat(1500)).expect("room on the rig");
    }
    fs::hard_link(one.join("dir0/f0"), one.join("dir1/link")).expect("room on the rig");
    for clone in ["two", "three"] {
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&one).arg(rig.path(clone)));
    }
    let two = rig.path("two");
    fs::write(two.join("dir2/f2"), b"changed").expect("room on the rig");
    fs::remove_file(two.join("dir3/f3")).expect("there");
    fs::remove_dir_all(two.join("dir7")).expect("there");
    fs::write(two.join("dir4/new"), b"new").expect("room on the rig");
    fs::set_permissions(two.join("dir5"), fs::Permissions::from_mode(0o701)).expect("own");
    fs::write(two.join("dir1/link"), b"both names").expect("room on the rig");
    let paths = ["one", "two", "three"].map(|n| rig.path(n).into_os_string());
    let args: Vec<_> = ["seal", "--format", "json"].map(Into::into).into_iter().chain(paths).collect();
    let report: serde_json::Value = serde_json::from_str(&done(&args)).expect("JSON");
    let layers = |n: usize| report["roots"][n]["layers"].as_array().expect("layers").clone();
    assert_eq!(layers(0).len(), 1, "{report}");
    assert_eq!((layers(1), layers(2)), (layers(0), layers(0)), "{report}");
    let differs = |n: usize| report["roots"][n]["diff_entries"].as_u64().expect("a number") > 0;
    assert_eq!((differs(0), differs(1), differs(2)), (false, true, false), "{report}");
    for name in ["one", "two", "three"] {
        let view = rig.make_dir(&format!("view-{name}"));
        done(&["mount".as_ref(), rig.path(name).as_os_str(), view.as_os_str()]);
        assert_eq!(shown(&view), shown(&rig.path(name)), "{fs:?} {name}");
    }
    // Written, committed, sealed again: still a difference from the same image, and still right.
    let view = rig.path("view-two");
    fs::write(view.join("dir0/f0"), b"through the first name").expect("room on the rig");
    fs::rename(view.join("dir4/f4"), view.join("dir4/moved")).expect("one overlay");
    let before = shown(&view);
    done(&["umount".as_ref(), view.as_os_str(), "--commit".as_ref()]);
    assert_eq!(shown(&two), before, "{fs:?} committed");
    done(&["mount".as_ref(), two.as_os_str(), view.as_os_str()]);
    assert_eq!(shown(&view), before, "{fs:?} mounted again");
}

#[test]
fn privileged_drifted_views_show_their_roots_on_xfs() {
    drifted_views_show_their_roots(RigFs::Xfs);
}

#[test]
fn privileged_drifted_views_show_their_roots_on_btrfs() {
    drifted_views_show_their_roots(RigFs::Btrfs);
}

/// A balance moves every block and a defragmentation unshares the raw root's: views show what was sealed, and a further
/// clone still finds the anchors.
#[test]
fn privileged_balance_and_defragmentation_between_seal_and_mount_change_nothing() {
    let rig = ViewRig::new(RigFs::Btrfs);
    let one = rig.make_dir("one");
    for n in 0..50u32 {
        fs::write(one.join(format!("f{n}")), n.to_le_bytes().repeat(5000)).expect("room on the rig");
    }
    let clone =
        |name: &str| must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&one).arg(rig.path(name)));
    clone("two");
    clone("three");
    done(&["seal".as_ref(), one.as_os_str(), rig.path("two").as_os_str()]);
    must(Command::new("btrfs").args(["balance", "start", "--full-balance"]).arg(rig.rig.path()));
    must(Command::new("btrfs").args(["filesystem", "defragment", "-r", "-t", "1M"]).arg(&one));
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
    for name in ["one", "two"] {
        let view = rig.make_dir(&format!("view-{name}"));
        done(&["mount".as_ref(), rig.path(name).as_os_str(), view.as_os_str()]);
        assert_eq!(shown(&view), shown(&rig.path(name)), "{name}");
    }
    let told = done(&["seal".as_ref(), "--format=json".as_ref(), rig.path("three").as_os_str()]);
    let report: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(report["roots"][0]["made"], 0, "{report}");
    let store = rig.path(".pagefold");
    done(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]);
}

/// Between the look at a file and the last at its anchor a balance moves the anchor, so the file is looked at again; by then
/// another has its name.
#[test]
fn privileged_a_file_replaced_while_anchors_move_is_told_and_fails_no_root() {
    let rig = ViewRig::new(RigFs::Btrfs);
    let one = rig.make_dir("one");
    for n in 0..20u32 {
        fs::write(one.join(format!("f{n}")), n.to_le_bytes().repeat(5000)).expect("room on the rig");
    }
    for name in ["two", "three"] {
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&one).arg(rig.path(name)));
    }
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
    done(&["seal".as_ref(), one.as_os_str()]);
    let (two, three) = (rig.path("two"), rig.path("three"));
    let child = at_step(&["seal".as_ref(), two.as_os_str(), three.as_os_str()], "seal.walked");
    must(Command::new("btrfs").args(["balance", "start", "--full-balance"]).arg(rig.rig.path()));
    fs::write(two.join("new"), b"the other file").expect("room on the rig");
    fs::rename(two.join("new"), two.join("f7")).expect("one directory");
    signal(child.id(), Signal::CONT);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("two/f7: the file was being written"), "{}", told(&output));
    for name in ["two", "three"] {
        let view = rig.make_dir(&format!("view-{name}"));
        done(&["mount".as_ref(), rig.path(name).as_os_str(), view.as_os_str()]);
        assert_eq!(shown(&view), shown(&rig.path(name)), "{name}");
    }
}
