//! Materialises a view's present state elsewhere on its file system: for backups and for `btrfs send`.
//!
//! A snapshot of a raw root misses what a live view wrote, and one of an upper is no tree that anybody else can read. Here every file
//! shares its blocks with the upper or an anchor, so the copy costs metadata only.
//!
//! Invariant: only the new directory is written. The state of a view that is in use is that of no single moment: each file is
//! whole, as a copy made by `cp -a` would be. What it deliberately does not do: update an earlier copy.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::commit::Anchors;
use super::commit::bytes::{Bytes, Sources};
use super::commit::error::{CommitError, at_path, is_fatal};
use super::commit::place::{Built, Keep, build_from};
use super::commit::state::{self, Children, Kind, State, shown_path};
use super::inode::{Below, Held, Look, split};
use super::tree::{Meta, Tree};
use crate::scan::Progress;

/// Looks at a file of a view in use before it is given up: each finds it changed under its eyes.
const LOOKS: u32 = 16;

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
    if !super::inode::names(dest.as_fd()).map_err(|e| at_path("list", b"", e))?.is_empty() {
        return Err(CommitError::Refused("the directory to export to is not empty".into()));
    }
    let children = Children::of(subject.sealed);
    let how = (subject.live, progress);
    let state = state::read(subject.view, subject.upper, subject.index, &children, how)?;
    let sources = Sources { upper: subject.upper, index: subject.index, anchors: subject.anchors };
    let live = subject.live.then_some(subject.view);
    let mut copier = Copier { state: &state, sources: &sources, live, dest, done: Copied::default() };
    copier.done.errors.extend(state.missed.iter().map(|(path, why)| (shown_path(path), why.clone())));
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
    /// The view, if somebody may write it.
    live: Option<&'a Below>,
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
        let built = self.build(entry, dir.as_fd(), name)?;
        self.done.files += 1;
        self.done.shared_bytes += built.shared_bytes;
        self.done.copied_bytes += built.copied_bytes;
        Ok(())
    }

    /// Makes what is no directory. Attributes and bytes are of one inode, also where somebody puts another under its name: a program
    /// that is setuid must not get a stranger's bytes.
    fn build(&self, entry: usize, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Built> {
        let shown = self.state.inode(entry);
        let mut what: (Cow<'_, Meta>, Cow<'_, Kind>) =
            (Cow::Borrowed(&shown.meta), Cow::Borrowed(&shown.kind));
        let mut above = shown.above;
        let mut looks = 1;
        loop {
            let source = self.source(&what.1, above);
            let built = source.and_then(|source| {
                let source = source.as_ref().map(AsFd::as_fd);
                build_from(dir, name, (&what.0, &what.1), source, &Keep::NOTHING)
            });
            if built.is_err() {
                let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
            }
            match built {
                Err(e) if self.live.is_some() && looks < LOOKS && !is_fatal(&e) => {}
                other => return other,
            }
            looks += 1;
            if let Some((meta, kind, look)) = self.again(&shown.kind)? {
                (what, above) = ((Cow::Owned(meta), Cow::Owned(kind)), Some(look));
            }
        }
    }

    /// Opens where the bytes are; of a view in use only the inode that was looked at.
    fn source(&self, kind: &Kind, above: Option<Look>) -> io::Result<Option<OwnedFd>> {
        let Kind::File { size, bytes } = kind else { return Ok(None) };
        let file = self.sources.open(bytes, *size)?;
        if let (Some(_), Some(above), Some(file), Bytes::Upper(_) | Bytes::Index(_)) =
            (self.live, above, &file, bytes)
        {
            let now = Look::of(file)?;
            if (now.ino, now.ctime) != (above.ino, above.ctime) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it changed at every look"));
            }
        }
        Ok(file)
    }

    /// A file of the upper of a view in use as it is now. `None`: its bytes are not at a path of the upper.
    fn again(&self, kind: &Kind) -> io::Result<Option<(Meta, Kind, Look)>> {
        let (Some(view), Kind::File { bytes: Bytes::Upper(path), .. }) = (self.live, kind) else {
            return Ok(None);
        };
        let gone = || io::Error::from(Errno::NOENT);
        let above = self.sources.upper.held(path)?.ok_or_else(gone)?;
        let shown = view.held(path)?.ok_or_else(gone)?;
        let has_data = above.look.is_file() && above.xattr(b"trusted.overlay.metacopy")?.is_none();
        if !has_data || !state::is_shown_by(&above.look, &shown.look) {
            return Ok(None);
        }
        let kind = Kind::File { size: shown.look.size, bytes: Bytes::Upper(path.clone()) };
        Ok(Some((shown.meta()?, kind, above.look)))
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
