//! Commits and discards that ended half-way, and what comes after them: nobody's bytes go that nobody gave up. And what else
//! commands could do to a view unasked.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::pagefold;
use common::view::{ViewRig, done, fails, must, run};
use pagefold_testfs::rig::RigFs;

const BOTH: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

/// A sealed root `r` with its view at `v`.
fn mounted(fs: RigFs) -> ViewRig {
    let rig = ViewRig::new(fs);
    rig.make_dir("v");
    rig.make_dir("r/d");
    for (n, name) in ["b", "top", "d/f1", "d/f2", "d/f3"].into_iter().enumerate() {
        std::fs::write(rig.path("r").join(name), vec![n as u8 + 1; 9000]).expect("room on the rig");
    }
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
    done(&["seal".as_ref(), rig.path("r").as_os_str()]);
    mount(&rig);
    rig
}

fn mount(rig: &ViewRig) {
    done(&["mount".as_ref(), rig.path("r").as_os_str(), rig.path("v").as_os_str()]);
}

fn umount(rig: &ViewRig, how: &str) {
    done(&["umount".as_ref(), rig.path("v").as_os_str(), how.as_ref()]);
}

fn commit(rig: &ViewRig) {
    done(&["commit".as_ref(), rig.path("r").as_os_str()]);
}

