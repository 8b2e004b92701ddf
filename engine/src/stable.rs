//! The stable index of one domain: shared pages by what is known of their bytes.
//!
//! What it guarantees: every page it names is a shared page that exists now, is protected, and is shown
//! by at least one recorded site; so a match may be joined without a checksum filter (K-058). What it
//! does not guarantee: that a match has the candidate's bytes. A place on disk is a hint (design 5.5) and
//! a digest may collide: the proof decides (M-024's full comparison happens there). KSM orders its tree
//! by contents; here order is by key, since the engine never holds a page's bytes, and since a place
//! needs no read at all.
//!
//! Several shared pages may have one key (`max_page_sharing`, relocation into a node that has one
//! already, M-018): the newest is found, the others stay known until their last site leaves.

use std::collections::BTreeMap;

use crate::host::{Digest, NodeId, SharedPage, SharedSpan};
use crate::identity::{AddressSpace, Identity};
use crate::runs::{RunMap, RunValue};
use crate::units::PageCount;

/// Where a run of places lies on disk: within a shelf, page numbers are consecutive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Where the address is unique.
    pub space: AddressSpace,
    /// Bytes of a tail page before EOF, 0 for whole pages (design section 5, rule 4).
    pub valid: u32,
    /// Address in pages.
    pub page: u64,
}

impl Place {
    /// The place an identity names, if it names one.
    pub fn of(identity: Identity) -> Option<Place> {
        match identity {
            Identity::Physical { space, page } => Some(Place { space, valid: 0, page }),
            Identity::Tail { space, page, valid } => Some(Place { space, valid, page }),
            _ => None,
        }
    }

    fn shelf(self, node: NodeId) -> Shelf {
        (node, self.space, self.valid)
    }
}

impl RunValue for Place {
    fn advance(self, by: u64) -> Self {
        Place { page: self.page + by, ..self }
    }

    /// A tail is always one page.
    fn joins(self, pages: u64, next: Self) -> bool {
        self.valid == 0 && self.advance(pages) == next
    }
}

type Shelf = (NodeId, AddressSpace, u32);

/// By what a page is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Place(Place),
    Digest(Digest),
}

impl RunValue for Key {
    fn advance(self, by: u64) -> Self {
        match self {
            Key::Place(place) => Key::Place(place.advance(by)),
            Key::Digest(_) => {
                assert_eq!(by, 0, "a digest names one page");
                self
            }
        }
    }

    fn joins(self, pages: u64, next: Self) -> bool {
        match (self, next) {
            (Key::Place(a), Key::Place(b)) => a.joins(pages, b),
            _ => false,
        }
    }
}

/// An index from keys to runs of things that advance with the key; both indexes are made of it.
#[derive(Debug)]
pub(crate) struct KeyMap<V> {
    places: RunMap<Shelf, V>,
    digests: BTreeMap<(NodeId, Digest), V>,
}

impl<V> Default for KeyMap<V> {
    fn default() -> Self {
        KeyMap { places: RunMap::default(), digests: BTreeMap::new() }
    }
}

impl<V: RunValue> KeyMap<V> {
    /// What is known under `key`, and for how many of at most `most` pages that (or nothing) goes on.
    pub fn segment(&self, node: NodeId, key: Key, most: u64) -> (Option<V>, u64) {
        match key {
            Key::Place(place) => self.places.segment(place.shelf(node), place.page, most),
            Key::Digest(digest) => (self.digests.get(&(node, digest)).copied(), 1),
        }
    }

    /// Enters `pages` pages, in place of what was known under these keys.
    pub fn insert(&mut self, node: NodeId, key: Key, pages: u64, value: V) {
        match key {
            Key::Place(place) => {
                self.places.cut(place.shelf(node), place.page, pages);
                self.places.put(place.shelf(node), place.page, pages, value);
            }
            Key::Digest(digest) => {
                assert_eq!(pages, 1, "a digest names one page");
                self.digests.insert((node, digest), value);
            }
        }
    }

