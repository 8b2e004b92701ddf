//! The merge order in types: `Candidate -> protect -> Protected -> prove -> Proof -> share -> Shared ->
//! break`.
//!
//! Invariants, kept by the compiler as far as it can:
//! * a [`Proof`] comes from a [`Protected`] and from nothing else, so equality is never judged before
//!   protection;
//! * a proof remembers the two spans it speaks of, is consumed by [`Proof::share`], and `share` takes no
//!   span: it can't be spent on others;
//! * a [`Protected`] that is neither shared nor lifted is a leaked protection and asserts when it is dropped;
//! * both sides of a proof are of one domain, asserted.
//!
//! A proof can't be made up, used twice, or used for another span:
//!
//! ```compile_fail,E0451
//! # use pagefold_engine::{protocol::*, units::*, domain::*};
//! fn made_up(site: Protected, anchor: Anchor) -> Proof {
//!     Proof { site, anchor: Some(anchor), by: Evidence::Place }
//! }
//! ```
//! ```compile_fail,E0382
//! # use pagefold_engine::{protocol::*, host::*};
//! fn twice(proof: Proof, host: &mut dyn MergeHost) {
//!     proof.share(host, &mut |_| ());
//!     proof.share(host, &mut |_| ());
//! }
//! ```
//! ```compile_fail,E0061
//! # use pagefold_engine::{protocol::*, host::*, units::*};
//! fn for_others(proof: Proof, other: Span, host: &mut dyn MergeHost) {
//!     proof.share(host, other, &mut |_| ());
//! }
//! ```
//! ```compile_fail,E0599
//! # use pagefold_engine::{protocol::*, host::*};
//! fn unprotected(candidate: Candidate, anchor: &Anchor, host: &mut dyn MergeHost) {
//!     candidate.prove(host, anchor, Evidence::Bytes);
//! }
//! ```
//!
//! What this module deliberately does not do: decide what to merge, count, or keep records.

use crate::counters::Decision;
use crate::host::{
    BreakOutcome, BreakStop, CompareOutcome, HostError, Invalidate, MakeOutcome, MapReading, MergeHost,
    Private, ProtectKind, ProtectOutcome, Refusal, ShareOutcome, ShareTarget, SharedSpan, Side, Stamp,
};
use crate::layout::{CacheState, Run};
use crate::stable::Place;
use crate::units::{DomainId, PageCount, PageIndex, Span};

/// How equality is to be shown (design section 4: prove).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// Both extent maps, re-read after protection, are equal and no cache is dirty. Falls back to bytes
    /// where there is no map.
    Place,
    /// All bytes compared.
    Bytes,
    /// The kernel compared (FIDEDUPERANGE). Falls back to bytes where it can't.
    Kernel,
}

/// A run of pages worth a try; nothing is known for certain.
#[derive(Debug)]
#[must_use]
pub struct Candidate {
    span: Span,
    kind: ProtectKind,
    domain: DomainId,
}

/// A run of pages nobody can change unheard.
#[derive(Debug)]
#[must_use]
pub struct Protected {
    span: Span,
    stamp: Stamp,
    domain: DomainId,
    spent: bool,
}

/// Shared pages that a site may be proved equal to; of one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    shared: SharedSpan,
    domain: DomainId,
}

/// These protected pages have the bytes of those shared pages (or are all zero).
#[derive(Debug)]
#[must_use]
pub struct Proof {
    site: Protected,
    anchor: Option<Anchor>,
    by: Evidence,
}

/// A run of sites that shows shared pages.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Shared {
    site: Span,
    target: ShareTarget,
    private: Private,
    by: Evidence,
}

/// How [`Candidate::protect`] ended.
#[derive(Debug)]
#[must_use]
pub enum Protecting {
    /// Protected.
    Done(Protected),
    /// Nothing is protected; the page `at` (from the span's start) refused.
    Refused {
        /// Why.
        why: Refusal,
        /// Which page.
        at: PageCount,
    },
    /// The host could not try.
    Failed(HostError),
}

