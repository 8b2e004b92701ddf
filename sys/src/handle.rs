//! File handles (`name_to_handle_at`): names of inodes that survive the path.
//!
//! Invariant: handles are asked for with `AT_HANDLE_FID` (Linux 6.5), so any user may ask; opening one needs a capability. What it
//! deliberately does not do: interpret handles.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::retry;

/// Bytes of the longest handle (`MAX_HANDLE_SZ`).
pub const HANDLE_BYTES_MAX: usize = 128;

#[repr(C)]
struct RawHandle {
    handle_bytes: u32,
    handle_type: i32,
    bytes: [u8; HANDLE_BYTES_MAX],
}

const _: () = assert!(size_of::<RawHandle>() == 8 + HANDLE_BYTES_MAX);
const AT_HANDLE_FID: libc::c_int = 0x200;

/// A handle, opaque but for its type number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileHandle {
    /// The file system's type number of the encoding (`FILEID_*`; overlayfs: 0xf8).
    pub kind: i32,
    /// The encoding.
    pub bytes: Vec<u8>,
    /// Id of the mount it was seen through, as in `/proc/self/mountinfo`.
    pub mount: i32,
}

/// The handle of `name` in `dir`; an empty `name` means `dir` itself, whatever kind of file it is. Symbolic links are not followed.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no handles (and no `AT_HANDLE_FID`), `EINVAL` before 6.5, `EOVERFLOW` for an
/// overlay file that has none.
pub fn name_to_handle(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<FileHandle> {
    let mut handle =
        RawHandle { handle_bytes: HANDLE_BYTES_MAX as u32, handle_type: 0, bytes: [0; HANDLE_BYTES_MAX] };
    let mut mount: libc::c_int = 0;
    let flags = AT_HANDLE_FID | if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    let (handle_ptr, mount_ptr): (*mut RawHandle, *mut libc::c_int) = (&mut handle, &mut mount);
    retry(|| {
        // SAFETY: `name` is NUL-terminated; `handle` is a header and as many bytes as `handle_bytes` says, which bounds
        // what the kernel writes; `mount` is one int. All outlive the call.
        unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                dir.as_raw_fd(),
                name.as_ptr(),
                handle_ptr,
                mount_ptr,
                flags,
            )
        }
    })?;
    let length = (handle.handle_bytes as usize).min(HANDLE_BYTES_MAX);
    Ok(FileHandle { kind: handle.handle_type, bytes: handle.bytes[..length].to_vec(), mount })
}

/// Opens the inode that `handle` names in the file system of `mount` (any directory or file of it).
///
/// # Errors
/// `EPERM` without `CAP_DAC_READ_SEARCH`, `ESTALE` when the inode is gone, and as `open(2)`.
pub fn open_by_handle(
    mount: BorrowedFd<'_>,
    kind: i32,
    bytes: &[u8],
    flags: rustix::fs::OFlags,
) -> io::Result<OwnedFd> {
    if bytes.len() > HANDLE_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut handle =
        RawHandle { handle_bytes: bytes.len() as u32, handle_type: kind, bytes: [0; HANDLE_BYTES_MAX] };
    handle.bytes[..bytes.len()].copy_from_slice(bytes);
    let pointer: *const RawHandle = &handle;
    let flags = (flags | rustix::fs::OFlags::CLOEXEC).bits();
    let fd = retry(|| {
        // SAFETY: `handle` is a live header with `handle_bytes` bytes behind it, which is all that the kernel reads.
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), pointer, flags) }
    })?;
    // SAFETY: the call has just returned this descriptor; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
