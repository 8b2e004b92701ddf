//! Cases about what is shared on disk and what only looks like it.

use std::path::Path;

use pagefold_engine::identity::{DeviceClass, Identity};
use pagefold_engine::layout::RawExtent;

use super::{Case, Need, Rig, RigExt, apart, noise};

const PAGE: u64 = 4096;
const PLAIN: &[Need] = &[Need::Reflink, Need::PlainPages];

pub(super) fn cases<R: Rig>() -> Vec<Case<R>> {
    vec![
        Case { name: "clones_are_equal", needs: PLAIN, run: equal_clones },
        Case { name: "same_extents_of_another_size_are_another_file", needs: PLAIN, run: other_size },
        Case { name: "partly_shared", needs: PLAIN, run: partly_shared },
        Case { name: "overwrite_in_the_middle", needs: PLAIN, run: overwrite_middle },
        Case { name: "cut_clone_keeps_its_whole_pages", needs: PLAIN, run: cut_clone },
        Case { name: "punched_clone", needs: PLAIN, run: punched_clone },
        Case { name: "snapshot_is_equal", needs: &[Need::Snapshot, Need::PlainPages], run: snapshot },
        Case {
            name: "relocation",
            needs: &[Need::Relocate, Need::Reflink, Need::PlainPages],
            run: relocation,
        },
        Case { name: "equal_bytes_are_not_equal_extents", needs: &[Need::PlainPages], run: equal_bytes },
        Case { name: "freed_addresses_are_reused", needs: &[Need::Extents], run: reuse },
        Case { name: "realtime_addresses_overlap", needs: &[Need::Realtime], run: realtime },
    ]
}

fn equal_clones<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 33 * PAGE as usize + 77));
    for name in ["b", "c"] {
        rig.reflink(Path::new("a"), Path::new(name)).expect("reflink");
    }
    let [a, b, c] = ["a", "b", "c"].map(|n| rig.look(n).layout);
    assert!(a.is_decided() && a == b && b == c, "{a:?}\n{b:?}\n{c:?}");
    assert!(matches!(rig.look("a").page(33), Identity::Tail { valid: 77, .. }));
}

/// Rule 4: bytes past EOF are zero in cache, whatever the extents.
fn other_size<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 4 * PAGE as usize + 1000));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.truncate(Path::new("b"), 4 * PAGE + 500).expect("truncate");
    rig.fsync(Path::new("b")).expect("fsync");
    rig.reflink(Path::new("a"), Path::new("c")).expect("reflink");
    rig.truncate(Path::new("c"), 4 * PAGE + 2000).expect("truncate");
    rig.fsync(Path::new("c")).expect("fsync");
    let [a, b, c] = ["a", "b", "c"].map(|n| rig.look(n));
    for (x, y) in [(&a, &b), (&a, &c), (&b, &c)] {
        assert_ne!(x.layout, y.layout);
        assert!(apart(x.page(4), y.page(4)), "tails of different length");
        assert_eq!(x.page(3), y.page(3), "whole pages are shared still");
    }
}

fn partly_shared<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 8 * PAGE as usize));
    rig.put("b", &noise(2, 12 * PAGE as usize));
    rig.clone_range(Path::new("a"), 2 * PAGE, 3 * PAGE, Path::new("b"), 6 * PAGE).expect("clone range");
    rig.fsync(Path::new("b")).expect("fsync");
    let (a, b) = (rig.look("a"), rig.look("b"));
    for page in 0..12 {
        let shared = (6..9).contains(&page);
        assert!(b.page(page).is_decided());
        let twin = (0..8).find(|p| a.page(*p) == b.page(page));
        assert_eq!(twin, shared.then(|| page - 4), "page {page} of b");
    }
}

fn overwrite_middle<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 10 * PAGE as usize));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.write(Path::new("b"), 4 * PAGE + 10, &noise(5, 20)).expect("write");
    rig.fsync(Path::new("b")).expect("fsync");
    let (a, b) = (rig.look("a"), rig.look("b"));
    for page in 0..10 {
        assert_eq!(a.page(page) == b.page(page), page != 4, "page {page}");
    }
}

