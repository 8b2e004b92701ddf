//! One thread of a walk.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FileType, OFlags, RawDir, Stat};
use rustix::io::Errno;

use super::{Child, DEPTH_MAX, FileAt, FileLook, Haul, Listed, Node, Shared, Task, WalkError};
use super::{below, meta, open_in, open_regular, raw_facts};
use crate::scan::Progress;
use crate::sealed::tree::{Inode, Node as Kind};
use crate::sealed::xattrs::XattrBuffer;

/// Things looked at as one task: a large directory is shared by the threads.
const FILES_PER_TASK: usize = 256;

const MOUNT: &str = "something is mounted here: a view could not show it. Unmount it before sealing";
const SUBVOLUME: &str = "a nested btrfs subvolume: a view could not show it as one. Make it a directory (`btrfs subvolume delete`, `mkdir`), or seal a snapshot of the root, in which it is an empty directory";
const STORE: &str = "the store is inside of this root: choose another place for it (--store DIR)";
const NO_KINDS: &str = "the file system does not tell kinds of entries in its listings (made with ftype=0)";
const LEASED: &str = "a process holds a lease on it (F_SETLEASE) and did not give it up: find it in /proc/locks, stop it, or seal later";
const DEEP: &str = "directories are nested deeper than 2048";

/// Magic of btrfs (`include/uapi/linux/magic.h`).
const BTRFS: u32 = 0x9123_683e;
/// `BTRFS_EMPTY_SUBVOL_DIR_OBJECTID` (`include/uapi/linux/btrfs_tree.h`).
const STUB_INODE: u64 = 2;

pub(super) struct Worker<'a, L: FileLook> {
    shared: &'a Shared<'a, L>,
    haul: Haul<L::Found>,
    more: Vec<Task>,
    xattrs: XattrBuffer,
    scratch: L::Scratch,
}

/// The directory a listing is made of.
struct Opened {
    fd: OwnedFd,
    stat: Stat,
    parent: Option<u32>,
    root: usize,
    name: Box<[u8]>,
    depth: usize,
    path: PathBuf,
    previous: Option<crate::sealed::tree::EntryId>,
    guess: Option<crate::sealed::tree::EntryId>,
    again: bool,
    /// Attributes to show instead of its own.
    shown: Option<Stat>,
}

/// What a snapshot has in the place of a nested subvolume: an empty directory that btrfs makes up whenever it is looked at. It has the
/// attributes of a new one, so that each seal would find another; its times are told as its parent's, its change time as none.
fn shown_of_stub(stat: &Stat, parent: &Stat, root: BorrowedFd<'_>) -> Option<Stat> {
    let btrfs = || rustix::fs::fstatfs(root).is_ok_and(|fs| fs.f_type as u32 == BTRFS);
    let is_stub = stat.st_ino == STUB_INODE && parent.st_dev != stat.st_dev && btrfs();
    let mut shown = *stat;
    (shown.st_mtime, shown.st_mtime_nsec) = (parent.st_mtime, parent.st_mtime_nsec);
    (shown.st_ctime, shown.st_ctime_nsec) = (0, 0);
    is_stub.then_some(shown)
}

impl<'a, L: FileLook> Worker<'a, L> {
    pub fn new(shared: &'a Shared<'a, L>) -> Self {
        let haul = Haul { dirs: Vec::new(), children: Vec::new(), unsettled: Vec::new(), errors: Vec::new() };
        Worker {
            shared,
            haul,
            more: Vec::new(),
            xattrs: XattrBuffer::default(),
            scratch: L::Scratch::default(),
        }
    }

    pub fn run(mut self) -> Haul<L::Found> {
        let shared = self.shared;
        let cancelled = || shared.progress.is_cancelled();
        shared.tasks.work(cancelled, |task, more| {
            self.task(task);
            more.append(&mut self.more);
        });
        self.haul
    }

