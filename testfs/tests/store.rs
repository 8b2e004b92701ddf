//! The store on real XFS and btrfs: anchors, publication, copies and snapshots, a full disk, gc, verify.

mod store_common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use pagefold_fsadapters::store::{
    ImageDigest, OpenMode, ProblemKind, RootRow, SealId, Store, StoreError, Task,
};
use pagefold_testfs::rig::RigFs;

use store_common::*;

#[test]
fn privileged_what_is_published_is_there_after_a_remount() {
    for fs in FILE_SYSTEMS {
        let mut rig = rig(fs, 1 << 30);
        let dir = store_dir(&rig);
        assert_eq!(dir, rig.path().join(".pagefold"));
        let bytes = vec![7; 10_000];
        let root;
        {
            let file = source(&rig, "f", &bytes);
            let store = open(&dir);
            root = publish_one(&store, rig.path(), "a", &file, 3).unwrap();
        }
        rig.remount().unwrap();
        let store = Store::open(&dir, OpenMode::Existing, "test").unwrap();
        assert_eq!(store.roots().unwrap(), std::slice::from_ref(&root));
        assert_eq!(store.find_root("a").unwrap(), root);
        assert_eq!(store.find_root(rig.path().join("a")).unwrap(), root);
        let image = store.image(&root.layers[0]).unwrap().expect("the image");
        assert_eq!(image.anchors.len(), 3);
        let lookup = store.lookup().unwrap();
        let key = lookup.by_extents(root.domain, 10_000, &signature(1)).unwrap().expect("the hint");
        assert!(image.anchors.contains(&key));
        assert_eq!(lookup.by_extents(root.domain + 1, 10_000, &signature(1)).unwrap(), None);
        let mut read = vec![0; 10_000];
        let anchor = store.open_anchor(root.domain, &key).unwrap();
        anchor.read_exact_at(&mut read, 0).unwrap();
        assert!(read == bytes);
        let path = store.anchor_path(root.domain, &key);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.permissions().mode() & 0o7777, meta.uid(), meta.gid()), (0o400, 0, 0));
        assert!(File::options().write(true).open(&path).is_err(), "{fs:?}: an anchor is immutable");
        assert!(fs::remove_file(&path).is_err());
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o700);
    }
}

/// Clones have one image, and each is sealed by a thread of its own.
#[test]
fn privileged_threads_that_write_the_same_image_are_not_in_each_others_way() {
    const THREADS: usize = 8;
    let rig = rig(RigFs::Xfs, 400 << 20);
    let store = open(&store_dir(&rig));
    let domain = store.ensure_domain("default").unwrap();
    let build = store.build(&domain);
    for round in 0..1000u16 {
        let (digest, bytes) =
            (ImageDigest([round.to_le_bytes(); 16].concat().try_into().unwrap()), vec![round as u8; 5000]);
        let together = std::sync::Barrier::new(THREADS);
        let write = || {
            together.wait();
            build.write_image(&digest, &bytes)
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS).map(|_| scope.spawn(write)).collect();
            writers.into_iter().for_each(|w| w.join().unwrap().unwrap_or_else(|e| panic!("{round}: {e}")));
        });
        let path = store.image_path(&digest);
        assert!(fs::read(&path).unwrap() == bytes);
        assert!(fs::remove_file(&path).is_err(), "{round}: it is immutable");
    }
    assert_eq!(fs::read_dir(store.dir().join("tmp")).unwrap().count(), 0);
}

