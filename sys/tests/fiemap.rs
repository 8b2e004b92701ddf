//! Extent maps: the own reader against the crate `fiemap` as oracle.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use pagefold_sys::fiemap::{Extent, ExtentReader, FiemapError, Sync};

/// The build directory: a file system with a disk, which `/tmp` need not be.
fn disk_file() -> File {
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn map(file: &File, end: u64) -> Result<Vec<Extent>, FiemapError> {
    let mut extents = Vec::new();
    ExtentReader::new().read(file.as_fd(), end, Sync::Yes, |e| extents.push(e))?;
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
fn agrees_with_the_crate_on_many_extents() {
    let file = fragmented(700); // More than two buffers full.
    let ours = map(&file, u64::MAX).unwrap();
    let theirs: Vec<Extent> = fiemap::Fiemap::new(&file)
        .map(|e| e.unwrap())
        .map(|e| Extent {
            logical: e.fe_logical,
            physical: e.fe_physical,
            length: e.fe_length,
            flags: e.fe_flags.bits(),
        })
        .collect();
    assert!(ours.len() >= 700, "{} extents", ours.len());
    assert_eq!(ours, theirs);
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
