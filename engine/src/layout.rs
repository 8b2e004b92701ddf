//! The identity rules of FIEMAP: from an extent map to page identities (design section 5).
//!
//! Pure and shared by the real adapters and by the simulation, so that both are judged by the same rules. The rules
//! err to one side only: a page that is not certainly one aligned, plain, clean block is [`Identity::Undecided`].

use crate::identity::{AddressSpace, Identity, Undecided};
use crate::units::{PageCount, PageIndex, PageSize};

bitflags::bitflags! {
    /// Flags of one extent, with the kernel's bits (`include/uapi/linux/fiemap.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct ExtentFlags: u32 {
        /// Last extent of the file.
        const LAST = 0x1;
        /// Location unknown.
        const UNKNOWN = 0x2;
        /// Allocation delayed.
        const DELALLOC = 0x4;
        /// Compressed or otherwise encoded.
        const ENCODED = 0x8;
        /// Encrypted by the file system.
        const DATA_ENCRYPTED = 0x80;
        /// Offsets may not be block-aligned.
        const NOT_ALIGNED = 0x100;
        /// Data inside metadata.
        const DATA_INLINE = 0x200;
        /// Several files in one block.
        const DATA_TAIL = 0x400;
        /// Allocated, never written: reads as zeros.
        const UNWRITTEN = 0x800;
        /// Merged for efficiency by a file system without extents.
        const MERGED = 0x1000;
        /// Shared with other files.
        const SHARED = 0x2000;
        /// Bits this version does not know are kept, and make an extent undecided.
        const _ = !0;
    }
}

/// One extent as the kernel reports it; all fields in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawExtent {
    /// Offset in the file.
    pub logical: u64,
    /// Address on the device (on btrfs: in the file system's own address space).
    pub physical: u64,
    /// Length.
    pub length: u64,
    /// What is said about it.
    pub flags: ExtentFlags,
}

impl RawExtent {
    /// Whether `next` begins where this ends, in the file and on the device. Never for sums that don't fit 64 bits.
    fn is_continued_by(&self, next: &RawExtent) -> bool {
        self.logical.checked_add(self.length) == Some(next.logical)
            && self.physical.checked_add(self.length) == Some(next.physical)
            && self.length.checked_add(next.length).is_some()
    }
}

/// What is known of a file's cache when its map is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheState {
    /// No dirty and no writeback page, before and after the map.
    Clean,
    /// At least one: the map may be older than the bytes (design 5.6).
    Dirty,
    /// Not readable for this user or on this kernel.
    Unknown,
}

/// A run of pages of one file with consecutive identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// First page in the file.
    pub start: PageIndex,
    /// How many pages.
    pub pages: PageCount,
    /// Identity of the first; the others follow by [`Identity::plus`].
    pub identity: Identity,
}

/// A file's whole-file signature: its size and the identities of all its pages up to EOF (design section 5, rule 3).
///
/// `runs` cover page 0 to the last page without gap or overlap, adjacent runs merged, so equal layouts with nothing
/// undecided mean equal files.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// File size in bytes.
    pub size: u64,
    /// Identities in file order.
    pub runs: Vec<Run>,
}

/// What [`Layout::from_extents`] judges.
#[derive(Clone, Copy, Debug)]
pub struct MapFacts<'a> {
    /// File size in bytes.
    pub size: u64,
    /// The extents, in any order; what lies past EOF is clipped.
    pub extents: &'a [RawExtent],
    /// Where addresses are unique, or `None` where they mean nothing: then every page is undecided.
    pub space: Option<AddressSpace>,
    /// Dirty or clean.
    pub cache: CacheState,
    /// Page size of the host.
    pub page: PageSize,
}

impl Layout {
    /// Judges one extent map by the rules of design section 5.
    ///
    /// Overlapping or wrapped extents (a hostile or broken file system) make the pages they touch undecided.
    #[must_use]
    pub fn from_extents(facts: MapFacts<'_>) -> Layout {
        let gap = gap(facts.cache);
        let mut builder = LayoutBuilder::new(facts.size, facts.page, gap);
        let Some(space) = facts.space else {
            return builder.finish_with(Identity::Undecided(Undecided::NoExtentMap));
        };
        let sorted;
        let extents = if facts.extents.is_sorted_by_key(|e| e.logical) {
            facts.extents
        } else {
            let mut copy = facts.extents.to_vec();
            copy.sort_by_key(|e| e.logical);
            sorted = copy;
            &sorted[..]
        };
        let mut rest = extents.iter().peekable();
        while let Some(extent) = rest.next() {
            let judged = verdict(extent, space, facts.cache);
            let mut whole = *extent;
            // XFS splits an extent where its number of owners changes; with small blocks that is in the midst of a page.
            while let Some(next) = rest.next_if(|next| {
                let both_plain = |v| matches!(v, Verdict::Plain(_));
                both_plain(judged)
                    && both_plain(verdict(next, space, facts.cache))
                    && whole.is_continued_by(next)
            }) {
                whole.length += next.length;
            }
            builder.extent(&whole, judged);
        }
        builder.finish_with(gap)
    }

