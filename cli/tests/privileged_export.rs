//! Exports that are killed: what they leave goes with the next one to the same place, and nothing else does.

mod common;

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;

use common::view::{ViewRig, done, fails, told};
use common::{noise, pagefold, sync};
use pagefold_testfs::rig::RigFs;
use rustix::fs::FlockOperation;

const FILES: [&str; 4] = ["a", "dir/b", "dir/c", "dir/sub/d"];

/// A sealed root whose view wrote something.
fn written(fs: RigFs) -> ViewRig {
    let rig = ViewRig::new(fs);
    rig.make_dir("root/dir/sub");
    for (seed, name) in FILES.into_iter().enumerate() {
        fs::write(rig.path("root").join(name), noise(seed as u64, 20_000)).expect("room on the rig");
    }
    sync(&rig.path("root"));
    let view = rig.views(&["root"]).remove(0);
    fs::write(view.join("dir/new"), "written in the view").expect("room on the rig");
    done(&["umount".as_ref(), view.as_os_str()]);
    rig
}

fn is_whole(at: &std::path::Path) -> bool {
    let same =
        |(seed, name): (usize, &str)| fs::read(at.join(name)).is_ok_and(|b| b == noise(seed as u64, 20_000));
    FILES.into_iter().enumerate().all(same)
        && fs::read(at.join("dir/new")).is_ok_and(|b| b == b"written in the view")
}

fn args(rig: &ViewRig, extra: &[&str]) -> Vec<String> {
    let text = |path: PathBuf| path.to_str().expect("text").to_owned();
    let paths = [text(rig.path("root")), text(rig.path("copy"))];
    ["export"].iter().chain(extra).map(|w| (*w).to_owned()).chain(paths).collect()
}

#[test]
fn privileged_what_a_killed_export_left_goes_with_the_next() {
    for (fs, extra) in [(RigFs::Xfs, &[][..]), (RigFs::Btrfs, &[]), (RigFs::Btrfs, &["--read-only-snapshot"])]
    {
        let rig = written(fs);
        let (left, copy) = (rig.path(".pagefold-export-copy"), rig.path("copy"));
        for step in ["export.entry:3", "export.filled", "export.placed"] {
            let killed = pagefold().args(args(&rig, extra)).env("PAGEFOLD_CRASH_AT", step).output();
            let killed = killed.expect("it starts");
            assert_eq!(killed.status.signal(), Some(9), "{fs:?} {step}: {}", told(&killed));
            assert!(left.is_dir(), "{fs:?} {step}: nothing is left, the test shows nothing");
            if step == "export.placed" {
                let told = fails(2, &args(&rig, extra));
                assert!(told.contains("is there already"), "{told}");
                assert!(!left.exists(), "{fs:?} {step}");
            } else {
                assert!(!copy.exists(), "{fs:?} {step}: half an export is at its target");
                // Somebody works in it: that it can't be told from what is left, but by the lock.
                let holder = File::open(&left).expect("there");
                rustix::fs::flock(&holder, FlockOperation::LockExclusive).expect("nobody holds it");
                let before = fs::read_dir(left.join("tree")).expect("there").count();
                let told = fails(2, &args(&rig, extra));
                assert!(told.contains("another export"), "{told}");
                assert_eq!(fs::read_dir(left.join("tree")).expect("still there").count(), before);
                drop(holder);
                done(&args(&rig, extra));
            }
            assert!(is_whole(&copy), "{fs:?} {step}");
            assert!(!left.exists(), "{fs:?} {step}: it is still there");
            if !extra.is_empty() {
                common::view::must(
                    std::process::Command::new("btrfs")
                        .args(["property", "set", "-f", "-ts"])
                        .arg(&copy)
                        .args(["ro", "false"]),
                );
            }
            fs::remove_dir_all(&copy).expect("ours");
        }
    }
}

#[test]
fn privileged_what_no_export_made_is_left_alone() {
    let rig = written(RigFs::Xfs);
    let left = rig.make_dir(".pagefold-export-copy");
    fs::write(left.join("mine"), "kept").expect("room on the rig");
    let told = fails(2, &args(&rig, &[]));
    assert!(told.contains("no export made it"), "{told}");
    assert_eq!(fs::read(left.join("mine")).expect("there"), b"kept");
    fs::remove_dir_all(&left).expect("ours");
    std::os::unix::fs::symlink(rig.path("root"), &left).expect("room on the rig");
    let told = fails(2, &args(&rig, &[]));
    assert!(told.contains("no export made it"), "{told}");
    assert!(rig.path("root/a").exists() && !rig.path("copy").exists());
}