#[test]
fn privileged_speed_of_ten_thousand_anchors() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 1 << 30);
        let file = source(&rig, "f", &[7; 10_000]);
        let t = Instant::now();
        let store = open(&store_dir(&rig));
        let opened = t.elapsed();
        let domain = store.ensure_domain("default").unwrap();
        let t = Instant::now();
        let build = store.build(&domain);
        let anchors: Vec<_> = (0..10_000).map(|n| anchor(&build, &file, n).unwrap()).collect();
        let made = t.elapsed();
        let keys: Vec<_> = anchors.iter().map(|a| a.0).collect();
        let id = store.new_seal_id().unwrap();
        let (_, publication) = prepare(&build, rig.path(), id, "r", anchors).unwrap();
        let t = Instant::now();
        build.publish(&publication).unwrap();
        let published = t.elapsed();
        let lookup = store.lookup().unwrap();
        let t = Instant::now();
        for n in 0..10_000 {
            assert!(lookup.by_extents(domain.id, 10_000, &signature(n)).unwrap().is_some());
        }
        let looked_up = t.elapsed();
        let t = Instant::now();
        for key in &keys {
            assert!(lookup.anchor(key).unwrap().is_some());
        }
        let rows = t.elapsed();
        drop(lookup);
        drop(build);
        drop(store);
        let t = Instant::now();
        let store = open(&store_dir(&rig));
        let reopened = t.elapsed();
        let bytes = fs::metadata(store.dir().join("index.redb")).unwrap().blocks() * 512;
        // Loose: a build without optimisation on a slow and busy machine. What looks at all rows for each row takes longer anywhere.
        let limit = Duration::from_secs(20);
        assert!(
            published < limit && looked_up < limit && reopened < limit,
            "{published:?} {looked_up:?} {reopened:?}"
        );
        assert!(bytes < 8 << 20, "{bytes} bytes of index");
        println!(
            "{fs:?}: create {opened:?}, 10,000 anchors {made:?}, publish {published:?}, 10,000 hints {looked_up:?}, rows {rows:?}, \
             open {reopened:?}, index {bytes} bytes"
        );
    }
}

#[test]
fn privileged_copies_and_snapshots_are_refused() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let dir = store_dir(&rig);
        let file = source(&rig, "f", &BYTES);
        drop(publish_one(&open(&dir), rig.path(), "a", &file, 1).unwrap());
        let copy = rig.path().join("copy");
        let status = if fs == RigFs::Btrfs {
            Command::new("btrfs").args(["-q", "subvolume", "snapshot"]).arg(&dir).arg(&copy).status()
        } else {
            Command::new("cp").arg("-a").arg(&dir).arg(&copy).status()
        };
        assert!(status.unwrap().success());
        let before = fs::read(copy.join("index.redb")).unwrap();
        let refused = Store::open(&copy, OpenMode::Create, "test");
        assert!(matches!(refused, Err(StoreError::Foreign { .. })), "{refused:?}");
        assert!(fs::read(copy.join("index.redb")).unwrap() == before, "what is refused is not touched");
        // In the place of the original, too.
        fs::rename(&dir, rig.path().join("away")).unwrap();
        fs::rename(&copy, &dir).unwrap();
        let refused = Store::open(&dir, OpenMode::Existing, "test");
        assert!(matches!(refused, Err(StoreError::Foreign { .. })), "{refused:?}");
        // The original under another name is the original.
        let moved = Store::open(&rig.path().join("away"), OpenMode::Existing, "test").unwrap();
        assert_eq!(moved.verify(&Task::default()).unwrap().problems, []);
        if fs == RigFs::Btrfs {
            let plain = rig.path().join("plain");
            fs::create_dir(&plain).unwrap();
            fs::set_permissions(&plain, fs::Permissions::from_mode(0o700)).unwrap();
            let refused = Store::open(&plain, OpenMode::Create, "test");
            assert!(matches!(refused, Err(StoreError::Untrusted { .. })), "{refused:?}");
        }
    }
}

