//! File systems that lack something (extent maps, reflink, an inode of their own) and files of absurd sizes.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{
    Mounted, PAGE, append, cached_and_dirty, dir, overwrite_page, reflink, rig, scan, sync, write, write_at,
};
use pagefold_testfs::rig::RigFs;

/// Long for a slow machine, short for what looks at every page of such files.
const SOON: Duration = Duration::from_secs(60);

fn sparse(path: &Path, size: u64) {
    File::create(path).and_then(|f| f.set_len(size)).expect("this file system has files of this size");
}

fn drop_cache(path: &Path) {
    pagefold_sys::cache::drop_cached(File::open(path).expect("opens"), 0, 1 << 40).expect("dropped");
}

#[test]
fn privileged_tmpfs_has_no_extent_maps_and_says_so() {
    let home = rig(RigFs::Xfs);
    let at = Mounted::new(&["-t", "tmpfs", "-o", "size=64m", "tmpfs"], &home.path().join("tmpfs"));
    let root = dir(&at.0, "root");
    for i in 0..3 {
        write(&dir(&root, &format!("d{i}")).join("f"), 1, 10 * PAGE as usize);
    }
    File::create(root.join("empty")).expect("created");
    let found = scan(&[&root], &[]);
    assert_eq!(found.code, 1);
    assert_eq!(found.errors().len(), 1, "once a root: {:?}", found.errors());
    assert!(found.errors()[0].1.contains("tmpfs") && found.errors()[0].1.contains("--content"));
    found.expect(&[
        ("files", 4),
        ("cache_bytes", 30 * PAGE),
        ("undecided_bytes", 30 * PAGE),
        ("mergeable_page_bytes", 0),
        ("resident_bytes", 30 * PAGE),
        ("resident_duplicate_bytes", 0),
    ]);
    let content = scan(&[&root], &["--content"]);
    content.expect_clean();
    content.expect(&[
        ("undecided_bytes", 0),
        ("mergeable_file_bytes", 20 * PAGE),
        ("resident_bytes", 30 * PAGE),
        ("resident_duplicate_bytes", 20 * PAGE),
    ]);
}

#[test]
fn privileged_ext4_has_extent_maps_and_nothing_shared() {
    let rig = rig(RigFs::Ext4);
    let root = dir(rig.path(), "root");
    for i in 0..4 {
        write(&root.join(i.to_string()), i / 2, 10_000);
    }
    sync(rig.path());
    let found = scan(&[&root], &[]);
    found.expect_clean();
    found.expect(&[("cache_bytes", 12 * PAGE), ("undecided_bytes", 0), ("mergeable_page_bytes", 0)]);
    let content = scan(&[&root], &["--content"]);
    content.expect_clean();
    content.expect(&[("mergeable_file_bytes", 6 * PAGE), ("mergeable_page_bytes", 6 * PAGE)]);
}

#[test]
fn privileged_sparse_files_of_8_eib_are_zero_pages_and_no_overflow() {
    const MAX: u64 = i64::MAX as u64;
    for (fs, size) in [(RigFs::Xfs, MAX), (RigFs::Btrfs, MAX), (RigFs::Ext4, (16 << 40) - 2 * PAGE)] {
        let rig = rig(fs);
        let (a, b) = (dir(rig.path(), "a"), dir(rig.path(), "b"));
        sparse(&a.join("one"), size);
        sparse(&b.join("two"), size);
        // Data far out and at the very end.
        write_at(&a.join("one"), size / 2 / PAGE * PAGE, 1, PAGE as usize);
        write_at(&b.join("two"), size - 1, 2, 1);
        write(&a.join("small"), 3, PAGE as usize);
        let zeros = 2 * u128::from(size.next_multiple_of(PAGE) - PAGE);
        let zeros = u64::try_from(zeros).unwrap_or(u64::MAX);
        reflink_or_copy(fs, &a.join("small"), &b.join("small"));
        sync(rig.path());
        // A reflink copy is not cached, a copy is.
        let cached = if fs == RigFs::Ext4 { 4 } else { 3 };
        let started = Instant::now();
        for extra in [&[][..], &["--content"], &["--matrix"]] {
            let found = scan(&[&a, &b], extra);
            found.expect_clean();
            let shared = if fs == RigFs::Ext4 && extra != ["--content"] { 0 } else { PAGE };
            found.expect(&[
                ("files", 4),
                ("logical_bytes", (2 * size).saturating_add(2 * PAGE)),
                ("cache_bytes", 4 * PAGE),
                ("undecided_bytes", 0),
                ("mergeable_page_bytes", shared),
                ("resident_bytes", cached * PAGE),
                ("zero_bytes", zeros),
            ]);
            let root_zero = found.root(0, "zero_bytes");
            assert_eq!(root_zero, size.next_multiple_of(PAGE) - PAGE);
        }
        // A hole that was read is resident, too.
        let hole = File::open(a.join("one")).expect("opens");
        rustix::fs::fadvise(&hole, 0, None, rustix::fs::Advice::Random).expect("advice");
        hole.read_exact_at(&mut [0], 1 << 30).expect("read");
        scan(&[&a, &b], &[])
            .expect(&[("resident_bytes", (cached + 1) * PAGE), ("resident_duplicate_bytes", 0)]);
        assert!(started.elapsed() < SOON, "{fs:?}: {:?}", started.elapsed());
    }
}

