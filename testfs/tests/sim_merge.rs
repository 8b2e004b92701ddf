//! The merge engine over the simulated kernel: fresh seeds, remembered seeds, planted bugs, one seed one trace.

use std::time::{SystemTime, UNIX_EPOCH};

use pagefold_testfs::run::{Report, Summary, Verdict, run};
use pagefold_testfs::sim::bugs::Plant;

/// Seeds nobody has run before, in every run of this test.
const FRESH_SEEDS: u64 = 200;
/// Seeds within which each planted bug must be seen.
const PLANT_SEEDS_MAX: u64 = 60;
/// Seeds that once failed. 8: a page whose break had failed was copied by the kernel for a store, and its protection
/// was never lifted. 145: a late notice of a truncation took the record of a page that had merged since.
const REMEMBERED: &[u64] = &[8, 145];

fn fine(seed: u64) -> Summary {
    let Report { verdict, trace } = run(seed, None);
    match verdict {
        Verdict::Fine(summary) => summary,
        other => {
            for line in trace.iter().rev().take(60).rev() {
                eprintln!("{line}");
            }
            panic!("seed {seed}: {other:?}\nreplay: cargo xtask sim --seed {seed}");
        }
    }
}

#[test]
fn fresh_seeds_are_fine() {
    let base = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    println!("base seed {base}");
    let mut total = Summary::default();
    for seed in (0..FRESH_SEEDS).map(|i| base.wrapping_add(i)) {
        let one = fine(seed);
        total.merged += one.merged;
        total.held += one.held;
        total.raced += one.raced;
        total.physical += one.physical;
        total.saved_max = total.saved_max.max(one.saved_max);
    }
    println!("{total:?}");
    // Runs in which nothing happens prove nothing.
    assert!(total.merged > 10 * FRESH_SEEDS && total.held > FRESH_SEEDS && total.raced > 0, "{total:?}");
}

#[test]
fn remembered_seeds_are_fine() {
    for seed in (0..40).chain(REMEMBERED.iter().copied()) {
        fine(seed);
    }
}

#[test]
fn one_seed_gives_one_trace() {
    for seed in 0..12 {
        let (first, second) = (run(seed, None), run(seed, None));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first, second);
    }
    assert_ne!(run(1, None).trace, run(2, None).trace);
}

#[test]
fn each_planted_bug_is_seen() {
    let mut unseen = Vec::new();
    for plant in Plant::ALL {
        let seen =
            (0..PLANT_SEEDS_MAX).find(|seed| !matches!(run(*seed, Some(plant)).verdict, Verdict::Fine(_)));
        println!("{plant:?}: first seen with seed {seen:?}");
        if seen.is_none() {
            unseen.push(plant);
        }
    }
    assert!(unseen.is_empty(), "nobody noticed {unseen:?} in {PLANT_SEEDS_MAX} seeds");
}
