//! The scan itself over simulated file systems: every figure against a reference that counts pages one by one.
//!
//! Calm trees, trees on a bad day (injected faults), trees that somebody writes to between the steps of a look, scans
//! that are cancelled. Fresh seeds in every run; a failure prints its own. To replay one:
//! `PAGEFOLD_SCAN_SEED=<seed> cargo test -p pagefold-testfs --test sim_scan fresh`.

mod scan_reference;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pagefold_fsadapters::scan::{Progress, RootSpec, ScanConfig, ScanReport, Sizes, scan};
use pagefold_fsadapters::source::ReadOptions;
use pagefold_testfs::fault::{Fault, FaultPlan, Faulty};
use pagefold_testfs::sim::bugs::Bugs;
use pagefold_testfs::sim::source::Moment;
use pagefold_testfs::sim::{Flavour, NodeId, Rng, SimFs, World};
use scan_reference::grow::{Grown, grow};
use scan_reference::recorder::{Look, Record, Recorder};
use scan_reference::{By, Reference, compare, reference};

/// Seeds that nobody has run before, in every run of each test; a multiple of the number of flavours.
const FRESH_SEEDS: u64 = 56;
/// Seeds within which a planted bug must be seen.
const PLANT_SEEDS_MAX: u64 = 30;

type Looks = BTreeMap<PathBuf, Option<Look>>;
type Checked = Result<(), String>;

/// How one scan is run.
#[derive(Clone)]
struct Run {
    content: bool,
    threads: usize,
    faults: FaultPlan,
    cancel_at: Option<u64>,
}

const CALM: Run = Run { content: false, threads: 1, faults: FaultPlan::none(), cancel_at: None };

/// What came of it.
struct Outcome {
    report: ScanReport,
    looks: Looks,
    hashed: BTreeSet<(PathBuf, u64)>,
    cancelled: bool,
    injected: u64,
}

fn run(sim: &SimFs, roots: &[RootSpec], run: &Run) -> Outcome {
    let (record, progress) = (Record::default(), Progress::default());
    let faulty = Faulty::new(sim.clone(), run.faults.clone());
    let source = Recorder::new(faulty, sim.clone(), &record, &progress, run.cancel_at);
    let config = ScanConfig {
        roots: roots.to_vec(),
        content: run.content,
        threads: run.threads,
        read: ReadOptions { threads: 1, queue_depth: 4 },
        exclude: None,
        one_file_system: true,
        top: 10_000,
        matrix: true,
        top_directories: true,
    };
    let report = scan(&source, &config, &progress);
    let injected = source.inner().injected().values().sum();
    drop(source);
    let looks = record.looks.into_inner().expect("nobody panicked");
    let hashed = record.hashed.into_inner().expect("nobody panicked");
    Outcome { report, looks, hashed, cancelled: progress.is_cancelled(), injected }
}

impl Outcome {
    /// What the report must say, given the looks and what was read.
    fn reference(&self, steady: &dyn Fn(&Look) -> bool) -> Result<Reference, String> {
        let by = if self.report.content { By::Bytes(&self.hashed) } else { By::Extents };
        let number = |domain: &String| self.report.domains.iter().position(|d| d == domain);
        let roots: Vec<(PathBuf, u16)> = self
            .report
            .roots
            .iter()
            .map(|r| (r.path.to_path_buf(), number(&r.domain).expect("listed") as u16))
            .collect();
        reference(&roots, &self.looks, by, steady)
    }

