//! The sweep against page-by-page counting: same figures, on random maps with overlaps, clones, domains and partly
//! cached files. Also content relabelling against the bytes themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pagefold_engine::content::ContentIndex;
use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity, Undecided};
use pagefold_engine::layout::{Layout, Run};
use pagefold_engine::savings::Savings;
use pagefold_engine::share_map::{Cached, LayoutId, ShareMap};
use pagefold_engine::units::{DomainId, FsId, MappingId, PageCount, PageIndex, PageSize, RootId, Span};
use proptest::prelude::*;

const PAGE: PageSize = PageSize::KIB4;

/// Pages of a file: a small alphabet, so that everything collides with everything.
#[derive(Clone, Copy, Debug)]
enum Page {
    Phys(u8),
    Rt(u8),
    Hole,
    Unknown,
}

#[derive(Clone, Debug)]
struct FileCase {
    root: u32,
    pages: Vec<Page>,
    tail: u32,
    cached: Vec<bool>,
}

/// A page's name in the reference; `None` is never equal to anything.
type Name = Option<(u8, u64)>;

fn space(class: DeviceClass) -> AddressSpace {
    AddressSpace { fs: FsId(0), class }
}

fn identities(file: &FileCase) -> Vec<Identity> {
    let last = file.pages.len().wrapping_sub(1);
    let one = |(at, page): (usize, &Page)| {
        let (class, n) = match page {
            Page::Phys(n) => (DeviceClass::Data, *n),
            Page::Rt(n) => (DeviceClass::Realtime, *n),
            Page::Hole => return Identity::Zero,
            Page::Unknown => return Identity::Undecided(Undecided::Inline),
        };
        if at == last && file.tail != 0 {
            return Identity::Tail { space: space(class), page: u64::from(n), valid: file.tail };
        }
        Identity::Physical { space: space(class), page: u64::from(n) }
    };
    file.pages.iter().enumerate().map(one).collect()
}

fn layout(file: &FileCase) -> Layout {
    let mut runs: Vec<Run> = Vec::new();
    for (at, identity) in identities(file).into_iter().enumerate() {
        match runs.last_mut() {
            Some(last) if last.identity.continues_as(last.pages, identity) => last.pages.0 += 1,
            _ => runs.push(Run { start: PageIndex(at as u64), pages: PageCount(1), identity }),
        }
    }
    let whole = file.pages.len() as u64 * 4096;
    let missing = if file.tail == 0 || whole == 0 { 0 } else { 4096 - u64::from(file.tail) };
    Layout { size: whole - missing, runs }
}

fn build(files: &[FileCase], domains: &[u16]) -> ShareMap {
    let mut layouts: Vec<Arc<Layout>> = Vec::new();
    let mut ids = Vec::new();
    for file in files {
        let new = layout(file);
        let at = layouts.iter().position(|l| **l == new).unwrap_or_else(|| {
            layouts.push(Arc::new(new));
            layouts.len() - 1
        });
        ids.push(LayoutId(at as u32));
    }
    let mut map = ShareMap::new(PAGE, domains.iter().map(|d| DomainId(*d)).collect(), layouts);
    for (file, id) in files.iter().zip(ids) {
        let cached = cached_of(&mut map, &file.cached);
        map.push(RootId(file.root), id, cached);
    }
    map
}

fn cached_of(map: &mut ShareMap, cached: &[bool]) -> Cached {
    if cached.iter().all(|c| !c) {
        return Cached::None;
    }
    if cached.iter().all(|c| *c) {
        return Cached::All;
    }
    let mut runs: Vec<(PageIndex, PageCount)> = Vec::new();
    for (at, _) in cached.iter().enumerate().filter(|(_, c)| **c) {
        match runs.last_mut() {
            Some((start, pages)) if start.0 + pages.0 == at as u64 => pages.0 += 1,
            _ => runs.push((PageIndex(at as u64), PageCount(1))),
        }
    }
    map.push_partial(runs.into_boxed_slice())
}

