//! `seal` and hints: whatever the index says, an anchor stands for a file only when that was proved.
//!
//! Needs root and loop devices; fails with instructions without.

mod seal_support;

use seal_support::*;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use pagefold_fsadapters::sealed::compare::{self, Compared};
use pagefold_fsadapters::sealed::seal::SealConfig;
use pagefold_fsadapters::store::{AnchorKey, Publication, Store};
use pagefold_testfs::farm::{self};
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::IFlags;

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
fn privileged_equal_roots_without_data_are_sealed_in_two_domains() {
    let rig = rig(RigFs::Xfs);
    let store = open(&rig);
    let roots: Vec<PathBuf> = ["a", "b"].map(|name| make_root(&rig, name, &[])).into();
    for (root, domain) in roots.iter().zip(["default", "other"]) {
        let config = SealConfig { domain: domain.into(), ..SealConfig::new(vec![root.clone()]) };
        assert!(seal_with(&store, &config).is_complete(), "{domain}");
        assert_sealed(&store, root);
    }
}

/// Roots that were pulled apart, the first of them sealed before anybody thought of `--content`.
#[test]
fn privileged_anchors_that_were_made_without_content_are_found_by_it() {
    for fs in BOTH {
        let rig = rig(fs);
        let (a, b, c) = (rig.path().join("a"), rig.path().join("b"), rig.path().join("c"));
        std::fs::create_dir(&a).expect("a root");
        for n in 0..30u8 {
            // Sizes that many files have: only one of each size has the bytes.
            std::fs::write(a.join(n.to_string()), vec![n; 10_000 + usize::from(n % 3) * 5000])
                .expect("a file");
        }
        let copy = |to: &Path| {
            let copied = Command::new("cp").args(["-a", "--reflink=never"]).arg(&a).arg(to).status();
            assert!(copied.expect("cp").success());
        };
        [&b, &c].into_iter().for_each(|to| copy(to));
        std::fs::write(b.join("3"), vec![77; 10_000]).expect("a file of its own");
        assert!(Command::new("sync").status().expect("sync").success());
        let store = open(&rig);
        seal_all(&store, std::slice::from_ref(&a));
        for (root, own) in [(&b, 1), (&c, 0)] {
            let config = SealConfig { content: true, ..SealConfig::new(vec![root.clone()]) };
            let report = seal_with(&store, &config);
            assert!(report.is_complete(), "{fs:?}: {:#?}", report.errors);
            assert_eq!(only(&report).counts.made, own, "{fs:?} {}", root.display());
            assert_sealed(&store, root);
        }
        let (of_a, of_b, of_c) = (anchors(&store, &a), anchors(&store, &b), anchors(&store, &c));
        assert_eq!(of_a, of_c, "{fs:?}");
        let differ: Vec<_> = of_a.iter().filter(|(path, key)| of_b.get(*path) != Some(*key)).collect();
        assert!(matches!(differ[..], [(path, _)] if path == Path::new("3")), "{fs:?}: {differ:?}");
    }
}
