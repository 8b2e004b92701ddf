//! Commands that look at what containers are changing at that moment: they end, follow nothing out, and tell what is so.
//!
//! What it deliberately does not test: writers that keep to themselves (`privileged_stress`).

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::view::{ViewRig, done, fails, run, told};
use common::{append, noise, reflink, sync};
use pagefold_testfs::rig::RigFs;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::Value;

const PAGE: u64 = 4096;

fn json(args: &[&std::ffi::OsStr]) -> Value {
    let args: Vec<_> = args.iter().copied().chain(["--format".as_ref(), "json".as_ref()]).collect();
    serde_json::from_str(&done(&args)).expect("JSON")
}

fn is_shared(rig: &ViewRig) -> u64 {
    let store = rig.path(".pagefold");
    let status = json(&["status".as_ref(), "--store".as_ref(), store.as_os_str()]);
    assert_eq!(status["errors"], Value::Array(vec![]));
    status["totals"]["is_shared_bytes"].as_u64().expect("a figure")
}

fn explain(path: &Path) -> String {
    let told = json(&["explain".as_ref(), path.as_os_str()]);
    assert_eq!(told["place"], "view", "{told:#}");
    told["verdict"].as_str().expect("a verdict").to_owned()
}

/// Two roots with `names` (files of as many pages as their place in the list, from 1), which are clones of each other.
fn clones(kind: RigFs, names: &[&str]) -> (ViewRig, Vec<PathBuf>) {
    let rig = ViewRig::new(kind);
    for root in ["a", "b"] {
        for (at, name) in names.iter().enumerate() {
            let (one, path) = (rig.path("a").join(name), rig.path(root).join(name));
            fs::create_dir_all(path.parent().expect("in a root")).expect("room on the rig");
            match root {
                "a" => fs::write(path, noise(at as u64, (at + 1) << 12)).expect("room on the rig"),
                _ => reflink(&one, &path),
            }
        }
        // A second name where a test asks for it.
        let hard = rig.path(root).join("d/hard");
        if hard.exists() {
            fs::hard_link(hard, rig.path(root).join("link")).expect("linked");
        }
        sync(&rig.path("a"));
    }
    let views = rig.views(&["a", "b"]);
    (rig, views)
}

/// A name shows what is there now. Whoever looks by names alone claims sharing for what an upgrade replaced.
#[test]
fn privileged_names_that_show_something_else_share_nothing() {
    for kind in [RigFs::Xfs, RigFs::Btrfs] {
        let (rig, views) = clones(
            kind,
            &["same", "upgraded", "linked", "removed", "x/old", "y/new", "one", "two", "d/hard", "x2/f"],
        );
        let pages = |n: u64| n * PAGE;
        assert_eq!(is_shared(&rig), pages(1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10));
        let at = |name: &str| views[0].join(name);
        // As a package manager does.
        fs::write(at("upgraded.new"), "new").expect("written");
        fs::rename(at("upgraded.new"), at("upgraded")).expect("renamed");
        assert_eq!(is_shared(&rig), pages(1 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10));
        fs::remove_file(at("linked")).expect("removed");
        symlink("/etc/hostname", at("linked")).expect("linked");
        assert_eq!(is_shared(&rig), pages(1 + 4 + 5 + 6 + 7 + 8 + 9 + 10));
        fs::remove_file(at("removed")).expect("removed");
        // A directory in the place of another: y shows what x has.
        fs::remove_dir_all(at("y")).expect("removed");
        fs::rename(at("x"), at("y")).expect("renamed");
        assert_eq!(is_shared(&rig), pages(1 + 7 + 8 + 9 + 10));
        // A file in the place of another, its metadata only.
        fs::rename(at("one"), at("two")).expect("renamed");
        assert_eq!(is_shared(&rig), pages(1 + 9 + 10));

        assert_eq!(explain(&at("same")), "shared");
        assert_eq!(explain(&at("upgraded")), "broken");
        assert_eq!(explain(&at("linked")), "not_a_file");
        assert_eq!(explain(&at("removed")), "removed");
        assert_eq!(explain(&at("y/old")), "shared", "under another name");
        assert_eq!(explain(&at("two")), "shared", "what was sealed as `one`");
        assert_eq!(explain(&at("one")), "removed");
        append(&at("two"), b"x");
        assert_eq!(explain(&at("two")), "broken");
        fs::write(at("d/more"), "x").expect("written");
        assert_eq!(explain(&at("d/more")), "not_sealed");
        assert_eq!(explain(&at("d/hard")), "shared");
        append(&at("d/hard"), b"x");
        assert_eq!(explain(&at("link")), "broken", "written under another name");
        fs::rename(at("x2"), at("e")).expect("renamed");
        assert_eq!(explain(&at("e/f")), "shared");
        drop(rig);
    }
}

