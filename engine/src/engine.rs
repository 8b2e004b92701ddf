//! The merge engine: one scanner, one protocol, for every kind of page.
//!
//! # The two indexes and what each guarantees
//!
//! Pages that are equal are found through two indexes per trust domain. The **stable** index names shared
//! pages: each is immutable, exists now and is shown by at least one recorded site. What is found there
//! will still be true when it is acted on, so a candidate may be joined to it at once. The **unstable**
//! index names candidates of this pass. Nobody keeps them from being written, so what is found there may
//! be wrong by now; it only says who is worth a try. Its upkeep would cost a write fault for every page
//! in it, so instead it is thrown away after every pass, and a page enters it only if its checksum was
//! the same a pass ago (pages found by their place on disk enter at once: equal extents don't become
//! equal by waiting). Both are ordered by key, a place on disk or a digest, and never by bytes: the
//! engine never sees a byte.
//!
//! # The order of steps, and why
//!
//! For each page: look in the stable index, and join what is found there (1). Otherwise, if the page held
//! still since the last pass (2), look in the unstable index: a mate there means that both are protected,
//! a new shared page is made from the mate, and both are merged into it and leave for the stable index
//! (3). Otherwise the page waits in the unstable index for its mate (4). Stable first, or equal pages
//! would found a second shared page beside the first.
//!
//! For each merge: **protect, prove, share.** Comparing before protecting is the tempting order, since
//! most failures would show without any protection to undo; but then a write between the comparison and
//! the protection is lost. Replacing under the same lock as protecting would need no stamp; but comparing
//! takes long, and the writers of a page may be held up only for a moment (P-016), so protection and
//! replacement are two short critical sections and the second one checks that nothing came in between
//! (P-004): if so the merge is off and the page stays a candidate.
//!
//! For each break: the private copy first, then the record goes, then the protection, then (after the
//! last site) the shared page. A failed break keeps its record, and the range its registered mark, until
//! a later try succeeds (K-065, K-066). Only a last sharer leaves the stable index even if its break failed
//! (K-035), so that nobody joins a page that is on its way out; the next pass meets it as a stray.
//!
//! # What it deliberately does not do
//!
//! No I/O, no clock, no thread: the owner calls [`Engine::step`] when the returned
//! [`crate::policy::Action`] says so, and the event methods when something happens. Every method takes
//! `&mut self`, which is the engine lock of requirements 1.14; no method waits for anybody, so an exit
//! never waits for the engine (K-090). The residual of K-116 (an allocation for one mapping in the middle
//! of another's death) is the host's: it must allocate before it locks (K-117).

use std::collections::BTreeMap;

use crate::counters::{Account, Counters, Decision};
use crate::domain::{Owner, RegisterError, Registration, Registry, make_span};
use crate::host::{HostError, MergeHost, NodeId, Private, SharedPage, SharedSpan};
use crate::listener::{Listener, Listeners, widen};
use crate::policy::{Knobs, Run};
use crate::record::{Records, SiteRecord, SiteState};
use crate::runs::Piece;
use crate::stable::StableIndex;
use crate::units::{DomainId, MappingId, PageCount, PageIndex, PageSize, Site, Span};
use crate::unstable::{Pass, UnstableIndex};

/// The indexes of one trust domain.
#[derive(Debug, Default)]
pub(crate) struct Indexes {
    pub stable: StableIndex,
    pub unstable: UnstableIndex,
}

/// Where the scanner is: everything before `at` of `mapping` was visited in this pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    pub mapping: MappingId,
    pub at: PageIndex,
}

/// What the host owes: operations it could not carry out and that are tried again with every step.
#[derive(Debug, Default)]
pub(crate) struct Debts {
    /// Protections to lift; their records are gone.
    pub unprotect: Vec<Span>,
    /// Shared pages to give back.
    pub release: Vec<SharedSpan>,
    /// Writers that still wait for these pages to be broken.
    pub breaks: Vec<Span>,
}

impl Debts {
    pub fn is_empty(&self) -> bool {
        self.unprotect.is_empty() && self.release.is_empty() && self.breaks.is_empty()
    }

    /// Whether a protection of any page of `span` is still to be lifted.
    pub fn holds(&self, span: Span) -> bool {
        self.unprotect.iter().any(|s| overlap(*s, span))
    }

    /// A mapping is gone: its protections went with it.
    pub fn forget(&mut self, mapping: MappingId) {
        self.unprotect.retain(|s| s.mapping != mapping);
        self.breaks.retain(|s| s.mapping != mapping);
    }
}

/// The pages that merging keeps out of memory, and what the engine itself takes for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profit {
    /// Bytes of pages not needed, since others are shown in their place (K-017).
    pub saved_bytes: u64,
    /// Estimate of the engine's own records and indexes, in bytes.
    pub metadata_bytes: u64,
}

