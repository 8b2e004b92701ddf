//! A layer on disk, made anew or put right.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::check::{Looker, is_whiteout};
use super::{DIFF, DIR_FLAGS, DiffError, LINKS, Plan, Visit, stored, walk};
use crate::scan::Progress;
use crate::sealed::commit::place;
use crate::sealed::inode::{Held, apply_open, names};
use crate::sealed::tree::{EntryId, Inode, InodeIndex, Node};

/// Makes all of `plan` in `root_dir`.
pub(super) fn make(root_dir: &Path, plan: &Plan<'_>, progress: &Progress) -> Result<(), DiffError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| DiffError { path, error }
    };
    let (top_path, links_path) = (root_dir.join(DIFF), root_dir.join(LINKS));
    let top = fresh_dir(&top_path).map_err(failed(&top_path))?;
    let links = fresh_dir(&links_path).map_err(failed(&links_path))?;
    let mut maker = Maker { plan, links, linked: HashMap::new(), at: None, progress };
    let done = walk(top.as_fd(), plan, &mut maker);
    done.map_err(|error| DiffError { path: top_path.join(maker.path()), error })?;
    maker.drop_links().map_err(failed(&links_path))?;
    std::fs::remove_dir(&links_path).map_err(failed(&links_path))
}

fn fresh_dir(path: &Path) -> io::Result<OwnedFd> {
    rustix::fs::mkdir(path, Mode::RWXU)?;
    Ok(rustix::fs::open(path, DIR_FLAGS, Mode::empty())?)
}

struct Maker<'a> {
    plan: &'a Plan<'a>,
    links: OwnedFd,
    /// Names in `links` of inodes that have several.
    linked: HashMap<InodeIndex, String>,
    /// What is being made.
    at: Option<EntryId>,
    progress: &'a Progress,
}

impl Maker<'_> {
    fn path(&self) -> PathBuf {
        let path = self.at.map(|entry| self.plan.tree.path(entry)).unwrap_or_default();
        Path::new(OsStr::from_bytes(&path)).to_owned()
    }

    fn link(&mut self, at: BorrowedFd<'_>, entry: EntryId) -> io::Result<()> {
        let index = self.plan.tree.entries[entry.0 as usize].inode;
        let first = match self.linked.get(&index) {
            Some(first) => first,
            None => {
                let first = index.0.to_string();
                make_one(self.links.as_fd(), first.as_bytes(), self.plan.tree.inode(entry))?;
                self.linked.entry(index).or_insert(first)
            }
        };
        Ok(rustix::fs::linkat(&self.links, first, at, self.plan.name(entry), AtFlags::empty())?)
    }

    fn drop_links(&self) -> io::Result<()> {
        let unlink = |name: &String| rustix::fs::unlinkat(&self.links, name, AtFlags::empty());
        Ok(self.linked.values().try_for_each(unlink)?)
    }
}

impl Visit for Maker<'_> {
    fn inside(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        for entry in self.plan.children(dir).iter().copied() {
            if self.progress.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.at = Some(entry);
            self.progress.did_step();
            if self.plan.is_dir(entry) {
                let mode = self.plan.tree.inode(entry).meta.mode;
                rustix::fs::mkdirat(at, self.plan.name(entry), first_mode(mode) | Mode::RWXU)?;
            } else if self.plan.names(entry) > 1 {
                self.link(at, entry)?;
            } else {
                make_one(at, self.plan.name(entry), self.plan.tree.inode(entry))?;
            }
        }
        Ok(())
    }

    fn leave(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        self.at = Some(dir);
        dress_dir(at, dir, self.plan)
    }
}

/// What a new inode may be made with, so that nothing is left to change: the layer is in the store, which nobody else may enter. What
/// a change of owner would take away comes after it.
fn first_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

/// Makes an inode that is no directory, complete.
fn make_one(at: BorrowedFd<'_>, name: &[u8], inode: &Inode) -> io::Result<()> {
    let Node::File { size, .. } = &inode.node else {
        let (held, _) = place::make(at, name, &inode.node)?;
        return held.apply(&stored(inode));
    };
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(at, name, flags, first_mode(inode.meta.mode))?;
    if *size > 0 {
        // Before the rest: it moves the times and clears setuid.
        rustix::fs::ftruncate(&file, *size)?;
    }
    apply_open(file.as_fd(), &stored(inode))
}

/// Gives the directory `at` its metadata. Nothing shows the top directory itself.
fn dress_dir(at: BorrowedFd<'_>, dir: EntryId, plan: &Plan<'_>) -> io::Result<()> {
    if dir.0 == 0 {
        return Ok(());
    }
    apply_open(at, &stored(plan.tree.inode(dir)))
}

/// Puts right what it may; an error at the first thing that must stay.
pub(super) fn heal(root_dir: &Path, plan: &Plan<'_>) -> io::Result<()> {
    let top = rustix::fs::open(root_dir.join(DIFF), DIR_FLAGS, Mode::empty())?;
    walk(top.as_fd(), plan, &mut Healer { plan, looker: Looker::default() })
}

struct Healer<'a> {
    plan: &'a Plan<'a>,
    looker: Looker,
}

impl Visit for Healer<'_> {
    fn inside(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        let children = self.plan.children(dir);
        for name in names(at)? {
            if children.binary_search_by(|child| self.plan.name(*child).cmp(&name)).is_err() {
                remove(at, &name)?;
            }
        }
        for entry in children.iter().copied() {
            let (name, inode) = (self.plan.name(entry), self.plan.tree.inode(entry));
            if self.looker.look(at, entry, self.plan)?.is_none() {
                continue;
            }
            if self.plan.is_dir(entry) {
                // Its metadata comes with leaving it.
                let there = Held::open(at, name)?;
                if !there.as_ref().is_some_and(|held| held.look.is_dir()) {
                    there.map_or(Ok(()), |_| remove(at, name))?;
                    rustix::fs::mkdirat(at, name, Mode::RWXU)?;
                }
            } else if self.plan.names(entry) > 1 && !is_whiteout(inode) {
                return Err(io::Error::other("an inode of several names"));
            } else {
                Held::open(at, name)?.map_or(Ok(()), |_| remove(at, name))?;
                make_one(at, name, inode)?;
            }
        }
        Ok(())
    }

    fn leave(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()> {
        dress_dir(at, dir, self.plan)
    }
}

/// A directory with something in it stays, with an error: that is more than damage.
fn remove(at: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => Ok(rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?),
        other => Ok(other?),
    }
}
