//! A layer on disk held against its list.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Plan, Visit, stored, walk};
use crate::sealed::inode::{join, names};
use crate::sealed::tree::{EntryId, Inode, InodeIndex, Meta, Node, Xattr};
use crate::sealed::xattrs::XattrBuffer;

const MISSING: &str = "is missing";
const KIND: &str = "is not what was made";
const META: &str = "has another owner, mode, size or time";
const LINKS: &str = "has other hard links";
const XATTRS: &str = "has other extended attributes";
const MORE: &str = "does not belong there";

/// The first thing in `top` that is not as `plan` says: its path below `top`, and how it differs.
pub(super) fn check(top: BorrowedFd<'_>, plan: &Plan<'_>) -> io::Result<Option<(PathBuf, &'static str)>> {
    let mut checker = Checker { plan, looker: Looker::default(), found: None };
    match walk(top, plan, &mut checker) {
        Ok(()) => Ok(None),
        Err(error) => checker.found.map_or(Err(error), |found| Ok(Some(found))),
    }
}

struct Checker<'a> {
    plan: &'a Plan<'a>,
    looker: Looker,
    found: Option<(PathBuf, &'static str)>,
}

impl Checker<'_> {
    /// Ends the walk.
    fn wrong(&mut self, dir: EntryId, name: &[u8], what: &'static str) -> io::Error {
        let path = match (self.plan.tree.path(dir), name) {
            (dir, b"") => dir,
            (dir, name) => join(&dir, name),
        };
        self.found = Some((Path::new(OsStr::from_bytes(&path)).to_owned(), what));
        io::Error::other(what)
    }
}

impl Visit for Checker<'_> {
    fn inside(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        let plan = self.plan;
        let children = plan.children(dir);
        let there = names(at)?;
        for entry in children.iter().copied() {
            if let Some(what) = self.looker.look(at, entry, plan)? {
                return Err(self.wrong(dir, plan.name(entry), what));
            }
        }
        // All that should be there is.
        if there.len() > children.len() {
            let known = |name: &[u8]| children.binary_search_by(|child| plan.name(*child).cmp(name)).is_ok();
            let more = there.iter().find(|name| !known(name)).cloned().unwrap_or_default();
            return Err(self.wrong(dir, &more, MORE));
        }
        Ok(())
    }

    /// After what is in it: a name that goes or comes moves its directory's time too, and what is told first is the name.
    fn leave(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        if dir.0 == 0 {
            return Ok(());
        }
        match self.looker.look_at_dir(at, self.plan.tree.inode(dir))? {
            Some(what) => Err(self.wrong(dir, b"", what)),
            None => Ok(()),
        }
    }
}

pub(super) fn is_whiteout(inode: &Inode) -> bool {
    inode.node == Node::CharDevice(0)
}

/// Compares inodes.
#[derive(Default)]
pub(super) struct Looker {
    buffer: XattrBuffer,
    /// Inode numbers of hard links.
    linked: HashMap<InodeIndex, u64>,
}

impl Looker {
    /// How what is at `entry`'s name in the directory `at` differs; `None`: it does not. Of a directory only that it is one
    /// ([`Self::look_at_dir`]).
    pub(super) fn look(
        &mut self,
        at: BorrowedFd<'_>,
        entry: EntryId,
        plan: &Plan<'_>,
    ) -> io::Result<Option<&'static str>> {
        let (name, inode) = (plan.name(entry), plan.tree.inode(entry));
        let stat = match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Some(MISSING)),
            Err(e) => return Err(e.into()),
        };
        if !is_kind(&stat, &inode.node) {
            return Ok(Some(KIND));
        }
        if is_whiteout(inode) || inode.node == Node::Dir {
            return Ok(None);
        }
        if !is_dressed(&stat, inode) {
            return Ok(Some(META));
        }
        let index = plan.tree.entries[entry.0 as usize].inode;
        let first = *self.linked.entry(index).or_insert(stat.st_ino);
        if first != stat.st_ino || stat.st_nlink != u64::from(plan.names(entry)) {
            return Ok(Some(LINKS));
        }
        if let Node::Symlink(target) = &inode.node
            && rustix::fs::readlinkat(at, name, Vec::new())?.as_bytes() != &**target
        {
            return Ok(Some(KIND));
        }
        let same = has_attributes(&self.attributes(at, name, &inode.node)?, &stored(inode));
        Ok((!same).then_some(XATTRS))
    }

    /// How the open directory `at` itself differs.
    fn look_at_dir(&mut self, at: BorrowedFd<'_>, inode: &Inode) -> io::Result<Option<&'static str>> {
        if !is_dressed(&rustix::fs::fstat(at)?, inode) {
            return Ok(Some(META));
        }
        let same = has_attributes(&self.buffer.of_open(at)?, &stored(inode));
        Ok((!same).then_some(XATTRS))
    }

    fn attributes(&mut self, at: BorrowedFd<'_>, name: &[u8], node: &Node) -> io::Result<Vec<Xattr>> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if !matches!(node, Node::File { .. }) {
            let held = rustix::fs::openat(at, name, flags | OFlags::PATH, Mode::empty())?;
            return self.buffer.of_path_fd(held.as_fd());
        }
        let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
        let open = rustix::fs::openat(at, name, flags, Mode::empty())?;
        self.buffer.of_open(open.as_fd())
    }
}

fn is_kind(stat: &Stat, node: &Node) -> bool {
    let kind = FileType::from_raw_mode(stat.st_mode);
    match node {
        Node::Dir => kind == FileType::Directory,
        Node::File { .. } => kind == FileType::RegularFile,
        Node::Symlink(_) => kind == FileType::Symlink,
        Node::Fifo => kind == FileType::Fifo,
        Node::Socket => kind == FileType::Socket,
        Node::CharDevice(rdev) => kind == FileType::CharacterDevice && stat.st_rdev == *rdev,
        Node::BlockDevice(rdev) => kind == FileType::BlockDevice && stat.st_rdev == *rdev,
    }
}

fn is_dressed(stat: &Stat, inode: &Inode) -> bool {
    let meta = &inode.meta;
    let size = match &inode.node {
        Node::File { size, .. } => *size == stat.st_size.cast_unsigned(),
        _ => true,
    };
    // Of a symbolic link the mode can't be set, and nobody asks for it.
    let mode = matches!(inode.node, Node::Symlink(_)) || stat.st_mode & 0o7777 == meta.mode;
    let mtime = (stat.st_mtime, stat.st_mtime_nsec) == (meta.mtime.0, u64::from(meta.mtime.1));
    size && mode && mtime && (stat.st_uid, stat.st_gid) == (meta.uid, meta.gid)
}

/// Labels of a security module come by themselves and can't be taken away.
fn has_attributes(found: &[Xattr], wanted: &Meta) -> bool {
    let is_label = |name: &[u8]| name.starts_with(b"security.") && name != b"security.capability";
    let mut wanted = wanted.xattrs.iter();
    let mut next = wanted.next();
    for (name, value) in found {
        match next {
            Some((n, v)) if n == name => {
                if v != value {
                    return false;
                }
                next = wanted.next();
            }
            _ if is_label(name) => {}
            _ => return false,
        }
    }
    next.is_none()
}
