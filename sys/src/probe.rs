//! Questions to the kernel that only `doctor` asks: does a lease, userfaultfd, KSM exist for this process?
//!
//! Invariant: an answer changes nothing that lasts: descriptors are closed, leases given back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{ioc, retry};

/// Takes a read lease on `file` (open read-only) and gives it back.
///
/// # Errors
/// `EAGAIN` while somebody has it open for writing, `EACCES` without ownership or `CAP_LEASE`, `EINVAL` where the file
/// system has none.
pub fn read_lease(file: BorrowedFd<'_>) -> io::Result<()> {
    set_lease(file, libc::F_RDLCK)?;
    set_lease(file, libc::F_UNLCK)
}

fn set_lease(file: BorrowedFd<'_>, kind: libc::c_int) -> io::Result<()> {
    retry(|| {
        // SAFETY: F_SETLEASE takes an int and touches no memory of ours; the descriptor is borrowed, so open.
        libc::c_long::from(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) })
    })
    .map(drop)
}

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`: write protection of anonymous memory (Linux 5.7).
pub const UFFD_WP: u64 = 1;
/// `UFFD_FEATURE_MOVE` (Linux 6.8).
pub const UFFD_MOVE: u64 = 1 << 16;

#[repr(C)]
#[derive(Default)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFDIO_API: u64 = ioc::iowr::<UffdApi>(0xaa, 0x3f);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Feature bits of userfaultfd for this process.
///
/// # Errors
/// `EPERM` when not allowed (`vm.unprivileged_userfaultfd`, seccomp), `ENOSYS` when missing.
pub fn userfaultfd_features() -> io::Result<u64> {
    let fd = userfaultfd(0).or_else(|_| userfaultfd(UFFD_USER_MODE_ONLY))?;
    let mut api = UffdApi { api: UFFD_API, ..UffdApi::default() };
    // SAFETY: `_IOWR` of exactly `UffdApi`: the kernel reads and writes 24 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd.as_fd(), UFFDIO_API, &mut api) }?;
    Ok(api.features)
}

fn userfaultfd(flags: libc::c_int) -> io::Result<OwnedFd> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = retry(|| {
        // SAFETY: takes one int and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }
    })?;
    // SAFETY: the call has just returned this descriptor; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether this process may ask KSM to merge all its memory (`PR_GET_MEMORY_MERGE`, Linux 6.4). Only asks.
///
/// # Errors
/// `EINVAL` before 6.4 or without KSM.
pub fn ksm_process_merge() -> io::Result<bool> {
    const PR_GET_MEMORY_MERGE: libc::c_int = 68;
    let (zero, none): (libc::c_ulong, libc::c_ulong) = (0, 0);
    let answer = retry(|| {
        // SAFETY: this option takes no pointer; the kernel demands zeros.
        libc::c_long::from(unsafe { libc::prctl(PR_GET_MEMORY_MERGE, zero, none, zero, none) })
    })?;
    Ok(answer == 1)
}