fn cut_clone<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 6 * PAGE as usize));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.truncate(Path::new("b"), 2 * PAGE + 100).expect("truncate");
    rig.fsync(Path::new("b")).expect("fsync");
    let (a, b) = (rig.look("a"), rig.look("b"));
    assert_eq!((b.pages(), b.found.size), (3, 2 * PAGE + 100));
    assert!((0..2).all(|p| a.page(p) == b.page(p)));
    assert_ne!(a.page(2), b.page(2));
    // Grown again, what was cut is zeros and no part of the old extent comes back.
    rig.truncate(Path::new("b"), 6 * PAGE).expect("truncate");
    rig.fsync(Path::new("b")).expect("fsync");
    let b = rig.look("b");
    assert!((3..6).all(|p| b.page(p) == Identity::Zero), "{:?}", b.layout);
    assert!(rig.bytes(Path::new("b")).expect("read")[2 * PAGE as usize + 100..].iter().all(|b| *b == 0));
    assert_ne!(a.page(2), b.page(2));
}

fn punched_clone<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 8 * PAGE as usize));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.punch(Path::new("b"), 2 * PAGE, 2 * PAGE).expect("punch");
    rig.fsync(Path::new("b")).expect("fsync");
    let (a, b) = (rig.look("a"), rig.look("b"));
    for page in 0..8 {
        let punched = (2..4).contains(&page);
        assert_eq!(b.page(page) == Identity::Zero, punched, "page {page}");
        assert_eq!(b.page(page) == a.page(page), !punched, "page {page}");
    }
}

fn snapshot<R: Rig>(rig: &mut R) {
    rig.mksubvolume(Path::new("sub")).expect("subvolume");
    rig.put("sub/f", &noise(1, 9 * PAGE as usize + 5));
    rig.snapshot(Path::new("sub"), Path::new("snap")).expect("snapshot");
    let (a, b) = (rig.look("sub/f"), rig.look("snap/f"));
    assert!(a.layout.is_decided() && a.layout == b.layout);
    assert_ne!(a.found.inode.dev, b.found.inode.dev, "each subvolume has its own st_dev");
    assert_eq!((a.fs.uuid, a.fs.instance), (b.fs.uuid, b.fs.instance), "one file system");
}

fn relocation<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 20 * PAGE as usize));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    let before = rig.look("a");
    let bytes = rig.bytes(Path::new("a")).expect("read");
    rig.relocate().expect("relocate");
    let (a, b) = (rig.look("a"), rig.look("b"));
    assert_ne!(a.layout, before.layout, "a stored key is a hint");
    assert_eq!(a.layout, b.layout, "still one extent");
    assert_eq!(rig.bytes(Path::new("a")).expect("read"), bytes);
    // The addresses of before may serve another file now: same numbers, other bytes.
    rig.put("c", &noise(9, 20 * PAGE as usize));
    let c = rig.look("c");
    assert!((0..20).all(|p| c.page(p) != a.page(p)));
}

fn equal_bytes<R: Rig>(rig: &mut R) {
    let data = noise(1, 4 * PAGE as usize);
    rig.put("a", &data);
    rig.put("b", &data);
    let (a, b) = (rig.look("a"), rig.look("b"));
    assert!(a.layout.is_decided() && b.layout.is_decided());
    assert!((0..4).all(|p| a.page(p) != b.page(p)), "two places on disk");
}

fn reuse<R: Rig>(rig: &mut R) {
    for round in 0..20 {
        rig.put("gone", &noise(round, 4 * PAGE as usize));
        rig.unlink(Path::new("gone")).expect("unlink");
    }
    rig.put("a", &noise(100, 4 * PAGE as usize));
    rig.put("b", &noise(101, 4 * PAGE as usize));
    let (a, b) = (rig.look("a"), rig.look("b"));
    assert!((0..4).all(|p| apart(a.page(p), b.page(p))));
}

/// Rule 1: data and real-time device count their addresses each for itself.
fn realtime<R: Rig>(rig: &mut R) {
    rig.put("data", &noise(0, 64 * PAGE as usize));
    let data = rig.look("data");
    for i in 0..400 {
        let name = format!("f{i}");
        rig.create_realtime(Path::new(&name)).expect("create");
        rig.write(Path::new(&name), 0, &noise(i + 1, 64 * PAGE as usize)).expect("write");
        rig.fsync(Path::new(&name)).expect("fsync");
        let other = rig.look(&name);
        assert_eq!(
            (data.found.class, other.found.class),
            (Some(DeviceClass::Data), Some(DeviceClass::Realtime))
        );
        for (p, q) in (0..64).flat_map(|p| (0..64).map(move |q| (p, q))) {
            assert!(apart(data.page(p), other.page(q)));
        }
        let addresses: Vec<u64> = data.found.extents.iter().map(|e| e.physical).collect();
        let inside = |e: &RawExtent| addresses.iter().any(|a| e.physical <= *a && *a < e.physical + e.length);
        if other.found.extents.iter().any(inside) {
            return;
        }
    }
    panic!("400 files did not reach the addresses of the data file: the case shows nothing");
}
