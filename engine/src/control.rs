//! What happens to the engine from outside: writers, truncation, exit, relocation, unregistration, `run`.
//!
//! Invariants: breaking goes by what the host shows, not by records alone, so a forked copy nobody
//! recorded is broken too (K-066, K-076); a range loses its mark only after all of it was broken; a
//! failed break is reported and keeps its record. What it deliberately does not do: free the records of
//! broken sites. They stay as volatile until the scanner passes (K-052), or until `run`=2 has succeeded.

use crate::counters::Decision;
use crate::domain::make_span;
use crate::engine::Engine;
use crate::host::{BreakStop, HostError, MergeHost, NodeId, Observed, SharedPage, SharedSpan, Shown, Visit};
use crate::identity::Identity;
use crate::policy::Run;
use crate::protocol::{break_span, part};
use crate::record::{SiteRecord, SiteState};
use crate::stable::Place;
use crate::units::{MappingId, PageCount, PageIndex, Site, Span};

/// Why unmerging stopped. What was broken so far stays broken, the rest stays merged and registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnmergeError {
    /// No memory for the private copies (K-064). Free some, or raise the group's limit, and try again. A
    /// caller that speaks KSM's interface turns it into EAGAIN (K-127).
    #[error("no memory to unmerge page {} of mapping {}", .0.offset, .0.mapping)]
    NoMemory(Site),
    /// A signal is pending (K-067): restart the call if it was harmless.
    #[error("interrupted while unmerging page {} of mapping {}", .0.offset, .0.mapping)]
    Interrupted(Site),
    /// The host could not try.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// What a writer that announced itself may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteVerdict {
    /// All pages are its own and unprotected: let it write.
    Go,
    /// Some are still merged, for `why`. Hold it back; every step tries again and names the span in
    /// [`crate::scanner::Step::released`] once it may go.
    Wait {
        /// What stopped the break.
        why: UnmergeError,
    },
}

/// Pages of a range observed at a time while unmerging.
const UNMERGE_PAGES: PageCount = PageCount(4096);

impl Engine {
    /// Takes `span` out of the engine: breaks everything merged in it, then takes its mark off (K-066,
    /// K-120). What was never registered is passed over (K-069).
    ///
    /// # Errors
    /// [`UnmergeError`]: the whole span keeps its mark.
    pub fn unregister(&mut self, host: &mut dyn MergeHost, span: Span) -> Result<(), UnmergeError> {
        self.unmerge_all_in(host, span)?;
        for range in self.registry.ranges_in(span) {
            // The records stay for the scanner (K-052), but nobody may find a mate there any more (K-128).
            self.take_out_waiting(range);
        }
        self.registry.unmark(span);
        Ok(())
    }

    /// A writer announced itself for `span` and is held back: breaks what is merged there (design 4). The
    /// host refuses new protections of pages that a writer has open (`Busy`).
    pub fn written(&mut self, host: &mut dyn MergeHost, span: Span) -> WriteVerdict {
        match self.unmerge_all_in(host, span) {
            Ok(()) => WriteVerdict::Go,
            Err(why) => {
                self.debts.breaks.push(span);
                WriteVerdict::Wait { why }
            }
        }
    }

    /// A mapping was truncated: pages from `from` on are gone, with whatever they showed (K-063). The notice may come late
    /// (inotify tells of `O_TRUNC` afterwards), when the file has grown and merged again: so records go by what the
    /// host shows now. What can't be looked at is left to the next pass.
    pub fn truncated(&mut self, host: &mut dyn MergeHost, mapping: MappingId, from: PageIndex) {
        if self.registry.get(mapping).is_some() {
            for range in self.registry.ranges_in(make_span(mapping, from.0, u64::MAX - from.0)) {
                if let Err(error) = self.reconcile_range(host, range) {
                    self.count(range, Decision::HostError, 1);
                    self.errors.push(error);
                }
            }
        }
        self.settle(host);
    }