/// What a container might do, over and over.
fn stir(view: &Path, outside: &Path, round: u64) -> std::io::Result<()> {
    let at = |name: &str| view.join("d").join(name);
    let clear = |name: &str| {
        let _ = fs::remove_file(at(name));
        let _ = fs::remove_dir_all(at(name));
    };
    clear("swap");
    match round % 5 {
        0 => fs::create_dir_all(at("swap/sub"))?,
        1 => symlink(outside, at("swap"))?,
        2 => rustix::fs::mknodat(CWD, at("swap"), FileType::Fifo, Mode::RUSR, 0)?,
        3 => rustix::fs::mknodat(
            CWD,
            at("swap"),
            FileType::CharacterDevice,
            Mode::RUSR,
            rustix::fs::makedev(1, 5),
        )?,
        _ => fs::write(at("swap"), noise(round, 5000))?,
    }
    // A setuid program and somebody's file change places.
    let (suid, plain) = (at("suid"), at("plain"));
    rustix::fs::renameat_with(CWD, &suid, CWD, &plain, rustix::fs::RenameFlags::EXCHANGE)?;
    match fs::rename(at("there"), at("here")) {
        Ok(()) => fs::write(at("here/log"), noise(round, 100))?,
        Err(_) => fs::rename(at("here"), at("there"))?,
    }
    fs::File::options().append(true).create(true).open(at("log"))?.write_all(b"line\n")?;
    let _ = fs::remove_file(at("sealed"));
    fs::write(at("new"), noise(round, 3000))?;
    fs::rename(at("new"), at("sealed"))
}

/// Runs `commands` in turn while somebody stirs `view`, for a while.
fn while_stirred(view: &Path, outside: &Path, mut command: impl FnMut(u64)) {
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let stirrer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                stir(view, outside, rounds.fetch_add(1, Ordering::Relaxed)).expect("room on the rig");
            }
        });
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let started = Instant::now();
            let mut turn = 0;
            while turn < 3 || started.elapsed() < Duration::from_secs(5) {
                command(turn);
                turn += 1;
            }
        }));
        stop.store(true, Ordering::Relaxed);
        stirrer.join().expect("it stirs");
        caught.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(rounds.load(Ordering::Relaxed) > 20, "nobody stirred");
}

fn stirred(kind: RigFs) -> (ViewRig, PathBuf, PathBuf) {
    let rig = ViewRig::new(kind);
    let root = rig.make_dir("root");
    for dir in ["d/here", "d/keep"] {
        fs::create_dir_all(root.join(dir)).expect("room on the rig");
    }
    for (seed, name) in [(1, "d/sealed"), (2, "d/keep/f"), (3, "d/here/f")] {
        fs::write(root.join(name), noise(seed, 20_000)).expect("room on the rig");
    }
    let outside = rig.make_dir("outside");
    fs::create_dir_all(outside.join("sub")).expect("room on the rig");
    fs::write(outside.join("planted"), noise(9, 50_000)).expect("room on the rig");
    sync(&root);
    let view = rig.views(&["root"]).remove(0);
    fs::write(view.join("d/suid"), "trusted").expect("written");
    fs::set_permissions(view.join("d/suid"), PermissionsExt::from_mode(0o4755)).expect("mode");
    fs::write(view.join("d/plain"), "planted").expect("written");
    (rig, view, outside)
}

#[test]
fn privileged_commands_look_at_a_view_that_is_being_changed() {
    for kind in [RigFs::Xfs, RigFs::Btrfs] {
        let (rig, view, outside) = stirred(kind);
        let (store, root) = (rig.path(".pagefold"), rig.path("root"));
        let store = store.as_os_str();
        while_stirred(&view, &outside, |_| {
            let status = json(&["status".as_ref(), "--store".as_ref(), store]);
            assert_eq!(status["errors"], Value::Array(vec![]));
            let of_root = &status["roots"][0];
            let added = of_root["added_bytes"].as_u64().expect("a figure");
            // What is outside was not walked.
            assert!(added < 50_000 + 100_000, "{of_root:#}");
            for name in ["d/sealed", "d/swap", "d/here/f", "d/keep/f", "d/suid"] {
                let output = run(&["explain".as_ref(), view.join(name).as_os_str()]);
                // The directory itself may be elsewhere just then.
                let gone = ["can't find", "is not there"].iter().any(|text| told(&output).contains(text));
                assert!(output.status.success() || gone, "{}", told(&output));
            }
            done(&["prefault".as_ref(), "--store".as_ref(), store]);
            done(&["gc".as_ref(), "--store".as_ref(), store]);
            done(&["verify".as_ref(), "--store".as_ref(), store]);
            let said = fails(2, &["commit".as_ref(), root.as_os_str()]);
            assert!(said.contains("in use"), "{said}");
            let scanned = run(&["scan".as_ref(), view.as_os_str()]);
            assert!(matches!(scanned.status.code(), Some(0 | 1)), "{}", told(&scanned));
        });
    }
}

