//! `seal` on real XFS and btrfs: what was equal has one anchor, what was not has its own, and no hint is ever believed.
//!
//! The oracle of every test is the bytes themselves: [`assert_sealed`] reads each raw file and the anchor that stands for it. Needs root and loop
//! devices; fails with instructions without.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::compare::{self, Compared};
use pagefold_fsadapters::sealed::report::{Outcome, RootSeal, SealReport};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::sealed::tree::{Data, EntryId, Node, Tree};
use pagefold_fsadapters::store::manifest::read_manifest;
use pagefold_fsadapters::store::{AnchorKey, OpenMode, Publication, RootRow, Store};
use pagefold_testfs::farm::manifest::Drift;
use pagefold_testfs::farm::{self, FarmFs, FarmSpec, ImageSpec, SyntheticSpec};
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::{FileType, IFlags, Mode, XattrFlags};

const BOTH: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::new(fs).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn open(rig: &LoopRig) -> Store {
    Store::open(&rig.path().join("store"), OpenMode::Create, "test").expect("a store")
}

fn seal_with(store: &Store, config: &SealConfig) -> SealReport {
    seal(store, config, &Progress::default()).expect("the store works")
}

/// Seals `roots`; all must succeed.
fn seal_all(store: &Store, roots: &[PathBuf]) -> SealReport {
    let report = seal_with(store, &SealConfig::new(roots.to_vec()));
    assert!(report.is_complete(), "{:#?}", report.errors);
    for root in &report.roots {
        assert_sealed(store, &root.path);
    }
    report
}

fn tree_of(store: &Store, root: &Path) -> (RootRow, Tree) {
    let row = store.find_root(root).expect("sealed");
    let tree = read_manifest(&store.root_dir(row.id, row.generation)).expect("a manifest");
    (row, tree)
}

fn path_in(tree: &Tree, root: &Path, entry: u32) -> PathBuf {
    root.join(OsStr::from_bytes(&tree.path(EntryId(entry))))
}

