//! What views are built on, tried on real file systems: images, overlays of them, the question whether an upper is live.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use pagefold_fsadapters::sealed::assemble::{Handover, Layers, overlay, overlay_with};
use pagefold_fsadapters::sealed::idmap::{IdMaps, Mapped};
use pagefold_fsadapters::sealed::image::{self, BuiltImage};
use pagefold_fsadapters::sealed::image_mount;
use pagefold_fsadapters::sealed::live::{UpperState, probe};
use pagefold_fsadapters::sealed::tree::{
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree,
};
use pagefold_fsadapters::sealed::upper;
use pagefold_fsadapters::store::key::AnchorKey;
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 512 << 20).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn dir(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn meta(mtime: (i64, u32)) -> Meta {
    Meta { mode: 0o644, uid: 1234, gid: 70_000, mtime, xattrs: Vec::new() }
}

/// A tree whose names are given with their inodes, parents first.
fn tree(root: &Meta, names: &[(u32, &str, Node, Meta)]) -> Tree {
    let mut tree = Tree {
        entries: vec![Entry { parent: EntryId(0), name: b"".as_slice().into(), inode: InodeIndex(0) }],
        inodes: vec![Inode { meta: root.clone(), raw: RawFacts::default(), node: Node::Dir }],
    };
    for (parent, name, node, meta) in names {
        let inode = InodeIndex(tree.inodes.len() as u32);
        tree.inodes.push(Inode { meta: meta.clone(), raw: RawFacts::default(), node: node.clone() });
        tree.entries.push(Entry { parent: EntryId(*parent), name: name.as_bytes().into(), inode });
    }
    tree
}

/// A store's directories without its index.
struct Place {
    home: PathBuf,
}

impl Place {
    fn new(rig: &LoopRig) -> Place {
        let home = rig.path().join("store");
        for dir in ["images", "anchors", "mounts", "roots"] {
            fs::create_dir_all(home.join(dir)).unwrap();
        }
        Place { home }
    }

    fn anchor(&self, key: AnchorKey, bytes: &[u8]) {
        let path = self.home.join("anchors").join(key.path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn image(&self, tree: &Tree) -> BuiltImage {
        let built = image::build(tree).unwrap();
        fs::write(self.home.join("images").join(built.digest.to_string()), &built.bytes).unwrap();
        built
    }

    fn root_dir(&self, name: &str, tree: &Tree) -> PathBuf {
        let at = self.home.join("roots").join(name);
        fs::create_dir(&at).unwrap();
        upper::prepare(&at, tree, dir(&self.home).as_fd()).unwrap();
        at
    }

    fn mounts(&self) -> PathBuf {
        self.home.join("mounts")
    }

    fn layers(&self, root_dir: &Path, image: &BuiltImage) -> Layers {
        let file = self.home.join("images").join(image.digest.to_string());
        Layers {
            upper: dir(&root_dir.join("upper")),
            work: dir(&root_dir.join("work")),
            images: vec![image_mount::mounted(&self.mounts(), &file, image.digest).unwrap()],
            data: Some(dir(&self.home.join("anchors"))),
            mounts: Vec::new(),
        }
    }
}

/// A path into a mount that is attached nowhere.
fn inside(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", mount.as_raw_fd()).into()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const KEY: AnchorKey = AnchorKey([0xab; 32]);

fn small() -> Tree {
    let file = Node::File { size: 5, data: Data::Anchor(KEY) };
    let all = [
        (0, "ab", Node::Dir, Meta { mode: 0o755, ..meta((5, 6)) }),
        (1, "f", file, meta((-1_000_000_000, 123_456_789))),
        (1, "null", Node::CharDevice(0x103), meta((7, 8))),
        (1, "wide", Node::BlockDevice(u64::from(u32::MAX)), meta((7, 8))),
        (1, "long", Node::Symlink(vec![b'x'; 4095].into()), meta((7, 8))),
        (0, "cd", Node::Fifo, meta((1 << 33, 999_999_999))),
        (0, "empty", Node::File { size: 0, data: Data::Empty }, meta((0, 0))),
        (0, "ff", Node::Socket, meta((0, 0))),
    ];
    tree(&Meta { mode: 0o1751, ..meta((11, 12)) }, &all)
}

#[test]
fn privileged_all_ways_of_handing_layers_over_give_the_same_view() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let place = Place::new(&rig);
        place.anchor(KEY, b"hello");
        let tree = small();
        let image = place.image(&tree);
        let root_dir = place.root_dir("a", &tree);
        for handover in [Handover::Descriptors, Handover::Options, Handover::List] {
            let layers = place.layers(&root_dir, &image);
            let mount = overlay_with(&layers, MountAttrFlags::empty(), handover).unwrap();
            let at = inside(&mount);
            // The writer's 256 whiteouts hide nothing of ours and are not seen.
            assert_eq!(names(&at), ["ab", "cd", "empty", "ff"], "{handover:?}");
            assert_eq!(names(&at.join("ab")), ["f", "long", "null", "wide"]);
            assert!(!at.join("00").exists());
            assert_eq!(fs::read(at.join("ab/f")).unwrap(), b"hello");
            assert_eq!(fs::read(at.join("empty")).unwrap(), b"");
            assert_eq!(fs::read_link(at.join("ab/long")).unwrap().as_os_str().as_bytes(), [b'x'; 4095]);
            let f = fs::metadata(at.join("ab/f")).unwrap();
            assert_eq!((f.mtime(), f.mtime_nsec()), (-1_000_000_000, 123_456_789));
            assert_eq!((f.uid(), f.gid(), f.mode() & 0o7777, f.len()), (1234, 70_000, 0o644, 5));
            assert_eq!(fs::metadata(at.join("ab/null")).unwrap().rdev(), 0x103);
            assert_eq!(fs::metadata(at.join("ab/wide")).unwrap().rdev(), u64::from(u32::MAX));
            let cd = fs::symlink_metadata(at.join("cd")).unwrap();
            assert!(cd.file_type().is_fifo());
            assert_eq!((cd.mtime(), cd.mtime_nsec()), (1 << 33, 999_999_999));
            let root = fs::metadata(&at).unwrap();
            assert_eq!((root.mode() & 0o7777, root.uid(), root.mtime_nsec()), (0o1751, 1234, 12));
        }
        image_mount::unmounted(&place.mounts(), image.digest).unwrap();
        assert_eq!(names(&place.mounts()), [""; 0]);
    }
}

#[test]
fn privileged_an_upper_has_one_view_and_one_image() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let place = Place::new(&rig);
        place.anchor(KEY, b"hello");
        let tree = small();
        let mut other_tree = tree.clone();
        other_tree.inodes[1].meta.mode = 0o700;
        let (image, other) = (place.image(&tree), place.image(&other_tree));
        let root_dir = place.root_dir("a", &tree);
        let state = || probe(&root_dir, &place.mounts()).unwrap();
        assert_eq!(state(), UpperState::Free, "never mounted");

        let view = overlay(&place.layers(&root_dir, &image), MountAttrFlags::empty()).unwrap();
        assert_eq!(state(), UpperState::Live);
        let again = overlay(&place.layers(&root_dir, &image), MountAttrFlags::empty()).unwrap_err();
        assert_eq!(again.errno, Errno::BUSY, "{again}");
        fs::write(inside(&view).join("ab/f"), b"other").unwrap();
        let held = fs::File::open(inside(&view).join("ab/f")).unwrap();
        drop(view);
        assert_eq!(state(), UpperState::Live, "an open file keeps the view alive");
        drop(held);
        // A child that another test has just forked holds all our descriptors until it executes its program.
        let freed = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            state() == UpperState::Free
        });
        assert!(freed);

        let foreign = overlay(&place.layers(&root_dir, &other), MountAttrFlags::empty()).unwrap_err();
        assert_eq!(foreign.errno, Errno::STALE, "{foreign}");
        assert_eq!(state(), UpperState::Free);
        // Neither question nor refusal has changed anything.
        let view = overlay(&place.layers(&root_dir, &image), MountAttrFlags::empty()).unwrap();
        assert_eq!(fs::read(inside(&view).join("ab/f")).unwrap(), b"other");
        drop(view);
        for image in [&image, &other] {
            image_mount::unmounted(&place.mounts(), image.digest).unwrap();
        }
    }
}

