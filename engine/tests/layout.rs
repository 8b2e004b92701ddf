//! The identity rules of extent maps (design section 5) against a sector-by-sector reading of the same map, and each
//! rule by example.

use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity, Undecided};
use pagefold_engine::layout::{CacheState, ExtentFlags, Layout, MapFacts, RawExtent};
use pagefold_engine::units::{FsId, PageCount, PageIndex, PageSize};
use proptest::prelude::*;

const PAGE: PageSize = PageSize::KIB4;
const SPACE: AddressSpace = AddressSpace { fs: FsId(3), class: DeviceClass::Data };
const SECTOR: u64 = 512;

fn extent(logical: u64, physical: u64, length: u64, flags: ExtentFlags) -> RawExtent {
    RawExtent { logical, physical, length, flags }
}

fn layout_with(size: u64, extents: &[RawExtent], cache: CacheState) -> Layout {
    Layout::from_extents(MapFacts { size, extents, space: Some(SPACE), cache, page: PAGE })
}

fn layout(size: u64, extents: &[RawExtent]) -> Layout {
    layout_with(size, extents, CacheState::Clean)
}

/// The identity of each page.
fn pages(layout: &Layout) -> Vec<Identity> {
    let mut all = Vec::new();
    for run in &layout.runs {
        assert_eq!(run.start, PageIndex(all.len() as u64), "runs follow each other without gap");
        all.extend((0..run.pages.0).map(|n| run.identity.plus(PageCount(n))));
    }
    assert_eq!(all.len() as u64, PAGE.pages_covering(layout.size).0, "runs end at EOF");
    all
}

