//! Judging what the scanner sees: where each run of pages goes.
//!
//! Invariants: the stable index is asked before the unstable one (K-058); a page known by its bytes waits
//! only after two passes with one checksum (K-059), a page known by its place at once; what a site
//! shows is believed over what its record says. What it deliberately does not do: merge or break; it says
//! what with what.

use crate::control::UnmergeError;
use crate::counters::Decision;
use crate::domain::{Registration, Route};
use crate::engine::Engine;
use crate::host::{Digest, MergeHost, NodeId, Observed, Private, SharedPage, SharedSpan, Shown};
use crate::identity::Identity;
use crate::merge::{Keys, evidence};
use crate::policy::History;
use crate::protocol::part;
use crate::record::{SiteRecord, SiteState};
use crate::runs::RunValue;
use crate::stable::{Key, Place};
use crate::units::{DomainId, PageCount, Site, Span};

/// What is to be done with one digested page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Zero,
    Join(SharedPage),
    Pair(Site),
}

impl Plan {
    /// Whether `next` is the plan for the page after a group of `pages` with this plan.
    fn goes_on(self, pages: u64, next: Plan) -> bool {
        match self {
            Plan::Zero => next == Plan::Zero,
            Plan::Join(page) => next == Plan::Join(page.plus(PageCount(pages))),
            Plan::Pair(mate) => next == Plan::Pair(mate.advance(pages)),
        }
    }
}

impl Engine {
    /// Handles one run the host reported.
    pub(crate) fn visit(&mut self, host: &mut dyn MergeHost, reg: &Registration, o: &Observed) {
        let node = self.shelf(o.node);
        match o.shown {
            Shown::Unsuitable => self.count(o.span, Decision::Unsuitable, o.span.pages.0),
            Shown::SharedZero { private } => self.visit_zero(o.span, private),
            Shown::Shared { page, mappings, private } => {
                self.visit_shared(host, o.span, page, mappings, private);
            }
            Shown::Own { hint } => {
                self.notice(o.span);
                match (reg.route, Place::of(hint)) {
                    (Route::Physical, Some(place)) => self.visit_place(host, o.span, node, place),
                    (Route::Physical, None) => {
                        let hole = hint == Identity::Zero;
                        let why = if hole { Decision::Hole } else { Decision::Undecided };
                        self.count(o.span, why, o.span.pages.0);
                    }
                    (Route::Content | Route::ContentDedupe, _) => self.visit_content(host, o.span, node),
                }
            }
        }
    }

    /// A zero page that is not recorded came by fork.
    fn visit_zero(&mut self, span: Span, private: Private) {
        let known = SiteRecord::new(SiteState::Zero { private });
        let mut at = 0;
        while at < span.pages.0 {
            let (record, len) = self.records.segment(part(span, at, span.pages.0 - at));
            if !record.is_some_and(|r| matches!(r.state, SiteState::Zero { .. })) {
                self.set(part(span, at, len), known);
                self.count(span, Decision::Forked, len);
            }
            at += len;
        }
    }

    /// Sites that show shared pages: recorded ones are left alone unless they are the last (K-030,
    /// K-032); others came by fork (K-016) or were left behind by a failed break (K-065, K-076).
    fn visit_shared(
        &mut self,
        host: &mut dyn MergeHost,
        span: Span,
        first: SharedPage,
        mappings: u64,
        private: Private,
    ) {
        let mut at = 0;
        while at < span.pages.0 {
            let rest = part(span, at, span.pages.0 - at);
            let (record, len) = self.records.segment(rest);
            let (sub, page) = (part(span, at, len), first.plus(PageCount(at)));
            match record.map(|r| r.state) {
                Some(SiteState::Shared { page: known, .. }) if known == page => {
                    if mappings <= 1 {
                        self.last_sharer(host, sub);
                    }
                }
                _ => self.visit_stray(host, sub, page, private),
            }
            at += len;
        }
    }

    /// K-030, K-031, K-035: break, leave the tree whether or not that worked, then the checksum at once.
    fn last_sharer(&mut self, host: &mut dyn MergeHost, span: Span) {
        if let Err(UnmergeError::Host(error)) = self.break_run(host, span, Decision::LastSharer) {
            self.errors.push(error);
        }
        for (part, record) in self.records.pieces(span) {
            if record.state.is_merged() {
                // Not broken, for want of memory: the page stays shared and protected, in no index, until a
                // later pass meets it as a stray (K-065).
                self.set(part, SiteRecord::new(SiteState::Stray));
            }
        }
        self.remember_checksums(host, span);
    }

