//! What equal pages cost and what merging would give back.
//!
//! Three kinds of figure, kept apart (design section 11): what *could* be saved if everything were read
//! (`mergeable_*`), what *is cached* now (`resident`), and of that what is there twice (`resident_duplicate`).
//! Nothing here claims a saving that was made.

use std::collections::BTreeMap;

use crate::identity::Identity;
use crate::share_map::{Cached, CachedRuns, LayoutId, ShareMap, SharedSpan};
use crate::sweep::{Holders, Segment, Shower, for_overlaps, sweep};
use crate::units::{DomainId, MappingId, PageCount, PageIndex, RootId, Site};

/// The figures of a root or of everything; pages, except where the name says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Mappings (regular files), each inode once.
    pub files: u64,
    /// Sum of sizes in bytes.
    pub logical_bytes: u64,
    /// Cache if every file were read, without Zero pages.
    pub cache: PageCount,
    /// Of `cache`, what goes when equal whole files keep one copy.
    pub mergeable_file: PageCount,
    /// Of `cache`, what goes when equal pages keep one copy; at least `mergeable_file`.
    pub mergeable_page: PageCount,
    /// Holes and unwritten pages.
    pub zero: PageCount,
    /// Of `cache`, what extents could not decide.
    pub undecided: PageCount,
    /// Cached now, holes that were read included.
    pub resident: PageCount,
    /// Of `resident`, copies beyond the first of equal decided pages that are not Zero.
    pub resident_duplicate: PageCount,
    /// Files whose cache this user may not see.
    pub resident_unknown_files: u64,
}

/// Figures of one root, as if it were scanned alone, and what it has in common with others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootFigures {
    /// Within the root.
    pub own: Figures,
    /// Distinct pages that at least one other root of the domain shows too.
    pub shared_with_others: PageCount,
}

/// Equal whole files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileGroup {
    /// Their layout.
    pub layout: LayoutId,
    /// Their domain.
    pub domain: DomainId,
    /// The files, ascending by (root, id); at least two.
    pub members: Vec<MappingId>,
    /// Cache of one of them, without Zero pages.
    pub cache_each: PageCount,
    /// Cached copies beyond the first, page by page.
    pub resident_duplicate: PageCount,
}

impl FileGroup {
    /// What goes when one copy stays.
    #[must_use]
    pub fn mergeable(&self) -> PageCount {
        PageCount((self.members.len() as u64 - 1) * self.cache_each.0)
    }
}

/// Everything a scan reports, in pages.
#[derive(Clone, Debug, Default)]
pub struct Savings {
    /// Over all roots; nothing crosses a domain.
    pub total: Figures,
    /// One a root.
    pub roots: Vec<RootFigures>,
    /// `matrix[i][j]`: distinct pages that both roots show; on the diagonal what root i costs with each page once.
    /// Empty unless asked for.
    pub matrix: Vec<Vec<PageCount>>,
}

impl ShareMap {
    /// Computes all figures; the matrix only if `with_matrix` (roots squared in size).
    #[must_use]
    pub fn savings(&self, with_matrix: bool) -> Savings {
        let holders = self.holders();
        let mut savings =
            Savings { roots: vec![RootFigures::default(); self.domains.len()], ..Savings::default() };
        for holder in &holders {
            self.count_files(holder, &mut savings);
        }
        let mut sets = RootSets::default();
        for domain in holders.chunk_by(|a, b| a.domain == b.domain) {
            let mut counter = PageCounter::new(self.domains.len());
            sweep(self, domain, true, |segment| {
                counter.count(&segment, domain);
                counter.add_to(&mut savings, segment.pages.0);
                if with_matrix {
                    sets.add(&counter.roots, segment.pages.0);
                }
            });
        }
        if with_matrix {
            savings.matrix = sets.matrix(&savings.roots);
        }
        savings
    }