    /// The report without what time it took.
    fn json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(&self.report).expect("serializable");
        value.as_object_mut().expect("an object").remove("elapsed_s");
        value
    }

    /// Paths that an error or a skip is about, apart from what is said of a whole root.
    fn named(&self) -> BTreeSet<&Path> {
        let about_files = |text: &str| text.starts_with("can't ") || text.starts_with("changed while");
        let errors = self.report.errors.iter().filter(|e| about_files(&e.error)).map(|e| &*e.path);
        errors.chain(self.report.skipped.iter().map(|s| &*s.path)).collect()
    }

    /// Every file of `tree` is in the figures as the disk says, or is named, or a directory above it is.
    fn nothing_is_missing(&self, roots: &[RootSpec], tree: &BTreeSet<PathBuf>) -> Checked {
        let named = self.named();
        for root in roots.iter().map(|r| &r.path) {
            let reported = self.report.roots.iter().any(|r| *r.path == **root);
            if !(reported || named.contains(&**root)) {
                return Err(format!("root {} is neither reported nor named", root.display()));
            }
        }
        for path in tree {
            let fine = match self.looks.get(path) {
                Some(Some(look)) if !look.moved => true,
                Some(_) => named.contains(&**path),
                None => path.ancestors().any(|above| named.contains(above)),
            };
            if !fine {
                return Err(format!("{} is not in the figures and not named", path.display()));
            }
        }
        Ok(())
    }

    /// Files that could be looked at and whose data could not be read.
    fn unread(&self) -> Vec<&Path> {
        let looked_at = |path: &Path| matches!(self.looks.get(path), Some(Some(_)));
        let errors =
            self.report.errors.iter().filter(|e| !e.error.starts_with("changed while scanned, twice"));
        errors.map(|e| &*e.path).filter(|path| looked_at(path)).collect()
    }

    /// Every figure is right, and what is left undecided although data was read belongs to files that are named.
    fn content_is_right_or_named(&self) -> Checked {
        let wanted = self.reference(&|_| true)?;
        compare(&self.report, &wanted)?;
        // Data that could not be read, and files that moved at both looks: those are not read at all.
        let named = self.report.errors.iter().map(|e| &*e.path);
        let open: u64 = named.filter_map(|p| wanted.undecided.get(p)).sum();
        if self.report.totals.undecided_bytes > open * 4096 {
            return Err(format!("{:?} undecided, named files have {open} pages", self.report.totals));
        }
        Ok(())
    }

    /// On a day without faults: every page that is not zeros is known by its bytes.
    fn everything_was_read(&self) -> Checked {
        let nothing_open = self.report.totals.undecided_bytes == 0 && self.unread().is_empty();
        let kept = self.report.totals.cache_bytes - self.report.totals.mergeable_page_bytes;
        // By place each is read once: no page may be left that has the bytes of another in its domain.
        let looks = self.looks.values().flatten().flat_map(|look| &look.facts.pages);
        let distinct = looks.collect::<BTreeSet<_>>().len() as u64 * self.report.domains.len() as u64;
        if nothing_open && kept <= distinct * 4096 {
            Ok(())
        } else {
            Err(format!("unread: {:?}", self.report.totals))
        }
    }
}

/// All regular files below the roots.
fn tree(sim: &SimFs, roots: &[RootSpec]) -> BTreeSet<PathBuf> {
    let world = sim.world();
    let below = roots.iter().flat_map(|r| world.names_below(&r.path).expect("a directory"));
    below.filter(|(_, node)| world.raw_file(*node).is_ok()).map(|(path, _)| path).collect()
}

fn flavour_of(seed: u64) -> Flavour {
    Flavour::ALL[(seed % Flavour::ALL.len() as u64) as usize]
}

// ---- the four kinds of day ----

/// Nobody interferes: every figure is exact, by extents and by bytes, whatever the number of threads.
fn calm(seed: u64, bugs: Bugs) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    sim.world().bugs = bugs;
    let tree = tree(&sim, &roots);
    let mut merged = 0;
    for content in [false, true] {
        let one = run(&sim, &roots, &Run { content, ..CALM });
        compare(&one.report, &one.reference(&|_| true)?)?;
        if content {
            one.everything_was_read()?;
        }
        one.nothing_is_missing(&roots, &tree)?;
        if !one.unread().is_empty()
            || one.looks.values().flatten().any(|look| look.moved)
            || one.report.partial
        {
            return Err(format!("on a calm day: {:?}", one.report.errors));
        }
        let three = run(&sim, &roots, &Run { content, threads: 3, ..CALM });
        if one.json() != three.json() {
            return Err(format!("three threads tell something else:\n{}\n{}", one.json(), three.json()));
        }
        merged += one.report.totals.mergeable_page_bytes;
    }
    Ok(merged)
}

/// The device fails, memory runs out, files vanish.
fn faulty(seed: u64) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    let tree = tree(&sim, &roots);
    let mut rng = Rng::new(seed ^ 0xfa);
    let enabled = Fault::ALL.into_iter().filter(|_| rng.percent(70)).collect();
    // Now and then so bad that data can't be read through any of the files that show it.
    let most = if rng.percent(20) { 700 } else { 150 };
    let per_mille = 5 + rng.below(most);
    let faults = FaultPlan { seed, per_mille, enabled };
    let one = run(&sim, &roots, &Run { faults: faults.clone(), ..CALM });
    compare(&one.report, &one.reference(&|_| true)?)?;
    one.nothing_is_missing(&roots, &tree)?;
    let three = run(&sim, &roots, &Run { faults: faults.clone(), threads: 3, ..CALM });
    if one.json() != three.json() {
        return Err(format!("three threads tell something else:\n{}\n{}", one.json(), three.json()));
    }
    for threads in [1, 3] {
        let read = run(&sim, &roots, &Run { content: true, threads, faults: faults.clone(), ..CALM });
        read.nothing_is_missing(&roots, &tree)?;
        read.content_is_right_or_named()?;
    }
    Ok(one.injected)
}