type Seen = BTreeMap<(u16, (u8, u64)), Vec<(u32, bool)>>;

/// Page by page, file by file; knows nothing of runs, layouts or sweeps.
fn reference(files: &[FileCase], domains: &[u16], names: &[Vec<Name>]) -> Savings {
    let roots = domains.len();
    let mut out = Savings { roots: vec![Default::default(); roots], ..Default::default() };
    let mut seen = Seen::new();
    let mut whole: BTreeMap<(u16, u64, Vec<Name>), Vec<u32>> = BTreeMap::new();
    for (file, names) in files.iter().zip(names) {
        let ids = identities(file);
        let holes: Vec<bool> = ids.iter().map(|i| *i == Identity::Zero).collect();
        for f in [&mut out.total, &mut out.roots[file.root as usize].own] {
            f.files += 1;
            f.logical_bytes += layout(file).size;
            f.resident.0 += file.cached.iter().filter(|c| **c).count() as u64;
            f.cache.0 += holes.iter().filter(|h| !**h).count() as u64;
            f.zero.0 += holes.iter().filter(|h| **h).count() as u64;
            f.undecided.0 += names.iter().zip(&holes).filter(|(n, h)| n.is_none() && !**h).count() as u64;
        }
        let domain = domains[file.root as usize];
        for (name, cached) in names.iter().zip(&file.cached) {
            if let Some(name) = name {
                seen.entry((domain, *name)).or_default().push((file.root, *cached));
            }
        }
        if names.iter().zip(&holes).all(|(n, h)| n.is_some() || *h) {
            whole.entry((domain, layout(file).size, names.clone())).or_default().push(file.root);
        }
    }
    count_pages(&seen, &mut out);
    for ((_, _, names), owners) in &whole {
        let each = names.iter().filter(|n| n.is_some()).count() as u64;
        out.total.mergeable_file.0 += each * (owners.len() as u64 - 1);
        for root in 0..roots as u32 {
            let copies = owners.iter().filter(|o| **o == root).count() as u64;
            out.roots[root as usize].own.mergeable_file.0 += each * copies.saturating_sub(1);
        }
    }
    out.matrix = (0..roots).map(|i| (0..roots).map(|j| common(&seen, i, j, &out)).collect()).collect();
    out
}

fn count_pages(seen: &Seen, out: &mut Savings) {
    for shows in seen.values() {
        let extra = |root: Option<u32>, cached_only: bool| {
            let n = shows.iter().filter(|s| root.is_none_or(|r| r == s.0) && (!cached_only || s.1)).count();
            n.saturating_sub(1) as u64
        };
        out.total.mergeable_page.0 += extra(None, false);
        out.total.resident_duplicate.0 += extra(None, true);
        let set: BTreeSet<u32> = shows.iter().map(|s| s.0).collect();
        for root in &set {
            let slot = &mut out.roots[*root as usize];
            slot.own.mergeable_page.0 += extra(Some(*root), false);
            slot.own.resident_duplicate.0 += extra(Some(*root), true);
            slot.shared_with_others.0 += u64::from(set.len() > 1);
        }
    }
}

fn common(seen: &Seen, i: usize, j: usize, out: &Savings) -> PageCount {
    if i == j {
        return PageCount(out.roots[i].own.cache.0 - out.roots[i].own.mergeable_page.0);
    }
    let has = |shows: &Vec<(u32, bool)>, root: usize| shows.iter().any(|s| s.0 == root as u32);
    PageCount(seen.values().filter(|s| has(s, i) && has(s, j)).count() as u64)
}

fn names_by_extent(file: &FileCase) -> Vec<Name> {
    let name = |identity| match identity {
        Identity::Physical { space, page } => Some((u8::from(space.class == DeviceClass::Realtime), page)),
        Identity::Tail { space, page, valid } => {
            Some((2 + u8::from(space.class == DeviceClass::Realtime), page << 12 | u64::from(valid)))
        }
        _ => None,
    };
    identities(file).into_iter().map(name).collect()
}

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        8 => (0u8..12).prop_map(Page::Phys),
        2 => (0u8..12).prop_map(Page::Rt),
        1 => Just(Page::Hole),
        1 => Just(Page::Unknown),
    ]
}

