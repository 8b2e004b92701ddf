//! One merge: joining a shared page, founding one from a pair, showing the zero page.
//!
//! Invariant: whatever happens on the way, afterwards each page either is merged, recorded and protected,
//! or is its own, unprotected and a candidate still; and no shared page is left without a site (K-056,
//! K-057). A run that fails at one page is tried again around it, so that one pinned page does not cost
//! its neighbours.

use crate::counters::Decision;
use crate::domain::{Route, make_span};
use crate::engine::{Engine, overlap};
use crate::host::{Digest, HostError, MakeOutcome, MergeHost, NodeId, Refusal, ShareTarget, SharedSpan};
use crate::protocol::{
    Anchor, Candidate, Evidence, Proof, Protected, Protecting, Proving, Shared, Sharing, part, shared_part,
};
use crate::record::{SiteRecord, SiteState};
use crate::runs::RunValue;
use crate::stable::{Key, Place};
use crate::units::{PageCount, Site, Span};

/// What is left to do of a run after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// Nothing: all merged, or the whole run given up for this pass.
    No,
    /// This page is given up; what stands before and after it is worth another try.
    Around(u64),
    /// Something in it raced, it is not known where: try the halves.
    Halves,
}

impl Again {
    /// The parts of a run of `pages` to try again, as (from, pages), last first.
    fn parts(self, pages: u64) -> impl Iterator<Item = (u64, u64)> {
        let (a, b) = match self {
            Again::No => ((0, 0), (0, 0)),
            Again::Around(at) => ((0, at), (at + 1, pages - at - 1)),
            Again::Halves if pages < 2 => ((0, 0), (0, 0)),
            Again::Halves => ((0, pages / 2), (pages / 2, pages - pages / 2)),
        };
        [b, a].into_iter().filter(|(_, n)| *n > 0)
    }
}

/// The keys of a run of pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keys<'a> {
    /// Consecutive places.
    Place(Place),
    /// One digest a page.
    Digests(&'a [Digest]),
}

impl Keys<'_> {
    fn slice(self, from: u64, pages: u64) -> Self {
        match self {
            Keys::Place(place) => Keys::Place(place.advance(from)),
            Keys::Digests(all) => Keys::Digests(&all[from as usize..(from + pages) as usize]),
        }
    }
}

/// How a route proves equality.
pub(crate) fn evidence(route: Route) -> Evidence {
    match route {
        Route::Physical => Evidence::Place,
        Route::Content => Evidence::Bytes,
        Route::ContentDedupe => Evidence::Kernel,
    }
}

impl Engine {
    /// Merges candidates into shared pages that exist (K-054). Never refused by the limit (K-005).
    pub(crate) fn join(&mut self, host: &mut dyn MergeHost, span: Span, shared: SharedSpan, by: Evidence) {
        let mut work = vec![(span, shared)];
        while let Some((span, shared)) = work.pop() {
            let again = self.try_join(host, span, shared, by);
            work.extend(
                again.parts(span.pages.0).map(|(at, n)| (part(span, at, n), shared_part(shared, at, n))),
            );
        }
    }

    fn try_join(&mut self, host: &mut dyn MergeHost, span: Span, shared: SharedSpan, by: Evidence) -> Again {
        let anchor = Anchor::new(shared, self.owner(span).domain);
        let site = match self.arm(host, span) {
            Ok(site) => site,
            Err(again) => return again,
        };
        match self.proven(host, site, Some(&anchor), by) {
            Ok(proof) => self.seal(host, proof).unwrap_or_else(|again| again),
            Err(again) => again,
        }
    }