/// Paths below the root and where their bytes are.
fn anchors(store: &Store, root: &Path) -> BTreeMap<PathBuf, Option<AnchorKey>> {
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

fn same_bytes(a: &mut File, b: &mut File) -> bool {
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
fn assert_sealed(store: &Store, root: &Path) {
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

fn spec(dir: &Path, fs: RigFs, roots: u32, drift: f64) -> FarmSpec {
    FarmSpec {
        image: ImageSpec::Synthetic(SyntheticSpec { files: 300, max_bytes: 1 << 20 }),
        roots,
        drift_percent: drift,
        fs: if fs == RigFs::Xfs { FarmFs::Xfs } else { FarmFs::Btrfs },
        ..FarmSpec::new(dir)
    }
}

fn only(report: &SealReport) -> &RootSeal {
    assert_eq!(report.roots.len(), 1);
    &report.roots[0]
}

fn make_root(rig: &LoopRig, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let root = rig.path().join(name);
    std::fs::create_dir(&root).expect("a root");
    for (file, bytes) in files {
        std::fs::write(root.join(file), bytes).expect("a file");
    }
    rustix::fs::sync();
    root
}

fn reflink(from: &Path, to: &Path) {
    let dest = File::create_new(to).expect("a new file");
    clone_file(File::open(from).expect("readable"), &dest).expect("reflink");
}

fn pages(count: usize, first: u8) -> Vec<u8> {
    (0..count).flat_map(|page| vec![first.wrapping_add(page as u8); 4096]).collect()
}

#[test]
fn privileged_clones_share_one_image_and_all_anchors() {
    for fs in BOTH {
        let rig = rig(fs);
        let dir = rig.path().join("farm");
        let manifest =
            farm::create(&spec(&dir, fs, 3, 0.0), &|_| {}, &AtomicBool::new(false)).expect("a farm");
        let store = open(&rig);
        let first = seal_all(&store, &[manifest.root_path(&dir, 0)]);
        assert_eq!(only(&first).counts.hits + only(&first).counts.made + only(&first).counts.empty, 300);
        let rest = seal_all(&store, &[manifest.root_path(&dir, 1), manifest.root_path(&dir, 2)]);
        for root in &rest.roots {
            assert_eq!(root.counts.made, 0, "{fs:?}");
            assert_eq!(root.layers, only(&first).layers, "{fs:?}: clones have one image");
        }
        // Small files of btrfs are inline: extents can't decide. On XFS they always do.
        assert_eq!(rest.roots[0].counts.by_content > 0, fs == RigFs::Btrfs, "{:?}", rest.roots[0].counts);
    }
}

#[test]
fn privileged_drifted_roots_have_anchors_of_their_own_for_exactly_what_changed() {
    for fs in BOTH {
        let rig = rig(fs);
        let dir = rig.path().join("farm");
        let manifest =
            farm::create(&spec(&dir, fs, 4, 8.0), &|_| {}, &AtomicBool::new(false)).expect("a farm");
        let store = open(&rig);
        let image = dir.join("image");
        let mut all = vec![image.clone()];
        all.extend((0..4).map(|n| manifest.root_path(&dir, n)));
        seal_all(&store, &all);
        let truth = anchors(&store, &image);
        for (number, root) in manifest.roots.iter().enumerate() {
            let mut changed: std::collections::BTreeSet<PathBuf> = Default::default();
            for drift in &root.drift {
                let names = |file: u32| manifest.image.files[file as usize].names.iter().map(|n| n.0.clone());
                match drift {
                    Drift::InPlace { file, .. } => changed.extend(names(*file)),
                    Drift::Replaced { file, new } => {
                        changed.insert(new.path.0.clone());
                        changed.extend(names(*file).take(1));
                    }
                    Drift::Added { new } => drop(changed.insert(new.path.0.clone())),
                    Drift::Deleted { file } => changed.extend(names(*file).take(1)),
                }
            }
            assert!(!changed.is_empty());
            for (path, key) in anchors(&store, &manifest.root_path(&dir, number)) {
                if changed.contains(&path) {
                    // Other bytes; `assert_sealed` compared them. Equal bytes by chance (an empty file) are nobody's drift.
                    assert!(key.is_none() || truth.get(&path) != Some(&key), "{fs:?}: {}", path.display());
                } else {
                    assert_eq!(truth.get(&path), Some(&key), "{fs:?}: {}", path.display());
                }
            }
        }
    }
}

/// Design 5.6, the first conformance case: the map still names the old shared extent.
#[test]
fn privileged_an_unsynced_overwrite_of_a_clone_does_not_hit_the_old_anchor() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let old = make_root(&rig, "old", &[("file", &pages(8, 1))]);
        seal_all(&store, std::slice::from_ref(&old));
        let new = make_root(&rig, "new", &[]);
        reflink(&old.join("file"), &new.join("file"));
        rustix::fs::sync();
        let file = File::options().write(true).open(new.join("file")).expect("writable");
        file.write_all_at(&[99; 4096], 3 * 4096).expect("written");
        let report = seal_all(&store, std::slice::from_ref(&new));
        assert_eq!(only(&report).counts.made, 1, "{fs:?}");
        assert_ne!(anchors(&store, &old), anchors(&store, &new));
    }
}

/// Hints in the index that say the opposite of the truth, and anchors that are gone or not what they were.
#[test]
fn privileged_no_hint_is_believed() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let (a, b, c) = (pages(8, 1), pages(8, 50), pages(8, 100));
        let root = make_root(&rig, "root", &[("a", &a), ("b", &b), ("c", &c)]);
        seal_all(&store, std::slice::from_ref(&root));
        let known = anchors(&store, &root);
        let key = |name: &str| known[Path::new(name)].expect("not empty");
        let lookup = store.lookup().expect("a snapshot");
        let row = |name: &str| lookup.anchor(&key(name)).expect("readable").expect("known");
        let (mut row_a, mut row_b) = (row("a"), row("b"));
        std::mem::swap(&mut row_a.signature, &mut row_b.signature);
        std::mem::swap(&mut row_a.content, &mut row_b.content);
        let domain = store.ensure_domain("default").expect("a domain");
        let lie = Publication { anchors: vec![(key("a"), row_a), (key("b"), row_b)], ..Default::default() };
        store.build(&domain).publish(&lie).expect("hints are only hints");
        // And the anchor of `c` is another file now, of the same size, immutable too.
        let path = store.anchor_path(domain.id, &key("c"));
        rustix::fs::ioctl_setflags(File::open(&path).expect("there"), IFlags::empty()).expect("flags");
        std::fs::remove_file(&path).expect("gone");
        std::fs::write(&path, pages(8, 200)).expect("forged");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).expect("mode");
        rustix::fs::ioctl_setflags(File::open(&path).expect("there"), IFlags::IMMUTABLE).expect("flags");

        let clone = make_root(&rig, "clone", &[]);
        for name in ["a", "b", "c"] {
            reflink(&root.join(name), &clone.join(name));
        }
        rustix::fs::sync();
        let report = seal_all(&store, std::slice::from_ref(&clone));
        let now = anchors(&store, &clone);
        assert_ne!(now[Path::new("c")], known[Path::new("c")]);
        if fs == RigFs::Xfs {
            assert_eq!(only(&report).counts.made, 3, "lying hints cost sharing, nothing else");
        }
    }
}