/// Mostly ascending addresses, so that runs are longer than a page.
fn pages() -> impl Strategy<Value = Vec<Page>> {
    let run = (page(), 1u8..5).prop_map(|(first, n)| {
        let nth = |k| match first {
            Page::Phys(p) => Page::Phys(p + k),
            Page::Rt(p) => Page::Rt(p + k),
            other => other,
        };
        (0..n).map(nth).collect::<Vec<_>>()
    });
    proptest::collection::vec(run, 0..4).prop_map(|runs| runs.concat())
}

fn file(roots: u32) -> impl Strategy<Value = FileCase> {
    let tail = prop_oneof![Just(0u32), Just(1), Just(100)];
    (0..roots, pages(), tail, any::<u64>(), 0u8..3).prop_map(|(root, pages, tail, bits, mode)| {
        let cached = (0..pages.len()).map(|p| mode == 2 || mode == 1 && bits >> (p % 64) & 1 == 1).collect();
        FileCase { root, pages, tail, cached }
    })
}

fn farm() -> impl Strategy<Value = (Vec<FileCase>, Vec<u16>)> {
    (1u32..5).prop_flat_map(|roots| {
        let files = proptest::collection::vec((file(roots), 1u32..4), 0..12).prop_map(move |files| {
            let clones = files
                .into_iter()
                .flat_map(|(f, n)| (0..n).map(move |k| FileCase { root: (f.root + k) % roots, ..f.clone() }));
            clones.collect::<Vec<_>>()
        });
        (files, proptest::collection::vec(0u16..2, roots as usize))
    })
}

fn assert_same(got: &Savings, want: &Savings) {
    assert_eq!(got.total, want.total);
    assert_eq!(got.roots, want.roots);
    assert_eq!(got.matrix, want.matrix);
}