    /// Shows the zero page in place of pages full of zeros.
    pub(crate) fn join_zero(&mut self, host: &mut dyn MergeHost, span: Span) {
        let mut work = vec![span];
        while let Some(span) = work.pop() {
            let again = match self.arm(host, span) {
                Ok(site) => match self.proven(host, site, None, Evidence::Bytes) {
                    Ok(proof) => self.seal(host, proof).unwrap_or_else(|again| again),
                    Err(again) => again,
                },
                Err(again) => again,
            };
            work.extend(again.parts(span.pages.0).map(|(at, n)| part(span, at, n)));
        }
    }

    /// Merges candidates with their mates into new shared pages (K-055), as far as `max_kernel_pages`
    /// lets (K-005, K-007: what is refused stays as it was).
    pub(crate) fn pair(
        &mut self,
        host: &mut dyn MergeHost,
        span: Span,
        mate: Span,
        node: NodeId,
        keys: Keys<'_>,
    ) {
        assert!(!overlap(span, mate), "a page is its own mate");
        let by = evidence(self.registry.get(span.mapping).expect("registered").route);
        let mut work = vec![(0, span.pages.0)];
        while let Some((at, pages)) = work.pop() {
            let room = self.knobs.room_for_shared(self.total().gauges.pages_shared).0;
            if room < pages {
                self.count(span, Decision::LimitReached, pages - room);
            }
            let pages = pages.min(room);
            if pages == 0 {
                continue;
            }
            let (c, m) = (part(span, at, pages), part(mate, at, pages));
            let again = self.try_pair(host, c, m, node, keys.slice(at, pages), by);
            work.extend(again.parts(pages).map(|(from, n)| (at + from, n)));
        }
    }

    fn try_pair(
        &mut self,
        host: &mut dyn MergeHost,
        span: Span,
        mate: Span,
        node: NodeId,
        keys: Keys<'_>,
        by: Evidence,
    ) -> Again {
        let domain = self.owner(span).domain;
        assert_eq!(domain, self.owner(mate).domain, "a merge across domains");
        let second = match self.arm(host, span) {
            Ok(second) => second,
            Err(again) => return again,
        };
        let first = match self.arm(host, mate) {
            Ok(first) => first,
            Err(again) => {
                self.disarm(host, second);
                return again;
            }
        };
        let shared = match self.made(host, &first) {
            Ok(shared) => shared,
            Err(again) => {
                self.disarm(host, first);
                self.disarm(host, second);
                return again;
            }
        };
        // The creator's reference: owed until the pages have a site, on every path (K-057).
        self.debts.release.push(shared);
        let anchor = Anchor::new(shared, domain);
        let first = match self.proven(host, first, Some(&anchor), by) {
            Ok(proof) => proof,
            Err(again) => {
                self.disarm(host, second);
                self.drop_mate(mate, again);
                self.settle(host);
                return again;
            }
        };
        let second = match self.proven(host, second, Some(&anchor), by) {
            Ok(proof) => proof,
            Err(again) => {
                self.disarm(host, first.cancel());
                if by != Evidence::Place {
                    // Either of them may have changed since it was digested. By place the mate is proved
                    // by now.
                    self.drop_mate(mate, again);
                }
                self.settle(host);
                return again;
            }
        };
        self.share_pair(host, first, second, node, keys, shared)
    }

    fn share_pair(
        &mut self,
        host: &mut dyn MergeHost,
        first: Proof,
        second: Proof,
        node: NodeId,
        keys: Keys<'_>,
        shared: SharedSpan,
    ) -> Again {
        let mate = first.span();
        if let Err(again) = self.seal(host, first) {
            self.disarm(host, second.cancel());
            self.settle(host);
            return again;
        }
        self.debts.release.retain(|s| *s != shared);
        self.file(host, mate, node, keys, shared);
        match self.seal(host, second) {
            Ok(done) => done,
            Err(again) => {
                // A shared page with one user must not remain (K-056). If memory is short even for that, the
                // scanner finds a last sharer and tries again (K-030, K-065).
                let taken_back = self.break_run(host, mate, Decision::TakenBack);
                self.settle(host);
                if taken_back.is_ok() { again } else { Again::No }
            }
        }
    }

