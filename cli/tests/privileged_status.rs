//! `status`, `explain`, `prefault` on real file systems, through the binary: each figure against one that was found another way.
//!
//! What it deliberately does not test: sealing and mounting themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{PAGE, append, noise, pagefold, reflink, rig, start_written, sync};
use pagefold_fsadapters::memcg::{Hierarchy, Memcg};
use pagefold_testfs::rig::{LoopRig, RigFs};
use serde_json::Value;

/// Pages of `data1` and `data2`.
const DATA: u64 = 1024;
/// Pages of the file that only the first root has.
const ALONE: u64 = 3;
/// How long something may take that will surely come.
const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three roots that share `sleep`, `data1`, `data2`; the first has a file of its own. Sealed; unmounted when dropped.
struct Farm {
    rig: LoopRig,
}

impl Farm {
    fn new(kind: RigFs) -> Farm {
        Farm::changed(kind, |_| {})
    }

    /// `change` comes before the roots are sealed.
    fn changed(kind: RigFs, change: impl FnOnce(&Farm)) -> Farm {
        let rig = rig(kind);
        for name in NAMES {
            fs::create_dir_all(rig.path().join("roots").join(name)).expect("a root");
            fs::create_dir_all(rig.path().join("at").join(name)).expect("a target");
        }
        let farm = Farm { rig };
        let first = farm.raw("a", "");
        fs::copy("/bin/sleep", first.join("sleep")).expect("a program");
        for (seed, name) in [(1, "data1"), (2, "data2")] {
            fs::write(first.join(name), noise(seed, (DATA * PAGE) as usize)).expect("data");
        }
        sync(&first);
        for (root, file) in
            [("b", "sleep"), ("b", "data1"), ("b", "data2"), ("c", "sleep"), ("c", "data1"), ("c", "data2")]
        {
            reflink(&farm.raw("a", file), &farm.raw(root, file));
        }
        for root in NAMES {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(farm.raw(root, "sleep"), mode).expect("executable");
        }
        fs::write(farm.raw("a", "alone"), noise(3, (ALONE * PAGE) as usize)).expect("data");
        fs::write(farm.raw("a", "empty"), b"").expect("data");
        sync(&first);
        change(&farm);
        let roots = NAMES.map(|name| farm.raw(name, ""));
        assert_eq!(farm.run(&["seal"], &roots.each_ref().map(PathBuf::as_path)).1, 0);
        farm
    }

    fn raw(&self, root: &str, file: &str) -> PathBuf {
        self.rig.path().join("roots").join(root).join(file)
    }

    fn view(&self, root: &str, file: &str) -> PathBuf {
        self.rig.path().join("at").join(root).join(file)
    }

    /// (stdout, exit code); fails on a signal.
    fn run(&self, args: &[&str], paths: &[&Path]) -> (String, i32) {
        let mut command = pagefold();
        command
            .arg(args[0])
            .arg("--store")
            .arg(self.rig.path().join(".pagefold"))
            .args(&args[1..])
            .args(paths);
        let output = command.output().expect("the binary runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code().unwrap_or_else(|| panic!("{args:?} was killed: {said}"));
        assert!(code < 2, "{args:?}: {code}: {said}");
        if code > 0 {
            eprintln!("{args:?}: {code}: {said}{}", String::from_utf8_lossy(&output.stdout));
        }
        (String::from_utf8(output.stdout).expect("text"), code)
    }

    fn json(&self, args: &[&str], paths: &[&Path]) -> Value {
        let (text, _) = self.run(&[args, &["--format", "json"]].concat(), paths);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("no JSON: {e}: {text}"))
    }

    fn status(&self) -> Value {
        let status = self.json(&["status"], &[]);
        assert_eq!(status["schema"], "pagefold.status/1");
        assert_eq!(status["errors"], Value::Array(vec![]));
        status
    }

    fn explain(&self, path: &Path) -> Value {
        let told = self.json(&["explain"], &[path]);
        assert_eq!(told["schema"], "pagefold.explain/1");
        told
    }

    fn mount(&self) {
        let at = self.rig.path().join("at");
        let (_, code) = self.run(&["mount", "--all", "--at"], &[&at]);
        assert_eq!(code, 0);
    }

