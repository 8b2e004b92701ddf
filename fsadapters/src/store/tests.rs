//! The store without anchors and without special file systems: opening, refusals, the index under attack. What needs reflink, root or
//! a crash is in `testfs/tests/store.rs`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;

/// Goes with what is in it, immutable anchors too.
struct Temp(tempfile::TempDir);

impl std::ops::Deref for Temp {
    type Target = tempfile::TempDir;

    fn deref(&self) -> &tempfile::TempDir {
        &self.0
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::process::Command::new("chattr").args(["-R", "-f", "-i"]).arg(self.0.path()).status();
    }
}

fn temp() -> Temp {
    Temp(tempfile::tempdir().expect("a temporary directory"))
}

/// Waits a little: a child of another test holds our lock between its fork and its exec.
fn open(dir: &Path) -> Result<Store, StoreError> {
    Store::open_within(dir, OpenMode::Create, "test", Duration::from_secs(2))
}

fn root(store: &Store, domain: &DomainRow, path: &str, layers: Vec<ImageDigest>) -> RootRow {
    let id = store.new_seal_id().unwrap();
    let path = PathBuf::from(path);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    RootRow {
        id,
        path,
        name,
        domain: domain.id,
        dev: 1,
        ino: 2,
        layers,
        generation: 1,
        sealed_at: 3,
        files: 4,
        entries: 5,
        bytes: 6,
        hits: 7,
        made: 8,
        unsettled: 9,
    }
}

/// A store with a domain, an image without anchors and a root.
fn with_a_root(dir: &Path) -> (Store, RootRow) {
    let store = open(dir).unwrap();
    let domain = store.ensure_domain("default").unwrap();
    let row = {
        let build = store.build(&domain);
        let digest = ImageDigest([5; 32]);
        build.write_image(&digest, b"image").unwrap();
        let image = ImageRow { domain: domain.id, bytes: 5, entries: 1, anchors: vec![] };
        let row = root(&store, &domain, "/roots/a\u{fffd}", vec![digest]);
        build.make_root_dir(row.id, 1).unwrap();
        build
            .publish(&Publication {
                anchors: vec![],
                images: vec![(digest, image)],
                roots: vec![row.clone()],
                ..Publication::default()
            })
            .unwrap();
        row
    };
    (store, row)
}

#[test]
fn made_once_and_opened_again() {
    let temp = temp();
    let dir = temp.path().join("s");
    assert!(matches!(
        Store::open(&dir, OpenMode::Existing, "test"),
        Err(StoreError::Absent(path)) if path.ends_with("s")
    ));
    assert!(!dir.exists());
    let (store, row) = with_a_root(&dir);
    let id = store.id();
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o700);
    let view =
        ViewRow { root: row.id, target: "/t".into(), read_only: true, idmap: "x".into(), mounted_at: 1 };
    store.put_view(&view).unwrap();
    drop(store);
    let store = Store::open(&dir, OpenMode::Existing, "test").unwrap();
    assert_eq!(store.id(), id);
    assert_eq!(store.roots().unwrap(), std::slice::from_ref(&row));
    assert_eq!(store.root(row.id).unwrap(), row);
    assert_eq!(store.view(row.id).unwrap(), Some(view.clone()));
    assert_eq!(store.views().unwrap(), std::slice::from_ref(&view));
    assert_eq!(store.find_root("/roots/a\u{fffd}").unwrap(), row);
    assert!(matches!(store.find_root("/roots/b"), Err(StoreError::NoSuch { .. })));
    assert!(matches!(store.put_view(&ViewRow { root: SealId(99), ..view }), Err(StoreError::NoSuch { .. })));
    assert!(store.remove_view(row.id).unwrap());
    assert!(!store.remove_view(row.id).unwrap());
    assert!(store.root_dir(row.id, 1).is_dir() && !store.root_dir(row.id, 1).join("unpublished").exists());
    assert_eq!(store.ensure_domain("default").unwrap().id, row.domain);
    assert_ne!(store.ensure_domain("other").unwrap().id, row.domain);
    for bad in ["", "a\nb", &"x".repeat(65)] {
        assert!(matches!(store.ensure_domain(bad), Err(StoreError::BadName { .. })), "{bad:?}");
    }
}

#[test]
fn paths_that_are_no_utf_8_come_back() {
    use std::os::unix::ffi::OsStrExt;
    let temp = temp();
    let (store, row) = with_a_root(&temp.path().join("s"));
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"/r/\xff\xfe"));
    let row = RootRow { path: path.clone(), ..row };
    let domain = store.ensure_domain("default").unwrap();
    store.build(&domain).publish(&Publication { roots: vec![row], ..Publication::default() }).unwrap();
    assert_eq!(store.roots().unwrap()[0].path, path);
}

