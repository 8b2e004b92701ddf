//! Extent maps (`FS_IOC_FIEMAP`) through one reused buffer.
//!
//! Invariant: ends for any file system: every extent must end after the one before, and offsets that wrap are an error,
//! so a map that never advances is [`FiemapError::Stuck`] and not a loop. What it deliberately does not do: judge flags.
//!
//! Why not the crate `fiemap`: its buffer holds eight extents. For files of few extents both cost the same; for a
//! fragmented or compressed btrfs file every further call locks the range and looks up shared extents again. See
//! `tests/fiemap_cost.rs` for the comparison. The crate serves as the oracle of the tests.

use std::io;
use std::os::fd::BorrowedFd;

use crate::ioc;

/// One extent as the kernel reports it; all but `flags` in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub logical: u64,
    /// Address on the device.
    pub physical: u64,
    /// Length, never 0.
    pub length: u64,
    /// `FIEMAP_EXTENT_*` bits.
    pub flags: u32,
}

/// Why an extent map could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FiemapError {
    /// The file system has no extent maps (`EOPNOTSUPP`, `ENOTTY`).
    #[error("the file system has no extent maps")]
    Unsupported,
    /// The map goes back or wraps: the file system is broken, or the file changes while its map is read.
    #[error("the extent map does not advance at byte {at}")]
    Stuck {
        /// Where, in bytes.
        at: u64,
    },
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<FiemapError> for io::Error {
    fn from(error: FiemapError) -> Self {
        match error {
            FiemapError::Unsupported => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            FiemapError::Stuck { .. } => io::Error::new(io::ErrorKind::InvalidData, error),
            FiemapError::Io(error) => error,
        }
    }
}

/// Whether the kernel writes dirty pages back before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// `FIEMAP_FLAG_SYNC`: 0.25 us on a clean file, a write-back on a dirty one. For proofs (design 5.6).
    Yes,
    /// Look only.
    No,
}

/// Extents one call can return: 14 KiB of buffer; a file of more takes more calls.
const EXTENTS_PER_CALL: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

#[repr(C)]
struct Request {
    header: Header,
    extents: [RawExtent; EXTENTS_PER_CALL],
}

const _: () = assert!(size_of::<RawExtent>() == 56);
const _: () = assert!(size_of::<Header>() == 32);
const _: () = assert!(size_of::<Request>() == 32 + 56 * EXTENTS_PER_CALL);
const FS_IOC_FIEMAP: u64 = ioc::iowr::<Header>(b'f', 11);
const _: () = assert!(FS_IOC_FIEMAP == 0xc020_660b);
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 1;

/// Reads extent maps; holds the buffer. One per thread.
pub struct ExtentReader {
    request: Box<Request>,
}

impl Default for ExtentReader {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for ExtentReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtentReader").finish_non_exhaustive()
    }
}

impl ExtentReader {
    /// A reader with an empty buffer.
    #[must_use]
    pub fn new() -> Self {
        let extent =
            RawExtent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
        let header =
            Header { start: 0, length: 0, flags: 0, mapped_extents: 0, extent_count: 0, reserved: 0 };
        ExtentReader { request: Box::new(Request { header, extents: [extent; EXTENTS_PER_CALL] }) }
    }

    /// Calls `extent` for every extent that starts before byte `end`, ascending. Extents told before an error stay told.
    ///
    /// # Errors
    /// [`FiemapError`]; `EINTR` is tried again.
    pub fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        end: u64,
        sync: Sync,
        mut extent: impl FnMut(Extent),
    ) -> Result<(), FiemapError> {
        let mut start = 0;
        while start < end {
            let request = &mut *self.request;
            request.header = Header {
                start,
                length: end - start,
                flags: if sync == Sync::Yes { FIEMAP_FLAG_SYNC } else { 0 },
                mapped_extents: 0,
                extent_count: EXTENTS_PER_CALL as u32,
                reserved: 0,
            };
            // SAFETY: the kernel reads the header and writes at most `extent_count` extents behind it, which is the
            // length of the array that follows it in `Request` (repr(C), sizes asserted); any bit pattern is an integer.
            let result = unsafe { ioc::ioctl(fd, FS_IOC_FIEMAP, request) };
            match result {
                Err(e) if crate::is_unsupported(&e) => return Err(FiemapError::Unsupported),
                other => other?,
            };
            let told =
                request.extents.get(..request.header.mapped_extents as usize).unwrap_or(&request.extents);
            for raw in told {
                if raw.logical >= end {
                    return Ok(());
                }
                // Overlaps are passed on (the engine makes their pages undecided) as long as the map advances.
                let next = raw.logical.checked_add(raw.length).filter(|next| *next > start);
                let Some(next) = next else {
                    return Err(FiemapError::Stuck { at: start });
                };
                start = next;
                let &RawExtent { logical, physical, length, flags, .. } = raw;
                extent(Extent { logical, physical, length, flags });
                if flags & FIEMAP_EXTENT_LAST != 0 {
                    return Ok(());
                }
            }
            if told.len() < EXTENTS_PER_CALL {
                return Ok(());
            }
        }
        Ok(())
    }
}