#[test]
fn privileged_freed_blocks_that_another_file_got_are_not_taken_for_the_old_one() {
    let rig = LoopRig::with_size(RigFs::Xfs, 512 << 20).unwrap_or_else(|e| panic!("needs root: {e}"));
    let store = open(&rig);
    let root = make_root(&rig, "root", &[("a", &pages(64, 1))]);
    seal_all(&store, std::slice::from_ref(&root));
    let key = anchors(&store, &root)[Path::new("a")].expect("not empty");
    let before = place(&root.join("a"));
    // The anchor is lost by hand and the file deleted: its blocks are free, the index still names them.
    let anchor = store.anchor_path(tree_of(&store, &root).0.domain, &key);
    rustix::fs::ioctl_setflags(File::open(&anchor).expect("there"), IFlags::empty()).expect("flags");
    std::fs::remove_file(&anchor).expect("gone");
    std::fs::remove_file(root.join("a")).expect("gone");
    rustix::fs::sync();
    let other = make_root(&rig, "other", &[]);
    let reused = (0..200).find(|n| {
        // Beside the old one, where XFS looks for blocks first.
        let (here, path) = (root.join(format!("f{n}")), other.join(format!("f{n}")));
        std::fs::write(&here, pages(64, 7)).expect("written");
        rustix::fs::sync();
        std::fs::rename(&here, &path).expect("moved");
        place(&path) == before
    });
    assert!(reused.is_some(), "no file got the freed blocks: the test shows nothing");
    seal_all(&store, &[other]);
}

fn compared(store: &Store, path: &Path, key: AnchorKey) -> Compared {
    let domain = store.ensure_domain("default").expect("a domain").id;
    compare::with_anchor(store, domain, key, File::open(path).expect("readable").as_fd()).expect("a map")
}

#[test]
fn privileged_a_raw_file_is_compared_with_its_anchor_by_place() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let root = make_root(&rig, "root", &[("a", &pages(8, 1)), ("b", &pages(8, 50)), ("small", b"1")]);
        seal_all(&store, std::slice::from_ref(&root));
        let known = anchors(&store, &root);
        let key = |name: &str| known[Path::new(name)].expect("not empty");
        assert_eq!(compared(&store, &root.join("a"), key("a")), Compared::Same);
        assert_eq!(compared(&store, &root.join("a"), key("b")), Compared::Elsewhere);
        let small = if fs == RigFs::Btrfs { Compared::Undecided } else { Compared::Same };
        assert_eq!(compared(&store, &root.join("small"), key("small")), small);
        let file = File::options().write(true).open(root.join("a")).expect("writable");
        file.write_all_at(&[1; 4096], 0).expect("the same bytes, written anew and dirty");
        assert_eq!(compared(&store, &root.join("a"), key("a")), Compared::Elsewhere);
        file.set_len(5).expect("shorter");
        assert_eq!(compared(&store, &root.join("a"), key("a")), Compared::Elsewhere);
    }
}

/// Where a file's first extent is.
fn place(path: &Path) -> u64 {
    let mut first = 0;
    let file = File::open(path).expect("readable");
    let sync = pagefold_sys::fiemap::Sync::Yes;
    pagefold_sys::fiemap::read_extents(file.as_fd(), 1, sync, |e| first = e.physical).expect("a map");
    first
}

