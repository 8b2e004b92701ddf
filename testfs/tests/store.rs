//! The store on real XFS and btrfs: anchors, publication, recovery after a crash at every step, copies and snapshots, a full disk.
//!
//! Crashes are real: the test runs itself as a child process with `PAGEFOLD_CRASH_AT`, which ends it by SIGKILL at that step.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::sealed::image;
use pagefold_fsadapters::sealed::tree::{
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree,
};
use pagefold_fsadapters::store::manifest::write_manifest;
use pagefold_fsadapters::store::{
    AnchorKey, AnchorRow, Build, DomainRow, ImageDigest, ImageRow, NewAnchor, OpenMode, ProblemKind,
    Publication, RootRow, STEPS, SealId, Signature, Store, StoreError, Task,
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

fn anchor(build: &Build<'_>, file: &File, hint: u64) -> Result<(AnchorKey, AnchorRow), StoreError> {
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
    };
    Ok((key, row))
}

fn store_path(anchor: &NewAnchor<'_>) -> PathBuf {
    PathBuf::from(anchor.key.path())
}

/// A root directory with the files `f0`, `f1`, ... in these anchors.
fn tree(anchors: &[(AnchorKey, AnchorRow)]) -> Tree {
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
fn publish_one(
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
fn prepare(
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
    Ok((root.clone(), Publication { anchors, images: vec![(built.digest, row)], roots: vec![root] }))
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
            root = publish_one(&store, rig.path(), "a", &file, 3).unwrap();
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
        println!(
            "{fs:?}: create {opened:?}, 10,000 anchors {made:?}, publish {published:?}, 10,000 hints {looked_up:?}, rows {rows:?}, \
             open {reopened:?}, index {bytes} bytes"
        );
    }
}

const BYTES: [u8; 10_000] = [7; 10_000];
/// Where a child finds its store and what to clone.
const CHILD: &str = "PAGEFOLD_TEST_STORE";

/// The child seals from several threads.
const CROWD: &str = "PAGEFOLD_TEST_CROWD";

/// What a child does to a store, from nothing to nothing: all states that its crash may leave.
const STATES: [&[&str]; 5] = [&[], &["a"], &["a", "b"], &["b"], &["b", "c"]];

fn life(dir: &Path) -> Result<(), StoreError> {
    let roots = dir.parent().unwrap();
    let file = File::open(roots.join("source")).unwrap();
    let mut store = Store::open(dir, OpenMode::Create, "test child")?;
    let a = publish_one(&store, roots, "a", &file, 3)?;
    publish_one(&store, roots, "b", &file, 2)?;
    store.remove_root(a.id)?;
    store.gc(&|_| true, &Task::default())?;
    publish_one(&store, roots, "c", &file, 1)?;
    drop(store);
    Store::open(dir, OpenMode::Existing, "test child").map(drop)
}

/// Several seals at once in one process.
fn crowd(dir: &Path) {
    let roots = dir.parent().unwrap();
    let store = open(dir);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let file = File::open(roots.join("source")).unwrap();
                for n in 0..4 {
                    publish_one(store, roots, &format!("{thread}-{n}"), &file, 20).unwrap();
                }
            });
        }
    });
}

#[test]
fn privileged_many_seals_at_once() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs, 400 << 20);
        let dir = place(&rig, "all");
        crowd(&dir);
        let store = open(&dir);
        assert_eq!(store.roots().unwrap().len(), 16);
        let report = store.verify(&Task::default()).unwrap();
        assert_eq!((&report.problems[..], report.anchors), (&[][..], 16 * 20));
        drop(store);
        for n in [1, 50, 150, 250] {
            let dir = place(&rig, &n.to_string());
            let crash = format!("store.anchor.finished:{n}");
            let mut command = child(&dir);
            assert!(!command.env(CROWD, "1").env("PAGEFOLD_CRASH_AT", &crash).status().unwrap().success());
            let store = open(&dir);
            assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?} {crash}");
            assert!(store.roots().unwrap().len() < 16);
        }
    }
}

/// Not a test of its own: what the crash tests run in a process that dies.
#[test]
fn privileged_child() {
    if let Some(dir) = std::env::var_os(CHILD) {
        if std::env::var_os(CROWD).is_some() {
            crowd(Path::new(&dir));
        } else {
            life(Path::new(&dir)).unwrap();
        }
    }
}

fn child(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "privileged_child", "--test-threads=1"]).env(CHILD, dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A fresh place for a store, with something to clone.
fn place(rig: &LoopRig, name: &str) -> PathBuf {
    let place = rig.path().join(name);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("source"), BYTES).unwrap();
    File::open(place.join("source")).unwrap().sync_all().unwrap();
    place.join("store")
}

/// The steps of a life, each with how often it comes.
fn steps(rig: &LoopRig) -> Vec<(String, usize)> {
    let dir = place(rig, "dry");
    let log = rig.path().join("steps");
    assert!(child(&dir).env("PAGEFOLD_STEPS_TO", &log).status().unwrap().success());
    let log = fs::read_to_string(log).unwrap();
    let count = |step: &str| log.lines().filter(|line| *line == step).count();
    STEPS.iter().map(|s| ((*s).to_owned(), count(s))).filter(|(_, n)| *n > 0).collect()
}

