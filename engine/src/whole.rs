//! Proofs about whole files: a file has the bytes of an anchor because both have the same place on disk.
//!
//! The protocol of `protocol` speaks of pages that are protected while they are judged. A file that is sealed is not: its
//! users go on writing. What is proved here is therefore a moment: *when its map was read* the file had the bytes of the anchor.
//! The anchor is the protected side ([`ProtectKind::Immutable`](crate::host::ProtectKind)); it never changes, so what held for a
//! moment of the file holds for good of what is then shared.
//!
//! `anchor - file - anchor` (design 5.5): [`Opened`] is a reading of the anchor's map, [`Enclosed`] a later one of the file that is
//! equal and clean, [`Proof`] needs a third, again of the anchor and again equal. Why three: a stored map is old, and
//! blocks that a file left are given to others. Between the first and the last reading the anchor lay at this place; so at the
//! moment between them when the file's map named the same place, both names were for the same blocks, and no dirty page hid
//! other bytes (design 5.6).
//!
//! Why one first and one last reading may serve many files: nothing above speaks of how far apart they are. Relocation (btrfs
//! balance) moves the anchor's *blocks* and is seen by the last reading. That it came back to the very same address
//! in between, after another file had been written there and read by us, would need two relocations of the anchor within one call;
//! btrfs gives a new block group a new address, and XFS moves nothing that is immutable.
//!
//! Invariant: a [`Proof`] names one anchor and comes from three readings in this order; each reading says when it began and ended.
//! What it deliberately does not do: read, or know what a file is.

use crate::layout::{CacheState, Layout};

/// A point in the order of readings of one run; the caller counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

/// A file's map with everything that says whether it can be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Before anything was asked.
    pub began: Moment,
    /// After all was answered.
    pub ended: Moment,
    /// What the map says; read with the kernel's sync.
    pub layout: Layout,
    /// Dirty when a count before or after the map said so.
    pub cache: CacheState,
    /// Size or times differed between the first and the last look.
    pub moved: bool,
}

impl Reading {
    /// Whether the map told the file's bytes at one moment of the reading, page for page.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !self.moved && self.cache == CacheState::Clean
    }

    /// Whether, besides, every page has a name: then equal layouts are equal bytes.
    #[must_use]
    pub fn decides(&self) -> bool {
        self.is_settled() && self.layout.is_decided()
    }
}

/// Why a file was not shown to be equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unproven {
    /// Another place: the hint was stale, or the anchor has moved.
    Elsewhere,
    /// The file (or the anchor) is dirty, moves, or has pages without a place.
    Undecided,
    /// The readings were not made in this order.
    Order,
}

/// The first reading of an anchor; `A` names it.
#[derive(Clone, Debug)]
pub struct Opened<A> {
    anchor: A,
    ended: Moment,
    layout: Layout,
}

/// A file read after that and found at the same place.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Enclosed<A> {
    anchor: A,
    ended: Moment,
}

/// Shows that a file had an anchor's bytes at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Proof<A> {
    anchor: A,
}

impl<A: Copy> Opened<A> {
    /// The first reading, of the anchor.
    ///
    /// # Errors
    /// [`Unproven::Undecided`].
    pub fn new(anchor: A, reading: Reading) -> Result<Self, Unproven> {
        if !reading.decides() {
            return Err(Unproven::Undecided);
        }
        Ok(Opened { anchor, ended: reading.ended, layout: reading.layout })
    }

