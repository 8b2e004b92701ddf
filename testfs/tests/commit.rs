//! Commit brings what a view shows into the raw root, whatever was done in the view; on real XFS and btrfs.

mod commit_support;

use std::path::Path;

use commit_support::fixture::{Fixture, run};
use commit_support::ops::{Change, Rng, carry_out, draw, known};
use commit_support::snapshot::{differences, take};
use pagefold_fsadapters::sealed::commit::OnConflict;
use pagefold_testfs::rig::{LoopRig, RigFs};

const BOTH: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

/// Fills `root` at random.
fn grow(root: &Path, rng: &mut Rng, changes: usize) {
    std::fs::create_dir(root).unwrap();
    for _ in 0..changes {
        let change = draw(rng, &known(root), false);
        if !matches!(change, Change::RemoveAll(_)) {
            let _ = carry_out(root, &change);
        }
    }
}

/// One history: a tree, changes in its view and in a plain copy, commit, compare.
fn history(rig: &LoopRig, seed: u64) {
    let home = rig.path().join(format!("seed{seed}"));
    std::fs::create_dir(&home).unwrap();
    let mut rng = Rng::new(seed);
    grow(&home.join("raw"), &mut rng, 150);
    run("cp", &[&"-a", &home.join("raw"), &home.join("plain")]);
    let fixture = Fixture::seal(&home);
    fixture.mount("view", "rw");
    let mut log = Vec::new();
    for _ in 0..rng.below(120) {
        let change = draw(&mut rng, &known(&fixture.view()), false);
        let (view, plain) = (carry_out(&fixture.view(), &change), carry_out(&home.join("plain"), &change));
        assert_eq!(view.is_ok(), plain.is_ok(), "seed {seed}: {change:?}: {view:?} {plain:?}");
        if view.is_ok() {
            log.push(change);
        }
    }
    let shown = take(&fixture.view());
    fixture.unmount("view");
    let done = fixture.commit(OnConflict::Keep).unwrap();
    assert!(done.is_complete(), "seed {seed}: {done:?}");
    let raw = take(&fixture.raw());
    let wrong = differences(&shown, &raw, true);
    assert!(wrong.is_empty(), "seed {seed}: view against raw\n{}\n{log:#?}", wrong.join("\n"));
    let wrong = differences(&take(&home.join("plain")), &raw, false);
    assert!(wrong.is_empty(), "seed {seed}: plain copy against raw\n{}\n{log:#?}", wrong.join("\n"));
    // Again: everything is there already.
    let again = fixture.commit(OnConflict::Keep).unwrap();
    assert_eq!((again.replaced, again.created, again.removed), (0, 0, 0), "seed {seed}: {again:?}");
    assert!(differences(&raw, &take(&fixture.raw()), true).is_empty(), "seed {seed}");
    drop(fixture);
    std::fs::remove_dir_all(&home).unwrap();
}

#[test]
fn privileged_random_histories_end_as_in_a_plain_directory() {
    let seeds: u64 = std::env::var("PAGEFOLD_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let first: u64 = std::env::var("PAGEFOLD_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    for fs in BOTH {
        let rig = LoopRig::new(fs).unwrap();
        for seed in first..first + seeds {
            eprintln!("{fs:?} seed {seed}");
            history(&rig, seed);
        }
    }
}