    /// Brings the records of a registered range into line with what the host shows.
    fn reconcile_range(&mut self, host: &mut dyn MergeHost, range: Span) -> Result<(), HostError> {
        let mut at = range.start;
        let mut seen: Vec<Observed> = Vec::new();
        while at < range.end() {
            seen.clear();
            let from = Site { mapping: range.mapping, offset: at };
            let Visit::Upto { next } = host.observe(from, range.end(), UNMERGE_PAGES, &mut seen)? else {
                self.registry.mark_exiting(range.mapping);
                return Ok(());
            };
            let chunk = checked_chunk(range, at, next, &seen);
            self.reconcile(host, chunk, &seen);
            at = next;
        }
        Ok(())
    }

    /// A mapping is about to be torn down. Never waits (K-090): without records it is forgotten at once
    /// (K-095), else the scanner does so with its next step, which even a stopped engine takes (K-096,
    /// K-102). An unknown mapping is fine (K-097).
    pub fn exit(&mut self, mapping: MappingId) {
        let at_cursor = self.cursor.is_some_and(|c| c.mapping == mapping);
        if self.records.any(mapping) || at_cursor {
            self.registry.mark_exiting(mapping);
        } else {
            self.debts.forget(mapping);
            self.registry.remove(mapping);
        }
    }

    /// The host moved shared pages: `from` are `to` now (M-001, M-011), on memory node `node`, and with
    /// `place` at another place on disk. Call it before anyone can see the new pages. Pages of `from`
    /// that have no site any more are passed over.
    ///
    /// # Panics
    /// When a page of `to` is one the engine knows already (M-012: the locators contradict each other).
    pub fn relocated(&mut self, from: SharedSpan, to: SharedSpan, node: NodeId, place: Option<Identity>) {
        assert_eq!(from.pages, to.pages, "a relocation keeps the number of pages");
        let node = (!self.knobs.merge_across_nodes).then_some(node);
        let holders = self.records.holders(from, None);
        let mut moved = Vec::new();
        for holder in &holders {
            let owner = self.owner(holder.site);
            for piece in self.records.leave(owner, holder.site).pieces {
                moved.push((owner, make_span(holder.site.mapping, piece.start, piece.pages), piece.value));
            }
        }
        assert!(self.records.sharers(to) == (None, to.pages.0), "{to:?} is in use already (M-012)");
        for indexes in self.domains.values_mut() {
            indexes.stable.relocate(from, to, node, place.and_then(Place::of));
        }
        // A page that nobody shows any more and whose release failed moves like any other.
        let owed = std::mem::take(&mut self.debts.release);
        self.debts.release = owed.into_iter().flat_map(|span| followed(span, from, to)).collect();
        for (owner, span, record) in moved {
            let SiteState::Shared { page, private } = record.state else { unreachable!("a holder shares") };
            let page = to.start.plus(PageCount(page.0 - from.start.0));
            self.records.enter(owner, span, SiteRecord::new(SiteState::Shared { page, private }));
            self.records.counters.count(owner, Decision::Relocated, span.pages);
        }
        self.records.counters.assert_identity();
    }

    /// Writes `run` (K-070..K-073, K-133). The value already set does nothing. True when a waiting
    /// scanner must be woken (K-046).
    ///
    /// # Errors
    /// [`UnmergeError`] when unmerging everything failed: `run` is then 0, so that writing 2 again is a
    /// new attempt (K-072).
    pub fn set_run(&mut self, host: &mut dyn MergeHost, run: Run) -> Result<bool, UnmergeError> {
        if run == self.run {
            return Ok(false);
        }
        self.run = run;
        if run != Run::Unmerge {
            return Ok(run == Run::Merge);
        }
        let result = self.unmerge_everything(host);
        self.cursor = None;
        self.settle(host);
        match result {
            Ok(()) => {
                self.records.counters.full_scans = 0;
                let gauges = self.total().gauges;
                assert!(gauges.is_zero(), "pages are left after run=2: {gauges:?} (K-071)");
                Ok(false)
            }
            Err(error) => {
                self.run = Run::Stop;
                Err(error)
            }
        }
    }

