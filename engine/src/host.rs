//! The one seam between the merge engine and whatever owns the pages: real files, anonymous memory, or a
//! simulation.
//!
//! Invariant: a [`MergeHost`] carries out, the engine decides. Every method is one bounded step that the
//! engine could not do without I/O; none of them sleeps for another party, retries on its own or
//! remembers a verdict. Expected races are values ([`ProtectOutcome`], [`ShareOutcome`], ...), never
//! errors; a [`HostError`] means the operation could not be carried out at all. Whatever comes back, an
//! operation that did not say it succeeded changed nothing.
//!
//! What it deliberately does not know: files. A mapping is a file's address space or a region of
//! anonymous memory and goes through the same calls (W-003); only [`MergeHost::reread_map`] can have
//! nothing to say (an anonymous page has no extent), and then bytes decide.
//!
//! # The order in which the engine calls
//!
//! ```text
//! observe -> digest            what is there; is it stable (unprotected: hints only)
//! protect                      from here nobody changes the bytes without a changed stamp (P-001, P-002)
//! make_shared                  only where no shared page with these bytes exists yet (K-055)
//! reread_map | compare | compare_in_kernel      the proof, always after protect (design 5.5, 5.6)
//! share                        replaced only if the stamp still holds (P-004), or `Raced`
//! break_sharing -> unprotect   a writer came, or we undo; the record goes before the protection (design 3)
//! release                      no recorded site is left: the creator's reference goes, exactly once (K-057)
//! ```
//!
//! # What the host tells the engine
//!
//! Not through this trait (the engine never waits for a host): the owner of both calls the engine's event
//! methods for a writer that announced itself, truncation, exit, fork (registration of the child) and
//! relocation.

use std::fmt;

use crate::identity::Identity;
use crate::layout::{CacheState, Run};
use crate::units::{MappingId, PageCount, PageIndex, PageSize, Site, Span};

/// A shared page: the one copy, owned by the host and written by nobody. The number is the host's; a run
/// of shared pages has consecutive numbers. A host may hand out consecutive numbers for separately made
/// pages (of one anchor file, say): the engine's records of them then join. A number may be used again
/// after [`MergeHost::release`] and after the last site that shows the page is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SharedPage(pub u64);

impl SharedPage {
    /// The shared page `pages` further on.
    #[must_use]
    pub const fn plus(self, pages: PageCount) -> SharedPage {
        SharedPage(self.0 + pages.0)
    }
}

/// A run of shared pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SharedSpan {
    /// The first.
    pub start: SharedPage,
    /// How many.
    pub pages: PageCount,
}

impl SharedSpan {
    /// The number after the last.
    #[must_use]
    pub const fn end(self) -> SharedPage {
        self.start.plus(self.pages)
    }
}

/// A NUMA node; 0 where there is but one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeId(pub u16);

/// 128 bits of a strong hash of one page. Equal digests are a reason to compare, never a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 16]);

/// What the owner of a mapping keeps for one site and gets back with it (W-011, W-032): opaque to the engine,
/// consistent by itself, never derived from the shared page. Pages of one run have the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Private(pub u64);

/// What a protection was when it was set up. A write, pin, truncation, replacement or lapse of protection
/// of any page of the span since then makes the host refuse the stamp with a `Raced` outcome (P-004). The
/// engine may show it for a part of the span it was given for; then only that part counts. Never used
/// twice for different protections of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u64);

/// How the bytes of a span are kept from changing behind our back (design section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProtectKind {
    /// Nobody can write: an anchor, a sealed layer.
    Immutable,
    /// A file lease: a writer waits until we have un-merged.
    Lease,
    /// userfaultfd write protection: a store waits for us.
    Wp,
    /// The kernel copies before it lets anyone write; we may learn of it only by looking.
    KernelCow,
}

/// What a mapping is. The engine treats both alike; it is here for reports and for choosing a protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MappingKind {
    /// A file's address space, or a private mapping of it.
    File,
    /// A region of anonymous memory.
    Anonymous,
}

