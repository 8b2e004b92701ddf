//! What a scan remembers of each file, in as few bytes as it can: 40 and the name.
//!
//! Paths are kept as (directory, name) and made only for what a report names. Names of all files lie in one buffer, the
//! length before each (two bytes: vfat, ntfs and FUSE have names of more than 255 bytes).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pagefold_engine::share_map::{Cached, LayoutId};
use pagefold_engine::units::RootId;

/// A directory's number in the [`DirTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DirId(pub u32);

#[derive(Debug)]
struct DirRecord {
    parent: Option<DirId>,
    root: RootId,
    name: u64,
}

/// All directories that hold files or directories.
#[derive(Debug, Default)]
pub(crate) struct DirTable {
    dirs: Vec<DirRecord>,
    names: NameBuffer,
    roots: Vec<PathBuf>,
}

impl DirTable {
    pub fn new(roots: Vec<PathBuf>) -> Self {
        DirTable { roots, ..Self::default() }
    }

    pub fn add_root(&mut self, root: RootId) -> DirId {
        self.push(None, root, OsStr::new(""))
    }

    pub fn add(&mut self, parent: DirId, name: &OsStr) -> DirId {
        let root = self.root_of(parent);
        self.push(Some(parent), root, name)
    }

    fn push(&mut self, parent: Option<DirId>, root: RootId, name: &OsStr) -> DirId {
        let id = u32::try_from(self.dirs.len()).expect("fewer than 2^32 directories");
        self.dirs.push(DirRecord { parent, root, name: self.names.add(name) });
        DirId(id)
    }

    pub fn root_of(&self, dir: DirId) -> RootId {
        self.dirs[dir.0 as usize].root
    }

    /// The directory's path below its root; empty for the root itself.
    pub fn relative(&self, dir: DirId) -> PathBuf {
        let mut names = Vec::new();
        let mut at = dir;
        while let Some(parent) = self.dirs[at.0 as usize].parent {
            names.push(self.names.get(self.dirs[at.0 as usize].name));
            at = parent;
        }
        names.iter().rev().collect()
    }

    /// The roots as the user gave them.
    pub fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// The directory's path with its root as the user gave it.
    pub fn path(&self, dir: DirId) -> PathBuf {
        self.path_from(&self.roots, dir)
    }

    /// The directory's path where its root is the one of `roots`.
    pub fn path_from(&self, roots: &[PathBuf], dir: DirId) -> PathBuf {
        let root: &Path = &roots[self.root_of(dir).0 as usize];
        let below = self.relative(dir);
        if below.as_os_str().is_empty() { root.to_path_buf() } else { root.join(below) }
    }
}

/// Names, each with its length before it.
#[derive(Debug, Default)]
pub(crate) struct NameBuffer {
    bytes: Vec<u8>,
}

impl NameBuffer {
    /// Keeps `name` and returns where. The kernel's own limit for a listed name is far below 64 KiB.
    pub fn add(&mut self, name: &OsStr) -> u64 {
        let bytes = &name.as_bytes()[..name.len().min(usize::from(u16::MAX))];
        let at = self.bytes.len() as u64;
        self.bytes.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        self.bytes.extend_from_slice(bytes);
        at
    }

    pub fn get(&self, at: u64) -> &OsStr {
        let at = at as usize;
        let len = usize::from(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]));
        OsStr::from_bytes(&self.bytes[at + 2..at + 2 + len])
    }

    /// Appends all of `other`; what was at `x` there is at `x` plus the result here.
    fn append(&mut self, other: &NameBuffer) -> u64 {
        let base = self.bytes.len() as u64;
        self.bytes.extend_from_slice(&other.bytes);
        base
    }
}

/// One name of one regular file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileRecord {
    pub ino: u64,
    /// Change time in nanoseconds since 1970, saturating.
    pub ctime_ns: i64,
    pub name: u64,
    pub dev: u32,
    pub dir: DirId,
    pub layout: LayoutId,
    /// See [`FileTable::cached`].
    cached: u32,
}

const CACHED_NONE: u32 = u32::MAX;
const CACHED_ALL: u32 = u32::MAX - 1;
const CACHED_UNKNOWN: u32 = u32::MAX - 2;

type PageRuns = Box<[(pagefold_engine::units::PageIndex, pagefold_engine::units::PageCount)]>;

