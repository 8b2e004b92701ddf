//! The life of a farm: made from every source, the same from the same seed, gone without a trace when destroyed,
//! cancelled or failed, and never taking anything with it that it did not make.

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pagefold_testfs::farm::manifest::{Drift, MANIFEST, State};
use pagefold_testfs::farm::{self, FarmError, FarmFs, FarmSpec, ImageSpec, Manifest, SyntheticSpec};
use pagefold_testfs::rig::{KnownFs, LoopRig, RigFs, fs_kind};
use pagefold_testfs::truth::{Truth, TruthError};

static NEVER: AtomicBool = AtomicBool::new(false);

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::new(fs).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn spec(dir: PathBuf, image: ImageSpec) -> FarmSpec {
    FarmSpec { image, roots: 3, drift_percent: 20.0, seed: 5, ..FarmSpec::new(dir) }
}

fn synthetic(files: u32) -> ImageSpec {
    ImageSpec::Synthetic(SyntheticSpec { files, max_bytes: 64 << 10 })
}

fn make(spec: &FarmSpec) -> Manifest {
    farm::create(spec, &|_| (), &NEVER).unwrap_or_else(|e| panic!("farm: {e}"))
}

/// The whole tree below `dir`: paths, kinds, sizes, modes, bytes.
fn contents(dir: &Path) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(&next).expect("listable").flatten() {
            let stat = entry.metadata().expect("there");
            let path = entry.path();
            let bytes = if stat.is_file() { std::fs::read(&path).expect("readable") } else { vec![] };
            if stat.is_dir() {
                dirs.push(path.clone());
            }
            let size = if stat.is_file() { stat.size() } else { 0 };
            found.push((path.strip_prefix(dir).expect("below").to_owned(), stat.mode(), size, bytes));
        }
    }
    found.sort();
    found
}

fn mounted_at(dir: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    table.lines().any(|l| l.split(' ').nth(4) == dir.to_str())
}

#[test]
fn privileged_one_seed_makes_one_farm_and_another_seed_another() {
    let rig = rig(RigFs::Xfs);
    let of = |name: &str, seed, threads| {
        let spec = FarmSpec { seed, threads, ..spec(rig.path().join(name), synthetic(120)) };
        (make(&spec), contents(&spec.dir.join("roots")))
    };
    let (one, again, other) = (of("a", 5, 1), of("b", 5, 4), of("c", 6, 1));
    assert!(one == again, "the number of workers must not show");
    assert!(one.1 != other.1);
    assert_eq!(farm::open(&rig.path().join("a")).expect("readable"), one.0);
}

#[test]
fn privileged_drift_is_what_was_asked_for_and_of_all_kinds() {
    let rig = rig(RigFs::Btrfs);
    let spec =
        FarmSpec { fs: FarmFs::Btrfs, drift_percent: 50.0, ..spec(rig.path().join("f"), synthetic(200)) };
    let manifest = make(&spec);
    let mut kinds = [0; 4];
    for root in &manifest.roots {
        assert_eq!(root.drift.len(), 100);
        for drift in &root.drift {
            kinds[match drift {
                Drift::InPlace { .. } => 0,
                Drift::Replaced { .. } => 1,
                Drift::Added { .. } => 2,
                Drift::Deleted { .. } => 3,
            }] += 1;
        }
    }
    assert!(kinds.iter().all(|n| *n > 10), "{kinds:?}");
    assert_eq!(
        make(&FarmSpec { drift_percent: 0.0, dir: rig.path().join("g"), ..spec }).roots[0].drift,
        vec![]
    );
}

