//! Subvolumes of btrfs: make one, tell which one a directory is.
//!
//! Invariant: each function is one ioctl with the kernel's errno unchanged. What it deliberately does not do: delete subvolumes
//! (`rmdir` removes an empty one since Linux 4.18) or make snapshots.

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use crate::ioc;

/// Inode number of a subvolume's own directory (`BTRFS_FIRST_FREE_OBJECTID`).
pub const SUBVOLUME_INO: u64 = 256;

const NAME_BYTES: usize = 4088;

#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [u8; NAME_BYTES],
}

const _: () = assert!(size_of::<VolArgs>() == 4096);
const BTRFS_IOC_SUBVOL_CREATE: u64 = ioc::iow::<VolArgs>(0x94, 14);
const _: () = assert!(BTRFS_IOC_SUBVOL_CREATE == 0x5000_940e);

/// Makes the empty subvolume `name` in `dir`; its mode is 0777 without the umask's bits.
///
/// # Errors
/// `EINVAL` for a name that is empty, too long or holds a slash or a NUL; `EEXIST`, `ENOTTY` (not btrfs), `EPERM`, `ENOSPC`.
pub fn create_subvolume(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let name = name.as_bytes();
    if name.is_empty() || name.len() > 255 || name.iter().any(|b| matches!(b, 0 | b'/')) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut args = VolArgs { fd: 0, name: [0; NAME_BYTES] };
    args.name[..name.len()].copy_from_slice(name);
    // SAFETY: `_IOW` of exactly `VolArgs`: the kernel reads 4,096 bytes and writes none; the name ends with NUL (checked).
    unsafe { ioc::ioctl(dir, BTRFS_IOC_SUBVOL_CREATE, &mut args) }?;
    Ok(())
}

const BTRFS_IOC_SUBVOL_SETFLAGS: u64 = ioc::iow::<u64>(0x94, 26);
const _: () = assert!(BTRFS_IOC_SUBVOL_SETFLAGS == 0x4008_941a);
const BTRFS_SUBVOL_RDONLY: u64 = 1 << 1;

/// Makes the subvolume whose own directory is `dir` read-only: what `btrfs send` wants.
///
/// # Errors
/// `EINVAL` where `dir` is not the directory of a subvolume, `ENOTTY` (not btrfs), `EPERM`, `EROFS`.
pub fn set_read_only(dir: BorrowedFd<'_>) -> io::Result<()> {
    let mut flags = BTRFS_SUBVOL_RDONLY;
    // SAFETY: `_IOW` of exactly `u64`: the kernel reads 8 bytes and writes none.
    unsafe { ioc::ioctl(dir, BTRFS_IOC_SUBVOL_SETFLAGS, &mut flags) }?;
    Ok(())
}

/// What `BTRFS_IOC_GET_SUBVOL_INFO` says, as far as a store needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubvolumeInfo {
    /// Number of the subvolume in its file system.
    pub id: u64,
    /// Made at random with the subvolume; a snapshot has another.
    pub uuid: [u8; 16],
    /// UUID of what it is a snapshot of; zeros when it is none.
    pub parent_uuid: [u8; 16],
}

#[repr(C)]
struct Timespec {
    seconds: u64,
    nanoseconds: u32,
    pad: u32,
}

#[repr(C)]
struct GetSubvolInfo {
    id: u64,
    name: [u8; 256],
    parent_id: u64,
    dir_id: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    transactions: [u64; 4],
    times: [Timespec; 4],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<GetSubvolInfo>() == 504);
const BTRFS_IOC_GET_SUBVOL_INFO: u64 = ioc::ior::<GetSubvolInfo>(0x94, 60);
const _: () = assert!(BTRFS_IOC_GET_SUBVOL_INFO == 0x81f8_943c);

/// Which subvolume the open file or directory is in (Linux 4.18).
///
/// # Errors
/// `ENOTTY` elsewhere than on btrfs.
pub fn subvolume_info(fd: BorrowedFd<'_>) -> io::Result<SubvolumeInfo> {
    const NONE: Timespec = Timespec { seconds: 0, nanoseconds: 0, pad: 0 };
    let mut answer = GetSubvolInfo {
        id: 0,
        name: [0; 256],
        parent_id: 0,
        dir_id: 0,
        generation: 0,
        flags: 0,
        uuid: [0; 16],
        parent_uuid: [0; 16],
        received_uuid: [0; 16],
        transactions: [0; 4],
        times: [NONE; 4],
        reserved: [0; 8],
    };
    // SAFETY: `_IOR` of exactly `GetSubvolInfo`: the kernel writes 504 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, BTRFS_IOC_GET_SUBVOL_INFO, &mut answer) }?;
    Ok(SubvolumeInfo { id: answer.id, uuid: answer.uuid, parent_uuid: answer.parent_uuid })
}