#[test]
fn privileged_a_full_disk_leaves_the_last_good_state() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, if fs == RigFs::Xfs { 320 << 20 } else { 200 << 20 });
        let dir = store_dir(&rig);
        let file = source(&rig, "f", &BYTES);
        publish_one(&open(&dir), rig.path(), "a", &file, 50).unwrap();
        let hog = fill(&rig.path().join("filler"));
        // With ever more room, so that it fails at the first step, at a later one, and then not at all.
        let mut failures = Vec::new();
        let full = hog.metadata().unwrap().len();
        for room in (0..200).map(|n| n * (256 << 10)) {
            hog.set_len(full - room).unwrap();
            rustix::fs::syncfs(&hog).unwrap();
            let store = match Store::open(&dir, OpenMode::Existing, "test") {
                Ok(store) => store,
                Err(e) => {
                    failures.push(e.to_string());
                    continue;
                }
            };
            let result = publish_one(&store, rig.path(), "b", &file, 3000);
            if result.is_ok() {
                break;
            }
            failures.push(result.unwrap_err().to_string());
            assert!(store.roots().is_err() || store.roots().unwrap().len() == 1);
        }
        assert!(!failures.is_empty() && failures.len() < 200, "{fs:?}: {failures:?}");
        for error in &failures {
            assert!(error.contains("free some space"), "{error}");
        }
        let store = Store::open(&dir, OpenMode::Existing, "test").unwrap();
        assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?}");
        assert_eq!(store.roots().unwrap().len(), 2, "{fs:?}");
        failures.dedup_by_key(|f| f[..20].to_owned());
        println!("{fs:?}: {failures:#?}");
    }
}

/// Fills the disk to the last block.
fn fill(path: &Path) -> File {
    let hog = File::create(path).unwrap();
    let block = vec![1; 1 << 20];
    for size in [1 << 20, 4096] {
        let mut at = hog.metadata().unwrap().len();
        while hog.write_all_at(&block[..size], at).is_ok() {
            at += size as u64;
        }
        let _ = hog.sync_all();
    }
    hog
}

#[test]
fn privileged_nothing_is_inherited_from_above() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let above = rig.path().join("above");
        fs::create_dir(&above).unwrap();
        fs::set_permissions(&above, fs::Permissions::from_mode(0o2777)).unwrap();
        let run = |program: &str, args: &[&str]| {
            let status = Command::new(program).args(args).arg(&above).status();
            assert!(status.unwrap_or_else(|e| panic!("{program}: {e}")).success(), "{program} {args:?}");
        };
        // Version 2, then: owner rwx, user 1000 rwx, group r-x, mask rwx, others r-x.
        let acl: Vec<u8> =
            [(1u16, 7u16, u32::MAX), (2, 7, 1000), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 5, u32::MAX)]
                .iter()
                .flat_map(|(tag, perm, id)| {
                    [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
                })
                .collect();
        let acl = [&2u32.to_le_bytes()[..], &acl].concat();
        rustix::fs::setxattr(&above, "system.posix_acl_default", &acl, rustix::fs::XattrFlags::empty())
            .unwrap();
        match fs {
            RigFs::Xfs => run("chattr", &["+P", "-p", "77"]),
            _ => run("chattr", &["+C"]),
        }
        let dir = above.join("store");
        let file = source(&rig, "f", &BYTES);
        let store = open(&dir);
        let root = publish_one(&store, rig.path(), "a", &file, 1).unwrap();
        assert_eq!(store.verify(&Task::default()).unwrap().problems, []);
        let key = store.image(&root.layers[0]).unwrap().unwrap().anchors[0];
        let anchor = store.open_anchor(root.domain, &key).unwrap();
        let attributes = pagefold_sys::attr::file_attributes(std::os::fd::AsFd::as_fd(&anchor)).unwrap();
        assert_eq!(attributes.project, 0, "{fs:?}");
        let mut names = [0; 100];
        assert_eq!(rustix::fs::flistxattr(&anchor, &mut names).unwrap(), 0, "{fs:?}");
        assert_eq!(anchor.metadata().unwrap().gid(), 0);
    }
}

