//! Cost of the own reader and of the crate `fiemap` on one fragmented file: the reason why the crate is only the oracle.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use pagefold_sys::fiemap::{ExtentReader, Sync};

fn time(mut work: impl FnMut()) -> Duration {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            (0..20).for_each(|_| work());
            start.elapsed() / 20
        })
        .min()
        .unwrap()
}

#[test]
fn is_no_dearer_than_the_crate() {
    // PAGEFOLD_FIEMAP_DIR: a directory on the file system to measure, for example a btrfs.
    let dir = std::env::var_os("PAGEFOLD_FIEMAP_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    for pieces in [1, 1000] {
        let file = tempfile::tempfile_in(&dir).unwrap();
        for i in 0..pieces {
            file.write_all_at(&[i as u8; 4096], i * 8192).unwrap();
        }
        file.sync_all().unwrap();
        let mut reader = ExtentReader::new();
        let mut count = 0u64;
        let ours = time(|| reader.read(file.as_fd(), u64::MAX, Sync::No, |_| count += 1).unwrap());
        let theirs = time(|| count -= fiemap::Fiemap::new(&file).count() as u64);
        println!("{pieces} extents: own reader {ours:?}, crate {theirs:?}");
        assert_eq!(count, 0, "the same number of extents");
        assert!(ours < theirs * 2, "{pieces} extents: own reader {ours:?}, crate {theirs:?}");
    }
}