#[test]
fn privileged_after_a_btrfs_balance_clones_find_their_anchors_again() {
    let rig = rig(RigFs::Btrfs);
    let dir = rig.path().join("farm");
    let manifest =
        farm::create(&spec(&dir, RigFs::Btrfs, 2, 0.0), &|_| {}, &AtomicBool::new(false)).expect("a farm");
    let store = open(&rig);
    let first = manifest.root_path(&dir, 0);
    seal_all(&store, std::slice::from_ref(&first));
    let any = manifest
        .image
        .files
        .iter()
        .find(|f| f.size > 1 << 16 && f.data.first().is_some_and(|d| d.0 == 0))
        .expect("a large file");
    let before = place(&first.join(&any.names[0].0));
    let balance = Command::new("btrfs").args(["balance", "start", "--full-balance"]).arg(rig.path()).output();
    let balance = balance.expect("this test needs btrfs-progs");
    assert!(balance.status.success(), "{}", String::from_utf8_lossy(&balance.stderr));
    assert_ne!(before, place(&first.join(&any.names[0].0)), "the balance moved nothing");
    let path = &any.names[0].0;
    let key = anchors(&store, &first)[path].expect("not empty");
    assert_eq!(compared(&store, &first.join(path), key), Compared::Same, "both moved to one place");
    let report = seal_all(&store, &[manifest.root_path(&dir, 1)]);
    assert_eq!(only(&report).counts.made, 0, "{:?}", only(&report).counts);
    assert_eq!(anchors(&store, &first), anchors(&store, &manifest.root_path(&dir, 1)));
}

#[test]
fn privileged_links_odd_names_attributes_and_special_files_are_in_the_tree() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let root = make_root(&rig, "root", &[("file", b"12345"), ("empty", b"")]);
        std::fs::hard_link(root.join("file"), root.join("link")).expect("a link");
        let odd = root.join(OsStr::from_bytes(b"\xff\n\x1b[2J name"));
        std::fs::create_dir(&odd).expect("a directory");
        std::os::unix::fs::symlink("nowhere/..", odd.join("symlink")).expect("a symlink");
        let device = rustix::fs::makedev(1, 3);
        for (name, kind, rdev) in [
            ("fifo", FileType::Fifo, 0),
            ("socket", FileType::Socket, 0),
            ("null", FileType::CharacterDevice, device),
            ("block", FileType::BlockDevice, device),
        ] {
            rustix::fs::mknodat(rustix::fs::CWD, odd.join(name), kind, Mode::RUSR, rdev).expect("mknod");
        }
        for (name, value) in
            [("user.a", &b"1"[..]), ("security.capability", &CAPABILITY), ("trusted.overlay.redirect", b"/x")]
        {
            let file = File::open(root.join("file")).expect("there");
            rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty()).expect("an attribute");
        }
        seal_all(&store, std::slice::from_ref(&root));
        let (_, tree) = tree_of(&store, &root);
        let find = |path: &[u8]| {
            let entry = (0..tree.entries.len() as u32).find(|n| tree.path(EntryId(*n)) == path);
            EntryId(entry.unwrap_or_else(|| panic!("{path:?} is missing")))
        };
        let of = |entry: EntryId| tree.entries[entry.0 as usize].inode;
        assert_eq!(of(find(b"file")), of(find(b"link")));
        assert_eq!(tree.inode(find(b"file")).raw.links, 2);
        let names: Vec<&[u8]> = tree.inode(find(b"file")).meta.xattrs.iter().map(|x| &x.0[..]).collect();
        assert_eq!(names, [&b"security.capability"[..], b"trusted.overlay.redirect", b"user.a"]);
        let below = |name: &str| [&b"\xff\n\x1b[2J name/"[..], name.as_bytes()].concat();
        assert_eq!(tree.inode(find(&below("symlink"))).node, Node::Symlink(b"nowhere/.."[..].into()));
        assert_eq!(tree.inode(find(&below("fifo"))).node, Node::Fifo);
        assert_eq!(tree.inode(find(&below("socket"))).node, Node::Socket);
        assert_eq!(tree.inode(find(&below("null"))).node, Node::CharDevice(device));
        assert_eq!(tree.inode(find(&below("block"))).node, Node::BlockDevice(device));
    }
}

