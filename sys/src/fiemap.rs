//! Extent maps (`FS_IOC_FIEMAP`), through the crate `fiemap`.
//!
//! Invariant: ends for any file system: every extent must end after the one before, and offsets that wrap are an error,
//! so a map that never advances is [`FiemapError::Stuck`] and not a loop. What it deliberately does not do: judge flags.

use std::io;
use std::os::fd::BorrowedFd;

use fiemap::{Fiemap, FiemapExtentFlags, FiemapFlags};

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

/// Calls `extent` for every extent that starts before byte `end`, ascending. Extents told before an error stay told.
///
/// # Errors
/// [`FiemapError`]; `EINTR` is tried again.
pub fn read_extents(
    fd: BorrowedFd<'_>,
    end: u64,
    sync: Sync,
    mut extent: impl FnMut(Extent),
) -> Result<(), FiemapError> {
    let flags = match sync {
        Sync::Yes => FiemapFlags::SYNC,
        Sync::No => FiemapFlags::empty(),
    };
    let mut at = 0;
    if end == 0 {
        return Ok(());
    }
    for told in Fiemap::with_flags(fd, flags) {
        let told = match told {
            Err(e) if crate::is_unsupported(&e) => return Err(FiemapError::Unsupported),
            other => other?,
        };
        if told.fe_logical >= end {
            return Ok(());
        }
        // Checked before the crate asks on from here: it adds the two without looking. Overlaps are passed on (the
        // engine makes their pages undecided) as long as the map advances.
        let next = told.fe_logical.checked_add(told.fe_length).filter(|next| *next > at);
        let Some(next) = next else {
            return Err(FiemapError::Stuck { at });
        };
        at = next;
        extent(Extent {
            logical: told.fe_logical,
            physical: told.fe_physical,
            length: told.fe_length,
            flags: told.fe_flags.bits(),
        });
        if told.fe_flags.contains(FiemapExtentFlags::LAST) || at >= end {
            return Ok(());
        }
    }
    Ok(())
}