fn killed_at(rig: &ViewRig, step: &str, words: &[&str], path: &str) {
    let mut command = pagefold();
    command.args(words).arg(rig.path(path)).env("PAGEFOLD_CRASH_AT", step);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pagefold starts");
    assert_eq!(status.signal(), Some(9), "{step} was not passed: {status}");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut names: Vec<String> =
        entries.map(|e| e.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn privileged_half_a_discard_is_never_committed() {
    for fs in BOTH {
        let rig = mounted(fs);
        let view = rig.path("v");
        // A whiteout and an opaque directory: what is left of them when their contents are gone would delete.
        std::fs::remove_dir_all(view.join("d")).expect("writable");
        std::fs::create_dir(view.join("d")).expect("writable");
        std::fs::write(view.join("d/new"), "new").expect("writable");
        std::fs::rename(view.join("top"), view.join("moved")).expect("writable");
        for step in ["discard.entry", "discard.entry:2", "discard.emptied"] {
            umount(&rig, "--keep");
            mount(&rig);
            killed_at(&rig, step, &["umount", "--discard"], "v");
            commit(&rig);
            assert_eq!(names(&rig.path("r")), ["b", "d", "top"], "{fs:?} {step}");
            assert_eq!(names(&rig.path("r/d")), ["f1", "f2", "f3"], "{fs:?} {step}");
            mount(&rig);
            assert_eq!(names(&view), ["b", "d", "top"], "{fs:?} {step}");
            std::fs::remove_file(view.join("b")).expect("writable");
            std::fs::write(view.join("d/f1"), "other").expect("writable");
            std::fs::write(view.join("b"), "b again").expect("writable");
        }
        umount(&rig, "--discard");
        // What is left is none of a root's changes either when it is sealed.
        done(&["seal".as_ref(), rig.path("r").as_os_str()]);
    }
}

#[test]
fn privileged_what_was_committed_stays_when_the_view_is_discarded_afterwards() {
    for fs in BOTH {
        let rig = mounted(fs);
        std::fs::write(rig.path("v/precious"), "precious").expect("writable");
        umount(&rig, "--keep");
        killed_at(&rig, "commit.done", &["commit"], "r");
        mount(&rig);
        std::fs::write(rig.path("v/junk"), "junk").expect("writable");
        umount(&rig, "--discard");
        commit(&rig);
        assert_eq!(names(&rig.path("r")), ["b", "d", "precious", "top"], "{fs:?}");
        mount(&rig);
        assert_eq!(names(&rig.path("v")), ["b", "d", "precious", "top"], "{fs:?}");
        umount(&rig, "--keep");
    }
}

#[test]
fn privileged_half_a_commit_is_not_sealed() {
    for fs in BOTH {
        let rig = mounted(fs);
        std::fs::remove_file(rig.path("v/d/f1")).expect("writable");
        umount(&rig, "--keep");
        killed_at(&rig, "commit.taken.away", &["commit"], "r");
        assert_eq!(names(&rig.path("r/d")).len(), 3, "the file is there under another name");
        mount(&rig);
        let told = fails(1, &["umount".as_ref(), rig.path("v").as_os_str(), "--discard".as_ref()]);
        assert!(told.contains("pagefold commit"), "{told}");
        let told = fails(2, &["seal".as_ref(), rig.path("r").as_os_str()]);
        assert!(told.contains("did not end"), "{told}");
        commit(&rig);
        assert_eq!(names(&rig.path("r/d")), ["f1", "f2", "f3"], "{fs:?}");
        done(&["seal".as_ref(), rig.path("r").as_os_str()]);
    }
}

#[test]
fn privileged_what_is_written_after_half_a_commit_is_kept() {
    for fs in BOTH {
        let rig = mounted(fs);
        std::fs::write(rig.path("v/b"), "view").expect("writable");
        umount(&rig, "--keep");
        killed_at(&rig, "commit.exchanged", &["commit"], "r");
        assert_eq!(std::fs::read(rig.path("r/b")).expect("in place"), b"view");
        std::fs::write(rig.path("r/b"), "raw, later").expect("writable");
        fails(1, &["commit".as_ref(), rig.path("r").as_os_str()]);
        assert_eq!(std::fs::read(rig.path("r/b")).expect("in place"), b"raw, later", "{fs:?}");
        let kept = names(&rig.path("r")).into_iter().find(|n| n.starts_with(".pagefold-"));
        let kept = rig.path("r").join(kept.expect("what was swapped out"));
        assert_eq!(std::fs::read(&kept).expect("readable"), vec![1; 9000], "{fs:?}");
        std::fs::remove_file(kept).expect("writable");
        done(&["commit".as_ref(), rig.path("r").as_os_str(), "--theirs".as_ref()]);
        assert_eq!(std::fs::read(rig.path("r/b")).expect("in place"), b"raw, later", "{fs:?}");
    }
}

#[test]
fn privileged_a_writer_that_works_in_the_raw_root_is_seen() {
    let rig = mounted(RigFs::Xfs);
    std::fs::write(rig.path("v/b"), "view").expect("writable");
    umount(&rig, "--keep");
    let file = std::fs::OpenOptions::new().append(true).open(rig.path("r/b")).expect("writable");
    let mut sleep = Command::new("sleep");
    let mut child = sleep.arg("60").current_dir(rig.path("r")).stdout(file).spawn().expect("sleep starts");
    let output = run(&["commit".as_ref(), rig.path("r").as_os_str()]);
    child.kill().expect("ours");
    child.wait().expect("ours");
    let told = common::view::told(&output);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("is being written"), "{told}");
    assert_eq!(std::fs::read(rig.path("r/b")).expect("in place"), vec![1; 9000]);
}

#[test]
fn privileged_a_view_below_another_mount_is_not_forgotten() {
    let rig = mounted(RigFs::Xfs);
    std::fs::write(rig.path("v/b"), "view").expect("writable");
    let (view, store) = (rig.path("v"), rig.path(".pagefold"));
    let umount =
        ["umount".as_ref(), view.as_os_str(), "--commit".as_ref(), "--store".as_ref(), store.as_os_str()];
    must(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(rig.path("v")));
    let told = fails(2, &umount);
    assert!(told.contains("is mounted in it"), "{told}");
    must(Command::new("umount").arg(rig.path("v")));
    done(&umount);
    assert_eq!(std::fs::read(rig.path("r/b")).expect("in place"), b"view");
}

#[test]
fn privileged_no_store_is_made_in_a_view() {
    let rig = mounted(RigFs::Xfs);
    umount(&rig, "--keep");
    let root = rig.path("r");
    done(&["mount".as_ref(), root.as_os_str(), root.as_os_str()]);
    let told = fails(2, &["seal".as_ref(), root.as_os_str()]);
    assert!(told.contains("its view is mounted"), "{told}");
    let told = fails(2, &["commit".as_ref(), root.as_os_str()]);
    assert!(told.contains("is in use"), "{told}");
    let gc = pagefold().arg("gc").current_dir(root.join("d")).output().expect("pagefold starts");
    assert!(gc.status.success(), "{}", common::view::told(&gc));
    assert_eq!(names(&root), ["b", "d", "top"]);
    done(&["umount".as_ref(), root.as_os_str()]);
}

#[test]
fn privileged_what_a_commit_can_not_bring_is_told() {
    for fs in BOTH {
        let rig = mounted(fs);
        umount(&rig, "--keep");
        std::fs::hard_link(rig.path("r/d/f2"), rig.path("outside")).expect("writable");
        done(&["seal".as_ref(), rig.path("r").as_os_str()]);
        mount(&rig);
        std::fs::write(rig.path("v/d/f2"), "view").expect("writable");
        std::fs::write(rig.path("v/locked"), "view").expect("writable");
        must(Command::new("chattr").arg("+i").arg(rig.path("v/locked")));
        umount(&rig, "--keep");
        let output = run(&["commit".as_ref(), rig.path("r").as_os_str()]);
        let told = common::view::told(&output);
        assert!(output.status.success() && told.contains("outside the root"), "{told}");
        assert!(told.contains("immutable"), "{told}");
        assert_eq!(std::fs::read(rig.path("outside")).expect("in place"), vec![4; 9000]);
    }
}
