//! A map from runs of consecutive numbers to values that advance with the number.
//!
//! Purpose: ten million consecutive pages are one entry (design section 4), while every operation is
//! exact to the page. Invariant: runs don't overlap, are never empty, and no two neighbours could be one.
//! What it deliberately does not do: overwrite. [`RunMap::put`] wants vacant numbers, so that whoever
//! replaces something must say what becomes of the old.

use std::collections::BTreeMap;
use std::fmt::Debug;

/// A value of a run: known for the first number, derived for the others.
pub(crate) trait RunValue: Copy + PartialEq + Debug {
    /// The value `by` numbers further on.
    fn advance(self, by: u64) -> Self;

    /// Whether `next`, `pages` numbers further on, continues the same run.
    fn joins(self, pages: u64, next: Self) -> bool {
        self.advance(pages) == next
    }
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece<V> {
    /// First number.
    pub start: u64,
    /// How many, at least 1.
    pub pages: u64,
    /// Value of the first.
    pub value: V,
}

/// See the module. `P` is a prefix within which numbers are consecutive.
#[derive(Clone, Debug)]
pub(crate) struct RunMap<P, V> {
    map: BTreeMap<(P, u64), (u64, V)>,
}

impl<P, V> Default for RunMap<P, V> {
    fn default() -> Self {
        RunMap { map: BTreeMap::new() }
    }
}

impl<P: Ord + Copy + Debug, V: RunValue> RunMap<P, V> {
    /// Number of entries, which is what memory is paid for.
    pub fn entries(&self) -> usize {
        self.map.len()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.map.clear();
    }

    /// The value at `at` and how many numbers from there the run still has.
    pub fn get(&self, prefix: P, at: u64) -> Option<(V, u64)> {
        let run = self.run_at(prefix, at)?;
        let into = at - run.start;
        Some((run.value.advance(into), run.pages - into))
    }

    /// The whole run around `at`.
    pub fn run_at(&self, prefix: P, at: u64) -> Option<Piece<V>> {
        let ((p, start), (pages, value)) = self.map.range(..=(prefix, at)).next_back()?;
        let inside = *p == prefix && at - start < *pages;
        inside.then_some(Piece { start: *start, pages: *pages, value: *value })
    }

    /// What is at `at`, and for how many of at most `most` numbers that (or the gap) goes on.
    pub fn segment(&self, prefix: P, at: u64, most: u64) -> (Option<V>, u64) {
        if let Some((value, left)) = self.get(prefix, at) {
            return (Some(value), left.min(most));
        }
        let next = self.map.range((prefix, at)..).next().filter(|((p, _), _)| *p == prefix);
        (None, next.map_or(most, |((_, start), _)| (start - at).min(most)))
    }

    /// The parts of runs inside `start .. start + pages`, ascending.
    pub fn pieces(&self, prefix: P, start: u64, pages: u64) -> impl Iterator<Item = Piece<V>> + '_ {
        let end = start.saturating_add(pages);
        let head = self.get(prefix, start).filter(|_| pages > 0).map(|(value, left)| Piece {
            start,
            pages: left.min(pages),
            value,
        });
        let from = head.map_or(start, |p| p.start + p.pages);
        let rest = if from < end { Some(self.map.range((prefix, from)..(prefix, end))) } else { None };
        head.into_iter().chain(rest.into_iter().flatten().map(move |((_, s), (n, v))| Piece {
            start: *s,
            pages: (*n).min(end - s),
            value: *v,
        }))
    }