#[test]
fn privileged_owners_are_mapped_in_the_view_and_not_on_disk() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let place = Place::new(&rig);
        place.anchor(KEY, b"hello");
        let mut tree = small();
        // Owned by the container's root; `meta` gives 1234:70000, of which the group has no place in the map.
        for inode in &mut tree.inodes {
            (inode.meta.uid, inode.meta.gid) = (0, 0);
        }
        tree.inodes[1].meta.uid = 1000;
        let image = place.image(&tree);
        let root_dir = place.root_dir("a", &tree);
        let maps: IdMaps = "0:100000:65536".parse().unwrap();
        let plain = place.layers(&root_dir, &image);
        let layers = Mapped::new(&maps)
            .unwrap()
            .layers(&dir(&root_dir), &plain.images, plain.data.as_ref().unwrap())
            .unwrap();
        let mount = maps.as_their_root(|| overlay(&layers, MountAttrFlags::empty())).unwrap().unwrap();
        let at = inside(&mount);
        let owner = |path: &str| {
            let meta = fs::symlink_metadata(at.join(path)).unwrap();
            (meta.uid(), meta.gid())
        };
        assert_eq!(owner("."), (100_000, 100_000), "{fs:?}");
        assert_eq!(owner("ab"), (101_000, 100_000));
        assert_eq!(owner("ab/f"), (100_000, 100_000));
        assert_eq!(fs::read(at.join("ab/f")).unwrap(), b"hello");
        // What the container's root writes and copies up lies in the upper as id 0.
        let write = || {
            fs::write(at.join("new"), b"new")?;
            fs::create_dir(at.join("dir"))?;
            fs::OpenOptions::new().append(true).open(at.join("ab/f"))?.set_len(3)
        };
        maps.as_their_root(write).unwrap().unwrap();
        for path in ["new", "dir", "ab/f"] {
            assert_eq!(owner(path), (100_000, 100_000), "{path}");
            let below = fs::metadata(root_dir.join("upper").join(path)).unwrap();
            assert_eq!((below.uid(), below.gid()), (0, 0), "{path}");
        }
        assert_eq!(fs::metadata(root_dir.join("upper/ab")).unwrap().uid(), 1000);
        drop(mount);
        image_mount::unmounted(&place.mounts(), image.digest).unwrap();
    }
}
