//! A file's project id (`FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR`): whose quota its blocks count to.
//!
//! What it deliberately does not do: the other attributes of that structure; they are written back as they were read.

use std::io;
use std::os::fd::BorrowedFd;

use crate::ioc;

#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<FsXattr>() == 28);
const FS_IOC_FSGETXATTR: u64 = ioc::ior::<FsXattr>(b'X', 31);
const FS_IOC_FSSETXATTR: u64 = ioc::iow::<FsXattr>(b'X', 32);
const _: () = assert!(FS_IOC_FSGETXATTR == 0x801c_581f);
const _: () = assert!(FS_IOC_FSSETXATTR == 0x401c_5820);
const FS_XFLAG_PROJINHERIT: u32 = 0x200;

/// A project id, and whether what is created below gets it too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Project {
    /// The number; 0 is no project.
    pub id: u32,
    /// `FS_XFLAG_PROJINHERIT`: new entries of this directory inherit it, and nothing of another project may be renamed into it.
    pub inherit: bool,
}

/// The project of `file`.
///
/// # Errors
/// `ENOTTY`, `EOPNOTSUPP` where the file system has none.
pub fn project(file: BorrowedFd<'_>) -> io::Result<Project> {
    let attributes = get(file)?;
    Ok(Project { id: attributes.project, inherit: attributes.xflags & FS_XFLAG_PROJINHERIT != 0 })
}

/// Gives `file` a project.
///
/// # Errors
/// As [`project`]; `EPERM` without `CAP_FOWNER`, `EINVAL` outside the initial user namespace.
pub fn set_project(file: BorrowedFd<'_>, project: Project) -> io::Result<()> {
    let mut attributes = get(file)?;
    attributes.project = project.id;
    attributes.xflags &= !FS_XFLAG_PROJINHERIT;
    if project.inherit {
        attributes.xflags |= FS_XFLAG_PROJINHERIT;
    }
    // SAFETY: `_IOW` of exactly `FsXattr`: the kernel reads 28 bytes and writes none.
    unsafe { ioc::ioctl(file, FS_IOC_FSSETXATTR, &mut attributes) }?;
    Ok(())
}

fn get(file: BorrowedFd<'_>) -> io::Result<FsXattr> {
    let mut answer = FsXattr::default();
    // SAFETY: `_IOR` of exactly `FsXattr`: the kernel writes 28 bytes, all of them plain integers.
    unsafe { ioc::ioctl(file, FS_IOC_FSGETXATTR, &mut answer) }?;
    Ok(answer)
}
