//! The steps of a commit, in their order.
//!
//! ```text
//! sweep what earlier tries left -> plan -> journal: this may be touched
//! 1 directories that are new (parents first)        4 directories of the seal that go (children first)
//! 2 files, links, nodes: put in place               5 files where a directory was
//! 3 names that go                                   6 metadata of directories (children first), everything to disk
//! ```
//!
//! New names come before old ones go, so at any moment the raw root lacks nothing that the view shows but what changes from
//! directory to file. Nothing here touches the upper, so a commit that ends anywhere has lost nothing, and every step does
//! nothing where its result is there already.

use std::io;
use std::os::fd::AsFd;

use rustc_hash::FxHashSet;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::bytes::Sources;
use super::error::{CommitError, at_path, is_fatal};
use super::journal::{Journal, meta_digest};
use super::judge::{Judge, Verdict};
use super::place::{Keep, Outcome, Placer, Temp};
use super::plan::Plan;
use super::state::{State, shown_path};
use super::{Applied, Conflict, OnConflict};
use crate::scan::Progress;
use crate::sealed::inode::{Below, Held, Look, split};
use crate::sealed::tree::{Inode, Meta, Node, Tree};
use crate::store::step;

/// Names changed in one batch.
const BATCH: usize = 512;

/// Everything that a commit works on.
pub(super) struct Run<'a> {
    pub raw: &'a Below,
    pub tree: &'a Tree,
    /// When it was sealed: the beginning, seconds since 1970.
    pub began_at: i64,
    /// Names that each sealed inode had.
    pub links: &'a [u32],
    pub state: &'a State,
    pub plan: &'a Plan,
    pub sources: &'a Sources<'a>,
    pub journal: &'a mut Journal,
    pub on_conflict: OnConflict,
    pub progress: &'a Progress,
    pub done: Applied,
    /// Shown directories that could not be made.
    pub blocked: FxHashSet<usize>,
}

/// What is to be put at one name.
struct Target {
    entry: usize,
    path: Vec<u8>,
    verdict: Verdict,
}