    /// Takes out what under these keys is `value` (and its followers), leaves what others entered since.
    /// Returns how many pages were taken out.
    pub fn remove(&mut self, node: NodeId, key: Key, pages: u64, value: V) -> u64 {
        match key {
            Key::Place(place) => {
                let mut removed = 0;
                for piece in self.places.cut(place.shelf(node), place.page, pages) {
                    if value.advance(piece.start - place.page) == piece.value {
                        removed += piece.pages;
                    } else {
                        self.places.put(place.shelf(node), piece.start, piece.pages, piece.value);
                    }
                }
                removed
            }
            Key::Digest(digest) if self.digests.get(&(node, digest)) == Some(&value) => {
                self.digests.remove(&(node, digest));
                1
            }
            Key::Digest(_) => 0,
        }
    }

    pub fn clear(&mut self) {
        self.places.clear();
        self.digests.clear();
    }

    pub fn entries(&self) -> usize {
        self.places.entries() + self.digests.len()
    }
}

impl RunValue for SharedPage {
    fn advance(self, by: u64) -> Self {
        self.plus(PageCount(by))
    }
}

/// A key with the memory node it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filed {
    node: NodeId,
    key: Key,
}

impl RunValue for Filed {
    fn advance(self, by: u64) -> Self {
        Filed { key: self.key.advance(by), ..self }
    }