/// Somebody has had enough, at any step of walking or reading.
fn cancelled(seed: u64) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    let mut rng = Rng::new(seed ^ 0xca);
    let mut count = 0;
    for (content, threads) in [(false, 1), (false, 3), (true, 1), (true, 3)] {
        let cancel_at = Some(rng.below(if content { 250 } else { 110 }));
        let outcome = run(&sim, &roots, &Run { content, threads, cancel_at, ..CALM });
        if outcome.report.partial != outcome.cancelled {
            return Err(format!("partial is {} of a cancelled scan", outcome.report.partial));
        }
        count += u64::from(outcome.cancelled);
        // What was reached is told exactly, also when some of it was read and some not.
        compare(&outcome.report, &outcome.reference(&|_| true)?)?;
    }
    Ok(count)
}

/// What somebody does between two steps.
fn meddle(world: &mut World, rng: &mut Rng, here: NodeId, moment: Moment, paths: &[PathBuf]) {
    let path = rng.pick(paths).expect("there are files");
    let other = world.resolve(path, false).map_or(here, |place| place.node());
    let node = if rng.percent(60) { here } else { other };
    let (offset, len) = (rng.below(8 * 4096), 1 + rng.below(6000) as usize);
    let data = rng.bytes(len);
    // What fails, fails: full, vanished, not cloneable.
    let _ = match rng.below(9) {
        0 | 1 => world.write_at(node, offset, &data),
        2 => world.sync(node),
        3 => world.begin_writeback(node),
        4 => world.truncate(node, offset),
        5 => world.punch(node, offset, 8192),
        6 => world.clone_range(here, 0, 4096, other, 8192),
        7 => world.unlink(path),
        // What comes into the cache after it was looked at, no look can know.
        _ if moment == Moment::AfterSecondCache => Ok(()),
        _ => world.make_resident(node, 0, 4),
    };
}

/// Somebody writes, cuts, clones and removes between the steps of looks.
fn meddled_looks(seed: u64, bugs: Bugs) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    sim.world().bugs = bugs;
    let before = tree(&sim, &roots);
    let paths: Vec<PathBuf> = before.iter().cloned().collect();
    if paths.is_empty() {
        return Ok(0);
    }
    let mut rng = Rng::new(seed ^ 0x1e);
    let often = 2 + rng.below(30);
    sim.set_interloper(Some(Box::new(move |world, here, moment| {
        if rng.percent(often) {
            meddle(world, &mut rng, here, moment, &paths);
        }
    })));
    let outcome = run(&sim, &roots, &CALM);
    sim.set_interloper(None);
    let unchanged = |look: &Look| sim.world().stat(look.node).is_ok_and(|now| now.ctime == look.ctime);
    compare(&outcome.report, &outcome.reference(&unchanged)?)?;
    let still_there = tree(&sim, &roots).intersection(&before).cloned().collect();
    outcome.nothing_is_missing(&roots, &still_there)?;
    Ok(outcome.looks.values().flatten().filter(|look| look.moved).count() as u64)
}

/// Somebody acts at any moment of a scan with several threads that reads too: it ends, and what it says hangs together.
fn meddled_everything(seed: u64) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    let before = tree(&sim, &roots);
    let paths: Vec<PathBuf> = before.iter().cloned().collect();
    if paths.is_empty() {
        return Ok(0);
    }
    let mut rng = Rng::new(seed ^ 0xa1);
    let (often, per_mille) = (2 + rng.below(20), rng.below(100));
    sim.set_interloper(Some(Box::new(move |world, here, moment| {
        if rng.percent(often) {
            meddle(world, &mut rng, here, moment, &paths);
        }
    })));
    let faults = FaultPlan { seed, per_mille, enabled: Fault::ALL.to_vec() };
    let outcome = run(&sim, &roots, &Run { content: true, threads: 3, faults, ..CALM });
    sim.set_interloper(None);
    let still_there = tree(&sim, &roots).intersection(&before).cloned().collect();
    outcome.nothing_is_missing(&roots, &still_there)?;
    hangs_together(&outcome.report)?;
    Ok(outcome.report.errors.len() as u64)
}

