//! One simulated device: numbered blocks with reference counts and bytes.
//!
//! Invariant: a block is either free or referenced; freed numbers are handed out again soon, because reuse of
//! addresses is what a stored key must survive (design section 5, rule 5). Without data a block reads as zeros.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rustix::io::Errno;

use super::rng::Rng;

/// Number of a block on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u64);

#[derive(Clone, Debug)]
struct Block {
    refs: u32,
    data: Option<Box<[u8]>>,
}

/// A compressed extent: one place on disk, many blocks of file data.
#[derive(Clone, Debug)]
struct Encoded {
    home: Vec<BlockNo>,
    slices: Vec<Box<[u8]>>,
    refs: Vec<u32>,
}

/// Name of a compressed extent; stays when the extent is relocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EncodedId(pub u64);

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    block_bytes: usize,
    blocks: BTreeMap<BlockNo, Block>,
    encoded: BTreeMap<EncodedId, Encoded>,
    free: BTreeSet<BlockNo>,
    next: u64,
    next_encoded: u64,
    /// Most blocks that may be in use; `None`: no limit.
    pub capacity_blocks: Option<u64>,
}

impl Device {
    /// An empty device. The first addresses stay unused: 0 is what maps say where there is no address.
    #[must_use]
    pub fn new(block_bytes: u64) -> Device {
        Device {
            block_bytes: block_bytes as usize,
            blocks: BTreeMap::new(),
            encoded: BTreeMap::new(),
            free: BTreeSet::new(),
            next: 64,
            next_encoded: 0,
            capacity_blocks: None,
        }
    }

    /// Blocks in use.
    #[must_use]
    pub fn used_blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether `count` more blocks fit. Asked when space is reserved; writeback of what was reserved never fails.
    ///
    /// # Errors
    /// `ENOSPC` over capacity.
    pub fn room_for(&self, count: usize) -> io::Result<()> {
        match self.capacity_blocks {
            Some(capacity) if self.used_blocks() + count as u64 > capacity => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    /// Takes `count` blocks in a row; each with one reference.
    pub fn alloc(&mut self, count: usize, rng: &mut Rng) -> Vec<BlockNo> {
        let reused = if rng.percent(60) { self.free_run(count) } else { None };
        let first = match reused {
            Some(first) => first,
            None => {
                let gap = rng.below(3);
                (0..gap).for_each(|i| {
                    self.free.insert(BlockNo(self.next + i));
                });
                let first = self.next + gap;
                self.next = first + count as u64;
                first
            }
        };
        let numbers: Vec<BlockNo> = (first..first + count as u64).map(BlockNo).collect();
        for n in &numbers {
            self.free.remove(n);
            let before = self.blocks.insert(*n, Block { refs: 1, data: None });
            assert!(before.is_none(), "block {} handed out twice", n.0);
        }
        numbers
    }

    fn free_run(&self, count: usize) -> Option<u64> {
        let mut run = 0;
        let mut last = 0;
        for n in &self.free {
            run = if run > 0 && n.0 == last + 1 { run + 1 } else { 1 };
            last = n.0;
            if run == count {
                return Some(last + 1 - count as u64);
            }
        }
        None
    }

    /// One more reference.
    pub fn grab(&mut self, block: BlockNo) {
        self.blocks.get_mut(&block).expect("reference to a free block").refs += 1;
    }

    /// One reference less; the last frees the block.
    pub fn release(&mut self, block: BlockNo) {
        let entry = self.blocks.get_mut(&block).expect("release of a free block");
        entry.refs -= 1;
        if entry.refs == 0 {
            self.blocks.remove(&block);
            self.free.insert(block);
        }
    }

    /// References to a block.
    #[must_use]
    pub fn refs(&self, block: BlockNo) -> u32 {
        self.blocks.get(&block).map_or(0, |b| b.refs)
    }

    /// Writes a whole block.
    pub fn write(&mut self, block: BlockNo, data: &[u8]) {
        assert_eq!(data.len(), self.block_bytes);
        self.blocks.get_mut(&block).expect("write to a free block").data = Some(data.into());
    }

    /// Reads a whole block into `out`.
    pub fn read(&self, block: BlockNo, out: &mut [u8]) {
        match &self.blocks.get(&block).expect("read of a free block").data {
            Some(data) => out.copy_from_slice(data),
            None => out.fill(0),
        }
    }

    /// Stores `slices` (one block of file data each) as one compressed extent, every slice with one reference.
    pub fn store_encoded(&mut self, slices: Vec<Box<[u8]>>, rng: &mut Rng) -> EncodedId {
        let home = self.alloc((slices.len() / 2).max(1), rng);
        let id = EncodedId(self.next_encoded);
        self.next_encoded += 1;
        let refs = vec![1; slices.len()];
        self.encoded.insert(id, Encoded { home, slices, refs });
        id
    }

    /// Where a compressed extent lies: first block.
    #[must_use]
    pub fn encoded_home(&self, id: EncodedId) -> BlockNo {
        self.encoded[&id].home[0]
    }

    /// One more reference to a slice.
    pub fn grab_slice(&mut self, id: EncodedId, slice: u32) {
        self.encoded.get_mut(&id).expect("reference to a freed extent").refs[slice as usize] += 1;
    }

    /// One less; an extent without references is freed as a whole.
    pub fn release_slice(&mut self, id: EncodedId, slice: u32) {
        let extent = self.encoded.get_mut(&id).expect("release of a freed extent");
        extent.refs[slice as usize] -= 1;
        if extent.refs.iter().all(|r| *r == 0) {
            let home = self.encoded.remove(&id).expect("just seen").home;
            home.into_iter().for_each(|b| self.release(b));
        }
    }

    /// References to a slice.
    #[must_use]
    pub fn slice_refs(&self, id: EncodedId, slice: u32) -> u32 {
        self.encoded.get(&id).map_or(0, |e| e.refs[slice as usize])
    }

    /// Reads a slice into `out`.
    pub fn read_slice(&self, id: EncodedId, slice: u32, out: &mut [u8]) {
        out.copy_from_slice(&self.encoded[&id].slices[slice as usize]);
    }

    /// Moves every block to another address (btrfs balance); gives old -> new. What addresses freed by this are used
    /// for next is chance.
    pub fn relocate(&mut self, rng: &mut Rng) -> BTreeMap<BlockNo, BlockNo> {
        let old: Vec<BlockNo> = self.blocks.keys().copied().collect();
        // The new places: fresh ones and freed ones mixed, never the own old one.
        let mut targets: Vec<u64> = self.free.iter().map(|b| b.0).collect();
        targets.extend(self.next..self.next + old.len() as u64);
        self.next += old.len() as u64;
        let skip = rng.below((targets.len() - old.len()) as u64 + 1) as usize;
        let moved: BTreeMap<BlockNo, BlockNo> =
            old.iter().zip(targets[skip..].iter()).map(|(o, t)| (*o, BlockNo(*t))).collect();
        for (from, to) in &moved {
            let block = self.blocks.remove(from).expect("listed above");
            self.free.remove(to);
            self.blocks.insert(*to, block);
        }
        for n in 64..self.next {
            if !self.blocks.contains_key(&BlockNo(n)) {
                self.free.insert(BlockNo(n));
            }
        }
        for extent in self.encoded.values_mut() {
            extent.home.iter_mut().for_each(|b| *b = moved[b]);
        }
        moved
    }
}
