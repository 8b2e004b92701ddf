//! One set of cases for every file system behind a [`FileSource`]: the simulation and real kernels alike.
//!
//! A [`Rig`] is something cases can do file operations on and look at through its source. Cases are plain functions
//! over any rig, in one table ([`cases`]) with what each needs; a rig that lacks it is not asked. They judge
//! `inspect` through the engine's own rules ([`Layout::from_extents`]).
//!
//! What it deliberately does not do: know which rig it runs on. A case that has to know is two cases with a need each.

use std::io;
use std::path::{Path, PathBuf};

use pagefold_engine::identity::{AddressSpace, Identity, Undecided};
use pagefold_engine::layout::{CacheState, Layout, MapFacts};
use pagefold_engine::units::FsId;
use pagefold_fsadapters::source::{FileSource, FsDescription, FsError, Inspection};

mod cache;
mod files;
mod kernel_rig;
mod maps;
pub mod random;
mod sharing;
mod sim_rig;

pub use kernel_rig::{KernelFs, KernelRig};
pub use sim_rig::SimRig;

/// What a case needs and not every rig has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Need {
    /// FIEMAP.
    Extents,
    /// Whole pages of plain synced data get an identity (not so where everything is compressed or blocks are small).
    PlainPages,
    /// FICLONE and FICLONERANGE.
    Reflink,
    /// Unwritten extents.
    Unwritten,
    /// Small files inside metadata.
    Inline,
    /// Transparent compression of what compresses.
    Compress,
    /// Snapshots.
    Snapshot,
    /// Every address can be made to change.
    Relocate,
    /// A second device class with overlapping addresses.
    Realtime,
    /// Writeback can be held half-way.
    HoldWriteback,
    /// Clean pages can be dropped from cache.
    Evict,
    /// A file whose cache state this user may not ask for.
    Unowned,
    /// There is no FIEMAP.
    NoExtents,
}

/// A file system under test. Paths are relative to [`Rig::root`]. Every method fails as the operation it names does.
pub trait Rig {
    /// How it is looked at.
    type Source: FileSource;

    /// For messages.
    fn name(&self) -> String;
    /// Whether it has what a case needs.
    fn has(&self, need: Need) -> bool;
    /// The source.
    fn source(&self) -> &Self::Source;
    /// The directory that cases work in.
    fn root(&self) -> PathBuf;
    /// Makes a new empty directory and works in that from now on.
    ///
    /// # Errors
    /// As mkdir(2).
    fn enter(&mut self, case: &str) -> io::Result<()>;

