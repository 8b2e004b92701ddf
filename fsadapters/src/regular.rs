//! Opens a regular file and never anything else.
//!
//! Whoever may write in a tree can put another thing under a name between the look at it and the open: a pipe, a device node, of
//! which some do something when they are only opened (a watchdog starts, a tape rewinds). So the inode is held with `O_PATH` first,
//! which opens nothing; what is held can't become anything else; and if it is a regular file it is opened through
//! `/proc/self/fd`.
//!
//! It costs as much as the open itself (3 us): the walks of `scan` and `seal`, where that would be a third of everything, only look just before
//! they open. What it deliberately does not do: resolve paths; the caller takes hold of the inode, by the rules that are right there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// A regular file, held with `O_PATH`.
#[derive(Debug)]
pub(crate) struct Regular {
    held: OwnedFd,
}

impl Regular {
    /// What the `O_PATH` descriptor holds, if it is a regular file.
    pub(crate) fn held(held: OwnedFd) -> Result<Option<Regular>, Errno> {
        let stat = rustix::io::retry_on_intr(|| rustix::fs::fstat(&held))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(regular.then_some(Regular { held }))
    }

    /// Opens it. `ENOSYS`: there is no `/proc` (never `ENOENT`, by which a file would seem to be gone). With `O_NONBLOCK` in `flags` `EAGAIN` means that somebody holds a lease on it and was told to give it up.
    pub(crate) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        reopen(self.held.as_fd(), flags | OFlags::CLOEXEC)
    }
}

/// `/proc/self/fd`, opened once: half of the way to a descriptor.
fn descriptors() -> Result<BorrowedFd<'static>, Errno> {
    static DIR: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(dir) = DIR.get() {
        return Ok(dir.as_fd());
    }
    // Of the process, not of this thread, which will end; threads share their descriptors.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open("/proc/self/fd", flags, Mode::empty()).map_err(|_| Errno::NOSYS)?;
    Ok(DIR.get_or_init(|| dir).as_fd())
}

fn reopen(held: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let name = rustix::path::DecInt::from_fd(held);
    let dir = descriptors()?;
    let flags = flags.difference(OFlags::NOFOLLOW);
    rustix::io::retry_on_intr(|| rustix::fs::openat(dir, name.as_c_str(), flags, Mode::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        std::os::unix::fs::symlink(&file, dir.path().join("link")).unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let held = |name: &str| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::open(dir.path().join(name), flags, Mode::empty()).unwrap();
            Regular::held(fd).unwrap()
        };
        for name in ["link", "fifo", "."] {
            assert!(held(name).is_none(), "{name}");
        }
        let held = held("file").unwrap();
        let number = rustix::fs::stat(&file).unwrap().st_ino;
        // Its name may go or become anything: the inode is opened.
        std::fs::rename(&fifo, &file).unwrap();
        let opened = held.open(OFlags::RDONLY | OFlags::NOFOLLOW).unwrap();
        assert_eq!(rustix::fs::fstat(&opened).unwrap().st_ino, number);
    }
}
