//! One inode: reading what it is, making another the same.
//!
//! Everything goes through a descriptor of the inode itself (`O_PATH`, and `/proc/self/fd/N` for calls that know only
//! paths), so that a name that is swapped meanwhile can't lead a call to another inode. What it deliberately does not do:
//! follow a symbolic link; touch file data.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::sealed::tree::{Meta, Node, Xattr};
use crate::sealed::xattrs::is_empty_acl;

/// What `statx` tells of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Look {
    /// Device (`st_dev`).
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Link count.
    pub links: u32,
    /// Bytes.
    pub size: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: (i64, u32),
    /// Change time.
    pub ctime: (i64, u32),
    /// Device number of a device node.
    pub rdev: u64,
}

const TYPE: u32 = 0o170_000;
const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
/// Capabilities of a program.
const CAPABILITY: &[u8] = b"security.capability";

impl Look {
    /// Of an open file (also `O_PATH`).
    pub fn of(fd: impl AsFd) -> io::Result<Look> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
        let s = rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS)?;
        Ok(Look {
            dev: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor),
            ino: s.stx_ino,
            links: s.stx_nlink,
            size: s.stx_size,
            mode: u32::from(s.stx_mode),
            uid: s.stx_uid,
            gid: s.stx_gid,
            mtime: (s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
            ctime: (s.stx_ctime.tv_sec, s.stx_ctime.tv_nsec),
            rdev: rustix::fs::makedev(s.stx_rdev_major, s.stx_rdev_minor),
        })
    }

    /// A directory.
    pub fn is_dir(&self) -> bool {
        self.mode & TYPE == DIR
    }

    /// A regular file.
    pub fn is_file(&self) -> bool {
        self.mode & TYPE == FILE
    }

    /// Whether both are looks of one inode that nobody wrote between, as far as can be told when the change time moves for
    /// reasons of our own (a rename or an unlinked name moves it).
    pub fn is_still(&self, other: &Look) -> bool {
        // Not the device: on btrfs it changes with a reboot, and looks outlive that in a journal.
        let key = |l: &Look| (l.ino, l.size, l.mode, l.uid, l.gid, l.mtime);
        key(self) == key(other)
    }
}

/// An inode opened with `O_PATH`.
#[derive(Debug)]
pub struct Held {
    fd: OwnedFd,
    /// How it looked when it was opened.
    pub look: Look,
}

impl Held {
    /// Takes hold of `name` in `dir` (`.` for `dir` itself); `None` if there is no such name.
    pub fn open(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Held>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Held { look: Look::of(&fd)?, fd })),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// A path that leads to this very inode.
    fn path(&self) -> String {
        proc_path(self.fd.as_fd())
    }

    /// All extended attributes, ascending.
    pub fn xattrs(&self) -> io::Result<Vec<Xattr>> {
        let path = self.path();
        let mut xattrs = Vec::new();
        for name in list(&path)? {
            if let Some(value) = get_xattr(&path, &name)?.filter(|value| !is_empty_acl(&name, value)) {
                xattrs.push((name, value));
            }
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }

    /// One extended attribute.
    pub fn xattr(&self, name: &[u8]) -> io::Result<Option<Box<[u8]>>> {
        get_xattr(&self.path(), name)
    }

    /// Metadata as a view shows it.
    pub fn meta(&self) -> io::Result<Meta> {
        let look = &self.look;
        let xattrs = self.xattrs()?;
        Ok(Meta { mode: look.mode & 0o7777, uid: look.uid, gid: look.gid, mtime: look.mtime, xattrs })
    }

    /// The kind; `None` for a regular file, whose bytes are not this module's matter.
    pub fn special(&self) -> io::Result<Option<Node>> {
        let rdev = self.look.rdev;
        Ok(Some(match self.look.mode & TYPE {
            DIR => Node::Dir,
            0o120_000 => {
                let target = rustix::fs::readlinkat(&self.fd, c"", Vec::new())?;
                Node::Symlink(target.into_bytes().into())
            }
            0o010_000 => Node::Fifo,
            0o140_000 => Node::Socket,
            0o020_000 => Node::CharDevice(rdev),
            0o060_000 => Node::BlockDevice(rdev),
            _ => return Ok(None),
        }))
    }

    /// The same inode opened for reading (regular files and directories; never waits, never changes the access time).
    pub fn open_file(&self, access: OFlags) -> io::Result<OwnedFd> {
        // Of a regular file only: a fifo would be opened and a device told.
        if !self.look.is_file() && !self.look.is_dir() {
            return Err(Errno::INVAL.into());
        }
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let open = |flags| rustix::fs::open(self.path(), flags, Mode::empty());
        Ok(open(flags | OFlags::NOATIME).or_else(|_| open(flags))?)
    }

    /// Gives it owner, permissions, attributes and modification time of `meta`; attributes that `meta` lacks go.
    pub fn apply(&self, meta: &Meta) -> io::Result<()> {
        dress(&Way::Path(self.fd.as_fd(), self.path()), meta)
    }

    /// Sets the modification time, leaves the access time alone.
    pub fn set_mtime(&self, mtime: (i64, u32)) -> io::Result<()> {
        // Through the magic link, without SYMLINK_NOFOLLOW: that leads to the inode itself, a symbolic link included.
        Ok(rustix::fs::utimensat(rustix::fs::CWD, self.path(), &only_mtime(mtime), AtFlags::empty())?)
    }
}

