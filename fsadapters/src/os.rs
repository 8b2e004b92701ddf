//! [`FileSource`] answered by the kernel.
//!
//! Invariant: nothing looked at is modified. Files are opened read-only with `O_NOATIME` where the kernel allows it
//! (mapping a file for `mincore` would touch its atime), never followed through symbolic links, never waited for
//! (`O_NONBLOCK`); what is no regular file just before the open is not opened, and what turns out to be none after it is let go at once. What it deliberately does not do:
//! `FIEMAP_FLAG_SYNC` on a file with dirty pages - a scan does not cause writes.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pagefold_engine::layout::{ExtentFlags, RawExtent};
use pagefold_engine::units::PageSize;
use pagefold_sys::cache::{self, CacheStat};
use pagefold_sys::fiemap::{FiemapError, Sync as MapSync, read_extents};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::fsid::{self, FsFacts};
use crate::overlay::RealFile;
use crate::reader;
use crate::residency;
use crate::source::{
    EntryKind, FileSource, FsDescription, FsError, FsOp, InodeId, Inspection, OpenedDir, ReadJob,
    ReadOptions, ReadOutcome, Residency, SpecialKind,
};
use crate::turnstile::Turnstile;

/// The running kernel's file systems.
#[derive(Debug)]
pub struct Os {
    page: PageSize,
    /// Before extent maps of XFS.
    maps: Turnstile,
}

/// An open directory and its file system.
#[derive(Debug)]
pub struct OsDir {
    fd: OwnedFd,
    dev: u64,
    facts: Arc<FsFacts>,
}

impl Default for Os {
    fn default() -> Self {
        Self::new()
    }
}

impl Os {
    /// The kernel as it is.
    ///
    /// # Panics
    /// When the kernel's page size is no power of two (there is no such kernel).
    #[must_use]
    pub fn new() -> Self {
        let page = PageSize::new(rustix::param::page_size() as u64)
            .expect("the kernel's page size is a power of two");
        Os { page, maps: Turnstile::default() }
    }
}

const DIR_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const FILE_FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Tries with `O_NOATIME`, which only the owner or `CAP_FOWNER` may use.
fn open_quietly(open: impl Fn(OFlags) -> Result<OwnedFd, Errno>, flags: OFlags) -> Result<OwnedFd, Errno> {
    match retry(|| open(flags | OFlags::NOATIME)) {
        Err(Errno::PERM) => retry(|| open(flags)),
        other => other,
    }
}

fn opened(fd: OwnedFd, parent: Option<&OsDir>, op: FsOp) -> Result<OpenedDir<OsDir>, FsError> {
    let stat = retry(|| rustix::fs::fstat(&fd)).map_err(|e| FsError::new(op, e))?;
    let dev = stat.st_dev;
    let facts = match parent.filter(|p| p.dev == dev) {
        Some(parent) => Arc::clone(&parent.facts),
        None => Arc::new(fsid::describe(fd.as_fd())?),
    };
    let inode = InodeId { dev, ino: stat.st_ino };
    Ok(OpenedDir { dir: OsDir { fd, dev, facts }, inode, dev, mount: None })
}

impl FileSource for Os {
    type Dir = OsDir;

    fn page_size(&self) -> PageSize {
        self.page
    }

    fn open_root(&self, path: &Path) -> Result<OpenedDir<OsDir>, FsError> {
        let open = |flags| rustix::fs::open(path, flags, Mode::empty());
        let fd = open_quietly(open, DIR_FLAGS).map_err(|e| FsError::new(FsOp::OpenRoot, e))?;
        opened(fd, None, FsOp::OpenRoot)
    }

    fn real_path(&self, root: &Path) -> PathBuf {
        root.canonicalize().unwrap_or_else(|_| root.to_owned())
    }