/// What [`MergeHost::observe`] saw at a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The mapping's own page: a candidate.
    Own {
        /// What the last look at an extent map said of the first page; the others follow by
        /// [`Identity::plus`]. A hint. `Undecided(NoExtentMap)` for anonymous memory.
        hint: Identity,
    },
    /// A shared page, whether the engine recorded this site or not: a fork copies the table entry, not
    /// the record (K-053). Such a copy is as protected as the original.
    Shared {
        /// Which; the pages of the run have consecutive numbers.
        page: SharedPage,
        /// Sites that show each of them *now*, counted at every level at which one entry stands for many
        /// users (H-001, H-030). The same for all pages of the run.
        mappings: u64,
        /// The sites' private state (W-012: by site, never by shared page).
        private: Private,
    },
    /// The shared zero page, put there by [`MergeHost::share`] with [`ShareTarget::Zero`], or a fork of
    /// such a site.
    SharedZero {
        /// The sites' private state.
        private: Private,
    },
    /// A page the engine may never touch: device or raw memory (K-075), metadata (W-025), huge and not to
    /// be split.
    Unsuitable,
}

/// One run of present pages, as seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Where.
    pub span: Span,
    /// The memory node the pages are on.
    pub node: NodeId,
    /// What.
    pub shown: Shown,
}

/// How far [`MergeHost::observe`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visit {
    /// Everything present before `next` is reported; go on there. `next` is beyond `from` or is `end`.
    Upto {
        /// The first index not looked at.
        next: PageIndex,
    },
    /// The mapping is exiting or gone: nothing is reported (K-093, K-094).
    Gone,
}

/// Why a page can't be protected now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// Somebody holds a pin: references don't equal mappings (P-001). Our own reads in flight count (P-014).
    Pinned,
    /// A writer has it open, or it is dirty, under writeback or locked: later perhaps.
    Busy,
    /// Not there any more: truncated, unmapped, exiting.
    Gone,
    /// Never: no permission, or the kind of protection can't be had for this mapping.
    Denied,
}

/// Outcome of [`MergeHost::protect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtectOutcome {
    /// Every page of the span is protected.
    Protected(Stamp),
    /// No page of the span is protected by this call; the page at `at` was the first that refused.
    Refused {
        /// Why.
        why: Refusal,
        /// Which page, inside the span.
        at: PageIndex,
    },
}

/// One side of a proof: a protected span, or a run of shared pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Pages of a mapping; the engine holds their protection.
    Site(Span),
    /// Shared pages.
    Shared(SharedSpan),
}

/// Outcome of [`MergeHost::reread_map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapReading {
    /// The map is read. `Clean` may be said only if the cache was synced and had no dirty and no
    /// writeback page both before and after the map was read (design 5.6).
    Read(CacheState),
    /// There is no map to read (anonymous memory, a file system without extents): compare bytes.
    NoMap,
    /// The pages are gone.
    Gone,
}

/// Outcome of [`MergeHost::compare`] and [`MergeHost::compare_in_kernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompareOutcome {
    /// All bytes of all pages are equal.
    Same,
    /// They are not; the pages before `at` (counted from the span's first) are equal.
    Differs {
        /// First page that differs, relative to the span.
        at: PageCount,
    },
    /// One side is gone or its protection has lapsed.
    Gone,
    /// This way to compare can't be had for these two.
    Unsupported,
}

/// Outcome of [`MergeHost::make_shared`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MakeOutcome {
    /// New shared pages with the bytes the span had under its protection; as many as the span has. The
    /// engine holds the creator's reference until it calls [`MergeHost::release`].
    Made(SharedSpan),
    /// The stamp does not hold any more.
    Raced,
    /// No memory, no disk space, no quota. Nothing was made.
    NoMemory,
}

/// What a site is to show from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareTarget {
    /// These shared pages, as many as the span has.
    Shared(SharedSpan),
    /// The zero page at every place (`use_zero_pages`).
    Zero,
}

/// Outcome of [`MergeHost::share`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareOutcome {
    /// Every page of the span shows the shared page and stays protected.
    Shared {
        /// The site's private state, kept in its record (W-011).
        private: Private,
    },
    /// Something changed since `protect`: no page was replaced (P-004).
    Raced,
    /// No memory for tables, or no VMA left in the budget. No page was replaced.
    NoMemory,
}

/// How a break ended. The first `done` pages of the span show private pages of their own again, the
/// others are as they were: no case is silent about a half-way stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakStop {
    /// All done.
    Complete,
    /// The page is not there (truncated: what a bus error says). That is success, its shared page is gone
    /// from the site already (K-063). The engine goes on after it.
    Truncated,
    /// The page shows no shared page any more, for instance since another thread's store broke it
    /// (K-062). Success.
    NotShared,
    /// Out of memory, or over a memory limit. Never ignored (K-061, K-064).
    NoMemory,
    /// A signal is pending for whoever asked (K-067): stop, tell the caller to restart.
    Interrupted,
    /// The mapping is exiting: its pages go without us (K-094).
    Exiting,
}