    /// Enters new shared pages into the stable index.
    fn file(
        &mut self,
        host: &mut dyn MergeHost,
        mate: Span,
        node: NodeId,
        keys: Keys<'_>,
        shared: SharedSpan,
    ) {
        let domain = self.owner(mate).domain;
        match keys {
            Keys::Place(place) => {
                self.indexes(domain).stable.insert(node, Key::Place(place), shared);
                if self.knobs.digest_shared {
                    self.file_digests(host, mate, node, shared);
                }
            }
            Keys::Digests(all) => {
                for (i, digest) in all.iter().enumerate() {
                    let one = shared_part(shared, i as u64, 1);
                    self.indexes(domain).stable.insert(node, Key::Digest(*digest), one);
                }
            }
        }
    }

    fn file_digests(&mut self, host: &mut dyn MergeHost, mate: Span, node: NodeId, shared: SharedSpan) {
        let (domain, mut digests) = (self.owner(mate).domain, Vec::new());
        if let Err(error) = host.digest(mate, &mut digests) {
            return self.fail(mate, error);
        }
        for (i, digest) in digests.into_iter().enumerate() {
            if let Some(digest) = digest {
                let page = shared.start.plus(PageCount(i as u64));
                self.indexes(domain).stable.insert_digest(node, digest, page);
            }
        }
    }

    /// Protects, counting why not.
    fn arm(&mut self, host: &mut dyn MergeHost, span: Span) -> Result<Protected, Again> {
        if self.debts.holds(span) {
            self.count(span, Decision::Busy, span.pages.0);
            return Err(Again::No);
        }
        let range = self.registry.range_around(span.mapping, span.start);
        assert!(range.is_some_and(|r| span.end() <= r.end()), "{span:?} is not registered (K-128)");
        let reg = *self.registry.get(span.mapping).expect("registered");
        let candidate = Candidate::new(span, reg.protect, reg.domain);
        let wide = self.widened(host, span);
        match self.listeners.bracket(wide, |_| candidate.protect(host), |_| PageCount(0)) {
            Protecting::Done(site) => Ok(site),
            Protecting::Refused { why, at } => {
                let decision = match why {
                    Refusal::Pinned => Decision::Pinned,
                    Refusal::Busy => Decision::Busy,
                    Refusal::Gone => Decision::Gone,
                    Refusal::Denied => Decision::Denied,
                };
                self.count(span, decision, 1);
                Err(Again::Around(at.0))
            }
            Protecting::Failed(error) => Err(self.give_up(span, error)),
        }
    }

    /// Lifts a protection that was not used.
    fn disarm(&mut self, host: &mut dyn MergeHost, site: Protected) {
        if let Err((span, error)) = site.unprotect(host) {
            self.fail(span, error);
            self.debts.unprotect.push(span);
        }
    }

    fn give_up(&mut self, span: Span, error: HostError) -> Again {
        self.fail(span, error);
        Again::No
    }

    fn made(&mut self, host: &mut dyn MergeHost, first: &Protected) -> Result<SharedSpan, Again> {
        match first.make_shared(host) {
            Ok(MakeOutcome::Made(shared)) => Ok(shared),
            Ok(MakeOutcome::Raced) => {
                self.count(first.span(), Decision::Raced, first.span().pages.0);
                Err(Again::Halves)
            }
            Ok(MakeOutcome::NoMemory) => {
                self.count(first.span(), Decision::NoMemory, first.span().pages.0);
                Err(Again::No)
            }
            Err(error) => Err(self.give_up(first.span(), error)),
        }
    }