    /// The status while `sleepers` have mapped what is told with it: the kernel may take pages from them at any time, so it is asked until
    /// nothing has moved meanwhile.
    fn status_and_mapped<const N: usize>(&self, sleepers: &[Sleeper; N]) -> (Value, [(u64, u64, u64); N]) {
        for _ in 0..20 {
            let before = sleepers.each_ref().map(Sleeper::mapped);
            let status = self.status();
            if sleepers.each_ref().map(Sleeper::mapped) == before {
                return (status, before);
            }
        }
        panic!("what is mapped does not hold still");
    }

    /// Runs the view's own program.
    fn sleeper(&self, root: &str) -> Sleeper {
        self.program(root, "sleep")
    }

    fn program(&self, root: &str, name: &str) -> Sleeper {
        let mut program = Command::new(self.view(root, name));
        program.arg("60").stdin(Stdio::null());
        let sleeper = Sleeper(start_written(|| program.spawn()).expect("starts"));
        // Until it sleeps, it still brings pages in. The kernel tells which call a process is in only while it rests there.
        let call = format!("/proc/{}/syscall", sleeper.0.id());
        let calls = if cfg!(target_arch = "x86_64") { ["230 ", "35 "] } else { ["115 ", "101 "] };
        let started = Instant::now();
        loop {
            let at = fs::read_to_string(&call).unwrap_or_default();
            if calls.iter().any(|call| at.starts_with(call)) {
                return sleeper;
            }
            assert!(started.elapsed() < PATIENCE, "it never sleeps: {at}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        for root in NAMES {
            let _ = rustix::mount::unmount(self.view(root, ""), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

struct Sleeper(Child);

impl Sleeper {
    /// From smaps, of the mappings of `sleep`: (file pages in memory, proportional share of them, mappings), bytes.
    fn mapped(&self) -> (u64, u64, u64) {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.0.id())).expect("smaps");
        let (mut ours, mut sums) = (false, [0u64; 4]);
        let mut areas = 0;
        for line in text.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            if !first.ends_with(':') {
                ours = line.ends_with("/sleep");
                areas += u64::from(ours);
            } else if ours
                && let Some(at) = ["Rss:", "Anonymous:", "Pss:", "Pss_Anon:"].iter().position(|f| *f == first)
            {
                sums[at] +=
                    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("kB") << 10;
            }
        }
        // There is no Pss_Anon per mapping: an anonymous page of a process without children is all its own.
        (sums[0] - sums[1], sums[2] - sums[1], areas)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn number(json: &Value, field: &str) -> u64 {
    json[field].as_u64().unwrap_or_else(|| panic!("{field} in {json:#}"))
}

fn root<'a>(status: &'a Value, name: &str) -> &'a Value {
    let roots = status["roots"].as_array().expect("roots");
    roots.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("root {name}"))
}

/// Potential, logical and measured savings are three figures.
fn could_is_now(kind: RigFs) {
    let farm = Farm::new(kind);
    let program = fs::metadata("/bin/sleep").expect("sleep").len().div_ceil(PAGE);
    let common = program + 2 * DATA;
    let before = farm.status();
    let totals = &before["totals"];
    let found = ["pages_shared", "pages_sharing", "pages_unshared", "could_be_saved_bytes"]
        .map(|f| number(totals, f));
    assert_eq!(found, [common, 2 * common, ALONE, 2 * common * PAGE]);
    assert_eq!(
        (number(totals, "is_shared_bytes"), number(totals, "saved_now_bytes")),
        (0, 0),
        "nothing is mounted"
    );

    farm.mount();
    let mounted = farm.status();
    assert_eq!(number(&mounted["totals"], "is_shared_bytes"), 2 * common * PAGE);
    assert_eq!(number(&mounted["totals"], "saved_now_bytes"), 0, "nothing runs");

    let sleepers = NAMES.map(|name| farm.sleeper(name));
    let (running, mapped) = farm.status_and_mapped(&sleepers);
    let (rss, pss, areas) = mapped.iter().fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
    let of_views: u64 = NAMES.iter().map(|name| number(root(&running, name), "mapped_bytes")).sum();
    assert_eq!(of_views, rss, "each view's own mapped pages, as smaps tells them");
    let distinct = number(&running["totals"], "mapped_bytes");
    // smaps rounds each mapping's share down to KiB.
    assert!(distinct.abs_diff(pss) <= areas << 10, "distinct {distinct}, sum of shares {pss}");
    assert!(distinct > 0);
    assert_eq!(number(&running["totals"], "saved_now_bytes"), rss - distinct);

    // A second process of one view saves nothing more: its pages would have been that view's copy.
    let again = farm.sleeper("a");
    let (more, mapped) = farm.status_and_mapped(&sleepers);
    let rss: u64 = mapped.iter().map(|m| m.0).sum();
    assert_eq!(number(&more["totals"], "saved_now_bytes"), rss - number(&more["totals"], "mapped_bytes"));
    assert_eq!(number(root(&more, "a"), "processes"), 2);
    drop((again, sleepers));
    assert_eq!(number(&farm.status()["totals"], "saved_now_bytes"), 0, "nothing runs any more");
}

#[test]
fn privileged_status_tells_three_savings_apart_xfs() {
    could_is_now(RigFs::Xfs);
}

#[test]
fn privileged_status_tells_three_savings_apart_btrfs() {
    could_is_now(RigFs::Btrfs);
}

/// Files of a layer over a shared image are numbered on the file system of what views write, and are no less known.
fn files_of_a_layer_are_known(kind: RigFs) {
    let farm = Farm::changed(kind, |farm| {
        for n in 0..40 {
            fs::create_dir_all(farm.raw("a", &format!("filler/d{n}"))).expect("room on the rig");
        }
        for clone in ["b", "c"] {
            fs::remove_dir_all(farm.raw(clone, "")).expect("there");
            let status = Command::new("cp").arg("-a").args([farm.raw("a", ""), farm.raw(clone, "")]).status();
            assert!(status.expect("cp starts").success());
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
            fs::set_permissions(farm.raw(clone, "sleep"), mode).expect("own");
        }
        sync(&farm.raw("a", ""));
    });
    farm.mount();
    let sleepers = NAMES.map(|name| farm.sleeper(name));
    let (status, mapped) = farm.status_and_mapped(&sleepers);
    let rss = mapped.iter().map(|m| m.0).sum::<u64>();
    let of_views: u64 = NAMES.iter().map(|name| number(root(&status, name), "mapped_bytes")).sum();
    assert!(rss > 0);
    assert_eq!(of_views, rss, "each view's own mapped pages, as smaps tells them");
    drop(sleepers);
    // The same number is kept by a copy of the file.
    append(&farm.view("b", "sleep"), b"more");
    fs::write(farm.view("b", "new"), noise(4, 5000)).expect("room on the rig");
    let sleepers = NAMES.map(|name| farm.sleeper(name));
    let (status, mapped) = farm.status_and_mapped(&sleepers);
    assert_eq!(number(root(&status, "b"), "mapped_bytes"), 0, "its pages are its own");
    assert_eq!(number(root(&status, "c"), "mapped_bytes"), mapped[2].0);
}

#[test]
fn privileged_status_knows_files_of_a_layer_xfs() {
    files_of_a_layer_are_known(RigFs::Xfs);
}

#[test]
fn privileged_status_knows_files_of_a_layer_btrfs() {
    files_of_a_layer_are_known(RigFs::Btrfs);
}

#[test]
fn privileged_status_claims_nothing_for_a_written_file() {
    let farm = Farm::new(RigFs::Btrfs);
    farm.mount();
    // Bytes after its end don't matter to a program.
    append(&farm.view("b", "sleep"), b"more");
    let sleepers = NAMES.map(|name| farm.sleeper(name));
    let (status, mapped) = farm.status_and_mapped(&sleepers);
    let (rss, _, _) = mapped[0];
    assert_eq!(number(root(&status, "b"), "mapped_bytes"), 0, "its pages are its own");
    assert_eq!(number(root(&status, "b"), "processes"), 1);
    assert_eq!(number(root(&status, "a"), "mapped_bytes"), rss);
    let (of_a, of_c) = (rss, number(root(&status, "c"), "mapped_bytes"));
    let distinct = number(&status["totals"], "mapped_bytes");
    assert!(distinct >= of_a.max(of_c));
    assert_eq!(number(&status["totals"], "saved_now_bytes"), of_a + of_c - distinct);
    assert!(sleepers[1].mapped().0 > 0, "it does run");
}

/// Its number stays that of the sealed file, its path does not.
fn a_written_file_that_moved(kind: RigFs) {
    let farm = Farm::new(kind);
    farm.mount();
    append(&farm.view("b", "sleep"), b"more");
    fs::create_dir(farm.view("b", "new")).expect("room on the rig");
    fs::rename(farm.view("b", "sleep"), farm.view("b", "new/moved")).expect("moved");
    let sleepers = [farm.sleeper("a"), farm.program("b", "new/moved")];
    let status = farm.status();
    assert_eq!(number(root(&status, "b"), "processes"), 1);
    assert_eq!(number(root(&status, "b"), "mapped_bytes"), 0, "its pages are its own");
    assert_eq!(number(&status["totals"], "saved_now_bytes"), 0);
    drop(sleepers);
}

#[test]
fn privileged_status_claims_nothing_for_a_written_file_that_moved_xfs() {
    a_written_file_that_moved(RigFs::Xfs);
}

#[test]
fn privileged_status_claims_nothing_for_a_written_file_that_moved_btrfs() {
    a_written_file_that_moved(RigFs::Btrfs);
}

#[test]
fn privileged_status_sees_writes_of_views_and_of_raw_roots() {
    let farm = Farm::new(RigFs::Xfs);
    farm.mount();
    let shared = number(&farm.status()["totals"], "is_shared_bytes");
    append(&farm.view("b", "data1"), b"more");
    fs::write(farm.view("b", "new"), b"12345").expect("written");
    fs::remove_file(farm.view("c", "data2")).expect("removed");
    append(&farm.raw("c", "sleep"), b"more");
    let status = farm.status();
    let (b, c) = (root(&status, "b"), root(&status, "c"));
    assert_eq!((number(b, "broken_files"), number(b, "broken_bytes")), (1, DATA * PAGE + 4));
    assert_eq!((number(b, "added_files"), number(b, "added_bytes")), (1, 5));
    assert_eq!((number(c, "broken_files"), number(c, "removed")), (0, 1));
    assert_eq!((number(b, "metadata_only_files"), number(b, "other_entries")), (0, 0));
    let attributes = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(farm.view("b", "data2"), attributes).expect("changed");
    fs::create_dir(farm.view("b", "dir")).expect("room on the rig");
    let b = &farm.status();
    let b = root(b, "b");
    assert_eq!((number(b, "metadata_only_files"), number(b, "other_entries")), (1, 1));
    assert_eq!(number(&status["totals"], "is_shared_bytes"), shared - 2 * DATA * PAGE);
    assert_eq!(number(&b["raw_changes"], "changed"), 0);
    assert_eq!(c["raw_changes"]["examples"], serde_json::json!(["sleep"]));
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("export") && warnings.contains("raw root of c changed"), "{warnings}");
    let quick = farm.json(&["status", "--quick"], &[]);
    assert_eq!(root(&quick, "c")["raw_changes"], Value::Null);
    // Where it is mounted is told, other mount namespaces included.
    let mounted = root(&status, "a")["mounted"].as_array().expect("mounts").clone();
    assert!(
        mounted.iter().any(|m| m["path"] == farm.view("a", "").to_str().expect("text").trim_end_matches('/'))
    );
}

