//! Making files below one directory, by path from it.
//!
//! Invariant: nothing outside the directory is ever touched: parents are opened beneath it without following
//! symbolic links, so a hostile archive (a link, then an entry "below" it) gets `ELOOP`, not somebody's `/etc`.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};

use super::FarmError;

/// Attributes that copies keep.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) owner: Option<(u32, u32)>,
    /// Modification time: seconds, nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(OsString, Vec<u8>)>,
}

/// A directory and the way to what is in it.
#[derive(Debug)]
pub(crate) struct Tree {
    path: PathBuf,
    root: OwnedFd,
    /// The parent used last: files come directory by directory.
    last: Option<(PathBuf, OwnedFd)>,
    privileged: bool,
}

impl Tree {
    pub(crate) fn open(path: &Path) -> Result<Tree, FarmError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|e| FarmError::io("open", path, e))?;
        Ok(Tree { path: path.to_owned(), root, last: None, privileged: rustix::process::geteuid().is_root() })
    }

    fn err(&self, what: &'static str, path: &Path, source: impl Into<io::Error>) -> FarmError {
        FarmError::io(what, &self.path.join(path), source)
    }

    fn beneath(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        if path.as_os_str().is_empty() {
            return rustix::io::fcntl_dupfd_cloexec(&self.root, 0);
        }
        let safe = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), safe)
    }

    fn parent<'a>(&mut self, path: &'a Path) -> Result<(BorrowedFd<'_>, &'a OsStr), FarmError> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = path.file_name().ok_or_else(|| self.err("name", path, rustix::io::Errno::INVAL))?;
        if self.last.as_ref().is_none_or(|(known, _)| known != parent) {
            let opened = self
                .beneath(parent, OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(|e| self.err("open directory", parent, e))?;
            self.last = Some((parent.to_owned(), opened));
        }
        let Some((_, dir)) = &self.last else { unreachable!("set above") };
        Ok((dir.as_fd(), name))
    }

    /// Opens a file; never follows a link.
    pub(crate) fn file(&mut self, path: &Path, flags: OFlags) -> Result<OwnedFd, FarmError> {
        let (dir, name) = self.parent(path)?;
        let opened = rustix::fs::openat(dir, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
        opened.map_err(|e| self.err("open", path, e))
    }

    /// A new file, open for writing, readable by nobody else until its attributes are set.
    pub(crate) fn create(&mut self, path: &Path) -> Result<OwnedFd, FarmError> {
        let (dir, name) = self.parent(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let made = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR);
        made.map_err(|e| self.err("create", path, e))
    }

    /// A new directory, open for its owner only until its attributes are set.
    pub(crate) fn mkdir(&mut self, path: &Path) -> Result<(), FarmError> {
        let (dir, name) = self.parent(path)?;
        rustix::fs::mkdirat(dir, name, Mode::RWXU).map_err(|e| self.err("create directory", path, e))
    }

    pub(crate) fn symlink(&mut self, path: &Path, target: &Path, meta: &Meta) -> Result<(), FarmError> {
        let (dir, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, dir, name).map_err(|e| self.err("create symbolic link", path, e))?;
        self.apply_at(path, meta, false)
    }

    /// A FIFO, socket or device.
    pub(crate) fn node(
        &mut self,
        path: &Path,
        kind: FileType,
        device: u64,
        meta: &Meta,
    ) -> Result<(), FarmError> {
        let (dir, name) = self.parent(path)?;
        let made = rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device);
        made.map_err(|e| self.err("create special file", path, e))?;
        self.apply_at(path, meta, true)
    }

    /// A further name for a file.
    pub(crate) fn link(&mut self, existing: &Path, path: &Path) -> Result<(), FarmError> {
        let from = self
            .beneath(existing.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)
            .map_err(|e| self.err("open directory of", existing, e))?;
        let from_name = existing.file_name().unwrap_or_default().to_owned();
        let (dir, name) = self.parent(path)?;
        let linked = rustix::fs::linkat(&from, &from_name, dir, name, AtFlags::empty());
        linked.map_err(|e| self.err("link", path, e))
    }

    pub(crate) fn unlink(&mut self, path: &Path) -> Result<(), FarmError> {
        let (dir, name) = self.parent(path)?;
        rustix::fs::unlinkat(dir, name, AtFlags::empty()).map_err(|e| self.err("remove", path, e))
    }

    /// Gives an open file its attributes.
    pub(crate) fn apply(&self, file: BorrowedFd<'_>, path: &Path, meta: &Meta) -> Result<(), FarmError> {
        if self.privileged
            && let Some((uid, gid)) = meta.owner
            && (uid, gid) != (0, 0)
        {
            rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(|e| self.err("set owner of", path, e))?;
        }
        // After the owner: chown clears the set-id bits.
        rustix::fs::fchmod(file, Mode::from_raw_mode(meta.mode & 0o7777))
            .map_err(|e| self.err("set mode of", path, e))?;
        for (name, value) in &meta.xattrs {
            let set = rustix::fs::fsetxattr(file, name.as_os_str(), value, XattrFlags::empty());
            // Namespaces that this user or this file system doesn't have are no reason to stop.
            if let Err(e) = set
                && !matches!(e, rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP)
            {
                return Err(self.err("set extended attribute of", path, e));
            }
        }
        rustix::fs::futimens(file, &times(meta)).map_err(|e| self.err("set time of", path, e))
    }

    /// Gives a directory its attributes; last, because filling it changes its time.
    pub(crate) fn apply_dir(&mut self, path: &Path, meta: &Meta) -> Result<(), FarmError> {
        let dir = self
            .beneath(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|e| self.err("open directory", path, e))?;
        self.apply(dir.as_fd(), path, meta)
    }

    fn apply_at(&mut self, path: &Path, meta: &Meta, mode: bool) -> Result<(), FarmError> {
        let privileged = self.privileged;
        let (dir, name) = self.parent(path)?;
        let result = (|| {
            if privileged && let Some((uid, gid)) = meta.owner {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(dir, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), flags)?;
            }
            if mode {
                rustix::fs::chmodat(dir, name, Mode::from_raw_mode(meta.mode & 0o7777), AtFlags::empty())?;
            }
            rustix::fs::utimensat(dir, name, &times(meta), AtFlags::SYMLINK_NOFOLLOW)
        })();
        result.map_err(|e| self.err("set attributes of", path, e))
    }
}

fn times(meta: &Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: meta.mtime.0, tv_nsec: meta.mtime.1.into() },
    }
}
