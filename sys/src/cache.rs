//! What the page cache holds of a file: `cachestat` and `mincore`.
//!
//! Invariant: neither brings pages in nor changes their place in the LRU. What it deliberately does not do: find the inode
//! that really holds the pages. On overlayfs `cachestat` answers for the overlay's own, always empty, mapping, while
//! `mincore` looks through to the real file (design section 11).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use memmap2::MmapOptions;
use rustix::fs::{Access, AtFlags};
use rustix::thread::CapabilitySet;

use crate::retry;

/// Counts of pages in one range of a file (`struct cachestat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CacheStat {
    /// Pages in cache.
    pub nr_cache: u64,
    /// Of these, dirty.
    pub nr_dirty: u64,
    /// Of these, under writeback.
    pub nr_writeback: u64,
    /// Pages that were evicted and have left a shadow.
    pub nr_evicted: u64,
    /// Of these, recently.
    pub nr_recently_evicted: u64,
}

#[repr(C)]
struct CacheStatRange {
    offset: u64,
    length: u64,
}

/// One number on every architecture but alpha (the crate `libc` does not have it yet).
const SYS_CACHESTAT: libc::c_long = 451;
const _: () = assert!(size_of::<CacheStat>() == 40);
const _: () = assert!(size_of::<CacheStatRange>() == 16);

/// Counts the cached pages of bytes `offset .. offset + length`; `length` 0 means to the end of the file.
/// Linux 6.5. Costs one walk of the cached entries, nothing for what is not cached.
///
/// # Errors
/// `ENOSYS` before 6.5; `EPERM` when this user may not know (since 6.15 neither owner nor able to write);
/// `EOPNOTSUPP` on hugetlbfs; `EBADF` for an `O_PATH` descriptor.
pub fn cachestat(fd: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<CacheStat> {
    let mut range = CacheStatRange { offset, length };
    let mut stat = CacheStat::default();
    let (range_ptr, stat_ptr): (*mut CacheStatRange, *mut CacheStat) = (&mut range, &mut stat);
    retry(|| {
        // SAFETY: both pointers are to live locals of the kernel's layout (sizes asserted), the kernel reads 16 bytes of
        // `range` and writes 40 of `stat`; the descriptor is borrowed, so open. Flags must be 0.
        unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range_ptr, stat_ptr, 0u32) }
    })?;
    Ok(stat)
}

/// Bytes of a file mapped at once by [`mincore`]: bounds address space and the vector (64 KiB at 4 KiB pages).
const WINDOW_BYTES: u64 = 256 << 20;

/// Tells the resident runs of pages among bytes `0 .. size`, as (first page, pages), ascending, not adjacent.
///
/// Costs time in proportion to `size` (about 1 ms a GiB): ask [`cachestat`] first, and for sparse files pass only data
/// ranges to [`mincore_range`]. **The kernel says "all resident" to who is neither owner nor able to write**: ask
/// [`may_know_residency`] first.
///
/// # Errors
/// `ENODEV` where the file can't be mapped, `EACCES` when it is not open for reading.
pub fn mincore(fd: BorrowedFd<'_>, size: u64, run: impl FnMut(u64, u64)) -> io::Result<()> {
    mincore_range(fd, 0, size, run)
}

/// [`mincore`] for bytes `start .. end`; `start` is rounded down to a page. A caller that may be cancelled asks piecewise.
///
/// # Errors
/// As [`mincore`].
pub fn mincore_range(
    fd: BorrowedFd<'_>,
    start: u64,
    end: u64,
    mut run: impl FnMut(u64, u64),
) -> io::Result<()> {
    let page = rustix::param::page_size() as u64;
    let mut vector = Vec::new();
    let mut open: Option<(u64, u64)> = None;
    let mut at = start - start % page;
    while at < end {
        let bytes = WINDOW_BYTES.min(end - at);
        mincore_window(fd, at, bytes as usize, &mut vector)?;
        for (index, state) in vector.iter().enumerate() {
            let number = at / page + index as u64;
            match (state & 1 != 0, &mut open) {
                (true, Some((_, pages))) => *pages += 1,
                (true, none) => *none = Some((number, 1)),
                (false, some) => {
                    if let Some((first, pages)) = some.take() {
                        run(first, pages);
                    }
                }
            }
        }
        at += bytes;
    }
    if let Some((first, pages)) = open {
        run(first, pages);
    }
    Ok(())
}

fn mincore_window(fd: BorrowedFd<'_>, at: u64, bytes: usize, vector: &mut Vec<u8>) -> io::Result<()> {
    // A shared read-only mapping that nobody ever touches: no page is faulted in, no SIGBUS past EOF.
    let map = MmapOptions::new().offset(at).len(bytes).no_reserve_swap().map_raw_read_only(&fd)?;
    let pages = bytes.div_ceil(rustix::param::page_size());
    vector.clear();
    vector.resize(pages, 0);
    retry(|| {
        // SAFETY: `map` is a live mapping of `bytes` bytes from a page boundary; `vector` has one byte for each page of
        // them, which is all that mincore writes.
        libc::c_long::from(unsafe { libc::mincore(map.as_ptr() as *mut _, bytes, vector.as_mut_ptr()) })
    })?;
    Ok(())
}

/// Whether the kernel will tell this thread the truth about the cache of the open file `fd`: it owns the file, has
/// `CAP_FOWNER` over it, or may write to it (`can_do_mincore`, Linux 5.2). When unsure: false.
#[must_use]
pub fn may_know_residency(fd: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd) else { return false };
    residency_known_for_owner(stat.st_uid)
        || rustix::fs::accessat(fd, c"", Access::WRITE_OK, AtFlags::EMPTY_PATH | AtFlags::EACCESS).is_ok()
}

/// The part of [`may_know_residency`] that needs no system call on the file: whether files of `owner` are ours to ask about.
#[must_use]
pub fn residency_known_for_owner(owner: u32) -> bool {
    /// What an owner looks like who has no number in our user namespace: capabilities don't reach him.
    const OVERFLOW_UID: u32 = 65534;
    if owner == rustix::process::geteuid().as_raw() {
        return true;
    }
    let capable =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::FOWNER));
    capable && (owner != OVERFLOW_UID || in_initial_user_namespace())
}

fn in_initial_user_namespace() -> bool {
    // Only the initial namespace maps all 2^32 - 1 ids onto themselves.
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}

/// Asks the kernel to drop clean pages of bytes `offset .. offset + length` from the cache (`POSIX_FADV_DONTNEED`). Pages
/// that are mapped, dirty or in use stay.
///
/// # Errors
/// As `posix_fadvise(2)`.
pub fn drop_cached(fd: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    let Some(length) = std::num::NonZeroU64::new(length) else { return Ok(()) };
    rustix::fs::fadvise(fd, offset, Some(length), rustix::fs::Advice::DontNeed)?;
    Ok(())
}
