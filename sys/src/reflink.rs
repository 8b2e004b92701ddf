//! Sharing of blocks: `FICLONERANGE` and `FIDEDUPERANGE` as one kernel call each.
//!
//! What it deliberately does not do: chunk, retry a short answer, or interpret; `fsadapters::reflink` does. A whole-file
//! `FICLONE` is `rustix::fs::ioctl_ficlone`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::ioc;

#[repr(C)]
struct CloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

const FICLONERANGE: u64 = ioc::iow::<CloneRange>(0x94, 13);
const _: () = assert!(FICLONERANGE == 0x4020_940d);

/// Makes `dest_offset ..` of `dest` share the blocks of `length` bytes at `src_offset` of `src`; `length` 0 means to EOF.
///
/// # Errors
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL` (not block-aligned, ranges overlap), `EPERM` (immutable), `ETXTBSY`, `ENOSPC`, ...
pub fn clone_range(
    src: BorrowedFd<'_>,
    src_offset: u64,
    length: u64,
    dest: BorrowedFd<'_>,
    dest_offset: u64,
) -> io::Result<()> {
    let mut range =
        CloneRange { src_fd: i64::from(src.as_raw_fd()), src_offset, src_length: length, dest_offset };
    // SAFETY: `_IOW` of exactly `CloneRange`: the kernel reads 32 bytes and writes none. `src` is borrowed for the call.
    unsafe { ioc::ioctl(dest, FICLONERANGE, &mut range) }?;
    Ok(())
}

/// A destination of [`dedupe`].
#[derive(Clone, Copy, Debug)]
pub struct DedupeDest<'a> {
    /// Open for writing, or (Linux 4.19+) owned by the caller.
    pub fd: BorrowedFd<'a>,
    /// Where, in bytes.
    pub offset: u64,
}

/// What the kernel said of one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DedupeStatus {
    /// Compared under lock and shared now, this many bytes from the start; may be fewer than asked for.
    Same(u64),
    /// The bytes differ.
    Differs,
    /// Refused with this errno.
    Refused(i32),
}

/// Destinations one call takes: the kernel refuses requests beyond one page (127 of them at 4 KiB).
pub const DEDUPE_DESTS_MAX: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct DedupeInfo {
    dest_fd: i64,
    dest_offset: u64,
    bytes_deduped: u64,
    status: i32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DedupeHeader {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
}

#[repr(C)]
struct DedupeRequest {
    header: DedupeHeader,
    info: [DedupeInfo; DEDUPE_DESTS_MAX],
}

const _: () = assert!(size_of::<DedupeInfo>() == 32);
const _: () = assert!(size_of::<DedupeHeader>() == 24);
const _: () = assert!(size_of::<DedupeRequest>() == 24 + 32 * DEDUPE_DESTS_MAX);
const _: () = assert!(size_of::<DedupeRequest>() < 4096, "the kernel refuses more than a page");
const FIDEDUPERANGE: u64 = ioc::iowr::<DedupeHeader>(0x94, 54);
const _: () = assert!(FIDEDUPERANGE == 0xc018_9436);
const FILE_DEDUPE_RANGE_DIFFERS: i32 = 1;

/// One `FIDEDUPERANGE`: compares `length` bytes at `src_offset` of `src` with each destination, under the inodes' locks,
/// and makes equal ranges share blocks. The answer has one status a destination, in order.
///
/// # Errors
/// `EINVAL` for more than [`DEDUPE_DESTS_MAX`] destinations or none, and whatever concerns the whole request
/// (`EOPNOTSUPP`, `EISDIR`, ...).
pub fn dedupe(
    src: BorrowedFd<'_>,
    src_offset: u64,
    length: u64,
    dests: &[DedupeDest<'_>],
) -> io::Result<Vec<DedupeStatus>> {
    if dests.is_empty() || dests.len() > DEDUPE_DESTS_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let none = DedupeInfo { dest_fd: -1, dest_offset: 0, bytes_deduped: 0, status: 0, reserved: 0 };
    let mut request = DedupeRequest {
        header: DedupeHeader {
            src_offset,
            src_length: length,
            dest_count: dests.len() as u16,
            reserved1: 0,
            reserved2: 0,
        },
        info: [none; DEDUPE_DESTS_MAX],
    };
    for (info, dest) in request.info.iter_mut().zip(dests) {
        info.dest_fd = i64::from(dest.fd.as_raw_fd());
        info.dest_offset = dest.offset;
    }
    // SAFETY: the kernel reads and writes the header and `dest_count` entries behind it; `dest_count` is at most the length
    // of `info` (checked above). Any bit pattern is an integer. All descriptors are borrowed for the call.
    unsafe { ioc::ioctl(src, FIDEDUPERANGE, &mut request) }?;
    Ok(request.info[..dests.len()].iter().map(|info| status_of(info, length)).collect())
}

fn status_of(info: &DedupeInfo, length: u64) -> DedupeStatus {
    match info.status {
        0 => DedupeStatus::Same(info.bytes_deduped.min(length)),
        FILE_DEDUPE_RANGE_DIFFERS => DedupeStatus::Differs,
        other => DedupeStatus::Refused(other.saturating_neg()),
    }
}
