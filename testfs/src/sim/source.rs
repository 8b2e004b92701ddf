//! The simulated host behind [`FileSource`]: what a scan sees of it.
//!
//! Invariant: the same order of steps as against a kernel (attributes, cache, map, cache, attributes), with a chance
//! for an [`Interloper`] between any two of them. Nothing here changes a file, a time or the cache.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pagefold_engine::identity::DeviceClass;
use pagefold_engine::units::{PageCount, PageIndex, PageSize};
use pagefold_fsadapters::source::{
    EntryKind, FileSource, FsDescription, FsError, FsOp, Inspection, OpenedDir, ReadJob, ReadOptions,
    ReadOutcome, Residency,
};
use rustix::io::Errno;

use super::node::{Attributes, Body, NodeId};
use super::world::{Place, World};
use super::{SimDir, SimFs};

/// A moment within one look at a file, at which somebody else may act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// After the first attributes.
    AfterStat,
    /// After the first cache count.
    AfterCache,
    /// After the map.
    AfterMap,
    /// After residency and the second cache count.
    AfterSecondCache,
    /// Between two pages of a read.
    WithinRead,
}

/// Somebody who acts between the steps of a look.
pub type Interloper = Box<dyn FnMut(&mut World, NodeId, Moment) + Send>;

fn fail(op: FsOp) -> impl Fn(io::Error) -> FsError {
    move |source| FsError::new(op, source)
}

fn errno(op: FsOp, errno: Errno) -> FsError {
    FsError::new(op, io::Error::from(errno))
}

impl World {
    fn moment(&mut self, id: NodeId, moment: Moment) {
        if let Some(mut hook) = self.hook.take() {
            hook(self, id, moment);
            self.hook = Some(hook);
        }
    }

    fn dirty_pages(&self, id: NodeId) -> io::Result<Option<u64>> {
        let node = self.node(id)?;
        if self.bugs.cache_looks_clean {
            return Ok(Some(0));
        }
        if !(self.privileged || node.owned) {
            return Ok(None);
        }
        let counts = self.cache_counts(id)?;
        Ok(Some(counts.dirty + counts.writeback))
    }

    /// Up to the size of the first look, whatever the file has become, as the adapters ask.
    fn residency(&self, id: NodeId, size: u64) -> io::Result<Residency> {
        if !(self.privileged || self.node(id)?.owned) {
            return Ok(Residency::Unknown);
        }
        let (_, file) = self.file(id)?;
        let end = self.page.pages_covering(size).0;
        let mut runs: Vec<(PageIndex, PageCount)> = Vec::new();
        for page in file.cache.range(..end).map(|(p, _)| *p) {
            match runs.last_mut() {
                Some((start, pages)) if start.0 + pages.0 == page => pages.0 += 1,
                _ => runs.push((PageIndex(page), PageCount(1))),
            }
        }
        Ok(match runs.first() {
            None => Residency::None,
            Some((_, pages)) if pages.0 == end => Residency::All,
            Some(_) => Residency::Runs(runs),
        })
    }

    /// What SEEK_HOLE calls holes. Unlike the map it knows every reservation; unwritten extents it counts as data here.
    fn holes(&self, id: NodeId, holes: &mut Vec<std::ops::Range<u64>>) -> io::Result<()> {
        let (fs, file) = self.file(id)?;
        let unit = if fs.habits.fiemap { fs.habits.block_bytes } else { self.page.bytes() };
        let inline = file.inline.is_some().then_some(0);
        let cached: Vec<u64> =
            if fs.habits.fiemap { Vec::new() } else { file.cache.keys().copied().collect() };
        let mut at = 0;
        for used in inline.into_iter().chain(file.blocks.keys().copied()).chain(cached) {
            let (start, end) = ((used * unit).min(file.size), ((used + 1) * unit).min(file.size));
            if start > at {
                holes.push(at..start);
            }
            at = at.max(end);
        }
        if at < file.size {
            holes.push(at..file.size);
        }
        Ok(())
    }