/// How a proof ended.
#[derive(Debug)]
#[must_use]
pub enum Proving {
    /// Equal.
    Proven(Proof),
    /// Not shown to be equal: the page `at` (from the span's start) is the first that failed.
    Unequal {
        /// Still protected.
        site: Protected,
        /// Which page.
        at: PageCount,
        /// `Differs`, `HintStale`, `DirtyCache` or `Gone`.
        why: Decision,
    },
    /// The host could not try.
    Failed(Protected, HostError),
}

/// How [`Proof::share`] ended.
#[derive(Debug)]
#[must_use]
pub enum Sharing {
    /// All pages were replaced.
    Done(Shared),
    /// Something changed since protection; nothing was replaced.
    Raced(Protected),
    /// No memory; nothing was replaced.
    NoMemory(Protected),
    /// The host could not try.
    Failed(Protected, HostError),
}

impl Candidate {
    pub(crate) fn new(span: Span, kind: ProtectKind, domain: DomainId) -> Self {
        Candidate { span, kind, domain }
    }

    /// Protects all pages or none (P-001, P-002).
    pub fn protect(self, host: &mut dyn MergeHost) -> Protecting {
        let Candidate { span, kind, domain } = self;
        match host.protect(span, kind) {
            Ok(ProtectOutcome::Protected(stamp)) => {
                Protecting::Done(Protected { span, stamp, domain, spent: false })
            }
            Ok(ProtectOutcome::Refused { why, at }) => {
                assert!(span.start <= at && at < span.end(), "page {at} that refused is not in {span:?}");
                Protecting::Refused { why, at: PageCount(at.0 - span.start.0) }
            }
            Err(error) => Protecting::Failed(error),
        }
    }
}

impl Anchor {
    pub(crate) fn new(shared: SharedSpan, domain: DomainId) -> Self {
        Anchor { shared, domain }
    }

    /// Which pages.
    #[must_use]
    pub fn shared(&self) -> SharedSpan {
        self.shared
    }
}

impl Protected {
    /// Which pages.
    #[must_use]
    pub fn span(&self) -> Span {
        self.span
    }

    /// Lifts the protection. On an error the span stays protected and is the caller's to lift.
    ///
    /// # Errors
    /// As the host says.
    pub fn unprotect(mut self, host: &mut dyn MergeHost) -> Result<(), (Span, HostError)> {
        self.spent = true;
        host.unprotect(self.span).map_err(|e| (self.span, e))
    }

    /// Makes new shared pages with these bytes (K-055).
    ///
    /// # Errors
    /// As the host says.
    ///
    /// # Panics
    /// When the host makes another number of pages.
    pub fn make_shared(&self, host: &mut dyn MergeHost) -> Result<MakeOutcome, HostError> {
        let made = host.make_shared(self.span, self.stamp)?;
        if let MakeOutcome::Made(shared) = made {
            assert_eq!(shared.pages, self.span.pages, "make_shared made another number of pages");
        }
        Ok(made)
    }

    /// Shows that these pages have the bytes of `anchor`'s.
    ///
    /// # Panics
    /// When the two are of different domains or lengths: the engine would merge what must not be merged.
    pub fn prove(self, host: &mut dyn MergeHost, anchor: &Anchor, by: Evidence) -> Proving {
        assert_eq!(self.domain, anchor.domain, "a merge across domains");
        assert_eq!(self.span.pages, anchor.shared.pages, "a proof of spans of different length");
        let judged = match by {
            Evidence::Place => self.judge_place(host, anchor.shared),
            Evidence::Bytes => self.judge_bytes(host, anchor.shared),
            Evidence::Kernel => self.judge_kernel(host, anchor.shared),
        };
        match judged {
            Ok(judged) => self.conclude(judged, Some(*anchor)),
            Err(error) => Proving::Failed(self, error),
        }
    }

    /// Shows that every byte of these pages is zero.
    pub fn prove_zero(self, host: &mut dyn MergeHost) -> Proving {
        match host.compare_zero(self.span) {
            Ok(outcome) => self.conclude(Judged::compared(outcome, Evidence::Bytes), None),
            Err(error) => Proving::Failed(self, error),
        }
    }

