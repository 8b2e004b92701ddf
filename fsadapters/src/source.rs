//! The seam between a scan and a file system.
//!
//! Invariant: nothing behind [`FileSource`] modifies what it looks at: no write, no sync, no atime where
//! `O_NOATIME` is allowed. What it deliberately does not do: judge. It reports raw extents and cache counts; the
//! engine's rules turn them into identities.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pagefold_engine::identity::DeviceClass;
use pagefold_engine::layout::RawExtent;
use pagefold_engine::units::{PageCount, PageIndex, PageSize};

/// An inode on this running host. `dev` tells inodes apart; it is no identity of the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId {
    /// `st_dev`, or a stand-in where that lies (overlayfs: derived from the real inode).
    pub dev: u64,
    /// `st_ino`, or likewise.
    pub ino: u64,
}

/// What a directory entry is, as far as a scan cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link; never followed.
    Symlink,
    /// FIFO, socket or device: has no page cache of its own to share. Never opened.
    Special(SpecialKind),
    /// The directory did not say; [`FileSource::kind_of`] does.
    Unknown,
}

/// The kinds of special file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpecialKind {
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

/// A file system, found through one of its directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsDescription {
    /// Type name as in `/proc/mounts`: `xfs`, `btrfs`, `overlay`, ...
    pub kind: String,
    /// Identity across mounts and subvolumes; where the file system has no UUID, made from `st_dev` (then it is
    /// unique on the running host only).
    pub uuid: [u8; 16],
    /// Tells two mounted file systems with one UUID apart (an XFS on an LVM snapshot, mounted with `nouuid`): `st_dev`
    /// where a file system has just one; 0 on btrfs, where every subvolume has its own and the kernel admits no two
    /// file systems of one UUID; on overlayfs that of the file system underneath.
    pub instance: u64,
    /// Whether physical addresses of its extent maps may serve as identity. False without FIEMAP.
    pub physical_identity: bool,
    /// Why not, in words, when `physical_identity` is false.
    pub why_not: Option<String>,
}

/// An open directory and what it is.
#[derive(Debug)]
pub struct OpenedDir<D> {
    /// The handle.
    pub dir: D,
    /// The directory's inode; roots given twice and roots inside roots are found by it.
    pub inode: InodeId,
    /// `st_dev`: a change means another file system or subvolume.
    pub dev: u64,
    /// Mount id where the kernel tells (`STATX_MNT_ID`): a change with equal `dev` means a bind mount.
    pub mount: Option<u64>,
}

/// Which pages of a file are in the page cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// None.
    #[default]
    None,
    /// Every page up to EOF.
    All,
    /// These (first page, pages), ascending, not adjacent.
    Runs(Vec<(PageIndex, PageCount)>),
    /// This user may not know (neither owner nor privileged).
    Unknown,
}

/// What [`FileSource::inspect`] found out about one regular file, all of it within one open.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The inode.
    pub inode: InodeId,
    /// Bytes.
    pub size: u64,
    /// Link count.
    pub links: u64,
    /// Change time as (seconds, nanoseconds): told back to the reader to see a file that moved meanwhile.
    pub ctime: (i64, u32),
    /// Extent map up to EOF; empty where there is none to have.
    pub extents: Vec<RawExtent>,
    /// Byte ranges that the file system calls holes, ascending; asked for only where the map can't be trusted.
    pub holes: Vec<std::ops::Range<u64>>,
    /// Which device addresses belong to; `None`: not known, addresses mean nothing.
    pub class: Option<DeviceClass>,
    /// Cache in pages up to EOF: dirty and writeback, before and after the map; `None` where it could not be read.
    pub dirty_pages: Option<u64>,
    /// Which pages are cached.
    pub residency: Residency,
    /// Size, ctime or cache state differed between the first and the last look: the facts may not belong together.
    pub moved: bool,
    /// It is on another file system than its directory, for a file was mounted over it (as container runtimes do with
    /// `/etc/hosts`): addresses of that one would be taken for addresses of this one, so there is no `class`.
    pub foreign: bool,
}

/// Pages of one file to read and hash.
#[derive(Clone, Debug)]
pub struct ReadJob {
    /// Echoed in the outcome.
    pub tag: u64,
    /// Where the file is; no symbolic link on the way to it is followed.
    pub path: PathBuf,
    /// What must be found there; another inode, size or ctime makes the outcome `Moved`.
    pub inode: InodeId,
    /// Expected size in bytes.
    pub size: u64,
    /// Expected change time.
    pub ctime: (i64, u32),
    /// Page ranges, ascending, together at most [`READ_JOB_PAGES_MAX`] pages.
    pub ranges: Vec<(PageIndex, PageCount)>,
    /// The ranges whose pages were all resident when inspected are read through the cache (nothing new comes in).
    pub resident: bool,
}

/// The most pages one [`ReadJob`] may ask for (16 MiB of 4 KiB pages).
pub const READ_JOB_PAGES_MAX: u64 = 4096;