#[test]
fn privileged_the_recorded_hashes_are_those_of_the_files() {
    let rig = rig(RigFs::Xfs);
    let spec = spec(rig.path().join("f"), synthetic(150));
    let manifest = make(&spec);
    for file in &manifest.image.files {
        let bytes = std::fs::read(spec.dir.join("image").join(&file.names[0].0)).expect("readable");
        assert_eq!(bytes.len() as u64, file.size);
        let mut hasher = blake3::Hasher::new();
        for &(start, length) in &file.data {
            hasher.update(&bytes[start as usize..(start + length) as usize]);
        }
        assert_eq!(hasher.finalize().to_hex().as_str(), file.hash);
    }
    for (index, root) in manifest.roots.iter().enumerate() {
        let read =
            |path: &Path| std::fs::read(manifest.root_path(&spec.dir, index).join(path)).expect("readable");
        for drift in &root.drift {
            match drift {
                Drift::InPlace { file, writes, hash, size, .. } => {
                    let bytes = read(&manifest.image.files[*file as usize].names[0].0);
                    assert_eq!(bytes.len() as u64, *size);
                    let written = writes.iter().flat_map(|&(s, l)| &bytes[s as usize..(s + l) as usize]);
                    let written: Vec<u8> = written.copied().collect();
                    assert_eq!(blake3::hash(&written).to_hex().as_str(), hash);
                }
                Drift::Replaced { new, .. } | Drift::Added { new } => {
                    assert_eq!(blake3::hash(&read(&new.path.0)).to_hex().as_str(), new.hash);
                }
                Drift::Deleted { .. } => {}
            }
        }
    }
}

#[test]
fn privileged_an_image_from_a_directory_keeps_attributes_links_and_holes() {
    let rig = rig(RigFs::Xfs);
    let source = tempfile::tempdir().expect("temporary directory");
    let path = source.path().join("d");
    std::fs::create_dir(&path).expect("writable");
    std::fs::write(path.join("plain"), vec![7; 10_000]).expect("writable");
    std::fs::set_permissions(path.join("plain"), std::fs::Permissions::from_mode(0o4751)).expect("own file");
    std::os::unix::fs::chown(path.join("plain"), Some(1234), Some(567)).expect("root");
    std::fs::set_permissions(path.join("plain"), std::fs::Permissions::from_mode(0o4751)).expect("own file");
    std::fs::hard_link(path.join("plain"), path.join("second")).expect("writable");
    std::os::unix::fs::symlink("plain", path.join("soft")).expect("writable");
    let sparse = std::fs::File::create(path.join("sparse")).expect("writable");
    sparse.set_len(1 << 20).expect("writable");
    (&sparse).write_all(b"start").expect("writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o555)).expect("own directory");

    let spec =
        FarmSpec { drift_percent: 0.0, ..spec(rig.path().join("f"), ImageSpec::Dir(source.path().into())) };
    let manifest = make(&spec);

    let root = manifest.root_path(&spec.dir, 2).join("d");
    let (stat, from) =
        (root.join("plain").metadata().expect("there"), path.join("plain").metadata().expect("there"));
    assert_eq!((stat.mode(), stat.uid(), stat.gid(), stat.nlink()), (0o104_751, 1234, 567, 2));
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (from.mtime(), from.mtime_nsec()));
    assert_eq!(root.metadata().expect("there").mode() & 0o777, 0o555);
    assert_eq!(std::fs::read_link(root.join("soft")).expect("a link"), Path::new("plain"));
    assert!(root.join("sparse").metadata().expect("there").blocks() <= 16, "the hole was filled");
    let truth = Truth::by_provenance(&spec.dir, &manifest).expect("copied, so derivable").expected();
    assert_eq!(truth.totals.zero_bytes, 3 * ((1 << 20) - 4096));
    assert_eq!(truth.totals.hard_links, 3);
    assert_eq!(truth.roots[0].1, 4 * 4096);
    assert!(matches!(
        farm::create(&FarmSpec { dir: source.path().join("inside"), ..spec }, &|_| (), &NEVER),
        Err(FarmError::Spec { .. })
    ));
    assert!(!source.path().join("inside").exists() && !source.path().join("inside.pagefold-img").exists());
}

#[test]
fn privileged_an_image_cloned_from_its_file_system_has_truth_by_bytes_only() {
    let rig = rig(RigFs::Btrfs);
    let source = rig.path().join("source");
    std::fs::create_dir(&source).expect("writable");
    std::fs::write(source.join("a"), vec![7; 10_000]).expect("writable");
    let spec = FarmSpec { fs: FarmFs::Btrfs, ..spec(rig.path().join("f"), ImageSpec::Dir(source)) };
    let manifest = make(&spec);
    assert!(matches!(Truth::by_provenance(&spec.dir, &manifest), Err(TruthError::NotDerivable { .. })));
    assert!(Truth::by_bytes(&spec.dir, &manifest).expect("readable").expected().totals.files > 0);
}

