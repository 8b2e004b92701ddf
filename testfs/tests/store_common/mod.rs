//! What the tests of the store share: places, things to clone, a root sealed by hand.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::sealed::image;
use pagefold_fsadapters::sealed::tree::{
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree,
};
use pagefold_fsadapters::store::manifest::write_manifest;
use pagefold_fsadapters::store::{
    AnchorKey, AnchorRow, Build, DomainRow, ImageDigest, ImageRow, NewAnchor, OpenMode, Publication, RootRow,
    SealId, Signature, Store, StoreError,
};
use pagefold_testfs::rig::{LoopRig, RigFs};

pub const FILE_SYSTEMS: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

pub fn rig(fs: RigFs, bytes: u64) -> LoopRig {
    LoopRig::with_size(fs, bytes).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

pub fn open(dir: &Path) -> Store {
    Store::open(dir, OpenMode::Create, "test").unwrap()
}

pub fn store_dir(rig: &LoopRig) -> PathBuf {
    Store::default_dir(rig.path()).unwrap()
}

/// A file to clone.
pub fn source(rig: &LoopRig, name: &str, bytes: &[u8]) -> File {
    let path = rig.path().join(name);
    fs::write(&path, bytes).unwrap();
    let file = File::open(&path).unwrap();
    file.sync_all().unwrap();
    file
}

pub fn signature(n: u64) -> Signature {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Signature(bytes)
}

pub fn anchor(build: &Build<'_>, file: &File, hint: u64) -> Result<(AnchorKey, AnchorRow), StoreError> {
    let new = build.create_anchor()?;
    clone_file(file, &new.file).map_err(|e| StoreError::Io {
        what: "clone into",
        path: store_path(&new),
        source: std::io::Error::other(e),
    })?;
    let serial = new.serial;
    let key = new.finish()?;
    let row = AnchorRow {
        serial,
        domain: build.domain().id,
        size: file.metadata().unwrap().len(),
        signature: Some(signature(hint)),
        content: None,
        borrowed: None,
        stamp: None,
    };
    Ok((key, row))
}

pub fn store_path(anchor: &NewAnchor<'_>) -> PathBuf {
    PathBuf::from(anchor.key.path())
}

/// A root directory with the files `f0`, `f1`, ... in these anchors.
pub fn tree(anchors: &[(AnchorKey, AnchorRow)]) -> Tree {
    let inode = |node| Inode {
        meta: Meta { mode: 0o755, uid: 0, gid: 0, mtime: (1, 0), xattrs: Vec::new() },
        raw: RawFacts::default(),
        node,
    };
    let entry = |name: String, inode| Entry {
        parent: EntryId(0),
        name: name.into_bytes().into(),
        inode: InodeIndex(inode),
    };
    let mut tree = Tree { entries: vec![entry(String::new(), 0)], inodes: vec![inode(Node::Dir)] };
    for (n, (key, row)) in anchors.iter().enumerate() {
        tree.entries.push(entry(format!("f{n:06}"), n as u32 + 1));
        tree.inodes.push(inode(Node::File { size: row.size, data: Data::Anchor(*key) }));
    }
    tree
}

pub fn root_row(id: SealId, domain: &DomainRow, path: PathBuf, layers: Vec<ImageDigest>) -> RootRow {
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
pub fn publish_one(
    store: &Store,
    roots: &Path,
    name: &str,
    file: &File,
    files: u64,
) -> Result<RootRow, StoreError> {
    let domain = store.ensure_domain("default")?;
    let build = store.build(&domain);
    let anchors = (0..files).map(|n| anchor(&build, file, n)).collect::<Result<Vec<_>, _>>()?;
    let id = store.new_seal_id()?;
    let (root, publication) = prepare(&build, roots, id, name, anchors)?;
    build.publish(&publication)?;
    Ok(root)
}

/// All of a root but its publication.
pub fn prepare(
    build: &Build<'_>,
    roots: &Path,
    id: SealId,
    name: &str,
    anchors: Vec<(AnchorKey, AnchorRow)>,
) -> Result<(RootRow, Publication), StoreError> {
    let domain = build.domain().clone();
    let tree = tree(&anchors);
    let built = image::build(&tree).unwrap();
    build.write_image(&built.digest, &built.bytes)?;
    let row = ImageRow {
        domain: domain.id,
        bytes: built.bytes.len() as u64,
        entries: tree.entries.len() as u64,
        anchors: tree.anchors(),
    };
    let dir = build.make_root_dir(id, 1)?;
    let io = |source| StoreError::Io { what: "prepare", path: dir.clone(), source };
    fs::create_dir(dir.join("upper")).map_err(io)?;
    fs::create_dir(dir.join("work")).map_err(io)?;
    let upper = File::open(dir.join("upper")).map_err(io)?;
    upper.set_permissions(fs::Permissions::from_mode(0o755)).map_err(io)?;
    upper.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).map_err(io)?;
    write_manifest(&dir, &tree, None).map_err(|e| io(std::io::Error::other(e)))?;
    let root = root_row(id, &domain, roots.join(name), vec![built.digest]);
    Ok((
        root.clone(),
        Publication {
            anchors,
            images: vec![(built.digest, row)],
            roots: vec![root],
            ..Publication::default()
        },
    ))
}

pub const BYTES: [u8; 10_000] = [7; 10_000];
/// Where a child finds its store and what to clone.
pub const CHILD: &str = "PAGEFOLD_TEST_STORE";

/// A fresh place for a store, with something to clone.
pub fn place(rig: &LoopRig, name: &str) -> PathBuf {
    let place = rig.path().join(name);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("source"), BYTES).unwrap();
    File::open(place.join("source")).unwrap().sync_all().unwrap();
    place.join("store")
}
