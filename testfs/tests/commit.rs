//! Commit brings what a view shows into the raw root, whatever was done in the view; on real XFS and btrfs.

mod commit_support;

use std::path::Path;

use commit_support::fixture::{Fixture, run};
use commit_support::ops::{Change, Rng, carry_out, draw, known};
use commit_support::snapshot::{differences, take};
use pagefold_fsadapters::sealed::commit::{CommitError, OnConflict};
use pagefold_fsadapters::store::STEPS;
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
        // Seeds that once found something come along.
        for seed in (first..first + seeds).chain([5224]) {
            eprintln!("{fs:?} seed {seed}");
            history(&rig, seed);
        }
    }
}

/// Changes at random on the mounted view and the plain copy.
fn live(fixture: &Fixture, rng: &mut Rng, changes: usize) {
    fixture.mount("view", "rw");
    for _ in 0..changes {
        let change = draw(rng, &known(&fixture.view()), false);
        let view = carry_out(&fixture.view(), &change);
        let plain = carry_out(&fixture.home.join("plain"), &change);
        assert_eq!(view.is_ok(), plain.is_ok(), "{change:?}: {view:?} {plain:?}");
    }
    fixture.unmount("view");
}

/// A commit that dies at a step, perhaps more changes in the view, perhaps another death, then a commit that ends.
fn interrupted(rig: &LoopRig, seed: u64, step: &str) {
    let home = rig.path().join(format!("crash{seed}"));
    std::fs::create_dir(&home).unwrap();
    let mut rng = Rng::new(seed);
    grow(&home.join("raw"), &mut rng, 120);
    run("cp", &[&"-a", &home.join("raw"), &home.join("plain")]);
    let fixture = Fixture::seal(&home);
    let what = format!("seed {seed}, {step}");
    live(&fixture, &mut rng, 40);
    let mut died = fixture.crash(step, 1 + rng.below(4) as u32);
    if rng.below(2) == 0 {
        live(&fixture, &mut rng, 20);
        died |= fixture.crash(step, 1 + rng.below(3) as u32);
    }
    if rng.below(4) == 0 {
        live(&fixture, &mut rng, 10);
    }
    fixture.mount("look", "ro");
    let shown = take(&home.join("look"));
    let done = fixture.commit_mounted(OnConflict::Keep);
    fixture.unmount("look");
    let done = done.unwrap();
    assert!(done.is_complete(), "{what}: {done:?}");
    let raw = take(&fixture.raw());
    let wrong = differences(&shown, &raw, true);
    assert!(wrong.is_empty(), "{what}, died {died}: view against raw\n{}", wrong.join("\n"));
    let wrong = differences(&take(&home.join("plain")), &raw, false);
    assert!(wrong.is_empty(), "{what}, died {died}: plain copy against raw\n{}", wrong.join("\n"));
    drop(fixture);
    std::fs::remove_dir_all(&home).unwrap();
}

/// Does nothing by itself: [`Fixture::crash`] runs it in a process of its own.
#[test]
fn privileged_child_commits_for_the_crash_tests() {
    if let Some(home) = std::env::var_os("PAGEFOLD_COMMIT_HOME") {
        let fixture = std::mem::ManuallyDrop::new(Fixture::open(Path::new(&home)));
        let done = fixture.commit_mounted(OnConflict::Keep).unwrap();
        let partial = std::env::var_os("PAGEFOLD_COMMIT_PARTIAL").is_some();
        assert!(done.is_complete() || partial, "{done:?}");
    }
}

