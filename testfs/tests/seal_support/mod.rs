//! What the tests of `seal` have in common: rigs, roots, and the oracle.
//!
//! The oracle is the bytes themselves: [`assert_sealed`] reads each raw file and the anchor that stands for it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::report::{RootSeal, SealReport};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::sealed::tree::{Data, EntryId, Node, Tree};
use pagefold_fsadapters::store::manifest::read_manifest;
use pagefold_fsadapters::store::{AnchorKey, OpenMode, RootRow, Store};
use pagefold_testfs::farm::{FarmFs, FarmSpec, ImageSpec, SyntheticSpec};
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::IFlags;

pub const BOTH: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

pub fn rig(fs: RigFs) -> LoopRig {
    LoopRig::new(fs).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

pub fn open(rig: &LoopRig) -> Store {
    Store::open(&rig.path().join("store"), OpenMode::Create, "test").expect("a store")
}

pub fn seal_with(store: &Store, config: &SealConfig) -> SealReport {
    seal(store, config, &Progress::default()).expect("the store works")
}

/// Seals `roots`; all must succeed.
pub fn seal_all(store: &Store, roots: &[PathBuf]) -> SealReport {
    let report = seal_with(store, &SealConfig::new(roots.to_vec()));
    assert!(report.is_complete(), "{:#?}", report.errors);
    for root in &report.roots {
        assert_sealed(store, &root.path);
    }
    report
}

pub fn tree_of(store: &Store, root: &Path) -> (RootRow, Tree) {
    let row = store.find_root(root).expect("sealed");
    let tree = read_manifest(&store.root_dir(row.id, row.generation)).expect("a manifest");
    (row, tree)
}

pub fn path_in(tree: &Tree, root: &Path, entry: u32) -> PathBuf {
    root.join(OsStr::from_bytes(&tree.path(EntryId(entry))))
}

/// Paths below the root and where their bytes are.
pub fn anchors(store: &Store, root: &Path) -> BTreeMap<PathBuf, Option<AnchorKey>> {
    let (_, tree) = tree_of(store, root);
    (0..tree.entries.len() as u32)
        .filter_map(|entry| match &tree.inode(EntryId(entry)).node {
            Node::File { data: Data::Anchor(key), .. } => {
                Some((path_in(&tree, Path::new(""), entry), Some(*key)))
            }
            Node::File { data: Data::Empty, .. } => Some((path_in(&tree, Path::new(""), entry), None)),
            _ => None,
        })
        .collect()
}

pub fn same_bytes(a: &mut File, b: &mut File) -> bool {
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = a.read(&mut x).expect("readable");
        if n == 0 {
            return b.read(&mut y).expect("readable") == 0;
        }
        if b.read_exact(&mut y[..n]).is_err() || x[..n] != y[..n] {
            return false;
        }
    }
}

/// Every file of the root has the bytes of its anchor, every anchor is immutable, and the tree is the root.
pub fn assert_sealed(store: &Store, root: &Path) {
    let (row, tree) = tree_of(store, root);
    let mut names = 0;
    for entry in 0..tree.entries.len() as u32 {
        let path = path_in(&tree, root, entry);
        let inode = tree.inode(EntryId(entry));
        let seen = path.symlink_metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        names += 1;
        assert_eq!(inode.raw.ino, seen.ino(), "{}", path.display());
        assert_eq!(inode.meta.mode, seen.mode() & 0o7777, "{}", path.display());
        assert_eq!((inode.meta.uid, inode.meta.gid), (seen.uid(), seen.gid()));
        assert_eq!(inode.meta.mtime, (seen.mtime(), seen.mtime_nsec() as u32), "{}", path.display());
        let Node::File { size, data } = &inode.node else { continue };
        assert_eq!(*size, seen.size(), "{}", path.display());
        match data {
            Data::Empty => assert_eq!(*size, 0),
            Data::Anchor(key) => {
                let mut anchor = store.open_anchor(row.domain, key).expect("the anchor is there");
                let flags = rustix::fs::ioctl_getflags(&anchor).expect("flags");
                assert!(flags.contains(IFlags::IMMUTABLE));
                assert!(
                    same_bytes(&mut anchor, &mut File::open(&path).expect("readable")),
                    "{}",
                    path.display()
                );
            }
        }
    }
    let walked = Command::new("find").arg(root).arg("-xdev").arg("-printf").arg(".").output().expect("find");
    assert_eq!(names, walked.stdout.len(), "the tree has as many names as the root");
}

pub fn spec(dir: &Path, fs: RigFs, roots: u32, drift: f64) -> FarmSpec {
    FarmSpec {
        image: ImageSpec::Synthetic(SyntheticSpec { files: 300, max_bytes: 1 << 20 }),
        roots,
        drift_percent: drift,
        fs: if fs == RigFs::Xfs { FarmFs::Xfs } else { FarmFs::Btrfs },
        ..FarmSpec::new(dir)
    }
}

pub fn only(report: &SealReport) -> &RootSeal {
    assert_eq!(report.roots.len(), 1);
    &report.roots[0]
}

pub fn make_root(rig: &LoopRig, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let root = rig.path().join(name);
    std::fs::create_dir(&root).expect("a root");
    for (file, bytes) in files {
        std::fs::write(root.join(file), bytes).expect("a file");
    }
    // Of this file system only: the others' may take any time.
    rustix::fs::syncfs(File::open(&root).expect("there")).expect("synced");
    root
}

pub fn reflink(from: &Path, to: &Path) {
    let dest = File::create_new(to).expect("a new file");
    clone_file(File::open(from).expect("readable"), &dest).expect("reflink");
}

pub fn pages(count: usize, first: u8) -> Vec<u8> {
    (0..count).flat_map(|page| vec![first.wrapping_add(page as u8); 4096]).collect()
}

/// Where a file's first extent is.
pub fn place(path: &Path) -> u64 {
    let mut first = 0;
    let file = File::open(path).expect("readable");
    let sync = pagefold_sys::fiemap::Sync::Yes;
    pagefold_sys::fiemap::read_extents(file.as_fd(), 1, sync, |e| first = e.physical).expect("a map");
    first
}
