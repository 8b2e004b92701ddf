//! Extent maps of real files: complete over many calls, bounded, failures told apart.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use pagefold_sys::fiemap::{Extent, FiemapError, Sync, read_extents};

/// The build directory: a file system with a disk, which `/tmp` need not be.
fn disk_file() -> File {
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn map(file: &File, end: u64) -> Result<Vec<Extent>, FiemapError> {
    let mut extents = Vec::new();
    read_extents(file.as_fd(), end, Sync::Yes, |e| extents.push(e))?;
    Ok(extents)
}

fn fragmented(pieces: u64) -> File {
    let file = disk_file();
    for i in 0..pieces {
        file.write_all_at(&[i as u8; 4096], i * 8192).unwrap();
    }
    file.sync_all().unwrap();
    file
}

#[test]
fn a_map_of_many_calls_is_complete_and_in_order() {
    let extents = map(&fragmented(700), u64::MAX).unwrap();
    let blocks: Vec<u64> = extents.iter().map(|e| e.logical).collect();
    let want: Vec<u64> = (0..700).map(|piece| piece * 8192).collect();
    assert_eq!(blocks, want);
    assert!(extents.iter().all(|e| e.length == 4096));
    assert_eq!(extents.iter().filter(|e| e.flags & 1 != 0).count(), 1, "one extent is the last");
}

#[test]
fn stops_at_the_end_asked_for() {
    let file = fragmented(20);
    let extents = map(&file, 5 * 8192).unwrap();
    assert!(extents.iter().all(|e| e.logical < 5 * 8192));
    assert_eq!(extents.len(), 5);
    assert!(map(&file, 0).unwrap().is_empty());
}

#[test]
fn no_extent_maps_is_told_apart_from_failure() {
    let proc_file = File::open("/proc/self/status").unwrap();
    assert!(matches!(map(&proc_file, 1), Err(FiemapError::Unsupported)));
    let path_only = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    assert!(matches!(map(&File::from(path_only), 1), Err(FiemapError::Io(_))));
}
