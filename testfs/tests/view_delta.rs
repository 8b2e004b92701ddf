//! A layer of differences over an image shows a changed tree as the tree's own image would: on the kernel's overlayfs, layers as a view
//! has them.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::assemble::{Layers, overlay};
use pagefold_fsadapters::sealed::delta::delta;
use pagefold_fsadapters::sealed::tree::{
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree,
};
use pagefold_fsadapters::sealed::{diff, image, image_mount, upper};
use pagefold_fsadapters::store::key::AnchorKey;
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

fn dir(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Paths with `(mode, node)`; names given with the same number are one inode. Parents first, ascending.
fn tree(names: &[(&str, u32, Option<u8>)]) -> Tree {
    let inode = |mode, node| Inode {
        meta: Meta { mode, uid: 5, gid: 6, mtime: (77, 88), xattrs: Vec::new() },
        raw: RawFacts::default(),
        node,
    };
    let mut tree = Tree {
        entries: vec![Entry { parent: EntryId(0), name: b"".as_slice().into(), inode: InodeIndex(0) }],
        inodes: vec![inode(0o755, Node::Dir)],
    };
    let (mut ids, mut files) = (BTreeMap::from([("", EntryId(0))]), BTreeMap::new());
    for (path, mode, file) in names {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let fresh = InodeIndex(tree.inodes.len() as u32);
        let at = file.map_or(fresh, |number| *files.entry(number).or_insert(fresh));
        if at == fresh {
            let anchor = |n| Node::File { size: 3, data: Data::Anchor(AnchorKey([n; 32])) };
            tree.inodes.push(inode(*mode, file.map_or(Node::Dir, anchor)));
        }
        ids.insert(path, EntryId(tree.entries.len() as u32));
        tree.entries.push(Entry { parent: ids[parent], name: name.as_bytes().into(), inode: at });
    }
    tree
}

/// Everything that a view of `layers` of images shows: mode, size, links, bytes.
fn shown(store: &Path, root_dir: &Path, images: Vec<OwnedFd>) -> BTreeMap<PathBuf, (u32, u64, u64, Vec<u8>)> {
    let layers = Layers {
        upper: dir(&root_dir.join("upper")),
        work: dir(&root_dir.join("work")),
        images,
        data: Some(dir(&store.join("anchors"))),
        mounts: Vec::new(),
    };
    let mount = overlay(&layers, MountAttrFlags::empty()).unwrap();
    let top = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let (mut all, mut todo) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(top.join(&at)).unwrap() {
            let path = at.join(entry.unwrap().file_name());
            let meta = top.join(&path).symlink_metadata().unwrap();
            let bytes = if meta.is_file() { fs::read(top.join(&path)).unwrap() } else { Vec::new() };
            let links = if meta.is_dir() { 0 } else { meta.nlink() };
            let size = if meta.is_dir() { 0 } else { meta.len() };
            if meta.is_dir() {
                todo.push(path.clone());
            }
            all.insert(path, (meta.mode(), size, links, bytes));
        }
    }
    all
}

/// Every kind of difference.
fn base_and_new() -> (Tree, Tree) {
    let base = tree(&[
        ("a", 0o755, None),
        ("a/gone", 0o644, Some(1)),
        ("a/kept", 0o644, Some(2)),
        ("a/linked", 0o644, Some(3)),
        ("b", 0o755, None),
        ("b/linked", 0o644, Some(3)),
        ("c", 0o755, None),
        ("c/d", 0o755, None),
        ("c/d/deep", 0o644, Some(4)),
        ("c/file", 0o644, Some(5)),
        ("gonedir", 0o755, None),
        ("gonedir/x", 0o644, Some(6)),
        ("same", 0o755, None),
        ("same/x", 0o600, Some(7)),
        ("swap", 0o755, None),
        ("swap/x", 0o644, Some(6)),
    ]);
    let new = tree(&[
        ("a", 0o755, None),
        ("a/kept", 0o640, Some(2)),
        ("a/linked", 0o644, Some(3)),
        ("a/made", 0o644, Some(8)),
        ("b", 0o700, None),
        ("b/linked", 0o644, Some(9)),
        ("c", 0o755, None),
        ("c/d", 0o755, None),
        ("c/file", 0o755, None),
        ("c/file/below", 0o644, Some(5)),
        ("same", 0o755, None),
        ("same/x", 0o600, Some(7)),
        ("swap", 0o644, Some(6)),
    ]);
    (base, new)
}

#[test]
fn privileged_a_delta_over_a_base_shows_what_its_own_image_shows() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = LoopRig::with_size(fs, 512 << 20).unwrap_or_else(|e| panic!("{e}"));
        let store = rig.path().join("store");
        for name in ["images", "anchors", "mounts", "roots"] {
            fs::create_dir_all(store.join(name)).unwrap();
        }
        for n in 0..=9u8 {
            let path = store.join("anchors").join(AnchorKey([n; 32]).path());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, [b'0' + n; 3]).unwrap();
        }
        let (base, new) = base_and_new();
        let difference = delta(&base, &new).expect("no name is hidden");
        let mounted = |tree: &Tree| {
            let built = image::build(tree).unwrap();
            let file = store.join("images").join(built.digest.to_string());
            fs::write(&file, &built.bytes).unwrap();
            image_mount::mounted(&store.join("mounts"), &file, built.digest).unwrap()
        };
        let root_dir = |name: &str| {
            let at = store.join("roots").join(name);
            fs::create_dir(&at).unwrap();
            upper::prepare(&at, &new, dir(&store).as_fd()).unwrap();
            at
        };
        let (whole_at, stacked_at) = (root_dir("whole"), root_dir("stacked"));
        let digest = diff::write(&stacked_at, &difference, None, &Progress::default()).unwrap();
        let whole = shown(&store, &whole_at, vec![mounted(&new)]);
        let layers = vec![diff::open(&stacked_at, digest).unwrap(), mounted(&base)];
        let stacked = shown(&store, &stacked_at, layers);
        assert_eq!(stacked, whole, "{fs:?}");
        assert_eq!(whole[Path::new("a/made")].3, b"888");
        assert_eq!(whole[Path::new("a/linked")].2, 1);
        assert!(!whole.contains_key(Path::new("gonedir")));
        for tree in [&base, &new] {
            let digest = image::build(tree).unwrap().digest;
            image_mount::unmounted(&store.join("mounts"), digest).unwrap();
        }
    }
}
