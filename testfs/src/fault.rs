//! A fault injector over any [`FileSource`]: the same file system, having a bad day.
//!
//! Invariant: what is injected depends on the seed, the operation, the path and how often that was tried, never on
//! the order of threads; so a parallel scan of one tree with one seed meets the same faults each time. Data and maps
//! that are let through are the inner source's own. What it deliberately does not do: invent bytes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use pagefold_engine::units::PageSize;
use pagefold_fsadapters::source::{
    EntryKind, FileSource, FsDescription, FsError, FsOp, Inspection, OpenedDir, ReadJob, ReadOptions,
    ReadOutcome,
};
use rustix::io::Errno;

use crate::sim::rng::mix;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The device fails.
    Eio,
    /// A signal; the decorator retries, as a source must, and counts.
    Eintr,
    /// No space, from the sync that a map may ask for.
    Enospc,
    /// No memory.
    Enomem,
    /// No permission.
    Eacces,
    /// Listed, but gone when it is opened.
    Vanished,
    /// Changed between two steps of one look: `moved` is set.
    Moved,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Fault; 7] = [
        Fault::Eio,
        Fault::Eintr,
        Fault::Enospc,
        Fault::Enomem,
        Fault::Eacces,
        Fault::Vanished,
        Fault::Moved,
    ];

    const fn errno(self) -> Option<Errno> {
        match self {
            Fault::Eio => Some(Errno::IO),
            Fault::Enospc => Some(Errno::NOSPC),
            Fault::Enomem => Some(Errno::NOMEM),
            Fault::Eacces => Some(Errno::ACCESS),
            Fault::Vanished => Some(Errno::NOENT),
            Fault::Eintr | Fault::Moved => None,
        }
    }

    /// Whether the kernel could answer `op` like that.
    const fn fits(self, op: FsOp) -> bool {
        match self {
            Fault::Eio | Fault::Enomem | Fault::Eintr => true,
            Fault::Enospc => matches!(op, FsOp::ExtentMap),
            Fault::Eacces => matches!(op, FsOp::OpenDir | FsOp::Open | FsOp::OpenRoot),
            Fault::Vanished => matches!(op, FsOp::OpenDir | FsOp::Open | FsOp::Read),
            Fault::Moved => matches!(op, FsOp::Stat | FsOp::Read),
        }
    }
}

/// Which faults, how often.
#[derive(Clone, Debug)]
pub struct FaultPlan {
    /// Seed of the schedule.
    pub seed: u64,
    /// Faults of 1,000 operations.
    pub per_mille: u64,
    /// Those that may happen.
    pub enabled: Vec<Fault>,
}

impl FaultPlan {
    /// No faults.
    #[must_use]
    pub const fn none() -> FaultPlan {
        FaultPlan { seed: 0, per_mille: 0, enabled: Vec::new() }
    }
}

/// A directory and what its path hashes to.
#[derive(Debug)]
pub struct FaultyDir<D> {
    inner: D,
    path: u64,
}

/// `S` with faults.
pub struct Faulty<S> {
    inner: S,
    plan: FaultPlan,
    tried: Mutex<BTreeMap<(u64, u8), u64>>,
    injected: Mutex<BTreeMap<Fault, u64>>,
    interrupted: AtomicU64,
}