/// Outcome of [`MergeHost::break_sharing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakOutcome {
    /// Pages at the span's start that are private again. Equal to the span's length exactly when `Complete`.
    pub done: PageCount,
    /// What stopped it at page `done`.
    pub stop: BreakStop,
}

/// The operation of a [`MergeHost`] that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HostOp {
    /// Looking at pages.
    Observe,
    /// Hashing pages.
    Digest,
    /// Setting up protection.
    Protect,
    /// Lifting it.
    Unprotect,
    /// Reading an extent map again.
    RereadMap,
    /// Comparing.
    Compare,
    /// Making shared pages.
    MakeShared,
    /// Replacing.
    Share,
    /// Un-merging.
    Break,
    /// Giving shared pages back.
    Release,
}

impl fmt::Display for HostOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostOp::Observe => "look at pages",
            HostOp::Digest => "hash pages",
            HostOp::Protect => "protect pages",
            HostOp::Unprotect => "lift the protection of pages",
            HostOp::RereadMap => "re-read the extent map",
            HostOp::Compare => "compare pages",
            HostOp::MakeShared => "make shared pages",
            HostOp::Share => "replace pages by shared ones",
            HostOp::Break => "un-merge pages",
            HostOp::Release => "give shared pages back",
        })
    }
}

/// An operation could not be carried out. Nothing was changed by it, and the engine goes on with the next
/// candidate; for `Break` and `Unprotect` it keeps the record and tries again (K-065, K-066).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("can't {op} at page {} of mapping {}: errno {errno}", site.offset, site.mapping)]
#[non_exhaustive]
pub struct HostError {
    /// What was tried.
    pub op: HostOp,
    /// The first page concerned. For an operation on shared pages only: mapping and offset the engine
    /// worked for, or (0, number of the shared page).
    pub site: Site,
    /// The kernel's errno.
    pub errno: i32,
}

impl HostError {
    /// `op` at `site` failed with `errno`.
    #[must_use]
    pub const fn new(op: HostOp, site: Site, errno: i32) -> Self {
        HostError { op, site, errno }
    }
}

/// Called by the host inside [`MergeHost::share`] and [`MergeHost::break_sharing`], see there.
pub type Invalidate<'a> = &'a mut dyn FnMut(Span);

/// Whoever owns the pages. Object-safe; calls are spans, not single pages, wherever the kernel's are.
///
/// Every span a call names lies in one mapping that is registered with the engine, is not empty, and no
/// two calls run at once (`&mut self`). The engine hands every span it protected either to
/// [`Self::share`] with outcome `Shared` and later [`Self::unprotect`], or directly to
/// [`Self::unprotect`], in parts or whole, in any order; after the last one all gauges are zero. Pages of
/// an exiting mapping lose their protection with it, without a call. A site that stopped showing a shared
/// page by itself (the kernel copied for a store) gets its `unprotect` when the engine meets it.
pub trait MergeHost {
    /// Page size of the host.
    fn page_size(&self) -> PageSize;

    /// The digest of a page of zeros under this host's hash.
    fn zero_digest(&self) -> Digest;

    /// The largest unit that one table entry, extent or huge page of this mapping may stand for, in
    /// pages; a power of two, 1 where pages are all there is. Listeners are told spans widened to it
    /// (H-005, H-006, H-031).
    fn shareable_unit(&self, mapping: MappingId) -> PageCount;

    /// Whether the mapping's live count is 0 (K-093). May be true before the engine is told of the exit.
    fn is_exiting(&self, mapping: MappingId) -> bool;

    /// Reports what pages `from ..  end` of a mapping show, ascending, without overlap, at most
    /// `pages_max` present pages (at least 1), merged into runs where they are of one kind. Absent pages
    /// are passed over and cost nothing (K-034); a site that shows a shared page is reported even if that
    /// page is not in memory just now. Appends to `out`.
    ///
    /// # Errors
    /// [`HostOp::Observe`].
    fn observe(
        &mut self,
        from: Site,
        end: PageIndex,
        pages_max: PageCount,
        out: &mut Vec<Observed>,
    ) -> Result<Visit, HostError>;

    /// Digests of the span's pages as they are now, one each, appended to `out`; `None` for a page that
    /// is not there. Nothing keeps them from changing unless the span is protected.
    ///
    /// # Errors
    /// [`HostOp::Digest`].
    fn digest(&mut self, span: Span, out: &mut Vec<Option<Digest>>) -> Result<(), HostError>;

