//! Parallel walk: from roots to file records with interned layouts.
//!
//! Each file is looked at once ([`FileSource::inspect`]); one that moved meanwhile is looked at once more and then
//! reported. The order in which files are found depends on timing, so nothing that a report shows may depend on it.
//! Symbolic links are not followed; special files are not opened.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use dashmap::DashMap;
use globset::GlobSet;
use pagefold_engine::identity::{AddressSpace, Undecided};
use pagefold_engine::layout::{CacheState, Layout, MapFacts};
use pagefold_engine::share_map::LayoutId;
use pagefold_engine::units::{FsId, PageSize, RootId};
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::scan::filesystems::{Filesystems, KnownFs};
use crate::scan::notes::Notes;
use crate::scan::progress::Progress;
use crate::scan::queue::TaskStack;
use crate::scan::table::{DirId, DirTable, FileTable, NewCached, NewFile};
use crate::source::{
    EntryKind, FileSource, FsError, FsOp, InodeId, Inspection, OpenedDir, Residency, SpecialKind,
};

/// Files of one directory that one worker looks at in one go; the rest is left for others.
const FILES_PER_TASK: usize = 512;

/// File systems whose files are made up when they are read (`/proc/kcore` is one of 128 TiB), some with side effects.
const NO_PAGE_CACHE: [&str; 15] = [
    "proc",
    "sysfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "bpf",
    "pstore",
    "efivarfs",
    "devpts",
    "mqueue",
    "fusectl",
    "binfmt_misc",
];

/// What to walk and how.
#[derive(Debug)]
pub(crate) struct WalkPlan<'a> {
    pub roots: Vec<PathBuf>,
    /// Inodes of all roots, to stop at a root within a root.
    pub root_inodes: FxHashMap<InodeId, RootId>,
    pub exclude: Option<&'a GlobSet>,
    pub one_file_system: bool,
    pub threads: usize,
    /// Whether undecided pages will be read: then a file system without extent maps is no loss.
    pub content: bool,
}

/// What a walk found.
#[derive(Debug)]
pub(crate) struct Walked {
    pub dirs: DirTable,
    pub files: FileTable,
    pub layouts: Vec<Arc<Layout>>,
    /// `st_dev` by the records' device number.
    pub devs: Vec<u64>,
    pub notes: Notes,
}

/// An open directory of the walk.
struct Node<D> {
    dir: D,
    id: DirId,
    fs: Arc<KnownFs>,
    dev: u64,
    root: RootId,
    root_fs: FsId,
}

enum Task<D> {
    Root(RootId),
    Dir(Arc<Node<D>>, OsString),
    Files(Arc<Node<D>>, Vec<OsString>),
}

struct Shared<'a, S: FileSource> {
    source: &'a S,
    plan: &'a WalkPlan<'a>,
    progress: &'a Progress,
    page: PageSize,
    tasks: TaskStack<Task<S::Dir>>,
    dirs: Mutex<DirTable>,
    filesystems: Filesystems,
    layouts: LayoutTable,
    /// (root, file system) without extent maps that were already noted.
    noted: Mutex<Vec<(RootId, FsId)>>,
}

/// Walks all roots of `plan`.
pub(crate) fn walk<S: FileSource>(source: &S, plan: &WalkPlan<'_>, progress: &Progress) -> Walked {
    // Taken from the end: the first root first.
    let tasks = (0..plan.roots.len() as u32).rev().map(|r| Task::Root(RootId(r))).collect();
    Progress::add(&progress.dirs_found, plan.roots.len() as u64);
    let shared = Shared {
        source,
        plan,
        progress,
        page: source.page_size(),
        tasks: TaskStack::new(tasks),
        dirs: Mutex::new(DirTable::new(plan.roots.clone())),
        filesystems: Filesystems::default(),
        layouts: LayoutTable::default(),
        noted: Mutex::default(),
    };
    let (mut files, mut notes) = (FileTable::default(), Notes::default());
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..plan.threads.max(1)).map(|_| scope.spawn(|| Worker::new(&shared).run())).collect();
        for worker in workers {
            let (found, noted) = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            files.append(found);
            notes.append(noted);
        }
    });
    Walked {
        dirs: shared.dirs.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner),
        files,
        layouts: shared.layouts.into_vec(),
        devs: shared.filesystems.into_devs(),
        notes,
    }
}