#[test]
fn privileged_verify_names_what_is_wrong() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let file = source(&rig, "f", &BYTES);
        let store = open(&store_dir(&rig));
        let root = publish_one(&store, rig.path(), "a", &file, 4).unwrap();
        let anchors = store.image(&root.layers[0]).unwrap().unwrap().anchors;
        let path = |n: usize| store.anchor_path(root.domain, &anchors[n]);
        let thaw = |path: &Path| {
            assert!(Command::new("chattr").arg("-i").arg(path).status().unwrap().success());
        };
        // What is cached is compared; all is well.
        fs::read(path(0)).unwrap();
        let report = store.verify(&Task::default()).unwrap();
        assert_eq!((report.problem_count, report.anchors, report.images, report.roots), (0, 4, 1, 1));
        assert!(report.compared_bytes >= BYTES.len() as u64, "{fs:?}: {report:?}");
        thaw(&path(0));
        thaw(&path(1));
        fs::remove_file(path(1)).unwrap();
        thaw(&path(2));
        fs::set_permissions(path(2), fs::Permissions::from_mode(0o604)).unwrap();
        fs::write(path(2), "short").unwrap();
        let stray = path(3).with_file_name("stray");
        fs::write(&stray, "").unwrap();
        let image = store.image_path(&root.layers[0]);
        thaw(&image);
        File::options().write(true).open(&image).unwrap().write_all_at(b"X", 2000).unwrap();
        fs::write(store.root_dir(root.id, 1).join("manifest"), "no manifest").unwrap();
        fs::remove_dir(store.root_dir(root.id, 1).join("work")).unwrap();
        let report = store.verify(&Task::default()).unwrap();
        let mut found: Vec<(PathBuf, ProblemKind)> =
            report.problems.iter().map(|p| (p.path.clone(), p.kind)).collect();
        // The first is open now, and by its change time it was opened.
        found.dedup();
        let wanted = [
            (path(0), ProblemKind::Open),
            (path(1), ProblemKind::Missing),
            (path(2), ProblemKind::Damaged),
            (stray, ProblemKind::Unexpected),
            (image, ProblemKind::Damaged),
            (store.root_dir(root.id, 1).join("manifest"), ProblemKind::Damaged),
            (store.root_dir(root.id, 1).join("work"), ProblemKind::Missing),
        ];
        for want in &wanted {
            assert!(found.contains(want), "{fs:?}: {want:?} not in {:#?}", report.problems);
        }
        assert_eq!(found.len(), wanted.len(), "{:#?}", report.problems);
    }
}

/// On XFS (btrfs has checksums: a changed disk is an I/O error there) the disk is changed below the file system.
#[test]
fn privileged_verify_compares_the_cache_with_the_disk() {
    let mut rig = rig(RigFs::Xfs, 400 << 20);
    let dir = store_dir(&rig);
    let mut bytes = vec![0x5a; 20 * 4096];
    bytes[5 * 4096..].fill(0xa5);
    let key;
    {
        let file = source(&rig, "f", &bytes);
        let store = open(&dir);
        let root = publish_one(&store, rig.path(), "a", &file, 1).unwrap();
        key = store.image(&root.layers[0]).unwrap().unwrap().anchors[0];
    }
    rig.remount().unwrap();
    let store = open(&dir);
    let anchor = store.open_anchor(0, &key).unwrap();
    // Pages 4 to 7 of 20 are cached, not more: no read-ahead.
    rustix::fs::fadvise(&anchor, 0, None, rustix::fs::Advice::Random).unwrap();
    let mut read = vec![0; 4 * 4096];
    anchor.read_exact_at(&mut read, 4 * 4096).unwrap();
    let report = store.verify(&Task::default()).unwrap();
    assert_eq!((report.problem_count, report.compared_bytes), (0, 4 * 4096));
    let mut physical = None;
    let sync = pagefold_sys::fiemap::Sync::No;
    pagefold_sys::fiemap::read_extents(std::os::fd::AsFd::as_fd(&anchor), 1, sync, |e| {
        physical = physical.or(Some(e.physical));
    })
    .unwrap();
    let image = rig.path().parent().unwrap().join("backing.img");
    let disk = File::options().write(true).open(image).unwrap();
    disk.write_all_at(b"!", physical.unwrap() + 6 * 4096 + 17).unwrap();
    disk.sync_all().unwrap();
    let report = store.verify(&Task::default()).unwrap();
    let [problem] = &report.problems[..] else { panic!("{report:?}") };
    assert_eq!((problem.kind, problem.offset), (ProblemKind::CacheDiffers, Some(6 * 4096)));
}