#[test]
fn privileged_status_knows_views_that_are_id_mapped_or_in_place() {
    let farm = Farm::new(RigFs::Xfs);
    let (raw, at) = (farm.raw("a", ""), farm.view("a", ""));
    farm.run(&["mount", "--idmap", "0:100000:65536"], &[&raw, &at]);
    let in_place = farm.raw("b", "");
    farm.run(&["mount"], &[&in_place, &in_place]);
    let status = farm.status();
    assert_eq!(number(&status["totals"], "views"), 2);
    let place = |name: &str| root(&status, name)["mounted"][0]["path"].as_str().map(PathBuf::from);
    assert_eq!(
        (place("a"), place("b")),
        (Some(at.components().collect()), Some(in_place.components().collect()))
    );
    assert_eq!(number(&root(&status, "b")["raw_changes"], "changed"), 0, "the raw root below its view");
    assert_eq!(farm.explain(&farm.view("a", "data1"))["place"], "view");
    assert_eq!(farm.explain(&farm.raw("b", "data1"))["place"], "view");
    rustix::mount::unmount(&in_place, rustix::mount::UnmountFlags::empty()).expect("unmounted");
}

#[test]
fn privileged_explain_has_a_verdict_for_every_case() {
    let farm = Farm::new(RigFs::Btrfs);
    farm.mount();
    fs::write(farm.view("a", "new"), b"x").expect("written");
    append(&farm.view("b", "data1"), b"more");
    let verdict = |path: &Path| farm.explain(path)["verdict"].as_str().expect("a verdict").to_owned();
    for (path, want) in [
        (farm.view("a", "data1"), "shared"),
        (farm.view("a", "alone"), "alone"),
        (farm.view("a", "empty"), "empty"),
        (farm.view("a", "new"), "not_sealed"),
        (farm.view("b", "data1"), "broken"),
        (farm.view("c", "data1"), "shared"),
        (farm.view("a", ""), "not_a_file"),
        (farm.raw("a", "data1"), "raw_copy"),
    ] {
        assert_eq!(verdict(&path), want, "{path:?}");
    }
    let told = farm.explain(&farm.view("a", "data2"));
    assert_eq!((number(&told, "sites"), told["site_list"].as_array().map(Vec::len)), (3, Some(3)));
    let anchor = Path::new(told["anchor"]["path"].as_str().expect("a path"));
    assert_eq!(verdict(anchor), "shared");
    fs::read(farm.view("c", "data2")).expect("read");
    let resident = number(&farm.explain(&farm.view("a", "data2"))["anchor"], "resident_pages");
    assert!(resident >= DATA - 16, "read in one view, cached for all: {resident}");
    let mut stranger = pagefold();
    let output = stranger.args(["explain", "/etc/passwd", "--store"]).arg(farm.rig.path().join(".pagefold"));
    let output = output.output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is in no sealed root"));
}

