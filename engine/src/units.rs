//! Newtypes for everything that would otherwise be a bare integer.
//!
//! Invariant: no public function of this workspace takes or returns a page number, a byte offset or an id as a bare
//! `u64` where two of them could be confused. Arithmetic that can overflow is checked where the input is hostile.

use std::fmt;

/// Size of a page-cache page in bytes; always a power of two, at least 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageSize {
    shift: u8,
}

impl PageSize {
    /// The common page of x86-64 and of most arm64 kernels: 4096 bytes.
    pub const KIB4: PageSize = PageSize { shift: 12 };

    /// A page size of `bytes`, or `None` when that is no power of two or below 512.
    #[must_use]
    pub fn new(bytes: u64) -> Option<Self> {
        (bytes >= 512 && bytes.is_power_of_two()).then(|| PageSize { shift: bytes.trailing_zeros() as u8 })
    }

    /// Bytes in one page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// log2 of the size.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// Pages needed to hold `bytes` bytes; the last may be partial.
    #[must_use]
    pub const fn pages_covering(self, bytes: u64) -> PageCount {
        PageCount((bytes >> self.shift) + ((bytes & (self.bytes() - 1) != 0) as u64))
    }

    /// Whether `offset` (bytes) lies on a page boundary.
    #[must_use]
    pub const fn aligned(self, offset: u64) -> bool {
        offset & (self.bytes() - 1) == 0
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(
    /// What pages belong to: a file's address space or a region of anonymous memory.
    MappingId(u32)
);
id!(
    /// Position of a page in its mapping, in pages.
    PageIndex(u64)
);
id!(
    /// A number of pages.
    PageCount(u64)
);
id!(
    /// One scanned root, by its place in the argument list.
    RootId(u32)
);
id!(
    /// A set of roots that may share with each other; nothing is shared across domains.
    DomainId(u16)
);
id!(
    /// A file system, interned from its UUID (design section 5, rule 1: `st_dev` is no identity).
    FsId(u16)
);

impl PageIndex {
    /// The page `pages` further on.
    #[must_use]
    pub const fn plus(self, pages: PageCount) -> PageIndex {
        PageIndex(self.0 + pages.0)
    }
}

impl PageCount {
    /// These pages in bytes; `u64::MAX` where that is more (sums of huge sparse files).
    #[must_use]
    pub const fn bytes(self, page: PageSize) -> u64 {
        self.0.saturating_mul(page.bytes())
    }
}

/// One place that shows a page (requirement W-011: sharers are lists of (mapping, offset)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Whose page.
    pub mapping: MappingId,
    /// Which of its pages.
    pub offset: PageIndex,
}

/// A run of pages of one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// Whose pages.
    pub mapping: MappingId,
    /// The first.
    pub start: PageIndex,
    /// How many.
    pub pages: PageCount,
}

impl Span {
    /// The page after the last.
    #[must_use]
    pub const fn end(self) -> PageIndex {
        self.start.plus(self.pages)
    }

    /// Whether `site` lies in this span.
    #[must_use]
    pub fn contains(self, site: Site) -> bool {
        site.mapping == self.mapping && self.start <= site.offset && site.offset < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_size_refuses_what_is_no_page() {
        assert_eq!(PageSize::new(4096), Some(PageSize::KIB4));
        for bad in [0, 1, 256, 4095, 5000] {
            assert_eq!(PageSize::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn covering_rounds_up_and_does_not_overflow() {
        let p = PageSize::KIB4;
        assert_eq!(p.pages_covering(0).0, 0);
        assert_eq!(p.pages_covering(1).0, 1);
        assert_eq!(p.pages_covering(4096).0, 1);
        assert_eq!(p.pages_covering(4097).0, 2);
        assert_eq!(p.pages_covering(u64::MAX).0, 1 << 52);
    }
}
