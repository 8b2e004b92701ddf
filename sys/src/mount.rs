//! What `rustix` lacks of the mount interface: `mount_setattr(2)`.
//!
//! What it deliberately does not do: decide which mount gets which attribute.

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

/// Attributes of a mount ([`set_attributes`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes(u64);

impl Attributes {
    /// `MOUNT_ATTR_RDONLY`.
    pub const READ_ONLY: Attributes = Attributes(0x1);
    /// `MOUNT_ATTR_NOSUID`.
    pub const NOSUID: Attributes = Attributes(0x2);
    /// `MOUNT_ATTR_NODEV`.
    pub const NODEV: Attributes = Attributes(0x4);
    /// `MOUNT_ATTR_NOEXEC`.
    pub const NOEXEC: Attributes = Attributes(0x8);
    /// `MOUNT_ATTR_NOSYMFOLLOW` (Linux 5.14).
    pub const NOSYMFOLLOW: Attributes = Attributes(0x20_0000);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Attributes) -> Attributes {
        Attributes(self.0 | other.0)
    }
}

/// Adds attributes to the mount that `mount` is the root of (Linux 5.12).
///
/// # Errors
/// `ENOSYS` before 5.12, `EPERM`, `EINVAL` when `mount` is no mount's root, `EBUSY` for read-only with writers.
pub fn set_attributes(mount: BorrowedFd<'_>, add: Attributes) -> io::Result<()> {
    set(mount, &MountAttr { set: add.0, clear: 0, propagation: 0, userns: 0 })
}

/// Makes the mount that `mount` is the root of show its owners through the map of the user namespace `userns` (Linux 5.12; btrfs
/// 5.15, overlayfs layers 5.19, EROFS 5.19). It must be detached and unmapped.
///
/// # Errors
/// `EINVAL` where the file system can't be mapped, `EPERM`, `ENOSYS`.
pub fn set_id_map(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let userns = userns.as_raw_fd().unsigned_abs().into();
    set(mount, &MountAttr { set: IDMAP, clear: 0, propagation: 0, userns })
}

fn set(mount: BorrowedFd<'_>, attributes: &MountAttr) -> io::Result<()> {
    let pointer: *const MountAttr = attributes;
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
