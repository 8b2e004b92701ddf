//! Which processes use a directory tree: raw roots before they are mounted as views (one truth at a time, design 6), views that
//! can't be unmounted.
//!
//! A process uses a tree through its root or working directory, an open descriptor or a mapping. All mount namespaces are looked at:
//! `/proc/PID/{root,cwd,fd}` lead there. Root and cwd are climbed with `..` comparing (device, inode), so that bind mounts
//! and other namespaces' paths don't matter; a file has no `..`, so it is known by its path, or else by its inode number.
//!
//! Invariant: one pass over `/proc` for any number of trees, work bounded by what processes hold. What it deliberately does not do:
//! prove that nobody will come: a snapshot; ask a file system that may not answer. Not seen: a file under another namespace's own bind
//! mount, created after the seal; a mapping that may become writable but is not.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags};

use super::refuse::DEPTH_MAX;

/// A tree that is asked about.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Its path in our mount namespace.
    pub path: PathBuf,
    /// `st_dev` of its root directory.
    pub dev: u64,
    /// Inode number of its root directory.
    pub ino: u64,
    /// The whole file system counts (a view), not only what is below the root directory.
    pub whole_device: bool,
}

/// How a process uses a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its root directory is in it: a container.
    Root,
    /// Its working directory is in it.
    Cwd,
    /// A file, open for writing (in a view: open at all).
    Open(PathBuf),
    /// A shared writable mapping of a file.
    Mapped(PathBuf),
}

impl Use {
    /// Whether a file can be written through it as it is (in a view: may be).
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(self, Use::Open(_) | Use::Mapped(_))
    }
}

/// A process that uses a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Index into the trees that were asked about.
    pub tree: usize,
    /// Process id.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
    /// How; the first that was found, but writing to a raw root before all else.
    pub how: Use,
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({:?}) ", self.pid, self.name)?;
        match &self.how {
            Use::Root => write!(f, "has it as its root"),
            Use::Cwd => write!(f, "works in it"),
            Use::Open(path) => write!(f, "has {path:?} open"),
            Use::Mapped(path) => write!(f, "has {path:?} mapped for writing"),
        }
    }
}

/// Inode numbers of a tree's files, asked for only when a path does not decide. `None`: not known.
pub type Inodes<'a> = dyn Fn(usize) -> Option<HashSet<u64>> + 'a;

/// Who uses `trees` now; each process once a tree. This process is left out.
///
/// Without root's rights only own processes are seen.
///
/// # Errors
/// When `/proc` can't be listed. Processes that end meanwhile are no error.
pub fn find(trees: &[Watched], inodes: &Inodes<'_>) -> std::io::Result<Vec<User>> {
    if trees.is_empty() {
        return Ok(Vec::new());
    }
    let mut search = Search::new(trees, inodes);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
    let myself = std::process::id();
    for entry in Dir::read_from(&proc)? {
        let entry = entry?;
        let Ok(Ok(pid)) = entry.file_name().to_str().map(str::parse::<u32>) else { continue };
        if pid == myself {
            continue;
        }
        if let Ok(process) = rustix::fs::openat(&proc, entry.file_name(), flags, Mode::empty()) {
            search.process(pid, &process);
        }
    }
    Ok(search.found)
}

struct Search<'a> {
    trees: &'a [Watched],
    /// Trees by their root directory.
    roots: HashMap<(u64, u64), usize>,
    devices: HashSet<u64>,
    inodes: &'a Inodes<'a>,
    /// Answers of `inodes`.
    sets: HashMap<usize, Option<HashSet<u64>>>,
    namespace: Option<u64>,
    found: Vec<User>,
}