fn physical(page: u64) -> Identity {
    Identity::Physical { space: SPACE, page }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sector {
    Zeros,
    Data { address: u64 },
    Unknown,
}

/// What each sector up to EOF is, and whether any page is claimed by two extents.
fn sectors(size: u64, extents: &[RawExtent]) -> (Vec<Sector>, Vec<bool>) {
    let count = size.div_ceil(SECTOR) as usize;
    let mut all = vec![Sector::Zeros; count];
    let mut claims = vec![0u32; count];
    for e in extents {
        for (k, at) in (e.logical / SECTOR..(e.logical + e.length) / SECTOR).enumerate() {
            let Some(slot) = all.get_mut(at as usize) else { continue };
            claims[at as usize] += 1;
            *slot = if e.flags.intersects(ExtentFlags::ENCODED | ExtentFlags::DELALLOC) {
                Sector::Unknown
            } else if e.flags.contains(ExtentFlags::UNWRITTEN) {
                Sector::Zeros
            } else {
                Sector::Data { address: e.physical + k as u64 * SECTOR }
            };
        }
    }
    let doubled = claims.chunks(8).map(|c| c.iter().any(|n| *n > 1)).collect();
    (all, doubled)
}

fn expected(size: u64, page: usize, sectors: &[Sector]) -> Option<Identity> {
    let here = &sectors[page * 8..((page + 1) * 8).min(sectors.len())];
    if here.iter().all(|s| *s == Sector::Zeros) {
        return Some(Identity::Zero);
    }
    let Sector::Data { address } = here[0] else { return None };
    // Of one extent or of several: what counts is that the page is one piece of the disk.
    let one = here.iter().zip(0..).all(|(s, k)| *s == Sector::Data { address: address + k * SECTOR });
    if !one || address % 4096 != 0 {
        return None;
    }
    let valid = size - (page as u64 * 4096).min(size);
    if valid < 4096 {
        return Some(Identity::Tail { space: SPACE, page: address / 4096, valid: valid as u32 });
    }
    Some(physical(address / 4096))
}

fn extents(overlapping: bool) -> impl Strategy<Value = Vec<RawExtent>> {
    let unit = prop_oneof![3 => Just(4096u64), 2 => Just(1024), 1 => Just(512)];
    let flags = prop_oneof![
        6 => Just(ExtentFlags::empty()),
        2 => Just(ExtentFlags::SHARED),
        2 => Just(ExtentFlags::UNWRITTEN),
        1 => Just(ExtentFlags::ENCODED),
        1 => Just(ExtentFlags::DELALLOC | ExtentFlags::UNKNOWN),
    ];
    let one = (unit, 0u64..4, 1u64..12, 0u64..200, any::<bool>(), flags);
    proptest::collection::vec(one, 0..8).prop_map(move |list| {
        let mut at = 0;
        let mut all = Vec::new();
        for (unit, gap, length, address, aligned, flags) in list {
            let unit = if aligned { 4096 } else { unit };
            let back = if overlapping { 2 * unit } else { 0 };
            let logical = (at + gap * unit).saturating_sub(back).next_multiple_of(unit);
            all.push(extent(logical, address * unit, length * unit, flags));
            at = logical + length * unit;
        }
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_map_is_judged_as_its_sectors_say(list in extents(false), size in 0u64..(60 * 4096)) {
        let got = pages(&layout(size, &list));
        let (sectors, _) = sectors(size, &list);
        for (at, identity) in got.iter().enumerate() {
            match expected(size, at, &sectors) {
                Some(want) => prop_assert_eq!(*identity, want, "page {}", at),
                None => prop_assert!(!identity.is_decided(), "page {} is {:?}", at, identity),
            }
        }
    }

    #[test]
    fn overlaps_decide_nothing_that_is_not_so(list in extents(true), size in 0u64..(60 * 4096)) {
        let got = pages(&layout(size, &list));
        let (sectors, doubled) = sectors(size, &list);
        for (at, identity) in got.iter().enumerate().filter(|(_, i)| i.is_decided()) {
            prop_assert!(!doubled[at], "page {} is claimed twice", at);
            prop_assert_eq!(Some(*identity), expected(size, at, &sectors), "page {}", at);
        }
    }

    #[test]
    fn the_order_of_extents_does_not_matter(list in extents(false), size in 0u64..(60 * 4096)) {
        let mut turned = list.clone();
        turned.reverse();
        prop_assert_eq!(layout(size, &list), layout(size, &turned));
    }

    #[test]
    fn hostile_numbers_do_not_overflow(
        list in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>()), 0..5),
        size in prop_oneof![any::<u64>(), 0u64..100_000],
    ) {
        let list: Vec<_> =
            list.into_iter().map(|(l, p, n, f)| extent(l, p, n, ExtentFlags::from_bits_retain(f))).collect();
        let layout = layout(size, &list);
        let sum: u64 = layout.runs.iter().map(|r| r.pages.0).sum();
        prop_assert_eq!(sum, PAGE.pages_covering(size).0);
    }

    #[test]
    fn a_dirty_file_has_no_physical_page(list in extents(false), size in 0u64..(60 * 4096)) {
        for cache in [CacheState::Dirty, CacheState::Unknown] {
            for identity in pages(&layout_with(size, &list, cache)) {
                prop_assert!(matches!(identity, Identity::Undecided(_)), "{:?}", identity);
            }
        }
    }
}

#[test]
fn adjacent_extents_make_one_run_whatever_their_flags_shared_and_last_say() {
    let split = [extent(0, 40960, 8192, ExtentFlags::SHARED), extent(8192, 49152, 4096, ExtentFlags::LAST)];
    let whole = [extent(0, 40960, 12288, ExtentFlags::LAST)];
    assert_eq!(layout(12288, &split), layout(12288, &whole));
    assert_eq!(layout(12288, &whole).runs.len(), 1);
}

#[test]
fn extents_are_clipped_at_eof() {
    let long = [extent(0, 4096, 1 << 20, ExtentFlags::empty())];
    assert_eq!(pages(&layout(8192, &long)), [physical(1), physical(2)]);
    assert_eq!(layout(0, &long).runs.len(), 0);
}

#[test]
fn last_pages_are_equal_only_with_equal_valid_length() {
    let map = [extent(0, 4096, 4096, ExtentFlags::empty())];
    let (a, b) = (layout(100, &map), layout(101, &map));
    assert_ne!(a.runs[0].identity, b.runs[0].identity);
    assert_eq!(a.runs[0].identity, Identity::Tail { space: SPACE, page: 1, valid: 100 });
}

#[test]
fn under_dirty_pages_neither_unwritten_nor_a_hole_is_zero() {
    let map = [extent(4096, 4096, 4096, ExtentFlags::UNWRITTEN)];
    assert_eq!(pages(&layout(8192, &map)), [Identity::Zero; 2]);
    let dirty = pages(&layout_with(8192, &map, CacheState::Dirty));
    // XFS shows a hole where a write beside a shared block is reserved in the copy-on-write fork only.
    assert_eq!(dirty, [Identity::Undecided(Undecided::DirtyCache); 2]);
}

#[test]
fn each_flag_that_hides_bytes_makes_undecided() {
    let cases = [
        (ExtentFlags::UNKNOWN, Undecided::Delalloc),
        (ExtentFlags::DELALLOC, Undecided::Delalloc),
        (ExtentFlags::ENCODED, Undecided::Encoded),
        (ExtentFlags::DATA_ENCRYPTED, Undecided::Encoded),
        (ExtentFlags::DATA_INLINE | ExtentFlags::NOT_ALIGNED, Undecided::Inline),
        (ExtentFlags::DATA_TAIL | ExtentFlags::NOT_ALIGNED, Undecided::Inline),
        (ExtentFlags::NOT_ALIGNED, Undecided::Unaligned),
        (ExtentFlags::from_bits_retain(0x8000_0000), Undecided::Unaligned),
    ];
    for (flags, why) in cases {
        let got = pages(&layout(4096, &[extent(0, 4096, 4096, flags)]));
        assert_eq!(got, [Identity::Undecided(why)], "{flags:?}");
    }
}

#[test]
fn without_an_address_space_nothing_is_decided_not_even_holes() {
    let facts = MapFacts { size: 8192, extents: &[], space: None, cache: CacheState::Clean, page: PAGE };
    assert_eq!(pages(&Layout::from_extents(facts)), [Identity::Undecided(Undecided::NoExtentMap); 2]);
}

#[test]
fn what_the_file_system_calls_a_hole_is_zero_even_under_dirty_pages() {
    let map =
        [extent(4096, 4096, 8192, ExtentFlags::empty()), extent(20480, 40960, 4096, ExtentFlags::UNWRITTEN)];
    let size = 8 * 4096 + 100;
    let dirty = layout_with(size, &map, CacheState::Dirty);
    let unknown = Identity::Undecided(Undecided::DirtyCache);
    // Page 1 is cut by a hole, page 5 is whole, 7 and the partial 8 reach EOF.
    let holes = [0..4096 + 512, 5 * 4096..6 * 4096 + 1, 7 * 4096..size];
    let got = pages(&dirty.clone().with_holes(&holes, PAGE));
    let zero = Identity::Zero;
    assert_eq!(got, [zero, unknown, unknown, unknown, unknown, zero, unknown, zero, zero]);
    assert_eq!(dirty.clone().with_holes(&[], PAGE), dirty);
    // Decided pages are not touched: the map was clean, so it knows better.
    let clean = layout(size, &map);
    assert_eq!(clean.clone().with_holes(&holes, PAGE), clean);
    assert_eq!(pages(&layout_with(0, &map, CacheState::Dirty).with_holes(&holes, PAGE)).len(), 0);
}

#[test]
fn a_page_in_several_pieces_that_lie_together_on_disk_is_one_page() {
    let (shared, own) = (ExtentFlags::SHARED, ExtentFlags::empty());
    let pieces =
        [extent(0, 40960, 5120, shared), extent(5120, 46080, 1024, own), extent(6144, 47104, 2048, shared)];
    assert_eq!(pages(&layout(8192, &pieces)), [physical(10), physical(11)]);
    // Apart on disk, or one of them of another kind: the page is no piece of the disk.
    let apart = [extent(0, 40960, 5120, shared), extent(5120, 47104, 3072, own)];
    let mixed = [extent(0, 40960, 5120, shared), extent(5120, 46080, 3072, ExtentFlags::UNWRITTEN)];
    for pieces in [apart, mixed] {
        let found = pages(&layout(8192, &pieces));
        assert_eq!(found[0], physical(10));
        assert!(!found[1].is_decided(), "{found:?}");
    }
    let wrapping = [extent(0, u64::MAX - 4095, 4096, own), extent(4096, 0, 4096, own)];
    assert_eq!(pages(&layout(8192, &wrapping)).len(), 2);
}
