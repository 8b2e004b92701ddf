//! A crash at every step of seal (with `--borrow` where there is no reflink), mount, commit, gc and unseal: by `kill -9`, and by a power cut (XFS shut down without its log; on
//! btrfs a copy of the disk taken at that moment).
//!
//! After each: raw roots are what they were (or, for commit, become what the view showed once it is run again), the store
//! opens, the command run again finishes, nothing is left over.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::pagefold;
use common::view::{ViewRig, done, must, run, told};
use pagefold_testfs::rig::RigFs;

/// A tree's files by path, for comparison.
type Files = BTreeMap<PathBuf, Vec<u8>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crash {
    Kill,
    PowerCut,
}

/// A command and what must be there before it.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    before: fn(&ViewRig),
    command: fn(&ViewRig) -> Vec<String>,
    /// What the first root holds when the command has finished.
    after: fn() -> Files,
}

const SCENARIOS: [Scenario; 7] = [
    Scenario { name: "seal", before: |_| (), command: seal_both, after: sealed_files },
    Scenario { name: "seal again", before: sealed_and_changed, command: seal_both, after: changed_files },
    Scenario { name: "seal a layer", before: little_changed, command: seal_both, after: changed_files },
    Scenario { name: "mount", before: sealed, command: mount_first, after: sealed_files },
    Scenario { name: "commit", before: written, command: commit_first, after: written_files },
    Scenario { name: "gc", before: orphaned, command: |rig| on_store(rig, &["gc"]), after: changed_files },
    Scenario {
        name: "unseal",
        before: written,
        command: |rig| on_store(rig, &["unseal", "--all", "--commit"]),
        after: written_files,
    },
];

fn sealed_files() -> Files {
    let mut files: Files = (0..6u8).map(|n| (format!("dir/f{n}").into(), vec![n; 9000])).collect();
    files.insert("empty".into(), Vec::new());
    files.insert("small".into(), b"a few bytes".to_vec());
    files
}

fn changed_files() -> Files {
    let mut files = sealed_files();
    files.insert("dir/f0".into(), vec![77; 9000]);
    files.remove(Path::new("dir/f1"));
    files
}

fn written_files() -> Files {
    let mut files = sealed_files();
    files.insert("dir/f2".into(), [&vec![2; 9000][..], b"appended"].concat());
    files.remove(Path::new("dir/f3"));
    files.insert("made/new".into(), vec![42; 20_000]);
    let moved = files.remove(Path::new("dir/f4")).expect("sealed");
    files.insert("made/moved".into(), moved);
    files
}

fn text(path: &Path) -> String {
    path.to_str().expect("the rig's path is text").to_owned()
}

fn on_store(rig: &ViewRig, words: &[&str]) -> Vec<String> {
    let store = text(&rig.path(".pagefold"));
    words.iter().map(|w| (*w).to_owned()).chain(["--store".to_owned(), store]).collect()
}

fn seal_both(rig: &ViewRig) -> Vec<String> {
    let borrow =
        if borrows(rig) { vec!["--borrow".to_owned(), text(&rig.path("layer"))] } else { Vec::new() };
    let roots = [text(&rig.path("one")), text(&rig.path("two"))];
    ["seal".to_owned()].into_iter().chain(borrow).chain(roots).collect()
}

/// Whether the rig's file system can't share blocks: files of a layer are borrowed then, others copied.
fn borrows(rig: &ViewRig) -> bool {
    matches!(rig.rig.fs(), RigFs::Ext4 | RigFs::XfsNoReflink)
}

/// The layer's files, what they hold, their times and how many names they have.
fn layer_facts(rig: &ViewRig) -> Vec<(PathBuf, Vec<u8>, i64, u32, u64)> {
    let layer = rig.path("layer");
    let fact = |(path, bytes): (PathBuf, Vec<u8>)| {
        let meta = layer.join(&path).metadata().expect("it is there");
        (path, bytes, meta.mtime(), meta.mode(), meta.nlink())
    };
    files_below(&layer).into_iter().map(fact).collect()
}

fn mount_first(rig: &ViewRig) -> Vec<String> {
    vec!["mount".into(), text(&rig.path("one")), text(&rig.path("view"))]
}

fn commit_first(rig: &ViewRig) -> Vec<String> {
    vec!["commit".into(), text(&rig.path("one"))]
}

fn sealed(rig: &ViewRig) {
    done(&seal_both(rig));
}

fn sealed_and_changed(rig: &ViewRig) {
    sealed(rig);
    std::fs::write(rig.path("one/dir/f0"), vec![77; 9000]).expect("room on the rig");
    std::fs::remove_file(rig.path("one/dir/f1")).expect("it is there");
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
}

