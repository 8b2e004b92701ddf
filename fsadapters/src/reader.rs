//! Reads and hashes pages without leaving them in the page cache.
//!
//! Pages that are not cached are read with `O_DIRECT`; cached ones through the cache, where nothing new comes in. Where
//! `O_DIRECT` is refused, or the kernel falls back behind our back (btrfs: compressed and inline extents), what a read brought in
//! is dropped again: by the kernel itself with `RWF_DONTCACHE` (6.14), and by `guard` for the rest.
//!
//! Each thread owns a ring: opens run ahead of reads, reads stay in flight while pages are hashed. Where io_uring is
//! forbidden, plain `pread` on more threads takes its place.
//!
//! Invariant: a job has at most one outcome; hashes are told only if the file was the expected one before its first and
//! after its last read. What it deliberately does not do: order jobs, or look for equal hashes.

mod file;
mod guard;
mod plain;
mod plan;
mod worker;

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

pub(crate) use guard::CacheGuard;
use pagefold_sys::uring::Ring;

use crate::source::{PageHash, ReadJob, ReadOptions, ReadOutcome};

/// The most bytes one read asks for.
const READ_BYTES_MAX: usize = 1 << 20;

/// Memory for the buffers of one thread, at most. More fits no cache: the pages would be cold when they are hashed.
const BUFFER_BYTES_MAX: usize = 16 << 20;

/// Jobs taken from the shared iterator at once: few enough that threads stay near each other on the disk.
const JOBS_PER_GRAB: usize = 16;

/// Reads and hashes what `jobs` ask for; see [`crate::source::FileSource::read`].
pub fn read_jobs(
    jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
    options: ReadOptions,
    cancel: &AtomicBool,
    done: &(dyn Fn(ReadOutcome) + Sync),
) {
    read_jobs_by(Backend::Best, jobs, options, cancel, done);
}

/// How pages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where it is allowed, else [`Backend::Plain`].
    Best,
    /// `pread` on several threads.
    Plain,
}

/// [`read_jobs`] with a chosen backend: for comparison and tests.
pub fn read_jobs_by(
    backend: Backend,
    jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
    options: ReadOptions,
    cancel: &AtomicBool,
    done: &(dyn Fn(ReadOutcome) + Sync),
) {
    let depth = options.queue_depth.clamp(1, 1024);
    let threads = options.threads.clamp(1, 1024);
    let shared = Shared { jobs: Mutex::new(Some(jobs)), depth, cancel, done };
    let ring = (backend == Backend::Best).then(|| Ring::new(worker::requests(depth)));
    match ring {
        Some(Ok(ring)) => {
            // Only a probe: each ring belongs to the thread that made it.
            drop(ring);
            std::thread::scope(|scope| {
                (0..threads).for_each(|_| drop(scope.spawn(|| worker::run(&shared))));
            });
        }
        other => {
            if let Some(Err(error)) = other {
                tracing::debug!(%error, "no io_uring: reading with pread");
            }
            // A blocking thread has one read in flight: more threads stand in for the queue.
            let threads = threads * depth.min(8) as usize;
            std::thread::scope(|scope| {
                (0..threads).for_each(|_| drop(scope.spawn(|| plain::run(&shared))));
            });
        }
    }
}

/// What all threads of one call share.
struct Shared<'a> {
    /// `None` once exhausted: an iterator need not be fused.
    jobs: Mutex<Option<&'a mut (dyn Iterator<Item = ReadJob> + Send)>>,
    depth: u32,
    cancel: &'a AtomicBool,
    done: &'a (dyn Fn(ReadOutcome) + Sync),
}

impl Shared<'_> {
    fn cancelled(&self) -> bool {
        self.cancel.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Adds up to `most` jobs to `out`; false when there are no more.
    fn grab(&self, most: usize, out: &mut std::collections::VecDeque<ReadJob>) -> bool {
        let mut jobs = self.jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(iterator) = jobs.as_mut() else { return false };
        for _ in 0..most {
            match iterator.next() {
                Some(job) => out.push_back(job),
                None => {
                    *jobs = None;
                    return !out.is_empty();
                }
            }
        }
        true
    }

    fn buffer_bytes(&self) -> usize {
        let page = rustix::param::page_size();
        let share = BUFFER_BYTES_MAX / (2 * self.depth as usize);
        READ_BYTES_MAX.min(share / page * page).max(page)
    }
}

/// Hash of one whole page of bytes.
fn hash_page(page: &[u8]) -> PageHash {
    let mut hash = PageHash::default();
    hash.copy_from_slice(&blake3::hash(page).as_bytes()[..size_of::<PageHash>()]);
    hash
}
