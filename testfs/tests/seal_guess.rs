//! `seal` and guesses: which anchor a clone's file has by its path is a reason to look there first, and never an answer.
//!
//! Each test makes the guess wrong in one way that its check (path, size, modification time) can't see. The oracle is the bytes
//! ([`seal_all`] compares each file with its anchor). Needs root and loop devices; fails with instructions without.

mod seal_support;

use seal_support::*;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pagefold_fsadapters::sealed::report::Outcome;
use pagefold_fsadapters::store::Store;
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::IFlags;

/// More small files than are asked for their place before others are read at once.
const SMALL: usize = 80;

fn names() -> Vec<String> {
    let small = (0..SMALL).map(|n| format!("s{n:03}"));
    small.chain(["large".into(), "other".into()]).collect()
}

/// A root with small files and two large ones, sealed, and `clones` clones of it with its times.
fn sealed_and_clones(rig: &LoopRig, store: &Store, clones: &[&str]) -> (PathBuf, Vec<PathBuf>) {
    let names = names();
    let bytes: Vec<Vec<u8>> = (0..SMALL).map(|n| format!("small file {n:04}").into_bytes()).collect();
    let (large, other) = (pages(40, 1), pages(9, 100));
    let all = bytes.iter().map(Vec::as_slice).chain([&large[..], &other[..]]);
    let files: Vec<(&str, &[u8])> = names.iter().map(String::as_str).zip(all).collect();
    let root = make_root(rig, "root", &files);
    seal_all(store, std::slice::from_ref(&root));
    let clones = clones.iter().map(|clone| {
        let clone = make_root(rig, clone, &[]);
        for name in &names {
            reflink(&root.join(name), &clone.join(name));
            times_of(&root.join(name), &clone.join(name));
        }
        rustix::fs::sync();
        clone
    });
    let clones = clones.collect();
    (root, clones)
}

fn times_of(from: &Path, to: &Path) {
    let times = std::fs::FileTimes::new().set_modified(from.metadata().unwrap().modified().unwrap());
    File::options().write(true).open(to).unwrap().set_times(times).unwrap();
}

/// Other bytes, and nothing else that a name, a size or a modification time tells.
fn rewrite_unseen(root: &Path, clone: &Path, name: &str) {
    let file = File::options().write(true).open(clone.join(name)).unwrap();
    file.write_all_at(b"SMALL", 0).unwrap();
    times_of(&root.join(name), &clone.join(name));
}

#[test]
fn privileged_a_clone_alone_and_clones_together_have_the_anchors_of_their_model() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let (root, clones) = sealed_and_clones(&rig, &store, &["alone", "b", "c"]);
        let wanted = anchors(&store, &root);
        for group in [&clones[..1], &clones[1..]] {
            let report = seal_all(&store, group);
            for sealed in &report.roots {
                assert_eq!((sealed.counts.made, sealed.counts.hits), (0, SMALL as u64 + 2), "{fs:?}");
                assert_eq!(sealed.counts.by_content > 0, fs == RigFs::Btrfs, "{:?}", sealed.counts);
            }
        }
        for clone in &clones {
            assert_eq!(anchors(&store, clone), wanted, "{fs:?}");
        }
    }
}

#[test]
fn privileged_other_bytes_under_the_same_name_size_and_time_are_seen() {
    for fs in BOTH {
        for synced in [true, false] {
            let rig = rig(fs);
            let store = open(&rig);
            let (root, clones) = sealed_and_clones(&rig, &store, &["alone", "b", "c"]);
            let changed = ["large", "s002", "s070", "s079"];
            for clone in &clones {
                for name in changed {
                    rewrite_unseen(&root, clone, name);
                }
            }
            if synced {
                rustix::fs::sync();
            }
            let wanted = anchors(&store, &root);
            for group in [&clones[..1], &clones[1..]] {
                seal_all(&store, group);
            }
            for clone in &clones {
                for (path, key) in anchors(&store, clone) {
                    let same = wanted[&path] == key;
                    let is_changed = changed.iter().any(|name| Path::new(name) == path);
                    assert_eq!(same, !is_changed, "{fs:?} synced {synced}: {}", path.display());
                }
            }
        }
    }
}

#[test]
fn privileged_an_anchor_that_is_gone_writable_or_forged_is_not_used() {
    for fs in BOTH {
        let rig = rig(fs);
        let store = open(&rig);
        let (root, clones) = sealed_and_clones(&rig, &store, &["alone", "b", "c"]);
        let (row, _) = tree_of(&store, &root);
        let known = anchors(&store, &root);
        let path_of = |name: &str| store.anchor_path(row.domain, &known[Path::new(name)].expect("has bytes"));
        let free = |name: &str| {
            let anchor = path_of(name);
            let file = File::open(&anchor).expect("there");
            rustix::fs::ioctl_setflags(file, IFlags::empty()).expect("flags");
            anchor
        };
        // Gone; open to writers; another file of that size, immutable too.
        for name in ["s050", "large"] {
            std::fs::remove_file(free(name)).expect("gone");
        }
        free("s051");
        for name in ["s052", "other"] {
            let anchor = free(name);
            let bytes = vec![b'x'; root.join(name).metadata().unwrap().len() as usize];
            std::fs::remove_file(&anchor).expect("gone");
            std::fs::write(&anchor, bytes).expect("forged");
            std::fs::set_permissions(&anchor, PermissionsExt::from_mode(0o400)).expect("mode");
            rustix::fs::ioctl_setflags(File::open(&anchor).expect("there"), IFlags::IMMUTABLE)
                .expect("flags");
        }
        rustix::fs::sync();
        for group in [&clones[..1], &clones[1..]] {
            let report = seal_all(&store, group);
            assert!(report.roots.iter().all(|root| root.outcome == Outcome::Sealed));
        }
        let now = anchors(&store, &clones[0]);
        for name in names() {
            let spoiled = ["s050", "s051", "s052", "large", "other"].contains(&name.as_str());
            let name = Path::new(&name);
            assert_eq!(now[name] != known[name], spoiled, "{fs:?}: {}", name.display());
        }
    }
}