    fn conclude(self, judged: Judged, anchor: Option<Anchor>) -> Proving {
        match judged {
            Judged::Equal(by) => Proving::Proven(Proof { site: self, anchor, by }),
            Judged::Unequal(at, why) => {
                let at = PageCount(at.0.min(self.span.pages.0 - 1));
                Proving::Unequal { site: self, at, why }
            }
        }
    }

    fn judge_bytes(&self, host: &mut dyn MergeHost, shared: SharedSpan) -> Result<Judged, HostError> {
        host.compare(self.span, shared).map(|o| Judged::compared(o, Evidence::Bytes))
    }

    fn judge_kernel(&self, host: &mut dyn MergeHost, shared: SharedSpan) -> Result<Judged, HostError> {
        match host.compare_in_kernel(self.span, shared)? {
            CompareOutcome::Unsupported => self.judge_bytes(host, shared),
            outcome => Ok(Judged::compared(outcome, Evidence::Kernel)),
        }
    }

    /// Design 5.5 and 5.6: both maps read again, now that nobody can write, and no dirty cache on either
    /// side.
    fn judge_place(&self, host: &mut dyn MergeHost, shared: SharedSpan) -> Result<Judged, HostError> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let sides = [(Side::Site(self.span), &mut ours), (Side::Shared(shared), &mut theirs)];
        for (side, runs) in sides {
            match host.reread_map(side, runs)? {
                MapReading::Read(CacheState::Clean) => {}
                MapReading::Read(_) => return Ok(Judged::Unequal(PageCount(0), Decision::DirtyCache)),
                MapReading::NoMap => return self.judge_bytes(host, shared),
                MapReading::Gone => return Ok(Judged::Unequal(PageCount(0), Decision::Gone)),
            }
        }
        let equal = equal_places(&ours, &theirs, self.span.pages);
        Ok(if equal == self.span.pages {
            Judged::Equal(Evidence::Place)
        } else {
            Judged::Unequal(equal, Decision::HintStale)
        })
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        assert!(self.spent || std::thread::panicking(), "protection of {:?} leaked", self.span);
    }
}

#[derive(Clone, Copy)]
enum Judged {
    Equal(Evidence),
    Unequal(PageCount, Decision),
}

impl Judged {
    fn compared(outcome: CompareOutcome, by: Evidence) -> Judged {
        match outcome {
            CompareOutcome::Same => Judged::Equal(by),
            CompareOutcome::Differs { at } => Judged::Unequal(at, Decision::Differs),
            CompareOutcome::Gone => Judged::Unequal(PageCount(0), Decision::Gone),
            CompareOutcome::Unsupported => Judged::Unequal(PageCount(0), Decision::Differs),
        }
    }
}

/// How many pages from the start have one and the same place on disk in both maps. Anything that names no
/// place (undecided, a hole, a gap in what the host reported) ends it.
fn equal_places(ours: &[Run], theirs: &[Run], pages: PageCount) -> PageCount {
    let at = |runs: &[Run], page: u64| {
        let run = runs.iter().find(|r| r.start.0 <= page && page - r.start.0 < r.pages.0)?;
        let into = PageCount(page - run.start.0);
        Some((Place::of(run.identity.plus(into))?, run.pages.0 - into.0))
    };
    let mut done = 0;
    while done < pages.0 {
        match (at(ours, done), at(theirs, done)) {
            (Some((a, n)), Some((b, m))) if a == b => done += n.min(m),
            _ => break,
        }
    }
    PageCount(done.min(pages.0))
}

impl Proof {
    /// Which pages were proved.
    #[must_use]
    pub fn span(&self) -> Span {
        self.site.span
    }

    /// What it rests on, after fall-backs.
    #[must_use]
    pub fn by(&self) -> Evidence {
        self.by
    }

    /// Gives up: the pages are protected still.
    pub fn cancel(self) -> Protected {
        self.site
    }

