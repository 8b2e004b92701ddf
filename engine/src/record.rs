//! What is known of every site, and who shows each shared page.
//!
//! Invariants:
//! * a site has at most one record; a run of pages in one state with consecutive shared pages is one
//!   entry, so that ten million merged pages need not cost ten million nodes, while every operation is
//!   exact to the page;
//! * gauges move here and nowhere else, when a site enters or leaves a state (K-011);
//! * per-site state (offset, private) is reached by (shared page, mapping), never by the shared page
//!   alone (W-012).
//!
//! What it deliberately does not do: call the host or touch the indexes. Whoever makes a site leave gets
//! told what it was and which shared pages lost their last site.

use std::collections::BTreeMap;

use crate::counters::{Counters, shift};
use crate::domain::{Backend, Owner, make_span};
use crate::host::{NodeId, Private, SharedPage, SharedSpan};
use crate::policy::History;
use crate::runs::{Piece, RunMap, RunValue};
use crate::stable::Key;
use crate::units::{DomainId, MappingId, PageCount, Site, Span};
use crate::unstable::Pass;

/// The state of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SiteState {
    /// Looked at, in neither index (K-024).
    Volatile,
    /// In the unstable index of pass `pass`, or left over from it.
    Unstable { node: NodeId, key: Key, pass: Pass },
    /// Shows a shared page; protected.
    Shared { page: SharedPage, private: Private },
    /// Shows the zero page; protected.
    Zero { private: Private },
    /// Shows a shared page that no index names, after a break that failed; protected. Counted as volatile. Kept apart
    /// from it since the kernel may copy for a store before the next try: then the protection must still be lifted.
    Stray,
}

impl SiteState {
    /// Whether the site shows something that is not its own.
    pub fn is_merged(self) -> bool {
        matches!(self, SiteState::Shared { .. } | SiteState::Zero { .. } | SiteState::Stray)
    }
}

/// One run of sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SiteRecord {
    pub state: SiteState,
    /// Default for merged sites and for those judged by place; else of one page.
    pub history: History,
}

impl SiteRecord {
    pub fn new(state: SiteState) -> Self {
        SiteRecord { state, history: History::default() }
    }
}

impl RunValue for SiteRecord {
    fn advance(self, by: u64) -> Self {
        assert!(by == 0 || self.history == History::default(), "a page's history is stretched over a run");
        let state = match self.state {
            SiteState::Unstable { node, key, pass } => {
                SiteState::Unstable { node, key: key.advance(by), pass }
            }
            SiteState::Shared { page, private } => SiteState::Shared { page: page.advance(by), private },
            other => other,
        };
        SiteRecord { state, ..self }
    }

    fn joins(self, pages: u64, next: Self) -> bool {
        let plain = self.history == History::default() && next.history == History::default();
        plain
            && match (self.state, next.state) {
                (
                    SiteState::Unstable { node, key, pass },
                    SiteState::Unstable { node: n, key: k, pass: p },
                ) => (node, pass) == (n, p) && key.joins(pages, k),
                _ => self.advance(pages).state == next.state,
            }
    }
}

/// Who shows a run of shared pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharers {
    pub domain: DomainId,
    by_backend: [u32; Backend::COUNT],
}

impl Sharers {
    /// Sites that show each of the pages.
    pub fn sites(self) -> u64 {
        self.by_backend.iter().map(|n| u64::from(*n)).sum()
    }

    /// (shared, sharing) of each page as booked to `backend`: the first backend with a site has the page,
    /// K-013's promotion is that the next one takes it over.
    fn booked(self, backend: Backend) -> (i64, i64) {
        let first = self.by_backend.iter().position(|n| *n > 0) == Some(backend as usize);
        (i64::from(first), i64::from(self.by_backend[backend as usize]) - i64::from(first))
    }
}

impl RunValue for Sharers {
    fn advance(self, _by: u64) -> Self {
        self
    }
}

/// Reverse entries are cut at multiples of this many shared pages, so that a look-up needs to look back
/// no further.
const CHUNK: u64 = 512;