#[test]
fn privileged_gc_keeps_what_an_upper_needs() {
    let rig = rig(RigFs::Xfs, 400 << 20);
    let file = source(&rig, "f", &BYTES);
    let mut store = open(&store_dir(&rig));
    let a = publish_one(&store, rig.path(), "a", &file, 3).unwrap();
    let domain = store.ensure_domain("default").unwrap();
    // A second generation with other anchors; the first was written to.
    {
        let build = store.build(&domain);
        let anchors = vec![anchor(&build, &file, 9).unwrap()];
        let id = SealId(a.id.0 + 1000);
        let (mut row, mut publication) = prepare(&build, rig.path(), id, "a", anchors).unwrap();
        build.make_root_dir(a.id, 2).unwrap();
        row.id = a.id;
        row.generation = 2;
        publication.roots = vec![row];
        build.publish(&publication).unwrap();
    }
    let upper = store.root_dir(a.id, 1).join("upper");
    fs::write(upper.join("written"), "").unwrap();
    let kept = store.gc(&|_| false, &Task::default()).unwrap();
    assert_eq!((kept.anchors, kept.images, kept.generations_kept), (0, 0, 1));
    assert!(matches!(store.remove_generation(a.id, 1), Err(StoreError::UpperNotEmpty { .. })));
    assert!(matches!(store.remove_root(a.id), Err(StoreError::UpperNotEmpty { .. })));
    fs::remove_file(upper.join("written")).unwrap();
    File::open(&upper).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    // Nothing written, but live.
    let asked = std::cell::RefCell::new(Vec::new());
    let live = |row: &RootRow| {
        asked.borrow_mut().push((row.id, row.generation, row.layers.clone()));
        true
    };
    assert_eq!(store.gc(&live, &Task::default()).unwrap().generations, 0);
    assert_eq!(asked.into_inner(), [(a.id, 1, a.layers.clone())]);
    let report = store.gc(&|_| false, &Task::default()).unwrap();
    assert_eq!((report.generations, report.images, report.anchors, report.anchors_kept), (1, 1, 3, 1));
    assert_eq!(report.anchor_bytes, 3 * BYTES.len() as u64);
    assert!(!store.image_path(&a.layers[0]).exists() && !upper.exists());
    let lookup = store.lookup().unwrap();
    assert_eq!(lookup.by_extents(domain.id, BYTES.len() as u64, &signature(1)).unwrap(), None);
    assert!(lookup.by_extents(domain.id, BYTES.len() as u64, &signature(9)).unwrap().is_some());
}

/// The mark of a directory that no commit named lies in it, and must not go before the rest: nobody could tell then what that is.
#[test]
fn privileged_an_unpublished_directory_that_went_half_way_is_no_hindrance() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let dir = store_dir(&rig);
        let store = open(&dir);
        let domain = store.ensure_domain("default").unwrap();
        let id = store.new_seal_id().unwrap();
        let build = store.build(&domain);
        let made = build.make_root_dir(id, 0).unwrap();
        // What resists stands for a kill in the middle.
        let resists = made.join("diff/filler");
        fs::create_dir_all(&resists).unwrap();
        rustix::mount::mount_bind(rig.path(), &resists).unwrap();
        drop(build);
        let held: Vec<_> = fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
            .filter(|at| at.starts_with(&dir) && at.ends_with("diff/filler"))
            .collect();
        assert_eq!(held.len(), 1, "{fs:?}: what is mounted is not crossed");
        rustix::mount::unmount(&held[0], rustix::mount::UnmountFlags::DETACH).unwrap();
        let build = store.build(&domain);
        build.make_root_dir(id, 0).unwrap_or_else(|e| panic!("{fs:?}: {e}"));
        drop(build);
        drop(store);
        let store = Store::open(&dir, OpenMode::Existing, "test").unwrap();
        assert!(fs::read_dir(dir.join("tmp")).unwrap().next().is_none(), "{fs:?}");
        assert!(!store.root_dir(id, 0).exists(), "{fs:?}");
    }
}
