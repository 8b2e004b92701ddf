//! The store on real XFS and btrfs: anchors, publication, recovery after a crash at every step, copies and snapshots, a full disk.
//!
//! Crashes are real: the test runs itself as a child process with `PAGEFOLD_CRASH_AT`, which ends it by SIGKILL at that step.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::store::{
    AnchorKey, AnchorRow, Build, ContentHash, DomainRow, ImageDigest, ImageRow, OpenMode, Publication,
    RootRow, SealId, Signature, Store, StoreError,
};
use pagefold_testfs::rig::{LoopRig, RigFs};

const FILE_SYSTEMS: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

fn rig(fs: RigFs, bytes: u64) -> LoopRig {
    LoopRig::with_size(fs, bytes).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn open(dir: &Path) -> Store {
    Store::open(dir, OpenMode::Create, "test").unwrap()
}

fn store_dir(rig: &LoopRig) -> PathBuf {
    Store::default_dir(rig.path()).unwrap()
}

/// A file to clone.
fn source(rig: &LoopRig, name: &str, bytes: &[u8]) -> File {
    let path = rig.path().join(name);
    fs::write(&path, bytes).unwrap();
    let file = File::open(&path).unwrap();
    file.sync_all().unwrap();
    file
}

fn signature(n: u64) -> Signature {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Signature(bytes)
}

fn anchor(build: &Build<'_>, file: &File, hint: u64) -> (AnchorKey, AnchorRow) {
    let new = build.create_anchor().unwrap();
    clone_file(file, &new.file).unwrap();
    let serial = new.serial;
    let key = new.finish().unwrap();
    let row = AnchorRow {
        serial,
        domain: build.domain().id,
        size: file.metadata().unwrap().len(),
        signature: Some(signature(hint)),
        content: None,
        borrowed: None,
    };
    (key, row)
}

fn image(build: &Build<'_>, bytes: &[u8], anchors: Vec<AnchorKey>) -> (ImageDigest, ImageRow) {
    let digest = ImageDigest(*blake3::hash(bytes).as_bytes());
    build.write_image(&digest, bytes).unwrap();
    let mut anchors = anchors;
    anchors.sort_unstable();
    (digest, ImageRow { domain: build.domain().id, bytes: bytes.len() as u64, entries: 1, anchors })
}

fn root_row(id: SealId, domain: &DomainRow, path: PathBuf, layers: Vec<ImageDigest>) -> RootRow {
    RootRow {
        id,
        name: path.file_name().unwrap().to_str().unwrap().to_owned(),
        path,
        domain: domain.id,
        dev: 0,
        ino: 0,
        layers,
        generation: 1,
        sealed_at: 0,
        files: 1,
        entries: 1,
        bytes: 1,
        hits: 0,
        made: 1,
        unsettled: 0,
    }
}

/// Seals a "root" of `files` files by hand: what `seal` does to a store.
fn publish_one(store: &Store, rig: &LoopRig, name: &str, file: &File, files: u64) -> RootRow {
    let domain = store.ensure_domain("default").unwrap();
    let build = store.build(&domain);
    let anchors: Vec<(AnchorKey, AnchorRow)> = (0..files).map(|n| anchor(&build, file, n)).collect();
    let keys = anchors.iter().map(|(key, _)| *key).collect();
    let image = image(&build, format!("image of {name}").as_bytes(), keys);
    let id = store.new_seal_id().unwrap();
    let dir = build.make_root_dir(id, 1).unwrap();
    fs::create_dir(dir.join("upper")).unwrap();
    fs::create_dir(dir.join("work")).unwrap();
    fs::write(dir.join("manifest"), "m").unwrap();
    let root = root_row(id, &domain, rig.path().join(name), vec![image.0]);
    build.publish(&Publication { anchors, images: vec![image], roots: vec![root.clone()] }).unwrap();
    root
}

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
            root = publish_one(&store, &rig, "a", &file, 3);
        }
        rig.remount().unwrap();
        let store = Store::open(&dir, OpenMode::Existing, "test").unwrap();
        assert_eq!(store.roots().unwrap(), [root.clone()]);
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
        let anchors: Vec<_> = (0..10_000).map(|n| anchor(&build, &file, n)).collect();
        let made = t.elapsed();
        let keys: Vec<_> = anchors.iter().map(|a| a.0).collect();
        let image = image(&build, &[1; 100], keys.clone());
        let root = root_row(store.new_seal_id().unwrap(), &domain, rig.path().join("r"), vec![image.0]);
        build.make_root_dir(root.id, 1).unwrap();
        let t = Instant::now();
        build.publish(&Publication { anchors, images: vec![image], roots: vec![root] }).unwrap();
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
        println!(
            "{fs:?}: create {opened:?}, 10,000 anchors {made:?}, publish {published:?}, 10,000 hints {looked_up:?}, rows {rows:?}, \
             open {reopened:?}, index {bytes} bytes"
        );
    }
}