/// Opens what a crash left: nothing is wrong with it, it is one of the states of a life, every anchor has its bytes, and it
/// works.
fn check_survivor(dir: &Path, what: &str) {
    let roots = dir.parent().unwrap();
    let mut store = Store::open(dir, OpenMode::Create, "test").unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = store.verify(&Task::default()).unwrap();
    assert_eq!(report.problems, [], "{what}");
    let rows = store.roots().unwrap();
    let mut names: Vec<&str> = rows.iter().map(|r| r.name.as_str()).collect();
    names.sort_unstable();
    assert!(STATES.contains(&&names[..]), "{what}: {names:?}");
    for row in &rows {
        let image = store.image(&row.layers[0]).unwrap().expect("its image");
        for key in image.anchors {
            let mut bytes = Vec::new();
            let mut file = store.open_anchor(row.domain, &key).unwrap();
            std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
            assert!(bytes == BYTES, "{what}");
        }
    }
    let file = File::open(roots.join("source")).unwrap();
    let d = publish_one(&store, roots, "d", &file, 2).unwrap_or_else(|e| panic!("{what}: {e}"));
    for row in store.roots().unwrap() {
        store.remove_root(row.id).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    assert!(store.root(d.id).is_err());
    store.gc(&|_| true, &Task::default()).unwrap();
    let left: usize = fs::read_dir(dir.join("anchors/0"))
        .unwrap()
        .map(|xx| fs::read_dir(xx.unwrap().path()).unwrap().count())
        .sum();
    assert_eq!((left, fs::read_dir(dir.join("images")).unwrap().count()), (0, 0), "{what}");
}

/// First, second and last occurrence: what lies between is like its neighbours.
fn occurrences(count: usize) -> Vec<usize> {
    (1..=count).filter(|n| *n <= 2 || *n == count).collect()
}

fn killed_at_every_step(fs: RigFs) {
    let rig = rig(fs, 1 << 30);
    let steps = steps(&rig);
    assert!(steps.iter().filter(|(s, _)| s.starts_with("store.")).count() > 18, "{steps:?}");
    for (step, count) in &steps {
        for n in occurrences(*count) {
            let dir = place(&rig, &format!("{step}-{n}"));
            let crash = format!("{step}:{n}");
            let status = child(&dir).env("PAGEFOLD_CRASH_AT", &crash).status().unwrap();
            assert!(!status.success(), "{crash} was passed alive");
            // The next one dies in the middle of the recovery, where there is something to recover.
            let left =
                ["store.anchor.finished", "store.root.dir", "store.grave.dug"].contains(&step.as_str());
            let deaths: &[&str] = if left && n == 2 {
                &["store.recover.graves", "store.recover.anchors", "store.recover.images"]
            } else {
                &[]
            };
            for recovery in deaths {
                let _ = child(&dir).env("PAGEFOLD_CRASH_AT", recovery).status().unwrap();
            }
            check_survivor(&dir, &crash);
        }
    }
}

#[test]
fn privileged_killed_at_every_step_xfs() {
    killed_at_every_step(RigFs::Xfs);
}

#[test]
fn privileged_killed_at_every_step_btrfs() {
    killed_at_every_step(RigFs::Btrfs);
}

/// A child that stops at `step`; the power goes, then it dies.
fn cut_at(rig: &mut LoopRig, step: &str) {
    let dir = place(rig, &step.replace(':', "-"));
    rustix::fs::syncfs(File::open(rig.path()).unwrap()).unwrap();
    let mut stopped: Child = child(&dir).env("PAGEFOLD_STOP_AT", step).spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&stopped);
    let options = rustix::process::WaitOptions::UNTRACED;
    let (_, status) = rustix::process::waitpid(Some(pid), options).unwrap().expect("a child that stops");
    assert!(status.stopped(), "{step} was passed");
    rig.cut_power_and(|| {
        stopped.kill().unwrap();
        stopped.wait().unwrap();
    })
    .unwrap();
    check_survivor(&dir, step);
}

#[test]
fn privileged_power_cuts() {
    for fs in FILE_SYSTEMS {
        let mut rig = rig(fs, 400 << 20);
        for step in [
            "store.create.index",
            "store.create.format",
            "store.anchor.finished:2",
            "store.publish.synced",
            "store.publish.committed:2",
            "store.grave.dug",
            "store.grave.unlinked",
        ] {
            cut_at(&mut rig, step);
        }
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
fn privileged_one_process_at_a_time() {
    let rig = rig(RigFs::Xfs, 320 << 20);
    let dir = place(&rig, "p");
    let mut first = child(&dir).env("PAGEFOLD_STOP_AT", "store.anchor.finished").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&first);
    let options = rustix::process::WaitOptions::UNTRACED;
    rustix::process::waitpid(Some(pid), options).unwrap().expect("it stops");
    let refused = Store::open_within(&dir, OpenMode::Existing, "second", Duration::from_millis(200));
    let text = refused.unwrap_err().to_string();
    assert!(text.contains(&format!("process {} (test child)", first.id())), "{text}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    // The second waits, and goes on when the first has ended.
    let store = Store::open(&dir, OpenMode::Existing, "second").unwrap();
    assert!(first.wait().unwrap().success());
    assert_eq!(store.roots().unwrap().len(), 2);
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
        let found: Vec<(PathBuf, ProblemKind)> =
            report.problems.iter().map(|p| (p.path.clone(), p.kind)).collect();
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
