//! Which pages of an open file are in the page cache: `cachestat` first, `mincore` only where a file is partly resident.
//!
//! A sparse file may be terabytes long with a few pages cached, so a partly resident file is halved with `cachestat`
//! until a piece is empty, full, or small enough for `mincore`: the cost follows what is cached, not the size.
//! What it deliberately does not do: open anything, or find the real inode of an overlay file (`overlay` does).

use std::io;
use std::os::fd::BorrowedFd;

use pagefold_engine::units::{PageCount, PageIndex, PageSize};
use pagefold_sys::cache::{cachestat, mincore_range};

use crate::source::Residency;

/// Pages that are looked at one by one rather than halved once more: one 64 KiB `mincore` vector.
const MINCORE_PAGES: u64 = 1 << 16;

/// Bytes of a file that are asked for page by page without knowing that anything is cached: about a second.
const MINCORE_BYTES_MAX: u64 = 1 << 40;

/// Residency of bytes `0 .. size` of `fd`, of which `cachestat` just counted `cached` pages.
///
/// # Errors
/// As `cachestat` and `mincore`.
pub fn of_counted(fd: BorrowedFd<'_>, size: u64, cached: u64, page: PageSize) -> io::Result<Residency> {
    let pages = page.pages_covering(size).0;
    if cached == 0 {
        return Ok(Residency::None);
    }
    if cached >= pages {
        return Ok(Residency::All);
    }
    let mut runs = Runs::default();
    // Pieces still to look at, last first: (first page, pages, how many are cached).
    let mut pieces = vec![(0, pages, cached)];
    while let Some((start, pages, cached)) = pieces.pop() {
        if cached == 0 {
            continue;
        }
        if cached >= pages {
            runs.add(start, pages);
        } else if pages <= MINCORE_PAGES && can_be_mapped(start + pages, page) {
            let end = ((start + pages) << page.shift()).min(size);
            mincore_range(fd, start << page.shift(), end, |first, count| runs.add(first, count))?;
        } else {
            let half = (pages / 2).next_multiple_of(MINCORE_PAGES).min(pages - 1);
            let left = cachestat(fd, start << page.shift(), half << page.shift())?.nr_cache.min(cached);
            pieces.push((start + half, pages - half, cached - left));
            pieces.push((start, half, left));
        }
    }
    Ok(runs.into_residency(pages))
}

/// The kernel maps no page that reaches beyond the largest file offset: of a file of 8 EiB - 1 not the last one.
fn can_be_mapped(end: u64, page: PageSize) -> bool {
    end.checked_mul(page.bytes()).is_some_and(|end| end <= i64::MAX.cast_unsigned())
}

/// Residency by `mincore` alone, where `cachestat` can't tell (overlayfs, kernels before 6.5). Costs time by `size`.
///
/// Of a file beyond `MINCORE_BYTES_MAX` nothing is claimed: a sparse file of 8 EiB would take months.
///
/// # Errors
/// As `mincore`.
pub fn by_mincore(fd: BorrowedFd<'_>, size: u64, page: PageSize) -> io::Result<Residency> {
    if size > MINCORE_BYTES_MAX {
        return Ok(Residency::Unknown);
    }
    let mut runs = Runs::default();
    mincore_range(fd, 0, size, |first, count| runs.add(first, count))?;
    Ok(runs.into_residency(page.pages_covering(size).0))
}

/// Runs in ascending order, adjacent ones joined.
#[derive(Default)]
struct Runs(Vec<(PageIndex, PageCount)>);

impl Runs {
    fn add(&mut self, first: u64, count: u64) {
        match self.0.last_mut() {
            Some((start, pages)) if start.0 + pages.0 == first => pages.0 += count,
            _ => self.0.push((PageIndex(first), PageCount(count))),
        }
    }

    fn into_residency(self, pages: u64) -> Residency {
        match self.0[..] {
            [] => Residency::None,
            [(PageIndex(0), PageCount(all))] if all >= pages => Residency::All,
            _ => Residency::Runs(self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    fn page() -> PageSize {
        PageSize::new(rustix::param::page_size() as u64).expect("the kernel's page size is one")
    }

    #[test]
    fn a_page_far_out_in_a_huge_sparse_file_is_found() {
        let mut file = tempfile::tempfile().expect("temp file");
        let far = 1 << 40;
        file.seek(SeekFrom::Start(far)).and_then(|_| file.write_all(b"x")).expect("write far out");
        let (size, bytes) = (far + 1, page().bytes());
        let count = cachestat(file.as_fd(), 0, size.next_multiple_of(bytes)).expect("cachestat").nr_cache;
        assert_eq!(count, 1, "the page just written is cached");
        let found = of_counted(file.as_fd(), size, count, page()).expect("residency");
        assert_eq!(found, Residency::Runs(vec![(PageIndex(far / bytes), PageCount(1))]));
    }

    #[test]
    fn a_file_just_written_is_all_resident_both_ways() {
        let mut file = tempfile::tempfile().expect("temp file");
        let size = 10 * page().bytes() + 1;
        file.write_all(&vec![1; size as usize]).expect("write");
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut Vec::new())).expect("read");
        assert_eq!(of_counted(file.as_fd(), size, 11, page()).expect("residency"), Residency::All);
        assert_eq!(by_mincore(file.as_fd(), size, page()).expect("residency"), Residency::All);
    }
}