    fn unmerge_everything(&mut self, host: &mut dyn MergeHost) -> Result<(), UnmergeError> {
        let mappings: Vec<_> = self.registry.mappings().collect();
        // Candidates are hints only. They go first, so that the unstable indexes may be emptied and the pass
        // number raised even if unmerging fails half-way (K-074).
        for mapping in &mappings {
            for (span, record) in self.records.pieces(make_span(*mapping, 0, u64::MAX)) {
                if !record.state.is_merged() {
                    self.forget(span);
                }
            }
        }
        self.begin_pass();
        for mapping in mappings {
            if host.is_exiting(mapping) || self.registry.is_exiting(mapping) {
                self.sweep_one(mapping);
                continue;
            }
            for range in self.registry.ranges(mapping) {
                self.unmerge(host, range, Decision::Broken)?;
            }
            if self.registry.is_exiting(mapping) {
                self.sweep_one(mapping);
                continue;
            }
            let all = make_span(mapping, 0, u64::MAX);
            let merged = self.records.pieces(all).iter().any(|(_, r)| r.state.is_merged());
            assert!(!merged, "mapping {mapping} has merged pages outside its registered ranges (K-066)");
            self.forget(all);
        }
        Ok(())
    }

    fn unmerge_all_in(&mut self, host: &mut dyn MergeHost, span: Span) -> Result<(), UnmergeError> {
        let mut result = Ok(());
        for range in self.registry.ranges_in(span) {
            result = self.unmerge(host, range, Decision::Broken);
            if result.is_err() {
                break;
            }
        }
        self.settle(host);
        result
    }

