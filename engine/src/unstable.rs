//! The unstable index of one domain: candidates of the current pass that wait for a mate.
//!
//! What it guarantees: nothing about bytes. What it names was so when the scanner passed; nobody is kept
//! from writing since. That is why it is emptied wholesale between passes (K-083), why a match is only a
//! reason to protect and compare, and why it needs no upkeep when pages change. Invariant: everything in
//! it was entered in the pass it was last reset for (age 0); leftovers of an earlier pass (age 1) are in
//! records only and must not be erased from here (K-082).

use crate::host::NodeId;
use crate::runs::RunValue;
use crate::stable::{Key, KeyMap};
use crate::units::{PageCount, Site};

impl RunValue for Site {
    fn advance(self, by: u64) -> Self {
        Site { mapping: self.mapping, offset: self.offset.plus(PageCount(by)) }
    }
}

/// The low 8 bits of the number of a pass (K-080).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Pass(pub u8);

impl Pass {
    /// Of pass number `generation`.
    pub fn of(generation: u64) -> Pass {
        Pass((generation & 0xff) as u8)
    }

    /// Passes between an item's insertion and now.
    ///
    /// # Panics
    /// On anything but 0 and 1 (K-081): an item was not visited for a whole pass, so that it can't be
    /// said any more which index it is in.
    pub fn age(self, now: Pass) -> u8 {
        let age = now.0.wrapping_sub(self.0);
        assert!(age <= 1, "an unstable item has age {age} (K-081)");
        age
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct UnstableIndex {
    waiting: KeyMap<Site>,
    pass: Pass,
}

impl UnstableIndex {
    /// Empties the index for a new pass.
    pub fn reset(&mut self, pass: Pass) {
        self.waiting.clear();
        self.pass = pass;
    }

    /// A candidate with this key, and for how many pages that (or its absence) goes on.
    pub fn segment(&self, now: Pass, node: NodeId, key: Key, most: u64) -> (Option<Site>, u64) {
        assert_eq!(self.pass, now, "the index of a pass that ended is searched (K-083)");
        self.waiting.segment(node, key, most)
    }

    /// Enters a candidate under keys nobody waits under.
    pub fn insert(&mut self, now: Pass, node: NodeId, key: Key, pages: PageCount, site: Site) {
        assert_eq!(
            self.segment(now, node, key, pages.0),
            (None, pages.0),
            "somebody waits under {key:?} already"
        );
        self.waiting.insert(node, key, pages.0, site);
    }

    /// Takes out an item of the current pass (age 0).
    pub fn erase(&mut self, now: Pass, node: NodeId, key: Key, pages: PageCount, site: Site) {
        assert_eq!(self.pass, now, "the index of a pass that ended is erased from (K-083)");
        let erased = self.waiting.remove(node, key, pages.0, site);
        assert_eq!(erased, pages.0, "an item of this pass is not in the index (K-082)");
    }

    pub fn entries(&self) -> usize {
        self.waiting.entries()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stable::tests::place;
    use crate::units::{MappingId, PageIndex};

    const N0: NodeId = NodeId(0);

    fn site(offset: u64) -> Site {
        Site { mapping: MappingId(1), offset: PageIndex(offset) }
    }

    #[test]
    fn ages_wrap_k080_k081() {
        assert_eq!(Pass::of(255).age(Pass::of(256)), 1);
        assert_eq!(Pass::of(256).age(Pass::of(256)), 0);
    }

    #[test]
    #[should_panic(expected = "age 2 (K-081)")]
    fn age_two_is_fatal_k081() {
        Pass::of(3).age(Pass::of(5));
    }

    #[test]
    fn a_part_of_a_waiting_run_leaves_alone() {
        let (mut index, now) = (UnstableIndex::default(), Pass(0));
        index.insert(now, N0, place(10), PageCount(8), site(100));
        index.erase(now, N0, place(12), PageCount(2), site(102));
        assert_eq!(index.segment(now, N0, place(10), 9), (Some(site(100)), 2));
        assert_eq!(index.segment(now, N0, place(12), 9), (None, 2));
        index.reset(Pass(1));
        assert_eq!(index.entries(), 0);
    }

    #[test]
    #[should_panic(expected = "K-083")]
    fn the_index_of_an_ended_pass_is_not_searched_k083() {
        UnstableIndex::default().segment(Pass(1), N0, place(0), 1);
    }

    #[test]
    #[should_panic(expected = "K-082")]
    fn erasing_what_is_not_there_is_fatal_k082() {
        UnstableIndex::default().erase(Pass(0), N0, place(0), PageCount(1), site(0));
    }
}
