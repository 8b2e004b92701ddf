//! What `rustix` lacks of the mount interface: `mount_setattr(2)`, for id-mapped mounts.
//!
//! What it deliberately does not do: decide which mount gets which map.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::retry;

/// `struct mount_attr`, version 0.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

const _: () = assert!(size_of::<MountAttr>() == 32);

/// `MOUNT_ATTR_IDMAP` (Linux 5.12).
const IDMAP: u64 = 0x0010_0000;

/// Makes the mount that `mount` is the root of show its owners through the map of the user namespace `userns` (Linux 5.12; btrfs
/// 5.15, overlayfs layers 5.19, EROFS 5.19). It must be detached and unmapped.
///
/// # Errors
/// `EINVAL` where the file system can't be mapped, `EPERM`, `ENOSYS`.
pub fn set_id_map(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let userns = userns.as_raw_fd().unsigned_abs().into();
    let attributes = MountAttr { set: IDMAP, clear: 0, propagation: 0, userns };
    let pointer: *const MountAttr = &raw const attributes;
    retry(|| {
        // SAFETY: `pointer` is to a live structure of the 32 bytes that are passed as its size, the path is a static C string,
        // the descriptor is borrowed; the kernel only reads.
        unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                pointer,
                size_of::<MountAttr>(),
            )
        }
    })
    .map(drop)
}
