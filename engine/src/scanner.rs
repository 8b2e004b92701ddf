//! The scanner: passes over everything registered, a batch at a time.
//!
//! Invariants: a step visits at most about `pages_to_scan` present pages and comes back; after a pass
//! every record was visited in it or dropped, so that no unstable item is ever older than one pass
//! (K-081); with nobody registered, or while stopped, nothing is scanned and no counter moves but those
//! of cleaning up (K-040, K-041, K-042).

use crate::control::{WriteVerdict, checked_chunk};
use crate::counters::Decision;
use crate::domain::{Route, make_span};
use crate::engine::{Cursor, Engine};
use crate::host::{HostError, MergeHost, Visit};
use crate::policy::{Action, Run, Tick};
use crate::record::{SiteRecord, SiteState};
use crate::units::{MappingId, PageCount, PageIndex, Site, Span};

/// What a step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do until the next.
    pub action: Action,
    /// Present pages visited.
    pub scanned: PageCount,
    /// Writers' spans that are now broken: those who were told to wait may go (see
    /// [`crate::control::WriteVerdict::Wait`]).
    pub released: Vec<Span>,
    /// Operations the host could not carry out; the engine went on.
    pub errors: Vec<HostError>,
}

/// Pages observed at a time of mappings that are judged by place: a run costs the same however long it is.
const PLACE_PAGES: u64 = 4096;

impl Engine {
    /// Scans one batch, after paying what is owed and cleaning up after exits.
    ///
    /// # Panics
    /// When an invariant of the engine is broken (K-028, K-081, ...): stop merging; nothing it would do
    /// now can be trusted.
    pub fn step(&mut self, host: &mut dyn MergeHost, now: Tick) -> Step {
        self.errors.clear();
        self.sweep();
        self.settle_protections(host);
        let released = self.settle_breaks(host);
        let mut scanned = 0;
        if self.run == Run::Merge {
            let budget = self.knobs.pages_to_scan.max(1);
            let mut spent = 0;
            while spent < budget && !self.registry.is_empty() {
                let Some((cost, pages)) = self.visit_next(host, budget - spent) else { break };
                spent += cost.max(1);
                scanned += pages;
            }
        }
        self.sweep();
        self.settle(host);
        let idle = self.run != Run::Merge || self.registry.is_empty();
        let action = if idle && self.debts.is_empty() {
            Action::Wait
        } else {
            Action::SleepUntil(Tick(now.0.saturating_add(self.knobs.sleep_millisecs)))
        };
        Step { action, scanned: PageCount(scanned), released, errors: std::mem::take(&mut self.errors) }
    }

    fn settle_breaks(&mut self, host: &mut dyn MergeHost) -> Vec<Span> {
        let mut released = Vec::new();
        for span in std::mem::take(&mut self.debts.breaks) {
            if self.written(host, span) == WriteVerdict::Go {
                released.push(span);
            }
        }
        released
    }

    /// Empties the unstable indexes for a new pass (K-083).
    pub(crate) fn begin_pass(&mut self) {
        self.generation += 1;
        let pass = self.pass();
        self.domains.values_mut().for_each(|d| d.unstable.reset(pass));
    }

    /// Visits the next piece of work at the cursor. `None` when a pass ended; else what it cost and how
    /// many pages it saw.
    fn visit_next(&mut self, host: &mut dyn MergeHost, budget: u64) -> Option<(u64, u64)> {
        let cursor = self.cursor.unwrap_or_else(|| {
            // The index of the last pass stood unsearched until now; what is removed in between has age 1
            // (K-083).
            let pass = self.pass();
            self.domains.values_mut().for_each(|d| d.unstable.reset(pass));
            Cursor { mapping: MappingId(0), at: PageIndex(0) }
        });
        let Some(mapping) = self.registry.at_or_after(cursor.mapping) else { return self.end_pass() };
        let at = if mapping == cursor.mapping { cursor.at } else { PageIndex(0) };
        if host.is_exiting(mapping) {
            self.cursor = Some(Cursor { mapping, at });
            self.sweep_one(mapping);
            return Some((1, 0));
        }
        let Some(range) = self.registry.next_range(mapping, at) else {
            return self.leave_mapping(host, mapping, at);
        };
        self.drop_records(host, make_span(mapping, at.0, range.start.0 - at.0), Decision::Dropped);
        self.visit_range(host, range, budget)
    }

    fn end_pass(&mut self) -> Option<(u64, u64)> {
        self.cursor = None;
        self.generation += 1;
        self.records.counters.full_scans += 1;
        None
    }

    /// Records beyond the last range go before the cursor leaves (K-084); a mapping with no range left is
    /// unregistered then and there (K-085).
    fn leave_mapping(
        &mut self,
        host: &mut dyn MergeHost,
        mapping: MappingId,
        at: PageIndex,
    ) -> Option<(u64, u64)> {
        self.drop_records(host, make_span(mapping, at.0, u64::MAX - at.0), Decision::Dropped);
        if self.registry.ranges(mapping).is_empty() {
            self.sweep_one(mapping);
        }
        match mapping.0.checked_add(1) {
            Some(next) => {
                self.cursor = Some(Cursor { mapping: MappingId(next), at: PageIndex(0) });
                Some((1, 0))
            }
            None => self.end_pass(),
        }
    }

    fn visit_range(&mut self, host: &mut dyn MergeHost, range: Span, budget: u64) -> Option<(u64, u64)> {
        let reg = *self.registry.get(range.mapping).expect("a range has a mapping");
        let most = if reg.route == Route::Physical { PLACE_PAGES } else { budget };
        let mut seen = Vec::new();
        let from = Site { mapping: range.mapping, offset: range.start };
        let next = match host.observe(from, range.end(), PageCount(most), &mut seen) {
            Ok(Visit::Upto { next }) => next,
            Ok(Visit::Gone) => {
                self.cursor = Some(Cursor { mapping: range.mapping, at: range.start });
                self.sweep_one(range.mapping);
                return Some((1, 0));
            }
            Err(error) => {
                // The range is left out of this pass. What waits in it must not grow old unseen (K-081).
                self.errors.push(error);
                self.count(range, Decision::HostError, 1);
                self.take_out_waiting(range);
                self.cursor = Some(Cursor { mapping: range.mapping, at: range.end() });
                return Some((1, 0));
            }
        };
        let chunk = checked_chunk(range, range.start, next, &seen);
        self.cursor = Some(Cursor { mapping: range.mapping, at: next });
        self.take_out_waiting(chunk);
        self.reconcile(host, chunk, &seen);
        for o in &seen {
            if self.registry.is_exiting(range.mapping) {
                break;
            }
            self.visit(host, &reg, o);
        }
        let pages: u64 = seen.iter().map(|o| o.span.pages.0).sum();
        self.settle(host);
        Some((if reg.route == Route::Physical { seen.len() as u64 } else { pages }, pages))
    }

    /// Takes what waits in `span` since the last pass out, before it is judged again (K-087).
    pub(crate) fn take_out_waiting(&mut self, span: Span) {
        for (part, record) in self.records.pieces(span) {
            if matches!(record.state, SiteState::Unstable { .. }) {
                self.set(part, SiteRecord { state: SiteState::Volatile, ..record });
            }
        }
    }
}