#[test]
fn privileged_an_export_of_a_view_that_is_being_changed_mixes_no_files() {
    for kind in [RigFs::Xfs, RigFs::Btrfs] {
        let (rig, view, outside) = stirred(kind);
        let copy = rig.path("copy");
        while_stirred(&view, &outside, |_| {
            let output = run(&["export".as_ref(), view.as_os_str(), copy.as_os_str()]);
            assert!(matches!(output.status.code(), Some(0 | 1)), "{}", told(&output));
            for name in ["d/suid", "d/plain"] {
                let Ok(meta) = fs::symlink_metadata(copy.join(name)) else { continue };
                let text = fs::read(copy.join(name)).expect("it is there");
                let trusted = meta.permissions().mode() & 0o4000 != 0;
                assert_eq!(text, if trusted { &b"trusted"[..] } else { b"planted" }, "{kind:?} {name}");
            }
            assert!(!copy.join("d/swap/planted").symlink_metadata().is_ok_and(|_| {
                !copy.join("d/swap").symlink_metadata().is_ok_and(|m| m.file_type().is_symlink())
            }));
            assert_eq!(fs::read(copy.join("d/keep/f")).expect("it is there"), noise(2, 20_000));
            fs::remove_dir_all(&copy).expect("ours");
        });
    }
}

#[test]
fn privileged_a_root_that_is_being_changed_is_sealed_or_said_why_not() {
    for kind in [RigFs::Xfs, RigFs::Btrfs] {
        let (rig, _view, outside) = stirred(kind);
        let raw = rig.make_dir("other");
        fs::create_dir_all(raw.join("d/here")).expect("room on the rig");
        for name in ["d/suid", "d/plain"] {
            fs::write(raw.join(name), "x").expect("written");
        }
        while_stirred(&raw, &outside, |_| {
            let sealed = run(&["seal".as_ref(), raw.as_os_str()]);
            assert!(matches!(sealed.status.code(), Some(0 | 1)), "{}", told(&sealed));
            let status = run(&["status".as_ref(), "--store".as_ref(), rig.path(".pagefold").as_os_str()]);
            assert!(status.status.success(), "{}", told(&status));
            let scanned = run(&["scan".as_ref(), "--content".as_ref(), raw.as_os_str()]);
            assert!(matches!(scanned.status.code(), Some(0 | 1)), "{}", told(&scanned));
        });
    }
}

/// A process that holds a write lease is asked to give it up, and is not waited for longer than a moment.
#[test]
fn privileged_a_leased_file_holds_no_seal_up() {
    const PERL: &str = r#"
        $SIG{IO} = 'IGNORE';
        open(my $file, '+<', $ARGV[0]) or die "$!";
        fcntl($file, 1024, 1) or die "F_SETLEASE: $!";
        $| = 1;
        print "held\n";
        <STDIN>;
    "#;
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.make_dir("root");
    for name in ["a", "b", "c"] {
        fs::write(root.join(name), noise(1, 9000)).expect("room on the rig");
    }
    sync(&root);
    let mut perl = std::process::Command::new("perl");
    perl.args(["-e", PERL]).arg(root.join("b"));
    perl.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut holder = perl.spawn().expect("this test needs perl (package perl-base)");
    let mut said = String::new();
    let out = holder.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut said).expect("it says something");
    assert_eq!(said, "held\n");
    let started = Instant::now();
    let said = fails(2, &["seal".as_ref(), root.as_os_str()]);
    // The kernel takes a lease away after 45 s.
    assert!(started.elapsed() < Duration::from_secs(30), "it waited {:?}", started.elapsed());
    assert!(said.contains("lease"), "{said}");
    drop(holder.stdin.take());
    holder.wait().expect("it ends");
    done(&["seal".as_ref(), root.as_os_str()]);
}
