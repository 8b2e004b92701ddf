//! What views refuse, and what can't be reached through them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use pagefold_fsadapters::sealed::diff::DiffDamage;
use pagefold_fsadapters::sealed::image_mount::ImageMountError;
use pagefold_fsadapters::sealed::live::UpperState;
use pagefold_fsadapters::sealed::mount::{
    MountOptions, discard_writes, mount_view, mount_views, probe_upper, umount_view,
};
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::{RootRow, Store, Task};
use pagefold_sys::handle;
use pagefold_testfs::rig::RigFs;
use rustix::mount::MountFlags;

mod view_support;
use view_support::{BOTH, Home, bytes, clone_tree, dir, files, patiently, plain_root, settle, until};

/// A child that ends with the value.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program in `directory` that waits.
fn sleeper(directory: &Path) -> Guard {
    Guard(Command::new("sleep").arg("60").current_dir(directory).spawn().unwrap())
}

/// What the child runs by now.
fn name_of(child: &Guard) -> String {
    let name = fs::read_to_string(format!("/proc/{}/comm", child.0.id())).unwrap_or_default();
    name.trim_end().to_owned()
}

fn upper(store: &Store, row: &RootRow) -> PathBuf {
    store.root_dir(row.id, row.generation).join("upper")
}

fn mountinfo() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

#[test]
fn privileged_a_damaged_image_never_reaches_the_kernel() {
    let mut home = Home::new(RigFs::Xfs);
    let (store, rows) = home.sealed(&["a"]);
    let image = store.image_path(&rows[0].layers[0]);
    let good = fs::read(&image).unwrap();
    for at in [1100, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        // A new file: the old one may be protected.
        let aside = image.with_extension("aside");
        fs::write(&aside, &bad).unwrap();
        let flags = rustix::fs::ioctl_getflags(File::open(&image).unwrap()).unwrap();
        rustix::fs::ioctl_setflags(File::open(&image).unwrap(), flags - rustix::fs::IFlags::IMMUTABLE)
            .unwrap();
        fs::rename(&aside, &image).unwrap();
        let error = home.try_mount(&store, &rows[0], "view", &MountOptions::default()).unwrap_err();
        assert!(matches!(error, ViewError::Image(ImageMountError::Damaged { .. })), "{error}");
        assert!(error.to_string().contains("is damaged"), "{error}");
        assert!(!mountinfo().contains(&format!("{} - erofs", rows[0].layers[0])));
        assert_eq!(store.views().unwrap(), []);
    }
    fs::write(&image, &good).unwrap();
    home.mount(&store, &rows[0], "view");
}

#[test]
fn privileged_a_lost_whiteout_brings_nothing_back() {
    let mut home = Home::new(BOTH[0]);
    for n in 0..20u8 {
        fs::create_dir_all(home.at("a")).unwrap();
        fs::write(home.at("a").join(format!("file{n}")), [n; 5000]).unwrap();
    }
    clone_tree(&home.at("a"), &home.at("b"));
    fs::remove_file(home.at("b").join("file3")).unwrap();
    settle(&home.at("b"));
    let store = home.store();
    let rows = home.seal(&store, &["a", "b"]);
    assert_eq!(rows[1].layers, rows[0].layers, "told by its difference");
    let layer = store.root_dir(rows[1].id, rows[1].generation).join("diff");
    fs::remove_file(layer.join("file3")).unwrap();
    assert_eq!(store.verify(&Task::default()).unwrap().problem_count, 1);
    let error = home.try_mount(&store, &rows[1], "vb", &MountOptions::default()).unwrap_err();
    assert!(matches!(error, ViewError::Diff(DiffDamage::Wrong { .. })), "{error}");
    let rows = home.seal(&store, &["b"]);
    assert_eq!(store.verify(&Task::default()).unwrap().problem_count, 0);
    let view = home.mount(&store, &rows[0], "vb");
    assert!(!view.join("file3").exists() && view.join("file4").exists());
    home.umount(&store, &view);
}

