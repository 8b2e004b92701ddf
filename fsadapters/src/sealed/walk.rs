//! Walks roots and gathers everything that a view shows: names, metadata, attributes, devices, links; and what somebody else
//! finds out about each file's data (see [`FileLook`]).
//!
//! Invariant: nothing is followed and nothing is crossed. Every name is opened relative to its directory with
//! `RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS`, so a mount inside of a root, a nested btrfs subvolume or a link swapped in while we walk can't
//! lead anywhere else; what a view could not show is a [`WalkError`] with its path, and the root has no [`Sketch`]. Pipes, sockets and devices are never opened but with
//! `O_PATH`, nor is what takes a file's name before its turn comes. What it deliberately does not do: leave out what it could not read. A view must show all of a root; only
//! what vanished is not there.
//!
//! A root may be written meanwhile. A directory whose change time moved while its files were looked at is listed and looked at once
//! more, then told ([`Sketch::unsettled`]).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::refuse::DEPTH_MAX;
use super::tree::{Inode, Meta, RawFacts, Tree};
use crate::reflink::ReflinkError;
use crate::scan::Progress;
use crate::scan::queue::TaskStack;
use crate::store::StoreError;

mod assemble;
mod previous;
mod worker;

pub use previous::{Model, Previous};

/// What is found out about regular files, from several threads.
pub trait FileLook: Sync {
    /// What was found out.
    type Found: Send;
    /// Buffers of a thread.
    type Scratch: Default;

    /// Looks at an open regular file. Returns its attributes as they were when its data was looked at.
    ///
    /// # Errors
    /// What makes the root one that can't be sealed.
    fn look(&self, file: FileAt<'_>, scratch: &mut Self::Scratch) -> Result<(Stat, Self::Found), WalkError>;
}

/// A regular file that the walk came to.
#[derive(Clone, Copy)]
pub struct FileAt<'a> {
    /// Index of its root among those walked.
    pub root: usize,
    /// Open for reading.
    pub fd: BorrowedFd<'a>,
    /// Its attributes just after it was opened.
    pub stat: &'a Stat,
    /// The file of this name when the root was sealed last.
    pub previous: Option<&'a Inode>,
    /// What the model has under this name: which anchor to try first, and proof of nothing.
    pub guess: Option<&'a Inode>,
}

/// A root to walk.
#[derive(Debug)]
pub struct WalkRoot {
    /// The directory, open for reading.
    pub fd: OwnedFd,
    /// For messages.
    pub path: PathBuf,
    /// How it was when sealed last.
    pub previous: Option<Previous>,
    /// A directory that must not be found inside: the store's (device, inode).
    pub avoid: Option<(u64, u64)>,
}

/// A walked root: the tree, with all data still [`Data::Empty`](super::tree::Data::Empty), and what was found out about each file's data.
#[derive(Debug)]
pub struct Sketch<F> {
    /// Names and metadata; breadth first, so that the entries of a directory stand together.
    pub tree: Tree,
    /// For each inode of the tree what [`FileLook::look`] said: some for files, none for all else.
    pub found: Vec<Option<F>>,
    /// Directories that changed while they were looked at, twice.
    pub unsettled: Vec<PathBuf>,
}

/// Why a root can't be walked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// A system call failed.
    #[error("can't {op} {path:?}: {source}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Which entry, below the root.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// A view could not show it.
    #[error("{path:?}: {why}")]
    Refused {
        /// Which entry, below the root.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// The kernel would not clone a file.
    #[error("can't make an anchor of {path:?}: {source}{}", clone_hint(source))]
    Clone {
        /// Which file, below the root.
        path: PathBuf,
        /// Why.
        source: ReflinkError,
    },
    /// The store failed.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// [`Progress::cancel`].
    #[error("interrupted")]
    Cancelled,
}

impl From<StoreError> for WalkError {
    fn from(error: StoreError) -> Self {
        WalkError::Store(Box::new(error))
    }
}

fn clone_hint(error: &ReflinkError) -> &'static str {
    let errno = match error {
        ReflinkError::NotPermitted(e) | ReflinkError::Io(e) => e.raw_os_error().map(Errno::from_raw_os_error),
        _ => None,
    };
    match errno {
        Some(Errno::TXTBSY) => ". A swap file in use can't be sealed: swapoff, or move it out of the root",
        Some(Errno::NOSPC | Errno::DQUOT) => ". Make room on the file system",
        _ => "",
    }
}

impl WalkError {
    /// An error of the file that is just being looked at; the walk adds its path.
    pub(crate) fn here(op: &'static str, source: impl Into<io::Error>) -> WalkError {
        WalkError::Io { op, path: PathBuf::new(), source: source.into() }
    }

    /// The same.
    pub(crate) fn clone(source: ReflinkError) -> WalkError {
        WalkError::Clone { path: PathBuf::new(), source }
    }

    pub(crate) fn at(self, at: PathBuf) -> WalkError {
        match self {
            WalkError::Clone { source, .. } => WalkError::Clone { path: at, source },
            WalkError::Store(error) => WalkError::Store(error),
            WalkError::Io { op, source, .. } => WalkError::Io { op, path: at, source },
            WalkError::Refused { why, .. } => WalkError::Refused { path: at, why },
            WalkError::Cancelled => WalkError::Cancelled,
        }
    }
}

