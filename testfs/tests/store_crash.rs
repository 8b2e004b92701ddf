//! The store and sudden ends: a kill at every step, power cuts, processes at once.
//!
//! Crashes are real: the test runs itself as a child process with `PAGEFOLD_CRASH_AT`, which ends it by SIGKILL at that step, or with
//! `PAGEFOLD_STOP_AT`, which stops it there for the power to be cut.

mod store_common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pagefold_fsadapters::store::{AnchorRow, Build, OpenMode, Publication, STEPS, Store, StoreError, Task};
use pagefold_testfs::rig::{LoopRig, RigFs};

use store_common::*;

/// The child seals from several threads.
const CROWD: &str = "PAGEFOLD_TEST_CROWD";

/// What a child does to a store, from nothing to nothing: all states that its crash may leave.
const STATES: [&[&str]; 5] = [&[], &["a"], &["a", "b"], &["b"], &["b", "c"]];

fn life(dir: &Path) -> Result<(), StoreError> {
    let roots = dir.parent().unwrap();
    let file = File::open(roots.join("source")).unwrap();
    let mut store = Store::open(dir, OpenMode::Create, "test child")?;
    let a = publish_one(&store, roots, "a", &file, 3)?;
    publish_one(&store, roots, "b", &file, 2)?;
    store.remove_root(a.id)?;
    store.gc(&|_| true, &Task::default())?;
    publish_one(&store, roots, "c", &file, 1)?;
    drop(store);
    Store::open(dir, OpenMode::Existing, "test child").map(drop)
}

/// Several seals at once in one process.
fn crowd(dir: &Path) {
    let roots = dir.parent().unwrap();
    let store = open(dir);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let file = File::open(roots.join("source")).unwrap();
                for n in 0..4 {
                    publish_one(store, roots, &format!("{thread}-{n}"), &file, 20).unwrap();
                }
            });
        }
    });
}

#[test]
fn privileged_many_seals_at_once() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let dir = place(&rig, "all");
        crowd(&dir);
        let store = open(&dir);
        assert_eq!(store.roots().unwrap().len(), 16);
        let report = store.verify(&Task::default()).unwrap();
        assert_eq!((&report.problems[..], report.anchors), (&[][..], 16 * 20));
        drop(store);
        for n in [1, 50, 150, 250] {
            let dir = place(&rig, &n.to_string());
            let crash = format!("store.anchor.finished:{n}");
            let mut command = child(&dir);
            assert!(!command.env(CROWD, "1").env("PAGEFOLD_CRASH_AT", &crash).status().unwrap().success());
            let store = open(&dir);
            assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?} {crash}");
            assert!(store.roots().unwrap().len() < 16);
        }
    }
}

/// Not a test of its own: what the crash tests run in a process that dies.
#[test]
fn privileged_child() {
    if let Some(dir) = std::env::var_os(CHILD) {
        if std::env::var_os(CROWD).is_some() {
            crowd(Path::new(&dir));
        } else {
            life(Path::new(&dir)).unwrap();
        }
    }
}

