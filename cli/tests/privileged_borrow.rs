//! `seal --borrow` on file systems without reflink (ext4, XFS made so): views share the pages of a declared layer, and undoing leaves it as it was.
//!
//! Invariant: the layer's files are compared by mode, flags, times, links and bytes. What it deliberately does not do: mount engines.

mod common;

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::view::{ViewRig, done, fails, must, run, told};
use common::{cached_and_dirty, noise, sync, write};
use pagefold_testfs::rig::RigFs;
use serde_json::Value;

const BIG: usize = 1 << 20;

/// Mode, links, bytes, modification time and flags.
fn facts(path: &Path) -> (u32, u64, Vec<u8>, (i64, i64), u32) {
    let meta = path.metadata().expect("a file");
    let flags = rustix::fs::ioctl_getflags(std::fs::File::open(path).expect("opens")).expect("flags");
    let bytes = std::fs::read(path).expect("readable");
    (meta.mode(), meta.nlink(), bytes, (meta.mtime(), meta.mtime_nsec()), flags.bits())
}

/// A layer and two copies of it; each copy has a file of its own and one that both have and the layer has not.
fn layer_and_roots(rig: &ViewRig) -> (PathBuf, [PathBuf; 2]) {
    let layer = rig.make_dir("layer");
    write(&layer.join("big"), 1, BIG);
    write(&layer.join("small"), 2, 100);
    write(&layer.join("fixed"), 3, 5000);
    let roots = ["a", "b"].map(|name| rig.path(name));
    for (root, seed) in roots.iter().zip([10, 11]) {
        must(std::process::Command::new("cp").arg("-a").arg(&layer).arg(root));
        write(&root.join("own"), seed, 9000);
        write(&root.join("both"), 12, 7000);
    }
    // Can't be linked: it is copied.
    must(std::process::Command::new("chattr").arg("+i").arg(layer.join("fixed")));
    sync(&layer);
    (layer, roots)
}

fn seal(layer: &Path, roots: &[PathBuf]) -> Value {
    let mut args: Vec<&OsStr> = ["seal", "--format", "json", "--borrow"].map(OsStr::new).to_vec();
    args.push(layer.as_os_str());
    args.extend(roots.iter().map(|r| r.as_os_str()));
    serde_json::from_str(&done(&args)).expect("a report")
}

#[test]
fn privileged_views_share_a_borrowed_layer_and_leave_it_as_it_was() {
    views_share_a_borrowed_layer(RigFs::Ext4);
}

#[test]
fn privileged_views_share_a_borrowed_layer_on_xfs_without_reflink() {
    views_share_a_borrowed_layer(RigFs::XfsNoReflink);
}

