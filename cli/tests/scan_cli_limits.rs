//! Trees beyond what path names, descriptors and patience allow; interruption. Needs no privileges.

mod common;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Scan, dir, pagefold};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::Signal;

/// Removes trees that are deeper than what a path can say; `remove_dir_all` goes by descriptors, too, but needs one a level.
struct DeepTree(std::path::PathBuf);

impl Drop for DeepTree {
    fn drop(&mut self) {
        let _ = Command::new("rm").arg("-rf").arg(&self.0).status();
    }
}

/// `depth` directories, each in the one before; a file in each.
fn chain(at: &Path, name: &str, depth: usize) {
    let mut here: OwnedFd = File::open(at).expect("opens").into();
    for level in 0..depth {
        rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755)).expect("a directory");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        here = rustix::fs::openat(&here, name, flags, Mode::empty()).expect("opens");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&here, "f", flags, Mode::from_raw_mode(0o644)).expect("a file");
        rustix::io::write(&file, format!("level {level}").as_bytes()).expect("written");
    }
}

#[test]
fn a_chain_of_directories_beyond_path_max_is_counted() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let root = DeepTree(dir(home.path(), "deep"));
    let name = "d".repeat(200);
    chain(&root.0, &name, 300);
    let started = Instant::now();
    let output =
        pagefold().args(["scan", "--format", "json", "--threads", "2"]).arg(&root.0).output().expect("runs");
    let scan = Scan::of(&output);
    assert_eq!(scan.total("files"), 300);
    // With --content what lies beyond PATH_MAX is read or named, never passed over in silence.
    let output =
        pagefold().args(["scan", "--format", "json", "--content"]).arg(&root.0).output().expect("runs");
    let scan = Scan::of(&output);
    assert_eq!(scan.total("files"), 300);
    assert!(scan.total("undecided_bytes") == 0 || scan.code == 1, "{:?}", scan.errors().len());
    // Seconds on a slow machine: this looks for what hangs.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

#[test]
fn a_deep_chain_of_short_names_is_counted() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let root = DeepTree(dir(home.path(), "deep"));
    chain(&root.0, "d", 3000);
    let output = pagefold().args(["scan", "--format", "json"]).arg(&root.0).output().expect("runs");
    assert_eq!(Scan::of(&output).total("files"), 3000);
}

/// With 40 descriptors and twice as many levels, every level with subdirectories left to do.
#[test]
fn few_descriptors_cost_files_only_by_name() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let root = DeepTree(dir(home.path(), "wide"));
    let mut at = root.0.clone();
    let mut files = 0;
    for _ in 0..80 {
        for name in ["a", "b", "z"] {
            fs::write(dir(&at, name).join("f"), b"x").expect("written");
            files += 1;
        }
        at.push("b");
    }
    for hard in [40, 200] {
        let script = format!("ulimit -n {hard} && exec \"$0\" scan --format json --threads 2 \"$1\"");
        let output = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_pagefold")])
            .arg(&root.0)
            .output()
            .expect("a shell");
        let scan = Scan::of(&output);
        let found = scan.total("files");
        let too_many = scan.errors().iter().filter(|(_, e)| e.contains("Too many open files")).count();
        if hard == 200 {
            assert_eq!((found, too_many), (files, 0), "{:?}", scan.errors());
        } else {
            assert!(found == files || too_many > 0, "{found} of {files} files and nothing said");
        }
    }
}

#[test]
fn twenty_thousand_files_in_one_directory_and_many_directories() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let (many, dirs) = (dir(home.path(), "many"), dir(home.path(), "dirs"));
    for i in 0..20_000 {
        File::create(many.join(format!("{i:05}"))).expect("created");
    }
    for i in 0..1500 {
        File::create(dir(&dirs, &i.to_string()).join("f")).expect("created");
    }
    let script = "ulimit -n 64 && exec \"$0\" scan --format json \"$1\" \"$2\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_pagefold")])
        .args([&many, &dirs])
        .output()
        .expect("a shell");
    let scan = Scan::of(&output);
    assert_eq!((scan.root(0, "files"), scan.root(1, "files")), (20_000, 1500), "{:?}", scan.errors());
    assert_eq!(scan.total("cache_bytes"), 0);
}

/// A tree that takes a while: names are cheap to make, and each is looked at.
fn slow_tree(home: &Path) -> u64 {
    let mut names = 0;
    for d in 0..6 {
        let dir = dir(home, &format!("slow/{d}"));
        let file = dir.join("f");
        fs::write(&file, vec![3; 50_000]).expect("written");
        let here = File::open(&dir).expect("opens");
        for i in 0..12_000 {
            let name = i.to_string();
            rustix::fs::linkat(here.as_fd(), "f", here.as_fd(), name, AtFlags::empty()).expect("a link");
        }
        names += 12_001;
    }
    names
}

/// Starts a scan and returns once it handles `signal`.
#[expect(
    clippy::zombie_processes,
    reason = "the caller waits; here only where it is never handled, and there we do"
)]
fn start(root: &Path, extra: &[&str], signal: Signal) -> Child {
    let mut child = pagefold()
        .args(["scan", "--threads", "1"])
        .args(extra)
        .arg(root)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let bit = 1u64 << (signal.as_raw() - 1);
    let status = format!("/proc/{}/status", child.id());
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string(&status).expect("it runs, or nobody waited for it");
        let caught = text.lines().find_map(|l| l.strip_prefix("SigCgt:")).expect("a mask");
        let over = text.lines().any(|l| l.starts_with("State:\tZ"));
        if over || u64::from_str_radix(caught.trim(), 16).expect("hexadecimal") & bit != 0 {
            return child;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the signal is never handled");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A scan that was interrupted before it was over. Where the machine is busy the first one may come to its end before it is.
fn interrupted(root: &Path, format: &str, signal: Signal) -> Output {
    for _ in 0..20 {
        let child = start(root, &["--format", format], signal);
        send(&child, signal);
        let output = child.wait_with_output().expect("ends");
        assert!(matches!(output.status.code(), Some(0 | 1)), "{signal:?}: {:?}", output.status);
        if output.status.code() == Some(1) {
            return output;
        }
    }
    panic!("{signal:?} interrupts nothing");
}

fn send(child: &Child, signal: Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).expect("it still runs");
}

#[test]
fn interrupted_scans_report_what_they_reached_and_say_partial() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let names = slow_tree(home.path());
    let root = home.path().join("slow");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let output = interrupted(&root, "json", signal);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a whole report");
        assert_eq!(report["partial"], true, "{signal:?}");
        let totals = &report["totals"];
        let reached =
            totals["files"].as_u64().expect("files") + totals["hard_links"].as_u64().expect("links");
        assert!(reached < names, "{signal:?}: the scan was over before it was interrupted");
        assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"));
    }
    let output = interrupted(&root, "table", Signal::INT);
    assert!(String::from_utf8_lossy(&output.stdout).contains("PARTIAL"));
    // Left alone it is whole.
    let output = pagefold().args(["scan", "--format", "json"]).arg(&root).output().expect("runs");
    let scan = Scan::of(&output);
    assert_eq!((scan.total("files"), scan.total("hard_links")), (6, names - 6));
}