/// Ordered so that the pieces of one run of sites, which have one `diagonal`, stand beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct HolderKey {
    chunk: u64,
    mapping: MappingId,
    /// Offset minus shared page, wrapping.
    diagonal: u64,
    page: SharedPage,
}

impl HolderKey {
    fn site(self, pages: u64) -> Span {
        make_span(self.mapping, self.page.0.wrapping_add(self.diagonal), pages)
    }
}

/// One run of sites found by the shared pages they show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub site: Span,
    pub page: SharedPage,
}

/// What [`Records::leave`] took out.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// The records, ascending.
    pub pieces: Vec<Piece<SiteRecord>>,
    /// Shared pages that no recorded site shows any more.
    pub orphans: Vec<SharedSpan>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Records {
    sites: RunMap<MappingId, SiteRecord>,
    holders: BTreeMap<HolderKey, u64>,
    sharers: RunMap<(), Sharers>,
    pub counters: Counters,
}

impl Records {
    /// The record of one page and for how many pages it goes on.
    pub fn get(&self, site: Site) -> Option<(SiteRecord, u64)> {
        self.sites.get(site.mapping, site.offset.0)
    }

    /// The record (or none) at the start of `span` and for how many of its pages that goes on.
    pub fn segment(&self, span: Span) -> (Option<SiteRecord>, u64) {
        self.sites.segment(span.mapping, span.start.0, span.pages.0)
    }

    /// The records inside `span`, ascending.
    pub fn pieces(&self, span: Span) -> Vec<(Span, SiteRecord)> {
        let pieces = self.sites.pieces(span.mapping, span.start.0, span.pages.0);
        pieces.map(|p| (make_span(span.mapping, p.start, p.pages), p.value)).collect()
    }

    /// Whether a mapping has any record.
    pub fn any(&self, mapping: MappingId) -> bool {
        self.sites.pieces(mapping, 0, u64::MAX).next().is_some()
    }

    /// Enters sites that have no record.
    pub fn enter(&mut self, owner: Owner, span: Span, record: SiteRecord) {
        self.sites.put(span.mapping, span.start.0, span.pages.0, record);
        self.book(owner, span, record, 1);
    }

    /// Takes all records inside `span` out.
    pub fn leave(&mut self, owner: Owner, span: Span) -> Left {
        let pieces = self.sites.cut(span.mapping, span.start.0, span.pages.0);
        let mut orphans = Vec::new();
        for piece in &pieces {
            let part = make_span(span.mapping, piece.start, piece.pages);
            orphans.extend(self.book(owner, part, piece.value, -1));
        }
        Left { pieces, orphans }
    }

    /// Moves gauges, holders and sharers for a run that enters (1) or leaves (-1); returns new orphans.
    fn book(&mut self, owner: Owner, span: Span, record: SiteRecord, sign: i64) -> Vec<SharedSpan> {
        let pages = span.pages.0.cast_signed() * sign;
        let gauges = self.counters.gauges(owner);
        shift(&mut gauges.sites, pages);
        match record.state {
            SiteState::Volatile | SiteState::Stray => shift(&mut gauges.rest, pages),
            SiteState::Unstable { .. } => shift(&mut gauges.pages_unshared, pages),
            SiteState::Zero { .. } => shift(&mut gauges.zero_pages, pages),
            SiteState::Shared { page, .. } => {
                self.book_holder(span, page, sign);
                return self.book_sharers(owner, SharedSpan { start: page, pages: span.pages }, sign);
            }
        }
        Vec::new()
    }

    /// Enters or removes the reverse entries of one run, chunk by chunk.
    fn book_holder(&mut self, span: Span, page: SharedPage, sign: i64) {
        let diagonal = span.start.0.wrapping_sub(page.0);
        let (mut at, end) = (page.0, page.0 + span.pages.0);
        while at < end {
            let chunk = at / CHUNK;
            let len = ((chunk + 1) * CHUNK).min(end) - at;
            let key = HolderKey { chunk, mapping: span.mapping, diagonal, page: SharedPage(at) };
            if sign > 0 {
                self.enter_holder(key, len);
            } else {
                self.leave_holder(key, len);
            }
            at += len;
        }
    }

