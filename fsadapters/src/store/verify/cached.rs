//! Cached pages of one anchor against the disk.
//!
//! Read twice: once through the cache (only pages that are in it: nothing is brought in), once past it with `O_DIRECT`. Nobody can write to
//! an anchor, so a difference is a fault of memory, disk or kernel, or a change behind the file system's back.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use pagefold_engine::units::PageSize;
use pagefold_sys::cache::cachestat;
use pagefold_sys::fiemap::{Sync, read_extents};
use rustix::fs::{Mode, OFlags};

use super::{ProblemKind, VerifyReport};
use crate::residency;
use crate::source::Residency;
use crate::store::task::Task;

/// Compared at once.
const CHUNK: usize = 1 << 20;
/// Buffers begin at a multiple of this: enough for any device's direct I/O.
const ALIGN: usize = 4096;

// `FIEMAP_EXTENT_*`: encoded (compressed) and inline data: a direct read of them goes through the cache.
const ENCODED: u32 = 0x8;
const INLINE: u32 = 0x200;

pub(super) fn compare_cached(
    file: &File,
    path: &Path,
    task: &Task,
    report: &mut VerifyReport,
) -> io::Result<()> {
    let size = file.metadata()?.len();
    let Some(page) = PageSize::new(rustix::param::page_size() as u64) else { return Ok(()) };
    if size == 0 {
        return Ok(());
    }
    let whole = size.checked_next_multiple_of(page.bytes()).unwrap_or(u64::MAX);
    let cached = cachestat(file.as_fd(), 0, whole)?.nr_cache;
    let runs = match residency::of_counted(file.as_fd(), size, cached, page)? {
        Residency::All => vec![(0, size)],
        Residency::Runs(runs) => runs
            .into_iter()
            .map(|(first, pages)| (first.0 << page.shift(), ((first.0 + pages.0) << page.shift()).min(size)))
            .collect(),
        _ => Vec::new(),
    };
    if runs.is_empty() {
        return Ok(());
    }
    if through_cache(file, size) {
        report.not_compared_bytes += runs.iter().map(|(from, to)| to - from).sum::<u64>();
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let direct = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let mut buffers = Buffers::new();
    for (from, to) in runs {
        let mut at = from;
        while at < to && !task.is_cancelled() {
            let bytes = CHUNK.min((to - at) as usize);
            report.compared_bytes += bytes as u64;
            if let Some(differs) = buffers.compare(file, &direct, at, bytes)? {
                let detail = "the cached page differs from the disk: drop the cache of the file system, then run verify again; if the \
                              disk is wrong, seal the roots again";
                let offset = differs - differs % page.bytes();
                report.problem_at(path.to_owned(), ProblemKind::CacheDiffers, detail, Some(offset));
                return Ok(());
            }
            at += bytes as u64;
        }
    }
    Ok(())
}

/// Whether some of the file can't be read past the cache, or that can't be told.
fn through_cache(file: &File, size: u64) -> bool {
    let mut found = false;
    let read = read_extents(file.as_fd(), size, Sync::No, |e| found |= e.flags & (ENCODED | INLINE) != 0);
    found || read.is_err()
}

struct Buffers {
    cached: Vec<u8>,
    direct: Vec<u8>,
    /// Where in `direct` the aligned part begins.
    at: usize,
}

impl Buffers {
    fn new() -> Buffers {
        let direct = vec![0; CHUNK + ALIGN];
        let at = direct.as_ptr().align_offset(ALIGN);
        Buffers { cached: vec![0; CHUNK], at: at.min(ALIGN), direct }
    }

    /// The first byte of `bytes` bytes at `at` that differs. `at` is a multiple of the page size.
    fn compare(&mut self, cached: &File, direct: &File, at: u64, bytes: usize) -> io::Result<Option<u64>> {
        use std::os::unix::fs::FileExt;
        cached.read_exact_at(&mut self.cached[..bytes], at)?;
        let want = bytes.next_multiple_of(ALIGN);
        let buffer = &mut self.direct[self.at..self.at + want];
        let mut got = 0;
        while got < bytes {
            let read =
                rustix::io::retry_on_intr(|| rustix::io::pread(direct, &mut buffer[got..], at + got as u64))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            got += read;
            // The next read must begin aligned; only the end of the file comes short.
            if got < bytes && !got.is_multiple_of(ALIGN) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let first = self.cached[..bytes].iter().zip(&buffer[..bytes]).position(|(a, b)| a != b);
        Ok(first.map(|n| at + n as u64))
    }
}