    /// Figures that need no comparing of pages, and whole-file savings.
    fn count_files(&self, holder: &Holders, savings: &mut Savings) {
        let layout = self.layout(holder.layout);
        let cache = layout.cache_pages().0;
        let pages = self.page.pages_covering(layout.size).0;
        let (zero, undecided) = (layout.zero_pages().0, layout.undecided_pages().0);
        let group = undecided == 0;
        let each = |figures: &mut Figures, copies: u64| {
            figures.files += copies;
            // Sparse files may be 8 EiB each: two of them overflow the sum.
            figures.logical_bytes = figures.logical_bytes.saturating_add(layout.size.saturating_mul(copies));
            figures.cache.0 = figures.cache.0.saturating_add(cache.saturating_mul(copies));
            figures.zero.0 = figures.zero.0.saturating_add(zero.saturating_mul(copies));
            figures.undecided.0 = figures.undecided.0.saturating_add(undecided.saturating_mul(copies));
            if group {
                let gone = cache.saturating_mul(copies - 1);
                figures.mergeable_file.0 = figures.mergeable_file.0.saturating_add(gone);
            }
        };
        each(&mut savings.total, holder.copies());
        for weight in &holder.weights {
            each(&mut savings.roots[weight.root.0 as usize].own, u64::from(weight.copies));
        }
        for id in &holder.mappings {
            let mapping = self.mapping(*id);
            let resident = match self.cached_runs(&mapping) {
                CachedRuns::None => 0,
                CachedRuns::All => pages,
                CachedRuns::Some(runs) => runs.iter().map(|r| r.1.0).sum(),
            };
            let unknown = u64::from(mapping.cached == Cached::Unknown);
            for figures in [&mut savings.total, &mut savings.roots[mapping.root.0 as usize].own] {
                figures.resident.0 += resident;
                figures.resident_unknown_files += unknown;
            }
        }
    }

    /// The groups of equal whole files with the most to save, best first; at most `most`, ties by layout.
    #[must_use]
    pub fn top_files(&self, most: usize) -> Vec<FileGroup> {
        let mut groups = self.file_groups();
        groups.sort_by_key(|g| (std::cmp::Reverse(g.mergeable()), g.members[0]));
        groups.truncate(most);
        for group in &mut groups {
            group.resident_duplicate = self.resident_duplicate_of(group);
        }
        groups
    }

    /// All groups of at least two equal whole files that have something to save; `resident_duplicate` is left 0.
    #[must_use]
    pub fn file_groups(&self) -> Vec<FileGroup> {
        self.holders()
            .into_iter()
            .filter(|h| h.mappings.len() > 1 && self.layout(h.layout).is_decided())
            .map(|h| FileGroup {
                layout: h.layout,
                domain: h.domain,
                cache_each: self.layout(h.layout).cache_pages(),
                members: h.mappings,
                resident_duplicate: PageCount(0),
            })
            .filter(|g| g.cache_each.0 > 0)
            .collect()
    }

    /// Cached copies beyond the first, page by page, of a group of [`Self::file_groups`].
    #[must_use]
    pub fn resident_duplicate_of(&self, group: &FileGroup) -> PageCount {
        let layout = self.layout(group.layout);
        // Depth of cached copies over the file's pages: +1 where a cached run begins, -1 where it ends.
        let mut steps: BTreeMap<u64, i64> = BTreeMap::new();
        let mut whole = 0i64;
        for id in &group.members {
            match self.cached_runs(&self.mapping(*id)) {
                CachedRuns::None => {}
                CachedRuns::All => whole += 1,
                CachedRuns::Some(runs) => for_overlaps(layout, runs, |identity, pages, start| {
                    if identity != Identity::Zero {
                        *steps.entry(start.0).or_default() += 1;
                        *steps.entry(start.0 + pages).or_default() -= 1;
                    }
                }),
            }
        }
        let mut duplicate = (whole - 1).max(0) * group.cache_each.0 as i64;
        let (mut depth, mut from) = (0i64, 0u64);
        for (at, step) in steps {
            let extra = (whole + depth - 1).max(0) - (whole - 1).max(0);
            duplicate += extra * (at - from) as i64;
            depth += step;
            from = at;
        }
        PageCount(duplicate as u64)
    }

