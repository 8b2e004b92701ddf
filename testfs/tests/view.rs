//! What a view shows, shares and breaks, on real XFS and btrfs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use pagefold_fsadapters::sealed::live::UpperState;
use pagefold_fsadapters::sealed::mount::{MountOptions, discard_writes, mount_views};
use pagefold_fsadapters::sealed::raw::open_raw_root;
use pagefold_fsadapters::sealed::tree::{Data, Node};
use pagefold_fsadapters::store::manifest::read_manifest;
use pagefold_fsadapters::store::{RootRow, Store};
use pagefold_sys::attr::{XFLAG_PROJINHERIT, file_attributes, set_file_attributes};
use pagefold_sys::cache::drop_cached;
use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_testfs::rig::RigFs;

mod view_support;
use view_support::snapshot::{differences, take};
use view_support::{
    BOTH, Home, bytes, cached, clone_tree, dir, files, large_file, odd_root, plain_root, settle,
};

/// Where the data of a root's file is.
fn anchor_of(store: &Store, row: &RootRow, path: &str) -> PathBuf {
    let tree = read_manifest(&store.root_dir(row.id, row.generation)).unwrap();
    let ids = (0..tree.entries.len() as u32).map(pagefold_fsadapters::sealed::tree::EntryId);
    let id = ids.into_iter().find(|id| tree.path(*id) == path.as_bytes()).unwrap();
    match &tree.inode(id).node {
        Node::File { data: Data::Anchor(key), .. } => store.anchor_path(row.domain, key),
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn privileged_a_view_shows_what_its_root_shows() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        odd_root(&home.at("a"));
        let before = take(&home.at("a"));
        assert!(before.len() > 30 && before.values().any(|s| s.xattrs.len() > 3));
        let store = home.store();
        let rows = home.seal(&store, &["a"]);
        let view = home.mount(&store, &rows[0], "view");
        let seen = take(&view);
        assert_eq!(differences(&before, &seen, true), [""; 0], "{fs:?}");
        assert_eq!(differences(&take(&home.at("a")), &before, true), [""; 0], "the raw root has changed");
        // The same after everything was dropped and mounted again.
        home.umount(&store, &view);
        home.mount(&store, &rows[0], "view");
        assert_eq!(differences(&before, &take(&view), true), [""; 0], "{fs:?}");
    }
}

#[test]
fn privileged_what_one_view_has_read_costs_the_next_nothing() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = home.sealed(&["a", "b"]);
        assert_eq!(rows[0].layers, rows[1].layers, "equal roots have one image");
        let anchors = files(&home.at(".pagefold/anchors"));
        assert_eq!(anchors.len(), 4);
        for file in anchors.iter().chain(&files(&home.at("a"))).chain(&files(&home.at("b"))) {
            drop_cached(File::open(file).unwrap(), 0, 0).ok();
            let file = File::open(file).unwrap();
            drop_cached(&file, 0, file.metadata().unwrap().len()).unwrap();
        }
        let count = |paths: &[PathBuf]| paths.iter().map(|p| cached(p)).sum::<u64>();
        assert_eq!(count(&anchors), 0);
        let mut after = Vec::new();
        for (row, name) in rows.iter().zip(["view a", "view b"]) {
            let view = home.mount(&store, row, name);
            for file in files(&view) {
                let mut text = Vec::new();
                File::open(&file).unwrap().read_to_end(&mut text).unwrap();
                let raw = row.path.join(file.strip_prefix(&view).unwrap());
                assert_eq!(text.len() as u64, fs::metadata(raw).unwrap().len());
            }
            after.push(count(&anchors));
        }
        // 100000, 4096, 50001 and 300000 bytes in pages.
        assert_eq!(after, [25 + 1 + 13 + 74; 2], "{fs:?}");
        let raw: Vec<PathBuf> = ["a", "b"].iter().flat_map(|n| files(&home.at(n))).collect();
        assert_eq!(count(&raw), 0, "{fs:?}: the raw files were read");
    }
}