    fn joins(self, pages: u64, next: Self) -> bool {
        self.node == next.node && self.key.joins(pages, next.key)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct StableIndex {
    found: KeyMap<SharedPage>,
    /// Under which key each page was entered: one by place or digest, and possibly one digest besides.
    filed: RunMap<(), Filed>,
    extra: BTreeMap<SharedPage, (NodeId, Digest)>,
}

impl StableIndex {
    /// The shared page to try for `key`, and for how many pages that goes on.
    pub fn segment(&self, node: NodeId, key: Key, most: u64) -> (Option<SharedPage>, u64) {
        self.found.segment(node, key, most)
    }

    /// Enters new shared pages.
    pub fn insert(&mut self, node: NodeId, key: Key, shared: SharedSpan) {
        self.filed.put((), shared.start.0, shared.pages.0, Filed { node, key });
        self.found.insert(node, key, shared.pages.0, shared.start);
    }

    /// Enters one page under a digest besides the place it has.
    pub fn insert_digest(&mut self, node: NodeId, digest: Digest, page: SharedPage) {
        self.extra.insert(page, (node, digest));
        self.found.insert(node, Key::Digest(digest), 1, page);
    }

    /// Takes shared pages out: no site is left (K-014).
    pub fn remove(&mut self, shared: SharedSpan) {
        for piece in self.filed.cut((), shared.start.0, shared.pages.0) {
            let Filed { node, key } = piece.value;
            self.found.remove(node, key, piece.pages, SharedPage(piece.start));
        }
        for (page, (node, digest)) in self.cut_extra(shared) {
            self.found.remove(node, Key::Digest(digest), 1, page);
        }
    }

    /// Shared pages moved (M-011): the same keys now name `to`. With `moved` the node or the place is
    /// another one too; then the pages are filed anew (M-018, M-019).
    pub fn relocate(&mut self, from: SharedSpan, to: SharedSpan, node: Option<NodeId>, place: Option<Place>) {
        assert_eq!(from.pages, to.pages, "a relocation keeps the number of pages");
        let filed = self.filed.cut((), from.start.0, from.pages.0);
        let extra = self.cut_extra(from);
        for piece in &filed {
            self.found.remove(piece.value.node, piece.value.key, piece.pages, SharedPage(piece.start));
        }
        for piece in filed {
            let by = piece.start - from.start.0;
            let key = match (piece.value.key, place) {
                (Key::Place(_), Some(place)) => Key::Place(place.advance(by)),
                (key, _) => key,
            };
            let start = to.start.plus(PageCount(by));
            let span = SharedSpan { start, pages: PageCount(piece.pages) };
            self.insert(node.unwrap_or(piece.value.node), key, span);
        }
        for (page, (old, digest)) in extra {
            self.found.remove(old, Key::Digest(digest), 1, page);
            let page = to.start.plus(PageCount(page.0 - from.start.0));
            self.insert_digest(node.unwrap_or(old), digest, page);
        }
    }

    fn cut_extra(&mut self, shared: SharedSpan) -> Vec<(SharedPage, (NodeId, Digest))> {
        let pages: Vec<_> = self.extra.range(shared.start..shared.end()).map(|(p, v)| (*p, *v)).collect();
        for (page, _) in &pages {
            self.extra.remove(page);
        }
        pages
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.filed.entries() == 0 && self.extra.is_empty() && self.found.entries() == 0
    }

    /// Pages in the index, for audits.
    pub fn pages(&self) -> u64 {
        self.filed.all().map(|(_, p)| p.pages).sum()
    }

    pub fn entries(&self) -> usize {
        self.found.entries() + self.filed.entries() + self.extra.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::identity::DeviceClass;
    use crate::units::FsId;

    pub(crate) const SPACE: AddressSpace = AddressSpace { fs: FsId(0), class: DeviceClass::Data };
    const N0: NodeId = NodeId(0);

    pub(crate) fn place(page: u64) -> Key {
        Key::Place(Place { space: SPACE, valid: 0, page })
    }

    fn shared(start: u64, pages: u64) -> SharedSpan {
        SharedSpan { start: SharedPage(start), pages: PageCount(pages) }
    }

    #[test]
    fn a_run_is_found_from_its_middle_and_gaps_have_a_length() {
        let mut index = StableIndex::default();
        index.insert(N0, place(100), shared(7, 10));
        assert_eq!(index.segment(N0, place(95), 20), (None, 5));
        assert_eq!(index.segment(N0, place(104), 20), (Some(SharedPage(11)), 6));
        assert_eq!(index.segment(NodeId(1), place(104), 20), (None, 20));
        index.remove(shared(9, 2));
        assert_eq!(index.segment(N0, place(102), 20), (None, 2));
        assert_eq!(index.pages(), 8);
        index.remove(shared(7, 10));
        assert!(index.is_empty());
    }

    #[test]
    fn tails_with_other_valid_lengths_are_other_places_design_5_4() {
        let mut index = StableIndex::default();
        let tail = |valid| Key::Place(Place { space: SPACE, valid, page: 5 });
        index.insert(N0, tail(100), shared(1, 1));
        assert_eq!(index.segment(N0, tail(101), 1), (None, 1));
        assert_eq!(index.segment(N0, place(5), 1), (None, 1));
        assert_eq!(index.segment(N0, tail(100), 1), (Some(SharedPage(1)), 1));
    }

    #[test]
    fn removing_an_older_copy_leaves_the_newer_one_found() {
        let mut index = StableIndex::default();
        index.insert(N0, place(100), shared(0, 4));
        index.insert(N0, place(102), shared(50, 1));
        index.remove(shared(0, 4));
        assert_eq!(index.segment(N0, place(102), 9), (Some(SharedPage(50)), 1));
        assert_eq!(index.segment(N0, place(100), 9), (None, 2));
        index.remove(shared(50, 1));
        assert!(index.is_empty());
    }

    #[test]
    fn relocation_renames_and_refiles_m011_m018() {
        let mut index = StableIndex::default();
        index.insert(N0, place(100), shared(0, 4));
        index.insert_digest(N0, Digest([1; 16]), SharedPage(1));
        index.relocate(shared(0, 2), shared(90, 2), None, None);
        assert_eq!(index.segment(N0, place(100), 9), (Some(SharedPage(90)), 2));
        assert_eq!(index.segment(N0, place(102), 9), (Some(SharedPage(2)), 2));
        assert_eq!(index.segment(N0, Key::Digest(Digest([1; 16])), 1), (Some(SharedPage(91)), 1));
        let moved = Place { space: SPACE, valid: 0, page: 500 };
        index.relocate(shared(2, 2), shared(2, 2), Some(NodeId(1)), Some(moved));
        assert_eq!(index.segment(N0, place(102), 9), (None, 9));
        assert_eq!(index.segment(NodeId(1), place(501), 9), (Some(SharedPage(3)), 1));
        index.remove(shared(90, 2));
        index.remove(shared(2, 2));
        assert!(index.is_empty());
    }
}