fn child(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "privileged_child", "--test-threads=1"]).env(CHILD, dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// The steps of a life, each with how often it comes.
fn steps(rig: &LoopRig) -> Vec<(String, usize)> {
    let dir = place(rig, "dry");
    let log = rig.path().join("steps");
    assert!(child(&dir).env("PAGEFOLD_STEPS_TO", &log).status().unwrap().success());
    let log = fs::read_to_string(log).unwrap();
    let count = |step: &str| log.lines().filter(|line| *line == step).count();
    STEPS.iter().map(|s| ((*s).to_owned(), count(s))).filter(|(_, n)| *n > 0).collect()
}

/// Opens what a crash left: nothing is wrong with it, it is one of the states of a life, every anchor has its bytes, and it
/// works.
fn check_survivor(dir: &Path, what: &str) {
    let roots = dir.parent().unwrap();
    let mut store = Store::open(dir, OpenMode::Create, "test").unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = store.verify(&Task::default()).unwrap();
    assert_eq!(report.problems, [], "{what}");
    let rows = store.roots().unwrap();
    let mut names: Vec<&str> = rows.iter().map(|r| r.name.as_str()).collect();
    names.sort_unstable();
    assert!(STATES.contains(&&names[..]), "{what}: {names:?}");
    for row in &rows {
        let image = store.image(&row.layers[0]).unwrap().expect("its image");
        for key in image.anchors {
            let mut bytes = Vec::new();
            let mut file = store.open_anchor(row.domain, &key).unwrap();
            std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
            assert!(bytes == BYTES, "{what}");
        }
    }
    let file = File::open(roots.join("source")).unwrap();
    let d = publish_one(&store, roots, "d", &file, 2).unwrap_or_else(|e| panic!("{what}: {e}"));
    for row in store.roots().unwrap() {
        store.remove_root(row.id).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    assert!(store.root(d.id).is_err());
    store.gc(&|_| true, &Task::default()).unwrap();
    let left: usize = fs::read_dir(dir.join("anchors/0"))
        .unwrap()
        .map(|xx| fs::read_dir(xx.unwrap().path()).unwrap().count())
        .sum();
    assert_eq!((left, fs::read_dir(dir.join("images")).unwrap().count()), (0, 0), "{what}");
}

/// First, second and last occurrence: what lies between is like its neighbours.
fn occurrences(count: usize) -> Vec<usize> {
    (1..=count).filter(|n| *n <= 2 || *n == count).collect()
}

fn killed_at_every_step(fs: RigFs) {
    let rig = rig(fs, 1 << 30);
    let steps = steps(&rig);
    assert!(steps.iter().filter(|(s, _)| s.starts_with("store.")).count() > 18, "{steps:?}");
    for (step, count) in &steps {
        for n in occurrences(*count) {
            let dir = place(&rig, &format!("{step}-{n}"));
            let crash = format!("{step}:{n}");
            let status = child(&dir).env("PAGEFOLD_CRASH_AT", &crash).status().unwrap();
            assert!(!status.success(), "{crash} was passed alive");
            // The next one dies in the middle of the recovery, where there is something to recover.
            let left =
                ["store.anchor.finished", "store.root.dir", "store.grave.dug"].contains(&step.as_str());
            let deaths: &[&str] = if left && n == 2 {
                &["store.recover.graves", "store.recover.anchors", "store.recover.images"]
            } else {
                &[]
            };
            for recovery in deaths {
                let _ = child(&dir).env("PAGEFOLD_CRASH_AT", recovery).status().unwrap();
            }
            check_survivor(&dir, &crash);
        }
    }
}

#[test]
fn privileged_killed_at_every_step_xfs() {
    killed_at_every_step(RigFs::Xfs);
}

#[test]
fn privileged_killed_at_every_step_btrfs() {
    killed_at_every_step(RigFs::Btrfs);
}

/// A child that stops at `step`; the power goes, then it dies.
fn cut_at(rig: &mut LoopRig, step: &str) {
    let dir = place(rig, &step.replace(':', "-"));
    rustix::fs::syncfs(File::open(rig.path()).unwrap()).unwrap();
    let mut stopped: Child = child(&dir).env("PAGEFOLD_STOP_AT", step).spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&stopped);
    let options = rustix::process::WaitOptions::UNTRACED;
    let (_, status) = rustix::process::waitpid(Some(pid), options).unwrap().expect("a child that stops");
    assert!(status.stopped(), "{step} was passed");
    rig.cut_power_and(|| {
        stopped.kill().unwrap();
        stopped.wait().unwrap();
    })
    .unwrap();
    check_survivor(&dir, step);
}

#[test]
fn privileged_power_cuts() {
    for fs in FILE_SYSTEMS {
        let mut rig = rig(fs, 400 << 20);
        for step in [
            "store.create.index",
            "store.create.format",
            "store.anchor.finished:2",
            "store.publish.synced",
            "store.publish.committed:2",
            "store.grave.dug",
            "store.grave.unlinked",
        ] {
            cut_at(&mut rig, step);
        }
    }
}

/// A file system on a disk that promised more than it has, inside of a rig.
struct Thin<'a> {
    rig: &'a LoopRig,
    top: PathBuf,
}

