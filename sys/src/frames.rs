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

use memmap2::{Advice, MmapOptions};

use crate::cache::mincore_range;

/// Bit of a pagemap entry: the page is present.
const PRESENT: u64 = 1 << 63;
/// Bits of a pagemap entry that hold the frame's number.
const FRAME: u64 = (1 << 55) - 1;
/// Pages mapped at once.
const WINDOW_PAGES: u64 = 16 << 10;

/// Page frame numbers of this process's mappings.
#[derive(Debug)]
pub struct Frames {
    pagemap: File,
}

impl Frames {
    /// Opens what it takes.
    ///
    /// # Errors
    /// A kernel without `CONFIG_PROC_PAGE_MONITOR` (`ENOENT`). To others than root all frames are 0.
    pub fn open() -> io::Result<Frames> {
        Ok(Frames { pagemap: File::open("/proc/self/pagemap")? })
    }

    /// Calls `each` with the number (in the file) and the page frame number of every cached page among bytes `0 .. size` of
    /// `fd`, ascending. Two files that have one frame share that page of memory.
    ///
    /// # Errors
    /// The file can't be mapped or the table can't be read.
    pub fn of_file(&self, fd: BorrowedFd<'_>, size: u64, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
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
                let mut entries = vec![0; count * 8];
                self.pagemap.read_exact_at(&mut entries, map.as_ptr() as u64 / page * 8)?;
                for (number, entry) in (start..).zip(words(&entries)) {
                    if entry & PRESENT != 0 {
                        each(number, entry & FRAME);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Page frame numbers to memory groups.
#[derive(Debug)]
pub struct Payers {
    frames: Frames,
    groups: File,
}

impl Payers {
    /// Opens what it takes.
    ///
    /// # Errors
    /// Not root; a kernel without `CONFIG_PROC_PAGE_MONITOR` or `CONFIG_MEMCG` (`ENOENT`).
    pub fn open() -> io::Result<Payers> {
        Ok(Payers { frames: Frames::open()?, groups: File::open("/proc/kpagecgroup")? })
    }

    /// Calls `group` with the inode number of the memory group that each cached page among bytes `0 .. size` of `fd` is
    /// charged to; 0 where the kernel knows none.
    ///
    /// # Errors
    /// The file can't be mapped or the tables can't be read.
    pub fn of_file(&self, fd: BorrowedFd<'_>, size: u64, mut group: impl FnMut(u64)) -> io::Result<()> {
        let mut frames = Vec::new();
        self.frames.of_file(fd, size, |_, frame| frames.push(frame))?;
        frames.into_iter().try_for_each(|frame| {
            group(self.group_of(frame)?);
            Ok(())
        })
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
