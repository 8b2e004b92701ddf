//! `seal` on real XFS and btrfs: what was equal has one anchor, what was not has its own, and no hint is ever believed.
//!
//! The oracle of every test is the bytes themselves: [`assert_sealed`] reads each raw file and the anchor that stands for it. Needs root and loop
//! devices; fails with instructions without.

mod seal_support;

use seal_support::*;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::sealed::report::Outcome;
use pagefold_fsadapters::sealed::seal::SealConfig;
use pagefold_fsadapters::sealed::tree::{EntryId, Node};
use pagefold_testfs::farm::manifest::Drift;
use pagefold_testfs::farm::{self};
use pagefold_testfs::rig::RigFs;
use rustix::fs::{FileType, Mode, XattrFlags};

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

/// Also while unwinding: a scope waits for its threads.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
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
            let _stop = StopAtEnd(&stop);
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
        });
    }
}

#[test]
fn privileged_names_that_come_and_go_while_a_root_is_sealed_do_not_stop_it() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let still: Vec<String> = (0..300).map(|n| format!("still{n:03}")).collect();
        let files: Vec<(&str, &[u8])> = still.iter().map(|name| (name.as_str(), &b"bytes"[..])).collect();
        let root = make_root(&rig, "root", &files);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (dir, file) =
                        (root.join(format!("dir{}", number % 7)), root.join(format!("f{}", number % 31)));
                    let _ = std::fs::create_dir(&dir);
                    let _ = std::fs::write(dir.join("inside"), number.to_string());
                    let _ = std::fs::write(&file, number.to_string());
                    let _ = std::fs::rename(&dir, root.join("moved"));
                    let _ = std::fs::remove_dir_all(root.join("moved"));
                    let _ = std::fs::remove_file(root.join(format!("f{}", (number + 15) % 31)));
                    number += 1;
                }
            });
            for _ in 0..10 {
                let report = seal_with(&store, &SealConfig::new(vec![root.clone()]));
                assert!(report.is_complete(), "{:?}", report.errors);
                let sealed = anchors(&store, &root);
                assert!(still.iter().all(|name| sealed.contains_key(Path::new(name))));
                for skipped in &report.skipped {
                    assert!(skipped.reason.contains("while"), "{skipped:?}");
                }
            }
        });
        // And when all is quiet, the tree is the root.
        seal_all(&store, std::slice::from_ref(&root));
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

/// How long a write must take so that one may have been under way in every file of `root` when it was sealed, seconds. Returns when even
/// such a write has ended.
fn since_all_are_young(store: &pagefold_fsadapters::store::Store, root: &Path) -> i64 {
    use std::os::unix::fs::MetadataExt;
    let sealed_at = store.find_root(root).expect("sealed").sealed_at;
    let ctimes = std::fs::read_dir(root)
        .expect("there")
        .map(|e| e.expect("a name").metadata().expect("there").ctime());
    let seconds = (sealed_at - ctimes.min().expect("not empty")).max(1);
    let now = || std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs().cast_signed();
    while now() <= sealed_at + seconds {
        std::thread::sleep(Duration::from_millis(50));
    }
    seconds
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
        seal_all(&store, std::slice::from_ref(&root));
        let first = anchors(&store, &root);
        // A write may have been under way when it was sealed: looked at again, with nothing found, and never after.
        let under_way_s = since_all_are_young(&store, &root);
        let config = SealConfig { under_way_s, ..SealConfig::new(vec![root.clone()]) };
        let seal_soon = || seal_with(&store, &config);
        let young = seal_soon();
        assert_eq!(only(&young).outcome, Outcome::Unchanged);
        assert_eq!((only(&young).counts.hits, only(&young).counts.unchanged), (40, 0));
        let again = seal_soon();
        assert_eq!(only(&again).outcome, Outcome::Unchanged);
        assert_eq!((only(&again).generation, only(&again).counts.unchanged), (0, 40));
        // What somebody took away is made anew, whatever the times say.
        let lost =
            store.anchor_path(tree_of(&store, &root).0.domain, &first[Path::new("f07")].expect("has bytes"));
        let file = File::open(&lost).expect("an anchor");
        let flags = rustix::fs::ioctl_getflags(&file).expect("flags");
        rustix::fs::ioctl_setflags(&file, flags - rustix::fs::IFlags::IMMUTABLE).expect("mutable");
        std::fs::remove_file(&lost).expect("removed");
        let healed = seal_soon();
        assert_eq!((only(&healed).counts.made, only(&healed).counts.unchanged), (1, 39), "{fs:?}");
        assert_sealed(&store, &root);
        std::fs::write(root.join("f03"), pages(3, 200)).expect("changed");
        std::fs::remove_file(root.join("f05")).expect("removed");
        std::fs::write(root.join("new"), pages(2, 77)).expect("added");
        let changed = seal_soon();
        let counts = only(&changed).counts;
        assert_eq!((only(&changed).outcome, only(&changed).generation), (Outcome::Sealed, 2));
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
fn privileged_a_file_system_without_reflink_is_refused_with_the_reason() {
    let rig = rig(RigFs::Ext4);
    let root = make_root(&rig, "root", &[("a", b"1")]);
    let reason = pagefold_fsadapters::sealed::seal::unsupported(&root).expect("refused");
    assert!(reason.contains("ext4"), "{reason}");
    let mut file = File::create(rig.path().join("still-works")).expect("writable");
    file.write_all(b"1").expect("written");
}
