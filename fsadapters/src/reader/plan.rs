//! From page ranges to reads: adjacent ranges joined, long ones cut, EOF respected.

use pagefold_engine::units::{PageCount, PageIndex};

/// One read and where its hashes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Position of its first page among the pages of the job.
    pub(super) first_hash: usize,
    /// Where in the file, in bytes; a page boundary.
    pub(super) offset: u64,
    /// Pages.
    pub(super) pages: usize,
}

/// The reads for `ranges`, each of at most `pages_max` pages. Ranges whose end does not fit 64 bits are refused.
pub(super) fn chunks(
    ranges: &[(PageIndex, PageCount)],
    page: u64,
    pages_max: usize,
) -> Option<(Vec<Chunk>, usize)> {
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, pages) in ranges.iter().map(|(s, p)| (s.0, p.0)).filter(|(_, p)| *p > 0) {
        start.checked_add(pages)?.checked_mul(page)?;
        match joined.last_mut() {
            Some((first, count)) if *first + *count == start => *count += pages,
            _ => joined.push((start, pages)),
        }
    }
    let mut out = Vec::new();
    let mut first_hash = 0;
    for (start, pages) in joined {
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(pages_max as u64);
            out.push(Chunk { first_hash, offset: (start + at) * page, pages: count as usize });
            first_hash += count as usize;
            at += count;
        }
    }
    Some((out, first_hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ranges: &[(u64, u64)], max: usize) -> (Vec<(usize, u64, usize)>, usize) {
        let ranges: Vec<_> = ranges.iter().map(|(s, p)| (PageIndex(*s), PageCount(*p))).collect();
        let (chunks, total) = chunks(&ranges, 4096, max).unwrap();
        (chunks.iter().map(|c| (c.first_hash, c.offset / 4096, c.pages)).collect(), total)
    }

    #[test]
    fn joins_cuts_and_counts() {
        assert_eq!(plan(&[], 4), (vec![], 0));
        assert_eq!(plan(&[(0, 2), (2, 1), (9, 0)], 4), (vec![(0, 0, 3)], 3));
        assert_eq!(
            plan(&[(0, 3), (7, 5)], 2),
            (vec![(0, 0, 2), (2, 2, 1), (3, 7, 2), (5, 9, 2), (7, 11, 1)], 8)
        );
    }

    #[test]
    fn absurd_ranges_are_refused() {
        for range in [(u64::MAX, 1), (1 << 60, 1), (0, 1 << 60)] {
            assert!(chunks(&[(PageIndex(range.0), PageCount(range.1))], 4096, 4).is_none(), "{range:?}");
        }
    }
}