struct Worker<'a, S: FileSource> {
    shared: &'a Shared<'a, S>,
    files: FileTable,
    notes: Notes,
    found: Inspection,
    more: Vec<Task<S::Dir>>,
    /// The device number last used: a directory's files are nearly always on one device.
    last_dev: Option<(u64, u32)>,
}

impl<'a, S: FileSource> Worker<'a, S> {
    fn new(shared: &'a Shared<'a, S>) -> Self {
        Worker {
            shared,
            files: FileTable::default(),
            notes: Notes::default(),
            found: Inspection::default(),
            more: Vec::new(),
            last_dev: None,
        }
    }

    fn run(mut self) -> (FileTable, Notes) {
        let shared = self.shared;
        let cancelled = || shared.progress.is_cancelled();
        shared.tasks.work(cancelled, |task, more| {
            self.task(task);
            more.append(&mut self.more);
        });
        (self.files, self.notes)
    }

    fn task(&mut self, task: Task<S::Dir>) {
        let shared = self.shared;
        match task {
            Task::Root(root) => {
                let path = shared.plan.roots[root.0 as usize].clone();
                match shared.source.open_root(&path) {
                    Ok(opened) => self.enter(opened, None, root, OsStr::new("")),
                    Err(error) => self.notes.errors.add(path, error.to_string()),
                }
                Progress::add(&shared.progress.dirs_done, 1);
            }
            Task::Dir(parent, name) => {
                match shared.source.open_dir(&parent.dir, &name) {
                    Ok(opened) => self.enter(opened, Some(&parent), parent.root, &name),
                    Err(error) => self.dir_failed(&parent, &name, &error),
                }
                Progress::add(&shared.progress.dirs_done, 1);
            }
            Task::Files(node, names) => self.look_at(&node, &names),
        }
    }

    /// Lists an opened directory, unless it is not to be entered.
    fn enter(
        &mut self,
        opened: OpenedDir<S::Dir>,
        parent: Option<&Node<S::Dir>>,
        root: RootId,
        name: &OsStr,
    ) {
        let shared = self.shared;
        if let Some(other) = shared.plan.root_inodes.get(&opened.inode)
            && (parent.is_some() || *other != root)
        {
            let path = self.path_of(parent, root, name);
            self.notes.skipped.add(path, "is one of the roots itself: counted there");
            return;
        }
        let fs = match parent.filter(|p| p.dev == opened.dev) {
            Some(parent) => Arc::clone(&parent.fs),
            None => match shared.filesystems.of(shared.source, opened.dev, &opened.dir) {
                Ok(fs) => fs,
                Err(error) => {
                    let path = self.path_of(parent, root, name);
                    return self.notes.errors.add(path, error.to_string());
                }
            },
        };
        if NO_PAGE_CACHE.contains(&fs.description.kind.as_str()) {
            let path = self.path_of(parent, root, name);
            let text = format!("{}: shows kernel state, has no page cache", fs.description.kind);
            return self.notes.skipped.add(path, text);
        }
        // By file system, not by st_dev: a btrfs subvolume has its own st_dev on the same file system.
        if let Some(parent) = parent
            && shared.plan.one_file_system
            && fs.id != parent.root_fs
        {
            let path = self.path_of(Some(parent), root, name);
            let text = format!("on another file system ({}): see --one-file-system", fs.description.kind);
            return self.notes.skipped.add(path, text);
        }
        let id = {
            let mut dirs = shared.dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match parent {
                None => dirs.add_root(root),
                Some(parent) => dirs.add(parent.id, name),
            }
        };
        let root_fs = parent.map_or(fs.id, |p| p.root_fs);
        let node = Node { dir: opened.dir, id, fs, dev: opened.dev, root, root_fs };
        self.list(&Arc::new(node));
    }

