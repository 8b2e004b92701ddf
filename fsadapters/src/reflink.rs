//! Sharing blocks between files: clones, and deduplication that the kernel verifies.
//!
//! Invariant: [`clone_file`] and [`clone_range`] overwrite what the destination held; [`dedupe`] changes nothing that a reader could
//! see: the kernel compares under both inodes' locks and shares only equal bytes. What it deliberately does not do: decide
//! what to share; fall back to copying.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

pub use pagefold_sys::reflink::{DEDUPE_DESTS_MAX, DedupeDest};
use pagefold_sys::reflink::{DedupeStatus, dedupe as dedupe_once};
use rustix::io::Errno;

/// Bytes that one `FIDEDUPERANGE` is asked for: btrfs shortens longer ones, XFS holds its locks all the while.
pub const DEDUPE_CHUNK_BYTES: u64 = 16 << 20;

/// Why blocks could not be shared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReflinkError {
    /// The file system can't (`EOPNOTSUPP`, `ENOTTY`, `ENOSYS`; made without reflink).
    #[error("the file system can't share blocks between files")]
    Unsupported,
    /// Two file systems.
    #[error("the files are on different file systems")]
    CrossDevice,
    /// A byte range that is not aligned to blocks, overlaps itself or passes the end of the source; also NOCOW against COW
    /// and swap files.
    #[error("the kernel refuses this range or this pair of files")]
    Refused,
    /// Not allowed: an immutable, append-only or read-only destination.
    #[error("not permitted: {0}")]
    NotPermitted(io::Error),
    /// Anything else (`ENOSPC`, `EIO`, `ETXTBSY`, ...).
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for ReflinkError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => ReflinkError::Unsupported,
            Some(Errno::XDEV) => ReflinkError::CrossDevice,
            Some(Errno::INVAL) => ReflinkError::Refused,
            Some(Errno::PERM | Errno::ACCESS | Errno::ROFS) => ReflinkError::NotPermitted(error),
            _ => ReflinkError::Io(error),
        }
    }
}

/// Makes `dest` share all blocks of `src` (`FICLONE`); what `dest` held is gone, its size becomes that of `src` if it was smaller.
///
/// # Errors
/// [`ReflinkError`].
pub fn clone_file(src: impl AsFd, dest: impl AsFd) -> Result<(), ReflinkError> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::ioctl_ficlone(&dest, &src)).map_err(io::Error::from)?)
}

/// Makes `length` bytes at `dest_offset` of `dest` share the blocks at `src_offset` of `src` (`FICLONERANGE`). All in bytes,
/// aligned to blocks; only the end of `src` need not be.
///
/// # Errors
/// [`ReflinkError`]; a `length` of 0, which would mean "to the end", is [`ReflinkError::Refused`].
pub fn clone_range(
    src: impl AsFd,
    src_offset: u64,
    length: u64,
    dest: impl AsFd,
    dest_offset: u64,
) -> Result<(), ReflinkError> {
    if length == 0 {
        return Err(ReflinkError::Refused);
    }
    let result =
        pagefold_sys::reflink::clone_range(src.as_fd(), src_offset, length, dest.as_fd(), dest_offset);
    Ok(result?)
}

/// What became of one destination.
#[derive(Debug)]
pub enum Deduped {
    /// All bytes are equal and share blocks now.
    Same,
    /// The first so many bytes are equal and share blocks now; after them, within one chunk, the bytes differ.
    Differs {
        /// Bytes shared, from the start.
        shared: u64,
    },
    /// The first so many bytes are equal and share blocks now; then the kernel refused.
    Failed {
        /// Bytes shared, from the start.
        shared: u64,
        /// Why.
        error: ReflinkError,
    },
}

/// Lets the kernel compare `length` bytes at `src_offset` of `src` with each destination and share what is equal. One
/// answer a destination, in order; chunked by [`DEDUPE_CHUNK_BYTES`], short answers are continued.
///
/// # Errors
/// Only what concerns `src` or all destinations alike; the destinations may then be shared in part, which no reader sees.
pub fn dedupe(
    src: impl AsFd,
    src_offset: u64,
    length: u64,
    dests: &[DedupeDest<'_>],
) -> Result<Vec<Deduped>, ReflinkError> {
    let mut outcomes = Vec::with_capacity(dests.len());
    for group in dests.chunks(DEDUPE_DESTS_MAX) {
        dedupe_group(src.as_fd(), src_offset, length, group, &mut outcomes)?;
    }
    Ok(outcomes)
}

/// One destination on its way.
struct Progress<'a> {
    dest: DedupeDest<'a>,
    shared: u64,
    end: Option<Deduped>,
}

fn dedupe_group(
    src: BorrowedFd<'_>,
    src_offset: u64,
    length: u64,
    group: &[DedupeDest<'_>],
    outcomes: &mut Vec<Deduped>,
) -> Result<(), ReflinkError> {
    let mut all: Vec<Progress<'_>> =
        group.iter().map(|&dest| Progress { dest, shared: 0, end: None }).collect();
    // Destinations that have come equally far are asked for together; a short answer makes one fall back, so each turn takes
    // those at the least offset.
    while let Some(at) = all.iter().filter(|p| p.end.is_none() && p.shared < length).map(|p| p.shared).min() {
        let mut turn: Vec<&mut Progress<'_>> =
            all.iter_mut().filter(|p| p.end.is_none() && p.shared == at).collect();
        let asked = DEDUPE_CHUNK_BYTES.min(length - at);
        let dests: Vec<DedupeDest<'_>> = turn
            .iter()
            .map(|p| DedupeDest { fd: p.dest.fd, offset: p.dest.offset.saturating_add(at) })
            .collect();
        let start = src_offset.checked_add(at).ok_or(ReflinkError::Refused)?;
        let statuses = dedupe_once(src, start, asked, &dests)?;
        turn.iter_mut().zip(statuses).for_each(|(progress, status)| progress.take(status));
    }
    outcomes.extend(all.into_iter().map(|p| p.end.unwrap_or(Deduped::Same)));
    Ok(())
}

impl Progress<'_> {
    fn take(&mut self, status: DedupeStatus) {
        let shared = self.shared;
        match status {
            // No progress and no reason: asking again would go on for ever.
            DedupeStatus::Same(0) => {
                self.end = Some(Deduped::Failed { shared, error: ReflinkError::Refused });
            }
            DedupeStatus::Same(bytes) => self.shared += bytes,
            DedupeStatus::Differs => self.end = Some(Deduped::Differs { shared }),
            DedupeStatus::Refused(errno) => {
                let error = io::Error::from_raw_os_error(errno).into();
                self.end = Some(Deduped::Failed { shared, error });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_not_possible_is_typed() {
        // /dev/shm or the build directory: neither tmpfs nor ext4 can share blocks; a build on XFS proves less here.
        let (src, dest) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        src.set_len(4096).unwrap();
        let result = clone_file(&src, &dest);
        assert!(matches!(result, Ok(()) | Err(ReflinkError::Unsupported)), "{result:?}");
        assert!(matches!(clone_range(&src, 0, 0, &dest, 0), Err(ReflinkError::Refused)));
        let proc_file = File::open("/proc/self/status").unwrap();
        let result = clone_file(&proc_file, &dest);
        assert!(matches!(result, Err(ReflinkError::CrossDevice | ReflinkError::Unsupported)), "{result:?}");
    }

    #[test]
    fn no_destination_is_no_work() {
        let src = tempfile::tempfile().unwrap();
        assert!(dedupe(&src, 0, 4096, &[]).unwrap().is_empty());
    }
}
