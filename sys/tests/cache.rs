//! The page cache as `cachestat` and `mincore` tell it, against each other and against what the test did.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use pagefold_sys::cache;

const PAGE: u64 = 4096;

fn runs(file: &File, size: u64) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    cache::mincore(file.as_fd(), size, |first, pages| runs.push((first, pages))).unwrap();
    runs
}

#[test]
fn written_pages_are_resident_and_counted() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 10 * PAGE as usize]).unwrap();
    file.seek(SeekFrom::Start(20 * PAGE)).unwrap();
    file.write_all(b"x").unwrap();
    let size = file.metadata().unwrap().len();
    assert_eq!(runs(&file, size), [(0, 10), (20, 1)]);
    let stat = cache::cachestat(file.as_fd(), 0, 0).unwrap();
    assert_eq!(stat.nr_cache, 11);
    assert_eq!(stat.nr_dirty + stat.nr_writeback, 11);
    let part = cache::cachestat(file.as_fd(), 8 * PAGE, 4 * PAGE).unwrap();
    assert_eq!(part.nr_cache, 2);
}

#[test]
fn dropping_leaves_nothing_and_reading_brings_pages_back() {
    // Needs a file system with a disk: tmpfs can't drop. The build directory is one; /tmp need not be.
    let mut file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all(&[7; 64 * PAGE as usize]).unwrap();
    file.sync_all().unwrap();
    cache::drop_cached(&file, 0, 64 * PAGE).unwrap();
    assert_eq!(cache::cachestat(file.as_fd(), 0, 0).unwrap().nr_cache, 0);
    assert_eq!(runs(&file, 64 * PAGE), []);
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    file.seek(SeekFrom::Start(5 * PAGE)).unwrap();
    file.read_exact(&mut [0]).unwrap();
    assert_eq!(runs(&file, 64 * PAGE), [(5, 1)]);
}

#[test]
fn runs_join_across_windows() {
    // Two windows of 256 MiB: the run around the border must come as one.
    let mut file = tempfile::tempfile().unwrap();
    let border = 256 << 20;
    file.set_len(border + 16 * PAGE).unwrap();
    file.seek(SeekFrom::Start(border - 2 * PAGE)).unwrap();
    file.write_all(&[1; 4 * PAGE as usize]).unwrap();
    assert_eq!(runs(&file, border + 16 * PAGE), [(border / PAGE - 2, 4)]);
}

#[test]
fn own_files_may_be_asked_about() {
    let file = tempfile::tempfile().unwrap();
    assert!(cache::may_know_residency(file.as_fd()));
}