/// BLAKE3 of one page, first 128 bits. A page past EOF is hashed as the cache shows it: zeros after EOF.
pub type PageHash = [u8; 16];

/// How a [`ReadJob`] ended.
#[derive(Debug)]
pub enum ReadOutcome {
    /// Hashes of all pages asked for, in order.
    Hashed {
        /// The job's tag.
        tag: u64,
        /// One a page.
        hashes: Vec<PageHash>,
    },
    /// The file was not the expected one, before or after reading.
    Moved {
        /// The job's tag.
        tag: u64,
    },
    /// It could not be read.
    Failed {
        /// The job's tag.
        tag: u64,
        /// Why.
        error: FsError,
    },
}

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// Reader threads, at least 1.
    pub threads: usize,
    /// Requests in flight per thread, at least 1.
    pub queue_depth: u32,
}

/// The operation of a [`FileSource`] that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FsOp {
    /// Opening a root.
    OpenRoot,
    /// Opening a directory.
    OpenDir,
    /// Listing one.
    ReadDir,
    /// Opening a file.
    Open,
    /// Reading attributes.
    Stat,
    /// Reading the extent map.
    ExtentMap,
    /// Reading the cache state.
    CacheState,
    /// Reading data.
    Read,
}

impl FsOp {
    /// The operation in words.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            FsOp::OpenRoot => "open root",
            FsOp::OpenDir => "open directory",
            FsOp::ReadDir => "list directory",
            FsOp::Open => "open",
            FsOp::Stat => "read attributes",
            FsOp::ExtentMap => "read extent map",
            FsOp::CacheState => "read cache state",
            FsOp::Read => "read data",
        }
    }
}

/// An operation failed. The scan adds the path.
#[derive(Debug, thiserror::Error)]
#[error("can't {}: {source}", op.words())]
pub struct FsError {
    /// What was tried.
    pub op: FsOp,
    /// The errno.
    pub source: io::Error,
}

impl FsError {
    /// `op` failed with `source`.
    pub fn new(op: FsOp, source: impl Into<io::Error>) -> Self {
        FsError { op, source: source.into() }
    }

    /// The thing was gone: removed while the scan ran.
    #[must_use]
    pub fn is_vanished(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// A tree of files whose extent maps and cache state can be asked for.
///
/// All methods may be called from several threads at once. `EINTR` is retried inside; every other errno comes back.
pub trait FileSource: Send + Sync {
    /// An open directory.
    type Dir: Send + Sync;

    /// Page size of the host.
    fn page_size(&self) -> PageSize;

    /// Opens a root. A symbolic link as the last component is followed (the user named it).
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `EACCES`, ...
    fn open_root(&self, path: &Path) -> Result<OpenedDir<Self::Dir>, FsError>;

    /// The path of a root without symbolic links, for [`ReadJob::path`]; `root` itself where that can't be known.
    fn real_path(&self, root: &Path) -> PathBuf {
        root.to_owned()
    }

    /// Opens a subdirectory; never follows a symbolic link.
    ///
    /// # Errors
    /// As the kernel says; `ELOOP` or `ENOTDIR` when the entry changed its kind.
    fn open_dir(&self, parent: &Self::Dir, name: &OsStr) -> Result<OpenedDir<Self::Dir>, FsError>;

    /// Calls `entry` for every entry but `.` and `..`, in the order of the directory.
    ///
    /// # Errors
    /// As the kernel says; entries already told stay told.
    fn read_dir(&self, dir: &Self::Dir, entry: &mut dyn FnMut(&OsStr, EntryKind)) -> Result<(), FsError>;

    /// What an entry is whose kind the directory did not tell.
    ///
    /// # Errors
    /// As the kernel says.
    fn kind_of(&self, dir: &Self::Dir, name: &OsStr) -> Result<EntryKind, FsError>;

    /// The file system that `dir` is on. Asked once per `st_dev`.
    ///
    /// # Errors
    /// As the kernel says.
    fn describe(&self, dir: &Self::Dir) -> Result<FsDescription, FsError>;

    /// Looks at one regular file: attributes, extent map, cache, attributes again. `fs` is what [`Self::describe`]
    /// said for `dir`'s `st_dev`. `found` is overwritten; its buffers are reused.
    ///
    /// # Errors
    /// As the kernel says. An entry that is no regular file (any more) is `EINVAL` with [`FsOp::Open`].
    fn inspect(
        &self,
        dir: &Self::Dir,
        name: &OsStr,
        fs: &FsDescription,
        found: &mut Inspection,
    ) -> Result<(), FsError>;

    /// Reads and hashes pages. `jobs` come in the order in which they should be read (physical address); `done` is
    /// called once a job, from any thread, in any order. Stops early, without outcomes for what is left, once
    /// `cancel` is set.
    fn read(
        &self,
        jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
        options: ReadOptions,
        cancel: &AtomicBool,
        done: &(dyn Fn(ReadOutcome) + Sync),
    );
}
