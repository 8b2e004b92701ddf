//! A sealed root without a store: what commit needs, made of plain parts. The lower layer is a reflink copy of the raw root and plays
//! image and anchors.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::commit::{self, Applied, Below, CommitError, OnConflict, Scene};
use pagefold_fsadapters::sealed::inode::names;
use pagefold_fsadapters::sealed::tree::{Data, Entry, EntryId, Inode, InodeIndex, Node, RawFacts, Tree};
use pagefold_fsadapters::store::AnchorKey;
use pagefold_fsadapters::store::manifest::{read_manifest, write_manifest};

pub struct Fixture {
    pub home: PathBuf,
    pub tree: Tree,
    files: HashMap<AnchorKey, PathBuf>,
}

pub fn run(program: &str, args: &[&dyn AsRef<OsStr>]) {
    let output = Command::new(program).args(args.iter().map(|a| a.as_ref())).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Tests run beside each other: a child that another is just starting holds our descriptors for a moment.
fn patiently(what: &str, call: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !call() {
        assert!(started.elapsed().as_secs() < 30, "{what} stays busy");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
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
        let tree = sealed(&at("raw"));
        std::fs::create_dir(at("seal")).unwrap();
        write_manifest(&at("seal"), &tree, None).unwrap();
        Fixture::open(home)
    }

    /// A fixture that another process sealed.
    pub fn open(home: &Path) -> Fixture {
        let tree = read_manifest(&home.join("seal")).unwrap();
        let mut files = HashMap::new();
        for id in (0..tree.entries.len() as u32).map(EntryId) {
            if let Node::File { data: Data::Anchor(key), .. } = tree.inode(id).node {
                files.insert(key, home.join("low").join(OsStr::from_bytes(&tree.path(id))));
            }
        }
        Fixture { home: home.to_owned(), tree, files }
    }

    /// Commits in a process of its own that is stopped at `step`, lets `meddle` do something then, and goes on to its end. False if it
    /// never came to the step.
    pub fn interfere(&self, step: &str, meddle: impl FnOnce()) -> bool {
        self.mount("look", "ro");
        let mut child =
            self.child().env("PAGEFOLD_STOP_AT", step).env("PAGEFOLD_COMMIT_PARTIAL", "1").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        let stopped = loop {
            let state = state();
            match state.rsplit(") ").next().and_then(|rest| rest.chars().next()) {
                Some('T') => break true,
                Some('Z') | None => break false,
                _ => std::thread::sleep(std::time::Duration::from_millis(2)),
            }
        };
        if stopped {
            meddle();
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        }
        assert!(child.wait().unwrap().success());
        self.unmount("look");
        stopped
    }

    fn child(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "privileged_child_commits_for_the_crash_tests", "--nocapture"])
            .env("PAGEFOLD_COMMIT_HOME", &self.home)
            .stdout(std::process::Stdio::null());
        command
    }

    /// Commits in a process of its own that is to die at `step`, when it comes there for the `n`-th time. Whether it did.
    pub fn crash(&self, step: &str, n: u32) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.mount("look", "ro");
        let mut child = self.child();
        let output = child.env("PAGEFOLD_CRASH_AT", format!("{step}:{n}")).output().unwrap();
        self.unmount("look");
        let died = output.status.signal() == Some(9);
        assert!(died || output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        died
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
        let at = path(at);
        patiently(&at, || {
            let args = ["-t", "overlay", "overlay", "-o", &options, &at];
            Command::new("mount").args(args).output().unwrap().status.success()
        });
    }

    pub fn unmount(&self, at: &str) {
        let path = self.home.join(at);
        patiently(at, || Command::new("umount").arg(&path).output().unwrap().status.success());
    }

    /// Commits.
    pub fn commit(&self, on_conflict: OnConflict) -> Result<Applied, CommitError> {
        self.mount("look", "ro");
        let result = self.commit_mounted(on_conflict);
        self.unmount("look");
        result
    }

    /// Commits; the view is mounted at `look`.
    pub fn commit_mounted(&self, on_conflict: OnConflict) -> Result<Applied, CommitError> {
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
            // Long after all changes, so that unchanged times tell.
            sealed_at: i64::MAX,
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

fn sealed(raw: &Path) -> Tree {
    let mut tree = Tree::default();
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
                let data = if look.size == 0 { Data::Empty } else { Data::Anchor(key) };
                Node::File { size: look.size, data }
            });
            let (ino, ctime, size, links) = (look.ino, look.ctime, look.size, look.links);
            let raw = RawFacts { ino, ctime, size, links, signature: None };
            tree.inodes.push(Inode { meta: held.meta().unwrap(), raw, node });
        }
        let name: Vec<u8> = name;
        tree.entries.push(Entry { parent, name: name.into(), inode });
        if look.is_dir() {
            for name in names(below.dir(&path).unwrap().as_fd()).unwrap() {
                let path = pagefold_fsadapters::sealed::inode::join(&path, &name);
                queue.push_back((id, name.to_vec(), path));
            }
        }
    }
    tree
}
