//! Content identity: what to read, and what reading it says.
//!
//! Extents already name most pages, so each distinct physical page is read once, through one mapping that shows it,
//! whatever the number of its sharers; only what extents can't decide is read file by file. The answer relabels the
//! map: equal bytes get equal [`Identity::Content`] numbers, in runs as long as the bytes allow, and all figures are
//! then computed by the same sweep as before.
//!
//! What could not be read keeps the identity its extents gave it: less is found, nothing is guessed.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::identity::{Identity, Undecided};
use crate::layout::{Layout, Run};
use crate::share_map::{CachedRuns, Key, LayoutId, Mapping, ShareMap};
use crate::units::{MappingId, PageCount, PageIndex, RootId, Span};

/// BLAKE3 of a page's bytes as the cache shows them (zeros after EOF), first 128 bits.
pub type PageHash = [u8; 16];

/// A run of pages of a mapping known from the context.
type PageRange = (PageIndex, PageCount);

/// Pages to read through one mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPlan {
    /// The mapping to read from.
    pub mapping: MappingId,
    /// Which pages, ascending and disjoint.
    pub ranges: Vec<(PageIndex, PageCount)>,
    /// Where on disk the first is, as a sort key that only serves reading in physical order; `None` is not known.
    pub place: Option<(u32, u64)>,
    /// Whether another mapping with the same layout shows the same pages, should this one fail.
    pub shared_layout: bool,
}

/// Numbers page contents, and remembers what was learnt about which pages.
#[derive(Debug, Default)]
pub struct ContentIndex {
    ids: FxHashMap<PageHash, u64>,
    /// Learnt of decided pages: by key of the first page.
    physical: BTreeMap<Key, (u64, u64)>,
    /// Learnt of undecided pages: (pages, id) by first page of the mapping.
    private: BTreeMap<(MappingId, PageIndex), (u64, u64)>,
}

impl ShareMap {
    /// What must be read so that every page is known by its content: each distinct decided page once, each undecided
    /// page of every mapping. In physical order; what has no place comes last, by mapping.
    #[must_use]
    pub fn read_plan(&self) -> Vec<ReadPlan> {
        let representatives = self.representatives();
        let mut plans = self.plan_decided(&representatives);
        plans.extend(self.plan_undecided());
        plans.sort_by_key(|p| (p.place.is_none(), p.place, p.mapping));
        plans
    }

    /// For each layout the first mapping that has it and how many do.
    fn representatives(&self) -> Vec<Option<(MappingId, u32)>> {
        let mut first = vec![None; self.layouts.len()];
        for (id, mapping) in self.mappings() {
            let slot: &mut Option<(MappingId, u32)> = &mut first[mapping.layout.0 as usize];
            match slot {
                Some((_, copies)) => *copies += 1,
                None => *slot = Some((id, 1)),
            }
        }
        first
    }

    fn plan_decided(&self, representatives: &[Option<(MappingId, u32)>]) -> Vec<ReadPlan> {
        let mut items = Vec::new();
        for (at, layout) in self.layouts.iter().enumerate() {
            if representatives[at].is_none() {
                continue;
            }
            for run in &layout.runs {
                if let Some(key) = Key::of(run.identity, self.page) {
                    items.push((key, run.pages.0, at as u32, run.start));
                }
            }
        }
        items.sort_unstable();
        let mut by_layout: BTreeMap<u32, ReadPlan> = BTreeMap::new();
        let mut covered = Key { space: 0, at: 0 };
        for (key, pages, layout, start) in items {
            let end = key.at + pages;
            let from = if key.space == covered.space { key.at.max(covered.at) } else { key.at };
            if from < end {
                let range = (PageIndex(start.0 + (from - key.at)), PageCount(end - from));
                let (mapping, copies) =
                    representatives[layout as usize].expect("only layouts in use are items");
                let place =
                    Some((key.space & !1, if key.space & 1 == 1 { from >> self.page.shift() } else { from }));
                let plan = by_layout.entry(layout).or_insert_with(|| ReadPlan {
                    mapping,
                    ranges: Vec::new(),
                    place,
                    shared_layout: copies > 1,
                });
                plan.ranges.push(range);
                plan.place = plan.place.min(place);
                covered = Key { space: key.space, at: end };
            }
        }
        by_layout.into_values().map(ReadPlan::tidied).collect()
    }