    fn enter_holder(&mut self, key: HolderKey, len: u64) {
        let (mut first, mut pages) = (key, len);
        if let Some((before, n)) = self.holder_at_or_before(key) {
            let end = before.page.0 + n;
            assert!(end <= key.page.0, "two holders at {key:?}");
            if end == key.page.0 {
                (first, pages) = (before, n + len);
            }
        }
        let next = HolderKey { page: key.page.plus(PageCount(len)), ..key };
        if let Some(n) = self.holders.remove(&next) {
            pages += n;
        }
        self.holders.insert(first, pages);
    }

    fn leave_holder(&mut self, key: HolderKey, len: u64) {
        let (found, n) = self.holder_at_or_before(key).expect("a recorded site has a holder entry");
        let (from, to, end) = (key.page.0, key.page.0 + len, found.page.0 + n);
        assert!(to <= end, "a recorded site has no holder entry: {key:?}");
        self.holders.remove(&found);
        if found.page.0 < from {
            self.holders.insert(found, from - found.page.0);
        }
        if to < end {
            self.holders.insert(HolderKey { page: SharedPage(to), ..key }, end - to);
        }
    }

    /// The last entry of the same run of sites and chunk that starts at or before `key`.
    fn holder_at_or_before(&self, key: HolderKey) -> Option<(HolderKey, u64)> {
        let (found, n) = self.holders.range(..=key).next_back()?;
        let same = (found.chunk, found.mapping, found.diagonal) == (key.chunk, key.mapping, key.diagonal);
        same.then_some((*found, *n))
    }

    fn book_sharers(&mut self, owner: Owner, shared: SharedSpan, sign: i64) -> Vec<SharedSpan> {
        let mut orphans = Vec::new();
        let (mut at, end) = (shared.start.0, shared.end().0);
        while at < end {
            let (old, len) = self.sharers.segment((), at, end - at);
            let old = old.unwrap_or(Sharers { domain: owner.domain, by_backend: [0; Backend::COUNT] });
            assert_eq!(old.domain, owner.domain, "a shared page would be shown in two domains");
            let mut new = old;
            let slot = &mut new.by_backend[owner.backend as usize];
            *slot =
                slot.checked_add_signed(sign as i32).expect("more sites left a shared page than showed it");
            self.sharers.cut((), at, len);
            if new.sites() > 0 {
                self.sharers.put((), at, len, new);
            } else {
                orphans.push(SharedSpan { start: SharedPage(at), pages: PageCount(len) });
            }
            for backend in Backend::ALL {
                let ((was, were), (is, are)) = (old.booked(backend), new.booked(backend));
                if (was, were) != (is, are) {
                    let gauges = self.counters.gauges(Owner { backend, ..owner });
                    shift(&mut gauges.pages_shared, (is - was) * len.cast_signed());
                    shift(&mut gauges.pages_sharing, (are - were) * len.cast_signed());
                }
            }
            at += len;
        }
        orphans
    }

    /// Who shows the page at the start of `shared`, and for how many of its pages that goes on.
    pub fn sharers(&self, shared: SharedSpan) -> (Option<Sharers>, u64) {
        self.sharers.segment((), shared.start.0, shared.pages.0)
    }

    /// All recorded sites that show any of these pages, or those of one mapping only (W-011, W-012).
    pub fn holders(&self, shared: SharedSpan, only: Option<MappingId>) -> Vec<Holder> {
        let mut out = Vec::new();
        if shared.pages.0 == 0 {
            return out;
        }
        for chunk in shared.start.0 / CHUNK..=(shared.end().0 - 1) / CHUNK {
            let low = only.unwrap_or(MappingId(0));
            let high = only.unwrap_or(MappingId(u32::MAX));
            let low = HolderKey { chunk, mapping: low, diagonal: 0, page: SharedPage(0) };
            let high = HolderKey { chunk, mapping: high, diagonal: u64::MAX, page: SharedPage(u64::MAX) };
            for (k, n) in self.holders.range(low..=high) {
                let from = k.page.max(shared.start);
                let to = k.page.plus(PageCount(*n)).min(shared.end());
                if from < to {
                    let site = HolderKey { page: from, ..*k }.site(to.0 - from.0);
                    out.push(Holder { site, page: from });
                }
            }
        }
        out
    }