/// Files in the order in which they were found; one per worker, appended at the end.
#[derive(Debug, Default)]
pub(crate) struct FileTable {
    pub files: Vec<FileRecord>,
    names: NameBuffer,
    partial: Vec<PageRuns>,
}

/// What a new record says besides its name and cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewFile {
    pub ino: u64,
    pub ctime_ns: i64,
    pub dev: u32,
    pub dir: DirId,
    pub layout: LayoutId,
}

/// How much of a new file is cached.
#[derive(Debug)]
pub(crate) enum NewCached {
    None,
    All,
    Unknown,
    Runs(PageRuns),
}

impl FileTable {
    pub fn add(&mut self, name: &OsStr, file: NewFile, cached: NewCached) {
        let cached = match cached {
            NewCached::None => CACHED_NONE,
            NewCached::All => CACHED_ALL,
            NewCached::Unknown => CACHED_UNKNOWN,
            NewCached::Runs(runs) => {
                self.partial.push(runs);
                u32::try_from(self.partial.len() - 1).expect("fewer than 2^32 partly cached files")
            }
        };
        let NewFile { ino, ctime_ns, dev, dir, layout } = file;
        let name = self.names.add(name);
        self.files.push(FileRecord { ino, ctime_ns, name, dev, dir, layout, cached });
    }

    pub fn append(&mut self, mut other: FileTable) {
        if self.files.is_empty() {
            *self = other;
            return;
        }
        let names = self.names.append(&other.names);
        let partial = self.partial.len() as u32;
        self.partial.append(&mut other.partial);
        self.files.reserve_exact(other.files.len());
        self.files.extend(other.files.iter().map(|f| FileRecord {
            name: f.name + names,
            cached: if f.cached < CACHED_UNKNOWN { f.cached + partial } else { f.cached },
            ..*f
        }));
    }

    pub fn name(&self, file: &FileRecord) -> &OsStr {
        self.names.get(file.name)
    }

    /// What the engine's map wants; `Partial` numbers are those of [`Self::take_partial`].
    pub fn cached(file: &FileRecord) -> Cached {
        match file.cached {
            CACHED_NONE => Cached::None,
            CACHED_ALL => Cached::All,
            CACHED_UNKNOWN => Cached::Unknown,
            at => Cached::Partial(at),
        }
    }

    /// The runs of partly cached files, to be moved into the engine's map in this order.
    pub fn take_partial(&mut self) -> Vec<PageRuns> {
        std::mem::take(&mut self.partial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_back() {
        let mut dirs = DirTable::new(vec!["/a".into(), "b/".into()]);
        let (a, b) = (dirs.add_root(RootId(0)), dirs.add_root(RootId(1)));
        let usr = dirs.add(b, OsStr::new("usr"));
        let bin = dirs.add(usr, OsStr::from_bytes(b"b\xffn"));
        assert_eq!(dirs.path(a), Path::new("/a"));
        assert_eq!(dirs.path(bin), Path::new(OsStr::from_bytes(b"b/usr/b\xffn")));
        assert_eq!(dirs.relative(bin), Path::new(OsStr::from_bytes(b"usr/b\xffn")));
        assert_eq!(dirs.root_of(bin), RootId(1));
    }

    #[test]
    fn a_record_is_forty_bytes() {
        assert_eq!(size_of::<FileRecord>(), 40);
    }

    #[test]
    fn appended_tables_keep_names_and_runs() {
        use pagefold_engine::units::{PageCount, PageIndex};
        let new = NewFile { ino: 1, ctime_ns: 0, dev: 0, dir: DirId(0), layout: LayoutId(0) };
        let runs = |n| NewCached::Runs(vec![(PageIndex(n), PageCount(1))].into_boxed_slice());
        let mut one = FileTable::default();
        one.add(OsStr::new("x"), new, runs(1));
        let mut two = FileTable::default();
        two.add(OsStr::new("yy"), new, NewCached::All);
        two.add(OsStr::new("zzz"), new, runs(2));
        one.append(two);
        let names: Vec<_> = one.files.iter().map(|f| one.name(f).to_owned()).collect();
        assert_eq!(names, ["x", "yy", "zzz"]);
        let cached: Vec<_> = one.files.iter().map(FileTable::cached).collect();
        assert_eq!(cached, [Cached::Partial(0), Cached::All, Cached::Partial(1)]);
        assert_eq!(one.take_partial()[1][0].0, PageIndex(2));
    }
}