#[test]
fn who_could_reach_in_is_refused() {
    let temp = temp();
    let dir = temp.path().join("s");
    drop(open(&dir).unwrap());
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o750)).unwrap();
    assert!(matches!(open(&dir), Err(StoreError::Untrusted { .. })));
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    let link = temp.path().join("link");
    symlink(&dir, &link).unwrap();
    assert!(matches!(open(&link), Err(StoreError::Untrusted { .. })));
    assert!(open(&dir).is_ok());
    // A directory on the way may be a link: that is resolved.
    symlink(temp.path(), temp.path().join("here")).unwrap();
    assert_eq!(open(&temp.path().join("here/s")).unwrap().dir(), dir.canonicalize().unwrap());
}

#[test]
fn a_store_and_a_root_never_lie_within_each_other() {
    let temp = temp();
    let dir = temp.path().canonicalize().unwrap().join("s");
    let store = open(&dir).unwrap();
    assert!(matches!(open(&dir.join("roots/t")), Err(StoreError::Nested { .. })));
    for root in [dir.clone(), dir.join("roots/x"), temp.path().canonicalize().unwrap(), "/".into()] {
        assert!(matches!(store.check_root_path(&root), Err(StoreError::Nested { .. })), "{root:?}");
    }
    assert!(store.check_root_path(&dir.with_file_name("s2")).is_ok());
    let domain = store.ensure_domain("d").unwrap();
    let inside = RootRow { path: dir.join("x"), ..root(&store, &domain, "/x", vec![]) };
    let publication = Publication { roots: vec![inside], ..Publication::default() };
    assert!(matches!(store.build(&domain).publish(&publication), Err(StoreError::Nested { .. })));
}

