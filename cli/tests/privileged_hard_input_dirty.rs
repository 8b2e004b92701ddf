//! Dirty cache and moving files: what extent maps say is old news there, so nothing may be called equal.
//!
//! Figures are judged from outside: the test knows which pages differ, whatever the disk says.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{PAGE, cached_and_dirty, dir, overwrite_page, reflink, rig, scan, sync, write};
use pagefold_testfs::rig::RigFs;

const REFLINK: [RigFs; 3] = [RigFs::Xfs, RigFs::XfsSmallBlocks, RigFs::Btrfs];

/// Two roots with one file of `pages` pages each, reflinked and synced.
fn pair(home: &Path, pages: u64) -> (PathBuf, PathBuf) {
    let (a, b) = (dir(home, "a"), dir(home, "b"));
    write(&a.join("f"), 1, (pages * PAGE) as usize);
    sync(home);
    reflink(&a.join("f"), &b.join("f"));
    sync(home);
    (a, b)
}

fn check_undecided_then_decided(fs: RigFs, dirty_page: impl Fn(&Path)) {
    let rig = rig(fs);
    let (a, b) = pair(rig.path(), 10);
    let roots = [a.as_path(), b.as_path()];
    let clean = scan(&roots, &[]);
    clean.expect_clean();
    clean.expect(&[("mergeable_file_bytes", 10 * PAGE), ("undecided_bytes", 0)]);

    dirty_page(&b.join("f"));
    // At least one: the kernel marks whole folios.
    let (_, before) = cached_and_dirty(&b.join("f"));
    assert!(before > 0, "{fs:?}: the page did not stay dirty for the test");
    let dirty = scan(&roots, &[]);
    let (_, still) = cached_and_dirty(&b.join("f"));
    // Unless the kernel happened to write back just now.
    if still == before {
        dirty.expect_clean();
        // The other file alone is decided; the dirty one is neither equal to it nor missing.
        dirty.expect(&[
            ("cache_bytes", 20 * PAGE),
            ("mergeable_file_bytes", 0),
            ("mergeable_page_bytes", 0),
            ("undecided_bytes", 10 * PAGE),
            ("resident_duplicate_bytes", 0),
        ]);
    }
    // Reading decides it: nine pages are equal, the tenth is not.
    let content = scan(&roots, &["--content"]);
    content.expect_clean();
    content.expect(&[
        ("mergeable_file_bytes", 0),
        ("mergeable_page_bytes", 9 * PAGE),
        ("undecided_bytes", 0),
    ]);

    sync(rig.path());
    let synced = scan(&roots, &[]);
    synced.expect_clean();
    synced.expect(&[("mergeable_file_bytes", 0), ("mergeable_page_bytes", 9 * PAGE), ("undecided_bytes", 0)]);
}

#[test]
fn privileged_a_page_written_and_not_synced_is_undecided() {
    for fs in REFLINK {
        check_undecided_then_decided(fs, |path| overwrite_page(path, 4, 99));
    }
}

#[test]
fn privileged_a_page_dirtied_through_a_mapping_is_undecided() {
    for fs in REFLINK {
        check_undecided_then_decided(fs, |path| {
            let store = format!("mwrite -S 0x5a {} 1", 4 * PAGE + 7);
            let args = ["-c", "mmap -rw 0 40960", "-c", &store, "-c", "munmap"];
            let mut all: Vec<&std::ffi::OsStr> = args.iter().map(std::ffi::OsStr::new).collect();
            all.push(path.as_os_str());
            common::run("xfs_io", &all);
        });
    }
}

/// The window between the end of writeback and the new extent in the map: a scan beside a sync sees many of them.
#[test]
fn privileged_files_being_written_back_are_never_equal_to_their_origin() {
    const FILES: u64 = 1500;
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let (a, b) = (dir(rig.path(), "a"), dir(rig.path(), "b"));
        for i in 0..FILES {
            write(&a.join(i.to_string()), i + 1, 4096);
        }
        sync(rig.path());
        for i in 0..FILES {
            reflink(&a.join(i.to_string()), &b.join(i.to_string()));
        }
        sync(rig.path());
        scan(&[&a, &b], &[]).expect(&[("mergeable_page_bytes", FILES * PAGE)]);
        for round in 0..4 {
            for i in 0..FILES {
                overwrite_page(&b.join(i.to_string()), 0, (round + 1) * 1_000_000 + i);
            }
            // From here on no two files are equal, synced or not.
            let done = AtomicBool::new(false);
            let mut scans = 0;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    sync(rig.path());
                    done.store(true, Ordering::Release);
                });
                loop {
                    let last = done.load(Ordering::Acquire);
                    let found = scan(&[&a, &b], &[]);
                    assert_eq!(found.total("files"), 2 * FILES, "{fs:?}");
                    assert_eq!(
                        found.total("mergeable_page_bytes"),
                        0,
                        "{fs:?}, round {round}, scan {scans}: files that differ were called equal"
                    );
                    scans += 1;
                    if last {
                        break;
                    }
                }
            });
            for i in 0..FILES {
                fs::remove_file(b.join(i.to_string())).expect("removed");
                reflink(&a.join(i.to_string()), &b.join(i.to_string()));
            }
            sync(rig.path());
        }
    }
}