#[test]
fn privileged_a_write_breaks_its_file_and_no_other() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = home.sealed(&["a", "b"]);
        let raw = take(&home.at("a"));
        let (a, b) = (home.mount(&store, &rows[0], "va"), home.mount(&store, &rows[1], "vb"));
        File::options().write(true).open(a.join("f")).unwrap().write_all_at(b"changed", 4096).unwrap();
        fs::rename(a.join("dir"), a.join("moved")).unwrap();
        fs::remove_file(a.join("g")).unwrap();
        let mut want = bytes(0, 100_000);
        want[4096..4103].copy_from_slice(b"changed");
        assert_eq!(fs::read(a.join("f")).unwrap(), want);
        assert_eq!(fs::read(a.join("moved/h")).unwrap(), bytes(2, 50_001));
        assert!(!a.join("g").exists());
        let same = |path: &Path| assert_eq!(differences(&raw, &take(path), true), [""; 0], "{fs:?} {path:?}");
        same(&home.at("a"));
        same(&home.at("b"));
        same(&b);
        assert_eq!(fs::read(anchor_of(&store, &rows[0], "f")).unwrap(), bytes(0, 100_000));
        // What was written outlives the mount, until it is thrown away.
        let done = home.umount(&store, &a);
        assert_eq!((done.root, done.state), (Some(rows[0].id), Some(UpperState::Free)));
        let a = home.mount(&store, &rows[0], "va");
        assert_eq!(fs::read(a.join("f")).unwrap(), want);
        discard_writes(&store, &rows[0]).unwrap_err();
        home.umount(&store, &a);
        assert!(discard_writes(&store, &rows[0]).unwrap().entries > 2);
        let a = home.mount(&store, &rows[0], "va");
        same(&a);
    }
}

#[test]
fn privileged_the_first_write_to_a_large_file_copies_no_data() {
    const LENGTH: u64 = 1 << 30;
    for fs in BOTH {
        let mut home = Home::new(fs);
        fs::create_dir(home.at("a")).unwrap();
        large_file(&home.at("a/large"), LENGTH);
        settle(&home.at("a"));
        let store = home.store();
        let rows = home.seal(&store, &["a"]);
        let view = home.mount(&store, &rows[0], "view");
        let start = Instant::now();
        let file = File::options().write(true).open(view.join("large")).unwrap();
        let took = start.elapsed();
        file.write_all_at(b"x", 5 << 20).unwrap();
        file.sync_all().unwrap();
        // For the curious; what the extents say below does not depend on the machine.
        eprintln!("{fs:?}: copy-up of 1 GiB took {took:?}");
        let extents = |path: &Path| {
            let mut all = Vec::new();
            read_extents(File::open(path).unwrap().as_fd(), LENGTH, Sync::Yes, |e| {
                // Block by block: where one file has two extents the other may have one.
                for at in (0..e.length).step_by(4096) {
                    all.push((e.logical + at, e.physical + at));
                }
            })
            .unwrap();
            all
        };
        let upper = store.root_dir(rows[0].id, rows[0].generation).join("upper/large");
        let (upper, anchor) = (extents(&upper), extents(&anchor_of(&store, &rows[0], "large")));
        assert_eq!((upper.len(), anchor.len()), (1 << 18, 1 << 18));
        let differ = upper.iter().zip(&anchor).filter(|(a, b)| a != b).count();
        // XFS copies on write by its hint, 32 blocks; btrfs by the page.
        assert!((1..=32).contains(&differ), "{fs:?}: {differ} blocks differ");
    }
}

#[test]
fn privileged_in_place_the_view_hides_the_root_and_the_root_can_be_opened() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = home.sealed(&["a"]);
        let before = take(&home.at("a"));
        let view = home.mount(&store, &rows[0], "a");
        assert_eq!(view, home.at("a"));
        fs::write(view.join("new"), b"new").unwrap();
        let raw = open_raw_root(&rows[0]).unwrap();
        let raw_path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&raw)));
        assert!(!raw_path.join("new").exists());
        assert_eq!(differences(&before, &take(&raw_path), true), [""; 0]);
        assert_eq!(pagefold_fsadapters::sealed::mount::store_of(&view).unwrap(), store.dir());
        home.umount(&store, &view);
        assert!(!home.at("a/new").exists());
        // A directory that took the root's place is not the root.
        fs::rename(home.at("a"), home.at("b")).unwrap();
        fs::create_dir(home.at("a")).unwrap();
        let error = open_raw_root(&rows[0]).unwrap_err().to_string();
        assert!(error.contains("not the directory that was sealed"), "{error}");
        home.try_mount(&store, &rows[0], "view", &MountOptions::default()).unwrap_err();
    }
}