    /// Proves; a protection that served no proof is lifted.
    fn proven(
        &mut self,
        host: &mut dyn MergeHost,
        site: Protected,
        anchor: Option<&Anchor>,
        by: Evidence,
    ) -> Result<Proof, Again> {
        let proving = match anchor {
            Some(anchor) => site.prove(host, anchor, by),
            None => site.prove_zero(host),
        };
        match proving {
            Proving::Proven(proof) => Ok(proof),
            Proving::Unequal { site, at, why } => {
                self.count(site.span(), why, 1);
                self.disarm(host, site);
                Err(Again::Around(at.0))
            }
            Proving::Failed(site, error) => {
                let again = self.give_up(site.span(), error);
                self.disarm(host, site);
                Err(again)
            }
        }
    }

    /// Shares and records; or lifts the protection and says why not.
    fn seal(&mut self, host: &mut dyn MergeHost, proof: Proof) -> Result<Again, Again> {
        let span = proof.span();
        let wide = self.widened(host, span);
        let done = |s: &Sharing| if let Sharing::Done(_) = s { span.pages } else { PageCount(0) };
        let (site, again) = match self.listeners.bracket(wide, |told| proof.share(host, told), done) {
            Sharing::Done(shared) => {
                self.record(shared);
                return Ok(Again::No);
            }
            Sharing::Raced(site) => {
                self.count(span, Decision::Raced, span.pages.0);
                (site, Again::Halves)
            }
            Sharing::NoMemory(site) => {
                self.count(span, Decision::NoMemory, span.pages.0);
                (site, Again::No)
            }
            Sharing::Failed(site, error) => (site, self.give_up(span, error)),
        };
        self.disarm(host, site);
        Err(again)
    }

    fn record(&mut self, shared: Shared) {
        let (span, private) = (shared.site(), shared.private());
        let (state, decision) = match (shared.target(), shared.by()) {
            (ShareTarget::Zero, _) => (SiteState::Zero { private }, Decision::MergedZero),
            (ShareTarget::Shared(to), by) => {
                let decision = match by {
                    Evidence::Place => Decision::MergedPhysical,
                    Evidence::Bytes => Decision::MergedBytes,
                    Evidence::Kernel => Decision::MergedKernel,
                };
                (SiteState::Shared { page: to.start, private }, decision)
            }
        };
        self.set(span, SiteRecord::new(state));
        self.count(span, decision, span.pages.0);
    }

    /// A mate that turned out different is not tried again in this pass.
    fn drop_mate(&mut self, mate: Span, again: Again) {
        if let Again::Around(at) = again {
            self.set(part(mate, at, 1), SiteRecord::new(SiteState::Volatile));
        }
    }

    /// Lets a run wait in the unstable index (K-020).
    pub(crate) fn wait(&mut self, span: Span, node: NodeId, key: Key) {
        let (owner, pass) = (self.owner(span), self.pass());
        let site = Site { mapping: span.mapping, offset: span.start };
        let history = match key {
            Key::Place(_) => crate::policy::History::default(),
            Key::Digest(_) => self.records.get(site).map(|r| r.0.history).unwrap_or_default(),
        };
        self.set(span, SiteRecord { state: SiteState::Unstable { node, key, pass }, history });
        self.indexes(owner.domain).unstable.insert(pass, node, key, span.pages, site);
        self.count(span, Decision::Waiting, span.pages.0);
    }

    /// The run of mates that starts at `site`.
    pub(crate) fn mate_span(site: Site, pages: u64) -> Span {
        make_span(site.mapping, site.offset.0, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_page_does_not_cost_its_neighbours() {
        let parts = |again: Again, n| again.parts(n).collect::<Vec<_>>();
        assert_eq!(parts(Again::Around(3), 8), [(4, 4), (0, 3)]);
        assert_eq!(parts(Again::Around(0), 1), []);
        assert_eq!(parts(Again::Around(7), 8), [(0, 7)]);
        assert_eq!(parts(Again::Halves, 5), [(2, 3), (0, 2)]);
        assert_eq!(parts(Again::Halves, 1), []);
        assert_eq!(parts(Again::No, 9), []);
    }
}
