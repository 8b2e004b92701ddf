//! Anchors that somebody removed or wrote by hand.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::view::{ViewRig, done, must, run, told};
use pagefold_testfs::rig::RigFs;

/// The anchor behind a file of a view.
fn anchor_of(path: &Path) -> PathBuf {
    let told = done(&["explain".as_ref(), path.as_os_str(), "--format=json".as_ref()]);
    let json: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    json["anchor"]["path"].as_str().expect("a path").into()
}

/// Both kinds of damage by hand: a view never shows other bytes in silence after `verify` and another `seal`.
#[test]
fn privileged_anchors_removed_or_written_by_hand_are_found_and_replaced() {
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.make_dir("root");
    for name in ["removed", "written", "left"] {
        std::fs::write(root.join(name), name.repeat(5000)).expect("room on the rig");
    }
    let view = rig.views(&["root"]).remove(0);
    let anchor = |name: &str| anchor_of(&view.join(name));
    let (removed, written) = (anchor("removed"), anchor("written"));
    done(&["umount".as_ref(), view.as_os_str()]);
    for path in [&removed, &written] {
        must(Command::new("chattr").arg("-i").arg(path));
    }
    std::fs::remove_file(&removed).expect("ours");
    let mut bytes = std::fs::read(&written).expect("readable");
    bytes[100] ^= 1;
    let file = std::fs::OpenOptions::new().write(true).open(&written).expect("root may");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).expect("room on the rig");
    drop(file);
    must(Command::new("chattr").arg("+i").arg(&written));
    let store = rig.path(".pagefold");
    let verify = || run(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]);
    let found = told(&verify());
    for path in [&removed, &written] {
        assert!(found.contains(path.to_str().expect("text")), "{found}");
    }
    done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
    assert!(std::fs::read(view.join("removed")).is_err(), "what is gone reads as something");
    done(&["umount".as_ref(), view.as_os_str()]);
    done(&["unseal".as_ref(), root.as_os_str()]);
    done(&["seal".as_ref(), root.as_os_str()]);
    done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
    for name in ["removed", "written", "left"] {
        assert!(std::fs::read(view.join(name)).expect("readable") == name.repeat(5000).as_bytes(), "{name}");
    }
}

/// Where btrfs may move blocks at any time, places tell nothing; nor is what was written in the cache: an anchor's change time tells.
#[test]
fn privileged_an_anchor_that_was_changed_by_hand_is_named_by_its_times() {
    for fs in [RigFs::Btrfs, RigFs::Xfs] {
        let rig = ViewRig::new(fs);
        let root = rig.make_dir("root");
        for name in ["written", "touched", "left"] {
            std::fs::write(root.join(name), name.repeat(5000)).expect("room on the rig");
        }
        let view = rig.views(&["root"]).remove(0);
        let anchor = |name: &str| anchor_of(&view.join(name));
        let (written, touched, left) = (anchor("written"), anchor("touched"), anchor("left"));
        done(&["umount".as_ref(), view.as_os_str()]);
        let store = rig.path(".pagefold");
        let verify = || told(&run(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]));
        assert!(!verify().contains("changed after it was made"), "{fs:?}");
        for path in [&written, &touched] {
            must(Command::new("chattr").arg("-i").arg(path));
        }
        let mtime = std::fs::metadata(&written).expect("there").modified().expect("a time");
        let file = std::fs::OpenOptions::new().write(true).open(&written).expect("root may");
        std::os::unix::fs::FileExt::write_all_at(&file, b"other bytes", 100).expect("room on the rig");
        // The modification time can be put back, the change time can't.
        file.set_modified(mtime).expect("root may");
        drop(file);
        for path in [&written, &touched] {
            must(Command::new("chattr").arg("+i").arg(path));
        }
        must(Command::new("sync").arg("-f").arg(&root));
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
        let found = verify();
        let names = |path: &PathBuf| {
            let path = path.to_str().expect("text");
            found.lines().any(|line| line.contains(path) && line.contains("changed after it was made"))
        };
        assert!(names(&written) && names(&touched) && !names(&left), "{fs:?}: {found}");
        done(&["unseal".as_ref(), root.as_os_str()]);
        done(&["gc".as_ref(), "--store".as_ref(), store.as_os_str()]);
        done(&["seal".as_ref(), root.as_os_str()]);
        done(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]);
        done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
        assert!(std::fs::read(view.join("written")).expect("readable") == "written".repeat(5000).as_bytes());
    }
}

/// What moves blocks, reads, shares or mounts again is no damage.
#[test]
fn privileged_verify_alarms_nobody_when_blocks_move() {
    for fs in [RigFs::Btrfs, RigFs::Xfs] {
        let mut rig = ViewRig::new(fs);
        let root = rig.make_dir("root");
        for name in ["a", "b", "c"] {
            std::fs::write(root.join(name), name.repeat(300_000)).expect("room on the rig");
        }
        let view = rig.views(&["root"]).remove(0);
        let anchor = anchor_of(&view.join("a"));
        let store = rig.path(".pagefold");
        let verify = |when: &str| {
            let output = run(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]);
            assert!(output.status.success(), "{fs:?}, {when}: {}", told(&output));
        };
        verify("mounted");
        // Another root that shares, then is written; a reader; a copy that is made from the anchor itself.
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&root).arg(rig.path("second")));
        must(Command::new("sync").arg("-f").arg(&root));
        done(&["seal".as_ref(), rig.path("second").as_os_str()]);
        must(Command::new("cp").arg("--reflink=always").arg(&anchor).arg(rig.path("taken")));
        std::fs::write(root.join("a"), "written anew").expect("room on the rig");
        std::fs::write(view.join("b"), "written in the view").expect("room on the rig");
        verify("shared, and written elsewhere");
        if fs == RigFs::Btrfs {
            must(Command::new("btrfs").args(["filesystem", "defragment", "-r"]).arg(&root));
            // Of the store's files it may or may not be let.
            let _ = Command::new("btrfs").args(["filesystem", "defragment", "-r"]).arg(&store).output();
            must(Command::new("btrfs").args(["balance", "start", "--full-balance"]).arg(rig.rig.path()));
            verify("after defragment and balance");
        } else {
            let _ = Command::new("xfs_fsr").arg(&anchor).output();
            verify("after defragmentation");
        }
        // Its duplicate elsewhere is joined with it.
        std::fs::write(rig.path("equal"), "c".repeat(300_000)).expect("room on the rig");
        must(Command::new("sync").arg("-f").arg(&root));
        let from = view.join("c");
        let dedupe = format!("dedupe {} 0 0 299008", anchor_of(&from).display());
        must(Command::new("xfs_io").args(["-c", &dedupe]).arg(rig.path("equal")));
        verify("after deduplication");
        // As after a reboot.
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
        rustix::mount::unmount(&view, rustix::mount::UnmountFlags::empty()).expect("nobody uses it");
        let _ = rustix::mount::unmount(store.join("mounts"), rustix::mount::UnmountFlags::DETACH);
        rig.rig.remount().expect("nobody uses it");
        done(&["mount".as_ref(), "--restore".as_ref(), "--store".as_ref(), store.as_os_str()]);
        verify("mounted again");
    }
}
