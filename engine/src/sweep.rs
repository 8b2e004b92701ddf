//! One pass over all identities in order, telling for each run of equal pages who shows it.
//!
//! The pass goes over distinct layouts, each weighted by its holders; time is O(runs log runs + seams x holders at
//! the seam), memory one small item per run of a distinct layout. Clones that were never written add only weight.

use crate::identity::Identity;
use crate::share_map::{Cached, CachedRuns, Key, LayoutId, ShareMap};
use crate::units::{DomainId, MappingId, PageCount, PageIndex, RootId};

/// How often one root shows a layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight {
    pub root: RootId,
    /// Mappings with this layout.
    pub copies: u32,
    /// Of these, wholly cached.
    pub cached: u32,
}

/// All mappings of one domain that have one layout.
#[derive(Clone, Debug)]
pub(crate) struct Holders {
    pub domain: DomainId,
    pub layout: LayoutId,
    /// Ascending by root.
    pub weights: Vec<Weight>,
    /// Ascending by (root, id).
    pub mappings: Vec<MappingId>,
}

impl Holders {
    pub(crate) fn copies(&self) -> u64 {
        self.mappings.len() as u64
    }
}

impl ShareMap {
    /// The mappings by (domain, layout), in that order.
    pub(crate) fn holders(&self) -> Vec<Holders> {
        let mut order: Vec<u32> = (0..self.mappings.len() as u32).collect();
        let key = |at: &u32| {
            let m = &self.mappings[*at as usize];
            (self.domain_of(m.root), m.layout, m.root, *at)
        };
        order.sort_unstable_by_key(key);
        let same = |a: &u32, b: &u32| {
            let (x, y) = (key(a), key(b));
            (x.0, x.1) == (y.0, y.1)
        };
        order.chunk_by(same).map(|group| self.group(group)).collect()
    }

    fn group(&self, group: &[u32]) -> Holders {
        let first = &self.mappings[group[0] as usize];
        let root_of = |at: u32| self.mappings[at as usize].root;
        let weights = group
            .chunk_by(|a, b| root_of(*a) == root_of(*b))
            .map(|of_root| Weight {
                root: root_of(of_root[0]),
                copies: of_root.len() as u32,
                cached: of_root.iter().filter(|m| self.mappings[**m as usize].cached == Cached::All).count()
                    as u32,
            })
            .collect();
        Holders {
            domain: self.domain_of(first.root),
            layout: first.layout,
            weights,
            mappings: group.iter().map(|at| MappingId(*at)).collect(),
        }
    }
}

/// Who shows an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shower {
    /// Every mapping of these holders, from file page `start` on.
    Holders { at: u32, start: PageIndex },
    /// One partly cached mapping of `root`: adds to what is cached, not to what exists.
    CachedPart { root: RootId },
}

/// A run of identities and who shows it.
#[derive(Clone, Copy, Debug)]
struct Item {
    key: Key,
    pages: u64,
    identity: Identity,
    shower: Shower,
}

impl Item {
    fn end(&self) -> u64 {
        self.key.at + self.pages
    }
}

/// A run of equal pages: the items that cover it, each with how far into the item it begins.
pub(crate) struct Segment<'a> {
    pub identity: Identity,
    pub pages: PageCount,
    pub showers: &'a [(Shower, u64)],
}

/// Calls `tell` for each run of decided pages of the domain that `holders` (all of one domain) are of, in order of
/// identity. Equal pages are in one segment, and a segment is as long as the set of its showers stays the same.
pub(crate) fn sweep(
    map: &ShareMap,
    holders: &[Holders],
    with_cache: bool,
    mut tell: impl FnMut(Segment<'_>),
) {
    let mut items = Vec::new();
    for (at, holder) in holders.iter().enumerate() {
        collect(map, holder, at as u32, with_cache, &mut items);
    }
    items.sort_unstable_by_key(|i| i.key);
    let mut active = Active::default();
    let mut at = Key { space: 0, at: 0 };
    for item in items {
        // Many items may begin at one place (a block that a million pages of a file show): they only gather.
        if item.key != at {
            let same_space = item.key.space == at.space;
            let until = if same_space { item.key.at } else { u64::MAX };
            at.at = active.tell_ends(at.at, until, &mut tell);
            if same_space {
                active.tell(at.at, until, &mut tell);
            }
            at = item.key;
        }
        active.push(item);
    }
    active.tell_ends(at.at, u64::MAX, &mut tell);
}

/// The items that cover the place of the sweep.
#[derive(Default)]
struct Active {
    items: Vec<Item>,
    /// Least end of them; meaningless without items.
    first_end: u64,
    showers: Vec<(Shower, u64)>,
}

impl Active {
    fn push(&mut self, item: Item) {
        let end = item.end();
        self.first_end = if self.items.is_empty() { end } else { self.first_end.min(end) };
        self.items.push(item);
    }

    /// Tells what lies between `from` and each end up to `until`, dropping what ends; returns the last end.
    fn tell_ends(&mut self, mut from: u64, until: u64, tell: &mut impl FnMut(Segment<'_>)) -> u64 {
        while !self.items.is_empty() && self.first_end <= until {
            let end = self.first_end;
            self.tell(from, end, tell);
            self.items.retain(|i| i.end() > end);
            self.first_end = self.items.iter().map(Item::end).min().unwrap_or(0);
            from = end;
        }
        from
    }

    fn tell(&mut self, from: u64, to: u64, tell: &mut impl FnMut(Segment<'_>)) {
        let Some(first) = self.items.first().filter(|_| from < to) else { return };
        self.showers.clear();
        self.showers.extend(self.items.iter().map(|i| (i.shower, from - i.key.at)));
        let identity = first.identity.plus(PageCount(from - first.key.at));
        tell(Segment { identity, pages: PageCount(to - from), showers: &self.showers });
    }
}

fn collect(map: &ShareMap, holder: &Holders, at: u32, with_cache: bool, items: &mut Vec<Item>) {
    let layout = map.layout(holder.layout);
    for run in &layout.runs {
        if let Some(key) = Key::of(run.identity, map.page) {
            let shower = Shower::Holders { at, start: run.start };
            items.push(Item { key, pages: run.pages.0, identity: run.identity, shower });
        }
    }
    if !with_cache {
        return;
    }
    for id in &holder.mappings {
        let mapping = &map.mappings[id.0 as usize];
        let CachedRuns::Some(cached) = map.cached_runs(mapping) else { continue };
        for_overlaps(layout, cached, |identity, pages, _| {
            if let Some(key) = Key::of(identity, map.page) {
                let shower = Shower::CachedPart { root: mapping.root };
                items.push(Item { key, pages, identity, shower });
            }
        });
    }
}

/// Calls `tell(identity of the first page, pages, first page)` for each piece of a layout run that is in `cached`.
pub(crate) fn for_overlaps(
    layout: &crate::layout::Layout,
    cached: &[(PageIndex, PageCount)],
    mut tell: impl FnMut(Identity, u64, PageIndex),
) {
    let mut runs = layout.runs.iter().peekable();
    for (start, pages) in cached {
        let end = start.0 + pages.0;
        while let Some(run) = runs.peek() {
            let run_end = run.start.0 + run.pages.0;
            let from = run.start.0.max(start.0);
            let to = run_end.min(end);
            if from < to {
                tell(run.identity.plus(PageCount(from - run.start.0)), to - from, PageIndex(from));
            }
            if run_end > end {
                break;
            }
            runs.next();
        }
    }
}