    /// Replaces the pages if nothing changed since they were protected (P-004).
    pub fn share(self, host: &mut dyn MergeHost, invalidate: Invalidate<'_>) -> Sharing {
        let Proof { mut site, anchor, by } = self;
        let target = anchor.map_or(ShareTarget::Zero, |a| ShareTarget::Shared(a.shared));
        match host.share(site.span, site.stamp, target, invalidate) {
            Ok(ShareOutcome::Shared { private }) => {
                site.spent = true;
                Sharing::Done(Shared { site: site.span, target, private, by })
            }
            Ok(ShareOutcome::Raced) => Sharing::Raced(site),
            Ok(ShareOutcome::NoMemory) => Sharing::NoMemory(site),
            Err(error) => Sharing::Failed(site, error),
        }
    }
}

impl Shared {
    /// Which pages.
    #[must_use]
    pub fn site(&self) -> Span {
        self.site
    }

    /// What they show.
    #[must_use]
    pub fn target(&self) -> ShareTarget {
        self.target
    }

    /// The sites' private state (W-011).
    #[must_use]
    pub fn private(&self) -> Private {
        self.private
    }

    /// What the proof rested on.
    #[must_use]
    pub fn by(&self) -> Evidence {
        self.by
    }
}

/// Breaks what a span of sites shows, whoever merged it: the engine's records or a fork (K-060..K-063).
/// The pages stay protected until their records are gone.
///
/// # Errors
/// As the host says; nothing was broken.
///
/// # Panics
/// When the host contradicts itself about how far it got.
pub(crate) fn break_span(
    host: &mut dyn MergeHost,
    span: Span,
    invalidate: Invalidate<'_>,
) -> Result<BreakOutcome, HostError> {
    let outcome = host.break_sharing(span, invalidate)?;
    let complete = outcome.stop == BreakStop::Complete;
    let sound = outcome.done <= span.pages && complete == (outcome.done == span.pages);
    assert!(sound, "break of {span:?} claims {outcome:?}");
    Ok(outcome)
}

/// The part of a span from page `from` on, `pages` long.
pub(crate) fn part(span: Span, from: u64, pages: u64) -> Span {
    debug_assert!(from + pages <= span.pages.0);
    Span { start: PageIndex(span.start.0 + from), pages: PageCount(pages), ..span }
}

/// The same of shared pages.
pub(crate) fn shared_part(shared: SharedSpan, from: u64, pages: u64) -> SharedSpan {
    debug_assert!(from + pages <= shared.pages.0);
    SharedSpan { start: shared.start.plus(PageCount(from)), pages: PageCount(pages) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Identity, Undecided};
    use crate::stable::tests::SPACE;

    fn run(start: u64, pages: u64, identity: Identity) -> Run {
        Run { start: PageIndex(start), pages: PageCount(pages), identity }
    }

    fn phys(page: u64) -> Identity {
        Identity::Physical { space: SPACE, page }
    }

    #[test]
    fn maps_cut_differently_are_equal_and_the_first_difference_is_found() {
        let ours = [run(0, 4, phys(10)), run(4, 4, phys(14))];
        let theirs = [run(0, 6, phys(10)), run(6, 2, phys(99))];
        assert_eq!(equal_places(&ours, &theirs, PageCount(6)).0, 6);
        assert_eq!(equal_places(&ours, &theirs, PageCount(8)).0, 6);
        assert_eq!(equal_places(&ours, &theirs[..1], PageCount(8)).0, 6);
    }

    #[test]
    fn pages_without_a_place_are_never_proved_by_place() {
        for identity in [Identity::Zero, Identity::Undecided(Undecided::Encoded), Identity::Content { id: 1 }]
        {
            let runs = [run(0, 1, identity)];
            assert_eq!(equal_places(&runs, &runs, PageCount(1)).0, 0);
        }
        let tail = |valid| [run(0, 1, Identity::Tail { space: SPACE, page: 3, valid })];
        assert_eq!(equal_places(&tail(7), &tail(7), PageCount(1)).0, 1);
        assert_eq!(equal_places(&tail(7), &tail(8), PageCount(1)).0, 0);
    }

    #[test]
    #[should_panic(expected = "leaked")]
    fn a_dropped_protection_is_a_broken_invariant() {
        let span = crate::domain::make_span(crate::units::MappingId(1), 0, 1);
        drop(Protected { span, stamp: Stamp(1), domain: DomainId(0), spent: false });
    }
}
