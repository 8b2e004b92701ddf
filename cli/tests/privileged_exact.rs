//! Exactness: on farms with recorded drift, on real file systems, every figure of `pagefold scan --format json`
//! equals the ground truth that `pagefold_testfs::truth` computes from the manifest, from the bytes and from `mincore`.
//!
//! Nothing is compared with a tolerance. Each test makes its own loopback file system; without root they fail.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use pagefold_testfs::farm::{self, FarmFs, FarmSpec, ImageSpec, Manifest, SyntheticSpec};
use pagefold_testfs::rig::{LoopRig, RigFs};
use pagefold_testfs::truth::{Expected, Figures, Truth};
use rustix::fs::Advice;
use serde_json::Value;

const PAGE: u64 = 4096;

/// A farm on a file system of its own, nothing cached, and the two truths about it.
struct Case {
    // Before the rig: nothing may be open when that goes.
    manifest: Manifest,
    by_provenance: Truth,
    by_bytes: Truth,
    dir: PathBuf,
    _rig: LoopRig,
}

fn case(fs: RigFs, snapshots: bool, seed: u64) -> Case {
    case_of(fs, snapshots, seed, ImageSpec::Synthetic(SyntheticSpec { files: 250, max_bytes: 256 << 10 }))
}

fn case_of(fs: RigFs, snapshots: bool, seed: u64, image: ImageSpec) -> Case {
    let mut rig = LoopRig::new(fs).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"));
    let dir = rig.path().join("farm");
    let spec = FarmSpec {
        image,
        roots: 4,
        drift_percent: 20.0,
        seed,
        fs: if fs.kind() == "xfs" { FarmFs::Xfs } else { FarmFs::Btrfs },
        snapshots,
        ..FarmSpec::new(&dir)
    };
    let manifest =
        farm::create(&spec, &|_| (), &AtomicBool::new(false)).unwrap_or_else(|e| panic!("farm: {e}"));
    let by_provenance = Truth::by_provenance(&dir, &manifest).expect("a synced farm is derivable");
    let by_bytes = Truth::by_bytes(&dir, &manifest).expect("readable");
    rig.remount().expect("nothing is open");
    Case { manifest, by_provenance, by_bytes, dir, _rig: rig }
}

impl Case {
    /// Brings a seeded part of the farm into the cache: whole files, and single pages of others.
    fn read_some(&self, seed: u64) {
        let mut state = seed;
        let mut draw = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound.max(1)
        };
        for (root, file) in self.by_bytes.roots.iter().flat_map(|r| r.files.iter().map(move |f| (r, f))) {
            let path = root.path.join(&file.names[0]);
            match draw(6) {
                0 | 1 => drop(std::fs::read(&path).expect("readable")),
                2 => {
                    let open = std::fs::File::open(&path).expect("readable");
                    // Without read-ahead only what is asked for comes in, so that files are cached in part.
                    rustix::fs::fadvise(open.as_fd(), 0, None, Advice::Random).expect("advice");
                    for _ in 0..3 {
                        let mut byte = [0u8; 1];
                        let _ = rustix::io::pread(&open, &mut byte, draw(file.size)).expect("readable");
                    }
                }
                _ => {}
            }
        }
        self.settle();
    }

    /// Waits until read-ahead that is still under way has come in: `mincore` tells only of pages that are up to date.
    fn settle(&self) {
        let mut now = self.by_bytes.clone();
        loop {
            let before = now.clone();
            std::thread::sleep(std::time::Duration::from_millis(100));
            now.look_at_cache().expect("readable");
            if now == before && now.expected().totals.resident_bytes == fincore_pages(&now) * PAGE {
                return;
            }
        }
    }

    fn roots(&self) -> Vec<PathBuf> {
        (0..self.manifest.roots.len()).map(|i| self.manifest.root_path(&self.dir, i)).collect()
    }

    /// The scan equals what the manifest says, and leaves the cache as it was.
    fn check_extents(&mut self, what: &str) -> Result<(), String> {
        let roots = self.roots();
        let truth = &mut self.by_provenance;
        for _ in 0..TRIES {
            truth.look_at_cache().expect("readable");
            let before = truth.clone();
            let counted = fincore_pages(&before);
            let report = scan(&roots, &[]);
            truth.look_at_cache().expect("readable");
            if *truth == before {
                let expected = before.expected();
                assert_eq!(
                    expected.totals.resident_bytes,
                    counted * PAGE,
                    "{what}: mincore and fincore disagree"
                );
                return differences(&report, &roots, &expected, what);
            }
        }
        panic!("{what}: what is cached changed each time while extents were scanned");
    }

    /// The scan equals what the bytes say, and brings in less than 2 % of what it reads.
    fn check_content(&mut self, what: &str) {
        let roots = self.roots();
        let truth = &mut self.by_bytes;
        for _ in 0..TRIES {
            truth.look_at_cache().expect("readable");
            let before = truth.clone();
            let report = scan(&roots, &["--content"]);
            truth.look_at_cache().expect("readable");
            if keeps_all(&before, truth) {
                let expected = before.expected();
                let (now, then) = (truth.expected().totals.resident_bytes, expected.totals.resident_bytes);
                let allowed = expected.totals.cache_bytes.saturating_sub(then) / 50;
                assert!(now <= then + allowed, "{what}: reading brought {} bytes into the cache", now - then);
                return compare(&report, &roots, &expected, what);
            }
        }
        panic!("{what}: cached pages were lost each time while contents were read");
    }
}

