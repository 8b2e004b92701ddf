//! Extended file attributes (`FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR`): project id and the flags that directories hand down.
//!
//! What it deliberately does not do: the older flags word (no-COW, ...), which is `rustix::fs::ioctl_getflags`.

use std::io;
use std::os::fd::BorrowedFd;

use crate::ioc;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileAttributes {
    /// `FS_XFLAG_*`.
    pub flags: u32,
    /// Extent size hint in bytes.
    pub extent_size: u32,
    /// Extents of the file; ignored when set.
    pub extents: u32,
    /// Project id: whose quota the file counts to; 0 is nobody's.
    pub project: u32,
    /// Extent size hint for copy-on-write, in bytes.
    pub cow_extent_size: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<FileAttributes>() == 28);
const FS_IOC_FSGETXATTR: u64 = ioc::ior::<FileAttributes>(b'X', 31);
const FS_IOC_FSSETXATTR: u64 = ioc::iow::<FileAttributes>(b'X', 32);
const _: () = assert!(FS_IOC_FSGETXATTR == 0x801c_581f);
const _: () = assert!(FS_IOC_FSSETXATTR == 0x401c_5820);

/// Nobody may write, rename or remove it.
pub const XFLAG_IMMUTABLE: u32 = 0x8;
/// New files go to the real-time device.
pub const XFLAG_RTINHERIT: u32 = 0x100;
/// New files get the directory's project id.
pub const XFLAG_PROJINHERIT: u32 = 0x200;
/// New files get the directory's extent size hint.
pub const XFLAG_EXTSZINHERIT: u32 = 0x1000;

/// Reads them.
///
/// # Errors
/// `ENOTTY` or `EOPNOTSUPP` where the file system has no such attributes.
pub fn file_attributes(fd: BorrowedFd<'_>) -> io::Result<FileAttributes> {
    let mut answer = FileAttributes::default();
    // SAFETY: `_IOR` of exactly `FileAttributes`: the kernel writes 28 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, FS_IOC_FSGETXATTR, &mut answer) }?;
    Ok(answer)
}

/// Sets them, all at once: change what [`file_attributes`] gave.
///
/// # Errors
/// `EPERM`, `EINVAL` (a hint that is not a multiple of the block size, a project id outside the initial user namespace), ...
pub fn set_file_attributes(fd: BorrowedFd<'_>, attributes: FileAttributes) -> io::Result<()> {
    let mut argument = attributes;
    // SAFETY: `_IOW` of exactly `FileAttributes`: the kernel reads 28 bytes and writes none.
    unsafe { ioc::ioctl(fd, FS_IOC_FSSETXATTR, &mut argument) }?;
    Ok(())
}