impl Profit {
    /// Saved minus own cost, in bytes; negative where merging does not pay.
    #[must_use]
    pub fn net_bytes(self) -> i64 {
        self.saved_bytes.cast_signed() - self.metadata_bytes.cast_signed()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Engine {
    pub(crate) knobs: Knobs,
    pub(crate) run: Run,
    pub(crate) registry: Registry,
    pub(crate) records: Records,
    pub(crate) domains: BTreeMap<DomainId, Indexes>,
    pub(crate) listeners: Listeners,
    pub(crate) debts: Debts,
    /// Number of the current pass, never set back (K-074); `full_scans` is the published count.
    pub(crate) generation: u64,
    /// `None` between passes: the next step begins one.
    pub(crate) cursor: Option<Cursor>,
    /// Errors of the current step.
    pub(crate) errors: Vec<HostError>,
}

impl Engine {
    /// An engine with nobody registered; `run` is 1.
    #[must_use]
    pub fn new(knobs: Knobs) -> Self {
        let mut engine = Engine::default();
        engine.set_knobs(knobs);
        engine
    }

    /// Changes the knobs from the next batch on. `merge_across_nodes` counts only for what is found from
    /// then on.
    pub fn set_knobs(&mut self, knobs: Knobs) {
        self.knobs = Knobs { max_page_sharing: knobs.max_page_sharing.max(2), ..knobs };
    }

    /// The knobs in force.
    #[must_use]
    pub fn knobs(&self) -> Knobs {
        self.knobs
    }

    /// The state of `run`.
    #[must_use]
    pub fn run(&self) -> Run {
        self.run
    }

    /// Adds a listener for all that happens from now on.
    pub fn add_listener(&mut self, listener: Box<dyn Listener>) {
        self.listeners.add(listener);
    }

    /// Marks `span` as one the scanner may merge in (K-128). Works while stopped (K-126); registering
    /// twice is registering once. True when a waiting scanner must be woken (K-044).
    ///
    /// # Errors
    /// [`RegisterError`]: nothing was registered.
    pub fn register(&mut self, reg: Registration, span: Span) -> Result<bool, RegisterError> {
        let was_empty = self.registry.is_empty();
        self.registry.register(reg, span)?;
        let pass = self.pass();
        self.domains.entry(reg.domain).or_insert_with(|| {
            let mut fresh = Indexes::default();
            fresh.unstable.reset(pass);
            fresh
        });
        Ok(was_empty)
    }

    /// All counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.records.counters
    }

    /// Totals over all domains and backends.
    #[must_use]
    pub fn total(&self) -> Account {
        self.records.counters.total()
    }

    /// What merging gains net of the engine's own memory.
    #[must_use]
    pub fn profit(&self, page: PageSize) -> Profit {
        let indexes: usize = self.domains.values().map(|d| d.stable.entries() + d.unstable.entries()).sum();
        let entries = self.records.entries() + indexes + self.registry.entries();
        Profit {
            saved_bytes: self.total().gauges.saved_pages().bytes(page),
            metadata_bytes: (entries * ENTRY_BYTES) as u64,
        }
    }

    /// The private state of a site that shows a shared page; looked up by (shared page, mapping), never
    /// by the page alone (W-012). A mapping may show one page at several offsets: ascending by offset.
    #[must_use]
    pub fn sites_of(&self, page: SharedPage, mapping: MappingId) -> Vec<(PageIndex, Private)> {
        let one = SharedSpan { start: page, pages: PageCount(1) };
        let holders = self.records.holders(one, Some(mapping));
        let mut sites: Vec<_> =
            holders.iter().map(|h| (h.site.start, self.private_of(h.site.start, mapping))).collect();
        sites.sort_unstable();
        sites
    }

    fn private_of(&self, offset: PageIndex, mapping: MappingId) -> Private {
        match self.records.get(Site { mapping, offset }) {
            Some((SiteRecord { state: SiteState::Shared { private, .. }, .. }, _)) => private,
            other => panic!("a holder entry without its record: {other:?}"),
        }
    }

    /// The shared page a site is recorded to show.
    #[must_use]
    pub fn shared_at(&self, site: Site) -> Option<SharedPage> {
        match self.records.get(site)?.0.state {
            SiteState::Shared { page, .. } => Some(page),
            _ => None,
        }
    }

    /// Counts every record again and compares with all gauges and indexes. For tests: it walks everything.
    ///
    /// # Panics
    /// When anything differs.
    pub fn audit(&self) {
        self.records.audit(|m| self.registry.owner(m));
        let stable: u64 = self.domains.values().map(|d| d.stable.pages()).sum();
        assert_eq!(stable, self.total().gauges.pages_shared, "stable index and pages_shared differ (K-001)");
    }

    pub(crate) fn pass(&self) -> Pass {
        Pass::of(self.generation)
    }

    /// The node under which pages are filed (M-017).
    pub(crate) fn shelf(&self, node: NodeId) -> NodeId {
        if self.knobs.merge_across_nodes { NodeId(0) } else { node }
    }

    pub(crate) fn indexes(&mut self, domain: DomainId) -> &mut Indexes {
        self.domains.get_mut(&domain).expect("a registered mapping's domain has indexes")
    }

    pub(crate) fn owner(&self, span: Span) -> Owner {
        self.registry.owner(span.mapping)
    }

    pub(crate) fn count(&mut self, span: Span, decision: Decision, pages: u64) {
        let owner = self.owner(span);
        self.records.counters.count(owner, decision, PageCount(pages));
    }

    pub(crate) fn fail(&mut self, span: Span, error: HostError) {
        self.count(span, Decision::HostError, span.pages.0);
        self.errors.push(error);
    }

    /// Takes the records inside `span` out of everything: unstable index, stable index, gauges. This is
    /// the one place where a site leaves (K-082, K-011..K-014); shared pages without a site are owed to
    /// the host from here on.
    pub(crate) fn forget(&mut self, span: Span) -> Vec<Piece<SiteRecord>> {
        if self.records.pieces(span).is_empty() {
            return Vec::new();
        }
        let owner = self.owner(span);
        let (now, left) = (self.pass(), self.records.leave(owner, span));
        let indexes = self.indexes(owner.domain);
        for piece in &left.pieces {
            if let SiteState::Unstable { node, key, pass } = piece.value.state
                && pass.age(now) == 0
            {
                let site = Site { mapping: span.mapping, offset: PageIndex(piece.start) };
                indexes.unstable.erase(now, node, key, PageCount(piece.pages), site);
            }
        }
        for orphan in &left.orphans {
            indexes.stable.remove(*orphan);
        }
        self.debts.release.extend(left.orphans);
        left.pieces
    }

    /// Replaces whatever is recorded of `span`.
    pub(crate) fn set(&mut self, span: Span, record: SiteRecord) {
        self.forget(span);
        let owner = self.owner(span);
        self.records.enter(owner, span, record);
    }

    /// Gives every page of `span` that has no record a volatile one (K-021).
    pub(crate) fn notice(&mut self, span: Span) {
        let (owner, mut at) = (self.owner(span), 0);
        while at < span.pages.0 {
            let rest = make_span(span.mapping, span.start.0 + at, span.pages.0 - at);
            let (record, len) = self.records.segment(rest);
            if record.is_none() {
                let gap = Span { pages: PageCount(len), ..rest };
                self.records.enter(owner, gap, SiteRecord::new(SiteState::Volatile));
            }
            at += len;
        }
    }

    /// `span` as listeners are to be told of it.
    pub(crate) fn widened(&self, host: &dyn MergeHost, span: Span) -> Span {
        let range = self.registry.range_around(span.mapping, span.start).filter(|r| r.end() >= span.end());
        widen(span, host.shareable_unit(span.mapping), range.unwrap_or(span))
    }

    /// Lifts a protection whose records are gone, now or with a later step.
    pub(crate) fn lift(&mut self, host: &mut dyn MergeHost, span: Span) {
        debug_assert!(self.records.pieces(span).iter().all(|(_, r)| !r.state.is_merged()));
        if let Err(error) = host.unprotect(span) {
            self.fail(span, error);
            self.debts.unprotect.push(span);
        }
    }

    /// Pays what is owed: releases and protections. Called at the end of every public method that may owe.
    pub(crate) fn settle(&mut self, host: &mut dyn MergeHost) {
        for shared in std::mem::take(&mut self.debts.release) {
            if let Err(error) = host.release(shared) {
                self.errors.push(error);
                self.debts.release.push(shared);
            }
        }
        self.records.counters.assert_identity();
    }

    /// Tries the protections again that could not be lifted.
    pub(crate) fn settle_protections(&mut self, host: &mut dyn MergeHost) {
        for span in std::mem::take(&mut self.debts.unprotect) {
            self.lift(host, span);
        }
    }
}

/// Estimate of one entry of an ordered map with its share of the nodes, in bytes.
const ENTRY_BYTES: usize = 128;

pub(crate) fn overlap(a: Span, b: Span) -> bool {
    a.mapping == b.mapping && a.start < b.end() && b.start < a.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_of_one_mapping_and_half_open() {
        let at = |m, s, n| make_span(MappingId(m), s, n);
        assert!(overlap(at(1, 0, 5), at(1, 4, 1)));
        assert!(!overlap(at(1, 0, 5), at(1, 5, 1)));
        assert!(!overlap(at(1, 0, 5), at(2, 0, 5)));
    }

    #[test]
    fn an_engine_can_live_behind_a_lock() {
        fn sendable<T: Send>() {}
        sendable::<Engine>();
    }

    #[test]
    fn profit_is_net_of_our_own_memory() {
        let profit = Profit { saved_bytes: 4096, metadata_bytes: 5000 };
        assert_eq!(profit.net_bytes(), -904);
        let idle = Engine::new(Knobs { max_page_sharing: 0, ..Knobs::default() });
        assert_eq!(idle.profit(PageSize::KIB4), Profit { saved_bytes: 0, metadata_bytes: 0 });
        assert_eq!(idle.knobs().max_page_sharing, 2, "one sharer is no sharing");
    }
}
