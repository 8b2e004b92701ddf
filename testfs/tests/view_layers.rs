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
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree, Xattr,
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

#[path = "commit_support/snapshot.rs"]
mod snapshot;
use snapshot::{Seen, Snapshot, differences, take};

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
        let started = std::time::Instant::now();
        while state() != UpperState::Free {
            assert!(started.elapsed().as_secs() < 30, "the view stays alive");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }

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

/// Numbers that only look random.
struct Dice(blake3::OutputReader);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.number() % n
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.0.fill(&mut bytes);
        bytes
    }

    /// Anything that a name or a link may hold.
    fn text(&mut self, length: u64) -> Box<[u8]> {
        self.bytes(length).into_iter().map(|b| if matches!(b, 0 | b'/') { b'_' } else { b }).collect()
    }

    fn xattrs(&mut self) -> Vec<Xattr> {
        let (count, length) = match self.below(20) {
            0 => (240, 60),
            1 => (3, 65_535),
            2 => (1, 65_535),
            3 => (60, 4000),
            4..12 => (3, 40),
            _ => (0, 0),
        };
        let mut all = std::collections::BTreeMap::new();
        for _ in 0..self.below(count + 1) {
            let prefix = ["user.", "trusted.", "security.", "trusted.overlay."][self.below(4) as usize];
            let most = if self.below(8) == 0 { 200 } else { 8 };
            let letters = 1 + self.below(most);
            let rest: String = (0..letters).map(|_| (b'a' + self.below(26) as u8) as char).collect();
            let value = self.below(length + 1);
            // Equal values on many inodes are kept once in an image.
            let value = if self.below(3) == 0 { vec![b'v'; value as usize] } else { self.bytes(value) };
            all.insert(format!("{prefix}{rest}").into_bytes().into_boxed_slice(), value.into_boxed_slice());
        }
        all.into_iter().collect()
    }

    fn meta(&mut self) -> Meta {
        let times = [0, 1, -1, -1 << 31, 1 << 31, (1 << 33) + 5, self.below(1 << 32) as i64];
        let owners = [0, 1, 65_535, 65_536, u32::MAX - 1];
        Meta {
            mode: self.below(0o10000) as u32,
            uid: owners[self.below(5) as usize],
            gid: owners[self.below(5) as usize],
            mtime: (times[self.below(7) as usize], self.below(1_000_000_000) as u32),
            xattrs: self.xattrs(),
        }
    }

    fn node(&mut self) -> Node {
        match self.below(12) {
            0..4 => Node::Dir,
            4..7 => Node::File { size: 5, data: Data::Anchor(KEY) },
            7 => Node::File { size: 0, data: Data::Empty },
            8 => {
                let length = if self.below(2) == 0 { 1 + self.below(60) } else { 1 + self.below(4095) };
                Node::Symlink(self.text(length))
            }
            9 => Node::CharDevice(1 + self.below(u64::from(u32::MAX))),
            10 => Node::BlockDevice(self.below(1 << 32)),
            _ => [Node::Fifo, Node::Socket][self.below(2) as usize].clone(),
        }
    }

    fn tree(&mut self) -> Tree {
        let mut tree = tree(&Meta { xattrs: Vec::new(), mode: 0o755, ..meta((1, 1)) }, &[]);
        let mut dirs = vec![EntryId(0)];
        for index in 1..20 + self.below(300) as u32 {
            let parent = dirs[self.below(dirs.len() as u64) as usize];
            // Unique by its number; two hex digits at first, as the writer's own whiteouts have.
            let length = if self.below(10) == 0 { self.below(250) } else { self.below(9) };
            let name = [format!("{index:02x}").as_bytes(), &self.text(length)].concat();
            let another = InodeIndex(self.below(u64::from(index)) as u32);
            let link = self.below(8) == 0
                && tree.inodes.get(another.0 as usize).is_some_and(|i| i.node != Node::Dir);
            let inode = if link { another } else { InodeIndex(tree.inodes.len() as u32) };
            if !link {
                let (node, mut meta) = (self.node(), self.meta());
                if node == Node::Dir {
                    dirs.push(EntryId(index));
                } else if !matches!(node, Node::File { .. }) {
                    // The kernel lets only files and directories have these.
                    meta.xattrs.retain(|(name, _)| !name.starts_with(b"user."));
                }
                tree.inodes.push(Inode { meta, raw: RawFacts::default(), node });
            }
            tree.entries.push(Entry { parent, name: name.into(), inode });
        }
        tree
    }
}

/// What a view of `tree` must show.
fn expected(tree: &Tree) -> Snapshot {
    let mut names: std::collections::HashMap<u32, Vec<Vec<u8>>> = std::collections::HashMap::new();
    for (index, entry) in tree.entries.iter().enumerate() {
        names.entry(entry.inode.0).or_default().push(tree.path(EntryId(index as u32)));
    }
    let mut all = Snapshot::new();
    for (number, mut paths) in names {
        paths.sort();
        let inode = &tree.inodes[number as usize];
        let (kind, size, rdev, target) = match &inode.node {
            Node::Dir => (0o040_000, 0, 0, vec![]),
            Node::File { size, .. } => (0o100_000, *size, 0, vec![]),
            Node::Symlink(target) => (0o120_000, target.len() as u64, 0, target.to_vec()),
            Node::Fifo => (0o010_000, 0, 0, vec![]),
            Node::Socket => (0o140_000, 0, 0, vec![]),
            Node::CharDevice(rdev) => (0o020_000, 0, *rdev, vec![]),
            Node::BlockDevice(rdev) => (0o060_000, 0, *rdev, vec![]),
        };
        let bytes: &[u8] = if size == 0 { b"" } else { b"hello" };
        let is_dir = inode.node == Node::Dir;
        for path in &paths {
            let seen = Seen {
                mode: kind | inode.meta.mode,
                owner: (inode.meta.uid, inode.meta.gid),
                size,
                mtime: (inode.meta.mtime.0, inode.meta.mtime.1.into()),
                rdev,
                target: target.clone(),
                xattrs: inode.meta.xattrs.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect(),
                hash: (kind == 0o100_000).then(|| blake3::hash(bytes)),
                links: if is_dir { (path.clone(), 0) } else { (paths[0].clone(), paths.len() as u64) },
            };
            all.insert(path.clone(), seen);
        }
    }
    all
}

#[test]
fn privileged_what_an_image_holds_a_view_shows() {
    let rig = rig(RigFs::Btrfs);
    let place = Place::new(&rig);
    place.anchor(KEY, b"hello");
    for seed in 0..30 {
        let tree = Dice::new(seed).tree();
        let image = place.image(&tree);
        let root_dir = place.root_dir(&format!("r{seed}"), &tree);
        let mount = overlay(&place.layers(&root_dir, &image), MountAttrFlags::empty()).unwrap();
        let differ = differences(&expected(&tree), &take(&inside(&mount)), true);
        let shown: Vec<String> = differ.iter().take(3).map(|d| d.chars().take(600).collect()).collect();
        assert!(differ.is_empty(), "seed {seed}: {} differ: {shown:#?}", differ.len());
        drop(mount);
        image_mount::unmounted(&place.mounts(), image.digest).unwrap();
    }
}