    fn task(&mut self, task: Task) {
        match task {
            Task::Root(root) => {
                if let Err(error) = self.root(root) {
                    self.failed(root, error);
                }
            }
            Task::Dir(parent, name) => {
                if !self.has_failed(parent.root)
                    && let Err(error) = self.dir(&parent, &name)
                {
                    self.failed(parent.root, error.at(below(&parent.path, &name)));
                }
                Progress::add(&self.shared.progress.dirs_done, 1);
            }
            Task::Files(node, names) => self.files(&node, &names),
        }
    }

    fn failed(&mut self, root: usize, error: WalkError) {
        self.shared.failed[root].store(true, Ordering::Relaxed);
        self.haul.errors.push((root, error));
    }

    fn has_failed(&self, root: usize) -> bool {
        self.shared.failed[root].load(Ordering::Relaxed)
    }

    fn root(&mut self, root: usize) -> Result<(), WalkError> {
        let given = &self.shared.roots[root];
        let fd = rustix::io::fcntl_dupfd_cloexec(&given.fd, 0).map_err(|e| WalkError::here("open", e))?;
        // A descriptor of its own place in the directory: the caller's may have been read before.
        let fd = open_in(fd.as_fd(), OsStr::new("."), OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|e| WalkError::here("open", e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| WalkError::here("stat", e))?;
        let previous = given.previous.as_ref().map(|_| crate::sealed::tree::EntryId(0));
        let (name, path) = (Box::default(), PathBuf::new());
        let guess = self.shared.model.map(|_| crate::sealed::tree::EntryId(0));
        self.list(Opened {
            fd,
            stat,
            parent: None,
            root,
            name,
            depth: 0,
            path,
            previous,
            guess,
            again: false,
            shown: None,
        })
    }

    fn dir(&mut self, parent: &Arc<Node>, name: &[u8]) -> Result<(), WalkError> {
        let fd = match open_in(parent.fd.as_fd(), OsStr::from_bytes(name), OFlags::RDONLY | OFlags::DIRECTORY)
        {
            Ok(fd) => fd,
            // Gone, or something else now; then its directory changed and is listed again.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(Errno::XDEV) => return Err(refused(MOUNT)),
            Err(e) => return Err(WalkError::here("open directory", e)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| WalkError::here("stat", e))?;
        let given = &self.shared.roots[parent.root];
        if given.avoid == Some((stat.st_dev, stat.st_ino)) {
            return Err(refused(STORE));
        }
        let on = rustix::fs::fstat(&parent.fd).map_err(|e| WalkError::here("stat", e))?;
        let shown = shown_of_stub(&stat, &on, parent.fd.as_fd());
        if on.st_dev != stat.st_dev && shown.is_none() {
            return Err(refused(SUBVOLUME));
        }
        if parent.depth >= DEPTH_MAX {
            return Err(refused(DEEP));
        }
        let known = given.previous.as_ref().zip(parent.previous);
        let previous = known.and_then(|(tree, dir)| tree.child(dir, name));
        self.list(Opened {
            fd,
            stat,
            parent: Some(parent.number),
            root: parent.root,
            name: name.into(),
            depth: parent.depth + 1,
            path: below(&parent.path, name),
            previous,
            guess: self.shared.model.zip(parent.guess).and_then(|(tree, dir)| tree.child(dir, name)),
            again: false,
            shown,
        })
    }

    /// Lists a directory and hands out what is in it.
    fn list(&mut self, dir: Opened) -> Result<(), WalkError> {
        let mut files: Vec<Listed> = Vec::new();
        let mut dirs: Vec<Box<[u8]>> = Vec::new();
        let listed = read_dir(&dir.fd, |name, kind| match kind {
            FileType::Directory => dirs.push(name.into()),
            kind => files.push((name.into(), kind)),
        });
        match listed {
            // Removed since it was opened; its directory changed then and is listed again.
            Err(Errno::NOENT) if dir.parent.is_some() => return Ok(()),
            listed => listed.map_err(|e| WalkError::here("list directory", e))?,
        }
        let xattrs = self.xattrs.of_open(dir.fd.as_fd());
        let xattrs = xattrs.map_err(|e| WalkError::here("read attributes of", e))?;
        let stat = dir.shown.as_ref().unwrap_or(&dir.stat);
        let inode = Inode { meta: meta(stat, xattrs), raw: raw_facts(stat), node: Kind::Dir };
        let number = self.shared.number();
        let child = Child { name: dir.name.clone(), inode, found: None };
        self.haul.dirs.push((dir.root, number, dir.parent, child));
        let mut groups = Vec::new();
        while files.len() > FILES_PER_TASK {
            groups.push(files.split_off(files.len() - FILES_PER_TASK));
        }
        let node = Arc::new(Node {
            ctime: (dir.stat.st_ctime, dir.stat.st_ctime_nsec),
            fd: dir.fd,
            root: dir.root,
            number,
            parent: dir.parent,
            name: dir.name,
            depth: dir.depth,
            path: dir.path,
            previous: dir.previous,
            guess: dir.guess,
            again: dir.again,
            left: AtomicU32::new(1 + groups.len() as u32),
        });
        Progress::add(&self.shared.progress.dirs_found, dirs.len() as u64);
        self.more.extend(dirs.into_iter().map(|name| Task::Dir(Arc::clone(&node), name)));
        self.more.extend(groups.into_iter().map(|names| Task::Files(Arc::clone(&node), names)));
        self.files(&node, &files);
        Ok(())
    }

    fn files(&mut self, node: &Arc<Node>, names: &[Listed]) {
        let mut children = Vec::with_capacity(names.len());
        for (name, kind) in names {
            if self.shared.progress.is_cancelled() || self.has_failed(node.root) {
                return;
            }
            match self.entry(node, name, *kind) {
                Ok(child) => children.extend(child),
                Err(error) => self.failed(node.root, error.at(below(&node.path, name))),
            }
        }
        Progress::add(&self.shared.progress.files, children.len() as u64);
        self.haul.children.push((node.root, node.number, children));
        if node.left.fetch_sub(1, Ordering::AcqRel) == 1
            && let Err(error) = self.all_looked_at(node)
        {
            self.failed(node.root, error.at(node.path.clone()));
        }
    }

    /// All but the subdirectories of a listing was looked at: was it the directory's contents all the while?
    fn all_looked_at(&mut self, node: &Arc<Node>) -> Result<(), WalkError> {
        let stat = rustix::fs::fstat(&node.fd).map_err(|e| WalkError::here("stat", e))?;
        if (stat.st_ctime, stat.st_ctime_nsec) == node.ctime || stat.st_nlink == 0 {
            return Ok(());
        }
        if node.again {
            self.haul.unsettled.push((node.root, node.number, node.path.clone()));
            return Ok(());
        }
        let fd = match open_in(node.fd.as_fd(), OsStr::new("."), OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT) if node.parent.is_some() => return Ok(()),
            opened => opened.map_err(|e| WalkError::here("open directory", e))?,
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| WalkError::here("stat", e))?;
        self.list(Opened {
            fd,
            stat,
            parent: node.parent,
            root: node.root,
            name: node.name.clone(),
            depth: node.depth,
            path: node.path.clone(),
            previous: node.previous,
            guess: node.guess,
            again: true,
            shown: None,
        })
    }

    /// Looks at something that the directory says is no directory. `None`: it is gone, or is one now.
    fn entry(
        &mut self,
        node: &Node,
        name: &[u8],
        kind: FileType,
    ) -> Result<Option<Child<L::Found>>, WalkError> {
        let os_name = OsStr::from_bytes(name);
        let (fd, stat) = match kind {
            FileType::RegularFile => {
                let give_up = || self.shared.progress.is_cancelled();
                let opened = found(open_regular(node.fd.as_fd(), os_name, give_up))?;
                let Some(opened) = opened.flatten() else { return Ok(None) };
                opened
            }
            _ => {
                let Some(fd) = found(open_in(node.fd.as_fd(), os_name, OFlags::PATH))? else {
                    return Ok(None);
                };
                let stat = rustix::fs::fstat(&fd).map_err(|e| WalkError::here("stat", e))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    // The directory did not say, or it was replaced.
                    FileType::RegularFile => return self.entry(node, name, FileType::RegularFile),
                    // XFS and btrfs always tell.
                    FileType::Directory if kind == FileType::Unknown => return Err(refused(NO_KINDS)),
                    FileType::Directory => return Ok(None),
                    _ => return self.special(&fd, &stat, name).map(Some),
                }
            }
        };
        self.regular(node, name, &fd, &stat).map(Some)
    }

