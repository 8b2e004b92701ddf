//! Cases about names, inodes and things that are no regular files; and about reading.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use pagefold_engine::units::{PageCount, PageIndex};
use pagefold_fsadapters::source::{
    EntryKind, FileSource, ReadJob, ReadOptions, ReadOutcome, Residency, SpecialKind,
};

use super::{Case, Look, Need, Rig, RigExt, look, noise};
use crate::sim::source::page_hash;

const PAGE: u64 = 4096;

pub(super) fn cases<R: Rig>() -> Vec<Case<R>> {
    vec![
        Case { name: "hard_links_are_one_inode", needs: &[], run: hard_links },
        Case { name: "names_are_bytes", needs: &[], run: names },
        Case { name: "kinds_are_told", needs: &[], run: kinds },
        Case { name: "what_is_gone_is_enoent", needs: &[], run: gone },
        Case { name: "renamed_is_the_same", needs: &[Need::PlainPages], run: renamed },
        Case { name: "growth_and_truncation", needs: &[Need::Extents], run: truncation },
        Case { name: "reading_hashes_what_is_there", needs: &[], run: reading },
        Case { name: "reading_leaves_the_cache_alone", needs: &[Need::Evict], run: reading_cold },
        Case { name: "reading_another_file_is_moved", needs: &[], run: reading_moved },
    ]
}

fn hard_links<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, PAGE as usize));
    rig.link(Path::new("a"), Path::new("b")).expect("link");
    let (a, b) = (rig.look("a"), rig.look("b"));
    assert_eq!((a.found.inode, a.found.links), (b.found.inode, 2));
    rig.unlink(Path::new("a")).expect("unlink");
    assert_eq!(rig.look("b").found.links, 1);
}

fn names<R: Rig>(rig: &mut R) {
    let names: [&[u8]; 4] = [b"\xff\xfe", b"tab\there", "\u{1f4c4} \u{e4}".as_bytes(), b"-rf \n"];
    for name in names {
        let path = Path::new(OsStr::from_bytes(name));
        rig.create(path).expect("create");
        rig.write(path, 0, b"x").expect("write");
        let look = look(rig.source(), &rig.root(), path).expect("look");
        assert_eq!(look.found.size, 1);
    }
    let source = rig.source();
    let dir = source.open_root(&rig.root()).expect("root").dir;
    let mut listed = Vec::new();
    source.read_dir(&dir, &mut |n, _| listed.push(n.as_bytes().to_vec())).expect("list");
    listed.sort();
    let mut wanted = names.map(<[u8]>::to_vec).to_vec();
    wanted.sort();
    assert_eq!(listed, wanted);
}

fn kinds<R: Rig>(rig: &mut R) {
    rig.put("file", b"x");
    rig.mkdir(Path::new("dir")).expect("mkdir");
    rig.mkfifo(Path::new("fifo")).expect("mkfifo");
    rig.symlink(Path::new("file"), Path::new("link")).expect("symlink");
    rig.symlink(Path::new("round"), Path::new("round")).expect("symlink");
    let source = rig.source();
    let root = source.open_root(&rig.root()).expect("root");
    for (name, kind) in [
        ("file", EntryKind::File),
        ("dir", EntryKind::Dir),
        ("fifo", EntryKind::Special(SpecialKind::Fifo)),
        ("link", EntryKind::Symlink),
        ("round", EntryKind::Symlink),
    ] {
        assert_eq!(source.kind_of(&root.dir, OsStr::new(name)).expect("stat"), kind, "{name}");
    }
    let mut listed = 0;
    source
        .read_dir(&root.dir, &mut |name, told| {
            listed += 1;
            let kind = source.kind_of(&root.dir, name).expect("stat");
            assert!(told == EntryKind::Unknown || told == kind, "{name:?}");
        })
        .expect("list");
    assert_eq!(listed, 5);
    // No regular file: refused, without blocking on the FIFO or following the link.
    for name in ["dir", "fifo", "link", "round"] {
        let error = look(source, &rig.root(), Path::new(name)).expect_err(name);
        assert_eq!(error.source.raw_os_error(), Some(22), "{name}: {error}");
    }
    for name in ["file", "fifo", "link", "round"] {
        assert!(source.open_dir(&root.dir, OsStr::new(name)).is_err(), "{name}");
    }
}