    fn plan_undecided(&self) -> impl Iterator<Item = ReadPlan> + '_ {
        self.mappings().filter_map(|(mapping, m)| {
            let runs = self.layout(m.layout).runs.iter();
            // A file that moved twice would move again; it is named in the report, and its size may be anything.
            let wanted =
                |r: &&Run| !r.identity.is_decided() && r.identity != Identity::Undecided(Undecided::Volatile);
            let ranges: Vec<_> = runs.filter(wanted).map(|r| (r.start, r.pages)).collect();
            let plan = ReadPlan { mapping, ranges, place: None, shared_layout: false };
            (!plan.ranges.is_empty()).then(|| plan.tidied())
        })
    }

    /// The map with every page that `index` knows named by its content.
    #[must_use]
    pub fn relabelled(&self, index: &ContentIndex) -> ShareMap {
        let mut table = Interner::default();
        let shared: Vec<Option<LayoutId>> = self
            .layouts
            .iter()
            .map(|l| l.is_decided().then(|| table.intern(index.relabel(self, l, None))))
            .collect();
        let mappings: Vec<Mapping> = self
            .mappings()
            .map(|(id, m)| {
                let layout = shared[m.layout.0 as usize]
                    .unwrap_or_else(|| table.intern(index.relabel(self, self.layout(m.layout), Some(id))));
                Mapping { layout, ..m }
            })
            .collect();
        ShareMap {
            page: self.page,
            domains: self.domains.clone(),
            layouts: table.layouts,
            mappings,
            partial: self.partial.clone(),
        }
    }

    /// Splits page ranges of a mapping into what is cached and what is not; both ascending.
    #[must_use]
    pub fn split_by_cache(&self, id: MappingId, ranges: &[PageRange]) -> (Vec<PageRange>, Vec<PageRange>) {
        let cached = match self.cached_runs(&self.mapping(id)) {
            CachedRuns::None => return (Vec::new(), ranges.to_vec()),
            CachedRuns::All => return (ranges.to_vec(), Vec::new()),
            CachedRuns::Some(cached) => cached,
        };
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        let push = |to: &mut Vec<PageRange>, from: u64, end: u64| {
            if from < end {
                to.push((PageIndex(from), PageCount(end - from)));
            }
        };
        for (start, pages) in ranges {
            let (mut at, end) = (start.0, start.0 + pages.0);
            let first = cached.partition_point(|c| c.0.plus(c.1) <= *start);
            for (from, pages) in cached[first..].iter().take_while(|c| c.0.0 < end) {
                push(&mut outside, at, from.0);
                let (from, to) = (from.0.max(at), (from.0 + pages.0).min(end));
                push(&mut inside, from, to);
                at = to;
            }
            push(&mut outside, at, end);
        }
        (inside, outside)
    }

    /// The root that owns `id`.
    #[must_use]
    pub fn root_of(&self, id: MappingId) -> RootId {
        self.mapping(id).root
    }
}

impl ReadPlan {
    /// Ranges ascending, adjacent ones joined.
    fn tidied(mut self) -> ReadPlan {
        self.ranges.sort_unstable();
        self.ranges.dedup_by(|next, last| {
            let joins = last.0.plus(last.1) == next.0;
            if joins {
                last.1.0 += next.1.0;
            }
            joins
        });
        self
    }
}

impl ContentIndex {
    /// Takes in the hashes of the pages of `span`, one a page, in order.
    ///
    /// # Panics
    /// When the numbers differ.
    pub fn learn(&mut self, map: &ShareMap, span: Span, hashes: &[PageHash]) {
        assert_eq!(span.pages.0, hashes.len() as u64, "one hash a page");
        let layout = Arc::clone(&map.layouts[map.mapping(span.mapping).layout.0 as usize]);
        let first = layout.runs.partition_point(|r| r.start.plus(r.pages) <= span.start);
        for run in &layout.runs[first..] {
            let from = run.start.max(span.start);
            let to = run.start.plus(run.pages).min(span.end());
            if from >= to {
                break;
            }
            let key = Key::of(run.identity.plus(PageCount(from.0 - run.start.0)), map.page);
            let hashes = &hashes[(from.0 - span.start.0) as usize..(to.0 - span.start.0) as usize];
            self.number(hashes, |ids, skip, pages, id| match key {
                Some(key) => {
                    ids.physical.insert(Key { at: key.at + skip, ..key }, (pages, id));
                }
                None => {
                    ids.private.insert((span.mapping, PageIndex(from.0 + skip)), (pages, id));
                }
            });
        }
    }