fn reflink_or_copy(fs: RigFs, from: &Path, to: &Path) {
    if fs == RigFs::Ext4 {
        fs::copy(from, to).expect("copied");
    } else {
        reflink(from, to);
    }
}

/// Three of them: their sizes no longer fit 64 bits.
#[test]
fn privileged_sums_beyond_64_bits_saturate() {
    let rig = rig(RigFs::Xfs);
    let root = dir(rig.path(), "root");
    for i in 0..3 {
        sparse(&root.join(i.to_string()), i64::MAX as u64);
    }
    sync(rig.path());
    for extra in [&[][..], &["--content"]] {
        let found = scan(&[&root], extra);
        found.expect_clean();
        found.expect(&[("logical_bytes", u64::MAX), ("zero_bytes", u64::MAX), ("cache_bytes", 0)]);
    }
    let table = common::pagefold().arg("scan").arg(&root).output().expect("runs");
    assert!(table.status.success());
}

/// A hole has no size on disk and no end: a file system without maps must not make `--content` read it for ever.
#[test]
fn privileged_huge_sparse_files_on_tmpfs_end() {
    let home = rig(RigFs::Xfs);
    let at = Mounted::new(&["-t", "tmpfs", "-o", "size=64m", "tmpfs"], &home.path().join("tmpfs"));
    for size in [1u64 << 46, i64::MAX as u64] {
        sparse(&at.0.join("sparse"), size);
        write_at(&at.0.join("sparse"), 1 << 30, 1, PAGE as usize);
        for extra in [&[][..], &["--content"]] {
            let started = Instant::now();
            let output = std::process::Command::new("timeout")
                .args(["-s", "KILL", "120", env!("CARGO_BIN_EXE_pagefold"), "scan", "--format", "json"])
                .args(extra)
                .arg(&at.0)
                .output()
                .expect("this test needs timeout");
            let found = common::Scan::of(&output);
            assert!(started.elapsed() < SOON, "{size} {extra:?}: {:?}", started.elapsed());
            found.expect(&[("resident_bytes", PAGE), ("mergeable_page_bytes", 0)]);
        }
    }
}

/// An overlay mount over `lower`, its upper and work directory beside it.
fn overlay(home: &Path, name: &str, lower: &Path) -> Mounted {
    let [upper, work] = ["upper", "work"].map(|kind| dir(home, &format!("{name}-{kind}")));
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    Mounted::new(&["-t", "overlay", "overlay", "-o", &options], &home.join(name))
}