fn gone<R: Rig>(rig: &mut R) {
    rig.put("f", b"x");
    rig.unlink(Path::new("f")).expect("unlink");
    let error = look(rig.source(), &rig.root(), Path::new("f")).expect_err("it is gone");
    assert!(error.is_vanished(), "{error}");
    let missing = rig.root().join("nowhere");
    assert!(rig.source().open_root(&missing).is_err());
}

fn renamed<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 3 * PAGE as usize));
    let before = rig.look("a");
    rig.mkdir(Path::new("d")).expect("mkdir");
    rig.rename(Path::new("a"), Path::new("d/b")).expect("rename");
    let after = rig.look("d/b");
    assert_eq!((before.found.inode, &before.layout), (after.found.inode, &after.layout));
}

fn truncation<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.put("f", &noise(1, 5 * PAGE as usize));
    for size in [5 * PAGE - 1, 2 * PAGE + 1, 2 * PAGE, 0, 3 * PAGE, 1] {
        rig.truncate(path, size).expect("truncate");
        rig.fsync(path).expect("fsync");
        let look = rig.look("f");
        assert_eq!((look.found.size, look.pages()), (size, size.div_ceil(PAGE)));
        assert_eq!(rig.bytes(path).expect("read").len() as u64, size);
    }
}

fn job(look: &Look, rig_path: std::path::PathBuf, ranges: &[(u64, u64)]) -> ReadJob {
    let ranges = ranges.iter().map(|(s, n)| (PageIndex(*s), PageCount(*n))).collect();
    let resident = look.found.residency == Residency::All;
    let (inode, size, ctime) = (look.found.inode, look.found.size, look.found.ctime);
    ReadJob { tag: 7, path: rig_path, inode, size, ctime, ranges, resident }
}

fn read_one<S: FileSource>(source: &S, job: ReadJob) -> ReadOutcome {
    let outcomes = Mutex::new(Vec::new());
    let options = ReadOptions { threads: 1, queue_depth: 4 };
    let done = |o| outcomes.lock().expect("no panic inside").push(o);
    source.read(&mut std::iter::once(job), options, &AtomicBool::new(false), &done);
    let mut outcomes = outcomes.into_inner().expect("no panic inside");
    assert_eq!(outcomes.len(), 1, "one outcome a job");
    outcomes.remove(0)
}

fn check_read<R: Rig>(rig: &mut R, ranges: &[(u64, u64)]) {
    let seen = rig.look("f");
    let outcome = read_one(rig.source(), job(&seen, rig.root().join("f"), ranges));
    let ReadOutcome::Hashed { tag: 7, hashes } = outcome else { panic!("{outcome:?}") };
    let mut bytes = rig.bytes(Path::new("f")).expect("read");
    bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE as usize).collect();
    let wanted: Vec<[u8; 16]> =
        ranges.iter().flat_map(|(s, n)| *s..s + n).map(|p| page_hash(pages[p as usize])).collect();
    assert_eq!(hashes, wanted);
}

/// A page past EOF is hashed with zeros.
fn reading<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 70 * PAGE as usize + 9));
    rig.punch(Path::new("f"), 10 * PAGE, 4 * PAGE).expect("punch");
    rig.fsync(Path::new("f")).expect("fsync");
    check_read(rig, &[(0, 71)]);
    check_read(rig, &[(0, 1), (5, 7), (70, 1)]);
    rig.bytes(Path::new("f")).expect("read");
    check_read(rig, &[(0, 71)]);
}

fn reading_cold<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 64 * PAGE as usize));
    rig.evict(Path::new("f")).expect("evict");
    let seen = rig.look("f");
    assert_eq!(seen.found.residency, Residency::None);
    let outcome = read_one(rig.source(), job(&seen, rig.root().join("f"), &[(0, 64)]));
    assert!(matches!(outcome, ReadOutcome::Hashed { .. }), "{outcome:?}");
    assert_eq!(rig.look("f").found.residency, Residency::None, "reading brought pages in and left them");
}

fn reading_moved<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 2 * PAGE as usize));
    let seen = rig.look("f");
    rig.truncate(Path::new("f"), PAGE).expect("truncate");
    let outcome = read_one(rig.source(), job(&seen, rig.root().join("f"), &[(0, 2)]));
    assert!(matches!(outcome, ReadOutcome::Moved { tag: 7 }), "{outcome:?}");
    rig.unlink(Path::new("f")).expect("unlink");
    let outcome = read_one(rig.source(), job(&seen, rig.root().join("f"), &[(0, 2)]));
    assert!(matches!(outcome, ReadOutcome::Moved { .. } | ReadOutcome::Failed { .. }), "{outcome:?}");
}