#[test]
fn privileged_a_farm_left_dirty_says_so() {
    let rig = rig(RigFs::Xfs);
    let spec = FarmSpec { dirty: true, ..spec(rig.path().join("f"), synthetic(50)) };
    let manifest = make(&spec);
    assert!(!manifest.synced);
    assert!(matches!(Truth::by_provenance(&spec.dir, &manifest), Err(TruthError::NotDerivable { .. })));
}

fn tar_of(entries: &[(&str, tar::EntryType, &str, &[u8])]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    let mut builder = tar::Builder::new(file.reopen().expect("open"));
    for (path, kind, link, data) in entries {
        let mut header = tar::Header::new_gnu();
        // Set by hand: the crate refuses to write the hostile names that these tests are about.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o640);
        header.set_uid(42);
        header.set_gid(43);
        header.set_mtime(1_600_000_000);
        header.set_cksum();
        builder.append(&header, *data).expect("writable");
    }
    builder.into_inner().expect("finished");
    file
}

#[test]
fn privileged_an_image_from_a_tar_file_keeps_what_is_stored() {
    use tar::EntryType as T;
    let rig = rig(RigFs::Xfs);
    let data = vec![9; 5000];
    let archive = tar_of(&[
        ("./usr/bin/tool", T::Regular, "", &data),
        ("usr/bin/", T::Directory, "", b""),
        ("/usr/bin/again", T::Link, "usr/bin/tool", b""),
        ("bin", T::Symlink, "usr/bin", b""),
        ("queue", T::Fifo, "", b""),
        ("empty", T::Regular, "", b""),
    ]);
    let spec =
        FarmSpec { drift_percent: 0.0, ..spec(rig.path().join("f"), ImageSpec::Tar(archive.path().into())) };
    let manifest = make(&spec);
    let root = manifest.root_path(&spec.dir, 0);
    let stat = root.join("usr/bin/again").metadata().expect("there");
    assert_eq!((stat.mode(), stat.uid(), stat.gid(), stat.nlink()), (0o100_640, 42, 43, 2));
    assert_eq!(stat.mtime(), 1_600_000_000);
    assert_eq!(std::fs::read(root.join("bin/tool")).expect("through the link"), data);
    assert!(root.join("queue").metadata().expect("there").file_type().is_fifo());
    let totals = Truth::by_provenance(&spec.dir, &manifest).expect("derivable").expected().totals;
    assert_eq!((totals.files, totals.hard_links, totals.mergeable_file_bytes), (6, 3, 2 * 2 * 4096));
}