    fn list(&mut self, node: &Arc<Node<S::Dir>>) {
        let shared = self.shared;
        let (mut dirs, mut files, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        let mut specials = Vec::new();
        let listed = shared.source.read_dir(&node.dir, &mut |name, kind| match kind {
            EntryKind::File => files.push(name.to_owned()),
            EntryKind::Dir => dirs.push(name.to_owned()),
            EntryKind::Symlink => {}
            EntryKind::Special(kind) => specials.push((name.to_owned(), kind)),
            EntryKind::Unknown => unknown.push(name.to_owned()),
        });
        if let Err(error) = listed {
            let path = self.dir_path(node);
            self.notes.errors.add(path, error.to_string());
        }
        for name in unknown {
            match shared.source.kind_of(&node.dir, &name) {
                Ok(EntryKind::File) => files.push(name),
                Ok(EntryKind::Dir) => dirs.push(name),
                Ok(EntryKind::Special(kind)) => specials.push((name, kind)),
                Ok(EntryKind::Symlink | EntryKind::Unknown) => {}
                Err(error) => self.file_failed(node, &name, &error),
            }
        }
        if shared.plan.exclude.is_some() {
            self.apply_excludes(node, &mut dirs, &mut files, &mut specials);
        }
        for (name, kind) in specials {
            let path = self.dir_path(node).join(name);
            self.notes.skipped.add(path, special_words(kind));
        }
        Progress::add(&shared.progress.dirs_found, dirs.len() as u64);
        self.more.extend(dirs.into_iter().map(|name| Task::Dir(Arc::clone(node), name)));
        while files.len() > FILES_PER_TASK {
            let rest = files.split_off(files.len() - FILES_PER_TASK);
            self.more.push(Task::Files(Arc::clone(node), rest));
        }
        self.look_at(node, &files);
    }

    fn apply_excludes(
        &self,
        node: &Node<S::Dir>,
        dirs: &mut Vec<OsString>,
        files: &mut Vec<OsString>,
        specials: &mut Vec<(OsString, SpecialKind)>,
    ) {
        let Some(globs) = self.shared.plan.exclude else { return };
        let below = {
            let table = self.shared.dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            table.relative(node.id)
        };
        let keep = |name: &OsString| !globs.is_match(below.join(name));
        dirs.retain(keep);
        files.retain(keep);
        specials.retain(|(name, _)| keep(name));
    }

    fn look_at(&mut self, node: &Arc<Node<S::Dir>>, names: &[OsString]) {
        if names.is_empty() {
            return;
        }
        self.note_missing_maps(node);
        let mut counted = 0;
        for name in names {
            if self.shared.progress.is_cancelled() {
                break;
            }
            self.file(node, name);
            counted += 1;
        }
        Progress::add(&self.shared.progress.files, counted);
    }

    fn file(&mut self, node: &Node<S::Dir>, name: &OsStr) {
        let shared = self.shared;
        let mut found = std::mem::take(&mut self.found);
        let mut result = shared.source.inspect(&node.dir, name, &node.fs.description, &mut found);
        if result.is_ok() && found.moved {
            result = shared.source.inspect(&node.dir, name, &node.fs.description, &mut found);
        }
        match result {
            Ok(()) if found.foreign && shared.plan.one_file_system => {
                let path = self.dir_path(node).join(name);
                self.notes
                    .skipped
                    .add(path, "a file mounted from another file system: see --one-file-system");
            }
            Ok(()) => self.record(node, name, &mut found),
            Err(error) => self.file_failed(node, name, &error),
        }
        self.found = found;
    }

    fn record(&mut self, node: &Node<S::Dir>, name: &OsStr, found: &mut Inspection) {
        if found.moved {
            let path = self.dir_path(node).join(name);
            self.notes.errors.add(path, "changed while scanned, twice: counted as undecided");
        }
        let layout = judge(found, &node.fs, self.shared.page);
        let file = NewFile {
            ino: found.inode.ino,
            ctime_ns: ctime_ns(found.ctime),
            dev: self.dev_number(found.inode.dev),
            dir: node.id,
            layout: self.shared.layouts.intern(layout),
        };
        let cached = match std::mem::take(&mut found.residency) {
            Residency::None => NewCached::None,
            Residency::All => NewCached::All,
            Residency::Unknown => NewCached::Unknown,
            Residency::Runs(runs) => NewCached::Runs(runs.into_boxed_slice()),
        };
        self.files.add(name, file, cached);
    }

    fn dev_number(&mut self, dev: u64) -> u32 {
        match self.last_dev {
            Some((last, number)) if last == dev => number,
            _ => {
                let number = self.shared.filesystems.dev_number(dev);
                self.last_dev = Some((dev, number));
                number
            }
        }
    }

    /// Once per root and file system: its extents can't decide anything.
    fn note_missing_maps(&mut self, node: &Node<S::Dir>) {
        let description = &node.fs.description;
        if description.physical_identity || self.shared.plan.content {
            return;
        }
        let mut noted = self.shared.noted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if noted.contains(&(node.root, node.fs.id)) {
            return;
        }
        noted.push((node.root, node.fs.id));
        drop(noted);
        let why = description.why_not.as_deref().unwrap_or("its extent maps say nothing about identity");
        let text =
            format!("{}: {why}; files here are undecided: use --content to read them", description.kind);
        // Named by its root, not by the directory that happened to come first.
        let path = if node.fs.id == node.root_fs {
            self.shared.plan.roots[node.root.0 as usize].clone()
        } else {
            self.dir_path(node)
        };
        self.notes.errors.add(path, text);
    }

    fn dir_failed(&mut self, parent: &Node<S::Dir>, name: &OsStr, error: &FsError) {
        let path = self.dir_path(parent).join(name);
        let raced = matches!(error.source.kind(), std::io::ErrorKind::NotADirectory)
            || error.source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
        if error.is_vanished() || raced {
            self.notes.skipped.add(path, "vanished while scanned");
        } else {
            self.notes.errors.add(path, error.to_string());
        }
    }

    fn file_failed(&mut self, node: &Node<S::Dir>, name: &OsStr, error: &FsError) {
        let path = self.dir_path(node).join(name);
        let no_file = error.op == FsOp::Open && error.source.kind() == std::io::ErrorKind::InvalidInput;
        if error.is_vanished() || no_file {
            self.notes.skipped.add(path, "vanished while scanned");
        } else {
            self.notes.errors.add(path, error.to_string());
        }
    }

    fn dir_path(&self, node: &Node<S::Dir>) -> PathBuf {
        self.shared.dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).path(node.id)
    }