impl Run<'_> {
    /// Does it.
    pub fn run(&mut self, run: u64) -> Result<(), CommitError> {
        let mut placer = Placer::new(self.raw, run);
        let plan = self.plan;
        let names = plan.dirs.len() + plan.inodes.len() + plan.gone.len() + plan.stale.len();
        self.progress.expect_steps(names + plan.metas.len());
        for &entry in &self.plan.dirs {
            self.check_cancel()?;
            let path = self.state.path(entry);
            let result = self.ensure_dir(&mut placer, entry, &path);
            self.note(&path, result)?;
            self.progress.did_step();
        }
        step("commit.dirs.made");
        let mut late = Vec::new();
        for &inode in &self.plan.inodes {
            self.check_cancel()?;
            let path = self.state.path(self.state.inodes[inode].names[0]);
            let result = self.put_inode(&mut placer, inode, Some(&mut late));
            self.note(&path, result)?;
            self.progress.did_step();
            self.flush(&mut placer, BATCH)?;
        }
        self.flush(&mut placer, 1)?;
        step("commit.files.placed");
        self.remove(&mut placer)?;
        step("commit.names.gone");
        for inode in late {
            let path = self.state.path(self.state.inodes[inode].names[0]);
            // With its other names, which are in place: the last ones are links to them.
            let result = self.put_inode(&mut placer, inode, None);
            self.note(&path, result)?;
        }
        self.flush(&mut placer, 1)?;
        self.done.shared_bytes = placer.shared_bytes;
        self.done.copied_bytes = placer.copied_bytes;
        drop(placer);
        for &entry in self.plan.metas.iter().rev() {
            let path = self.state.path(entry);
            let result = self.finish_dir(entry, &path);
            self.note(&path, result)?;
            self.progress.did_step();
        }
        step("commit.dirs.finished");
        rustix::fs::syncfs(self.raw.as_fd()).map_err(|e| at_path("sync", b"", e.into()))?;
        step("commit.synced");
        Ok(())
    }

    fn check_cancel(&self) -> Result<(), CommitError> {
        if self.progress.is_cancelled() { Err(CommitError::Cancelled) } else { Ok(()) }
    }

    /// An error concerns one path and is reported, unless there is no point in going on.
    fn note(&mut self, path: &[u8], result: io::Result<()>) -> Result<(), CommitError> {
        match result {
            Ok(()) => Ok(()),
            Err(e) if is_fatal(&e) => Err(at_path("commit", path, e)),
            Err(e) => {
                self.done.errors.push((shown_path(path), e.to_string()));
                Ok(())
            }
        }
    }

    fn conflict(&mut self, path: &[u8], why: &'static str) {
        self.done.conflicts.push(Conflict { path: shown_path(path), why });
    }

    fn sealed_at(&self, entry: usize) -> Option<&Inode> {
        self.plan.at[entry].map(|id| self.tree.inode(id))
    }

    /// Makes a directory of the view, or sees that it is there.
    fn ensure_dir(&mut self, placer: &mut Placer<'_>, entry: usize, path: &[u8]) -> io::Result<()> {
        let parent = self.state.entries[entry].parent;
        if self.blocked.contains(&parent) {
            self.blocked.insert(entry);
            return Ok(());
        }
        let held = self.raw.held(path)?;
        if held.as_ref().is_some_and(|h| h.look.is_dir()) {
            return Ok(());
        }
        let sealed = self.sealed_at(entry);
        let was_dir = sealed.is_some_and(|s| s.node == Node::Dir);
        if was_dir && !self.journal.touched.contains(path) && self.on_conflict != OnConflict::TakeView {
            self.blocked.insert(entry);
            self.disagree(path, "a directory that the view changed is gone from the raw root");
            return Ok(());
        }
        let sealed = sealed.filter(|s| s.node != Node::Dir);
        let verdict = self.judge().judge(path, held.as_ref(), sealed, None)?;
        let Some(old) = self.replaceable(path, verdict, sealed.is_some() || was_dir) else {
            self.blocked.insert(entry);
            return Ok(());
        };
        let inode = self.state.inode(entry);
        let (dir, name) = split(path);
        let temp = placer.build(dir, (&inode.meta, &inode.kind), self.sources, &Keep::NOTHING)?;
        placer.put(dir, name, &temp, old)?;
        let outcomes = placer.flush(self.journal)?;
        // Directories of the new one are opened by path: what was known of this path is no more.
        for (path, outcome) in outcomes {
            if matches!(outcome, Outcome::Raced | Outcome::Failed(_)) {
                self.blocked.insert(entry);
            } else {
                self.done.dirs_made += 1;
            }
            self.settle(&path, outcome)?;
        }
        Ok(())
    }

    fn judge(&self) -> Judge<'_> {
        Judge { sources: self.sources, journal: self.journal, sealed_at: self.began_at }
    }

    /// Whether what is at `path` may be replaced, and by which look it is known then. `known`: something was there when it was
    /// sealed.
    fn replaceable(&mut self, path: &[u8], verdict: Verdict, known: bool) -> Option<Option<Look>> {
        match verdict {
            Verdict::Absent if known && !self.journal.touched.contains(path) => match self.on_conflict {
                OnConflict::TakeView => Some(None),
                _ => {
                    self.disagree(path, "changed in the view, and gone from the raw root");
                    None
                }
            },
            Verdict::Absent => Some(None),
            Verdict::Wanted(look) | Verdict::Sealed(look) | Verdict::Ours(look) => Some(Some(look)),
            Verdict::Foreign(look) if self.on_conflict == OnConflict::TakeView && !look.is_dir() => {
                Some(Some(look))
            }
            Verdict::Foreign(_) => {
                let why = if known { "changed in the view and in the raw root" } else { "new in both" };
                self.disagree(path, why);
                None
            }
        }
    }

    /// A conflict, unless the raw root is to win.
    fn disagree(&mut self, path: &[u8], why: &'static str) {
        if self.on_conflict == OnConflict::TakeRaw {
            self.done.raw_kept += 1;
        } else {
            self.conflict(path, why);
        }
    }

    /// Puts an inode at all its names; those where a directory has to go first wait in `late`, if that is given.
    fn put_inode(
        &mut self,
        placer: &mut Placer<'_>,
        inode: usize,
        late: Option<&mut Vec<usize>>,
    ) -> io::Result<()> {
        let shown = &self.state.inodes[inode];
        let (mut targets, mut waits) = (Vec::new(), false);
        for &entry in &shown.names {
            if self.blocked.contains(&self.state.entries[entry].parent) {
                continue;
            }
            let path = self.state.path(entry);
            let held = self.raw.held(&path)?;
            let sealed = self.sealed_at(entry);
            let verdict = match (&held, sealed) {
                // A directory was sealed here: it goes when it is empty, then it is this name's turn.
                (Some(h), Some(s)) if h.look.is_dir() && s.node == Node::Dir => Verdict::Sealed(h.look),
                _ => self.judge().judge(&path, held.as_ref(), sealed, Some((&shown.meta, &shown.kind)))?,
            };
            match verdict {
                Verdict::Sealed(look) | Verdict::Ours(look) if look.is_dir() && late.is_some() => {
                    waits = true;
                }
                _ => targets.push(Target { entry, path, verdict }),
            }
        }
        if let Some(late) = late.filter(|_| waits) {
            late.push(inode);
        }
        self.put_targets(placer, inode, targets)
    }

    fn put_targets(&mut self, placer: &mut Placer<'_>, inode: usize, targets: Vec<Target>) -> io::Result<()> {
        let carrier = self.carrier(inode, &targets)?;
        let mut from: Option<(Vec<u8>, Vec<u8>, Look)> = None;
        if let Some((path, look)) = &carrier {
            let (dir, name) = split(path);
            from = Some((dir.to_vec(), name.to_vec(), *look));
        }
        for target in targets {
            if let (Verdict::Wanted(look), Some((_, carrier))) = (target.verdict, &carrier)
                && look.ino == carrier.ino
            {
                self.done.already += 1;
                continue;
            }
            let known = self.plan.at[target.entry].is_some();
            let Some(old) = self.replaceable(&target.path, target.verdict, known) else { continue };
            let (dir, name) = split(&target.path);
            let temp = self.temp_for(placer, inode, &target.path, from.as_ref())?;
            placer.put(dir, name, &temp, old)?;
            if let Verdict::Sealed(look) = target.verdict
                && look.links as usize > self.links_of(target.entry)
                && !look.is_dir()
            {
                let text = "it had names outside the root: they keep what was there before".to_owned();
                self.done.notes.push((shown_path(&target.path), text));
            }
            if from.is_none() {
                from = Some((dir.to_vec(), placer.name_of(&temp), temp.built));
            }
        }
        Ok(())
    }

    /// Another name for what is there already, or a new inode.
    fn temp_for(
        &mut self,
        placer: &mut Placer<'_>,
        inode: usize,
        path: &[u8],
        from: Option<&(Vec<u8>, Vec<u8>, Look)>,
    ) -> io::Result<Temp> {
        let (dir, _) = split(path);
        if let Some((from_dir, name, look)) = from {
            match placer.link(from_dir, name, *look, dir) {
                Ok(temp) => return Ok(temp),
                Err(e) if can_not_link(&e) => {
                    let text = format!("a hard link is a file of its own now ({e})");
                    self.done.notes.push((shown_path(dir), text));
                }
                Err(e) => return Err(e),
            }
        }
        let shown = &self.state.inodes[inode];
        let keep = Keep::of(self.raw.held(path)?.as_ref())?;
        placer.build(dir, (&shown.meta, &shown.kind), self.sources, &keep)
    }

    /// An inode of the raw root that already is what is wanted, and whose names all are names of this one: further names can be links
    /// to it. Names of it outside the root are its own affair only if it had them when it was sealed.
    fn carrier(&self, inode: usize, targets: &[Target]) -> io::Result<Option<(Vec<u8>, Look)>> {
        let names = self.state.inodes[inode].names.len();
        for target in targets {
            let Verdict::Wanted(look) = target.verdict else { continue };
            let here = |t: &&Target| matches!(t.verdict, Verdict::Wanted(l) if l.ino == look.ino);
            let found = targets.iter().filter(here).count();
            let sealed = self.sealed_at(target.entry);
            let same_as_sealed =
                sealed.is_some_and(|s| s.raw.ino == look.ino && s.raw.links == look.links) && found == names;
            if found == look.links as usize || same_as_sealed && self.links_of(target.entry) == names {
                return Ok(Some((target.path.clone(), look)));
            }
        }
        Ok(None)
    }

    /// Names within the root that the sealed inode at an entry had.
    fn links_of(&self, entry: usize) -> usize {
        let inode = self.plan.at[entry].map(|id| self.tree.entries[id.0 as usize].inode);
        inode.map_or(0, |inode| self.links[inode.0 as usize] as usize)
    }

    /// Carries out what waits, if it is at least `least`.
    fn flush(&mut self, placer: &mut Placer<'_>, least: usize) -> Result<(), CommitError> {
        if placer.waiting() < least {
            return Ok(());
        }
        let outcomes = placer.flush(self.journal).map_err(|e| at_path("commit", b"", e))?;
        for (path, outcome) in outcomes {
            let result = self.settle(&path, outcome);
            self.note(&path, result)?;
        }
        Ok(())
    }

    fn settle(&mut self, path: &[u8], outcome: Outcome) -> io::Result<()> {
        match outcome {
            Outcome::Replaced => self.done.replaced += 1,
            Outcome::Created => self.done.created += 1,
            Outcome::Removed => self.done.removed += 1,
            Outcome::Raced => self.conflict(path, "changed in the raw root while it was committed"),
            Outcome::Failed(e) => return Err(e),
        }
        Ok(())
    }

    /// Names that the view has no more.
    fn remove(&mut self, placer: &mut Placer<'_>) -> Result<(), CommitError> {
        let mut dirs = Vec::new();
        for path in self.plan.stale.iter().rev() {
            let result = self.remove_name(placer, path, None, &mut dirs);
            self.note(path, result)?;
            self.progress.did_step();
        }
        for id in self.plan.gone.iter().rev() {
            self.check_cancel()?;
            let path = self.tree.path(*id);
            let result = self.remove_name(placer, &path, Some(self.tree.inode(*id)), &mut dirs);
            self.note(&path, result)?;
            self.progress.did_step();
            self.flush(placer, BATCH)?;
        }
        self.flush(placer, 1)?;
        // Longest first is children first.
        dirs.sort_unstable_by_key(|(path, _): &(Vec<u8>, _)| std::cmp::Reverse(path.len()));
        for (path, sealed) in dirs {
            let result = self.remove_dir(&path, sealed);
            self.note(&path, result)?;
        }
        Ok(())
    }

    fn remove_name<'t>(
        &mut self,
        placer: &mut Placer<'_>,
        path: &[u8],
        sealed: Option<&'t Inode>,
        dirs: &mut Vec<(Vec<u8>, Option<&'t Inode>)>,
    ) -> io::Result<()> {
        let Some(held) = self.raw.held(path)? else { return Ok(()) };
        if held.look.is_dir() && sealed.is_none_or(|s| s.node == Node::Dir) {
            dirs.push((path.to_vec(), sealed));
            return Ok(());
        }
        let sealed = sealed.filter(|s| s.node != Node::Dir);
        match self.judge().judge(path, Some(&held), sealed, None)? {
            Verdict::Ours(look) if look.is_dir() => {
                dirs.push((path.to_vec(), None));
                Ok(())
            }
            Verdict::Sealed(look) | Verdict::Ours(look) => {
                let (dir, name) = split(path);
                placer.remove(dir, name, look)
            }
            Verdict::Foreign(look) if self.on_conflict == OnConflict::TakeView && !look.is_dir() => {
                let (dir, name) = split(path);
                placer.remove(dir, name, look)
            }
            Verdict::Foreign(_) => {
                self.disagree(path, "removed in the view, changed in the raw root");
                Ok(())
            }
            Verdict::Absent | Verdict::Wanted(_) => Ok(()),
        }
    }

    fn remove_dir(&mut self, path: &[u8], sealed: Option<&Inode>) -> io::Result<()> {
        let (parent, name) = split(path);
        let dir = match self.raw.dir(parent) {
            Ok(dir) => dir,
            Err(e) if crate::sealed::inode::is_absent(&e) => return Ok(()),
            Err(e) => return Err(e),
        };
        let Some(held) = Held::open(dir.as_fd(), name)? else { return Ok(()) };
        let now = held.meta()?;
        let known = sealed.is_some_and(|s| meta_digest(&s.meta) == meta_digest(&now))
            || self.journal.gave(path, &now);
        if !known && self.on_conflict != OnConflict::TakeView {
            self.disagree(path, "removed in the view, its metadata changed in the raw root");
            return Ok(());
        }
        match rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
            Ok(()) => {
                self.done.removed += 1;
                step("commit.name.changed");
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                self.disagree(path, "removed in the view; the raw root has other names in it");
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Gives a directory its metadata, its times last.
    fn finish_dir(&mut self, entry: usize, path: &[u8]) -> io::Result<()> {
        if self.blocked.contains(&entry) {
            return Ok(());
        }
        let Some(held) = self.raw.held(path)? else { return Ok(()) };
        if !held.look.is_dir() {
            return Ok(());
        }
        let want = &self.state.inode(entry).meta;
        let now = held.meta()?;
        let digest = meta_digest;
        if digest(&now) == digest(want) {
            return if now.mtime == want.mtime { Ok(()) } else { held.set_mtime(want.mtime) };
        }
        let sealed = self.sealed_at(entry).filter(|s| s.node == Node::Dir).map(|s| s.meta.clone());
        let is =
            |meta: &Option<Meta>, other: &Meta| meta.as_ref().is_some_and(|m| digest(m) == digest(other));
        if is(&sealed, &now) || self.journal.gave(path, &now) || self.on_conflict == OnConflict::TakeView {
            self.done.dirs_changed += 1;
            return held.apply(want);
        }
        if !is(&sealed, want) {
            self.disagree(path, "metadata of the directory changed in the view and in the raw root");
        }
        held.set_mtime(want.mtime)
    }
}

/// Whether another name can't be had for reasons of the file system: another project id, too many links.
fn can_not_link(error: &io::Error) -> bool {
    let reasons = [Errno::XDEV, Errno::MLINK, Errno::PERM];
    error.raw_os_error().is_some_and(|code| reasons.contains(&Errno::from_raw_os_error(code)))
}