/// How often a check is made again because the cache changed meanwhile: others need memory or drop caches, and a page
/// that is being migrated is not up to date for a moment. What the scan itself does to the cache it does each time.
const TRIES: u32 = 5;

/// Whether every page that was cached still is.
fn keeps_all(before: &Truth, after: &Truth) -> bool {
    let files = |truth: &Truth| truth.roots.iter().flat_map(|r| r.files.clone()).collect::<Vec<_>>();
    files(before).iter().zip(files(after)).all(|(then, now)| {
        let kept = |first: u64, pages: u64| {
            now.resident.iter().any(|(start, length)| *start <= first && first + pages <= start + length)
        };
        then.resident.iter().all(|(first, pages)| kept(*first, *pages))
    })
}

fn scan(roots: &[PathBuf], extra: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_pagefold"))
        .args(["scan", "--format", "json", "--matrix"])
        .args(extra)
        .args(roots)
        .output()
        .expect("the binary runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}", output.status);
    assert!(stderr.is_empty(), "silent when piped: {stderr}");
    serde_json::from_slice(&output.stdout).expect("JSON on stdout")
}

/// Compares every figure and names all that differ.
fn differences(report: &Value, roots: &[PathBuf], expected: &Expected, what: &str) -> Result<(), String> {
    let mut wrong = Vec::new();
    let mut check = |place: String, found: &Value, wanted: Value| {
        if *found != wanted {
            wrong.push(format!("{place}: scan says {found}, truth is {wanted}"));
        }
    };
    let mut fields = |place: &str, found: &Value, wanted: &Figures| {
        let wanted = serde_json::to_value(wanted).expect("figures are plain numbers");
        for (name, value) in wanted.as_object().expect("a struct is an object") {
            check(format!("{place}.{name}"), &found[name], value.clone());
        }
    };
    fields("totals", &report["totals"], &expected.totals);
    for (index, (figures, _)) in expected.roots.iter().enumerate() {
        fields(&format!("roots[{index}]"), &report["roots"][index], figures);
    }
    for (index, (_, shared)) in expected.roots.iter().enumerate() {
        let found = &report["roots"][index];
        check(
            format!("roots[{index}].shared_with_others_bytes"),
            &found["shared_with_others_bytes"],
            (*shared).into(),
        );
        check(format!("roots[{index}].path"), &found["path"], roots[index].to_str().into());
    }
    check("matrix".into(), &report["matrix"], serde_json::json!(expected.matrix));
    check("schema".into(), &report["schema"], "pagefold.scan/1".into());
    check("page_size".into(), &report["page_size"], PAGE.into());
    check("partial".into(), &report["partial"], false.into());
    check("errors".into(), &report["errors"], serde_json::json!([]));
    check(
        "number of roots".into(),
        &report["roots"].as_array().map_or(0, Vec::len).into(),
        expected.roots.len().into(),
    );
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!("{what}: {} figures differ:\n{}", wrong.len(), wrong.join("\n")))
}

