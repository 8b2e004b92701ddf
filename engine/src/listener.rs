//! Secondary users of pages (caches, readers, owners of records) and how they are told that pages change.
//!
//! Invariant: every change of what a site shows is bracketed by `start` and `end` (H-022), every path
//! after a `start` reaches its `end` (H-023: the bracket is a closure), and `invalidate` comes in
//! between, while nobody can use the new entry yet (H-021: from inside the host's critical section).
//! Spans are widened to the largest unit that may be shared (H-031). Telling too much is allowed, too
//! little is not (H-024).

use crate::units::{PageCount, PageIndex, Span};

/// Somebody who keeps translations or copies of pages.
pub trait Listener: Send {
    /// Pages of `span` may change from now on. Called without any lock; may block.
    fn start(&mut self, span: Span);
    /// What was known of `span` is wrong from now on. Called in the host's critical section; must not block.
    fn invalidate(&mut self, span: Span);
    /// The changes are over. Called without any lock; may block.
    fn end(&mut self, span: Span);
}

/// `span` widened to aligned windows of `unit` pages, as far as they lie wholly inside `range` (H-006).
/// The start is aligned first: stepping windows from an unaligned start misses the last one (H-007).
#[must_use]
pub fn widen(span: Span, unit: PageCount, range: Span) -> Span {
    let unit = unit.0.max(1);
    let (start, last) = (span.start.0, span.end().0 - 1);
    let window = |at: u64| (at - at % unit, (at - at % unit).saturating_add(unit));
    let inside = |(from, to): (u64, u64)| from >= range.start.0 && to <= range.end().0;
    let from = Some(window(start)).filter(|w| inside(*w)).map_or(start, |w| w.0);
    let to = Some(window(last)).filter(|w| inside(*w)).map_or(last + 1, |w| w.1);
    Span { mapping: span.mapping, start: PageIndex(from), pages: PageCount(to - from) }
}

/// The listeners of an engine.
#[derive(Default)]
pub(crate) struct Listeners {
    all: Vec<Box<dyn Listener>>,
}

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} listeners", self.all.len())
    }
}

impl Listeners {
    pub fn add(&mut self, listener: Box<dyn Listener>) {
        self.all.push(listener);
    }

    /// Runs `change` between start and end of `wide`. What it gets is the `invalidate` to hand to the host.
    ///
    /// # Panics
    /// When `change` says it changed pages but the host never invalidated: a listener would go on using
    /// old pages (H-026: silent corruption).
    pub fn bracket<T>(
        &mut self,
        wide: Span,
        change: impl FnOnce(&mut dyn FnMut(Span)) -> T,
        changed: impl FnOnce(&T) -> PageCount,
    ) -> T {
        self.all.iter_mut().for_each(|l| l.start(wide));
        let mut told = 0;
        let all = &mut self.all;
        let result = change(&mut |part: Span| {
            assert!(part.mapping == wide.mapping && part.start >= wide.start && part.end() <= wide.end());
            told += part.pages.0;
            all.iter_mut().for_each(|l| l.invalidate(wide));
        });
        self.all.iter_mut().for_each(|l| l.end(wide));
        let changed = changed(&result).0;
        assert!(
            told >= changed,
            "the host changed {changed} pages of {wide:?} and invalidated {told} (H-024)"
        );
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::make_span;
    use crate::units::MappingId;
    use std::sync::{Arc, Mutex};

    fn at(start: u64, pages: u64) -> Span {
        make_span(MappingId(1), start, pages)
    }

    #[test]
    fn widening_aligns_the_start_first_h007() {
        // Starts in the middle of one window, ends a little into the next: both windows belong to it.
        assert_eq!(widen(at(300, 220), PageCount(512), at(0, 4096)), at(0, 1024));
        assert_eq!(widen(at(300, 1), PageCount(1), at(0, 4096)), at(300, 1));
    }

    #[test]
    fn only_windows_wholly_inside_the_range_count_h006() {
        assert_eq!(widen(at(300, 220), PageCount(512), at(100, 1000)), at(300, 724));
        assert_eq!(widen(at(300, 220), PageCount(512), at(0, 1000)), at(0, 520));
    }

    struct Log(Arc<Mutex<Vec<(char, Span)>>>);
    impl Listener for Log {
        fn start(&mut self, span: Span) {
            self.0.lock().unwrap().push(('s', span));
        }
        fn invalidate(&mut self, span: Span) {
            self.0.lock().unwrap().push(('i', span));
        }
        fn end(&mut self, span: Span) {
            self.0.lock().unwrap().push(('e', span));
        }
    }

    #[test]
    fn order_is_start_invalidate_end_h021_h023() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut listeners = Listeners::default();
        listeners.add(Box::new(Log(log.clone())));
        listeners.bracket(at(0, 8), |told| told(at(2, 2)), |()| PageCount(2));
        listeners.bracket(at(8, 8), |_| "failed early", |_| PageCount(0));
        let w = [('s', at(0, 8)), ('i', at(0, 8)), ('e', at(0, 8)), ('s', at(8, 8)), ('e', at(8, 8))];
        assert_eq!(*log.lock().unwrap(), w);
    }

    #[test]
    #[should_panic(expected = "invalidated 0")]
    fn a_lost_invalidation_is_a_broken_invariant_h024() {
        Listeners::default().bracket(at(0, 8), |_| (), |()| PageCount(1));
    }
}