#[test]
fn privileged_overlays_over_one_lower_count_its_files_once() {
    for fs in [RigFs::Xfs, RigFs::Btrfs, RigFs::Ext4] {
        let rig = rig(fs);
        let lower = dir(rig.path(), "lower");
        for i in 0..4u64 {
            write(&dir(&lower, "d").join(i.to_string()), i, 10 * PAGE as usize);
        }
        sync(rig.path());
        for i in 0..4 {
            drop_cache(&lower.join(format!("d/{i}")));
        }
        let (one, two) = (overlay(rig.path(), "one", &lower), overlay(rig.path(), "two", &lower));
        let check = |roots: &[&Path], links: u64, what: &str| {
            let found = scan(roots, &[]);
            found.expect_clean();
            assert_eq!(found.total("hard_links"), links, "{fs:?} {what}");
            found.expect(&[
                ("files", 4),
                ("cache_bytes", 40 * PAGE),
                ("undecided_bytes", 0),
                ("mergeable_page_bytes", 0),
                ("resident_duplicate_bytes", 0),
            ]);
            found.total("resident_bytes")
        };
        let both = [one.0.as_path(), two.0.as_path()];
        assert_eq!(check(&both, 4, "cold"), 0);
        // Read through one overlay: cached once, seen through both and beneath.
        drop(fs::read(one.0.join("d/0")).expect("read"));
        assert_eq!(check(&both, 4, "warm"), 10 * PAGE);
        assert_eq!(check(&[&one.0, &lower], 4, "beside its lower"), 10 * PAGE);
        assert_eq!(check(&[&lower, &one.0, &two.0], 8, "all three"), 10 * PAGE);
        assert_eq!(cached_and_dirty(&lower.join("d/0")), (10, 0));

        // A copy-up is another file; on a reflink file system it shares all but what was written.
        append(&one.0.join("d/1"), b"x");
        overwrite_page(&two.0.join("d/2"), 3, 77);
        let dirty = scan(&both, &[]);
        dirty.expect_clean();
        dirty.expect(&[("files", 6), ("hard_links", 2), ("mergeable_file_bytes", 0)]);
        sync(rig.path());
        let shared = if fs == RigFs::Ext4 { 0 } else { 10 + 9 };
        for content in [false, true] {
            let found = scan(&both, if content { &["--content"] } else { &[] });
            found.expect_clean();
            found.expect(&[
                ("files", 6),
                ("hard_links", 2),
                ("cache_bytes", 61 * PAGE),
                ("undecided_bytes", 0),
                ("mergeable_file_bytes", 0),
                ("mergeable_page_bytes", if content { 19 } else { shared } * PAGE),
            ]);
        }
    }
}

#[test]
fn privileged_an_overlay_of_layers_on_two_file_systems_is_undecided_and_says_so() {
    let (first, second) = (rig(RigFs::Xfs), rig(RigFs::Btrfs));
    let (lower, home): (PathBuf, PathBuf) = (dir(first.path(), "lower"), dir(second.path(), "home"));
    write(&lower.join("f"), 1, 10 * PAGE as usize);
    write(&lower.join("g"), 1, 10 * PAGE as usize);
    sync(&lower);
    let one = overlay(&home, "one", &lower);
    let found = scan(&[&one.0], &[]);
    assert_eq!((found.code, found.errors().len()), (1, 1), "{:?}", found.errors());
    found.expect(&[
        ("undecided_bytes", 20 * PAGE),
        ("resident_bytes", 20 * PAGE),
        ("mergeable_page_bytes", 0),
    ]);
    let content = scan(&[&one.0], &["--content"]);
    content.expect_clean();
    content.expect(&[("mergeable_file_bytes", 10 * PAGE), ("resident_duplicate_bytes", 10 * PAGE)]);
    // There only mincore could tell what is cached, and it asks every page: not of such a file.
    drop(one);
    sparse(&lower.join("huge"), i64::MAX as u64);
    let one = overlay(&home, "one", &lower);
    let started = Instant::now();
    let found = scan(&[&one.0], &["--content"]);
    assert_eq!((found.code, found.errors().len()), (1, 1), "{:?}", found.errors());
    found.expect(&[("cache_bytes", 20 * PAGE), ("undecided_bytes", 0), ("mergeable_file_bytes", 10 * PAGE)]);
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
}

/// As every container has it: `/etc/hosts` and `/etc/resolv.conf` are files of the host.
#[test]
fn privileged_files_mounted_into_an_overlay_are_left_out_by_name() {
    let rig = rig(RigFs::Xfs);
    let lower = dir(rig.path(), "lower");
    for name in ["f", "hosts"] {
        write(&lower.join(name), 1, 10 * PAGE as usize);
    }
    write(&rig.path().join("hosts"), 2, 3 * PAGE as usize);
    sync(rig.path());
    let one = overlay(rig.path(), "one", &lower);
    let mounted = Mounted::file(&rig.path().join("hosts"), &one.0.join("hosts"));
    let found = scan(&[&one.0], &[]);
    found.expect_clean();
    found.expect(&[("files", 1), ("cache_bytes", 10 * PAGE), ("undecided_bytes", 0)]);
    assert_eq!(found.skipped().len(), 1);
    assert_eq!(Path::new(&found.skipped()[0].0), mounted.0);
    let found = scan(&[&one.0], &["--no-one-file-system", "--content"]);
    found.expect_clean();
    found.expect(&[("files", 2), ("cache_bytes", 13 * PAGE), ("undecided_bytes", 0)]);
}