    fn open_dir(&self, parent: &OsDir, name: &OsStr) -> Result<OpenedDir<OsDir>, FsError> {
        let open = |flags| rustix::fs::openat(&parent.fd, name, flags, Mode::empty());
        let fd =
            open_quietly(open, DIR_FLAGS | OFlags::NOFOLLOW).map_err(|e| FsError::new(FsOp::OpenDir, e))?;
        opened(fd, Some(parent), FsOp::OpenDir)
    }

    fn read_dir(&self, dir: &OsDir, entry: &mut dyn FnMut(&OsStr, EntryKind)) -> Result<(), FsError> {
        use std::os::unix::ffi::OsStrExt;
        let mut buffer = [MaybeUninit::uninit(); 32 << 10];
        let mut entries = RawDir::new(&dir.fd, &mut buffer);
        while let Some(next) = entries.next() {
            let next = match next {
                Err(Errno::INTR) => continue,
                other => other.map_err(|e| FsError::new(FsOp::ReadDir, e))?,
            };
            let name = next.file_name().to_bytes();
            if name != b"." && name != b".." {
                entry(OsStr::from_bytes(name), kind(next.file_type()));
            }
        }
        Ok(())
    }

    fn kind_of(&self, dir: &OsDir, name: &OsStr) -> Result<EntryKind, FsError> {
        let stat = retry(|| rustix::fs::statat(&dir.fd, name, AtFlags::SYMLINK_NOFOLLOW))
            .map_err(|e| FsError::new(FsOp::Stat, e))?;
        Ok(kind(FileType::from_raw_mode(stat.st_mode)))
    }

    fn describe(&self, dir: &OsDir) -> Result<FsDescription, FsError> {
        Ok(dir.facts.description.clone())
    }

    fn inspect(
        &self,
        dir: &OsDir,
        name: &OsStr,
        _fs: &FsDescription,
        found: &mut Inspection,
    ) -> Result<(), FsError> {
        found.extents.clear();
        found.holes.clear();
        // `Regular` would be sure, and makes a scan a third slower: what takes the name from here to the open, some microseconds, is opened.
        let seen = self.kind_of(dir, name).map_err(|e| FsError::new(FsOp::Open, e.source))?;
        if seen != EntryKind::File {
            return Err(FsError::new(FsOp::Open, Errno::INVAL));
        }
        let open = |flags| rustix::fs::openat(&dir.fd, name, flags, Mode::empty());
        let fd = open_quietly(open, FILE_FLAGS).map_err(|e| match e {
            // A symbolic link or a socket now: no regular file any more.
            Errno::LOOP | Errno::NXIO => FsError::new(FsOp::Open, Errno::INVAL),
            e => FsError::new(FsOp::Open, e),
        })?;
        match &dir.facts.overlay {
            None => self.look(fd.as_fd(), &dir.facts, Some(dir.dev), found),
            Some(overlay) => {
                let real = overlay.real_file(fd.as_fd()).map_err(|e| FsError::new(FsOp::Stat, e))?;
                match real {
                    RealFile::Open(real) => {
                        let below = overlay.layers().unwrap_or(&dir.facts);
                        self.look(real.as_fd(), below, None, found)
                    }
                    RealFile::Named(inode) => {
                        self.look_through(fd.as_fd(), inode, found)?;
                        found.foreign = fsid::is_overlay(fd.as_fd()) == Some(false);
                        Ok(())
                    }
                }
            }
        }
    }

    fn read(
        &self,
        jobs: &mut (dyn Iterator<Item = ReadJob> + Send),
        options: ReadOptions,
        cancel: &AtomicBool,
        done: &(dyn Fn(ReadOutcome) + Sync),
    ) {
        reader::read_jobs(jobs, options, cancel, done);
    }
}