fn only_mtime(mtime: (i64, u32)) -> Timestamps {
    const OMIT: i64 = 0x3fff_fffe;
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: OMIT as _ },
        last_modification: Timespec { tv_sec: mtime.0, tv_nsec: mtime.1.into() },
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A path that leads to the inode of `fd`.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// [`Held::apply`] to a file or directory that is open, not only `O_PATH`: no path is walked for each call.
pub fn apply_open(file: BorrowedFd<'_>, meta: &Meta) -> io::Result<()> {
    dress(&Way::Open(file), meta)
}

/// What calls on an inode go through.
enum Way<'a> {
    /// A descriptor that is open for reading or writing.
    Open(BorrowedFd<'a>),
    /// An `O_PATH` descriptor and a path that leads to the same.
    Path(BorrowedFd<'a>, String),
}

impl Way<'_> {
    fn look(&self) -> io::Result<Look> {
        match self {
            Way::Open(fd) | Way::Path(fd, _) => Look::of(fd),
        }
    }

    fn chown(&self, uid: u32, gid: u32) -> rustix::io::Result<()> {
        let (Way::Open(fd) | Way::Path(fd, _)) = self;
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(fd, c"", owner.0, owner.1, AtFlags::EMPTY_PATH)
    }

    fn chmod(&self, mode: u32) -> rustix::io::Result<()> {
        let mode = Mode::from_raw_mode(mode);
        match self {
            Way::Open(fd) => rustix::fs::fchmod(fd, mode),
            Way::Path(_, path) => rustix::fs::chmod(&**path, mode),
        }
    }

    fn list(&self) -> io::Result<Vec<Box<[u8]>>> {
        match self {
            Way::Open(fd) => Ok(told(growing(|buffer| rustix::fs::flistxattr(fd, buffer))?)),
            Way::Path(_, path) => list(path),
        }
    }

    fn get(&self, name: &[u8]) -> io::Result<Option<Box<[u8]>>> {
        match self {
            Way::Open(fd) => readable(name, growing(|buffer| rustix::fs::fgetxattr(fd, name, buffer))),
            Way::Path(_, path) => get_xattr(path, name),
        }
    }

    fn set(&self, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
        match self {
            Way::Open(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Way::Path(_, path) => rustix::fs::setxattr(&**path, name, value, XattrFlags::empty()),
        }
    }

    fn remove(&self, name: &[u8]) -> io::Result<()> {
        let removed = match self {
            Way::Open(fd) => rustix::fs::fremovexattr(fd, name),
            Way::Path(_, path) => rustix::fs::removexattr(&**path, name),
        };
        match removed {
            // Labels of a security module can be replaced, not removed.
            Err(Errno::NODATA) => Ok(()),
            Err(_) if name.starts_with(b"security.") && name != CAPABILITY => Ok(()),
            result => Ok(result?),
        }
    }

    fn set_mtime(&self, mtime: (i64, u32)) -> rustix::io::Result<()> {
        match self {
            Way::Open(fd) => rustix::fs::futimens(fd, &only_mtime(mtime)),
            // As in [`Held::set_mtime`].
            Way::Path(_, path) => {
                rustix::fs::utimensat(rustix::fs::CWD, &**path, &only_mtime(mtime), AtFlags::empty())
            }
        }
    }
}

/// Makes the metadata of an inode `meta`; what is so already is left alone, for every change is a transaction of the file system.
///
/// The order matters: a change of owner clears setuid and drops `security.capability`, and the modification time comes
/// last. Attributes that were inherited from the directory (default ACLs, labels) are in nobody's `meta`.
fn dress(way: &Way<'_>, meta: &Meta) -> io::Result<()> {
    let mut look = way.look()?;
    if (look.uid, look.gid) != (meta.uid, meta.gid) {
        way.chown(meta.uid, meta.gid)?;
        look = way.look()?;
    }
    let is_link = look.mode & TYPE == 0o120_000;
    let there = way.list()?;
    for name in &there {
        if meta.xattrs.binary_search_by(|(n, _)| (**n).cmp(&name[..])).is_err() {
            way.remove(name)?;
        }
    }
    if !is_link && look.mode & 0o7777 != meta.mode {
        way.chmod(meta.mode)?;
    }
    for (name, value) in &meta.xattrs {
        let has = there.contains(name) && way.get(name)?.as_deref() == Some(value);
        if !has {
            way.set(name, value)?;
        }
    }
    // An ACL that was set has changed the group's bits, and is in agreement with the mode in whatever was once a file.
    let names = there.iter().chain(meta.xattrs.iter().map(|(name, _)| name));
    let has_acl = names.into_iter().any(|name| name.starts_with(b"system.posix_acl"));
    if !is_link && has_acl && way.look()?.mode & 0o7777 != meta.mode {
        way.chmod(meta.mode)?;
    }
    Ok(way.set_mtime(meta.mtime)?)
}

/// Names of extended attributes.
fn list(path: &str) -> io::Result<Vec<Box<[u8]>>> {
    Ok(told(growing(|buffer| rustix::fs::listxattr(path, buffer))?))
}

fn told(names: Option<Vec<u8>>) -> Vec<Box<[u8]>> {
    // `btrfs.*` says how a file is stored and not what it is: no tree has it.
    let is_told = |name: &&[u8]| !name.is_empty() && !name.starts_with(b"btrfs.");
    names.unwrap_or_default().split(|b| *b == 0).filter(is_told).map(Into::into).collect()
}

fn get_xattr(path: &str, name: &[u8]) -> io::Result<Option<Box<[u8]>>> {
    readable(name, growing(|buffer| rustix::fs::getxattr(path, name, buffer)))
}

/// What reading the attribute `name` gave.
fn readable(name: &[u8], read: io::Result<Option<Vec<u8>>>) -> io::Result<Option<Box<[u8]>>> {
    match read {
        // Empty or damaged ones, which the kernel reads to nobody: as in `xattrs`.
        Err(e) if name == CAPABILITY && Errno::from_io_error(&e) == Some(Errno::INVAL) => {
            Ok(Some(Box::default()))
        }
        other => Ok(other?.map(Into::into)),
    }
}

/// Calls with a buffer that grows until it is enough; no attribute is larger than 64 KiB, no list either. `None`: no such
/// attribute, or the file system has none.
fn growing(mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; 512];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(Some(buffer));
            }
            Err(Errno::RANGE) if buffer.len() < 1 << 17 => buffer.resize(buffer.len() * 16, 0),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Directories below one that never leave it.