impl Thin<'_> {
    fn new(rig: &LoopRig) -> Thin<'_> {
        let (disk, top) = (rig.path().join("disk"), rig.path().join("thin"));
        File::create(&disk).unwrap().set_len(1 << 30).unwrap();
        fs::create_dir(&top).unwrap();
        let run = |program: &str, args: &[&str]| {
            assert!(Command::new(program).args(args).arg(&disk).status().unwrap().success(), "{program}");
        };
        run("mkfs.xfs", &["-q", "-K"]);
        let mounted = Command::new("mount").args(["-o", "loop"]).args([&disk, &top]).status().unwrap();
        assert!(mounted.success());
        Thin { rig, top }
    }

    /// The disk takes nothing new.
    fn exhaust(&self) {
        let hog = File::create(self.rig.path().join("hog")).unwrap();
        let block = vec![1; 1 << 20];
        let mut at = 0;
        while hog.write_all_at(&block, at).is_ok() {
            at += block.len() as u64;
        }
        let _ = hog.sync_all();
    }

    fn relieve(&self) {
        fs::remove_file(self.rig.path().join("hog")).unwrap();
        rustix::fs::syncfs(File::open(self.rig.path()).unwrap()).unwrap();
    }
}

impl Drop for Thin<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.rig.path().join("hog"));
        let _ = rustix::mount::unmount(&self.top, rustix::mount::UnmountFlags::DETACH);
    }
}

/// What could not be written is told once, to whoever syncs first. It may be another's.
#[test]
fn privileged_nobody_publishes_after_a_sync_that_failed() {
    let rig = rig(RigFs::Xfs, 400 << 20);
    let thin = Thin::new(&rig);
    let dir = thin.top.join(".pagefold");
    let store = open(&dir);
    let domain = store.ensure_domain("default").unwrap();
    let (one, other) = (store.build(&domain), store.build(&domain));
    let made = |build: &Build<'_>, hint: u64| {
        let mut new = build.create_anchor().unwrap();
        std::io::Write::write_all(&mut new.file, &[7; 8 << 20]).unwrap();
        let row = AnchorRow {
            serial: new.serial,
            domain: domain.id,
            size: 8 << 20,
            signature: Some(signature(hint)),
            content: None,
            borrowed: None,
            stamp: None,
        };
        Publication { anchors: vec![(new.finish().unwrap(), row)], ..Publication::default() }
    };
    let (first, second) = (made(&one, 1), made(&other, 2));
    thin.exhaust();
    let error = one.publish(&first).expect_err("nothing of it can be written").to_string();
    thin.relieve();
    assert!(error.contains("sync the file system"), "{error}");
    // The kernel says that all is well now.
    rustix::fs::syncfs(store.dirfd()).unwrap();
    for (build, what) in [(&other, &second), (&one, &first)] {
        let error = build.publish(what).expect_err("its bytes are lost").to_string();
        assert!(error.contains("sync the file system"), "{error}");
    }
    drop((one, other));
    drop(store);
    let store = open(&dir);
    let report = store.verify(&Task::default()).unwrap();
    assert_eq!((&report.problems[..], report.anchors), (&[][..], 0));
    let build = store.build(&domain);
    build.publish(&made(&build, 3)).unwrap();
    drop(build);
}

#[test]
fn privileged_one_process_at_a_time() {
    let rig = rig(RigFs::Xfs, 320 << 20);
    let dir = place(&rig, "p");
    let mut first = child(&dir).env("PAGEFOLD_STOP_AT", "store.anchor.finished").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&first);
    let options = rustix::process::WaitOptions::UNTRACED;
    rustix::process::waitpid(Some(pid), options).unwrap().expect("it stops");
    let refused = Store::open_within(&dir, OpenMode::Existing, "second", Duration::from_millis(200));
    let text = refused.unwrap_err().to_string();
    assert!(text.contains(&format!("process {} (test child)", first.id())), "{text}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    // The second waits, and goes on when the first has ended.
    let store = Store::open_within(&dir, OpenMode::Existing, "second", Duration::from_secs(60)).unwrap();
    assert!(first.wait().unwrap().success());
    assert_eq!(store.roots().unwrap().len(), 2);
}