impl Os {
    /// Attributes, cache, map, cache, attributes of a file on a plain file system.
    /// `dir_dev` is the `st_dev` of its directory; without it the file is known to be on the file system of `facts`.
    fn look(
        &self,
        fd: BorrowedFd<'_>,
        facts: &FsFacts,
        dir_dev: Option<u64>,
        found: &mut Inspection,
    ) -> Result<(), FsError> {
        let before = attributes(fd, found)?;
        found.foreign = dir_dev.is_some_and(|dev| dev != before.st_dev && !is_on(fd, facts));
        found.class = if found.foreign { None } else { fsid::device_class(fd, facts.has_realtime) };
        let size = found.size;
        if size == 0 {
            found.dirty_pages = Some(0);
            return Ok(());
        }
        let first = self.count_cached(fd, size)?;
        if facts.description.physical_identity && found.class.is_some() {
            let _turn = (facts.description.kind == "xfs").then(|| self.maps.pass());
            read_map(fd, size, map_sync(facts, first), &mut found.extents)?;
        }
        let second = self.count_cached(fd, size)?;
        found.dirty_pages = match (first, second) {
            (Some(a), Some(b)) => Some((a.nr_dirty + a.nr_writeback).max(b.nr_dirty + b.nr_writeback)),
            _ => None,
        };
        if found.dirty_pages != Some(0) || found.extents.is_empty() {
            holes(fd, size, &mut found.holes);
        }
        found.residency = match second {
            Some(stat) => residency::of_counted(fd, size, stat.nr_cache, self.page)
                .map_err(|e| FsError::new(FsOp::CacheState, e))?,
            None => self.residency_without_counts(fd, size),
        };
        let after = retry(|| rustix::fs::fstat(fd)).map_err(|e| FsError::new(FsOp::Stat, e))?;
        found.moved = stamp(&before) != stamp(&after);
        Ok(())
    }

    /// What can be said of an overlay file whose real inode has only a name: size and residency.
    fn look_through(
        &self,
        fd: BorrowedFd<'_>,
        inode: InodeId,
        found: &mut Inspection,
    ) -> Result<(), FsError> {
        attributes(fd, found)?;
        found.inode = inode;
        found.class = None;
        found.dirty_pages = None;
        holes(fd, found.size, &mut found.holes);
        found.residency = self.residency_without_counts(fd, found.size);
        Ok(())
    }

    /// Cached, dirty and writeback pages up to EOF; `None` where this user or kernel can't tell.
    fn count_cached(&self, fd: BorrowedFd<'_>, size: u64) -> Result<Option<CacheStat>, FsError> {
        let whole_pages = size.checked_next_multiple_of(self.page.bytes()).unwrap_or(0);
        match cache::cachestat(fd, 0, whole_pages) {
            Ok(stat) => Ok(Some(stat)),
            Err(e) if pagefold_sys::is_unsupported(&e) => Ok(None),
            Err(e) if e.raw_os_error() == Some(Errno::PERM.raw_os_error()) => Ok(None),
            Err(e) => Err(FsError::new(FsOp::CacheState, e)),
        }
    }

    fn residency_without_counts(&self, fd: BorrowedFd<'_>, size: u64) -> Residency {
        if size == 0 {
            return Residency::None;
        }
        if !cache::may_know_residency(fd) {
            return Residency::Unknown;
        }
        // A file that can't be mapped (some FUSE files) has a cache that can't be seen.
        residency::by_mincore(fd, size, self.page).unwrap_or(Residency::Unknown)
    }
}