/// What page `p` of file `f` holds: physical pages by address, undecided ones by file; `None` for holes.
fn content(files: &[FileCase], bytes: &[u8], f: usize, p: usize) -> Option<u8> {
    let at = |space: AddressSpace, page: u64| bytes[page as usize + 20 * (space.class as usize)];
    Some(match identities(&files[f])[p] {
        Identity::Physical { space, page } => at(space, page),
        Identity::Tail { space, page, valid } => 50 + (at(space, page) * 3) % 7 + u8::from(valid > 50),
        Identity::Undecided(_) => bytes[(f * 7 + p) % 64],
        _ => return None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn sweep_counts_what_pages_count((files, domains) in farm()) {
        let map = build(&files, &domains);
        let names: Vec<_> = files.iter().map(names_by_extent).collect();
        let savings = map.savings(true);
        assert_same(&savings, &reference(&files, &domains, &names));
        prop_assert!(savings.total.mergeable_page >= savings.total.mergeable_file);
        prop_assert!(savings.total.resident_duplicate <= savings.total.mergeable_page);
    }

    #[test]
    fn shared_spans_are_the_pages_with_several_sites((files, domains) in farm()) {
        let map = build(&files, &domains);
        let mut told = 0;
        let mut redundant = 0;
        map.for_each_shared(|domain, span| {
            told += span.pages.0;
            redundant += span.pages.0 * (span.sites.len() as u64 - 1);
            for site in &span.sites {
                let file = &files[site.mapping.0 as usize];
                assert_eq!(domains[file.root as usize], domain.0);
                for page in 0..span.pages.0 {
                    let here = identities(file)[(site.offset.0 + page) as usize];
                    assert_eq!(here, span.identity.plus(PageCount(page)));
                }
            }
        });
        let total = map.savings(false).total;
        prop_assert_eq!(redundant, total.mergeable_page.0);
        prop_assert!(told <= total.cache.0);
    }

    #[test]
    fn top_files_duplicates_are_those_of_their_pages((files, domains) in farm()) {
        let map = build(&files, &domains);
        for group in map.top_files(100) {
            let members: Vec<&FileCase> = group.members.iter().map(|m| &files[m.0 as usize]).collect();
            let extra: usize = (0..members[0].pages.len())
                .filter(|p| identities(members[0])[*p] != Identity::Zero)
                .map(|p| members.iter().filter(|m| m.cached[p]).count().saturating_sub(1))
                .sum();
            prop_assert_eq!(group.resident_duplicate.0, extra as u64);
        }
    }

    /// After reading by plan, the figures are those of the bytes, and no page was read twice.
    #[test]
    fn content_counts_what_bytes_count(
        (files, domains) in farm(),
        bytes in proptest::collection::vec(0u8..6, 64),
    ) {
        let map = build(&files, &domains);
        let mut index = ContentIndex::default();
        let mut read = BTreeSet::new();
        for plan in map.read_plan() {
            let f = plan.mapping.0 as usize;
            for (start, pages) in &plan.ranges {
                let range = start.0..start.0 + pages.0;
                let hash = |p| [content(&files, &bytes, f, p as usize).expect("no hole is read"); 16];
                let hashes: Vec<[u8; 16]> = range.clone().map(hash).collect();
                for p in range {
                    let id = identities(&files[f])[p as usize];
                    let once = if id.is_decided() { (u32::MAX, 0, Some(id)) } else { (f as u32, p, None) };
                    prop_assert!(read.insert(once), "page read twice: {:?}", once);
                }
                index.learn(&map, Span { mapping: plan.mapping, start: *start, pages: *pages }, &hashes);
            }
        }
        let name = |f: usize, p: usize| content(&files, &bytes, f, p).map(|c| (0, u64::from(c)));
        let names: Vec<Vec<Name>> =
            (0..files.len()).map(|f| (0..files[f].pages.len()).map(|p| name(f, p)).collect()).collect();
        let relabelled = map.relabelled(&index);
        assert_same(&relabelled.savings(true), &reference(&files, &domains, &names));
        prop_assert_eq!(relabelled.savings(false).total.undecided, PageCount(0));
    }
}

#[test]
fn nothing_is_shared_across_domains() {
    let one = FileCase { root: 0, pages: vec![Page::Phys(1); 1], tail: 0, cached: vec![true] };
    let two = FileCase { root: 1, ..one.clone() };
    let files = [one, two];
    assert_eq!(build(&files, &[0, 0]).savings(false).total.mergeable_page, PageCount(1));
    let apart = build(&files, &[0, 1]).savings(true);
    assert_eq!(apart.total.mergeable_page, PageCount(0));
    assert_eq!(apart.total.resident_duplicate, PageCount(0));
    assert_eq!(apart.matrix[0][1], PageCount(0));
}

#[test]
fn a_mapping_id_is_its_position() {
    let mut map = ShareMap::new(PAGE, vec![DomainId(0)], vec![Arc::new(Layout { size: 0, runs: vec![] })]);
    assert_eq!(map.push(RootId(0), LayoutId(0), Cached::None), MappingId(0));
    assert_eq!(map.push(RootId(0), LayoutId(0), Cached::None), MappingId(1));
}

/// A block that a deduplicating tool made every page of a file show: the sweep must not look at all of them for each.
#[test]
fn many_pages_at_one_place_are_counted_in_one_go() {
    const PAGES: u64 = 300_000;
    let identity = Identity::Physical { space: space(DeviceClass::Data), page: 5 };
    let run = |at| Run { start: PageIndex(at), pages: PageCount(1), identity };
    let layout = Layout { size: PAGES * 4096, runs: (0..PAGES).map(run).collect() };
    let mut map = ShareMap::new(PAGE, vec![DomainId(0)], vec![Arc::new(layout)]);
    map.push(RootId(0), LayoutId(0), Cached::All);
    let total = map.savings(false).total;
    assert_eq!(total.mergeable_page, PageCount(PAGES - 1));
    assert_eq!(total.resident_duplicate, PageCount(PAGES - 1));
}