    fn inspect_node(&mut self, id: NodeId, found: &mut Inspection) -> Result<(), FsError> {
        let stat = fail(FsOp::Stat);
        let cache = fail(FsOp::CacheState);
        let before = self.stat(id).map_err(&stat)?;
        self.moment(id, Moment::AfterStat);
        let dirty_before = self.dirty_pages(id).map_err(&cache)?;
        self.moment(id, Moment::AfterCache);
        found.extents.clear();
        found.class = None;
        let (fs, file) = self.file(id).map_err(fail(FsOp::Open))?;
        if fs.habits.fiemap {
            let realtime = file.realtime && !self.bugs.realtime_looks_data;
            found.class = Some(if realtime { DeviceClass::Realtime } else { DeviceClass::Data });
            self.extent_map(id, &mut found.extents).map_err(fail(FsOp::ExtentMap))?;
        }
        self.moment(id, Moment::AfterMap);
        found.holes.clear();
        if dirty_before != Some(0) || found.extents.is_empty() {
            self.holes(id, &mut found.holes).map_err(fail(FsOp::ExtentMap))?;
        }
        found.residency = self.residency(id, before.size).map_err(&cache)?;
        let dirty_after = self.dirty_pages(id).map_err(&cache)?;
        self.moment(id, Moment::AfterSecondCache);
        let after = self.stat(id).map_err(&stat)?;
        found.inode = before.inode;
        found.size = before.size;
        found.links = before.links;
        found.ctime = ctime(&before);
        found.dirty_pages = dirty_before.zip(dirty_after).map(|(a, b)| a.max(b));
        let moved = (before.size, before.ctime) != (after.size, after.ctime) || dirty_before != dirty_after;
        found.moved = moved && !self.bugs.moved_unseen;
        Ok(())
    }

    /// Hashes a job's pages, or says that the file is another one.
    fn read_job(&mut self, job: &ReadJob) -> Result<Option<Vec<[u8; 16]>>, FsError> {
        let read = fail(FsOp::Read);
        let place = self.resolve(&job.path, false).map_err(fail(FsOp::Open))?;
        let node = self.node(place.node).map_err(fail(FsOp::Open))?;
        if node.file().is_none() {
            return Ok(None);
        }
        if !self.may_read(node) {
            return Err(errno(FsOp::Open, Errno::ACCESS));
        }
        let expected = (job.inode, job.size, job.ctime);
        let seen = |w: &World| w.stat(place.node).map(|a| (a.inode, a.size, ctime(&a)));
        if seen(self).map_err(&read)? != expected {
            return Ok(None);
        }
        let mut hashes = Vec::new();
        for (first, pages) in &job.ranges {
            for page in first.0..first.0 + pages.0 {
                let bytes = self.peek_page(place.node, page).map_err(&read)?;
                hashes.push(page_hash(&bytes));
                self.moment(place.node, Moment::WithinRead);
            }
        }
        if seen(self).ok() != Some(expected) {
            return Ok(None);
        }
        Ok(Some(hashes))
    }
}

fn ctime(a: &Attributes) -> (i64, u32) {
    ((a.ctime / 1000) as i64, (a.ctime % 1000) as u32 * 1_000_000)
}

/// First 128 bits of BLAKE3.
#[must_use]
pub fn page_hash(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    out
}

impl SimFs {
    fn opened(world: &World, place: Place, op: FsOp) -> Result<OpenedDir<SimDir>, FsError> {
        let node = world.node(place.node).map_err(fail(op))?;
        match &node.body {
            Body::Dir(_) if world.may_read(node) => {}
            Body::Dir(_) => return Err(errno(op, Errno::ACCESS)),
            Body::Symlink(_) => return Err(errno(op, Errno::LOOP)),
            _ => return Err(errno(op, Errno::NOTDIR)),
        }
        let (inode, dev) = (node.id, node.id.dev);
        Ok(OpenedDir { dir: SimDir { place }, inode, dev, mount: Some(place.mount as u64 + 1) })
    }
}

fn kind_of(body: &Body) -> EntryKind {
    match body {
        Body::File(_) => EntryKind::File,
        Body::Dir(_) => EntryKind::Dir,
        Body::Symlink(_) => EntryKind::Symlink,
        Body::Special(kind) => EntryKind::Special(*kind),
    }
}

