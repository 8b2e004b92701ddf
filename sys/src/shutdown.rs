//! Forced shutdown of a file system, as a power cut would do it (`FS_IOC_SHUTDOWN`; XFS, ext4, f2fs).

use std::io;
use std::os::fd::BorrowedFd;

use crate::ioc;

const FS_IOC_SHUTDOWN: u64 = ioc::ior::<u32>(b'X', 125);
const _: () = assert!(FS_IOC_SHUTDOWN == 0x8004_587d);

/// What happens to the log first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Shutdown {
    /// What is committed in memory still reaches the log; file data doesn't.
    FlushLog = 1,
    /// Nothing reaches the disk any more: a power cut.
    DropLog = 2,
}

/// Shuts the file system of `fd` down: from here everything on it fails with `EIO` until it is unmounted and mounted again.
///
/// # Errors
/// `ENOTTY` where it can't be done (btrfs), `EPERM` without `CAP_SYS_ADMIN`.
pub fn shutdown(fd: BorrowedFd<'_>, how: Shutdown) -> io::Result<()> {
    let mut flags = how as u32;
    // SAFETY: declared with `u32`: the kernel reads four bytes and writes none.
    unsafe { ioc::ioctl(fd, FS_IOC_SHUTDOWN, &mut flags) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_no_file_system_of_that_kind_is_told() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert!(shutdown(file.as_fd(), Shutdown::FlushLog).is_err());
    }
}