#[test]
fn privileged_an_upper_of_another_image_is_refused() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        plain_root(&home.at("a"));
        clone_tree(&home.at("a"), &home.at("b"));
        // More than a layer is made for.
        for name in ["only here", "and this", "and that"] {
            fs::write(home.at("b").join(name), b"x").unwrap();
        }
        settle(&home.at("b"));
        let store = home.store();
        let rows = home.seal(&store, &["a", "b"]);
        assert_ne!(rows[0].layers, rows[1].layers);
        for (row, name) in rows.iter().zip(["va", "vb"]) {
            let view = home.mount(&store, row, name);
            fs::write(view.join("written"), name).unwrap();
            home.umount(&store, &view);
        }
        let (a, b, aside) = (upper(&store, &rows[0]), upper(&store, &rows[1]), store.dir().join("tmp/aside"));
        fs::rename(&a, &aside).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(&aside, &b).unwrap();
        for row in &rows {
            let error = home.try_mount(&store, row, "va", &MountOptions::default()).unwrap_err();
            assert!(matches!(error, ViewError::ForeignUpper { .. }), "{fs:?}: {error}");
        }
        assert_eq!(fs::read(a.join("written")).unwrap(), b"vb");
        // Not by the kernel's check alone, which sees the topmost image only: our own mark is looked at too, and views don't show it.
        fs::rename(&a, &aside).unwrap();
        fs::rename(&b, &a).unwrap();
        let view = home.mount(&store, &rows[0], "va");
        let mark = "trusted.overlay.pagefold";
        assert!(rustix::fs::getxattr(&view, mark, &mut [0u8; 64][..]).is_err());
        home.umount(&store, &view);
        rustix::fs::setxattr(&a, mark, &[7; 32], rustix::fs::XattrFlags::REPLACE).unwrap();
        let error = home.try_mount(&store, &rows[0], "va", &MountOptions::default()).unwrap_err();
        assert!(matches!(error, ViewError::ForeignUpper { .. }), "{fs:?}: {error}");
    }
}

#[test]
fn privileged_a_used_root_is_refused_by_the_process_s_number() {
    for fs in BOTH {
        let mut home = Home::alone(fs);
        let (store, rows) = home.sealed(&["a"]);
        let refused = |home: &mut Home, child: &Guard| {
            let error = home.try_mount(&store, &rows[0], "view", &MountOptions::default()).unwrap_err();
            let ViewError::InUse { users, .. } = &error else { panic!("{error}") };
            assert_eq!(users.iter().map(|u| u.pid).collect::<Vec<_>>(), [child.0.id()], "{fs:?}: {error}");
            assert!(error.to_string().contains("sleep"), "{error}");
            assert_eq!(store.views().unwrap(), []);
        };
        let child = sleeper(&home.at("a/dir/sub"));
        refused(&mut home, &child);
        drop(child);
        let file = File::options().append(true).open(home.at("a/f")).unwrap();
        let child = Guard(Command::new("sleep").arg("60").stdout(file).spawn().unwrap());
        refused(&mut home, &child);
        drop(child);
        // Its own mount namespace, where the root has another path.
        let script = format!("mount --bind '{}' /mnt && exec sleep 60 >>/mnt/f", home.at("a").display());
        let child = Guard(Command::new("unshare").args(["-m", "sh", "-c", &script]).spawn().unwrap());
        let link = format!("/proc/{}/fd/1", child.0.id());
        until("it has the file open", || fs::read_link(&link).is_ok_and(|p| p.ends_with("f")));
        until("it sleeps", || name_of(&child) == "sleep");
        refused(&mut home, &child);
        let force = MountOptions { force: true, ..MountOptions::default() };
        home.try_mount(&store, &rows[0], "view", &force).unwrap();
    }
}