impl<'a> Search<'a> {
    fn new(trees: &'a [Watched], inodes: &'a Inodes<'a>) -> Search<'a> {
        Search {
            trees,
            roots: trees.iter().enumerate().map(|(i, t)| ((t.dev, t.ino), i)).collect(),
            devices: trees.iter().map(|t| t.dev).collect(),
            inodes,
            sets: HashMap::new(),
            namespace: rustix::fs::stat("/proc/self/ns/mnt").ok().map(|s| s.st_ino),
            found: Vec::new(),
        }
    }

    fn process(&mut self, pid: u32, process: &OwnedFd) {
        for (link, how) in [(c"root", Use::Root), (c"cwd", Use::Cwd)] {
            if let Some(tree) = self.climb(process, link) {
                self.note(pid, process, tree, how);
            }
        }
        let namespace = rustix::fs::statat(process, c"ns/mnt", AtFlags::empty()).ok().map(|s| s.st_ino);
        let ours = namespace == self.namespace;
        self.descriptors(pid, process, ours);
        self.mappings(pid, process, ours);
    }

    fn note(&mut self, pid: u32, process: &OwnedFd, tree: usize, how: Use) {
        let whole = self.trees[tree].whole_device;
        if let Some(known) = self.found.iter_mut().rev().take_while(|u| u.pid == pid).find(|u| u.tree == tree)
        {
            // Who works in a raw root may also write to it, and that is what a commit asks for.
            if !whole && how.writes() && !known.how.writes() {
                known.how = how;
            }
            return;
        }
        let name = read_small(process, c"comm").unwrap_or_default();
        let name = String::from_utf8_lossy(&name).trim_end().to_string();
        self.found.push(User { tree, pid, name, how });
    }

    /// The tree that the directory behind `link` is in.
    fn climb(&self, process: &OwnedFd, link: &std::ffi::CStr) -> Option<usize> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = rustix::fs::openat(process, link, flags, Mode::empty()).ok()?;
        let mut last = (0, 0);
        for _ in 0..DEPTH_MAX {
            let stat = Known::of(&at, c"")?;
            let here = (stat.dev, stat.ino);
            if let Some(tree) = self.roots.get(&here) {
                return Some(*tree);
            }
            if let Some(tree) = self.trees.iter().position(|t| t.whole_device && t.dev == stat.dev) {
                return Some(tree);
            }
            // The top of a mount is its own parent here: a directory mounted into a raw root is not the raw root.
            if here == last || !self.devices_may_lie_above(stat.dev) {
                return None;
            }
            last = here;
            at = rustix::fs::openat2(&at, c"..", flags, Mode::empty(), ResolveFlags::NO_XDEV).ok()?;
        }
        None
    }

    /// On btrfs a nested subvolume has another device than the root above it, so only kinds that can't be above are left early.
    fn devices_may_lie_above(&self, dev: u64) -> bool {
        self.devices.contains(&dev) || rustix::fs::major(dev) == 0
    }

    fn descriptors(&mut self, pid: u32, process: &OwnedFd, ours: bool) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(fds) = rustix::fs::openat(process, c"fd", flags, Mode::empty()) else { return };
        let Ok(list) = Dir::read_from(&fds) else { return };
        for entry in list.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            // Through the link: what it is open on, not the link.
            let Some(stat) = Known::of(&fds, name) else { continue };
            if !self.devices.contains(&stat.dev) {
                continue;
            }
            let whole = self.trees.iter().position(|t| t.whole_device && t.dev == stat.dev);
            if whole.is_none() && !(stat.regular && is_writable(process, name)) {
                continue;
            }
            let path = rustix::fs::readlinkat(&fds, name, Vec::new()).unwrap_or_default();
            let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
            let tree = whole.or_else(|| self.tree_of_file(&path, Some(&stat), ours));
            if let Some(tree) = tree {
                self.note(pid, process, tree, Use::Open(path));
            }
        }
    }

    fn mappings(&mut self, pid: u32, process: &OwnedFd, ours: bool) {
        let Some(text) = read_small(process, c"maps") else { return };
        let mut last: &Path = Path::new("");
        for line in text.split(|b| *b == b'\n') {
            let Some(map) = Mapping::parse(line) else { continue };
            // Mappings of one file stand together, sometimes in tens of thousands.
            if std::mem::replace(&mut last, map.path) == map.path {
                continue;
            }
            // `maps` shows the device of the file system, which on btrfs is not `st_dev`; and what is at that path may be something else
            // by now, which somebody put there. The kernel leads to what is mapped, if we are root.
            let stat = map.file().and_then(|name| Known::of(process, &name));
            if let Some(tree) = self.tree_of_file(map.path, stat.as_ref(), ours) {
                self.note(pid, process, tree, Use::Mapped(map.path.into()));
            }
        }
    }

    /// By path in our own namespace; in another one a path says nothing, so by inode number.
    fn tree_of_file(&mut self, path: &Path, stat: Option<&Known>, ours: bool) -> Option<usize> {
        if ours {
            let at = |t: &Watched| path.starts_with(&t.path);
            if let Some(found) = self.trees.iter().position(|t| at(t) && !t.whole_device) {
                // In a view over the root (in place) the path is the same and the device is not.
                return stat.is_none_or(|s| s.dev == self.trees[found].dev).then_some(found);
            }
        }
        let stat = stat?;
        (0..self.trees.len()).filter(|&i| self.trees[i].dev == stat.dev && !self.trees[i].whole_device).find(
            |&i| {
                let inodes = self.inodes;
                let set = self.sets.entry(i).or_insert_with(|| inodes(i));
                set.as_ref().is_some_and(|s| s.contains(&stat.ino))
            },
        )
    }
}

/// What is known of an inode without asking whoever serves its file system: a server that is dead, or somebody's own, may never answer.
struct Known {
    dev: u64,
    ino: u64,
    regular: bool,
}

impl Known {
    /// Of what `name` in `dir` leads to, or of `dir` when it is empty.
    fn of(dir: &OwnedFd, name: impl rustix::path::Arg) -> Option<Known> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        let stat = rustix::fs::statx(dir, name, flags, wanted).ok()?;
        Some(Known {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            regular: FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile,
        })
    }
}

