//! The only unsafe code of pagefold: typed wrappers of the Linux interfaces that the safe crates don't offer.
//!
//! Invariants: one unsafe operation per block; no raw descriptor in a public type; the size of every structure shared
//! with the kernel is asserted at compile time; a safe function is harmless for any argument. What it deliberately does
//! not do: policy. Nothing here decides what to read, share or skip.

pub mod attr;
pub mod btrfs;
pub mod cache;
pub mod fiemap;
pub mod frames;
pub mod handle;
pub mod identity;
mod ioc;
pub mod mapping;
pub mod mount;
pub mod probe;
pub mod reflink;
pub mod shutdown;
pub mod uring;
pub mod userns;

use std::io;

/// Runs `call` until it does not end with `EINTR`, and turns -1 into the errno.
fn retry(mut call: impl FnMut() -> libc::c_long) -> io::Result<libc::c_long> {
    loop {
        let result = call();
        if result != -1 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether `error` says that the kernel or the file system lacks the operation, rather than that it failed.
///
/// `ENOTTY` and `EOPNOTSUPP`: the file system has no such ioctl; `ENOSYS`: the kernel has no such call.
#[must_use]
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::ENOSYS))
}
