//! Which spans of which mappings are the same page.
//!
//! Layouts are interned: a clone that was never written costs one number, not a second list of runs. So a farm of a
//! hundred equal roots is as large as one root plus a few bytes a file, and everything computed from the map works
//! on distinct layouts with their holders instead of on files.
//!
//! What it deliberately does not do: keep paths (the adapters do), or act. A shared span found here is a
//! [hint](crate::identity); whoever merges proves it again under protection.

use std::sync::Arc;

use crate::identity::{AddressSpace, DeviceClass, Identity};
use crate::layout::Layout;
use crate::units::{DomainId, MappingId, PageCount, PageIndex, PageSize, RootId, Site};

/// A layout's number in its [`ShareMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayoutId(pub u32);

/// Which pages of a mapping are in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cached {
    /// None.
    None,
    /// All up to EOF.
    All,
    /// The runs stored under this number.
    Partial(u32),
    /// Could not be read.
    Unknown,
}

/// One mapping: whose, which layout, how much of it is cached.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// The root that owns it.
    pub root: RootId,
    /// Its identities.
    pub layout: LayoutId,
    /// Its cache.
    pub cached: Cached,
}

/// A run of pages that several sites show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSpan {
    /// Identity of the first page.
    pub identity: Identity,
    /// Length of the run.
    pub pages: PageCount,
    /// Where its first page is, ascending; the run continues from each of them.
    pub sites: Vec<Site>,
}

/// The mappings of a set of roots with their layouts.
#[derive(Debug)]
pub struct ShareMap {
    pub(crate) page: PageSize,
    pub(crate) domains: Vec<DomainId>,
    pub(crate) layouts: Vec<Arc<Layout>>,
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) partial: Vec<Box<[(PageIndex, PageCount)]>>,
}

impl ShareMap {
    /// An empty map of `domains.len()` roots; `domains[i]` is the domain of root `i`. `layouts` may be shared with
    /// other threads' tables; mappings refer to them by position.
    #[must_use]
    pub fn new(page: PageSize, domains: Vec<DomainId>, layouts: Vec<Arc<Layout>>) -> Self {
        ShareMap { page, domains, layouts, mappings: Vec::new(), partial: Vec::new() }
    }

    /// Adds a mapping; its id is the number of mappings before it.
    ///
    /// # Panics
    /// When the root or the layout is not of this map, or there are 2^32 mappings already.
    pub fn push(&mut self, root: RootId, layout: LayoutId, cached: Cached) -> MappingId {
        assert!((root.0 as usize) < self.domains.len(), "root {root} is not of this map");
        assert!((layout.0 as usize) < self.layouts.len(), "layout {layout:?} is not of this map");
        let id = u32::try_from(self.mappings.len()).expect("fewer than 2^32 mappings");
        self.mappings.push(Mapping { root, layout, cached });
        MappingId(id)
    }

    /// Stores which pages of a partly cached mapping are cached; ascending and disjoint.
    pub fn push_partial(&mut self, runs: Box<[(PageIndex, PageCount)]>) -> Cached {
        let at = u32::try_from(self.partial.len()).expect("fewer than 2^32 partly cached mappings");
        self.partial.push(runs);
        Cached::Partial(at)
    }

    /// Room for `mappings` more mappings.
    pub fn reserve(&mut self, mappings: usize) {
        self.mappings.reserve_exact(mappings);
    }

    /// Page size of the host.
    #[must_use]
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// The mapping `id`.
    #[must_use]
    pub fn mapping(&self, id: MappingId) -> Mapping {
        self.mappings[id.0 as usize]
    }

    /// All mappings with their ids, in order.
    pub fn mappings(&self) -> impl Iterator<Item = (MappingId, Mapping)> + '_ {
        self.mappings.iter().enumerate().map(|(at, m)| (MappingId(at as u32), *m))
    }

    /// The layout `id`.
    #[must_use]
    pub fn layout(&self, id: LayoutId) -> &Layout {
        &self.layouts[id.0 as usize]
    }

    /// The domain of `root`.
    #[must_use]
    pub fn domain_of(&self, root: RootId) -> DomainId {
        self.domains[root.0 as usize]
    }

    /// Cached pages of a mapping's `pages` pages, as (start, length).
    pub(crate) fn cached_runs(&self, mapping: &Mapping) -> CachedRuns<'_> {
        match mapping.cached {
            Cached::None | Cached::Unknown => CachedRuns::None,
            Cached::All => CachedRuns::All,
            Cached::Partial(at) => CachedRuns::Some(&self.partial[at as usize]),
        }
    }

    /// The distinct domains, ascending.
    #[must_use]
    pub fn domains(&self) -> Vec<DomainId> {
        let mut all = self.domains.clone();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// See [`ShareMap::cached_runs`].
pub(crate) enum CachedRuns<'a> {
    None,
    All,
    Some(&'a [(PageIndex, PageCount)]),
}

/// Sort key of a decided identity: pages with equal (space, at) are equal, a run counts `at` up.
///
/// Tails live in a space of their own, one number per (page, valid length), so that a tail equals only a tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub space: u32,
    pub at: u64,
}

impl Key {
    /// `None` for what is never equal to anything: zeros and undecided pages.
    pub(crate) fn of(identity: Identity, page: PageSize) -> Option<Key> {
        let number = |space: AddressSpace| {
            u32::from(space.fs.0) << 2 | u32::from(space.class == DeviceClass::Realtime) << 1
        };
        match identity {
            Identity::Physical { space, page } => Some(Key { space: number(space), at: page }),
            Identity::Tail { space, page: at, valid } => {
                Some(Key { space: number(space) | 1, at: at << page.shift() | u64::from(valid) })
            }
            Identity::Content { id } => Some(Key { space: u32::MAX, at: id }),
            Identity::Zero | Identity::Undecided(_) => None,
        }
    }
}