/// So much stays as it is that the change becomes a layer over the image.
fn little_changed(rig: &ViewRig) {
    for n in 0..40 {
        rig.make_dir(&format!("one/filler/d{n}"));
    }
    sealed_and_changed(rig);
}

/// A root that was sealed twice and one that was unsealed: anchors and an image that nobody needs.
fn orphaned(rig: &ViewRig) {
    sealed_and_changed(rig);
    done(&seal_both(rig));
    done(&["unseal".as_ref(), rig.path("two").as_os_str()]);
}

/// A view that was written and is unmounted.
fn written(rig: &ViewRig) {
    use std::io::Write;
    sealed(rig);
    done(&mount_first(rig));
    let view = rig.path("view");
    let mut appended = std::fs::OpenOptions::new().append(true).open(view.join("dir/f2")).expect("writable");
    appended.write_all(b"appended").expect("room on the rig");
    drop(appended);
    std::fs::remove_file(view.join("dir/f3")).expect("it is there");
    std::fs::create_dir(view.join("made")).expect("room on the rig");
    std::fs::write(view.join("made/new"), vec![42; 20_000]).expect("room on the rig");
    std::fs::rename(view.join("dir/f4"), view.join("made/moved")).expect("one overlay");
    done(&["umount".as_ref(), view.as_os_str()]);
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
}

/// A fresh pair of clones, or copies of a layer; nothing else on the rig.
fn prepare(rig: &ViewRig) {
    for name in ["one", "two", "layer"] {
        let _ = std::fs::remove_dir_all(rig.path(name));
    }
    rig.make_dir("view");
    for (path, bytes) in sealed_files() {
        let path = rig.path("one").join(path);
        std::fs::create_dir_all(path.parent().expect("below a directory")).expect("room on the rig");
        std::fs::write(path, bytes).expect("room on the rig");
    }
    let copies: &[&str] = if borrows(rig) { &["two", "layer"] } else { &["two"] };
    for copy in copies {
        let reflink = if borrows(rig) { "--reflink=never" } else { "--reflink=always" };
        must(Command::new("cp").args(["-a", reflink]).arg(rig.path("one")).arg(rig.path(copy)));
    }
    if borrows(rig) {
        // Larger than nothing, and in no root: never borrowed.
        std::fs::write(rig.path("layer/unused"), "in no root").expect("room on the rig");
    }
    must(Command::new("sync").arg("-f").arg(rig.rig.path()));
}

fn files_below(root: &Path) -> Files {
    let mut files = Files::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                files.insert(path.strip_prefix(root).expect("below").to_owned(), bytes);
            }
        }
    }
    files
}

/// The steps that a scenario's command passes, from a run to its end.
fn steps_of(rig: &ViewRig, scenario: &Scenario) -> BTreeSet<String> {
    prepare(rig);
    (scenario.before)(rig);
    let log = rig.path("steps");
    let _ = std::fs::remove_file(&log);
    let output = pagefold().args((scenario.command)(rig)).env("PAGEFOLD_STEPS_TO", &log).output();
    let output = output.expect("pagefold starts");
    assert!(output.status.success(), "{}: {}", scenario.name, told(&output));
    let steps = std::fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect();
    finish(rig, scenario);
    steps
}

/// Everything holds after the command ran to its end; then all is taken away again.
fn finish(rig: &ViewRig, scenario: &Scenario) {
    let one = files_below(&rig.path("one"));
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&one), names(&(scenario.after)()), "{}", scenario.name);
    assert!(one == (scenario.after)(), "{}: a file's bytes are wrong", scenario.name);
    assert!(files_below(&rig.path("two")) == sealed_files(), "{}: the other root changed", scenario.name);
    if rig.path(".pagefold").exists() {
        let verified = run(&on_store(rig, &["verify"]));
        assert!(verified.status.success(), "{}: {}", scenario.name, told(&verified));
        if scenario.name == "mount" {
            assert!(files_below(&rig.path("view")) == sealed_files(), "the view shows something else");
            done(&["umount".as_ref(), rig.path("view").as_os_str()]);
        }
        done(&on_store(rig, &["unseal", "--all", "--commit"]));
    }
    assert!(!rig.path(".pagefold").exists(), "{}: the store is still there", scenario.name);
    if borrows(rig) {
        let facts = layer_facts(rig);
        assert_eq!(facts.len(), sealed_files().len() + 1, "{}", scenario.name);
        for (path, bytes, _, _, links) in facts {
            assert_eq!(links, 1, "{}: {path:?} of the layer has still a name in a store", scenario.name);
            assert!(sealed_files().get(&path).is_none_or(|b| *b == bytes), "{}: {path:?}", scenario.name);
        }
    }
}