#[test]
fn privileged_a_busy_view_names_who_holds_it_and_a_hidden_one_is_live() {
    for fs in BOTH {
        let mut home = Home::alone(fs);
        let (store, rows) = home.sealed(&["a"]);
        let view = home.mount(&store, &rows[0], "view");
        let child = sleeper(&view.join("dir"));
        let error = umount_view(&store, &view).unwrap_err();
        let ViewError::Busy(busy) = &error else { panic!("{error}") };
        assert_eq!(busy.users.iter().map(|u| u.pid).collect::<Vec<_>>(), [child.0.id()], "{error}");
        drop(child);
        let again = home.try_mount(&store, &rows[0], "view 2", &MountOptions::default()).unwrap_err();
        assert!(matches!(again, ViewError::AlreadyMounted { .. }), "{again}");

        let ready = home.at("ready");
        let script = format!("cd '{}' && touch '{}' && exec sleep 60", view.display(), ready.display());
        let child = Guard(Command::new("unshare").args(["-m", "sh", "-c", &script]).spawn().unwrap());
        until("it is in the view", || ready.exists());
        let done = home.umount(&store, &view);
        assert_eq!(done.state, Some(UpperState::Live), "{fs:?}");
        assert!(done.holders.iter().any(|h| h.contains(&child.0.id().to_string())), "{:?}", done.holders);
        let error = mount_view(&store, &rows[0], &view, &MountOptions::default()).unwrap_err();
        assert!(matches!(error, ViewError::Live { .. }), "{error}");
        assert!(matches!(discard_writes(&store, &rows[0]), Err(ViewError::Live { .. })));
        assert_eq!(store.views().unwrap(), []);
        drop(child);
        let state = patiently(|| probe_upper(&store, &rows[0]).unwrap(), |s| *s == UpperState::Live);
        assert_eq!(state, UpperState::Free);
    }
}

#[test]
fn privileged_targets_that_make_no_sense_are_refused() {
    let mut home = Home::new(RigFs::Xfs);
    plain_root(&home.at("a"));
    plain_root(&home.at("b"));
    let store = home.store();
    let rows = home.seal(&store, &["a", "b"]);
    let why = |row: usize, name: &str| {
        let target = home.at(name);
        let result = mount_view(&store, &rows[row], &target, &MountOptions::default());
        result.unwrap_err()
    };
    assert!(matches!(why(0, ".pagefold/roots"), ViewError::InsideStore(_)));
    assert!(matches!(why(0, ".pagefold"), ViewError::InsideStore(_)));
    assert!(matches!(why(0, "a/f"), ViewError::NotADirectory(_)));
    assert!(matches!(why(0, "."), ViewError::HidesStore(_)));
    assert!(matches!(why(0, "nowhere"), ViewError::NotADirectory(_)));
    fs::create_dir(home.at("other")).unwrap();
    let both = |row: usize, name: &str| (rows[row].clone(), home.at(name));
    for requests in [[both(0, "b"), both(1, "b")], [both(0, "b"), both(0, "other")]] {
        let results = mount_views(&store, &requests, &MountOptions::default());
        assert!(results[0].is_ok() && results[1].is_err(), "{results:?}");
        home.umount(&store, &requests[0].1);
    }
    let view = home.mount(&store, &rows[0], "view");
    let error = home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
    assert!(matches!(error, ViewError::AlreadyView(_)), "{error}");
    let error = home.try_umount(&store, &home.at("a")).unwrap_err();
    assert!(matches!(error, ViewError::NotAView(_)), "{error}");
    home.umount(&store, &view);
}