impl<S: FileSource> Faulty<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, plan: FaultPlan) -> Self {
        let (tried, injected) = (Mutex::default(), Mutex::default());
        Faulty { inner, plan, tried, injected, interrupted: AtomicU64::new(0) }
    }

    /// How often each fault was injected.
    pub fn injected(&self) -> BTreeMap<Fault, u64> {
        self.injected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls that were interrupted and tried again.
    pub fn interrupted(&self) -> u64 {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// The wrapped source.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Draws for one try of `op` at `path`.
    fn draw(&self, path: u64, op: FsOp) -> Option<Fault> {
        if self.plan.per_mille == 0 {
            return None;
        }
        loop {
            let try_number = {
                let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
                let n = tried.entry((path, op as u8)).or_insert(0);
                *n += 1;
                *n
            };
            let lot = mix(self.plan.seed ^ mix(path ^ mix(op as u64 ^ mix(try_number))));
            if lot % 1000 >= self.plan.per_mille {
                return None;
            }
            let fitting: Vec<Fault> = self.plan.enabled.iter().copied().filter(|f| f.fits(op)).collect();
            let fault = *fitting.get(mix(lot) as usize % fitting.len().max(1))?;
            *self.injected.lock().unwrap_or_else(PoisonError::into_inner).entry(fault).or_insert(0) += 1;
            if fault == Fault::Eintr {
                self.interrupted.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            return Some(fault);
        }
    }

    fn fail(&self, path: u64, op: FsOp) -> Result<(), FsError> {
        match self.draw(path, op).and_then(Fault::errno) {
            Some(errno) => Err(FsError::new(op, std::io::Error::from(errno))),
            None => Ok(()),
        }
    }

    fn wrap(dir: OpenedDir<S::Dir>, path: u64) -> OpenedDir<FaultyDir<S::Dir>> {
        OpenedDir {
            dir: FaultyDir { inner: dir.dir, path },
            inode: dir.inode,
            dev: dir.dev,
            mount: dir.mount,
        }
    }
}

fn hash(parent: u64, name: &OsStr) -> u64 {
    name.as_bytes().iter().fold(mix(parent), |h, b| mix(h ^ u64::from(*b)))
}

impl<S: FileSource> FileSource for Faulty<S> {
    type Dir = FaultyDir<S::Dir>;

    fn page_size(&self) -> PageSize {
        self.inner.page_size()
    }

    fn real_path(&self, root: &Path) -> PathBuf {
        self.inner.real_path(root)
    }

    fn open_root(&self, path: &Path) -> Result<OpenedDir<Self::Dir>, FsError> {
        let place = hash(0, path.as_os_str());
        self.fail(place, FsOp::OpenRoot)?;
        Ok(Self::wrap(self.inner.open_root(path)?, place))
    }

    fn open_dir(&self, parent: &Self::Dir, name: &OsStr) -> Result<OpenedDir<Self::Dir>, FsError> {
        let place = hash(parent.path, name);
        self.fail(place, FsOp::OpenDir)?;
        Ok(Self::wrap(self.inner.open_dir(&parent.inner, name)?, place))
    }

    fn read_dir(&self, dir: &Self::Dir, entry: &mut dyn FnMut(&OsStr, EntryKind)) -> Result<(), FsError> {
        // A listing fails half-way: what was told stays told.
        let failing = self.draw(dir.path, FsOp::ReadDir).and_then(Fault::errno);
        let mut told = 0;
        self.inner.read_dir(&dir.inner, &mut |name, kind| {
            told += 1;
            if failing.is_none() || told <= 2 {
                entry(name, kind);
            }
        })?;
        match failing {
            Some(errno) => Err(FsError::new(FsOp::ReadDir, std::io::Error::from(errno))),
            None => Ok(()),
        }
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
        let place = hash(dir.path, name);
        self.fail(place, FsOp::Open)?;
        self.fail(place, FsOp::ExtentMap)?;
        self.fail(place, FsOp::CacheState)?;
        self.inner.inspect(&dir.inner, name, fs, found)?;
        match self.draw(place, FsOp::Stat) {
            Some(Fault::Moved) => found.moved = true,
            Some(fault) => {
                if let Some(errno) = fault.errno() {
                    return Err(FsError::new(FsOp::Stat, std::io::Error::from(errno)));
                }
            }
            None => {}
        }
        Ok(())
    }

    fn read(
        &self,
        jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
        options: ReadOptions,
        cancel: &AtomicBool,
        done: &(dyn Fn(ReadOutcome) + Sync),
    ) {
        let mut let_through = jobs.filter_map(|job| {
            let tag = job.tag;
            let outcome = match self.draw(hash(0, job.path.as_os_str()), FsOp::Read) {
                Some(Fault::Moved) => ReadOutcome::Moved { tag },
                Some(fault) => match fault.errno() {
                    Some(errno) => ReadOutcome::Failed {
                        tag,
                        error: FsError::new(FsOp::Read, std::io::Error::from(errno)),
                    },
                    None => return Some(job),
                },
                None => return Some(job),
            };
            done(outcome);
            None
        });
        self.inner.read(&mut let_through, options, cancel, done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{Flavour, SimFs};

    fn look_at_all(seed: u64) -> (String, BTreeMap<Fault, u64>, u64) {
        let sim = SimFs::new(Flavour::Xfs, 1);
        for i in 0..60 {
            let name = format!("/f{i}");
            let id = sim.world().create(Path::new(&name), false).unwrap();
            sim.world().write_at(id, 0, &[1; 100]).unwrap();
        }
        let plan = FaultPlan { seed, per_mille: 200, enabled: Fault::ALL.to_vec() };
        let faulty = Faulty::new(sim, plan);
        let Ok(root) = faulty.open_root(Path::new("/")) else { return Default::default() };
        let fs = faulty.describe(&root.dir).unwrap();
        let mut names = Vec::new();
        let listed = faulty.read_dir(&root.dir, &mut |n, _| names.push(n.to_owned()));
        let mut log = format!("{listed:?}");
        for name in names {
            let mut found = Inspection::default();
            let result = faulty.inspect(&root.dir, &name, &fs, &mut found);
            log += &format!("{name:?} {result:?} {}\n", found.moved);
        }
        (log, faulty.injected(), faulty.interrupted())
    }

    #[test]
    fn one_seed_gives_one_schedule_and_every_fault_that_fits_a_scan_happens() {
        assert_eq!(look_at_all(3), look_at_all(3));
        let mut seen = BTreeMap::new();
        let mut interrupted = 0;
        for seed in 0..20 {
            let (_, injected, retried) = look_at_all(seed);
            injected.into_iter().for_each(|(f, n)| *seen.entry(f).or_insert(0) += n);
            interrupted += retried;
        }
        assert_eq!(seen.len(), Fault::ALL.len(), "{seen:?}");
        assert!(interrupted > 0);
    }
}
