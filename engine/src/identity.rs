//! Why two pages are equal, or why that is not known.
//!
//! A page's [`Identity`] is a name for its bytes: two decided pages with the same identity have the same bytes. An
//! identity read from an extent map is a *hint* for anything that acts (design section 5, rule 5: a map is a
//! snapshot); reports may count it.

use crate::units::{FsId, PageCount};

/// Which device of a file system an address belongs to. XFS data and real-time devices overlap in address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceClass {
    /// The data device.
    Data,
    /// The XFS real-time device.
    Realtime,
}

/// Within what a physical address is unique: one device class of one file system (design section 5, rule 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpace {
    /// The file system.
    pub fs: FsId,
    /// The device within it.
    pub class: DeviceClass,
}

/// Why extents could not decide a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Undecided {
    /// The file has dirty or writeback pages: its map may still name the old shared extent (design 5.6).
    DirtyCache,
    /// Whether the cache is dirty could not be learnt (no permission, old kernel).
    UnknownCache,
    /// Location unknown or allocation delayed.
    Delalloc,
    /// Stored compressed or encrypted: addresses repeat for different slices.
    Encoded,
    /// Stored inline in metadata or packed as a tail.
    Inline,
    /// The page is not one aligned block on disk.
    Unaligned,
    /// The file system has no FIEMAP, or is one whose addresses mean nothing.
    NoExtentMap,
    /// The file moved while it was looked at, twice.
    Volatile,
}

impl Undecided {
    /// A few words for a report.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Undecided::DirtyCache => "dirty or writeback pages in cache",
            Undecided::UnknownCache => "cache state not readable",
            Undecided::Delalloc => "allocation delayed",
            Undecided::Encoded => "compressed or encrypted extent",
            Undecided::Inline => "inline or tail-packed data",
            Undecided::Unaligned => "extent not page-aligned",
            Undecided::NoExtentMap => "no usable extent map",
            Undecided::Volatile => "changed while scanned",
        }
    }
}

/// What a run of pages is equal to. Consecutive pages of a run have consecutive identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// Whole pages at a physical place: `page` is the address in pages.
    Physical {
        /// Where the address is unique.
        space: AddressSpace,
        /// Physical address of the first page, in pages.
        page: u64,
    },
    /// A file's last page, of which only `valid` bytes come from disk (design section 5, rule 4: equal only if the
    /// valid length is equal too). Always one page.
    Tail {
        /// Where the address is unique.
        space: AddressSpace,
        /// Physical address of the page, in pages.
        page: u64,
        /// Bytes before EOF; more than 0, less than a page.
        valid: u32,
    },
    /// Bytes were read: `id` numbers a distinct page content within one analysis, consecutive for a run.
    Content {
        /// Number of the first page's content.
        id: u64,
    },
    /// A hole or unwritten: reads as zeros, costs no disk. Never counted as mergeable.
    Zero,
    /// Not known.
    Undecided(Undecided),
}

impl Identity {
    /// The identity `pages` further into the run.
    #[must_use]
    pub const fn plus(self, pages: PageCount) -> Identity {
        match self {
            Identity::Physical { space, page } => Identity::Physical { space, page: page + pages.0 },
            Identity::Content { id } => Identity::Content { id: id + pages.0 },
            other => other,
        }
    }

    /// Whether `next`, following `pages` pages of `self`, continues the same run.
    #[must_use]
    pub fn continues_as(self, pages: PageCount, next: Identity) -> bool {
        match self {
            Identity::Tail { .. } => false,
            _ => self.plus(pages) == next,
        }
    }

    /// Whether equality of this identity says equality of bytes.
    #[must_use]
    pub const fn is_decided(self) -> bool {
        !matches!(self, Identity::Undecided(_))
    }
}
