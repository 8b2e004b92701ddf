//! A sealed root without a store: what commit needs, made of plain parts. The lower layer is a reflink copy of the raw root and plays
//! image and anchors.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::commit::inode::names;
use pagefold_fsadapters::sealed::commit::{self, Applied, Below, CommitError, OnConflict, Scene};
use pagefold_fsadapters::sealed::tree::{Data, Entry, EntryId, Inode, InodeIndex, Node, RawFacts, Tree};
use pagefold_fsadapters::store::AnchorKey;

pub struct Fixture {
    pub home: PathBuf,
    pub tree: Tree,
    files: HashMap<AnchorKey, PathBuf>,
}

pub fn run(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let output = Command::new(program).args(args.iter().map(|a| a.as_ref())).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn dir(path: &Path) -> Below {
    Below::new(OwnedFd::from(File::open(path).unwrap()))
}

impl Fixture {
    /// Seals `home`/raw, which is there.
    pub fn seal(home: &Path) -> Fixture {
        let at = |name: &str| home.join(name);
        run("cp", &[&"-a", &"--reflink=always", &at("raw"), &at("low")]);
        for name in ["up", "work", "view", "look"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        for what in ["chmod", "chown", "touch"] {
            run(what, &[&format!("--reference={}", at("raw").display()), &at("up")]);
        }
        let (tree, files) = sealed(&at("raw"), &at("low"));
        Fixture { home: home.to_owned(), tree, files }
    }

    pub fn raw(&self) -> PathBuf {
        self.home.join("raw")
    }

    pub fn view(&self) -> PathBuf {
        self.home.join("view")
    }

    /// Mounts the view; `at` is `view` (for writing) or `look`.
    pub fn mount(&self, at: &str, options: &str) {
        let path = |name: &str| self.home.join(name).display().to_string();
        let options = format!(
            "{options},lowerdir={},upperdir={},workdir={},metacopy=on,redirect_dir=on,index=on,xino=on",
            path("low"),
            path("up"),
            path("work")
        );
        run("mount", &[&"-t", &"overlay", &"overlay", &"-o", &options, &path(at)]);
    }

    pub fn unmount(&self, at: &str) {
        run("umount", &[&self.home.join(at)]);
    }

    /// Commits.
    pub fn commit(&self, on_conflict: OnConflict) -> Result<Applied, CommitError> {
        self.mount("look", "ro");
        let result = self.commit_mounted(on_conflict);
        self.unmount("look");
        result
    }

    fn commit_mounted(&self, on_conflict: OnConflict) -> Result<Applied, CommitError> {
        let at = |name: &str| self.home.join(name);
        let anchors = |key: &AnchorKey| Ok(OwnedFd::from(File::open(&self.files[key])?));
        let index = at("work").join("index");
        let index = index.exists().then(|| dir(&index));
        let scene = Scene {
            view: &dir(&at("look")),
            upper: &dir(&at("up")),
            index: index.as_ref(),
            raw: &dir(&at("raw")),
            sealed: &self.tree,
            anchors: &anchors,
            journal: &at("journal"),
        };
        commit::apply(&scene, on_conflict, &Progress::default())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for at in ["view", "look"] {
            let _ = Command::new("umount").arg("-l").arg(self.home.join(at)).output();
        }
    }
}

fn sealed(raw: &Path, low: &Path) -> (Tree, HashMap<AnchorKey, PathBuf>) {
    let (mut tree, mut files) = (Tree::default(), HashMap::new());
    let mut inodes: HashMap<u64, InodeIndex> = HashMap::new();
    let below = dir(raw);
    let mut queue = VecDeque::from([(EntryId(0), Vec::new(), Vec::new())]);
    while let Some((parent, name, path)) = queue.pop_front() {
        let held = below.held(&path).unwrap().unwrap();
        let id = EntryId(tree.entries.len() as u32);
        let look = held.look;
        let new = InodeIndex(tree.inodes.len() as u32);
        let inode = *inodes.entry(look.ino).or_insert(new);
        if inode == new {
            let node = held.special().unwrap().unwrap_or_else(|| {
                let key = AnchorKey(*blake3::hash(&path).as_bytes());
                files.insert(key, low.join(std::ffi::OsStr::from_bytes(&path)));
                let data = if look.size == 0 { Data::Empty } else { Data::Anchor(key) };
                Node::File { size: look.size, data }
            });
            let raw = RawFacts {
                ino: look.ino,
                ctime: look.ctime,
                size: look.size,
                links: look.links,
                signature: None,
            };
            tree.inodes.push(Inode { meta: held.meta().unwrap(), raw, node });
        }
        let name: Vec<u8> = name;
        tree.entries.push(Entry { parent, name: name.into(), inode });
        if look.is_dir() {
            for name in names(below.dir(&path).unwrap().as_fd()).unwrap() {
                let path = commit::inode::join(&path, &name);
                queue.push_back((id, name.to_vec(), path));
            }
        }
    }
    (tree, files)
}