    /// An empty file.
    ///
    /// # Errors
    /// As open(2) with `O_CREAT|O_EXCL`.
    fn create(&mut self, path: &Path) -> io::Result<()>;
    /// An empty file on the real-time device.
    ///
    /// # Errors
    /// `Unsupported` without [`Need::Realtime`].
    fn create_realtime(&mut self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// A directory.
    ///
    /// # Errors
    /// As mkdir(2).
    fn mkdir(&mut self, path: &Path) -> io::Result<()>;
    /// A FIFO.
    ///
    /// # Errors
    /// As mknod(2).
    fn mkfifo(&mut self, path: &Path) -> io::Result<()>;
    /// A symbolic link.
    ///
    /// # Errors
    /// As symlink(2).
    fn symlink(&mut self, target: &Path, path: &Path) -> io::Result<()>;
    /// Buffered write at a byte offset.
    ///
    /// # Errors
    /// As pwrite(2).
    fn write(&mut self, path: &Path, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a file durable.
    ///
    /// # Errors
    /// As fsync(2).
    fn fsync(&mut self, path: &Path) -> io::Result<()>;
    /// Makes everything durable.
    ///
    /// # Errors
    /// As syncfs(2).
    fn sync_all(&mut self) -> io::Result<()>;
    /// `dst` becomes a new file, a clone of `src`.
    ///
    /// # Errors
    /// As ioctl_ficlone(2).
    fn reflink(&mut self, src: &Path, dst: &Path) -> io::Result<()>;
    /// Clones a range of bytes into an existing file.
    ///
    /// # Errors
    /// As ioctl_ficlonerange(2).
    fn clone_range(&mut self, src: &Path, from: u64, len: u64, dst: &Path, to: u64) -> io::Result<()>;
    /// Makes a hole.
    ///
    /// # Errors
    /// As fallocate(2).
    fn punch(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()>;
    /// Preallocates; the file grows.
    ///
    /// # Errors
    /// As fallocate(2).
    fn fallocate(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()>;
    /// Sets the size.
    ///
    /// # Errors
    /// As truncate(2).
    fn truncate(&mut self, path: &Path, size: u64) -> io::Result<()>;
    /// Another name.
    ///
    /// # Errors
    /// As link(2).
    fn link(&mut self, old: &Path, new: &Path) -> io::Result<()>;
    /// A new name.
    ///
    /// # Errors
    /// As rename(2).
    fn rename(&mut self, old: &Path, new: &Path) -> io::Result<()>;
    /// A name less.
    ///
    /// # Errors
    /// As unlink(2).
    fn unlink(&mut self, path: &Path) -> io::Result<()>;
    /// Makes exactly these pages (first, count) of an evicted file resident.
    ///
    /// # Errors
    /// As reading.
    fn make_resident(&mut self, path: &Path, first: u64, pages: u64) -> io::Result<()>;
    /// Drops a file's clean pages.
    ///
    /// # Errors
    /// As posix_fadvise(2).
    fn evict(&mut self, path: &Path) -> io::Result<()>;
    /// A snapshot of the working directory's file system tree `of` as `at`.
    ///
    /// # Errors
    /// `Unsupported` without [`Need::Snapshot`].
    fn snapshot(&mut self, _of: &Path, _at: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// A directory that can be snapshotted (a subvolume).
    ///
    /// # Errors
    /// `Unsupported` without [`Need::Snapshot`].
    fn mksubvolume(&mut self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Changes every physical address.
    ///
    /// # Errors
    /// `Unsupported` without [`Need::Relocate`].
    fn relocate(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Begins writeback of a file and leaves it unfinished until the next `fsync`.
    ///
    /// # Errors
    /// `Unsupported` without [`Need::HoldWriteback`].
    fn hold_writeback(&mut self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Makes this user a stranger to a file it can read.
    ///
    /// # Errors
    /// `Unsupported` without [`Need::Unowned`].
    fn disown(&mut self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// All bytes as read(2) gives them.
    ///
    /// # Errors
    /// As read(2).
    fn bytes(&mut self, path: &Path) -> io::Result<Vec<u8>>;
    /// (atime, mtime, ctime) in any unit.
    ///
    /// # Errors
    /// As stat(2).
    fn times(&mut self, path: &Path) -> io::Result<[(i64, i64); 3]>;
}

/// What looking at a file gave.
#[derive(Debug)]
pub struct Look {
    /// Raw facts.
    pub found: Inspection,
    /// Its file system.
    pub fs: FsDescription,
    /// Verdict of the engine's rules.
    pub layout: Layout,
}

impl Look {
    /// Identity of page `page`.
    ///
    /// # Panics
    /// Past EOF.
    #[must_use]
    pub fn page(&self, page: u64) -> Identity {
        let run = self.layout.runs.iter().find(|r| r.start.0 <= page && page < r.start.0 + r.pages.0);
        let run = run.unwrap_or_else(|| panic!("page {page} is past EOF: {:?}", self.layout));
        run.identity.plus(pagefold_engine::units::PageCount(page - run.start.0))
    }

    /// Pages up to EOF.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.layout.runs.iter().map(|r| r.pages.0).sum()
    }
}

/// Looks at one file the way a scan does.
///
/// # Errors
/// As the source.
pub fn look<S: FileSource>(source: &S, root: &Path, path: &Path) -> Result<Look, FsError> {
    let mut here = source.open_root(root)?;
    let name = path.file_name().expect("cases name files");
    for part in path.parent().into_iter().flat_map(Path::components) {
        here = source.open_dir(&here.dir, part.as_os_str())?;
    }
    let fs = source.describe(&here.dir)?;
    let mut found = Inspection::default();
    source.inspect(&here.dir, name, &fs, &mut found)?;
    let layout = judge(&found, &fs, source);
    Ok(Look { found, fs, layout })
}

fn judge<S: FileSource>(found: &Inspection, fs: &FsDescription, source: &S) -> Layout {
    let page = source.page_size();
    if found.moved {
        return Layout::undecided(found.size, page, Undecided::Volatile);
    }
    let cache = match found.dirty_pages {
        Some(0) => CacheState::Clean,
        Some(_) => CacheState::Dirty,
        None => CacheState::Unknown,
    };
    let space = found.class.filter(|_| fs.physical_identity).map(|class| AddressSpace { fs: FsId(0), class });
    let facts = MapFacts { size: found.size, extents: &found.extents, space, cache, page };
    Layout::from_extents(facts).with_holes(&found.holes, page)
}

/// What cases do often, so that they read as what they check.
pub(crate) trait RigExt: Rig {
    /// Creates a file with `data`, synced.
    fn put(&mut self, path: &str, data: &[u8]) {
        let path = Path::new(path);
        self.create(path).expect("create");
        self.write(path, 0, data).expect("write");
        self.fsync(path).expect("fsync");
    }

    /// Looks at a file that must be there.
    fn look(&self, path: &str) -> Look {
        look(self.source(), &self.root(), Path::new(path)).expect("look")
    }
}

impl<R: Rig> RigExt for R {}

/// Whether these two do not claim to be equal. Two undecided pages claim nothing.
pub(crate) fn apart(a: Identity, b: Identity) -> bool {
    !(a.is_decided() && a == b)
}

/// Bytes that do not compress and differ from page to page.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = crate::sim::Rng::new(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(rng.bits().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// One case.
pub struct Case<R> {
    /// Name, unique.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// The case; panics when the rig fails it.
    pub run: fn(&mut R),
}

/// All cases, the most important first.
#[must_use]
pub fn cases<R: Rig>() -> Vec<Case<R>> {
    let mut all = Vec::new();
    all.extend(cache::cases());
    all.extend(sharing::cases());
    all.extend(maps::cases());
    all.extend(files::cases());
    all.extend(random::cases());
    all
}

/// Runs every case the rig can be asked, each in a directory of its own; gives the names of those that ran.
///
/// # Panics
/// With the rig and the case in the message, when one fails.
pub fn run_all<R: Rig>(rig: &mut R) -> Vec<&'static str> {
    let mut ran = Vec::new();
    for case in cases::<R>() {
        if case.needs.iter().any(|n| !rig.has(*n)) {
            continue;
        }
        rig.enter(case.name).expect("a directory for the case");
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (case.run)(rig)));
        if let Err(panic) = outcome {
            eprintln!("conformance case `{}` failed on {}", case.name, rig.name());
            std::panic::resume_unwind(panic);
        }
        ran.push(case.name);
    }
    ran
}
