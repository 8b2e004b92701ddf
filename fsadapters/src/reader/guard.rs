//! Gives the page cache back as it was: remembers which pages were cached before reading and drops those that came in since.
//!
//! Invariant: a page that was cached before is never dropped, and nothing is dropped when that could not be known. What it
//! deliberately does not do: tell our pages from those that somebody else read meanwhile; such a page is read again by who needs it.

use std::os::fd::{AsFd, BorrowedFd};

use pagefold_engine::units::{PageCount, PageIndex};
use pagefold_sys::cache;

/// What was cached of a job's ranges.
#[derive(Debug, PartialEq, Eq)]
enum Before {
    /// Nothing.
    Empty,
    /// Everything: nothing can come in.
    All,
    /// These (first page, pages), ascending.
    Runs(Vec<(u64, u64)>),
    /// Not known: nothing will be dropped.
    Unknown,
}

/// The state before.
#[derive(Debug)]
pub(crate) struct CacheGuard {
    before: Before,
    /// `cachestat` speaks of another mapping than the one that holds the pages (overlayfs).
    stat_lies: bool,
}

impl CacheGuard {
    /// Remembers. `stat_lies`: see [`crate::overlay`].
    pub(crate) fn new(file: impl AsFd, ranges: &[(PageIndex, PageCount)], stat_lies: bool) -> CacheGuard {
        let file = file.as_fd();
        let asked: u64 = ranges.iter().map(|(_, pages)| pages.0).sum();
        let counted = if stat_lies { None } else { count(file, ranges) };
        let before = match counted {
            Some(0) => Before::Empty,
            Some(cached) if cached >= asked => Before::All,
            _ if !cache::may_know_residency(file) => Before::Unknown,
            _ => resident_runs(file, ranges).map_or(Before::Unknown, Before::Runs),
        };
        CacheGuard { before, stat_lies }
    }

    /// Drops what came in.
    pub(crate) fn restore(&self, file: impl AsFd, ranges: &[(PageIndex, PageCount)]) {
        let file = file.as_fd();
        let kept: &[(u64, u64)] = match &self.before {
            Before::All | Before::Unknown => return,
            Before::Empty => &[],
            Before::Runs(runs) => runs,
        };
        let was: u64 = kept.iter().map(|(_, pages)| pages).sum();
        let now = if self.stat_lies { None } else { count(file, ranges) };
        if now.is_some_and(|now| now <= was) {
            return;
        }
        let page = rustix::param::page_size() as u64;
        for (first, pages) in ranges.iter().map(|(s, p)| (s.0, p.0)) {
            for (start, end) in gaps(first, first + pages, kept) {
                // A refusal leaves pages in cache; that is not worth failing a read for.
                let _ = cache::drop_cached(file, start * page, (end - start) * page);
            }
        }
    }
}

/// Cached pages of `ranges` by `cachestat`.
fn count(file: BorrowedFd<'_>, ranges: &[(PageIndex, PageCount)]) -> Option<u64> {
    let page = rustix::param::page_size() as u64;
    let mut sum = 0;
    for (start, pages) in ranges.iter().filter(|(_, pages)| pages.0 > 0) {
        sum += cache::cachestat(file, start.0 * page, pages.0 * page).ok()?.nr_cache;
    }
    Some(sum)
}

fn resident_runs(file: BorrowedFd<'_>, ranges: &[(PageIndex, PageCount)]) -> Option<Vec<(u64, u64)>> {
    let page = rustix::param::page_size() as u64;
    let mut runs = Vec::new();
    for (start, pages) in ranges.iter().filter(|(_, pages)| pages.0 > 0) {
        let (from, to) = (start.0 * page, (start.0 + pages.0) * page);
        cache::mincore_range(file, from, to, |first, count| runs.push((first, count))).ok()?;
    }
    Some(runs)
}

/// What of `first .. end` lies outside of `runs`, as (start, end).
fn gaps(first: u64, end: u64, runs: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let mut at = first;
    for (run, pages) in runs.iter().filter(|(run, pages)| run + pages > first && *run < end) {
        if *run > at {
            out.push((at, *run));
        }
        at = run + pages;
    }
    if at < end {
        out.push((at, end));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_runs_leave() {
        assert_eq!(gaps(10, 20, &[]), [(10, 20)]);
        assert_eq!(gaps(10, 20, &[(0, 10), (20, 5)]), [(10, 20)]);
        assert_eq!(gaps(10, 20, &[(8, 4), (15, 1), (18, 9)]), [(12, 15), (16, 18)]);
        assert_eq!(gaps(10, 20, &[(5, 50)]), []);
    }
}