    /// A layout in which every page is undecided for `why`.
    #[must_use]
    pub fn undecided(size: u64, page: PageSize, why: Undecided) -> Layout {
        LayoutBuilder::new(size, page, Identity::Zero).finish_with(Identity::Undecided(why))
    }

    /// The layout with undecided pages that lie in `holes` made [`Identity::Zero`].
    ///
    /// `holes` are byte ranges, ascending and disjoint, that the file system itself calls holes (`SEEK_HOLE`, which
    /// unlike a map does look at the cache, so it can be believed of dirty files too). Without this a sparse file of
    /// terabytes with one dirty page would be terabytes of undecided pages.
    #[must_use]
    pub fn with_holes(self, holes: &[std::ops::Range<u64>], page: PageSize) -> Layout {
        if holes.is_empty() || self.is_decided() {
            return self;
        }
        let mut builder = LayoutBuilder::new(self.size, page, Identity::Zero);
        let whole_pages = |hole: &std::ops::Range<u64>| {
            let end = if hole.end >= self.size { builder.total } else { hole.end / page.bytes() };
            (page.pages_covering(hole.start).0, end)
        };
        let holes: Vec<(u64, u64)> = holes.iter().map(whole_pages).collect();
        for run in &self.runs {
            let (mut at, end) = (run.start.0, run.start.plus(run.pages).0);
            if !run.identity.is_decided() {
                let first = holes.partition_point(|(_, hole_end)| *hole_end <= at);
                for (from, to) in holes[first..].iter().take_while(|(from, _)| *from < end) {
                    let (from, to) = ((*from).max(at), (*to).min(end));
                    if from < to {
                        builder.push(at, from - at, run.identity);
                        builder.push(from, to - from, Identity::Zero);
                        at = to;
                    }
                }
            }
            builder.push(at, end - at, run.identity.plus(PageCount(at - run.start.0)));
        }
        builder.finish_with(Identity::Zero)
    }

    /// Whether every page has an identity, so that equality of layouts is equality of files.
    #[must_use]
    pub fn is_decided(&self) -> bool {
        self.runs.iter().all(|r| r.identity.is_decided())
    }

    /// Pages that are a hole or unwritten.
    #[must_use]
    pub fn zero_pages(&self) -> PageCount {
        self.count(|i| i == Identity::Zero)
    }

    /// Pages that extents could not decide.
    #[must_use]
    pub fn undecided_pages(&self) -> PageCount {
        self.count(|i| !i.is_decided())
    }

    /// Pages in cache if the file were read, without Zero pages.
    #[must_use]
    pub fn cache_pages(&self) -> PageCount {
        self.count(|i| i != Identity::Zero)
    }

    fn count(&self, wanted: impl Fn(Identity) -> bool) -> PageCount {
        PageCount(self.runs.iter().filter(|r| wanted(r.identity)).map(|r| r.pages.0).sum())
    }
}

/// What an extent's bytes are, before alignment is looked at.
#[derive(Clone, Copy)]
enum Verdict {
    Plain(AddressSpace),
    Zero,
    Unknown(Undecided),
}

/// What no extent covers. Under dirty pages that is no hole for certain: XFS keeps the reservation for a write next to a
/// shared block in its copy-on-write fork, which no map shows (seen on Linux 6.18).
fn gap(cache: CacheState) -> Identity {
    match cache {
        CacheState::Dirty => Identity::Undecided(Undecided::DirtyCache),
        CacheState::Unknown => Identity::Undecided(Undecided::UnknownCache),
        CacheState::Clean => Identity::Zero,
    }
}

fn verdict(extent: &RawExtent, space: AddressSpace, cache: CacheState) -> Verdict {
    let flags = extent.flags;
    let known = ExtentFlags::LAST | ExtentFlags::SHARED | ExtentFlags::MERGED | ExtentFlags::UNWRITTEN;
    if flags.intersects(ExtentFlags::UNKNOWN | ExtentFlags::DELALLOC) {
        return Verdict::Unknown(Undecided::Delalloc);
    }
    if flags.intersects(ExtentFlags::ENCODED | ExtentFlags::DATA_ENCRYPTED) {
        return Verdict::Unknown(Undecided::Encoded);
    }
    if flags.intersects(ExtentFlags::DATA_INLINE | ExtentFlags::DATA_TAIL) {
        return Verdict::Unknown(Undecided::Inline);
    }
    if !known.contains(flags) {
        return Verdict::Unknown(Undecided::Unaligned);
    }
    match cache {
        // Unwritten extents with dirty pages on top keep the flag until writeback (XFS), so they are no zeros either.
        CacheState::Dirty => Verdict::Unknown(Undecided::DirtyCache),
        CacheState::Unknown => Verdict::Unknown(Undecided::UnknownCache),
        CacheState::Clean if flags.contains(ExtentFlags::UNWRITTEN) => Verdict::Zero,
        CacheState::Clean => Verdict::Plain(space),
    }
}