fn compare(report: &Value, roots: &[PathBuf], expected: &Expected, what: &str) {
    differences(report, roots, expected, what).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// Cached pages of all files as fincore(1) counts them.
fn fincore_pages(truth: &Truth) -> u64 {
    let mut pages = 0;
    for root in &truth.roots {
        let names = root.files.iter().filter(|f| f.size > 0).map(|f| root.path.join(&f.names[0]));
        let output = Command::new("fincore")
            .args(["--raw", "--noheadings", "--output", "PAGES"])
            .args(names)
            .output()
            .unwrap_or_else(|e| {
                panic!("this test needs fincore (package util-linux-extra or util-linux): {e}")
            });
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("numbers");
        pages += text.lines().map(|l| l.trim().parse::<u64>().expect("a number")).sum::<u64>();
    }
    pages
}

fn exact_extents(fs: RigFs, snapshots: bool, seed: u64) {
    // What btrfs compresses depends on where its write-outs begin (`truth::provenance`), and whatever makes the kernel write while the
    // farm is made begins another. Then with another farm; a scan that is wrong is wrong with each.
    let farms = if fs == RigFs::BtrfsZstd { 3 } else { 1 };
    let mut wrong = Vec::new();
    while wrong.len() < farms {
        match exact_extents_of(case(fs, snapshots, seed), fs, snapshots, seed) {
            Ok(()) => return,
            Err(why) => wrong.push(why),
        }
    }
    panic!("{}", wrong.join("\n"));
}

fn exact_extents_of(mut case: Case, fs: RigFs, snapshots: bool, seed: u64) -> Result<(), String> {
    let what = format!("{fs:?}, snapshots {snapshots}, seed {seed}, extents");
    case.check_extents(&format!("{what}, cold"))?;
    for _ in 0..TRIES {
        case.read_some(seed);
        case.check_extents(&format!("{what}, partly cached"))?;
        let totals = case.by_provenance.expected().totals;
        if totals.resident_duplicate_bytes > 0 && totals.resident_bytes < totals.cache_bytes {
            return Ok(());
        }
    }
    panic!("{what}: what was read did not stay in the cache");
}

fn exact_content(fs: RigFs, snapshots: bool, seed: u64) {
    let mut case = case(fs, snapshots, seed);
    let what = format!("{fs:?}, snapshots {snapshots}, seed {seed}, content");
    case.check_content(&format!("{what}, cold"));
    case.read_some(seed);
    case.check_content(&format!("{what}, partly cached"));
}

#[test]
fn privileged_exact_extents_on_xfs() {
    exact_extents(RigFs::Xfs, false, 11);
}

#[test]
fn privileged_exact_extents_on_btrfs() {
    exact_extents(RigFs::Btrfs, false, 12);
}

#[test]
fn privileged_exact_extents_on_compressed_btrfs() {
    exact_extents(RigFs::BtrfsZstd, false, 13);
}

#[test]
fn privileged_exact_extents_on_btrfs_snapshots() {
    exact_extents(RigFs::Btrfs, true, 14);
}

#[test]
fn privileged_exact_extents_on_compressed_btrfs_snapshots() {
    exact_extents(RigFs::BtrfsZstd, true, 15);
}

#[test]
fn privileged_exact_content_on_xfs() {
    exact_content(RigFs::Xfs, false, 11);
}

#[test]
fn privileged_exact_content_on_btrfs() {
    exact_content(RigFs::Btrfs, false, 12);
}

#[test]
fn privileged_exact_content_on_compressed_btrfs() {
    exact_content(RigFs::BtrfsZstd, false, 13);
}

#[test]
fn privileged_exact_content_on_btrfs_snapshots() {
    exact_content(RigFs::Btrfs, true, 14);
}

#[test]
fn privileged_exact_content_on_compressed_btrfs_snapshots() {
    exact_content(RigFs::BtrfsZstd, true, 15);
}

fn exact_within_domains(content: bool) {
    let mut case = case(RigFs::Xfs, false, 16);
    case.read_some(16);
    let roots = case.roots();
    let of_other = |path: &Path| format!("other={}", path.display());
    let (first, third) = (of_other(&roots[0]), of_other(&roots[2]));
    let mut extra = vec!["--domain", &first, "--domain", &third];
    let truth = if content { &mut case.by_bytes } else { &mut case.by_provenance };
    truth.roots[0].domain = 1;
    truth.roots[2].domain = 1;
    if content {
        extra.push("--content");
    }
    for _ in 0..TRIES {
        truth.look_at_cache().expect("readable");
        let before = truth.clone();
        let report = scan(&roots, &extra);
        truth.look_at_cache().expect("readable");
        if keeps_all(&before, truth) {
            return compare(&report, &roots, &before.expected(), "domains");
        }
    }
    panic!("domains: cached pages were lost each time");
}

#[test]
fn privileged_exact_extents_within_domains() {
    exact_within_domains(false);
}

#[test]
fn privileged_exact_content_within_domains() {
    exact_within_domains(true);
}

#[test]
fn privileged_exact_extents_of_some_roots_in_another_order() {
    let mut case = case(RigFs::Btrfs, false, 17);
    case.by_provenance.roots.truncate(3);
    case.by_provenance.roots.reverse();
    let roots: Vec<PathBuf> = case.by_provenance.roots.iter().map(|r| r.path.clone()).collect();
    compare(&scan(&roots, &[]), &roots, &case.by_provenance.expected(), "three roots backwards");
    case.by_provenance.roots.truncate(1);
    compare(&scan(&roots[..1], &[]), &roots[..1], &case.by_provenance.expected(), "one root");
}

/// Files that nobody made up: the sources of this package.
#[test]
fn privileged_exact_for_an_image_from_a_directory() {
    let image = ImageSpec::Dir(Path::new(env!("CARGO_MANIFEST_DIR")).to_owned());
    let mut case = case_of(RigFs::Xfs, false, 18, image);
    case.read_some(18);
    case.check_extents("directory image, extents").unwrap_or_else(|wrong| panic!("{wrong}"));
    case.check_content("directory image, content");
}

/// Four blocks to a page: extents decide only pages that happen to be one aligned run, which the manifest can't know.
/// Reading decides all the same.
#[test]
fn privileged_exact_content_on_xfs_with_small_blocks() {
    exact_content(RigFs::XfsSmallBlocks, false, 19);
}