/// Kinds change in the view, the commit dies half-way, the kinds change again.
#[test]
fn privileged_what_a_killed_commit_made_is_not_taken_for_somebodys() {
    let rig = LoopRig::new(RigFs::Xfs).unwrap();
    for step in ["commit.dirs.made", "commit.files.placed", "commit.names.gone", "commit.dirs.finished"] {
        let home = rig.path().join(step);
        let raw = home.join("raw");
        std::fs::create_dir_all(raw.join("dir/below")).unwrap();
        for name in ["file", "other", "dir/x", "dir/below/y"] {
            std::fs::write(raw.join(name), name).unwrap();
        }
        let fixture = Fixture::seal(&home);
        let view = fixture.view();
        fixture.mount("view", "rw");
        std::fs::remove_file(view.join("file")).unwrap();
        std::fs::create_dir_all(view.join("file/now/a")).unwrap();
        std::fs::write(view.join("file/now/a/directory"), "new").unwrap();
        std::fs::remove_dir_all(view.join("dir")).unwrap();
        std::fs::write(view.join("dir"), "a file now").unwrap();
        std::fs::hard_link(view.join("dir"), view.join("link")).unwrap();
        std::fs::create_dir(view.join("mine")).unwrap();
        fixture.unmount("view");
        assert!(fixture.crash(step, 1));
        fixture.mount("view", "rw");
        std::fs::remove_dir_all(view.join("file")).unwrap();
        std::fs::rename(view.join("other"), view.join("file")).unwrap();
        std::fs::remove_file(view.join("dir")).unwrap();
        std::fs::create_dir(view.join("dir")).unwrap();
        std::fs::write(view.join("dir/x"), "another").unwrap();
        std::fs::remove_dir(view.join("mine")).unwrap();
        std::fs::write(view.join("mine"), "a file now").unwrap();
        let shown = take(&view);
        fixture.unmount("view");
        let done = fixture.commit(OnConflict::Keep).unwrap();
        assert!(done.is_complete(), "{step}: {done:?}");
        let wrong = differences(&shown, &take(&raw), true);
        assert!(wrong.is_empty(), "{step}:\n{}", wrong.join("\n"));
    }
}

/// Somebody changes the raw root at the worst moments: between the look and the swap, and when the old file has just left its name.
#[test]
fn privileged_a_write_that_races_with_a_commit_is_kept() {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    let rig = LoopRig::new(RigFs::Xfs).unwrap();
    let steps = [
        "commit.begun",
        "commit.batch.built",
        "commit.batch.durable",
        "commit.exchanged",
        "commit.taken.away",
    ];
    for step in steps {
        let home = rig.path().join(step);
        let raw = home.join("raw");
        std::fs::create_dir_all(raw.join("d")).unwrap();
        let names = ["replaced", "written", "removed", "gone", "fine"];
        for name in names {
            std::fs::write(raw.join("d").join(name), "as sealed, and a little longer than all others")
                .unwrap();
        }
        let fixture = Fixture::seal(&home);
        fixture.mount("view", "rw");
        let view = fixture.view().join("d");
        for name in ["replaced", "written", "fine"] {
            std::fs::write(view.join(name), "view").unwrap();
        }
        std::fs::write(view.join("created"), "view").unwrap();
        std::fs::remove_file(view.join("removed")).unwrap();
        std::fs::remove_file(view.join("gone")).unwrap();
        fixture.unmount("view");
        // Open before the commit begins: it goes on writing to whatever becomes of the file.
        let open =
            |name: &str| std::fs::OpenOptions::new().write(true).open(raw.join("d").join(name)).unwrap();
        let (written, removed) = (open("written"), open("removed"));
        let met = fixture.interfere(step, || {
            let new = raw.join("d/.somebody");
            std::fs::File::create(&new).unwrap().write_all(b"raw").unwrap();
            // Not where the name was just taken away: there it would be a new file, which is another case.
            if raw.join("d/replaced").exists() {
                std::fs::rename(&new, raw.join("d/replaced")).unwrap();
            } else {
                std::fs::remove_file(&new).unwrap();
            }
            written.write_all_at(b"raw", 0).unwrap();
            removed.write_all_at(b"raw", 0).unwrap();
            std::fs::write(raw.join("d/created"), "raw").unwrap();
        });
        assert!(met, "{step} was not reached");
        let text = |name: &str| std::fs::read_to_string(raw.join("d").join(name)).unwrap_or_default();
        // By then these had been committed; who writes to a file that was replaced or removed writes to what has no name.
        let late = step == "commit.taken.away";
        assert_eq!(text("replaced"), "raw", "{step}");
        assert_eq!(text("created"), "raw", "{step}");
        if !late {
            assert!(text("written").starts_with("raw"), "{step}: {}", text("written"));
        }
        assert!(text("removed").starts_with("raw"), "{step}: {}", text("removed"));
        assert_eq!((text("fine").as_str(), text("gone").as_str()), ("view", ""), "{step}");
        let left: Vec<_> =
            known(&raw).into_iter().filter(|p| p.to_string_lossy().contains(".pagefold-")).collect();
        assert!(left.is_empty(), "{step}: {left:?}");
        drop(fixture);
    }
}