/// A memory group of a container, removed when dropped.
struct Container(Memcg);

impl Container {
    fn new(hierarchy: &Hierarchy, name: &str) -> Container {
        Container(hierarchy.group(&format!("pagefold-test-{}-{name}", std::process::id())).expect("a group"))
    }

    /// Reads a file in it; what it is charged for then, `expected` bytes or more. The kernel sums up every two seconds, or later when it is
    /// busy; and what it took away meanwhile, for others who need memory, is read again.
    fn read(&self, path: &Path, expected: u64) -> u64 {
        let started = Instant::now();
        loop {
            let status = Command::new("/bin/sh")
                .args(["-c", "echo 0 > \"$1\"; exec cat \"$2\" > /dev/null", "sh"])
                .args([&self.0.procs_file(), path])
                .status();
            assert!(status.expect("a shell").success());
            std::thread::sleep(Duration::from_millis(2200));
            let charge = self.0.charge().expect("its charge").file;
            if charge >= expected || started.elapsed() > PATIENCE {
                return charge;
            }
        }
    }

    /// What it is charged for once that is `expected` bytes, or in the end.
    fn charged(&self, expected: u64) -> u64 {
        let started = Instant::now();
        loop {
            let charge = self.0.charge().expect("its charge").file;
            if charge >= expected || started.elapsed() > PATIENCE {
                return charge;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn name(&self) -> String {
        self.0.path().file_name().expect("a name").to_string_lossy().into_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

#[test]
fn privileged_prefault_charges_pagefold_and_no_container() {
    let farm = Farm::new(RigFs::Xfs);
    farm.mount();
    let hierarchy = Hierarchy::open(&std::env::temp_dir()).expect("this test needs memory groups");
    let containers = ["first", "second"].map(|name| Container::new(&hierarchy, name));
    let own = Container::new(&hierarchy, "own");
    // The kernel may take a few pages back at any time.
    let data = DATA * PAGE - 16 * PAGE;
    let first = containers[0].read(&farm.view("a", "data1"), data);
    assert!(
        first >= data,
        "who reads first pays: {first} of {data}, {}",
        farm.explain(&farm.view("a", "data1"))
    );
    let report = farm.json(&["prefault", "--cgroup", &own.name()], &[]);
    assert_eq!(report["schema"], "pagefold.prefault/1");
    assert!(number(&report, "cached_before_bytes") >= data, "data1 is paid for already: {report}");
    assert!(number(&report, "read_bytes") >= data, "{report}");
    let before = containers[1].0.charge().expect("its charge").file;
    let after = containers[1].read(&farm.view("b", "data2"), 0);
    assert!(after - before < data / 4, "the second container pays nothing for data2: {before} {after}");
    assert!(own.charged(data) >= data, "pagefold's group does");

    let status = farm.json(&["status", "--who-pays", "--quick"], &[]);
    let pays = |group: &Container| {
        let payers = status["who_pays"].as_array().expect("payers");
        let payer = payers.iter().find(|p| p["group"].as_str().is_some_and(|g| g.ends_with(&group.name())));
        payer.map_or(0, |p| number(p, "bytes"))
    };
    assert!(pays(&containers[0]) >= data, "{status:#}");
    assert!(pays(&own) >= data, "{status:#}");
    assert!(pays(&containers[1]) < data / 4, "{status:#}");
}

#[test]
fn privileged_prefault_keeps_to_its_limit() {
    let farm = Farm::new(RigFs::Xfs);
    let hierarchy = Hierarchy::open(&std::env::temp_dir()).expect("this test needs memory groups");
    let own = Container::new(&hierarchy, "limit");
    let limit = DATA * PAGE + DATA * PAGE / 2;
    let args = ["prefault", "--cgroup", &own.name(), "--max", &limit.to_string()];
    let report = farm.json(&args, &[]);
    assert!((1..=limit).contains(&number(&report, "read_bytes")), "{report}");
    assert_eq!(number(&report, "over_limit"), 1, "one of the two large files: {report}");
    let hot = farm.json(&["prefault", "--hot", "--cgroup", &own.name()], &[]);
    assert_eq!(number(&hot, "read_bytes"), 0, "what is hot is complete: {hot}");
}

#[test]
fn privileged_mount_charges_pagefold_and_no_container_when_told() {
    let farm = Farm::new(RigFs::Xfs);
    let hierarchy = Hierarchy::open(&std::env::temp_dir()).expect("this test needs memory groups");
    let (own, guest) = (Container::new(&hierarchy, "charge"), Container::new(&hierarchy, "guest"));
    let before = hierarchy.own().expect("our group").path().to_owned();
    let at = farm.rig.path().join("at");
    let charge = format!("--charge={}", own.name());
    let (_, code) = farm.run(&["mount", &charge, "--all", "--at"], &[&at]);
    assert_eq!(code, 0);
    let data = DATA * PAGE - 16 * PAGE;
    // What one root has alone is nobody's to pay for beforehand. With it comes what the container's own programs take.
    let alone = guest.read(&farm.view("a", "alone"), ALONE * PAGE);
    assert!(alone >= ALONE * PAGE, "{alone}");
    for name in ["data1", "data2"] {
        let paid = guest.read(&farm.view("b", name), 0);
        assert!(paid < alone + data / 4, "the container pays for what views share: {alone}, {paid}");
    }
    let charged = own.charged(2 * data);
    assert!(charged >= 2 * data, "pagefold's group pays for both files: {charged}");
    assert_eq!(own.0.processes().expect("there"), [] as [u32; 0]);
    assert_eq!(hierarchy.own().expect("our group").path(), before);
}

/// Something mounted over a directory until this is dropped.
struct Cover(PathBuf);

impl Drop for Cover {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn privileged_status_tells_what_covers_a_raw_root_and_goes_on() {
    use rustix::mount::{MountFlags, mount, mount_bind};
    let farm = Farm::new(RigFs::Xfs);
    let root = farm.raw("b", "");
    for kind in ["tmpfs", "xfs"] {
        match kind {
            "tmpfs" => mount("a stranger", &root, "tmpfs", MountFlags::empty(), None).expect("root may"),
            _ => mount_bind(farm.raw("c", ""), &root).expect("root may"),
        }
        let cover = Cover(root.clone());
        let status = farm.status();
        let rows = status["roots"].as_array().expect("rows");
        assert_eq!(rows.len(), NAMES.len(), "{status:#}");
        for row in rows {
            let covered = row["raw_covered_by"].as_str();
            if row["name"] == "b" {
                let told = covered.unwrap_or_else(|| panic!("{kind}: nothing told: {status:#}"));
                assert!(told.contains(kind) && told.contains("roots/b"), "{told}");
                assert_eq!(row["raw_changes"], Value::Null);
            } else {
                assert_eq!((covered, &row["raw_changes"]["changed"]), (None, &0.into()), "{row:#}");
            }
        }
        let warned = status["warnings"].to_string();
        assert!(warned.contains("the raw root of b") && warned.contains("in the way"), "{warned}");
        let (table, code) = farm.run(&["status"], &[]);
        assert!(code == 0 && table.contains("covered"), "{code}: {table}");
        drop(cover);
        assert!(!farm.run(&["status"], &[]).0.contains("covered"));
    }
}