/// Ends the command at `step`. False when it got to its end instead.
///
/// A process that starts a mount namespace anywhere on the host takes a copy of every mount with it, and for that moment our view
/// is in use: then the command rightly refuses, and is tried again.
fn crash_at(rig: &mut ViewRig, scenario: &Scenario, step: &str, crash: Crash) -> bool {
    let started = Instant::now();
    loop {
        match try_crash_at(rig, scenario, step, crash) {
            Ok(()) => return true,
            Err(told) if told.contains("another mount namespace") && started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(told) => {
                println!("{}: {step}: {told}", scenario.name);
                return false;
            }
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

fn try_crash_at(rig: &mut ViewRig, scenario: &Scenario, step: &str, crash: Crash) -> Result<(), String> {
    let mut command = pagefold();
    command.args((scenario.command)(rig)).stdout(Stdio::null()).stderr(Stdio::piped());
    let variable = if crash == Crash::Kill { "PAGEFOLD_CRASH_AT" } else { "PAGEFOLD_STOP_AT" };
    let mut child = command.env(variable, step).spawn().expect("pagefold starts");
    if crash == Crash::Kill {
        let output = child.wait_with_output().expect("it ends");
        return if output.status.signal() == Some(9) { Ok(()) } else { Err(told(&output)) };
    }
    if !stops(&mut child) {
        return Err(told(&child.wait_with_output().expect("it ended")));
    }
    let in_the_dark = || {
        let _ = child.kill();
        let _ = child.wait();
    };
    rig.rig.cut_power_and(in_the_dark).unwrap_or_else(|e| panic!("{}: {step}: {e}", scenario.name));
    Ok(())
}

/// Waits until the child is stopped; false when it ended.
fn stops(child: &mut Child) -> bool {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        if child.try_wait().expect("it is ours").is_some() {
            return false;
        }
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("the command neither stopped nor ended");
}

fn every_step(fs: RigFs, crash: Crash) {
    let mut rig = ViewRig::new(fs);
    let (mut crashes, mut layers) = (0, false);
    for scenario in &SCENARIOS {
        for step in steps_of(&rig, scenario) {
            layers |= scenario.name == "seal a layer" && step == "seal.diff.made";
            prepare(&rig);
            let layer = borrows(&rig).then(|| layer_facts(&rig));
            (scenario.before)(&rig);
            assert!(crash_at(&mut rig, scenario, &step, crash), "{}: {step} was not reached", scenario.name);
            crashes += 1;
            let what = format!("{} ended at {step} by {crash:?} on {fs:?}", scenario.name);
            if scenario.name != "commit" && scenario.name != "unseal" {
                let expected =
                    if matches!(scenario.name, "seal" | "mount") { sealed_files() } else { changed_files() };
                assert!(files_below(&rig.path("one")) == expected, "{what}: the raw root changed");
            }
            assert!(files_below(&rig.path("two")) == sealed_files(), "{what}: the other raw root changed");
            again(&rig, scenario, &what);
            finish(&rig, scenario);
            assert!(layer.is_none_or(|before| before == layer_facts(&rig)), "{what}: the layer changed");
        }
    }
    assert!(crashes > 20, "only {crashes} crashes: steps are missing");
    assert!(layers, "no layer was made");
}

/// Runs the command again. What had been done already is no error: a view that is mounted, a store that is gone.
fn again(rig: &ViewRig, scenario: &Scenario, what: &str) {
    let mounted = scenario.name == "mount" && rig.path("view/small").exists();
    let gone = scenario.name == "unseal" && !rig.path(".pagefold").exists();
    if mounted || gone {
        return;
    }
    let (mut output, started) = (run(&(scenario.command)(rig)), Instant::now());
    while told(&output).contains("another mount namespace") && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(100));
        output = run(&(scenario.command)(rig));
    }
    assert!(output.status.success(), "{what}: run again: {}", told(&output));
}

#[test]
fn privileged_kill_at_every_step_on_xfs() {
    every_step(RigFs::Xfs, Crash::Kill);
}

#[test]
fn privileged_kill_at_every_step_on_btrfs() {
    every_step(RigFs::Btrfs, Crash::Kill);
}

#[test]
fn privileged_kill_at_every_step_with_a_borrowed_layer_on_ext4() {
    every_step(RigFs::Ext4, Crash::Kill);
}

#[test]
fn privileged_kill_at_every_step_with_a_borrowed_layer_on_xfs_without_reflink() {
    every_step(RigFs::XfsNoReflink, Crash::Kill);
}

#[test]
fn privileged_power_cut_at_every_step_with_a_borrowed_layer_on_xfs_without_reflink() {
    every_step(RigFs::XfsNoReflink, Crash::PowerCut);
}

#[test]
fn privileged_power_cut_at_every_step_on_xfs() {
    every_step(RigFs::Xfs, Crash::PowerCut);
}

#[test]
fn privileged_power_cut_at_every_step_on_btrfs() {
    every_step(RigFs::Btrfs, Crash::PowerCut);
}