/// `cap_net_raw=ep`, version 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn privileged_a_busy_writer_never_makes_an_anchor_of_two_moments() {
    const PAGES: usize = 64;
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let root = make_root(&rig, "root", &[("busy", &pages(PAGES, 0)), ("quiet", &pages(3, 9))]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Page after page, so that at any moment the file is n pages of one generation, then pages of the one before.
                let file = File::options().write(true).open(root.join("busy")).expect("writable");
                let mut generation = 1u32;
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        let bytes: Vec<u8> = generation.to_le_bytes().repeat(1024);
                        file.write_all_at(&bytes, page as u64 * 4096).expect("written");
                    }
                    generation += 1;
                }
            });
            let started = Instant::now();
            let mut rounds = 0;
            while rounds < 8 || started.elapsed() < Duration::from_millis(500) {
                let report = seal_with(&store, &SealConfig::new(vec![root.clone()]));
                assert!(report.is_complete(), "{:?}", report.errors);
                let row = store.find_root(&root).expect("sealed");
                let key = anchors(&store, &root)[Path::new("busy")].expect("not empty");
                one_moment(store.open_anchor(row.domain, &key).expect("there"), PAGES);
                rounds += 1;
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

fn one_moment(mut anchor: File, pages: usize) {
    let mut bytes = Vec::new();
    anchor.seek(SeekFrom::Start(0)).expect("seek");
    anchor.read_to_end(&mut bytes).expect("readable");
    assert_eq!(bytes.len(), pages * 4096);
    let numbers: Vec<u32> = bytes
        .chunks_exact(4096)
        .map(|page| {
            let words: Vec<u32> =
                page.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().expect("four"))).collect();
            assert!(words.iter().all(|w| *w == words[0]), "a torn page");
            words[0]
        })
        .collect();
    // The first state is bytes counting up, each a page: not a number of a generation.
    if numbers.iter().all(|n| *n < 1 << 24) {
        let newest = numbers[0];
        let head = numbers.iter().take_while(|n| **n == newest).count();
        assert!(numbers[head..].iter().all(|n| *n + 1 == newest), "pages of several moments: {numbers:?}");
    }
}

#[test]
fn privileged_sealing_again_looks_only_at_what_changed() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let names: Vec<String> = (0..40).map(|n| format!("f{n:02}")).collect();
        let contents: Vec<Vec<u8>> = (0..40).map(|n| pages(3, n)).collect();
        let files: Vec<(&str, &[u8])> =
            names.iter().zip(&contents).map(|(n, c)| (n.as_str(), c.as_slice())).collect();
        let root = make_root(&rig, "root", &files);
        // Older than the clock's tick when it is sealed: a younger change time proves nothing.
        std::thread::sleep(Duration::from_millis(2100));
        seal_all(&store, std::slice::from_ref(&root));
        let first = anchors(&store, &root);
        let again = seal_all(&store, std::slice::from_ref(&root));
        assert_eq!(only(&again).outcome, Outcome::Unchanged);
        assert_eq!((only(&again).generation, only(&again).counts.unchanged), (0, 40));
        std::fs::write(root.join("f03"), pages(3, 200)).expect("changed");
        std::fs::remove_file(root.join("f05")).expect("removed");
        std::fs::write(root.join("new"), pages(2, 77)).expect("added");
        let changed = seal_all(&store, std::slice::from_ref(&root));
        let counts = only(&changed).counts;
        assert_eq!((only(&changed).outcome, only(&changed).generation), (Outcome::Sealed, 1));
        assert_eq!((counts.made, counts.unchanged, counts.files), (2, 38, 40), "{fs:?}");
        let second = anchors(&store, &root);
        assert_eq!(second.get(Path::new("f04")), first.get(Path::new("f04")));
        assert_ne!(second.get(Path::new("f03")), first.get(Path::new("f03")));
        assert!(!second.contains_key(Path::new("f05")));
    }
}