    fn path_of(&self, parent: Option<&Node<S::Dir>>, root: RootId, name: &OsStr) -> PathBuf {
        match parent {
            Some(parent) => self.dir_path(parent).join(name),
            None => self.shared.plan.roots[root.0 as usize].clone(),
        }
    }
}

/// Nanoseconds since 1970, saturating (file systems store up to 2^34 s and beyond).
pub(crate) fn ctime_ns((seconds, nanos): (i64, u32)) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(nanos))
}

fn judge(found: &Inspection, fs: &KnownFs, page: PageSize) -> Layout {
    if found.moved {
        return Layout::undecided(found.size, page, Undecided::Volatile);
    }
    // Without a known device an address means nothing.
    let space = found
        .class
        .filter(|_| fs.description.physical_identity)
        .map(|class| AddressSpace { fs: fs.id, class });
    let cache = match found.dirty_pages {
        Some(0) => CacheState::Clean,
        Some(_) => CacheState::Dirty,
        None => CacheState::Unknown,
    };
    let facts = MapFacts { size: found.size, extents: &found.extents, space, cache, page };
    Layout::from_extents(facts).with_holes(&found.holes, page)
}

fn special_words(kind: SpecialKind) -> &'static str {
    match kind {
        SpecialKind::Fifo => "FIFO: has no page cache",
        SpecialKind::Socket => "socket: has no page cache",
        SpecialKind::CharDevice => "character device: never opened",
        SpecialKind::BlockDevice => "block device: never opened",
    }
}

/// Gives equal layouts one number, from all workers at once.
#[derive(Debug, Default)]
struct LayoutTable {
    numbers: DashMap<Arc<Layout>, u32, FxBuildHasher>,
    next: AtomicU32,
}

impl LayoutTable {
    fn intern(&self, layout: Layout) -> LayoutId {
        if let Some(number) = self.numbers.get(&layout) {
            return LayoutId(*number);
        }
        let entry = self.numbers.entry(Arc::new(layout));
        LayoutId(*entry.or_insert_with(|| self.next.fetch_add(1, Ordering::Relaxed)))
    }

    fn into_vec(self) -> Vec<Arc<Layout>> {
        let mut all: Vec<_> = self.numbers.into_iter().collect();
        all.sort_unstable_by_key(|(_, number)| *number);
        all.into_iter().map(|(layout, _)| layout).collect()
    }
}
