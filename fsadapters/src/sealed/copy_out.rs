//! Materialises a view's present state elsewhere on its file system: for backups and for `btrfs send`.
//!
//! A snapshot of a raw root misses what a live view wrote, and one of an upper is no tree that anybody else can read. Here every file
//! shares its blocks with the upper or an anchor, so the copy costs metadata only.
//!
//! Invariant: only the new directory is written. The state of a view that is in use is that of no single moment: each file is
//! whole, as a copy made by `cp -a` would be. What it deliberately does not do: update an earlier copy.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::commit::Anchors;
use super::commit::bytes::Sources;
use super::commit::error::{CommitError, at_path, is_fatal};
use super::commit::inode::{Below, Held, split};
use super::commit::place::{Keep, build_at};
use super::commit::state::{self, Children, State, shown_path};
use super::tree::Tree;
use crate::scan::Progress;

/// Looks at a live view before it is given up: each finds the upper changed under its eyes.
const LOOKS: u32 = 4;

/// What is copied out.
pub struct Subject<'a> {
    /// The root of the view.
    pub view: &'a Below,
    /// Its upper directory.
    pub upper: &'a Below,
    /// The index in its work directory, if there is one.
    pub index: Option<&'a Below>,
    /// The root as it was sealed.
    pub sealed: &'a Tree,
    /// Where sealed bytes are.
    pub anchors: &'a dyn Anchors,
    /// Somebody may write it meanwhile.
    pub live: bool,
}

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copied {
    /// Inodes that are not directories.
    pub files: u64,
    /// Further names of them.
    pub links: u64,
    /// Directories.
    pub dirs: u64,
    /// Bytes that share blocks with upper or anchors.
    pub shared_bytes: u64,
    /// Bytes copied because they could not be shared.
    pub copied_bytes: u64,
    /// Paths that are missing in the copy, and why.
    pub errors: Vec<(PathBuf, String)>,
}

/// Copies a view's state into the empty directory `dest`. On success everything is on disk.
///
/// # Errors
/// [`CommitError`] when it ended early: then `dest` holds a part. Paths that could not be copied are in the report.
pub fn copy_out(subject: &Subject<'_>, dest: &Below, progress: &Progress) -> Result<Copied, CommitError> {
    if !super::commit::inode::names(dest.as_fd()).map_err(|e| at_path("list", b"", e))?.is_empty() {
        return Err(CommitError::Refused("the directory to export to is not empty".into()));
    }
    let children = Children::of(subject.sealed);
    let mut looks = 0;
    let state = loop {
        looks += 1;
        match state::read(subject.view, subject.upper, subject.index, &children, progress) {
            Err(CommitError::Io { .. }) if subject.live && looks < LOOKS => {}
            other => break other?,
        }
    };
    let sources = Sources { upper: subject.upper, index: subject.index, anchors: subject.anchors };
    let mut copier = Copier { state: &state, sources: &sources, dest, done: Copied::default() };
    let dirs = state.entries.iter().filter(|shown| state.inodes[shown.inode].kind.is_dir()).count();
    progress.expect_steps(state.entries.len() - 1 + dirs);
    for entry in 1..state.entries.len() {
        if progress.is_cancelled() {
            return Err(CommitError::Cancelled);
        }
        let path = state.path(entry);
        let result = copier.copy(entry, &path);
        copier.note(&path, result)?;
        progress.did_step();
        crate::store::step("export.entry");
    }
    for entry in (0..state.entries.len()).rev() {
        if state.inode(entry).kind.is_dir() {
            let path = state.path(entry);
            let result = copier.finish_dir(entry, &path);
            copier.note(&path, result)?;
            progress.did_step();
        }
    }
    rustix::fs::syncfs(dest.as_fd()).map_err(|e| at_path("sync", b"", e.into()))?;
    Ok(copier.done)
}

struct Copier<'a> {
    state: &'a State,
    sources: &'a Sources<'a>,
    dest: &'a Below,
    done: Copied,
}

impl Copier<'_> {
    fn copy(&mut self, entry: usize, path: &[u8]) -> io::Result<()> {
        let shown = self.state.inode(entry);
        let (dir_path, name) = split(path);
        let dir = self.dest.dir(dir_path)?;
        if shown.kind.is_dir() {
            rustix::fs::mkdirat(&dir, name, rustix::fs::Mode::RWXU)?;
            self.done.dirs += 1;
            return Ok(());
        }
        let first = shown.names[0];
        if first != entry {
            let first_path = self.state.path(first);
            let (from_dir, from) = split(&first_path);
            let linked = rustix::fs::linkat(self.dest.dir(from_dir)?, from, &dir, name, AtFlags::empty());
            match linked {
                Ok(()) => {
                    self.done.links += 1;
                    return Ok(());
                }
                // The first name could not be copied, or the file system takes no more links.
                Err(Errno::NOENT | Errno::MLINK) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let what = (&shown.meta, &shown.kind);
        let built = build_at(dir.as_fd(), name, what, self.sources, &Keep::NOTHING);
        if built.is_err() {
            let _ = rustix::fs::unlinkat(&dir, name, AtFlags::empty());
        }
        let built = built?;
        self.done.files += 1;
        self.done.shared_bytes += built.shared_bytes;
        self.done.copied_bytes += built.copied_bytes;
        Ok(())
    }

    fn finish_dir(&mut self, entry: usize, path: &[u8]) -> io::Result<()> {
        let (parent, name) = split(path);
        let held = Held::open(self.dest.dir(parent)?.as_fd(), name)?.ok_or(Errno::NOENT)?;
        held.apply(&self.state.inode(entry).meta)
    }

    fn note(&mut self, path: &[u8], result: io::Result<()>) -> Result<(), CommitError> {
        match result {
            Ok(()) => Ok(()),
            Err(e) if is_fatal(&e) => Err(at_path("export", path, e)),
            Err(e) => {
                self.done.errors.push((shown_path(path), e.to_string()));
                Ok(())
            }
        }
    }
}