    /// Everything, in order.
    pub fn all(&self) -> impl Iterator<Item = (P, Piece<V>)> + '_ {
        self.map.iter().map(|((p, s), (n, v))| (*p, Piece { start: *s, pages: *n, value: *v }))
    }

    /// Takes out what lies inside `start .. start + pages` and returns it, ascending.
    pub fn cut(&mut self, prefix: P, start: u64, pages: u64) -> Vec<Piece<V>> {
        let out: Vec<_> = self.pieces(prefix, start, pages).collect();
        for piece in &out {
            self.cut_inside_one(prefix, *piece);
        }
        out
    }

    fn cut_inside_one(&mut self, prefix: P, piece: Piece<V>) {
        let entry = self.map.range_mut(..=(prefix, piece.start)).next_back();
        let (&(_, start), slot) = entry.expect("a piece lies inside a run");
        let (pages, value) = *slot;
        let (before, end) = (piece.start - start, start + pages);
        if before == 0 {
            self.map.remove(&(prefix, start));
        } else {
            slot.0 = before;
        }
        let after = end - (piece.start + piece.pages);
        if after > 0 {
            let by = pages - after;
            self.map.insert((prefix, start + by), (after, value.advance(by)));
        }
    }

    /// Enters a run over vacant numbers and joins it with its neighbours where they continue each other.
    ///
    /// # Panics
    /// When it is empty or any number is taken: the caller's book-keeping is broken.
    pub fn put(&mut self, prefix: P, start: u64, pages: u64, value: V) {
        assert!(pages > 0 && start.checked_add(pages).is_some(), "a run of {pages} at {start} is none");
        assert_eq!(
            self.segment(prefix, start, pages),
            (None, pages),
            "run {prefix:?} {start}+{pages} is taken"
        );
        let (mut first, mut len, mut value) = (start, pages, value);
        let before = self.map.range(..(prefix, start)).next_back().map(|(k, v)| (*k, *v));
        if let Some(((p, s), (n, v))) = before
            && p == prefix
            && s + n == start
            && v.joins(n, value)
        {
            (first, len, value) = (s, n + pages, v);
            self.map.remove(&(prefix, s));
        }
        if let Some(&(n, v)) = self.map.get(&(prefix, start + pages))
            && value.joins(len, v)
        {
            self.map.remove(&(prefix, start + pages));
            len += n;
        }
        self.map.insert((prefix, first), (len, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Lin(u64);
    impl RunValue for Lin {
        fn advance(self, by: u64) -> Self {
            Lin(self.0 + by)
        }
    }

    #[test]
    fn ten_million_consecutive_pages_are_one_entry() {
        let mut map = RunMap::default();
        for chunk in 0..10_000 {
            map.put(0u8, chunk * 1000, 1000, Lin(7 + chunk * 1000));
        }
        assert_eq!(map.entries(), 1);
        assert_eq!(map.cut(0, 5_000_000, 1).len(), 1);
        assert_eq!(map.entries(), 2);
        map.put(0, 5_000_000, 1, Lin(5_000_007));
        assert_eq!(map.entries(), 1);
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn put_never_overwrites() {
        let mut map = RunMap::default();
        map.put(0u8, 10, 5, Lin(0));
        map.put(0u8, 14, 1, Lin(9));
    }

    proptest! {
        /// The map is the same as one entry a page, whatever is done to it, and never holds two runs that
        /// could be one.
        #[test]
        fn is_exact_to_the_page(ops in proptest::collection::vec((0u8..2, 0u64..40, 1u64..12, 0u64..3), 1..60)) {
            let mut map = RunMap::default();
            let mut model: BTreeMap<(u8, u64), u64> = BTreeMap::new();
            for (prefix, start, pages, base) in ops {
                let cut: u64 = map.cut(prefix, start, pages).iter().map(|p| p.pages).sum();
                let known = (start..start + pages).filter(|n| model.remove(&(prefix, *n)).is_some()).count();
                prop_assert_eq!(cut, known as u64);
                if base > 0 {
                    map.put(prefix, start, pages, Lin(start + base * 1000));
                    model.extend((start..start + pages).map(|n| ((prefix, n), n + base * 1000)));
                }
                for p in 0..2 {
                    for n in 0..60 {
                        prop_assert_eq!(map.get(p, n).map(|(v, _)| v.0), model.get(&(p, n)).copied());
                    }
                }
                let all: Vec<_> = map.all().collect();
                for pair in all.windows(2) {
                    let ((p, a), (q, b)) = (pair[0], pair[1]);
                    prop_assert!(p != q || a.start + a.pages < b.start
                        || (a.start + a.pages == b.start && !a.value.joins(a.pages, b.value)));
                }
            }
        }
    }
}