/// Walks `roots` with `threads` threads, with `model` at hand for guesses. One result a root, in order.
///
/// # Panics
/// When `look` does.
pub fn walk<L: FileLook>(
    roots: &[WalkRoot],
    model: Option<&Model<'_>>,
    look: &L,
    threads: usize,
    progress: &Progress,
) -> Vec<Result<Sketch<L::Found>, WalkError>> {
    let tasks = (0..roots.len()).rev().map(Task::Root).collect();
    let failed = roots.iter().map(|_| AtomicBool::new(false)).collect();
    let shared = Shared {
        roots,
        model,
        look,
        progress,
        tasks: TaskStack::new(tasks),
        next: AtomicU32::new(0),
        failed,
    };
    let mut gathered = assemble::Gathered::new(roots.len());
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads.max(1)).map(|_| scope.spawn(|| worker::Worker::new(&shared).run())).collect();
        for worker in workers {
            gathered.take(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    if progress.is_cancelled() {
        return roots.iter().map(|_| Err(WalkError::Cancelled)).collect();
    }
    gathered.into_sketches(threads.min(roots.len()))
}

/// What the threads have in common.
struct Shared<'a, L> {
    roots: &'a [WalkRoot],
    model: Option<&'a Model<'a>>,
    look: &'a L,
    progress: &'a Progress,
    tasks: TaskStack<Task>,
    /// Numbers of listings.
    next: AtomicU32,
    /// Roots that can't be sealed any more: nothing else of them is looked at.
    failed: Vec<AtomicBool>,
}

impl<L> Shared<'_, L> {
    fn number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// A listed directory.
struct Node {
    fd: OwnedFd,
    root: usize,
    /// Of this listing. A directory listed again has a new one, and what was found under the old one is forgotten.
    number: u32,
    /// Where it hangs; `None` for a root.
    parent: Option<u32>,
    name: Box<[u8]>,
    depth: usize,
    /// Below the root, for messages.
    path: PathBuf,
    /// The directory of this name when the root was sealed last.
    previous: Option<super::tree::EntryId>,
    /// The model's directory of this path.
    guess: Option<super::tree::EntryId>,
    again: bool,
    /// Change time before it was listed.
    ctime: (i64, u64),
    /// Groups of files not yet looked at.
    left: AtomicU32,
}

enum Task {
    Root(usize),
    Dir(Arc<Node>, Box<[u8]>),
    Files(Arc<Node>, Vec<Listed>),
}

/// A name and what the directory says it is.
type Listed = (Box<[u8]>, FileType);

/// A thing found in a directory.
struct Child<F> {
    name: Box<[u8]>,
    inode: Inode,
    found: Option<F>,
}

/// What one thread found.
struct Haul<F> {
    /// Listings: root, number, parent, the directory itself.
    dirs: Vec<(usize, u32, Option<u32>, Child<F>)>,
    /// Root, number of the listing, things in it.
    children: Vec<(usize, u32, Vec<Child<F>>)>,
    unsettled: Vec<(usize, u32, PathBuf)>,
    errors: Vec<(usize, WalkError)>,
}

const RESOLVE: ResolveFlags = ResolveFlags::NO_XDEV.union(ResolveFlags::NO_SYMLINKS);

/// Opens `name` in `dir` without crossing or following; without touching its access time where that is allowed.
pub(crate) fn open_in(dir: BorrowedFd<'_>, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let open =
        |flags| rustix::io::retry_on_intr(|| rustix::fs::openat2(dir, name, flags, Mode::empty(), RESOLVE));
    if flags.contains(OFlags::PATH) {
        return open(flags);
    }
    match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags),
        other => other,
    }
}

/// Opens a regular file for reading, as [`open_in`] does, with its attributes; `None` for what is something else by now.
fn open_regular(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    give_up: impl Fn() -> bool,
) -> Result<Option<(OwnedFd, Stat)>, Errno> {
    // `Regular` would be sure, and costs as much as opening does: what takes the name from here to the open, some microseconds, is opened.
    let seen = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if !is_regular(&seen) {
        // Or mounted there, which is no file that is gone.
        return open_in(dir, name, OFlags::PATH).map(|_| None);
    }
    let open = || open_in(dir, name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY);
    let mut left = LEASE_WAIT;
    loop {
        match open() {
            // Somebody has a lease on it, and was just asked to give it up.
            Err(Errno::AGAIN) if !left.is_zero() && !give_up() => {
                std::thread::sleep(LEASE_PAUSE);
                left = left.saturating_sub(LEASE_PAUSE);
            }
            Err(e) => return Err(e),
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd)?;
                return Ok(is_regular(&stat).then_some((fd, stat)));
            }
        }
    }
}

fn is_regular(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

/// How long whoever has a lease on a file is waited for. The kernel takes it away after `/proc/sys/fs/lease-break-time` (45 s): too
/// long for each of many files.
const LEASE_WAIT: Duration = Duration::from_secs(1);
const LEASE_PAUSE: Duration = Duration::from_millis(5);

/// Metadata as a view shows it.
pub(crate) fn meta(stat: &Stat, xattrs: Vec<super::tree::Xattr>) -> Meta {
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        xattrs,
    }
}

/// What the raw inode is.
pub(crate) fn raw_facts(stat: &Stat) -> RawFacts {
    RawFacts {
        ino: stat.st_ino,
        ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
        size: stat.st_size.cast_unsigned(),
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        signature: None,
    }
}

/// A name below `path`.
fn below(path: &Path, name: &[u8]) -> PathBuf {
    path.join(OsStr::from_bytes(name))
}
