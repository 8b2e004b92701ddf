//! BLAKE3's own speed over pages: what no reader that hashes pages can beat.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that each thread goes through again and again: more than the caches hold, as bytes that come from a disk.
const BUFFER_BYTES: usize = 64 << 20;

/// Bytes a second that `threads` threads hash, page by page, for about `time`.
#[must_use]
pub fn page_hash_rate(threads: usize, time: Duration) -> f64 {
    let page = rustix::param::page_size();
    let (hashed, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let buffers: Vec<Vec<u8>> = (0..threads).map(|i| vec![i as u8 + 1; BUFFER_BYTES]).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for buffer in &buffers {
            scope.spawn(|| {
                let mut mine = 0;
                for bytes in buffer.chunks_exact(page).cycle() {
                    std::hint::black_box(blake3::hash(bytes));
                    mine += page as u64;
                    if mine.is_multiple_of(1 << 20) && stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                hashed.fetch_add(mine, Ordering::Relaxed);
            });
        }
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    hashed.into_inner() as f64 / start.elapsed().as_secs_f64()
}