    fn visit_stray(&mut self, host: &mut dyn MergeHost, span: Span, first: SharedPage, private: Private) {
        let domain = self.owner(span).domain;
        let mut at = 0;
        while at < span.pages.0 {
            let page = first.plus(PageCount(at));
            let shared = SharedSpan { start: page, pages: PageCount(span.pages.0 - at) };
            let (sharers, len) = self.records.sharers(shared);
            let sub = part(span, at, len);
            match sharers {
                Some(known) if known.domain == domain => {
                    // Recorded only: it is the shared page already, there is nothing to merge (K-016).
                    self.set(sub, SiteRecord::new(SiteState::Shared { page, private }));
                    self.count(sub, Decision::Forked, len);
                }
                known => {
                    if known.is_some() {
                        self.count(sub, Decision::ForeignDomain, len);
                    }
                    self.set(sub, SiteRecord::new(SiteState::Stray));
                    match self.break_run(host, sub, Decision::StrayBroken) {
                        Err(UnmergeError::Host(error)) => self.errors.push(error),
                        _ => self.remember_checksums(host, sub),
                    }
                }
            }
            at += len;
        }
    }

    /// After a break: with the checksum known, the page may enter the unstable index in the next pass
    /// (K-031).
    fn remember_checksums(&mut self, host: &mut dyn MergeHost, span: Span) {
        let route = self.registry.get(span.mapping).map(|r| r.route);
        if self.registry.is_exiting(span.mapping) || route.is_none_or(|r| r == Route::Physical) {
            return;
        }
        let mut digests = Vec::new();
        if let Err(error) = host.digest(span, &mut digests) {
            return self.fail(span, error);
        }
        for (i, digest) in digests.into_iter().enumerate() {
            let page = part(span, i as u64, 1);
            let known = self.records.pieces(page);
            if let (Some(digest), [(_, record)]) = (digest, &known[..])
                && !record.state.is_merged()
            {
                let history = History { checksum: Some(checksum(digest)), ..History::default() };
                self.set(page, SiteRecord { state: SiteState::Volatile, history });
            }
        }
    }

    /// Candidates with a known place on disk: no checksum, no second look.
    fn visit_place(&mut self, host: &mut dyn MergeHost, span: Span, node: NodeId, place: Place) {
        assert!(place.valid == 0 || span.pages.0 == 1, "a tail is one page");
        if span.pages.0 < self.knobs.min_run_pages {
            return self.count(span, Decision::ShortRun, span.pages.0);
        }
        let domain = self.owner(span).domain;
        let mut at = 0;
        while at < span.pages.0 {
            if self.registry.is_exiting(span.mapping) {
                return;
            }
            let key = Key::Place(place.advance(at));
            let (found, len) = self.joinable(domain, node, key, span.pages.0 - at);
            if let Some(shared) = found {
                self.join(host, part(span, at, len), shared, evidence(Route::Physical));
                at += len;
                continue;
            }
            let pass = self.pass();
            let (mate, len) = self.indexes(domain).unstable.segment(pass, node, key, len);
            let sub = part(span, at, len);
            self.note_full_chain(sub, node, key);
            match mate {
                Some(mate) => {
                    let keys = Keys::Place(place.advance(at));
                    self.pair(host, sub, Self::mate_span(mate, len), node, keys);
                }
                None => self.wait(sub, node, key),
            }
            at += len;
        }
    }

    /// Shared pages for a key that take further sites (`max_page_sharing`), and for how many pages that,
    /// or their absence, goes on.
    fn joinable(&mut self, domain: DomainId, node: NodeId, key: Key, most: u64) -> (Option<SharedSpan>, u64) {
        let (found, len) = self.indexes(domain).stable.segment(node, key, most);
        let Some(start) = found else { return (None, len) };
        let (sharers, len) = self.records.sharers(SharedSpan { start, pages: PageCount(len) });
        let sharers = sharers.expect("a page in the stable index has a site");
        assert_eq!(sharers.domain, domain, "an index names a page of another domain");
        if sharers.sites() < u64::from(self.knobs.max_page_sharing) {
            return (Some(SharedSpan { start, pages: PageCount(len) }), len);
        }
        (None, len)
    }

    /// Counts pages that were not joined although the stable index has their key.
    fn note_full_chain(&mut self, span: Span, node: NodeId, key: Key) {
        let domain = self.owner(span).domain;
        if self.indexes(domain).stable.segment(node, key, span.pages.0).0.is_some() {
            self.count(span, Decision::ChainFull, span.pages.0);
        }
    }

    /// Candidates known by their bytes (K-058, K-059). Pages whose plans continue each other are merged
    /// as one run.
    fn visit_content(&mut self, host: &mut dyn MergeHost, span: Span, node: NodeId) {
        let mut at = 0;
        while at < span.pages.0 {
            let skipped = self.skip_smart(part(span, at, 1));
            let mut end = at + 1;
            while end < span.pages.0 && !skipped && !self.skip_smart(part(span, end, 1)) {
                end += 1;
            }
            if !skipped {
                self.visit_digested(host, part(span, at, end - at), node);
                // The page that ended the run was asked already, and is to be passed over.
                end = (end + 1).min(span.pages.0);
            }
            at = end;
        }
    }