    /// Distinct page contents seen.
    #[must_use]
    pub fn distinct(&self) -> PageCount {
        PageCount(self.ids.len() as u64)
    }

    /// Gives each hash its number and tells runs of consecutive numbers as (first, pages, first number).
    fn number(&mut self, hashes: &[PageHash], mut tell: impl FnMut(&mut Self, u64, u64, u64)) {
        let mut run: Option<(u64, u64, u64)> = None;
        for (at, hash) in hashes.iter().enumerate() {
            let next = self.ids.len() as u64;
            let id = *self.ids.entry(*hash).or_insert(next);
            match &mut run {
                Some((_, pages, first)) if *first + *pages == id => *pages += 1,
                _ => {
                    if let Some((skip, pages, first)) = run.replace((at as u64, 1, id)) {
                        tell(self, skip, pages, first);
                    }
                }
            }
        }
        if let Some((skip, pages, first)) = run {
            tell(self, skip, pages, first);
        }
    }

    fn relabel(&self, map: &ShareMap, layout: &Layout, private: Option<MappingId>) -> Layout {
        let mut runs: Vec<Run> = Vec::with_capacity(layout.runs.len());
        let mut push = |start: u64, pages: u64, identity: Identity| {
            if pages == 0 {
                return;
            }
            if let Some(last) = runs.last_mut()
                && last.identity.continues_as(last.pages, identity)
            {
                last.pages.0 += pages;
                return;
            }
            runs.push(Run { start: PageIndex(start), pages: PageCount(pages), identity });
        };
        for run in &layout.runs {
            let mut at = 0;
            while at < run.pages.0 {
                let identity = run.identity.plus(PageCount(at));
                let left = run.pages.0 - at;
                let start = run.start.0 + at;
                let (pages, new) = match self.known(map, identity, left, private, PageIndex(start)) {
                    Lookup::Known { pages, id } => (pages.min(left), Identity::Content { id }),
                    Lookup::Unknown { pages } => (pages.min(left), identity),
                };
                push(start, pages, new);
                at += pages;
            }
        }
        Layout { size: layout.size, runs }
    }

    /// What is known of the page at `identity`, and for how many pages that holds.
    fn known(
        &self,
        map: &ShareMap,
        identity: Identity,
        left: u64,
        private: Option<MappingId>,
        page: PageIndex,
    ) -> Lookup {
        match (Key::of(identity, map.page), private) {
            (Some(key), _) => {
                let before = self.physical.range(..=key).next_back().filter(|(k, _)| k.space == key.space);
                let next =
                    self.physical.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded)).next();
                let gap = next.filter(|(k, _)| k.space == key.space).map_or(left, |(k, _)| k.at - key.at);
                lookup(before.map(|(k, v)| (k.at, *v)), key.at, gap)
            }
            (None, Some(mapping)) if identity != Identity::Zero => {
                let key = (mapping, page);
                let before = self.private.range(..=key).next_back().filter(|(k, _)| k.0 == mapping);
                let next =
                    self.private.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded)).next();
                let gap = next.filter(|(k, _)| k.0 == mapping).map_or(left, |(k, _)| k.1.0 - page.0);
                lookup(before.map(|(k, v)| (k.1.0, *v)), page.0, gap)
            }
            _ => Lookup::Unknown { pages: left },
        }
    }
}

enum Lookup {
    Known { pages: u64, id: u64 },
    Unknown { pages: u64 },
}

fn lookup(before: Option<(u64, (u64, u64))>, at: u64, gap: u64) -> Lookup {
    match before {
        Some((start, (pages, id))) if at < start + pages => {
            Lookup::Known { pages: start + pages - at, id: id + (at - start) }
        }
        _ => Lookup::Unknown { pages: gap },
    }
}

/// Gives equal layouts one number.
#[derive(Default)]
struct Interner {
    layouts: Vec<Arc<Layout>>,
    numbers: std::collections::HashMap<Arc<Layout>, u32, FxBuildHasher>,
}

impl Interner {
    fn intern(&mut self, layout: Layout) -> LayoutId {
        if let Some(at) = self.numbers.get(&layout) {
            return LayoutId(*at);
        }
        let at = u32::try_from(self.layouts.len()).expect("fewer than 2^32 layouts");
        let layout = Arc::new(layout);
        self.layouts.push(Arc::clone(&layout));
        self.numbers.insert(layout, at);
        LayoutId(at)
    }
}