    /// Breaks everything merged in a registered range, by what the host shows.
    fn unmerge(&mut self, host: &mut dyn MergeHost, range: Span, why: Decision) -> Result<(), UnmergeError> {
        let mut at = range.start;
        let mut seen: Vec<Observed> = Vec::new();
        while at < range.end() {
            if self.registry.is_exiting(range.mapping) {
                return Ok(());
            }
            seen.clear();
            let from = Site { mapping: range.mapping, offset: at };
            let next = match host.observe(from, range.end(), UNMERGE_PAGES, &mut seen)? {
                Visit::Upto { next } => next,
                Visit::Gone => {
                    self.registry.mark_exiting(range.mapping);
                    return Ok(());
                }
            };
            let chunk = checked_chunk(range, at, next, &seen);
            self.reconcile(host, chunk, &seen);
            for o in &seen {
                if matches!(o.shown, Shown::Shared { .. } | Shown::SharedZero { .. }) {
                    self.break_run(host, o.span, why)?;
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Breaks a run that shows shared pages. Its records become volatile as far as it got, then its
    /// protection is lifted (design 3: a site leaves the stable index first).
    pub(crate) fn break_run(
        &mut self,
        host: &mut dyn MergeHost,
        span: Span,
        why: Decision,
    ) -> Result<(), UnmergeError> {
        let mut at = 0;
        while at < span.pages.0 {
            let rest = part(span, at, span.pages.0 - at);
            let wide = self.widened(host, rest);
            let broken = self.listeners.bracket(
                wide,
                |told| break_span(host, rest, told),
                |r| r.as_ref().map_or(PageCount(0), |o| o.done),
            );
            let outcome = match broken {
                Ok(outcome) => outcome,
                Err(error) => {
                    self.count(rest, Decision::HostError, rest.pages.0);
                    return Err(error.into());
                }
            };
            let done = outcome.done.0;
            if done > 0 {
                self.unmerged(host, part(rest, 0, done));
                self.count(span, why, done);
            }
            at += done;
            let site = Site { mapping: span.mapping, offset: span.start.plus(PageCount(at)) };
            match outcome.stop {
                BreakStop::Complete => {}
                BreakStop::Truncated | BreakStop::NotShared => {
                    self.unmerged(host, part(span, at, 1));
                    self.count(span, Decision::BreakVanished, 1);
                    at += 1;
                }
                BreakStop::NoMemory => {
                    self.count(span, Decision::BreakNoMemory, span.pages.0 - at);
                    return Err(UnmergeError::NoMemory(site));
                }
                BreakStop::Interrupted => return Err(UnmergeError::Interrupted(site)),
                BreakStop::Exiting => {
                    self.registry.mark_exiting(span.mapping);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// These pages show nothing shared any more: their records say so, then the protection goes.
    pub(crate) fn unmerged(&mut self, host: &mut dyn MergeHost, span: Span) {
        for piece in self.forget(span) {
            let part = make_span(span.mapping, piece.start, piece.pages);
            let owner = self.owner(span);
            self.records.enter(owner, part, SiteRecord { state: SiteState::Volatile, ..piece.value });
        }
        self.lift(host, span);
    }

    /// Brings records into line with what the host showed of `chunk`: what it did not report is absent,
    /// and what it reports as a mapping's own page is not merged (the kernel copied for a store).
    pub(crate) fn reconcile(&mut self, host: &mut dyn MergeHost, chunk: Span, seen: &[Observed]) {
        let mut at = chunk.start.0;
        for o in seen {
            self.drop_records(host, make_span(chunk.mapping, at, o.span.start.0 - at), Decision::Dropped);
            at = o.span.end().0;
            match o.shown {
                Shown::Own { .. } => {
                    for (span, record) in self.records.pieces(o.span) {
                        if record.state.is_merged() {
                            self.count(span, Decision::CowBroken, span.pages.0);
                            self.unmerged(host, span);
                        }
                    }
                }
                Shown::Unsuitable => self.drop_records(host, o.span, Decision::Dropped),
                Shown::Shared { .. } | Shown::SharedZero { .. } => {}
            }
        }
        let rest = make_span(chunk.mapping, at, chunk.end().0 - at);
        self.drop_records(host, rest, Decision::Dropped);
    }

    /// Drops all records inside `span`, and the protections of those that were merged.
    pub(crate) fn drop_records(&mut self, host: &mut dyn MergeHost, span: Span, why: Decision) {
        if span.pages.0 == 0 {
            return;
        }
        for piece in self.forget(span) {
            let part = make_span(span.mapping, piece.start, piece.pages);
            self.count(part, why, piece.pages);
            if piece.value.state.is_merged() {
                self.lift(host, part);
            }
        }
    }

    /// Cleans up after one exiting mapping. Its pages and protections go with it: no call to the host for
    /// them (K-098, K-113).
    pub(crate) fn sweep_one(&mut self, mapping: MappingId) {
        let all = make_span(mapping, 0, u64::MAX);
        for piece in self.forget(all) {
            self.count(all, Decision::Exited, piece.pages);
        }
        self.debts.forget(mapping);
        self.registry.remove(mapping);
        if let Some(cursor) = self.cursor.as_mut().filter(|c| c.mapping == mapping) {
            cursor.at = PageIndex(0);
        }
    }

    /// Cleans up after all exiting mappings, also while stopped (K-102).
    pub(crate) fn sweep(&mut self) {
        while let Some(mapping) = self.registry.first_exiting() {
            self.sweep_one(mapping);
        }
    }
}

/// The part of `range` that an observation covered.
///
/// # Panics
/// When the host reported pages out of order, out of range, or made no headway: records would be dropped
/// that are in use.
pub(crate) fn checked_chunk(range: Span, from: PageIndex, next: PageIndex, seen: &[Observed]) -> Span {
    assert!(from < next && next <= range.end(), "observe went from {from} to {next} of {range:?}");
    let mut at = from;
    for o in seen {
        let sound = o.span.mapping == range.mapping && at <= o.span.start && o.span.pages.0 > 0;
        assert!(
            sound && o.span.end() <= next,
            "observe reported {o:?} out of order or outside {from}..{next}"
        );
        at = o.span.end();
    }
    make_span(range.mapping, from.0, next.0 - from.0)
}
/// `span` after the pages `from` moved to `to`: what lies before, within and after, where there is any.
fn followed(span: SharedSpan, from: SharedSpan, to: SharedSpan) -> impl Iterator<Item = SharedSpan> {
    let first = from.start.max(span.start);
    let last = from.end().min(span.end());
    let between = |start: SharedPage, end: SharedPage| SharedSpan {
        start,
        pages: PageCount(end.0.saturating_sub(start.0)),
    };
    let pieces = if first >= last {
        [span, between(span.end(), span.end()), between(span.end(), span.end())]
    } else {
        let new = to.start.plus(PageCount(first.0 - from.start.0));
        let inside = SharedSpan { start: new, pages: PageCount(last.0 - first.0) };
        [between(span.start, first), inside, between(last, span.end())]
    };
    pieces.into_iter().filter(|piece| piece.pages.0 > 0)
}