#[test]
fn other_directories_get_nothing_written_into_them() {
    let temp = temp();
    let dir = temp.path().join("s");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(dir.join("letter"), "dear").unwrap();
    assert!(matches!(open(&dir), Err(StoreError::NotAStore { .. })));
    fs::write(dir.join("FORMAT"), "something else").unwrap();
    assert!(matches!(open(&dir), Err(StoreError::NotAStore { .. })));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    fs::write(dir.join("FORMAT"), "pagefold store\nformat 7\n").unwrap();
    assert!(matches!(open(&dir), Err(StoreError::Newer { found: 7, known: 2, .. })));
    fs::write(dir.join("FORMAT"), "pagefold store\nformat 1\n").unwrap();
    assert!(matches!(open(&dir), Err(StoreError::Older { found: 1, known: 2, .. })));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn creation_that_was_cut_short_goes_on() {
    let temp = temp();
    let dir = temp.path().join("s");
    drop(open(&dir).unwrap());
    fs::remove_file(dir.join("FORMAT")).unwrap();
    drop(Store::open(&dir, OpenMode::Existing, "test").unwrap());
    assert!(dir.join("FORMAT").exists());
    fs::remove_file(dir.join("FORMAT")).unwrap();
    fs::remove_file(dir.join("index.redb")).unwrap();
    assert!(matches!(Store::open(&dir, OpenMode::Existing, "test"), Err(StoreError::Absent(_))));
    drop(open(&dir).unwrap());
    // Not so a removal that finds writes.
    fs::create_dir_all(dir.join("roots/000001/g1/upper/written")).unwrap();
    assert!(remove_unfinished(&dir).is_err());
    fs::remove_file(dir.join("FORMAT")).unwrap();
    assert!(matches!(remove_unfinished(&dir), Err(StoreError::NotAStore { .. })));
    fs::remove_dir(dir.join("roots/000001/g1/upper/written")).unwrap();
    remove_unfinished(&dir).unwrap();
    assert!(!dir.exists());
}

#[test]
fn one_at_a_time_and_the_holder_is_named() {
    let temp = temp();
    let dir = temp.path().join("s");
    let first = Store::open(&dir, OpenMode::Create, "seal /some/root\u{1b}[2J").unwrap();
    let error = Store::open_within(&dir, OpenMode::Create, "x", Duration::from_millis(30)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("process {} (seal /some/root?[2J)", std::process::id())), "{text}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Store::open(&dir, OpenMode::Existing, "y").map(|_| ()));
        std::thread::sleep(Duration::from_millis(50));
        drop(first);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn a_copy_is_refused_and_an_index_that_went_back_too() {
    let temp = temp();
    let dir = temp.path().join("s");
    let (store, _) = with_a_root(&dir);
    drop(store);
    let copy = temp.path().join("copy");
    let status = std::process::Command::new("cp").arg("-a").arg(&dir).arg(&copy).status().unwrap();
    assert!(status.success());
    assert!(matches!(open(&copy), Err(StoreError::Foreign { .. })));
    let old = fs::read(dir.join("index.redb")).unwrap();
    open(&dir).unwrap().ensure_domain("new").unwrap();
    fs::write(dir.join("index.redb"), &old).unwrap();
    let error = open(&dir).unwrap_err();
    assert!(error.to_string().contains("commit"), "{error}");
    assert!(matches!(error, StoreError::Foreign { .. }));
    assert!(fs::read(dir.join("index.redb")).unwrap() == old, "untouched");
}

#[test]
fn what_contradicts_itself_is_not_published() {
    let temp = temp();
    let (store, row) = with_a_root(&temp.path().join("s"));
    let (ours, other) = (store.ensure_domain("default").unwrap(), store.ensure_domain("other").unwrap());
    let anchor = AnchorRow {
        serial: 1,
        domain: ours.id,
        size: 1,
        signature: None,
        content: None,
        borrowed: None,
        stamp: None,
    };
    let image = ImageRow { domain: ours.id, bytes: 1, entries: 1, anchors: vec![AnchorKey([1; 32])] };
    let key = AnchorKey::of(store.id(), 1);
    let cases = [
        (
            &ours,
            Publication { anchors: vec![(AnchorKey([0; 32]), anchor.clone())], ..Publication::default() },
        ),
        (&other, Publication { anchors: vec![(key, anchor)], ..Publication::default() }),
        (&ours, Publication { images: vec![(ImageDigest([1; 32]), image)], ..Publication::default() }),
        (
            &ours,
            Publication {
                roots: vec![root(&store, &ours, "/x", vec![ImageDigest([9; 32])])],
                ..Publication::default()
            },
        ),
        (&other, Publication { roots: vec![row.clone()], ..Publication::default() }),
    ];
    for (domain, publication) in &cases {
        let result = store.build(domain).publish(publication);
        assert!(matches!(result, Err(StoreError::Inconsistent(_))), "{publication:?}: {result:?}");
    }
    let taken = RootRow { name: row.name.clone(), ..root(&store, &ours, "/r/y", vec![]) };
    let publication = Publication { roots: vec![taken], ..Publication::default() };
    assert!(matches!(store.build(&ours).publish(&publication), Err(StoreError::BadName { .. })));
    for name in ["", ".", "..", "../x", "/etc"] {
        let root = RootRow { name: name.into(), ..root(&store, &ours, "/r/z", row.layers.clone()) };
        let publication = Publication { roots: vec![root], ..Publication::default() };
        let result = store.build(&ours).publish(&publication);
        assert!(matches!(result, Err(StoreError::BadName { .. })), "{name:?}");
    }
    assert_eq!(store.roots().unwrap(), [row]);
}

#[test]
fn hints_are_replaced_and_the_older_anchor_keeps_a_shared_one() {
    let temp = temp();
    let store = open(&temp.path().join("s")).unwrap();
    let domain = store.ensure_domain("d").unwrap();
    let (same, hash) = (Signature([1; 16]), ContentHash([2; 32]));
    let row = |serial| AnchorRow {
        serial,
        domain: domain.id,
        size: 9,
        signature: Some(same),
        content: Some(hash),
        borrowed: None,
        stamp: None,
    };
    let keys = [1, 2].map(|serial| AnchorKey::of(store.id(), serial));
    let publish = |key: AnchorKey, row: AnchorRow| {
        let publication = Publication { anchors: vec![(key, row)], ..Publication::default() };
        store.build(&domain).publish(&publication).unwrap();
    };
    let find = || {
        let lookup = store.lookup().unwrap();
        (lookup.by_extents(domain.id, 9, &same).unwrap(), lookup.by_content(domain.id, 9, &hash).unwrap())
    };
    publish(keys[0], row(1));
    publish(keys[1], row(2));
    assert_eq!(find(), (Some(keys[0]), Some(keys[0])));
    // The first was found to be something else now.
    publish(keys[0], AnchorRow { signature: None, ..row(1) });
    assert_eq!(find(), (None, Some(keys[0])));
    publish(keys[1], row(2));
    assert_eq!(find(), (Some(keys[1]), Some(keys[0])));
    let lookup = store.lookup().unwrap();
    assert_eq!(lookup.anchor(&keys[0]).unwrap().unwrap().signature, None);
    assert_eq!(lookup.by_content(domain.id, 8, &hash).unwrap(), None);
    let mut seen = 0;
    lookup
        .anchors(|_, _| {
            seen += 1;
            seen < 1
        })
        .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn only_what_was_never_published_goes() {
    let temp = temp();
    let dir = temp.path().join("s");
    let (store, row) = with_a_root(&dir);
    let domain = store.ensure_domain("default").unwrap();
    let lost = store.new_seal_id().unwrap();
    // A process that dies: nothing is dropped.
    let build = store.build(&domain);
    build.make_root_dir(lost, 1).unwrap();
    build.write_image(&ImageDigest([7; 32]), b"orphan").unwrap();
    std::mem::forget(build);
    fs::create_dir_all(dir.join("tmp/deep/er")).unwrap();
    // A crash right after a commit: the mark is still there, the generation is published.
    let mark = store.root_dir(row.id, 1).join("unpublished");
    fs::write(&mark, "").unwrap();
    assert!(matches!(store.build(&domain).make_root_dir(row.id, 1), Err(StoreError::Inconsistent(_))));
    fs::create_dir(store.root_dir(row.id, 2)).unwrap();
    let unknown = store.root_dir(row.id, 3);
    fs::create_dir(&unknown).unwrap();
    fs::write(unknown.join("precious"), "").unwrap();
    fs::write(dir.join("images/README"), "").unwrap();
    drop(store);
    let store = open(&dir).unwrap();
    assert!(store.root_dir(row.id, 1).exists() && !mark.exists() && unknown.join("precious").exists());
    assert!(dir.join("images/README").exists());
    assert!(!store.root_dir(row.id, 2).exists() && !store.root_dir(lost, 1).parent().unwrap().exists());
    assert!(!store.image_path(&ImageDigest([7; 32])).exists());
    assert!(store.image_path(&row.layers[0]).exists());
    assert_eq!(fs::read_dir(dir.join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_build_that_is_dropped_leaves_nothing() {
    let temp = temp();
    let dir = temp.path().join("s");
    let store = open(&dir).unwrap();
    let domain = store.ensure_domain("d").unwrap();
    let id = store.new_seal_id().unwrap();
    let build = store.build(&domain);
    let made = build.make_root_dir(id, 1).unwrap();
    fs::write(made.join("manifest"), "m").unwrap();
    build.create_anchor().unwrap().discard();
    drop(build.create_anchor().unwrap());
    drop(build);
    assert!(!made.parent().unwrap().exists());
    let anchors: usize = fs::read_dir(dir.join("anchors/0"))
        .unwrap()
        .map(|xx| fs::read_dir(xx.unwrap().path()).unwrap().count())
        .sum();
    assert_eq!(anchors, 0);
}

#[test]
fn a_tree_of_any_depth_and_shape_is_removed_and_one_that_resists_blocks_nobody() {
    let temp = temp();
    let dir = temp.path().join("s");
    let (store, row) = with_a_root(&dir);
    let upper = store.root_dir(row.id, 1).join("upper");
    fs::create_dir(&upper).unwrap();
    let mut at = rustix::fs::open(&upper, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    for n in 0..3000 {
        // The name that a moved directory would get is taken, by a file and by a full directory.
        for taken in [".pagefold-removed-0", ".pagefold-removed-1/x"].iter().filter(|_| n == 3) {
            let _ = rustix::fs::mkdirat(&at, ".pagefold-removed-1", rustix::fs::Mode::RWXU);
            rustix::fs::mknodat(&at, *taken, rustix::fs::FileType::RegularFile, rustix::fs::Mode::RUSR, 0)
                .unwrap();
        }
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::RWXU).unwrap();
        rustix::fs::symlinkat("/", &at, "link").unwrap();
        at = rustix::fs::openat(&at, "d", rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    }
    drop(at);
    assert!(matches!(store.remove_root(row.id), Err(StoreError::UpperNotEmpty { .. })));
    store.discard_root(row.id).unwrap();
    assert!(!upper.exists() && !store.dir().join("roots").join(row.id.to_string()).exists());
    assert!(store.roots().unwrap().is_empty());
    drop(store);
    assert!(open(&dir).is_ok());
}

/// A small generator: a run is its seed.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 17
}

#[test]
fn a_damaged_index_is_told_or_harmless_and_never_touched() {
    let temp = temp();
    let dir = temp.path().join("s");
    let (store, row) = with_a_root(&dir);
    let domain = store.ensure_domain("default").unwrap();
    let anchors: Vec<_> = (1..200)
        .map(|serial| {
            let row = AnchorRow {
                serial,
                domain: domain.id,
                size: serial,
                signature: Some(Signature([serial as u8; 16])),
                content: None,
                borrowed: None,
                stamp: None,
            };
            (AnchorKey::of(store.id(), serial), row)
        })
        .collect();
    store.build(&domain).publish(&Publication { anchors, ..Publication::default() }).unwrap();
    drop(store);
    let path = dir.join("index.redb");
    let good = fs::read(&path).unwrap();
    let used = good.iter().rposition(|b| *b != 0).unwrap() + 1;
    let (mut seed, mut told, mut harmless) = (1, 0, 0);
    for round in 0..300 {
        let mut bad = good.clone();
        match round % 8 {
            0 => bad.truncate((next(&mut seed) % good.len() as u64) as usize),
            // The headers, where it hurts most.
            1..=3 => bad[(next(&mut seed) % 320) as usize] ^= 1 << (next(&mut seed) % 8),
            4 => {
                let at = (next(&mut seed) as usize % used) & !4095;
                let end = (at + 4096).min(bad.len());
                bad[at..end].fill(next(&mut seed) as u8);
            }
            _ => bad[next(&mut seed) as usize % used] ^= 1 << (next(&mut seed) % 8),
        }
        fs::write(&path, &bad).unwrap();
        match open(&dir) {
            Ok(store) => {
                harmless += 1;
                assert_eq!(store.roots().unwrap(), std::slice::from_ref(&row), "round {round}");
                let mut count = 0;
                store
                    .lookup()
                    .unwrap()
                    .anchors(|_, _| {
                        count += 1;
                        true
                    })
                    .unwrap();
                assert_eq!(count, 199, "round {round}");
            }
            Err(e) => {
                told += 1;
                let expected = matches!(
                    e,
                    StoreError::Damaged { .. } | StoreError::Foreign { .. } | StoreError::Newer { .. }
                );
                assert!(expected, "round {round}: {e:?}");
                assert!(fs::read(&path).unwrap() == bad, "round {round}: changed though refused: {e}");
            }
        }
        assert!(store_files_are_there(&dir, &row), "round {round}");
    }
    assert!(told > 50 && harmless > 10, "{told} told, {harmless} harmless");
    fs::write(&path, &good).unwrap();
    assert!(open(&dir).is_ok());
}

fn store_files_are_there(dir: &Path, row: &RootRow) -> bool {
    dir.join(format!("images/{}.erofs", row.layers[0])).exists()
        && dir.join(format!("roots/{}/g1", row.id)).exists()
}

#[test]
fn rows_of_later_versions_are_told_and_nothing_is_deleted() {
    use super::index::{IMAGES, ROOTS};
    let temp = temp();
    let dir = temp.path().join("s");
    let (store, row) = with_a_root(&dir);
    store
        .index
        .write(|txn| {
            txn.table(ROOTS)?.insert(row.id.0, &[2u8, 1, 2, 3][..]).map_err(|e| txn.error(e))?;
            txn.table(IMAGES)?.insert(&row.layers[0].0, &[9u8][..]).map_err(|e| txn.error(e))?;
            Ok(())
        })
        .unwrap();
    let error = store.roots().unwrap_err().to_string();
    assert!(error.contains("root row of version 2"), "{error}");
    drop(store);
    // Opening needs no rows; whatever needs them says so.
    if let Ok(mut store) = open(&dir) {
        assert!(matches!(store.gc(&|_| false, &Task::default()), Err(StoreError::Damaged { .. })));
        assert!(matches!(store.verify(&Task::default()), Err(StoreError::Damaged { .. })));
    }
    assert!(store_files_are_there(&dir, &row));
}

#[test]
fn the_index_file_of_another_kind_is_told() {
    let temp = temp();
    let dir = temp.path().join("s");
    drop(open(&dir).unwrap());
    let path = dir.join("index.redb");
    for text in ["", "no database at all", &"x".repeat(5000)] {
        fs::write(&path, text).unwrap();
        let error = open(&dir).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    File::options().write(true).open(&path).unwrap().set_len(1 << 45).ok();
    assert!(open(&dir).is_err());
    fs::remove_file(&path).unwrap();
    assert!(matches!(open(&dir), Err(StoreError::Damaged { .. })));
    assert!(!path.exists());
    let _ = File::create(&path).unwrap().write_at(b"x", 1 << 20);
    assert!(matches!(open(&dir), Err(StoreError::Damaged { .. })));
}