fn views_share_a_borrowed_layer(fs: RigFs) {
    let rig = ViewRig::new(fs);
    let (layer, roots) = layer_and_roots(&rig);
    let names = ["big", "small", "fixed"];
    let before: Vec<_> = names.iter().map(|n| facts(&layer.join(n))).collect();
    let refused = fails(3, &[OsStr::new("seal"), roots[0].as_os_str()]);
    assert!(refused.contains("--borrow"), "{refused}");

    let report = seal(&layer, &roots);
    assert_eq!((&report["borrowed"], &report["copied"]), (&2.into(), &4.into()), "{report:#}");
    assert_eq!(report["copied_bytes"], 5000 + 7000 + 2 * 9000, "{report:#}");
    assert_eq!(layer.join("big").metadata().expect("there").nlink(), 2);
    let views = ["view-a", "view-b"].map(|name| rig.make_dir(name));
    for (root, view) in roots.iter().zip(&views) {
        done(&[OsStr::new("mount"), root.as_os_str(), view.as_os_str()]);
    }
    // Of these files only: what empties the whole cache would empty it for the tests beside this one, too.
    for cached in [layer.join("big"), roots[0].join("big"), roots[1].join("big")] {
        let file = std::fs::File::open(cached).expect("opens");
        pagefold_sys::cache::drop_cached(&file, 0, BIG as u64).expect("dropped");
    }
    assert_eq!(cached_and_dirty(&layer.join("big")).0, 0);
    assert_eq!(std::fs::read(views[0].join("big")).expect("readable"), noise(1, BIG));
    assert_eq!(
        cached_and_dirty(&layer.join("big")).0,
        (BIG / 4096) as u64,
        "the view reads the layer's pages"
    );
    assert_eq!(std::fs::read(views[1].join("big")).expect("readable"), noise(1, BIG));
    assert_eq!(cached_and_dirty(&layer.join("big")).0, (BIG / 4096) as u64);
    assert_eq!(cached_and_dirty(&roots[1].join("big")).0, 0, "the second view brings nothing in");
    for (root, view) in roots.iter().zip(&views) {
        for name in ["big", "small", "fixed", "own", "both"] {
            assert!(
                std::fs::read(root.join(name)).unwrap() == std::fs::read(view.join(name)).unwrap(),
                "{name}"
            );
        }
    }
    // A write breaks the sharing, in its view only.
    common::overwrite_page(&views[0].join("big"), 3, 99);
    assert!(std::fs::read(layer.join("big")).unwrap() == noise(1, BIG), "the layer was written");
    assert!(std::fs::read(views[1].join("big")).unwrap() == noise(1, BIG), "the other view was written");
    done(&["status", "--format", "json", "--store", rig.path(".pagefold").to_str().expect("text")]);
    done(&[OsStr::new("explain"), views[1].join("big").as_os_str()]);

    done(&[OsStr::new("umount"), OsStr::new("--discard"), views[0].as_os_str()]);
    common::overwrite_page(&views[1].join("big"), 5, 98);
    let written = std::fs::read(views[1].join("big")).unwrap();
    done(&[OsStr::new("umount"), OsStr::new("--commit"), views[1].as_os_str()]);
    assert!(std::fs::read(roots[1].join("big")).unwrap() == written, "the commit brought it back");
    done(&[OsStr::new("mount"), roots[1].as_os_str(), views[1].as_os_str()]);
    assert!(std::fs::read(views[1].join("big")).unwrap() == written, "and it was sealed again");
    done(&[OsStr::new("umount"), views[1].as_os_str()]);
    let store = rig.path(".pagefold");
    let again = seal(&layer, &roots);
    assert_eq!((&again["borrowed"], &again["copied"]), (&0.into(), &0.into()), "all found: {again:#}");
    done(&[OsStr::new("verify"), OsStr::new("--store"), store.as_os_str()]);

    done(&[OsStr::new("unseal"), OsStr::new("--all"), OsStr::new("--store"), store.as_os_str()]);
    let after: Vec<_> = names.iter().map(|n| facts(&layer.join(n))).collect();
    assert!(before == after, "the layer's files are not as they were");
    must(std::process::Command::new("chattr").arg("-i").arg(layer.join("fixed")));
}

#[test]
fn privileged_verify_names_a_borrowed_file_that_was_written() {
    let rig = ViewRig::new(RigFs::Ext4);
    let (layer, roots) = layer_and_roots(&rig);
    must(std::process::Command::new("chattr").arg("-i").arg(layer.join("fixed")));
    // Somebody has it open for writing: no sharer to be trusted.
    let writer = std::fs::File::options().write(true).open(layer.join("small")).expect("opens");
    let report = seal(&layer, &roots[..1]);
    drop(writer);
    assert_eq!((&report["borrowed"], &report["copied"]), (&2.into(), &3.into()), "{report:#}");
    assert_eq!(layer.join("small").metadata().expect("there").nlink(), 1);
    common::overwrite_page(&layer.join("big"), 0, 77);
    let store = rig.path(".pagefold");
    let output = run(&[OsStr::new("verify"), OsStr::new("--store"), store.as_os_str()]);
    assert!(!output.status.success() && told(&output).contains("layer/big"), "{}", told(&output));
    // The other root is compared with the bytes there are now, and gets a copy.
    let report = seal(&layer, &roots[1..]);
    let (made, hits) = (&report["roots"][0]["made"], &report["roots"][0]["hits"]);
    assert_eq!((made, hits), (&2.into(), &3.into()), "{report:#}");
}