impl FileSource for SimFs {
    type Dir = SimDir;

    fn page_size(&self) -> PageSize {
        self.world().page
    }

    fn open_root(&self, path: &Path) -> Result<OpenedDir<SimDir>, FsError> {
        let world = self.world();
        let place = world.resolve(path, true).map_err(fail(FsOp::OpenRoot))?;
        Self::opened(&world, place, FsOp::OpenRoot)
    }

    fn open_dir(&self, parent: &SimDir, name: &OsStr) -> Result<OpenedDir<SimDir>, FsError> {
        let world = self.world();
        let place = world.child(parent.place, name.as_bytes()).map_err(fail(FsOp::OpenDir))?;
        Self::opened(&world, place, FsOp::OpenDir)
    }

    fn read_dir(&self, dir: &SimDir, entry: &mut dyn FnMut(&OsStr, EntryKind)) -> Result<(), FsError> {
        let entries: Vec<(Vec<u8>, EntryKind)> = {
            let world = self.world();
            let Body::Dir(entries) = &world.node(dir.place.node).map_err(fail(FsOp::ReadDir))?.body else {
                return Err(errno(FsOp::ReadDir, Errno::NOTDIR));
            };
            let told = |id| match world.node(id) {
                Ok(node) if !node.shy => kind_of(&node.body),
                _ => EntryKind::Unknown,
            };
            entries.iter().map(|(name, id)| (name.clone(), told(*id))).collect()
        };
        // The world is not locked here: the caller may well look at files while it lists.
        entries.iter().for_each(|(name, kind)| entry(OsStr::from_bytes(name), *kind));
        Ok(())
    }

    fn kind_of(&self, dir: &SimDir, name: &OsStr) -> Result<EntryKind, FsError> {
        let world = self.world();
        let place = world.child(dir.place, name.as_bytes()).map_err(fail(FsOp::Stat))?;
        Ok(kind_of(&world.node(place.node).map_err(fail(FsOp::Stat))?.body))
    }

    fn describe(&self, dir: &SimDir) -> Result<FsDescription, FsError> {
        let world = self.world();
        let node = world.node(dir.place.node).map_err(fail(FsOp::Stat))?;
        let fs = &world.fses[node.fs.0];
        let why_not = (!fs.habits.fiemap).then(|| format!("{} has no extent maps", fs.habits.kind));
        Ok(FsDescription {
            kind: fs.habits.kind.to_owned(),
            uuid: fs.uuid,
            // btrfs has one st_dev a subvolume, so its UUID must do; elsewhere st_dev tells copies of a UUID apart.
            instance: if fs.habits.snapshots { 0 } else { node.id.dev },
            physical_identity: fs.habits.fiemap,
            why_not,
        })
    }

    fn inspect(
        &self,
        dir: &SimDir,
        name: &OsStr,
        _fs: &FsDescription,
        found: &mut Inspection,
    ) -> Result<(), FsError> {
        let mut world = self.world();
        let place = world.child(dir.place, name.as_bytes()).map_err(fail(FsOp::Open))?;
        let node = world.node(place.node).map_err(fail(FsOp::Open))?;
        if node.file().is_none() {
            return Err(errno(FsOp::Open, Errno::INVAL));
        }
        if !world.may_read(node) {
            return Err(errno(FsOp::Open, Errno::ACCESS));
        }
        // The open file keeps the inode even if an interloper removes its last name.
        let id = place.node;
        world.hold(id).map_err(fail(FsOp::Open))?;
        let result = world.inspect_node(id, found);
        world.let_go(id);
        result
    }

    fn read(
        &self,
        jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
        _options: ReadOptions,
        cancel: &AtomicBool,
        done: &(dyn Fn(ReadOutcome) + Sync),
    ) {
        for job in jobs {
            if cancel.load(Ordering::Relaxed) {
                return;
            }
            let tag = job.tag;
            let outcome = self.world().read_job(&job);
            done(match outcome {
                Ok(Some(hashes)) => ReadOutcome::Hashed { tag, hashes },
                Ok(None) => ReadOutcome::Moved { tag },
                Err(error) => ReadOutcome::Failed { tag, error },
            });
        }
    }
}