#[test]
fn privileged_hostile_tar_entries_are_refused_by_name_and_leave_nothing() {
    use tar::EntryType as T;
    let rig = rig(RigFs::Xfs);
    let outside = rig.path().join("outside");
    std::fs::create_dir(&outside).expect("writable");
    let target = outside.to_str().expect("text");
    type Entries<'a> = &'a [(&'a str, T, &'a str, &'a [u8])];
    let cases: [(&str, Entries<'_>); 5] = [
        ("entry ../climbs", &[("../climbs", T::Regular, "", b"x")]),
        ("entry a/../../climbs", &[("a/../../climbs", T::Regular, "", b"x")]),
        ("image/out", &[("out", T::Symlink, target, b""), ("out/planted", T::Regular, "", b"x")]),
        ("entry ../outside/x", &[("h", T::Link, "../outside/x", b"")]),
        ("image/twice", &[("twice", T::Regular, "", b"x"), ("twice", T::Regular, "", b"y")]),
    ];
    for (name, entries) in cases {
        let archive = tar_of(entries);
        let spec = spec(rig.path().join("f"), ImageSpec::Tar(archive.path().into()));
        let error = farm::create(&spec, &|_| (), &NEVER).expect_err("refused");
        assert!(error.to_string().contains(name), "{error} does not name {name}");
        assert!(!spec.dir.exists(), "{entries:?} left {:?}", contents(&spec.dir));
    }
    assert_eq!(std::fs::read_dir(&outside).expect("listable").count(), 0);
}

#[test]
fn privileged_a_cancelled_farm_leaves_nothing_at_any_point() {
    let rig = rig(RigFs::Btrfs);
    let bystander = rig.path().join("mine/keep");
    std::fs::create_dir_all(bystander.parent().expect("a parent")).expect("writable");
    for snapshots in [false, true] {
        let mut cancelled = 0;
        // One call later each time, until there is none left to be cancelled at.
        loop {
            let cancel = AtomicBool::new(false);
            let calls = AtomicU64::new(0);
            let spec = FarmSpec {
                fs: FarmFs::Btrfs,
                snapshots,
                threads: 2,
                ..spec(rig.path().join("mine/farm"), synthetic(400))
            };
            let told = |_| {
                if calls.fetch_add(1, Ordering::Relaxed) >= cancelled {
                    cancel.store(true, Ordering::Relaxed);
                }
            };
            match farm::create(&spec, &told, &cancel) {
                Ok(_) => break farm::destroy(&spec.dir).expect("destroyable"),
                Err(error) => assert!(matches!(error, FarmError::Cancelled), "{error}"),
            }
            assert!(!spec.dir.exists(), "after {cancelled} calls: left {:?}", contents(&spec.dir));
            cancelled += 1;
        }
        assert!((3..30).contains(&cancelled), "{cancelled} points");
    }
    assert!(bystander.parent().expect("a parent").exists());
}

#[test]
fn privileged_a_farm_on_its_own_file_system_comes_and_goes_whole() {
    let base = tempfile::tempdir().expect("temporary directory");
    // The point of this farm is a directory that is on no reflink file system of the wanted kind.
    let fs = if matches!(fs_kind(base.path()), Ok(KnownFs::Xfs)) { FarmFs::Btrfs } else { FarmFs::Xfs };
    let dir = base.path().join("farm");
    let image = base.path().join("farm.pagefold-img");
    let spec = FarmSpec { fs, size: Some(1 << 30), ..spec(dir.clone(), synthetic(60)) };

    make(&spec);
    assert!(mounted_at(&dir) && image.exists());
    assert!(matches!(farm::create(&spec, &|_| (), &NEVER), Err(FarmError::Occupied { .. })));
    let open = std::fs::File::open(dir.join(MANIFEST)).expect("readable");
    assert!(farm::destroy(&dir).is_err(), "a farm in use stays");
    assert!(mounted_at(&dir) && dir.join("roots/root-0000").exists());
    drop(open);
    farm::destroy(&dir).expect("destroyable");
    assert_eq!(contents(base.path()), vec![]);

    // As after a reboot: not mounted any more.
    make(&spec);
    rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::empty()).expect("idle");
    assert_eq!(farm::open(&dir).expect("a stub stays").state, State::Creating);
    farm::destroy(&dir).expect("destroyable");
    assert_eq!(contents(base.path()), vec![]);

    // Cancelled, and too small to hold it.
    let error = farm::create(&spec, &|_| (), &AtomicBool::new(true)).expect_err("cancelled");
    assert!(matches!(error, FarmError::Cancelled), "{error}");
    assert_eq!(contents(base.path()), vec![]);
    let error = farm::create(&FarmSpec { size: Some(1 << 20), ..spec.clone() }, &|_| (), &NEVER);
    assert!(error.is_err());
    assert_eq!(contents(base.path()), vec![]);

    // Somebody's file of that name is not ours to overwrite or to remove.
    std::fs::write(&image, b"mine").expect("writable");
    assert!(matches!(farm::create(&spec, &|_| (), &NEVER), Err(FarmError::ImageExists { .. })));
    assert_eq!(std::fs::read(&image).expect("untouched"), b"mine");
    assert!(!dir.exists());
}

#[test]
fn privileged_destroy_takes_only_what_the_farm_made() {
    let rig = rig(RigFs::Xfs);
    let dir = rig.path().join("f");
    std::fs::create_dir(&dir).expect("writable");
    assert!(matches!(farm::destroy(&dir), Err(FarmError::NoManifest { .. })));
    assert!(dir.exists(), "no farm, nothing removed");

    make(&spec(dir.clone(), synthetic(40)));
    std::fs::write(dir.join("notes"), b"mine").expect("writable");
    farm::destroy(&dir).expect("destroyable");
    assert_eq!(contents(&dir).len(), 1, "the directory was there before, and somebody's file is in it");

    std::fs::write(dir.join(MANIFEST), br#"{"schema":"other/1"}"#).expect("writable");
    assert!(matches!(farm::destroy(&dir), Err(FarmError::BadManifest { .. })));
    std::fs::write(dir.join(MANIFEST), b"not json").expect("writable");
    assert!(matches!(farm::destroy(&dir), Err(FarmError::BadManifest { .. })));
    assert!(dir.join("notes").exists());
}

/// Somebody ran a root with one of his own directories mounted in it, and forgot that.
#[test]
fn privileged_destroy_does_not_go_through_mounts() {
    let rig = rig(RigFs::Xfs);
    let spec = spec(rig.path().join("f"), synthetic(10));
    make(&spec);
    let precious = rig.path().join("precious");
    let target = spec.dir.join("roots/root-0001/data");
    for dir in [&precious, &target] {
        std::fs::create_dir(dir).expect("new directory");
    }
    std::fs::write(precious.join("book"), b"kept").expect("write");
    rustix::mount::mount_bind(&precious, &target).expect("bind mount");
    let refused = farm::destroy(&spec.dir).expect_err("something is mounted").to_string();
    let kept = std::fs::read(precious.join("book"));
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).expect("unmount");
    assert!(refused.contains("data") && refused.contains("unmount"), "{refused}");
    assert_eq!(kept.expect("still there"), b"kept");
    assert!(spec.dir.join(MANIFEST).exists(), "so that it can be destroyed later");
    farm::destroy(&spec.dir).expect("destroyed");
    assert!(!spec.dir.exists());
    assert!(precious.join("book").exists());
}

/// An image may hold setuid programs, devices, and files that only their directory kept from others.
#[test]
fn privileged_nobody_else_reaches_into_a_farm() {
    let rig = rig(RigFs::Xfs);
    let spec = spec(rig.path().join("f"), synthetic(10));
    make(&spec);
    for name in ["image", "roots", MANIFEST] {
        let mode = spec.dir.join(name).metadata().expect("there").mode();
        assert_eq!(mode & 0o077, 0, "{name} has mode {mode:o}");
    }
}

#[test]
fn privileged_a_full_directory_and_bad_numbers_are_refused_untouched() {
    let rig = rig(RigFs::Xfs);
    let dir = rig.path().join("f");
    std::fs::create_dir(&dir).expect("writable");
    std::fs::write(dir.join("notes"), b"mine").expect("writable");
    let refused = |spec: FarmSpec| farm::create(&spec, &|_| (), &NEVER).expect_err("refused").to_string();
    let full = spec(dir.clone(), synthetic(40));
    assert!(refused(full.clone()).contains("not empty"));
    assert_eq!(contents(&dir).len(), 1);
    let new = FarmSpec { dir: rig.path().join("g"), ..full };
    assert!(refused(FarmSpec { roots: 0, ..new.clone() }).contains("--roots"));
    assert!(refused(FarmSpec { drift_percent: f64::NAN, ..new.clone() }).contains("--drift"));
    assert!(refused(FarmSpec { snapshots: true, ..new.clone() }).contains("btrfs"));
    assert!(!new.dir.exists());
}

#[test]
fn image_and_size_arguments_mean_what_they_say() {
    let synthetic = |files, max_bytes| ImageSpec::Synthetic(SyntheticSpec { files, max_bytes });
    assert_eq!("synthetic".parse::<ImageSpec>().expect("valid"), synthetic(1000, 8 << 20));
    assert_eq!("synthetic:files=7,max=64k".parse::<ImageSpec>().expect("valid"), synthetic(7, 65_536));
    assert_eq!("tar:x".parse::<ImageSpec>().expect("valid"), ImageSpec::Tar("x".into()));
    for bad in ["synthetic:files=x", "synthetic:colour=red", "synthetic:files", "no/such/path"] {
        assert!(bad.parse::<ImageSpec>().is_err(), "{bad}");
    }
    assert_eq!(farm::parse_bytes("3G"), Some(3 << 30));
    assert_eq!(farm::parse_bytes("12"), Some(12));
    for bad in ["", "G", "1Q", "-1", "99999999999T"] {
        assert_eq!(farm::parse_bytes(bad), None, "{bad}");
    }
}