    /// Whether this page is left out of this pass.
    fn skip_smart(&mut self, page: Span) -> bool {
        if !self.knobs.smart_scan {
            return false;
        }
        let Some((record, _)) = self.records.get(Site { mapping: page.mapping, offset: page.start }) else {
            return false;
        };
        let mut history = record.history;
        let skip = history.pass(self.generation);
        self.set(page, SiteRecord { history, ..record });
        if skip {
            self.count(page, Decision::SkippedSmart, 1);
        }
        skip
    }

    fn visit_digested(&mut self, host: &mut dyn MergeHost, span: Span, node: NodeId) {
        let mut digests = Vec::new();
        if let Err(error) = host.digest(span, &mut digests) {
            return self.fail(span, error);
        }
        assert_eq!(digests.len() as u64, span.pages.0, "digest reported another number of pages");
        // Start, plan and digests of the group of pages not yet carried out.
        let mut group: Option<(u64, Plan, Vec<Digest>)> = None;
        for (i, digest) in digests.into_iter().enumerate() {
            let i = i as u64;
            let Some(digest) = digest else {
                self.finish(host, span, node, group.take());
                self.drop_records(host, part(span, i, 1), Decision::Gone);
                continue;
            };
            let zero = self.knobs.use_zero_pages && digest == host.zero_digest();
            let mut plan = self.plan(part(span, i, 1), node, digest, zero);
            if let (Some((start, first, digests)), Some(next)) = (&mut group, plan)
                && first.goes_on(i - *start, next)
            {
                digests.push(digest);
                continue;
            }
            if group.is_some() {
                self.finish(host, span, node, group.take());
                if self.registry.is_exiting(span.mapping) {
                    return;
                }
                // What was just merged may be what this page is looking for.
                plan = self.plan(part(span, i, 1), node, digest, zero);
            }
            if !matches!(plan, Some(Plan::Join(_) | Plan::Zero)) {
                self.note_full_chain(part(span, i, 1), node, Key::Digest(digest));
            }
            match plan {
                Some(plan) => group = Some((i, plan, vec![digest])),
                None => self.hold(part(span, i, 1), node, digest),
            }
        }
        self.finish(host, span, node, group.take());
    }

    /// Where a digested page goes; `None`: nowhere yet. Changes nothing.
    fn plan(&mut self, page: Span, node: NodeId, digest: Digest, zero: bool) -> Option<Plan> {
        if zero {
            return Some(Plan::Zero);
        }
        let (domain, pass) = (self.owner(page).domain, self.pass());
        if let (Some(shared), _) = self.joinable(domain, node, Key::Digest(digest), 1) {
            return Some(Plan::Join(shared.start));
        }
        if !self.held_still(page, digest) {
            return None;
        }
        self.indexes(domain).unstable.segment(pass, node, Key::Digest(digest), 1).0.map(Plan::Pair)
    }

    /// K-059: the checksum is that of the last pass.
    fn held_still(&self, page: Span, digest: Digest) -> bool {
        let record = self.records.get(Site { mapping: page.mapping, offset: page.start });
        record.is_some_and(|(r, _)| r.history.checksum == Some(checksum(digest)))
    }

    /// Nobody has these bytes yet: the page waits, or, if it changed since the last pass, its checksum is
    /// noted.
    fn hold(&mut self, page: Span, node: NodeId, digest: Digest) {
        if self.held_still(page, digest) {
            return self.wait(page, node, Key::Digest(digest));
        }
        let record = self.records.get(Site { mapping: page.mapping, offset: page.start });
        let history = record.map(|(r, _)| r.history).unwrap_or_default();
        let history = History { checksum: Some(checksum(digest)), ..history };
        self.set(page, SiteRecord { state: SiteState::Volatile, history });
        self.count(page, Decision::ChecksumChanged, 1);
    }

    fn finish(
        &mut self,
        host: &mut dyn MergeHost,
        span: Span,
        node: NodeId,
        group: Option<(u64, Plan, Vec<Digest>)>,
    ) {
        let Some((start, plan, digests)) = group else { return };
        let sub = part(span, start, digests.len() as u64);
        let route = self.registry.get(span.mapping).expect("registered").route;
        match plan {
            Plan::Zero => self.join_zero(host, sub),
            Plan::Join(first) => {
                let shared = SharedSpan { start: first, pages: sub.pages };
                self.join(host, sub, shared, evidence(route));
            }
            Plan::Pair(mate) => {
                let mate = Self::mate_span(mate, sub.pages.0);
                self.pair(host, sub, mate, node, Keys::Digests(&digests));
            }
        }
    }
}

/// The checksum kept between passes: half the digest is enough to see that a page changed.
fn checksum(digest: Digest) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = digest.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
