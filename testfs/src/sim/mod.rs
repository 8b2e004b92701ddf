//! A simulated kernel: file systems with extents, reflinks and a page cache, seen through
//! [`FileSource`](pagefold_fsadapters::source::FileSource), and memory mappings seen through the engine's merge host.
//!
//! Deterministic: no clock, no thread, no entropy; a seed gives one run. [`World`] is the state and all operations on
//! it; [`SimFs`] is a shareable handle.
//!
//! # Divergence from Linux
//!
//! The fake is judged by the same conformance cases as real XFS and btrfs (`conformance`). What is known to differ:
//!
//! * Time is a counter that every modification advances: two changes never carry the same ctime. Linux may give two
//!   changes within one timer tick the same one (before multigrain timestamps, 6.13).
//! * An operation is atomic, save for the moments of [`source::Moment`] and for writeback, which has a begin and an
//!   end. Linux is concurrent everywhere.
//! * A crash keeps sizes and names, and loses all data that was not written back; a file preallocated or grown and not
//!   synced then reads zeros. Linux may also go back to an older size, and has journals.
//! * Growing a file inside its last block leaves the block on disk as it is (bytes past EOF are zeros there); XFS and
//!   btrfs dirty and rewrite that block. The simulation so has files with the same extents and different sizes,
//!   which rule 4 of design section 5 is about.
//! * Freed blocks are free at once and reused early, by chance. btrfs keeps a partly overwritten extent whole, holds
//!   freed space back until the transaction commits, and XFS discards asynchronously.
//! * Compression decides by the number of distinct byte values; compressed extents take half of their length.
//! * No readahead: only pages that are read become resident. No reclaim but what a test asks for.
//! * Directories list their entries in the order of the bytes of the names.
//! * `SEEK_HOLE` counts every unwritten extent as data; Linux calls those without cached pages holes.
//! * XFS speculative preallocation past EOF is not modelled; maps end at EOF.
//! * Space is reserved when holes are written; copy-on-write of shared blocks reserves nothing and never fails.
//! * `O_NOATIME` is taken as always allowed: nothing here ever updates atime.
//! * Mappings: a fork copies pages at once instead of on write. Page faults, reclaim and swap of anonymous memory are not
//!   modelled. A file mapping is private and covers the file from its start. `O_TRUNC` slips past leases as in Linux, but
//!   takes merged pages out of mappings at once, which a real host has to do itself when it hears of it.
//! * A lease break has no time limit: a writer waits until everything is un-merged (Linux breaks by force after
//!   `lease-break-time`).
//! * Memory nodes are a function of the page's number; moving a page between nodes is not modelled, moving shared pages
//!   is.
//! * tmpfs pages are dirty for ever; `evict` does nothing to them (swap is not modelled).

pub mod bugs;
mod clone;
mod data;
pub mod disk;
mod fiemap;
pub mod flavour;
mod host;
pub mod memory;
mod node;
mod raw;
pub mod rng;
pub mod source;
#[cfg(test)]
mod tests;
pub mod user;
mod world;
mod writeback;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagefold_engine::units::PageSize;

pub use flavour::Flavour;
pub use memory::Kernel;
pub use node::{Attributes, CacheCounts, FsIx, NodeId};
pub use raw::{RawBlock, RawFile};
pub use rng::Rng;
pub use world::{Place, World};

/// An open directory of a [`SimFs`].
#[derive(Clone, Copy, Debug)]
pub struct SimDir {
    place: Place,
}

/// A handle on a simulated host; clones see the same host.
#[derive(Clone)]
pub struct SimFs {
    world: Arc<Mutex<World>>,
}

impl SimFs {
    /// A host with 4 KiB pages and one file system of `flavour` at `/`.
    #[must_use]
    pub fn new(flavour: Flavour, seed: u64) -> SimFs {
        SimFs::with_pages(flavour, PageSize::KIB4, seed)
    }

    /// The same with another page size.
    #[must_use]
    pub fn with_pages(flavour: Flavour, page: PageSize, seed: u64) -> SimFs {
        SimFs { world: Arc::new(Mutex::new(World::new(flavour, page, seed))) }
    }

    /// The host itself. Held for the length of one operation; a panic elsewhere does not make it unusable.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets somebody act between the steps of every look and read; `None` ends it.
    pub fn set_interloper(&self, interloper: Option<source::Interloper>) {
        self.world().hook = interloper;
    }
}