#[test]
fn privileged_a_view_has_the_flags_of_its_root_s_mount() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        plain_root(&home.at("a"));
        let id = home.at("a/id");
        fs::copy("/usr/bin/id", &id).unwrap();
        fs::set_permissions(&id, fs::Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(home.rig.path(), fs::Permissions::from_mode(0o755)).unwrap();
        settle(&home.at("a"));
        let store = home.store();
        let rows = home.seal(&store, &["a"]);
        let flags = |path: &Path| rustix::fs::statvfs(path).unwrap().f_flag.bits();
        let all = [
            MountFlags::empty(),
            MountFlags::NOSUID,
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            MountFlags::NOSYMFOLLOW | MountFlags::NOATIME,
        ];
        for wanted in all {
            rustix::mount::mount_remount(home.rig.path(), wanted | MountFlags::BIND, c"").unwrap();
            let view = home.mount(&store, &rows[0], "view");
            // ST_NOSUID, NODEV, NOEXEC, NOATIME, NOSYMFOLLOW
            let mask = 2 | 4 | 8 | 1024 | 0x2000;
            assert_eq!(flags(&view) & mask, flags(home.rig.path()) & mask, "{fs:?} {wanted:?}");
            // No way through the private directories above: from the view itself.
            let run = Command::new("./id").arg("-u").current_dir(&view).uid(1000).gid(1000).output();
            let seen = run.map(|o| String::from_utf8(o.stdout).unwrap());
            match (wanted.contains(MountFlags::NOEXEC), wanted.contains(MountFlags::NOSUID)) {
                (true, _) => assert!(seen.is_err(), "{seen:?}"),
                (false, nosuid) => assert_eq!(seen.unwrap(), if nosuid { "1000\n" } else { "0\n" }),
            }
            home.umount(&store, &view);
        }
    }
}

#[test]
fn privileged_the_flags_are_those_of_the_mount_that_the_root_is_named_by() {
    let mut home = Home::new(RigFs::Xfs);
    home.bound_root();
    let flags = MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::BIND;
    rustix::mount::mount_remount(home.at("a"), flags, c"").unwrap();
    let store = home.store();
    let rows = home.seal(&store, &["a"]);
    for target in ["view", "a"] {
        let view = home.mount(&store, &rows[0], target);
        let error = fs::write(view.join("f"), b"x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        assert!(rustix::fs::statvfs(&view).unwrap().f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC));
        home.umount(&store, &view);
    }
    // What is mounted over the root must not make its flags forgotten: another way to it is no way to mount it.
    rustix::mount::mount_bind(home.rig.path(), home.at("a")).unwrap();
    home.try_mount(&store, &rows[0], "view", &MountOptions::default()).unwrap_err();
    rustix::mount::unmount(home.at("a"), rustix::mount::UnmountFlags::DETACH).unwrap();
    rustix::mount::unmount(home.at("a"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn privileged_read_only_is_read_only() {
    let mut home = Home::new(RigFs::Xfs);
    let (store, rows) = home.sealed(&["a"]);
    let options = MountOptions { read_only: true, ..MountOptions::default() };
    let view = home.try_mount(&store, &rows[0], "view", &options).unwrap().target;
    let error = fs::write(view.join("f"), b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(store.view(rows[0].id).unwrap().unwrap().read_only);
    assert_eq!(fs::read(view.join("g")).unwrap(), bytes(1, 4096));
}

#[test]
fn privileged_a_planted_redirect_reads_nothing() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        plain_root(&home.at("victim"));
        let store = home.store();
        let victim = home.seal(&store, &["victim"]);
        let anchors = store.dir().join(format!("anchors/{}", victim[0].domain));
        let secret = files(&anchors).into_iter().find(|f| fs::metadata(f).unwrap().len() == 100_000).unwrap();
        let redirect = format!("/{}", secret.strip_prefix(&anchors).unwrap().display());
        plain_root(&home.at("a"));
        for (file, metacopy) in [("f", true), ("g", false)] {
            let path = home.at("a").join(file);
            fs::write(&path, b"").unwrap();
            let set = |name: &str, value: &[u8]| {
                rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
            };
            set("trusted.overlay.redirect", redirect.as_bytes());
            if metacopy {
                set("trusted.overlay.metacopy", b"");
            }
            File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
        }
        settle(&home.at("a"));
        let rows = home.seal(&store, &["a"]);
        let view = home.mount(&store, &rows[0], "view");
        for file in ["f", "g"] {
            assert_eq!(fs::read(view.join(file)).unwrap(), vec![0; 100_000], "{fs:?} {file}");
            // Planted through the view: an attribute like any other.
            let value = b"/xx/yy";
            let path = view.join(file);
            rustix::fs::setxattr(&path, "trusted.overlay.redirect", value, rustix::fs::XattrFlags::empty())
                .unwrap();
        }
        home.umount(&store, &view);
        let view = home.mount(&store, &rows[0], "view");
        assert_eq!(fs::read(view.join("f")).unwrap(), vec![0; 100_000], "{fs:?}");
    }
}

#[test]
fn privileged_root_in_a_view_can_not_change_or_reach_an_anchor() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = home.sealed(&["a", "b"]);
        let (a, b) = (home.mount(&store, &rows[0], "va"), home.mount(&store, &rows[1], "vb"));
        let anchors = files(&store.dir().join("anchors"));
        let hashes = || anchors.iter().map(|f| blake3::hash(&fs::read(f).unwrap())).collect::<Vec<_>>();
        let before = hashes();
        attack(&a);
        assert_eq!(hashes(), before, "{fs:?}: an anchor has changed");
        for (seed, (name, length)) in [("f", 100_000), ("g", 4096), ("dir/h", 50_001)].into_iter().enumerate()
        {
            assert_eq!(fs::read(b.join(name)).unwrap(), bytes(seed as u64, length), "{fs:?} {name}");
        }
        // From inside there is no way to the store: not by its path, not by climbing, not by what /proc says of a file.
        let view = dir(&a);
        let store_path = store.dir().display().to_string();
        let name = store.dir().file_name().unwrap().to_str().unwrap();
        for path in
            [store_path.clone(), format!("../../../{store_path}"), name.into(), format!("dir/../../{name}")]
        {
            let flags = rustix::fs::OFlags::PATH;
            let resolve = rustix::fs::ResolveFlags::IN_ROOT;
            let found = rustix::fs::openat2(&view, &path, flags, rustix::fs::Mode::empty(), resolve);
            assert_eq!(found.unwrap_err(), rustix::io::Errno::NOENT, "{path}");
        }
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&view));
        assert_eq!(fs::read_link(link).unwrap(), a);
    }
}