    /// Every run of pages that at least two sites show, in order of domain and identity (W-011).
    pub fn for_each_shared(&self, mut tell: impl FnMut(DomainId, SharedSpan)) {
        let holders = self.holders();
        for domain in holders.chunk_by(|a, b| a.domain == b.domain) {
            sweep(self, domain, false, |segment| {
                let mut sites = Vec::new();
                for (shower, skip) in segment.showers {
                    if let Shower::Holders { at, start } = shower {
                        let offset = PageIndex(start.0 + skip);
                        let members = domain[*at as usize].mappings.iter();
                        sites.extend(members.map(|m| Site { mapping: *m, offset }));
                    }
                }
                if sites.len() > 1 {
                    sites.sort_unstable();
                    let span = SharedSpan { identity: segment.identity, pages: segment.pages, sites };
                    tell(domain[0].domain, span);
                }
            });
        }
    }
}

/// Copies of one segment's pages, in all and by root.
struct PageCounter {
    copies: u64,
    cached: u64,
    by_root: Vec<(u64, u64)>,
    /// The roots that show the segment, ascending.
    roots: Vec<RootId>,
}

impl PageCounter {
    fn new(roots: usize) -> Self {
        PageCounter { copies: 0, cached: 0, by_root: vec![(0, 0); roots], roots: Vec::new() }
    }

    fn count(&mut self, segment: &Segment<'_>, holders: &[Holders]) {
        for root in self.roots.drain(..) {
            self.by_root[root.0 as usize] = (0, 0);
        }
        (self.copies, self.cached) = (0, 0);
        for (shower, _) in segment.showers {
            match *shower {
                Shower::Holders { at, .. } => {
                    for weight in &holders[at as usize].weights {
                        self.add(weight.root, u64::from(weight.copies), u64::from(weight.cached));
                    }
                }
                Shower::CachedPart { root } => self.add(root, 0, 1),
            }
        }
        self.roots.sort_unstable();
    }

    fn add(&mut self, root: RootId, copies: u64, cached: u64) {
        self.copies += copies;
        self.cached += cached;
        let slot = &mut self.by_root[root.0 as usize];
        if *slot == (0, 0) {
            self.roots.push(root);
        }
        slot.0 += copies;
        slot.1 += cached;
    }

    fn add_to(&self, savings: &mut Savings, pages: u64) {
        let extra = |n: u64| n.saturating_sub(1) * pages;
        savings.total.mergeable_page.0 += extra(self.copies);
        savings.total.resident_duplicate.0 += extra(self.cached);
        let shared = self.roots.len() > 1;
        for root in &self.roots {
            let (copies, cached) = self.by_root[root.0 as usize];
            let figures = &mut savings.roots[root.0 as usize];
            figures.own.mergeable_page.0 += extra(copies);
            figures.own.resident_duplicate.0 += extra(cached);
            if shared {
                figures.shared_with_others.0 += pages;
            }
        }
    }
}

/// Pages by the set of roots that show them. Sets recur (all clones; all but one; ...), so pairs are expanded once a
/// set and not once a segment.
#[derive(Default)]
struct RootSets {
    pages: BTreeMap<Vec<RootId>, u64>,
}

impl RootSets {
    fn add(&mut self, roots: &[RootId], pages: u64) {
        if roots.len() < 2 {
            return;
        }
        match self.pages.get_mut(roots) {
            Some(sum) => *sum += pages,
            None => {
                self.pages.insert(roots.to_vec(), pages);
            }
        }
    }

    fn matrix(&self, roots: &[RootFigures]) -> Vec<Vec<PageCount>> {
        let mut matrix = vec![vec![PageCount(0); roots.len()]; roots.len()];
        for (set, pages) in &self.pages {
            for (at, i) in set.iter().enumerate() {
                for j in &set[at + 1..] {
                    matrix[i.0 as usize][j.0 as usize].0 += pages;
                    matrix[j.0 as usize][i.0 as usize].0 += pages;
                }
            }
        }
        for (at, root) in roots.iter().enumerate() {
            matrix[at][at].0 = root.own.cache.0.saturating_sub(root.own.mergeable_page.0);
        }
        matrix
    }
}
