//! A file mapped for reading, at the address that the kernel chooses or at one that huge pages can be mapped at: for measuring what
//! mappings cost.
//!
//! Invariant: this process never loads a byte of the mapping itself, the kernel copies them out. So a file that becomes shorter is an
//! error here and no signal, and bytes that others change meanwhile are nothing that the compiler made assumptions about. What it
//! deliberately does not do: map for writing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

use crate::retry;

/// What an address must be a multiple of for huge pages to be mapped there.
pub const HUGE_BYTES: usize = 2 << 20;

/// Where a file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the kernel, that is the file's file system, puts it.
    Default,
    /// At a multiple of [`HUGE_BYTES`].
    Aligned,
}

/// The beginning of a file, mapped shared and read-only; unmapped when dropped.
#[derive(Debug)]
pub struct FileMapping {
    /// All address space that is ours: the mapping, and what was reserved around it to choose its address.
    space: NonNull<u8>,
    space_bytes: usize,
    at: usize,
    length: usize,
}

impl FileMapping {
    /// Maps bytes `0 .. length` of `fd`. They need not be there: what is past the file's end is an error when it is read.
    ///
    /// # Errors
    /// As `mmap(2)`: `EINVAL` for no bytes, `EACCES` when not open for reading, `ENODEV` for what can't be mapped, `ENOMEM`.
    pub fn new(fd: BorrowedFd<'_>, length: usize, place: Place) -> io::Result<FileMapping> {
        if place == Place::Default {
            // SAFETY: without MAP_FIXED the kernel takes unused addresses, so no memory in use is replaced.
            let at = unsafe {
                rustix::mm::mmap(ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, fd, 0)
            }?;
            let space = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
            return Ok(FileMapping { space, space_bytes: length, at: 0, length });
        }
        let space_bytes = length.checked_add(HUGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel takes unused addresses, so no memory in use is replaced.
        let space =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), space_bytes, ProtFlags::empty(), flags) }?;
        let space = NonNull::new(space.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let at = space.as_ptr().align_offset(HUGE_BYTES);
        // From here on dropping unmaps.
        let mapping = FileMapping { space, space_bytes, at, length };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let address = mapping.address(0).cast();
        // SAFETY: `address .. address + length` lies within the `length + HUGE_BYTES` bytes just reserved, for `at` is less than
        // HUGE_BYTES, and nobody else has a pointer to these: only the reservation itself is replaced.
        unsafe { rustix::mm::mmap(address, length, ProtFlags::READ, flags, fd, 0) }?;
        Ok(mapping)
    }

    /// Whether huge pages could be mapped at its first byte.
    #[must_use]
    pub fn is_aligned(&self) -> bool {
        self.address(0).addr().is_multiple_of(HUGE_BYTES)
    }

    /// Reads bytes `from .. from + length` by having the kernel write them to the beginning of the file `to`; how many it wrote.
    ///
    /// # Errors
    /// `EINVAL` when these bytes are not all mapped, `EFAULT` when the file is shorter, and those of `pwrite(2)`.
    pub fn write_to(&self, to: BorrowedFd<'_>, from: usize, length: usize) -> io::Result<usize> {
        if from.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = self.address(from);
        // SAFETY: `bytes` has `length` bytes of the mapping behind it, as was just looked at; it lives as long as `self`. The kernel
        // reads them with its own fault handling: pages that aren't there are EFAULT.
        let done =
            retry(|| unsafe { libc::pwrite(to.as_raw_fd(), bytes.cast(), length, 0) as libc::c_long })?;
        Ok(done.unsigned_abs() as usize)
    }

    fn address(&self, from: usize) -> *mut u8 {
        self.space.as_ptr().wrapping_add(self.at + from)
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: `space_bytes` from `space` on were mapped in `new` for this value alone, and it hands out no pointer to them.
        let _ = unsafe { rustix::mm::munmap(self.space.as_ptr().cast(), self.space_bytes) };
    }
}