    /// Protects all pages of the span or none. The check for pins and the protection are one critical
    /// section that keeps new pins out (P-002). The engine never protects a page that it has protected
    /// already.
    ///
    /// # Errors
    /// [`HostOp::Protect`].
    fn protect(&mut self, span: Span, kind: ProtectKind) -> Result<ProtectOutcome, HostError>;

    /// Lifts the protection of these pages (any part of what was protected). Pages that are gone or not
    /// protected any more are passed over. The engine has removed every record of them as merged before
    /// (design 3).
    ///
    /// # Errors
    /// [`HostOp::Unprotect`]: the pages stay protected; the engine tries again.
    fn unprotect(&mut self, span: Span) -> Result<(), HostError>;

    /// Syncs and re-reads the extent map of a protected span or of shared pages and appends its runs,
    /// with `start` counted from the first page of the side and all pages covered. Hints that were
    /// remembered may not be used: addresses are reused (design 5.5).
    ///
    /// # Errors
    /// [`HostOp::RereadMap`].
    fn reread_map(&mut self, side: Side, out: &mut Vec<Run>) -> Result<MapReading, HostError>;

    /// Compares a protected span with as many shared pages, byte by byte.
    ///
    /// # Errors
    /// [`HostOp::Compare`].
    fn compare(&mut self, site: Span, shared: SharedSpan) -> Result<CompareOutcome, HostError>;

    /// The same by the kernel under its own locks (FIDEDUPERANGE), which makes equal content into equal
    /// extents. May say `Unsupported` always.
    ///
    /// # Errors
    /// [`HostOp::Compare`].
    fn compare_in_kernel(&mut self, site: Span, shared: SharedSpan) -> Result<CompareOutcome, HostError>;

    /// Whether every byte of a protected span is zero (`use_zero_pages`): `Same`, `Differs` or `Gone`.
    ///
    /// # Errors
    /// [`HostOp::Compare`].
    fn compare_zero(&mut self, site: Span) -> Result<CompareOutcome, HostError>;

    /// Makes new shared pages with the bytes of a protected span (K-055). They are immutable from the
    /// start and shown by no site yet.
    ///
    /// # Errors
    /// [`HostOp::MakeShared`].
    fn make_shared(&mut self, from: Span, stamp: Stamp) -> Result<MakeOutcome, HostError>;

    /// Makes a protected span show `target` instead of its own pages, all pages or none, and only if
    /// `stamp` still holds (P-004). After the entries are replaced and before anyone can use them again
    /// the host calls `invalidate` with the span (H-021: under the table lock, so the callee must not
    /// block). It may call it and yet report `Raced` (H-024), never the other way round.
    ///
    /// # Errors
    /// [`HostOp::Share`].
    fn share(
        &mut self,
        site: Span,
        stamp: Stamp,
        target: ShareTarget,
        invalidate: Invalidate<'_>,
    ) -> Result<ShareOutcome, HostError>;

    /// Gives the pages of a span that shows shared pages (or the zero page) private copies, in ascending
    /// order (K-119: always a new page), calling `invalidate` for what was replaced as in
    /// [`Self::share`]. Never faults in what is not there (K-113). The pages are protected still, if they
    /// were.
    ///
    /// # Errors
    /// [`HostOp::Break`]: no page was broken.
    fn break_sharing(&mut self, site: Span, invalidate: Invalidate<'_>) -> Result<BreakOutcome, HostError>;

    /// The engine has no record of these shared pages left and drops the creator's reference, exactly
    /// once per page (K-057). Sites the engine does not know (forked copies) may show them still: the
    /// host then keeps the page until the last of them is gone; the engine will break them when it meets
    /// them (K-076).
    ///
    /// # Errors
    /// [`HostOp::Release`]: the engine tries again.
    fn release(&mut self, shared: SharedSpan) -> Result<(), HostError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Design 4 asks for an object-safe seam; this fails to compile when it is not.
    #[test]
    fn the_host_is_object_safe_and_errors_name_the_page() {
        fn _takes(_: &mut dyn MergeHost) {}
        let site = Site { mapping: MappingId(3), offset: PageIndex(7) };
        let error = HostError::new(HostOp::Share, site, 12);
        assert_eq!(error.to_string(), "can't replace pages by shared ones at page 7 of mapping 3: errno 12");
    }
}