/// Everything that a privileged process with a view at hand can try on a file that it has not written yet.
fn attack(view: &Path) {
    // A descriptor open for reading is opened again for writing.
    let file = File::open(view.join("f")).unwrap();
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    File::options().write(true).open(again).unwrap().write_all_at(b"through proc", 0).unwrap();
    // A shared mapping needs a writable descriptor, and that copies up.
    let mapped = Command::new("xfs_io")
        .args(["-c", "mmap -rw 0 4096", "-c", "mwrite -S 0x5a 0 100", "-c", "msync -s"])
        .arg(view.join("g"))
        .output()
        .expect("this test needs xfs_io (package xfsprogs)");
    assert!(mapped.status.success(), "{mapped:?}");
    assert_eq!(fs::read(view.join("g")).unwrap()[..100], [0x5a; 100]);
    // Flags: an anchor's immutability is not the view's to take.
    let file = File::open(view.join("dir/h")).unwrap();
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        let _ = rustix::fs::ioctl_setflags(&file, flags - rustix::fs::IFlags::IMMUTABLE);
    }
    // Handles: an overlay without nfs_export decodes none, and hands out none that another mount would take.
    if let Ok(handle) = handle::name_to_handle(file.as_fd(), c"") {
        let opened =
            handle::open_by_handle(dir(view).as_fd(), handle.kind, &handle.bytes, rustix::fs::OFlags::RDWR);
        assert!(opened.is_err(), "a handle of a view's file was opened");
    }
    // Sharing its blocks with something else, or punching holes, goes through a writable descriptor as well.
    let to = File::options().write(true).open(view.join("dir/h")).unwrap();
    rustix::fs::fallocate(
        &to,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        0,
        4096,
    )
    .unwrap();
    let _ = fs::metadata(view.join("f")).unwrap().ino();
}