    /// Entries, for the account of our own memory.
    pub fn entries(&self) -> usize {
        self.sites.entries() + self.holders.len() + self.sharers.entries()
    }

    /// Counts everything again and compares: gauges, holders, sharers. For tests; costs a walk over all
    /// records.
    ///
    /// # Panics
    /// When anything differs.
    pub fn audit(&self, owner: impl Fn(MappingId) -> Owner) {
        let mut again = Records::default();
        for (mapping, piece) in self.sites.all() {
            again.enter(owner(mapping), make_span(mapping, piece.start, piece.pages), piece.value);
        }
        let accounts = |r: &Records| -> Vec<_> {
            let all = r.counters.accounts().map(|(o, a)| (o, a.gauges));
            all.filter(|(_, g)| !g.is_zero()).collect()
        };
        assert_eq!(accounts(self), accounts(&again), "gauges differ from the records");
        assert!(self.sharers.all().eq(again.sharers.all()), "sharers differ from the records");
        let pages: u64 = self.holders.values().sum();
        assert_eq!(pages, again.holders.values().sum::<u64>(), "holder entries differ from the records");
        for (mapping, piece) in self.sites.all() {
            if let SiteState::Shared { page, .. } = piece.value.state {
                let shared = SharedSpan { start: page, pages: PageCount(piece.pages) };
                let site =
                    |h: &Holder| h.site.start.0.wrapping_sub(h.page.0) == piece.start.wrapping_sub(page.0);
                let found = self.holders(shared, Some(mapping));
                let found: u64 = found.iter().filter(|h| site(h)).map(|h| h.site.pages.0).sum();
                assert!(found >= piece.pages, "a site is missing among the holders");
            }
        }
        self.counters.assert_identity();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageIndex;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn owner(mapping: MappingId) -> Owner {
        let backend = if mapping.0.is_multiple_of(2) { Backend::Remap } else { Backend::Arena };
        Owner { domain: DomainId(0), backend }
    }

    fn at(mapping: u32, start: u64, pages: u64) -> Span {
        make_span(MappingId(mapping), start, pages)
    }

    fn shared(page: u64, private: u64) -> SiteRecord {
        SiteRecord::new(SiteState::Shared { page: SharedPage(page), private: Private(private) })
    }

    fn pages(start: u64, pages: u64) -> SharedSpan {
        SharedSpan { start: SharedPage(start), pages: PageCount(pages) }
    }

    #[test]
    fn ten_million_merged_pages_are_few_entries() {
        let mut records = Records::default();
        for mapping in 0..2 {
            for part in 0..100 {
                let span = at(mapping, part * 100_000, 100_000);
                records.enter(owner(span.mapping), span, shared(part * 100_000, 0));
            }
        }
        let g = records.counters.total().gauges;
        assert_eq!((g.pages_shared, g.pages_sharing), (10_000_000, 10_000_000));
        // One run a mapping, one run of sharers, and a holder entry per mapping for every 512 pages.
        assert!(records.entries() <= 3 + 2 * (10_000_000 / 512 + 1), "{}", records.entries());
        let site = Site { mapping: MappingId(1), offset: PageIndex(7_654_321) };
        assert_eq!(records.get(site).map(|(r, _)| r), Some(shared(7_654_321, 0)));
        let found = records.holders(pages(7_654_321, 1), Some(MappingId(0)));
        assert_eq!(found, [Holder { site: at(0, 7_654_321, 1), page: SharedPage(7_654_321) }]);
    }

    #[test]
    fn the_last_site_that_leaves_makes_an_orphan_k013_k014() {
        let mut records = Records::default();
        records.enter(owner(MappingId(1)), at(1, 0, 8), shared(100, 1));
        records.enter(owner(MappingId(2)), at(2, 50, 8), shared(100, 2));
        assert_eq!(records.leave(owner(MappingId(2)), at(2, 52, 2)).orphans, []);
        assert_eq!(records.leave(owner(MappingId(1)), at(1, 0, 8)).orphans, [pages(102, 2)]);
        let g = records.counters.total().gauges;
        assert_eq!((g.sites, g.pages_shared, g.pages_sharing), (6, 6, 0));
        records.audit(owner);
    }

    #[test]
    #[should_panic(expected = "two domains")]
    fn a_second_domain_can_not_show_a_shared_page() {
        let mut records = Records::default();
        records.enter(owner(MappingId(1)), at(1, 0, 1), shared(100, 0));
        let foreign = Owner { domain: DomainId(1), backend: Backend::Arena };
        records.enter(foreign, at(2, 0, 1), shared(100, 0));
    }

    #[derive(Clone, Copy, Debug)]
    struct Put {
        mapping: u32,
        start: u64,
        pages: u64,
        to: Option<u64>,
        private: u64,
    }

    fn put() -> impl Strategy<Value = Put> {
        // Around a chunk bound of the reverse entries, so that runs cross it.
        let to = prop_oneof![1 => Just(None), 3 => (500..530u64).prop_map(Some)];
        (0..3u32, 0..40u64, 1..14u64, to, 0..2u64).prop_map(|(mapping, start, pages, to, private)| Put {
            mapping,
            start,
            pages,
            to,
            private,
        })
    }

    proptest! {
        /// Against one entry a page: records, look-ups by (shared page, mapping), orphans and gauges.
        #[test]
        fn records_are_exact_to_the_page_w011_w012(puts in proptest::collection::vec(put(), 1..25)) {
            let mut records = Records::default();
            let mut model: BTreeMap<(u32, u64), (u64, u64)> = BTreeMap::new();
            for p in puts {
                let span = at(p.mapping, p.start, p.pages);
                let before: BTreeSet<u64> = model.values().map(|v| v.0).collect();
                let left = records.leave(owner(span.mapping), span);
                model.retain(|(m, o), _| *m != p.mapping || *o < p.start || *o >= p.start + p.pages);
                let after: BTreeSet<u64> = model.values().map(|v| v.0).collect();
                let orphans: Vec<u64> =
                    left.orphans.iter().flat_map(|s| s.start.0..s.end().0).collect();
                let expected: Vec<u64> = before.difference(&after).copied().collect();
                prop_assert_eq!(orphans.iter().copied().collect::<BTreeSet<_>>().len(), orphans.len());
                prop_assert!(expected.iter().all(|n| orphans.contains(n)) && orphans.len() == expected.len());
                if let Some(to) = p.to {
                    records.enter(owner(span.mapping), span, shared(to, p.private));
                    model.extend((0..p.pages).map(|n| ((p.mapping, p.start + n), (to + n, p.private))));
                }
                records.audit(owner);
                for mapping in 0..3 {
                    for page in 505..520 {
                        let found = records.holders(pages(page, 1), Some(MappingId(mapping)));
                        let mut found: Vec<u64> = found.iter().map(|h| h.site.start.0).collect();
                        found.sort_unstable();
                        let expected: Vec<u64> = model
                            .iter()
                            .filter(|((m, _), (p, _))| *m == mapping && *p == page)
                            .map(|((_, o), _)| *o)
                            .collect();
                        prop_assert_eq!(found, expected);
                    }
                }
                let distinct = model.values().map(|v| v.0).collect::<BTreeSet<_>>().len() as u64;
                let g = records.counters.total().gauges;
                prop_assert_eq!((g.sites, g.pages_shared), (model.len() as u64, distinct));
                prop_assert_eq!(g.pages_sharing, model.len() as u64 - distinct);
            }
        }
    }
}
