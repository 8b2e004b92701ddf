//! Which physical page frames hold a file's cached pages, and which memory group is charged for a frame.
//!
//! For reports only: a frame number is true for the moment it was read. Linux has no call for it; it takes a mapping of
//! one's own, its page table entries (`/proc/self/pagemap`) and `/proc/kpagecgroup`, all for root only.
//!
//! Invariant: nothing that isn't cached is read in (but for a page that goes between question and answer). It does mark
//! pages as used: ask only when somebody wants to know.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::cache::mincore_range;

/// Bit of a pagemap entry: the page is present.
const PRESENT: u64 = 1 << 63;
/// Bits of a pagemap entry that hold the frame's number.
const FRAME: u64 = (1 << 55) - 1;
/// Pages mapped at once.
const WINDOW_PAGES: u64 = 16 << 10;

/// Page frame numbers to memory groups.
#[derive(Debug)]
pub struct Payers {
    pagemap: File,
    groups: File,
}

impl Payers {
    /// Opens what it takes.
    ///
    /// # Errors
    /// Not root; a kernel without `CONFIG_PROC_PAGE_MONITOR` or `CONFIG_MEMCG` (`ENOENT`).
    pub fn open() -> io::Result<Payers> {
        Ok(Payers { pagemap: File::open("/proc/self/pagemap")?, groups: File::open("/proc/kpagecgroup")? })
    }

    /// Calls `group` with the inode number of the memory group that each cached page among bytes `0 .. size` of `fd` is
    /// charged to; 0 where the kernel knows none.
    ///
    /// # Errors
    /// The file can't be mapped or the tables can't be read.
    pub fn of_file(&self, fd: BorrowedFd<'_>, size: u64, mut group: impl FnMut(u64)) -> io::Result<()> {
        let page = rustix::param::page_size() as u64;
        let mut runs = Vec::new();
        mincore_range(fd, 0, size, |first, pages| runs.push((first, pages)))?;
        for (first, pages) in runs {
            for start in (first..first + pages).step_by(WINDOW_PAGES as usize) {
                let count = WINDOW_PAGES.min(first + pages - start) as usize;
                let bytes = count * page as usize;
                let map = MmapOptions::new()
                    .offset(start * page)
                    .len(bytes)
                    .no_reserve_swap()
                    .map_raw_read_only(&fd)?;
                // An error instead of a signal, should the file have become shorter.
                map.advise_range(Advice::PopulateRead, 0, bytes)?;
                for frame in self.frames(&map, count, page)? {
                    group(self.group_of(frame)?);
                }
            }
        }
        Ok(())
    }

    fn frames(&self, map: &MmapRaw, pages: usize, page: u64) -> io::Result<Vec<u64>> {
        let mut entries = vec![0; pages * 8];
        let at = map.as_ptr() as u64 / page * 8;
        self.pagemap.read_exact_at(&mut entries, at)?;
        Ok(words(&entries).filter(|e| e & PRESENT != 0).map(|e| e & FRAME).collect())
    }

    fn group_of(&self, frame: u64) -> io::Result<u64> {
        let mut entry = [0; 8];
        self.groups.read_exact_at(&mut entry, frame * 8)?;
        Ok(u64::from_ne_bytes(entry))
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word))
}