fn attributes(fd: BorrowedFd<'_>, found: &mut Inspection) -> Result<Stat, FsError> {
    let stat = retry(|| rustix::fs::fstat(fd)).map_err(|e| FsError::new(FsOp::Stat, e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(FsError::new(FsOp::Open, Errno::INVAL));
    }
    found.inode = InodeId { dev: stat.st_dev, ino: stat.st_ino };
    found.size = stat.st_size.cast_unsigned();
    found.links = stat.st_nlink;
    found.ctime = (stat.st_ctime, stat.st_ctime_nsec as u32);
    found.residency = Residency::None;
    found.moved = false;
    found.foreign = false;
    Ok(stat)
}

/// Whether a file whose `st_dev` is not its directory's is on that file system all the same (a btrfs subvolume). A file
/// of an overlay over that file system, mounted here, is not: its cache is another inode's.
fn is_on(fd: BorrowedFd<'_>, facts: &FsFacts) -> bool {
    let of = |facts: &FsFacts| (facts.description.uuid, facts.description.instance);
    fsid::describe(fd).is_ok_and(|found| found.overlay.is_none() && of(&found) == of(facts))
}

/// What must not change between two looks.
fn stamp(stat: &Stat) -> (i64, i64, u64, i64, u64) {
    (stat.st_size, stat.st_ctime, stat.st_ctime_nsec, stat.st_mtime, stat.st_mtime_nsec)
}

/// Whether the map must wait for write-back that is over for the cache and not yet for the map. btrfs ends a page's
/// write-back before it inserts the new extent; only a synced map waits for that (`btrfs_fiemap`). It is asked of files
/// that were just seen clean, so that it writes nothing but what somebody dirtied within the last microseconds.
fn map_sync(facts: &FsFacts, first: Option<CacheStat>) -> MapSync {
    let clean = first.is_some_and(|c| c.nr_dirty + c.nr_writeback == 0);
    if clean && facts.description.kind == "btrfs" { MapSync::Yes } else { MapSync::No }
}

fn read_map(
    fd: BorrowedFd<'_>,
    size: u64,
    sync: MapSync,
    extents: &mut Vec<RawExtent>,
) -> Result<(), FsError> {
    let read = read_extents(fd, size, sync, |e| {
        let flags = ExtentFlags::from_bits_retain(e.flags);
        extents.push(RawExtent { logical: e.logical, physical: e.physical, length: e.length, flags });
    });
    read.map_err(|e: FiemapError| FsError::new(FsOp::ExtentMap, e))
}

/// The most holes asked for in one file; what comes after counts as data.
const HOLES_MAX: usize = 1 << 16;

/// Where the file system says there are holes. Unlike the map, `SEEK_HOLE` looks at the cache. A file system that can't
/// tell says that all is data; an error ends the list, which then only says less.
fn holes(fd: BorrowedFd<'_>, size: u64, holes: &mut Vec<std::ops::Range<u64>>) {
    use rustix::fs::{SeekFrom, seek};
    let mut at = 0;
    while at < size && holes.len() < HOLES_MAX {
        let data = match seek(fd, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            Err(_) => return,
        };
        if data > at {
            holes.push(at..data);
        }
        if data >= size {
            return;
        }
        match seek(fd, SeekFrom::Hole(data)) {
            Ok(hole) if hole > data => at = hole,
            _ => return,
        }
    }
}

fn kind(file_type: FileType) -> EntryKind {
    match file_type {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Dir,
        FileType::Symlink => EntryKind::Symlink,
        FileType::Fifo => EntryKind::Special(SpecialKind::Fifo),
        FileType::Socket => EntryKind::Special(SpecialKind::Socket),
        FileType::CharacterDevice => EntryKind::Special(SpecialKind::CharDevice),
        FileType::BlockDevice => EntryKind::Special(SpecialKind::BlockDevice),
        FileType::Unknown => EntryKind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The directory said that it is a file; it was replaced before it was opened.
    #[test]
    fn what_took_the_place_of_a_file_is_not_opened() {
        use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
        let home = tempfile::tempdir().unwrap();
        let pipe = home.path().join("f");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let watch = init(CreateFlags::NONBLOCK).unwrap();
        add_watch(&watch, &pipe, WatchFlags::OPEN).unwrap();
        let os = Os::new();
        let dir = os.open_root(home.path()).unwrap().dir;
        let fs = os.describe(&dir).unwrap();
        let error = os.inspect(&dir, OsStr::new("f"), &fs, &mut Inspection::default()).unwrap_err();
        assert_eq!((error.op, error.source.raw_os_error()), (FsOp::Open, Some(Errno::INVAL.raw_os_error())));
        assert_eq!(rustix::io::read(&watch, &mut [0; 512]), Err(Errno::AGAIN), "it was opened");
    }
}