/// What is true of the figures of any scan.
fn hangs_together(report: &ScanReport) -> Checked {
    let all = std::iter::once(&report.totals).chain(report.roots.iter().map(|r| &r.sizes));
    for sizes in all {
        let bounded = sizes.mergeable_file_bytes <= sizes.mergeable_page_bytes
            && sizes.mergeable_page_bytes + sizes.undecided_bytes <= sizes.cache_bytes
            && sizes.resident_duplicate_bytes <= sizes.resident_bytes
            && sizes.resident_bytes <= sizes.cache_bytes + sizes.zero_bytes;
        if !bounded {
            return Err(format!("these figures contradict each other: {sizes:?}"));
        }
    }
    let sum =
        |of: fn(&Sizes) -> u64| report.roots.iter().map(|r| of(&r.sizes)).sum::<u64>() == of(&report.totals);
    let sums: [fn(&Sizes) -> u64; 5] =
        [|s| s.files, |s| s.hard_links, |s| s.cache_bytes, |s| s.undecided_bytes, |s| s.resident_bytes];
    if sums.into_iter().all(sum) { Ok(()) } else { Err(format!("totals are no sums: {:?}", report.totals)) }
}

/// Somebody writes while data is read. The looks were at peace, so what is claimed is what bytes were equal then.
fn meddled_reads(seed: u64) -> Result<u64, String> {
    let Grown { sim, roots } = grow(flavour_of(seed), seed);
    let tree = tree(&sim, &roots);
    let paths: Vec<PathBuf> = tree.iter().cloned().collect();
    if paths.is_empty() {
        return Ok(0);
    }
    let mut rng = Rng::new(seed ^ 0x4e);
    let often = 1 + rng.below(12);
    sim.set_interloper(Some(Box::new(move |world, here, moment| {
        if moment == Moment::WithinRead && rng.percent(often) {
            meddle(world, &mut rng, here, moment, &paths);
        }
    })));
    let outcome = run(&sim, &roots, &Run { content: true, ..CALM });
    sim.set_interloper(None);
    outcome.nothing_is_missing(&roots, &tree)?;
    outcome.content_is_right_or_named()?;
    Ok(outcome.unread().len() as u64)
}

// ---- tests ----

/// Runs `day` with fresh seeds, or with the one asked for; gives the sum of what happened.
fn fresh(name: &str, day: impl Fn(u64) -> Result<u64, String>) -> u64 {
    let asked = std::env::var("PAGEFOLD_SCAN_SEED").ok().map(|s| s.parse().expect("a seed is a number"));
    let base = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let (first, count) = asked.map_or((base, FRESH_SEEDS), |seed| (seed, 1));
    println!("{name}: {count} seeds from {first}");
    let mut sum = 0;
    for seed in (0..count).map(|i| first.wrapping_add(i)) {
        match day(seed) {
            Ok(happened) => sum += happened,
            Err(wrong) => panic!(
                "{name}, {:?}, seed {seed}: {wrong}\nreplay: PAGEFOLD_SCAN_SEED={seed} cargo test -p pagefold-testfs \
                 --test sim_scan fresh",
                flavour_of(seed)
            ),
        }
    }
    println!("{name}: {sum}");
    // One seed may be a quiet one; all of them together may not.
    if asked.is_some() { u64::MAX } else { sum }
}

#[test]
fn fresh_calm_trees_are_told_exactly() {
    assert!(fresh("calm", |seed| calm(seed, Bugs::default())) > FRESH_SEEDS * 4096);
}

#[test]
fn fresh_faults_are_named() {
    assert!(fresh("faulty", faulty) > FRESH_SEEDS);
}

#[test]
fn fresh_cancelled_scans_are_partial_and_true() {
    assert!(fresh("cancelled", cancelled) > FRESH_SEEDS / 2);
}

#[test]
fn fresh_meddling_with_looks_is_seen() {
    assert!(fresh("meddled looks", |seed| meddled_looks(seed, Bugs::default())) > FRESH_SEEDS / 2);
}

#[test]
fn fresh_meddling_with_everything_ends_and_hangs_together() {
    assert!(fresh("meddled everything", meddled_everything) > FRESH_SEEDS);
}

#[test]
fn fresh_meddling_with_reads_is_seen() {
    assert!(fresh("meddled reads", meddled_reads) > FRESH_SEEDS / 2);
}

#[test]
fn each_planted_bug_is_seen() {
    type Day = fn(u64, Bugs) -> Result<u64, String>;
    let plants: [(&str, Bugs, Day); 4] = [
        ("stale maps believed", Bugs { cache_looks_clean: true, ..Bugs::default() }, calm),
        ("compressed looks plain", Bugs { encoded_looks_plain: true, ..Bugs::default() }, calm),
        ("real-time looks like data", Bugs { realtime_looks_data: true, ..Bugs::default() }, calm),
        ("movement unseen", Bugs { moved_unseen: true, ..Bugs::default() }, meddled_looks),
    ];
    for (name, bugs, day) in plants {
        let seen = (0..PLANT_SEEDS_MAX).find(|seed| day(*seed, bugs).is_err());
        println!("{name}: first seen with seed {seen:?}");
        assert!(seen.is_some(), "{name}: nobody noticed in {PLANT_SEEDS_MAX} seeds");
    }
}