    /// Which anchor.
    #[must_use]
    pub fn anchor(&self) -> A {
        self.anchor
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    /// The second reading, of the file.
    ///
    /// # Errors
    /// [`Unproven`].
    pub fn enclose(&self, file: &Reading) -> Result<Enclosed<A>, Unproven> {
        if !file.decides() {
            return Err(Unproven::Undecided);
        }
        if file.layout != self.layout {
            return Err(Unproven::Elsewhere);
        }
        if file.began < self.ended {
            return Err(Unproven::Order);
        }
        Ok(Enclosed { anchor: self.anchor, ended: file.ended })
    }

    /// The third reading, again of the anchor.
    ///
    /// # Errors
    /// [`Unproven`].
    pub fn close(&self, reading: &Reading) -> Result<Closed<A>, Unproven> {
        if !reading.decides() {
            return Err(Unproven::Undecided);
        }
        if reading.layout != self.layout {
            return Err(Unproven::Elsewhere);
        }
        Ok(Closed { anchor: self.anchor, opened: self.ended, began: reading.began })
    }
}

/// An anchor that lay at one place from its first reading to its last.
#[derive(Clone, Copy, Debug)]
pub struct Closed<A> {
    anchor: A,
    opened: Moment,
    began: Moment,
}

impl<A: Copy + PartialEq> Closed<A> {
    /// Proves what was enclosed.
    ///
    /// # Errors
    /// [`Unproven::Order`] for a file that was read after the last reading began, or of another anchor.
    pub fn prove(&self, file: &Enclosed<A>) -> Result<Proof<A>, Unproven> {
        let within = self.opened <= file.ended && file.ended <= self.began;
        if file.anchor != self.anchor || !within {
            return Err(Unproven::Order);
        }
        Ok(Proof { anchor: self.anchor })
    }
}

impl<A: Copy> Enclosed<A> {
    /// Which anchor.
    #[must_use]
    pub fn anchor(&self) -> A {
        self.anchor
    }
}

impl<A: Copy> Proof<A> {
    /// Which anchor.
    #[must_use]
    pub fn anchor(&self) -> A {
        self.anchor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Identity, Undecided};
    use crate::layout::Run;
    use crate::stable::tests::SPACE;
    use crate::units::{PageCount, PageIndex, PageSize};

    fn reading(began: u64, page: u64) -> Reading {
        let identity = Identity::Physical { space: SPACE, page };
        let layout =
            Layout { size: 8192, runs: vec![Run { start: PageIndex(0), pages: PageCount(2), identity }] };
        let (began, ended) = (Moment(began), Moment(began + 1));
        Reading { began, ended, layout, cache: CacheState::Clean, moved: false }
    }

    #[test]
    fn anchor_file_anchor_in_this_order_is_a_proof() {
        let opened = Opened::new(7u32, reading(0, 5)).unwrap();
        let enclosed = opened.enclose(&reading(2, 5)).unwrap();
        let proof = opened.close(&reading(4, 5)).unwrap().prove(&enclosed).unwrap();
        assert_eq!(proof.anchor(), 7);
    }

    #[test]
    fn a_file_read_before_the_first_or_after_the_last_reading_is_not_proved() {
        let opened = Opened::new(7u32, reading(10, 5)).unwrap();
        assert_eq!(opened.enclose(&reading(8, 5)).unwrap_err(), Unproven::Order);
        let enclosed = opened.enclose(&reading(14, 5)).unwrap();
        assert_eq!(opened.close(&reading(12, 5)).unwrap().prove(&enclosed), Err(Unproven::Order));
        let other = Opened::new(8u32, reading(10, 5)).unwrap().close(&reading(20, 5)).unwrap();
        assert_eq!(other.prove(&enclosed), Err(Unproven::Order), "a proof of another anchor");
    }

    #[test]
    fn another_place_dirty_pages_or_motion_prove_nothing() {
        let opened = Opened::new(7u32, reading(0, 5)).unwrap();
        assert_eq!(opened.enclose(&reading(2, 6)).unwrap_err(), Unproven::Elsewhere);
        assert_eq!(opened.close(&reading(4, 6)).unwrap_err(), Unproven::Elsewhere);
        let unsettled = [
            Reading { moved: true, ..reading(2, 5) },
            Reading { cache: CacheState::Dirty, ..reading(2, 5) },
            Reading { cache: CacheState::Unknown, ..reading(2, 5) },
            Reading {
                layout: Layout::undecided(8192, PageSize::new(4096).unwrap(), Undecided::Inline),
                ..reading(2, 5)
            },
        ];
        for file in unsettled {
            assert_eq!(opened.enclose(&file).unwrap_err(), Unproven::Undecided, "{file:?}");
            assert!(Opened::new(7u32, file).is_err());
        }
    }
}
