//! Extended attributes of anything, read whole.
//!
//! Invariant: the result is ascending by name, each name once; an attribute that goes away while we look is not in it.
//! `btrfs.*` (properties such as `btrfs.compression`) is left out: it says how the raw file is stored, not what it is, and no
//! image can hold it. What it deliberately does not do: judge names; the image writer refuses what it can't hold.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{fgetxattr, flistxattr, getxattr, listxattr};
use rustix::io::Errno;

use super::tree::Xattr;

/// The most bytes of a list of names and of a value that the kernel gives (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const KERNEL_MAX: usize = 65536;

/// Capabilities of a program.
const CAPABILITY: &[u8] = b"security.capability";

/// Bytes that a list of names or a value is tried with first.
const SHORT_LIST: usize = 512;

/// Room for one answer of the kernel.
#[derive(Debug)]
pub(crate) struct XattrBuffer {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Default for XattrBuffer {
    fn default() -> Self {
        XattrBuffer { names: vec![0; KERNEL_MAX], value: vec![0; KERNEL_MAX] }
    }
}

/// What is asked.
#[derive(Clone, Copy)]
enum Of<'a> {
    Open(BorrowedFd<'a>),
    /// `/proc/self/fd/<n>`: attributes of what an `O_PATH` descriptor names, symbolic links included.
    Path(&'a str),
}

impl XattrBuffer {
    /// Attributes of a file or directory that is open for reading.
    ///
    /// # Errors
    /// As `flistxattr(2)`, `fgetxattr(2)`.
    pub fn of_open(&mut self, fd: BorrowedFd<'_>) -> io::Result<Vec<Xattr>> {
        self.read(Of::Open(fd))
    }

    /// Attributes of what an `O_PATH` descriptor names.
    ///
    /// # Errors
    /// As `listxattr(2)`, `getxattr(2)`; without `/proc` `ENOENT`.
    pub fn of_path_fd(&mut self, fd: BorrowedFd<'_>) -> io::Result<Vec<Xattr>> {
        self.read(Of::Path(&format!("/proc/self/fd/{}", fd.as_raw_fd())))
    }

    fn read(&mut self, of: Of<'_>) -> io::Result<Vec<Xattr>> {
        let list = |room: &mut [u8]| match of {
            Of::Open(fd) => flistxattr(fd, room),
            Of::Path(path) => listxattr(path, room),
        };
        // The kernel allocates as much as it is offered: nearly all lists are empty or short.
        let listed = match list(&mut self.names[..SHORT_LIST]) {
            Err(Errno::RANGE) => list(&mut self.names[..]),
            other => other,
        };
        let length = match listed {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => 0,
            Err(e) => return Err(e.into()),
        };
        let mut found: Vec<Xattr> = Vec::new();
        for name in self.names[..length].split_inclusive(|b| *b == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            if name.to_bytes().starts_with(b"btrfs.") {
                continue;
            }
            let get = |room: &mut [u8]| match of {
                Of::Open(fd) => fgetxattr(fd, name, room),
                Of::Path(path) => getxattr(path, name, room),
            };
            let got = match get(&mut self.value[..SHORT_LIST]) {
                Err(Errno::RANGE) => get(&mut self.value[..]),
                other => other,
            };
            match got {
                Ok(length) => found.push((name.to_bytes().into(), self.value[..length].into())),
                // Removed since it was listed.
                Err(Errno::NODATA) => {}
                // Capabilities that are none, of no bytes or damaged: the kernel reads them to nobody and starts no such program. Empty
                // ones do the same in a view.
                Err(Errno::INVAL) if name.to_bytes() == CAPABILITY => {
                    found.push((CAPABILITY.into(), Box::default()));
                }
                Err(errno) => return Err(unreadable(name, errno)),
            }
        }
        found.retain(|(name, value)| !is_empty_acl(name, value));
        found.sort_unstable();
        found.dedup_by(|a, b| a.0 == b.0);
        Ok(found)
    }
}

/// An ACL of no entries is none, and nobody can set one: it only looks different.
pub(crate) fn is_empty_acl(name: &[u8], value: &[u8]) -> bool {
    /// Its header, a version.
    const HEADER: usize = 4;
    value.len() <= HEADER && name.starts_with(b"system.posix_acl_")
}

/// Says which attribute, and what to do: others may be fine.
fn unreadable(name: &CStr, errno: Errno) -> io::Error {
    let advice = match errno {
        Errno::INVAL | Errno::UCLEAN => {
            "; it is damaged: set it anew, remove it (setfattr -x) or repair the file system"
        }
        _ => "",
    };
    let source = io::Error::from(errno);
    io::Error::new(source.kind(), format!("the attribute {}: {source}{advice}", name.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{OFlags, XattrFlags, fsetxattr};
    use std::os::fd::AsFd;

    #[test]
    fn attributes_come_sorted_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = std::fs::File::create(&path).unwrap();
        for (name, value) in [("user.b", &b""[..]), ("user.a", &[7; 300])] {
            fsetxattr(&file, name, value, XattrFlags::empty()).unwrap();
        }
        let mut buffer = XattrBuffer::default();
        let found = buffer.of_open(file.as_fd()).unwrap();
        let ours: Vec<_> = found.iter().filter(|(name, _)| name.starts_with(b"user.")).collect();
        assert_eq!(ours.len(), 2);
        assert_eq!((&ours[0].0[..], &ours[0].1[..]), (&b"user.a"[..], &[7; 300][..]));
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let by_path = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(buffer.of_path_fd(by_path.as_fd()).unwrap(), found);
    }
}