#[derive(Debug)]
pub struct Below(OwnedFd);

impl Below {
    /// Below `dir`.
    pub fn new(dir: OwnedFd) -> Below {
        Below(dir)
    }

    /// [`dir_below`].
    pub fn dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        dir_below(self.0.as_fd(), path)
    }

    /// Takes hold of what is at `path`; `None` where it or a directory on the way is missing.
    pub fn held(&self, path: &[u8]) -> io::Result<Option<Held>> {
        let (parent, name) = split(path);
        match self.dir(parent) {
            Ok(dir) => Held::open(dir.as_fd(), name),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Opens the directory at `path` below `top` (no leading slash; empty for the top). Symbolic links and mounts are not crossed. A
/// path may be longer than the kernel takes at once.
pub fn dir_below(top: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    const AT_ONCE: usize = 3 << 10;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let open = |at: BorrowedFd<'_>, part: &[u8]| {
        rustix::io::retry_on_intr(|| rustix::fs::openat2(at, part, flags, Mode::empty(), resolve))
    };
    let mut rest = path;
    let mut at: Option<OwnedFd> = None;
    while rest.len() > AT_ONCE {
        let cut = rest[..AT_ONCE].iter().rposition(|b| *b == b'/').ok_or(Errno::NAMETOOLONG)?;
        let next = open(at.as_ref().map_or(top, AsFd::as_fd), &rest[..cut])?;
        at = Some(next);
        rest = &rest[cut + 1..];
    }
    let last: &[u8] = if rest.is_empty() { b"." } else { rest };
    Ok(open(at.as_ref().map_or(top, AsFd::as_fd), last)?)
}

impl AsFd for Below {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Directory and last name of a path; the top is `.` in itself.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None if path.is_empty() => (b"", b"."),
        None => (b"", path),
    }
}

/// `dir`/`name`.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, name].join(&b'/') }
}

/// Whether an error says that a directory on the way is not there or is none.
pub fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
    )
}

/// Names in a directory, ascending, without `.` and `..`.
pub fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<Box<[u8]>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.into());
        }
    }
    names.sort_unstable();
    Ok(names)
}