#[test]
fn privileged_a_full_disk_ends_a_commit_and_loses_nothing() {
    // btrfs keeps small files within its metadata, so only the larger ones meet the limit there.
    for fs in BOTH {
        let rig = LoopRig::with_size(fs, 320 << 20).unwrap();
        let home = rig.path().join("home");
        std::fs::create_dir_all(home.join("raw")).unwrap();
        (0..40).for_each(|n| std::fs::write(home.join(format!("raw/f{n}")), vec![n; 9000]).unwrap());
        let fixture = Fixture::seal(&home);
        let before = take(&fixture.raw());
        fixture.mount("view", "rw");
        (0..40)
            .for_each(|n| std::fs::write(fixture.view().join(format!("f{n}")), vec![100 + n; 9000]).unwrap());
        for n in 0..500 {
            std::fs::create_dir_all(fixture.view().join(format!("new{n}/deep"))).unwrap();
        }
        let shown = take(&fixture.view());
        fixture.unmount("view");
        run("sync", &[&"-f", &home]);
        let filler = std::fs::File::create(rig.path().join("filler")).unwrap();
        let (mut at, mut size) = (0, 64 << 20);
        while size >= 4096 {
            match rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at, size) {
                Ok(()) => at += size,
                Err(_) => size /= 2,
            }
        }
        run("sync", &[&"-f", &home]);
        let result = fixture.commit(OnConflict::Keep);
        assert!(matches!(result, Err(CommitError::Io { .. })), "{fs:?}: there is room left: {result:?}");
        let now = take(&fixture.raw());
        for (path, seen) in &now {
            let known = |tree: &commit_support::snapshot::Snapshot| {
                tree.get(path)
                    .is_some_and(|s| s.hash == seen.hash && s.mode & 0o170_000 == seen.mode & 0o170_000)
            };
            let ours = String::from_utf8_lossy(path).contains(".pagefold-");
            assert!(known(&before) || known(&shown) || ours, "{fs:?}: {}", String::from_utf8_lossy(path));
        }
        assert!(before.keys().all(|path| now.contains_key(path)), "{fs:?}: a file is gone");
        std::fs::remove_file(rig.path().join("filler")).unwrap();
        drop(filler);
        run("sync", &[&"-f", &home]);
        let done = fixture.commit(OnConflict::Keep).unwrap();
        assert!(done.is_complete(), "{fs:?}: {done:?}");
        let wrong = differences(&shown, &take(&fixture.raw()), true);
        assert!(wrong.is_empty(), "{fs:?}:\n{}", wrong.join("\n"));
    }
}

fn crash_at_every_step(fs: RigFs) {
    let rounds: u64 = std::env::var("PAGEFOLD_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let first: u64 = std::env::var("PAGEFOLD_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let rig = LoopRig::new(fs).unwrap();
    for round in first..first + rounds {
        for (i, step) in STEPS.iter().filter(|s| s.starts_with("commit.")).enumerate() {
            eprintln!("{fs:?} {round} {step}");
            interrupted(&rig, round * 1000 + i as u64, step);
        }
    }
}

#[test]
fn privileged_a_commit_killed_at_any_step_finishes_when_run_again_on_xfs() {
    crash_at_every_step(RigFs::Xfs);
}

#[test]
fn privileged_a_commit_killed_at_any_step_finishes_when_run_again_on_btrfs() {
    crash_at_every_step(RigFs::Btrfs);
}