#[test]
fn privileged_a_root_that_is_a_mount_of_its_own_can_be_opened_below_its_view() {
    let mut home = Home::new(RigFs::Xfs);
    home.bound_root();
    let store = home.store();
    let rows = home.seal(&store, &["a"]);
    let view = home.mount(&store, &rows[0], "a");
    fs::write(view.join("new"), b"new").unwrap();
    let raw = open_raw_root(&rows[0]).unwrap();
    assert_eq!(rustix::fs::fstat(&raw).unwrap().st_ino, fs::metadata(home.at("real")).unwrap().ino());
    drop(raw);
    home.umount(&store, &view);
    rustix::mount::unmount(home.at("a"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn privileged_writes_count_to_the_root_s_project() {
    let mut home = Home::new(RigFs::Xfs);
    let root = home.at("a");
    fs::create_dir(&root).unwrap();
    let fd = dir(&root);
    let mut attributes = file_attributes(fd.as_fd()).unwrap();
    attributes.project = 42;
    attributes.flags |= XFLAG_PROJINHERIT;
    set_file_attributes(fd.as_fd(), attributes).unwrap();
    plain_root(&root);
    let store = home.store();
    let rows = home.seal(&store, &["a"]);
    let view = home.mount(&store, &rows[0], "view");
    File::options().append(true).open(view.join("f")).unwrap().write_all(b"x").unwrap();
    fs::write(view.join("new"), b"new").unwrap();
    fs::rename(view.join("new"), view.join("dir/newer")).unwrap();
    fs::rename(view.join("g"), view.join("dir/g")).unwrap();
    let upper = store.root_dir(rows[0].id, rows[0].generation).join("upper");
    for name in [".", "f", "dir", "dir/newer", "dir/g"] {
        let file = File::open(upper.join(name)).unwrap();
        assert_eq!(file_attributes(file.as_fd()).unwrap().project, 42, "{name}");
    }
}

#[test]
fn privileged_64_views_are_mounted_at_once() {
    let mut home = Home::new(RigFs::Xfs);
    plain_root(&home.at("a"));
    let names: Vec<String> = (0..64).map(|i| format!("r{i:02}")).collect();
    for name in &names {
        clone_tree(&home.at("a"), &home.at(name));
    }
    settle(&home.at("a"));
    let store = home.store();
    let rows = home.seal(&store, &names.iter().map(String::as_str).collect::<Vec<_>>());
    let target = |row: &RootRow| home.at("views").join(&row.name);
    rows.iter().for_each(|row| fs::create_dir_all(target(row)).unwrap());
    let requests: Vec<(RootRow, PathBuf)> = rows.iter().map(|r| (r.clone(), target(r))).collect();
    let start = Instant::now();
    let results = mount_views(&store, &requests, &MountOptions::default());
    let took = start.elapsed();
    eprintln!("64 views in {took:?} (without optimisation)");
    let mounted: Vec<PathBuf> = results.into_iter().map(|r| r.unwrap().target).collect();
    assert_eq!(fs::read_dir(store.dir().join("mounts")).unwrap().count(), 1, "one image for all");
    assert_eq!(store.views().unwrap().len(), 64);
    for view in &mounted {
        assert_eq!(fs::read(view.join("g")).unwrap(), bytes(1, 4096));
    }
    for view in &mounted {
        home.umount(&store, view);
    }
    assert_eq!(fs::read_dir(store.dir().join("mounts")).unwrap().count(), 0);
    assert_eq!(store.views().unwrap(), []);
    // Twenty times what it takes: more is no slow machine.
    assert!(took.as_secs() < 60, "{took:?}");
}

#[test]
fn privileged_a_mapped_view_belongs_to_its_container() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        plain_root(&home.at("a"));
        std::os::unix::fs::chown(home.at("a/g"), Some(33), Some(34)).unwrap();
        settle(&home.at("a"));
        let store = home.store();
        let rows = home.seal(&store, &["a"]);
        let map = "0:100000:65536";
        let options = MountOptions { id_map: Some(map.parse().unwrap()), ..MountOptions::default() };
        let view = home.try_mount(&store, &rows[0], "view", &options).unwrap().target;
        assert_eq!(store.view(rows[0].id).unwrap().unwrap().idmap, map);
        assert_eq!(pagefold_fsadapters::sealed::mount::store_of(&view).unwrap(), store.dir());
        let g = fs::metadata(view.join("g")).unwrap();
        assert_eq!((g.uid(), g.gid()), (100_033, 100_034), "{fs:?}");
        assert_eq!(fs::read(view.join("g")).unwrap(), bytes(1, 4096));
        // The container's root is nobody here: what it may, it may through the map.
        let status = std::process::Command::new("setpriv")
            .args(["--reuid=100000", "--regid=100000", "--clear-groups", "sh", "-c"])
            .arg(
                "echo x >>f && echo new >new && mkdir d && mv new d/ && rm dir/h && cat dir/sub/i >/dev/null",
            )
            .current_dir(&view)
            .status()
            .expect("this test needs setpriv (package util-linux)");
        assert!(status.success(), "{fs:?}");
        let upper = store.root_dir(rows[0].id, rows[0].generation).join("upper");
        for name in ["f", "d", "d/new"] {
            let meta = fs::metadata(upper.join(name)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (0, 0), "{fs:?} {name}");
        }
        home.umount(&store, &view);
        // The same upper without a map: nothing on disk is mapped.
        let view = home.mount(&store, &rows[0], "view");
        assert_eq!(fs::metadata(view.join("d/new")).unwrap().uid(), 0);
        assert_eq!(fs::metadata(view.join("g")).unwrap().uid(), 33);
        assert!(!view.join("dir/h").exists());
    }
}

#[test]
fn privileged_older_ways_of_handing_layers_over_mount_the_same() {
    use pagefold_fsadapters::sealed::assemble::Handover;
    let mut home = Home::new(RigFs::Xfs);
    let (store, rows) = home.sealed(&["a"]);
    let before = take(&home.at("a"));
    for (handover, id_map) in [
        (Handover::Options, None),
        (Handover::List, None),
        (Handover::Options, Some("0:100000:65536")),
        (Handover::List, Some("0:100000:65536")),
    ] {
        let id_map = id_map.map(|m| m.parse().unwrap());
        let mapped = id_map.is_some();
        let options = MountOptions { handover: Some(handover), id_map, ..MountOptions::default() };
        let view = home.try_mount(&store, &rows[0], "view", &options).unwrap().target;
        assert_eq!(fs::metadata(view.join("f")).unwrap().uid(), if mapped { 100_000 } else { 0 });
        if !mapped {
            assert_eq!(differences(&before, &take(&view), true), [""; 0], "{handover:?}");
        }
        assert_eq!(pagefold_fsadapters::sealed::mount::store_of(&view).unwrap(), store.dir());
        home.umount(&store, &view);
    }
}

/// Overlayfs notes where a file was, in at most `redirect_max` bytes.
#[test]
fn privileged_a_long_path_can_be_renamed_within_its_directory_only() {
    let limit = fs::read_to_string("/sys/module/overlay/parameters/redirect_max").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    for fs in BOTH {
        let mut home = Home::new(fs);
        let name = "x".repeat(100);
        let long: PathBuf = (0..=limit / 100).map(|_| &name).collect();
        fs::create_dir_all(home.at("a").join(&long).join("dir")).unwrap();
        for n in ["f", "g"] {
            fs::write(home.at("a").join(&long).join(n), n).unwrap();
        }
        settle(&home.at("a"));
        let store = home.store();
        let row = home.seal(&store, &["a"]).remove(0);
        let view = home.mount(&store, &row, "view");
        let at = view.join(&long);
        let answer = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
        let other_device = Some(rustix::io::Errno::XDEV.raw_os_error());
        assert_eq!(answer(fs::rename(at.join("f"), view.join("f"))), other_device, "{fs:?}");
        assert_eq!(answer(fs::rename(at.join("dir"), view.join("dir"))), other_device, "{fs:?}");
        assert_eq!(answer(fs::hard_link(at.join("f"), view.join("f"))), other_device, "{fs:?}");
        assert_eq!(answer(fs::rename(at.join("f"), at.join("moved"))), None, "{fs:?}");
        // All its data is its own then.
        fs::write(at.join("g"), "written").unwrap();
        assert_eq!(answer(fs::rename(at.join("g"), view.join("g"))), None, "{fs:?}");
        assert_eq!(fs::read(view.join("g")).unwrap(), b"written");
        assert_eq!(fs::read(at.join("moved")).unwrap(), b"f");
    }
}
