//! Cases about the page cache: dirty pages make a map worthless, residency is counted, looking changes nothing.

use std::path::Path;

use pagefold_engine::identity::{Identity, Undecided};
use pagefold_fsadapters::source::Residency;

use super::{Case, Need, Rig, RigExt, apart, noise};

const PAGE: u64 = 4096;

pub(super) fn cases<R: Rig>() -> Vec<Case<R>> {
    vec![
        Case { name: "dirty_clone_is_undecided_never_equal", needs: &[Need::Reflink], run: dirty_clone },
        Case {
            name: "clone_in_writeback_is_undecided",
            needs: &[Need::Reflink, Need::HoldWriteback],
            run: writeback,
        },
        Case { name: "dirty_unwritten_is_not_zero", needs: &[Need::Unwritten], run: dirty_unwritten },
        Case { name: "delayed_allocation_is_undecided", needs: &[Need::Extents], run: delalloc },
        Case {
            name: "dirty_hole_beside_a_shared_block_is_not_zero",
            needs: &[Need::Reflink],
            run: dirty_hole,
        },
        Case { name: "unknown_cache_is_undecided", needs: &[Need::Unowned], run: unknown_cache },
        Case { name: "residency_none_some_all", needs: &[Need::Evict], run: residency },
        Case { name: "looking_changes_nothing", needs: &[], run: unchanged },
        Case { name: "without_extents_nothing_is_decided", needs: &[Need::NoExtents], run: no_extents },
    ]
}

/// Design 5.6: after a reflink copy and an unsynced overwrite the map still shows the old shared extent.
fn dirty_clone<R: Rig>(rig: &mut R) {
    rig.put("original", &noise(1, 16 * PAGE as usize));
    let mut caught_dirty = false;
    for round in 0..3 {
        let name = format!("copy{round}");
        let copy = Path::new(&name);
        rig.reflink(Path::new("original"), copy).expect("reflink");
        rig.write(copy, 3 * PAGE, &noise(2 + round, PAGE as usize)).expect("overwrite");
        let (original, look) = (rig.look("original"), rig.look(&name));
        assert_ne!(look.found.dirty_pages, None, "the owner may ask for the cache");
        // Whatever the flusher did meanwhile, these two pages differ in bytes.
        let (a, b) = (original.page(3), look.page(3));
        assert!(apart(a, b), "different bytes, one identity: {a:?}");
        if look.found.dirty_pages != Some(0) {
            caught_dirty = true;
            assert!((0..16).all(|p| !look.page(p).is_decided()), "{:?}", look.layout);
        }
        rig.fsync(copy).expect("fsync");
        let synced = rig.look(&name);
        assert_eq!(synced.found.dirty_pages, Some(0));
        assert!(apart(synced.page(3), rig.look("original").page(3)));
    }
    assert!(caught_dirty, "an unsynced overwrite never showed as dirty");
}

fn writeback<R: Rig>(rig: &mut R) {
    rig.put("original", &noise(1, 8 * PAGE as usize));
    let copy = Path::new("copy");
    rig.reflink(Path::new("original"), copy).expect("reflink");
    rig.write(copy, PAGE, &noise(2, PAGE as usize)).expect("overwrite");
    rig.hold_writeback(copy).expect("begin writeback");
    let look = rig.look("copy");
    assert_eq!(look.page(1), Identity::Undecided(Undecided::DirtyCache));
    rig.fsync(copy).expect("fsync");
    assert!(apart(rig.look("copy").page(1), rig.look("original").page(1)));
}

fn dirty_unwritten<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.fallocate(path, 0, 8 * PAGE).expect("fallocate");
    rig.fsync(path).expect("fsync");
    assert!((0..8).all(|p| rig.look("f").page(p) == Identity::Zero), "{:?}", rig.look("f").layout);
    rig.write(path, 2 * PAGE, &noise(3, PAGE as usize)).expect("write");
    assert_ne!(rig.look("f").page(2), Identity::Zero, "written, if not yet on disk");
    rig.fsync(path).expect("fsync");
    assert_ne!(rig.look("f").page(2), Identity::Zero);
    assert_eq!(rig.look("f").page(5), Identity::Zero);
}

fn delalloc<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.write(path, 0, &noise(1, 4 * PAGE as usize)).expect("write");
    let look = rig.look("f");
    if look.found.dirty_pages != Some(0) {
        assert!((0..4).all(|p| !look.page(p).is_decided()), "{:?}", look.layout);
    }
}

/// Found by the random case on Linux 6.18: XFS reserves a write into a hole beside a shared dirty block in its
/// copy-on-write fork, and the map goes on showing a hole.
fn dirty_hole<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 4 * PAGE as usize + 200));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.write(Path::new("b"), 4 * PAGE + 100, &noise(2, 100)).expect("write to a shared block");
    rig.write(Path::new("b"), 7 * PAGE, &noise(3, PAGE as usize)).expect("write beside it");
    let look = rig.look("b");
    assert_ne!(look.page(7), Identity::Zero, "written, whatever the map shows: {:?}", look.found.extents);
    rig.fsync(Path::new("b")).expect("fsync");
    let look = rig.look("b");
    assert_ne!(look.page(7), Identity::Zero);
    assert_eq!(look.page(6), Identity::Zero);
}

fn unknown_cache<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, PAGE as usize));
    rig.disown(Path::new("f")).expect("disown");
    let look = rig.look("f");
    assert_eq!(look.page(0), Identity::Undecided(Undecided::UnknownCache));
    assert_eq!(look.found.residency, Residency::Unknown);
}

fn residency<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 40 * PAGE as usize - 5));
    rig.evict(Path::new("f")).expect("evict");
    assert_eq!(rig.look("f").found.residency, Residency::None);
    rig.make_resident(Path::new("f"), 7, 3).expect("read");
    match rig.look("f").found.residency {
        Residency::Runs(runs) => {
            let runs: Vec<_> = runs.iter().map(|(s, n)| (s.0, n.0)).collect();
            assert_eq!(runs, [(7, 3)]);
        }
        other => panic!("3 of 40 pages are cached, not {other:?}"),
    }
    rig.bytes(Path::new("f")).expect("read");
    assert_eq!(rig.look("f").found.residency, Residency::All);
}

fn unchanged<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 5 * PAGE as usize + 1));
    let before = rig.times(Path::new("f")).expect("stat");
    for _ in 0..3 {
        rig.look("f");
    }
    assert_eq!(rig.times(Path::new("f")).expect("stat"), before, "atime, mtime, ctime");
    if rig.has(Need::Evict) {
        rig.evict(Path::new("f")).expect("evict");
        rig.look("f");
        assert_eq!(rig.look("f").found.residency, Residency::None, "looking brought pages in");
    }
}

fn no_extents<R: Rig>(rig: &mut R) {
    rig.put("f", &noise(1, 3 * PAGE as usize));
    let look = rig.look("f");
    assert!(!look.fs.physical_identity && look.fs.why_not.is_some());
    assert!((0..3).all(|p| look.page(p) == Identity::Undecided(Undecided::NoExtentMap)));
}