#[test]
fn privileged_what_a_view_could_not_show_is_refused_by_name_and_takes_no_other_root_with_it() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let good = make_root(&rig, "good", &[("a", b"bytes")]);
        let whiteout = make_root(&rig, "whiteout", &[]);
        let node = whiteout.join("deleted");
        rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::CharacterDevice, Mode::RUSR, 0).expect("mknod");
        let mounted = make_root(&rig, "mounted", &[]);
        std::fs::create_dir(mounted.join("inside")).expect("a directory");
        let inside = mounted.join("inside");
        let status = Command::new("mount").arg("--bind").arg(&good).arg(&inside).status();
        assert!(status.expect("mount").success());
        let mut roots =
            vec![whiteout, mounted.clone(), good.clone(), rig.path().to_owned(), store.dir().join("tmp")];
        if fs == RigFs::Btrfs {
            let nested = make_root(&rig, "nested", &[]);
            let made = Command::new("btrfs").args(["subvolume", "create"]).arg(nested.join("sub")).output();
            assert!(made.expect("btrfs-progs").status.success());
            roots.push(nested);
        }
        let report = seal_with(&store, &SealConfig::new(roots.clone()));
        rustix::mount::unmount(&inside, rustix::mount::UnmountFlags::empty()).expect("unmounted");
        let errors: Vec<&str> = report.errors.iter().map(|e| e.error.as_str()).collect();
        assert_eq!(errors.len(), roots.len() - 1, "{errors:#?}");
        for (number, word) in
            ["deleted", "inside", "each other", "each other", "sub"].iter().enumerate().take(errors.len())
        {
            assert!(errors[number].contains(word), "{}: {word}", errors[number]);
        }
        assert_eq!(report.roots.iter().filter(|r| r.outcome == Outcome::Sealed).count(), 1);
        assert_sealed(&store, &good);
    }
}

#[test]
fn privileged_equal_files_that_share_no_blocks_are_joined_when_asked() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let (large, odd) = (pages(40, 3), vec![5u8; 70_001]);
        let files: [(&str, &[u8]); 3] = [("large", &large), ("odd", &odd), ("small", b"abc")];
        let (a, b) = (make_root(&rig, "a", &files), make_root(&rig, "b", &files));
        assert_ne!(place(&a.join("large")), place(&b.join("large")));
        let config = SealConfig { content: true, ..SealConfig::new(vec![a.clone(), b.clone()]) };
        let report = seal_with(&store, &config);
        assert!(report.is_complete(), "{:?}", report.errors);
        assert_eq!(anchors(&store, &a), anchors(&store, &b), "{fs:?}");
        assert_eq!(place(&a.join("large")), place(&b.join("large")), "{fs:?}: extents decide from now on");
        assert_eq!(std::fs::read(b.join("odd")).expect("readable"), odd);
        assert_sealed(&store, &a);
        assert_sealed(&store, &b);
    }
}

#[test]
fn privileged_domains_share_no_anchor() {
    let rig = rig(RigFs::Xfs);
    let store = open(&rig);
    let a = make_root(&rig, "a", &[("file", &pages(4, 1))]);
    let b = make_root(&rig, "b", &[]);
    reflink(&a.join("file"), &b.join("file"));
    seal_all(&store, std::slice::from_ref(&a));
    let config = SealConfig { domain: "other".into(), ..SealConfig::new(vec![b.clone()]) };
    assert!(seal_with(&store, &config).is_complete());
    assert_sealed(&store, &b);
    assert_ne!(anchors(&store, &a), anchors(&store, &b));
    let report = seal_with(&store, &SealConfig { domain: "other".into(), ..SealConfig::new(vec![a]) });
    assert!(report.errors[0].error.contains("unseal"), "{:?}", report.errors);
}

#[test]
fn privileged_a_file_system_without_reflink_is_refused_with_the_reason() {
    let rig = rig(RigFs::Ext4);
    let root = make_root(&rig, "root", &[("a", b"1")]);
    let reason = pagefold_fsadapters::sealed::seal::unsupported(&root).expect("refused");
    assert!(reason.contains("ext4"), "{reason}");
    let mut file = File::create(rig.path().join("still-works")).expect("writable");
    file.write_all(b"1").expect("written");
}