/// `flags:` of `/proc/PID/fdinfo/N`, octal, has the access mode. When unreadable: taken for writable.
fn is_writable(process: &OwnedFd, name: &std::ffi::CStr) -> bool {
    let path = [b"fdinfo/", name.to_bytes()].concat();
    let Some(text) = read_small(process, OsStr::from_bytes(&path)) else { return true };
    let text = String::from_utf8_lossy(&text);
    let flags = text.lines().find_map(|l| l.strip_prefix("flags:")).map(str::trim);
    match flags.and_then(|f| u32::from_str_radix(f, 8).ok()) {
        // O_PATH can't write, whatever its access mode says.
        Some(flags) => flags & OFlags::PATH.bits() == 0 && flags & OFlags::ACCMODE.bits() != 0,
        None => true,
    }
}

/// A shared writable mapping of a file.
struct Mapping<'a> {
    range: &'a [u8],
    path: &'a Path,
}

impl Mapping<'_> {
    /// Its link below `/proc/PID`: the numbers of the range without leading zeros.
    fn file(&self) -> Option<String> {
        let (start, end) = std::str::from_utf8(self.range).ok()?.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(format!("map_files/{:x}-{:x}", number(start)?, number(end)?))
    }

    /// `start-end perms offset device inode      path`
    fn parse(line: &[u8]) -> Option<Mapping<'_>> {
        let mut fields = line.splitn(6, |b| *b == b' ');
        let range = fields.next()?;
        let perms = fields.next()?;
        if perms.get(1) != Some(&b'w') || perms.get(3) != Some(&b's') {
            return None;
        }
        let path = fields.nth(3)?.trim_ascii_start();
        path.starts_with(b"/").then(|| Mapping { range, path: Path::new(OsStr::from_bytes(path)) })
    }
}

/// Bytes of a `/proc` file that are read at most: 100,000 mappings.
const PROC_BYTES_MAX: u64 = 16 << 20;

fn read_small(process: &OwnedFd, name: impl rustix::path::Arg) -> Option<Vec<u8>> {
    use std::io::Read;
    let fd =
        rustix::fs::openat(process.as_fd(), name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = Vec::new();
    std::fs::File::from(fd).take(PROC_BYTES_MAX).read_to_end(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_files_count() {
        let path = |line: &str| Mapping::parse(line.as_bytes()).map(|m| m.path.to_path_buf());
        let at = |perms: &str| format!("7f00-7f01 {perms} 00000000 08:01 42                 /data/a b");
        assert_eq!(path(&at("rw-s")), Some("/data/a b".into()));
        assert_eq!(path(&at("rw-p")), None);
        assert_eq!(path(&at("r--s")), None);
        assert_eq!(path("7f00-7f01 rw-s 00000000 00:01 42 "), None);
        for garbage in ["", "x", "a b", "a rw-s", "a rw-s 0 0 0", "a rw-s 0 0 0 anon"] {
            assert_eq!(path(garbage), None, "{garbage}");
        }
    }

    #[test]
    fn a_child_is_found_by_its_working_directory_and_its_open_file() {
        use std::os::unix::fs::MetadataExt;
        let home = tempfile::tempdir().unwrap();
        let root = home.path().canonicalize().unwrap().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        let meta = std::fs::metadata(&root).unwrap();
        let tree = Watched { path: root.clone(), dev: meta.dev(), ino: meta.ino(), whole_device: false };
        let who = || find(std::slice::from_ref(&tree), &|_| None).unwrap();
        assert_eq!(who(), []);
        let sleeper = |dir: &Path, out: std::process::Stdio| {
            std::process::Command::new("sleep").arg("60").current_dir(dir).stdout(out).spawn().unwrap()
        };
        let mut inside = sleeper(&root.join("a/b"), std::process::Stdio::null());
        let file = std::fs::File::create(root.join("a/file")).unwrap();
        let mut writer = sleeper(home.path(), file.try_clone().unwrap().into());
        let mut both = sleeper(&root, file.into());
        let reader = std::fs::File::open(root.join("a/file")).unwrap();
        let mut reader = sleeper(home.path(), reader.into());
        let found = who();
        for child in [&mut inside, &mut writer, &mut both, &mut reader] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let order = [inside.id(), writer.id(), both.id()];
        // What other tests are just starting has copies of our descriptors until it executes its program.
        let ours = |pid: u32| order.contains(&pid) || pid == reader.id();
        let mut found: Vec<(u32, Use)> =
            found.into_iter().filter(|u| ours(u.pid)).map(|u| (u.pid, u.how)).collect();
        found.sort_by_key(|(pid, _)| order.iter().position(|o| o == pid));
        let file = Use::Open(root.join("a/file"));
        assert_eq!(found, [(inside.id(), Use::Cwd), (writer.id(), file.clone()), (both.id(), file)]);
    }
}
