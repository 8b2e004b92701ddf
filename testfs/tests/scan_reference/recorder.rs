//! A source that writes down the raw facts of every file at the end of every look, and cancels a scan when told to.
//!
//! Invariant: facts come from the simulated host's own state. Of what the look said, only this is kept: whether it
//! succeeded, whether it said that the file moved (then also size and cache, which nobody else knows for that moment), and
//! whether it saw anything dirty.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use pagefold_engine::units::PageSize;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::source::{
    EntryKind, FileSource, FsDescription, FsError, Inspection, OpenedDir, ReadJob, ReadOptions, ReadOutcome,
    Residency,
};
use pagefold_testfs::sim::{NodeId, RawFile, SimFs};

/// The last look at one name.
#[derive(Clone, Debug)]
pub struct Look {
    pub node: NodeId,
    /// As it was right after the look.
    pub facts: RawFile,
    pub ctime: u64,
    /// The look said so.
    pub moved: bool,
    /// The look saw dirty pages, or may not know.
    pub dirty: bool,
}

/// Of a file that moved within the look nobody knows which moment counts: size and cache are those of the look.
fn of_the_look(facts: &mut RawFile, found: &Inspection) {
    facts.size = found.size;
    let end = found.size.div_ceil(4096);
    facts.pages.resize(end as usize, vec![0; 4096]);
    facts.cached = match &found.residency {
        Residency::None | Residency::Unknown => Vec::new(),
        Residency::All => (0..end).collect(),
        Residency::Runs(runs) => runs.iter().flat_map(|(first, n)| first.0..first.0 + n.0).collect(),
    };
}

/// What is recorded of a scan.
#[derive(Default)]
pub struct Record {
    /// `None`: the look failed.
    pub looks: Mutex<BTreeMap<PathBuf, Option<Look>>>,
    /// Pages that were hashed, by the name they were read through.
    pub hashed: Mutex<BTreeSet<(PathBuf, u64)>>,
    steps: AtomicU64,
}

/// See the module.
pub struct Recorder<'a, S> {
    inner: S,
    sim: SimFs,
    record: &'a Record,
    progress: &'a Progress,
    cancel_at: Option<u64>,
}

/// A directory and its full path.
pub struct Dir<D> {
    inner: D,
    path: PathBuf,
}

impl<'a, S> Recorder<'a, S> {
    /// Records what `inner`, which shows `sim`, is asked; cancels with step `cancel_at`.
    pub fn new(
        inner: S,
        sim: SimFs,
        record: &'a Record,
        progress: &'a Progress,
        cancel_at: Option<u64>,
    ) -> Self {
        Recorder { inner, sim, record, progress, cancel_at }
    }

    /// The source inside.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn step(&self) {
        if Some(self.record.steps.fetch_add(1, Ordering::Relaxed)) == self.cancel_at {
            self.progress.cancel();
        }
    }
}

fn wrap<D>(opened: OpenedDir<D>, path: PathBuf) -> OpenedDir<Dir<D>> {
    let OpenedDir { dir, inode, dev, mount } = opened;
    OpenedDir { dir: Dir { inner: dir, path }, inode, dev, mount }
}

impl<S: FileSource> FileSource for Recorder<'_, S> {
    type Dir = Dir<S::Dir>;

    fn page_size(&self) -> PageSize {
        self.inner.page_size()
    }

    fn open_root(&self, path: &Path) -> Result<OpenedDir<Self::Dir>, FsError> {
        self.step();
        Ok(wrap(self.inner.open_root(path)?, path.to_owned()))
    }

    fn open_dir(&self, parent: &Self::Dir, name: &OsStr) -> Result<OpenedDir<Self::Dir>, FsError> {
        self.step();
        Ok(wrap(self.inner.open_dir(&parent.inner, name)?, parent.path.join(name)))
    }

    fn read_dir(&self, dir: &Self::Dir, entry: &mut dyn FnMut(&OsStr, EntryKind)) -> Result<(), FsError> {
        self.step();
        self.inner.read_dir(&dir.inner, entry)
    }

    fn kind_of(&self, dir: &Self::Dir, name: &OsStr) -> Result<EntryKind, FsError> {
        self.inner.kind_of(&dir.inner, name)
    }

    fn describe(&self, dir: &Self::Dir) -> Result<FsDescription, FsError> {
        self.inner.describe(&dir.inner)
    }

    fn inspect(
        &self,
        dir: &Self::Dir,
        name: &OsStr,
        fs: &FsDescription,
        found: &mut Inspection,
    ) -> Result<(), FsError> {
        self.step();
        let path = dir.path.join(name);
        // Held, so that the facts can be told even if its last name goes meanwhile.
        let node = {
            let mut world = self.sim.world();
            world.resolve(&path, false).ok().map(|place| place.node()).filter(|n| world.hold(*n).is_ok())
        };
        let result = self.inner.inspect(&dir.inner, name, fs, found);
        let mut world = self.sim.world();
        let look = node.filter(|_| result.is_ok()).and_then(|node| {
            let (mut facts, ctime) = (world.raw_file(node).ok()?, world.stat(node).ok()?.ctime);
            if found.moved {
                of_the_look(&mut facts, found);
            }
            Some(Look { node, facts, ctime, moved: found.moved, dirty: found.dirty_pages != Some(0) })
        });
        if let Some(node) = node {
            world.let_go(node);
        }
        drop(world);
        self.record.looks.lock().unwrap_or_else(PoisonError::into_inner).insert(path, look);
        result
    }

    fn read(
        &self,
        jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
        options: ReadOptions,
        cancel: &AtomicBool,
        done: &(dyn Fn(ReadOutcome) + Sync),
    ) {
        let given: Mutex<BTreeMap<u64, Vec<(PathBuf, u64)>>> = Mutex::default();
        let mut jobs = jobs.inspect(|job| {
            self.step();
            let pages = job.ranges.iter().flat_map(|(first, n)| first.0..first.0 + n.0);
            let pages = pages.map(|page| (job.path.clone(), page)).collect();
            given.lock().unwrap_or_else(PoisonError::into_inner).insert(job.tag, pages);
        });
        let told = |outcome: ReadOutcome| {
            if let ReadOutcome::Hashed { tag, .. } = &outcome {
                let pages = given.lock().unwrap_or_else(PoisonError::into_inner).remove(tag);
                let mut hashed = self.record.hashed.lock().unwrap_or_else(PoisonError::into_inner);
                hashed.extend(pages.expect("a job that was given out, once"));
            }
            done(outcome);
        };
        self.inner.read(&mut jobs, options, cancel, &told);
    }
}
