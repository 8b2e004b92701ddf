//! ioctl numbers and the one place that issues an ioctl with a pointer argument.
//!
//! Invariant: numbers are computed from the size of the Rust type that is passed, so a type of the wrong size changes the
//! number and is refused by the kernel; known values are asserted at compile time where the types are defined.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::retry;

const WRITE: u64 = 1;
const READ: u64 = 2;

const fn ioc(direction: u64, kind: u8, number: u8, size: usize) -> u64 {
    assert!(size < 1 << 14, "an ioctl number holds 14 bits of size");
    direction << 30 | (size as u64) << 16 | (kind as u64) << 8 | number as u64
}

/// `_IOR(kind, number, T)`.
pub(crate) const fn ior<T>(kind: u8, number: u8) -> u64 {
    ioc(READ, kind, number, size_of::<T>())
}

/// `_IOW(kind, number, T)`.
pub(crate) const fn iow<T>(kind: u8, number: u8) -> u64 {
    ioc(WRITE, kind, number, size_of::<T>())
}

/// `_IOWR(kind, number, T)`.
pub(crate) const fn iowr<T>(kind: u8, number: u8) -> u64 {
    ioc(READ | WRITE, kind, number, size_of::<T>())
}

/// Issues `op` with a pointer to `argument`; `EINTR` is tried again.
///
/// # Safety
/// The kernel must not access more than `size_of::<T>()` bytes at the pointer for this `op`, or every count that
/// widens the access (such as `fm_extent_count`) must lie within `T`. Every byte the kernel may write must be valid for `T`.
pub(crate) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, op: u64, argument: &mut T) -> io::Result<u32> {
    let pointer: *mut T = argument;
    let result = retry(|| {
        // SAFETY: the descriptor is borrowed, so open; `pointer` comes from an exclusive borrow that outlives the call;
        // that the kernel stays within it is this function's contract.
        libc::c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), op as _, pointer) })
    })?;
    Ok(result as u32)
}

const _: () = assert!(ior::<[u8; 28]>(b'X', 31) == 0x801c_581f, "FS_IOC_FSGETXATTR");