    fn regular(
        &mut self,
        node: &Node,
        name: &[u8],
        fd: &OwnedFd,
        stat: &Stat,
    ) -> Result<Child<L::Found>, WalkError> {
        let given = &self.shared.roots[node.root];
        let known = given.previous.as_ref().zip(node.previous);
        let previous = known.and_then(|(tree, dir)| Some(tree.inode(tree.child(dir, name)?)));
        let fd = fd.as_fd();
        let read = |buffer: &mut XattrBuffer| {
            buffer.of_open(fd).map_err(|e| WalkError::here("read attributes of", e))
        };
        let mut xattrs = read(&mut self.xattrs)?;
        let guess = self.shared.model.zip(node.guess);
        let guess = guess.and_then(|(tree, dir)| Some(tree.inode(tree.child(dir, name)?)));
        let file = FileAt { root: node.root, fd, stat, previous, guess };
        let (now, found) = self.shared.look.look(file, &mut self.scratch)?;
        if (now.st_ctime, now.st_ctime_nsec) != (stat.st_ctime, stat.st_ctime_nsec) {
            xattrs = read(&mut self.xattrs)?;
        }
        let raw = raw_facts(&now);
        let kind = Kind::File { size: raw.size, data: crate::sealed::tree::Data::Empty };
        let inode = Inode { meta: meta(&now, xattrs), raw, node: kind };
        Ok(Child { name: name.into(), inode, found: Some(found) })
    }

