//! `commit` and `export` tell how far they are, and Ctrl-C leaves them so that a second run finishes.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::view::{ViewRig, at_step, done, must, signal, stops, told};
use pagefold_testfs::rig::RigFs;
use rustix::process::Signal;

/// Several batches of names.
const FILES: usize = 3000;

/// A sealed root, and a view that wrote many files and is unmounted.
fn written() -> (ViewRig, PathBuf) {
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.make_dir("root");
    fs::write(root.join("first"), "sealed").expect("room on the rig");
    must(Command::new("sync").arg("-f").arg(&root));
    let view = rig.views(&["root"]).remove(0);
    for n in 0..FILES {
        fs::write(view.join(format!("f{n}")), n.to_string()).expect("room on the rig");
    }
    done(&["umount".as_ref(), view.as_os_str()]);
    (rig, root)
}

fn is_whole(at: &Path) -> bool {
    (0..FILES).all(|n| fs::read_to_string(at.join(format!("f{n}"))).is_ok_and(|text| text == n.to_string()))
}

#[test]
fn privileged_an_interrupted_commit_is_finished_by_the_next() {
    let (rig, root) = written();
    let child = at_step(&["commit".as_ref(), root.as_os_str()], "commit.batch.durable");
    signal(child.id(), Signal::INT);
    signal(child.id(), Signal::CONT);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", told(&output));
    let placed = fs::read_dir(&root).expect("there").count();
    assert!(placed < FILES, "it went on to the end: the test shows nothing");
    done(&["commit".as_ref(), root.as_os_str()]);
    assert!(is_whole(&root), "the second commit did not finish");
    assert_eq!(fs::read_dir(&root).expect("there").count(), FILES + 1, "something is left");
    done(&["verify".as_ref(), "--store".as_ref(), rig.path(".pagefold").as_os_str()]);
}

#[test]
fn privileged_an_interrupted_export_leaves_nothing() {
    let (rig, root) = written();
    let copy = rig.path("copy");
    let args = ["export".as_ref(), root.as_os_str(), copy.as_os_str()];
    let child = at_step(&args, "export.entry:10");
    signal(child.id(), Signal::INT);
    signal(child.id(), Signal::CONT);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", told(&output));
    assert!(!copy.exists() && !rig.path(".pagefold-export-copy").exists());
    done(&args);
    assert!(is_whole(&copy));
}

/// What a program shows on a terminal that is held up for a second at `step`.
fn on_a_terminal(rig: &ViewRig, args: &str, step: &str) -> String {
    let number = rig.path("number");
    let program = env!("CARGO_BIN_EXE_pagefold");
    let script =
        format!("echo $$ > '{0}.new'; mv '{0}.new' '{0}'; exec '{program}' {args}", number.display());
    let child = Command::new("script")
        .args(["-q", "-e", "-c", &script, "/dev/null"])
        .env("PAGEFOLD_STOP_AT", step)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs script (package bsdutils)");
    let started = Instant::now();
    while !number.exists() && started.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let id: u32 = fs::read_to_string(&number).expect("it started").trim().parse().expect("a number");
    stops(id);
    std::thread::sleep(Duration::from_millis(1000));
    // `script` stops with what runs in it, and lets it go on when it goes on itself.
    signal(id, Signal::CONT);
    signal(child.id(), Signal::CONT);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", told(&output));
    fs::remove_file(number).expect("ours");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn privileged_commit_and_export_show_how_far_they_are() {
    let (rig, root) = written();
    let (root, copy) = (root.display(), rig.path("copy"));
    let shown = on_a_terminal(&rig, &format!("export '{root}' '{}'", copy.display()), "export.entry:10");
    assert!(shown.contains("names written"), "{shown:?}");
    let shown = on_a_terminal(&rig, &format!("commit '{root}'"), "commit.batch.built");
    assert!(shown.contains("names written"), "{shown:?}");
}