/// Collects runs in file order. `done` is the first page not yet judged; `touched` the first byte not yet covered.
struct LayoutBuilder {
    size: u64,
    page: PageSize,
    gap: Identity,
    runs: Vec<Run>,
    done: u64,
    total: u64,
    /// A page that an earlier extent ended in without filling it, and why it is undecided.
    open_page: Option<(u64, Undecided)>,
    /// Last page that is zeros on both sides of an unaligned boundary so far.
    last_end: u64,
}

impl LayoutBuilder {
    fn new(size: u64, page: PageSize, gap: Identity) -> Self {
        let total = page.pages_covering(size).0;
        LayoutBuilder { size, page, gap, runs: Vec::new(), done: 0, total, open_page: None, last_end: 0 }
    }

    fn push(&mut self, start: u64, pages: u64, identity: Identity) {
        debug_assert_eq!(start, self.done);
        if pages == 0 {
            return;
        }
        self.done = start + pages;
        if let Some(last) = self.runs.last_mut()
            && last.identity.continues_as(last.pages, identity)
        {
            last.pages.0 += pages;
            return;
        }
        self.runs.push(Run { start: PageIndex(start), pages: PageCount(pages), identity });
    }

    /// Fills with what gaps are up to `page`, first closing a page that was left half covered.
    fn fill_to(&mut self, page: u64) {
        self.close_open_page(page);
        if page > self.done {
            self.push(self.done, page - self.done, self.gap);
        }
    }

    fn close_open_page(&mut self, before: u64) {
        if let Some((open, why)) = self.open_page
            && open < before
        {
            self.open_page = None;
            if open >= self.done {
                if open > self.done {
                    self.push(self.done, open - self.done, self.gap);
                }
                self.push(open, 1, Identity::Undecided(why));
            }
        }
    }

    fn extent(&mut self, extent: &RawExtent, verdict: Verdict) {
        let bytes = self.page.bytes();
        let start = extent.logical.min(self.size);
        let end = extent.logical.saturating_add(extent.length).min(self.size);
        if start >= end {
            return;
        }
        // An overlap: what is already judged stays, the seam is undecided.
        let overlaps = start < self.last_end;
        self.last_end = self.last_end.max(end);
        if overlaps {
            self.demote_from(start / bytes);
        }
        let verdict = if overlaps { Verdict::Unknown(Undecided::Unaligned) } else { verdict };
        let first_page = start / bytes;
        let mut first_whole = self.page.pages_covering(start).0;
        let whole_end = if end == self.size { self.total } else { end / bytes };
        let why = match verdict {
            Verdict::Unknown(why) => why,
            _ => Undecided::Unaligned,
        };
        if first_page < first_whole {
            // Starts inside a page: undecided, unless this and what shares the page are both zeros.
            self.half_page(first_page, verdict, why);
        }
        first_whole = first_whole.max(self.done);
        if first_whole < whole_end {
            self.fill_to(first_whole);
            self.whole_pages(extent, first_whole, whole_end, verdict);
        }
        if end != self.size && !self.page.aligned(end) && end / bytes >= self.done {
            self.half_page(end / bytes, verdict, why);
        }
    }

    /// A part of `page` is covered. Zeros next to a hole stay a hole; anything else makes the page undecided.
    fn half_page(&mut self, page: u64, verdict: Verdict, why: Undecided) {
        if matches!(verdict, Verdict::Zero) || page < self.done {
            return;
        }
        self.close_open_page(page);
        if self.open_page.is_none() {
            self.open_page = Some((page, why));
        }
    }

    fn whole_pages(&mut self, extent: &RawExtent, first: u64, end: u64, verdict: Verdict) {
        let bytes = self.page.bytes();
        let space = match verdict {
            Verdict::Zero => return self.push(first, end - first, Identity::Zero),
            Verdict::Unknown(why) => return self.push(first, end - first, Identity::Undecided(why)),
            Verdict::Plain(space) => space,
        };
        let physical = extent.physical.checked_add(first * bytes - extent.logical);
        let Some(physical) = physical.filter(|p| self.page.aligned(*p)) else {
            return self.push(first, end - first, Identity::Undecided(Undecided::Unaligned));
        };
        let page = physical / bytes;
        let valid = (self.size % bytes) as u32;
        let has_tail = end == self.total && valid != 0;
        let full = end - first - u64::from(has_tail);
        self.push(first, full, Identity::Physical { space, page });
        if has_tail {
            self.push(end - 1, 1, Identity::Tail { space, page: page + full, valid });
        }
    }

    /// Makes every judged page from `page` on undecided (overlapping extents).
    fn demote_from(&mut self, page: u64) {
        if page >= self.done {
            return;
        }
        let end = self.done;
        while let Some(last) = self.runs.last_mut() {
            if last.start.0 >= page {
                self.runs.pop();
                continue;
            }
            last.pages.0 = last.pages.0.min(page - last.start.0);
            break;
        }
        self.done = page;
        self.push(page, end - page, Identity::Undecided(Undecided::Unaligned));
    }

    fn finish_with(mut self, rest: Identity) -> Layout {
        self.close_open_page(u64::MAX);
        if self.done < self.total {
            self.push(self.done, self.total - self.done, rest);
        }
        self.runs.shrink_to_fit();
        Layout { size: self.size, runs: self.runs }
    }
}