    fn special(&mut self, fd: &OwnedFd, stat: &Stat, name: &[u8]) -> Result<Child<L::Found>, WalkError> {
        let node = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(fd, c"", Vec::new());
                Kind::Symlink(target.map_err(|e| WalkError::here("read link", e))?.into_bytes().into())
            }
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice => Kind::CharDevice(stat.st_rdev),
            FileType::BlockDevice => Kind::BlockDevice(stat.st_rdev),
            _ => return Err(refused("a kind of entry that is not known")),
        };
        let xattrs = self.xattrs.of_path_fd(fd.as_fd());
        let xattrs = xattrs.map_err(|e| WalkError::here("read attributes of", e))?;
        let inode = Inode { meta: meta(stat, xattrs), raw: raw_facts(stat), node };
        Ok(Child { name: name.into(), inode, found: None })
    }
}

fn refused(why: &'static str) -> WalkError {
    WalkError::Refused { path: PathBuf::new(), why }
}

/// What was opened, or `None` for what is gone or of another kind by now.
fn found<T>(opened: Result<T, Errno>) -> Result<Option<T>, WalkError> {
    match opened {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::ISDIR) => Ok(None),
        Err(Errno::XDEV) => Err(refused(MOUNT)),
        Err(Errno::AGAIN) => Err(refused(LEASED)),
        Err(e) => Err(WalkError::here("open", e)),
    }
}

fn read_dir(fd: &OwnedFd, mut entry: impl FnMut(&[u8], FileType)) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(fd, &mut buffer);
    while let Some(next) = entries.next() {
        let next = match next {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let name = next.file_name().to_bytes();
        if name != b"." && name != b".." {
            entry(name, next.file_type());
        }
    }
    Ok(())
}
