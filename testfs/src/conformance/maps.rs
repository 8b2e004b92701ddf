//! Cases about what a map can say: holes, unwritten, inline, compressed, sparse, empty.

use std::path::Path;

use pagefold_engine::identity::{Identity, Undecided};
use pagefold_engine::layout::ExtentFlags;

use super::{Case, Need, Rig, RigExt, noise};

const PAGE: u64 = 4096;

pub(super) fn cases<R: Rig>() -> Vec<Case<R>> {
    vec![
        Case { name: "holes_are_zero", needs: &[Need::Extents], run: holes },
        Case { name: "unwritten_is_zero_until_written", needs: &[Need::Unwritten], run: unwritten },
        Case { name: "preallocated_clone", needs: &[Need::Unwritten, Need::Reflink], run: unwritten_clone },
        Case { name: "inline_is_undecided", needs: &[Need::Inline, Need::Reflink], run: inline },
        Case { name: "compressed_is_undecided", needs: &[Need::Compress, Need::Reflink], run: compressed },
        Case { name: "empty_file", needs: &[], run: empty },
        Case { name: "terabytes_of_hole", needs: &[Need::Extents], run: sparse },
        Case { name: "allocated_zeros_are_content", needs: &[Need::PlainPages], run: zeros },
        Case { name: "small_blocks_are_never_half_decided", needs: &[Need::Extents], run: small_pieces },
    ]
}

fn holes<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.write(path, 4 * PAGE, &noise(1, PAGE as usize)).expect("write");
    rig.truncate(path, 10 * PAGE).expect("truncate");
    rig.fsync(path).expect("fsync");
    let look = rig.look("f");
    for page in 0..10 {
        assert_eq!(look.page(page) == Identity::Zero, page != 4, "page {page}: {:?}", look.layout);
    }
}

fn unwritten<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.fallocate(path, 0, 6 * PAGE).expect("fallocate");
    rig.write(path, 0, &noise(1, 2 * PAGE as usize)).expect("write");
    rig.fsync(path).expect("fsync");
    let look = rig.look("f");
    for page in 0..6 {
        assert_eq!(look.page(page) == Identity::Zero, page >= 2, "page {page}: {:?}", look.layout);
    }
    assert!(rig.bytes(path).expect("read")[2 * PAGE as usize..].iter().all(|b| *b == 0));
}

fn unwritten_clone<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.fallocate(path, 0, 4 * PAGE).expect("fallocate");
    rig.write(path, PAGE, &noise(1, PAGE as usize)).expect("write");
    rig.fsync(path).expect("fsync");
    rig.reflink(path, Path::new("g")).expect("reflink");
    rig.write(path, 2 * PAGE, &noise(2, PAGE as usize)).expect("write");
    rig.fsync(path).expect("fsync");
    let (f, g) = (rig.look("f"), rig.look("g"));
    assert_eq!(g.page(2), Identity::Zero);
    assert_ne!(f.page(2), Identity::Zero);
    assert_eq!(f.page(1), g.page(1));
}

fn inline<R: Rig>(rig: &mut R) {
    rig.put("a", &noise(1, 300));
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    rig.fsync(Path::new("b")).expect("fsync");
    let (a, b) = (rig.look("a"), rig.look("b"));
    for look in [&a, &b] {
        assert_eq!(look.page(0), Identity::Undecided(Undecided::Inline), "{:?}", look.found.extents);
    }
    assert_eq!(rig.bytes(Path::new("a")).expect("read"), rig.bytes(Path::new("b")).expect("read"));
    // Outgrown, the same file is ordinary.
    rig.write(Path::new("a"), 300, &noise(2, 2 * PAGE as usize)).expect("write");
    rig.fsync(Path::new("a")).expect("fsync");
    let grown = rig.look("a");
    assert!(
        grown.found.extents.iter().all(|e| e.length >= PAGE && e.physical != 0),
        "{:?}",
        grown.found.extents
    );
}

fn compressed<R: Rig>(rig: &mut R) {
    let pages = 64;
    let data = vec![b'x'; (pages * PAGE) as usize];
    rig.put("a", &data);
    rig.reflink(Path::new("a"), Path::new("b")).expect("reflink");
    let (a, b) = (rig.look("a"), rig.look("b"));
    for look in [&a, &b] {
        let encoded = (0..pages).filter(|p| look.page(*p) == Identity::Undecided(Undecided::Encoded)).count();
        assert!(encoded as u64 > pages / 2, "{:?}", look.found.extents);
        let plain = look.found.extents.iter().filter(|e| !e.flags.contains(ExtentFlags::ENCODED));
        let plain_pages: u64 = plain.map(|e| e.length / PAGE).sum();
        assert_eq!(look.layout.undecided_pages().0, pages - plain_pages);
    }
}

fn empty<R: Rig>(rig: &mut R) {
    rig.put("f", &[]);
    let look = rig.look("f");
    assert_eq!((look.found.size, look.layout.runs.len()), (0, 0));
    assert!(look.layout.is_decided());
}

fn sparse<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    let end = 4 << 40;
    rig.create(path).expect("create");
    rig.truncate(path, end).expect("truncate");
    rig.write(path, end / 2, &noise(1, PAGE as usize)).expect("write");
    rig.fsync(path).expect("fsync");
    let look = rig.look("f");
    assert_eq!(look.pages(), end / PAGE);
    assert_eq!(look.layout.zero_pages().0, end / PAGE - 1);
    assert!(look.layout.runs.len() <= 3);
}

/// Allocated pages full of zeros are ordinary content (design 10, `zero_bytes`).
fn zeros<R: Rig>(rig: &mut R) {
    rig.put("f", &[&noise(1, PAGE as usize)[..], &[0; 4096], &noise(2, PAGE as usize)].concat());
    assert_ne!(rig.look("f").page(1), Identity::Zero);
}

/// Writes of less than a page around a hole: a page is zero, one place, or undecided, never guessed.
fn small_pieces<R: Rig>(rig: &mut R) {
    let path = Path::new("f");
    rig.create(path).expect("create");
    rig.truncate(path, 6 * PAGE).expect("truncate");
    for (offset, len) in [(1024, 100), (PAGE + 3072, 1024), (2 * PAGE, 1024), (4 * PAGE + 2048, 2048)] {
        rig.write(path, offset, &noise(offset, len)).expect("write");
        rig.fsync(path).expect("fsync");
    }
    let look = rig.look("f");
    for page in [0, 1, 2, 4] {
        assert_ne!(look.page(page), Identity::Zero, "page {page} has bytes");
    }
    for page in [3, 5] {
        assert_eq!(look.page(page), Identity::Zero, "page {page}");
    }
}
