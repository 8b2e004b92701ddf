//! The extent map of a file as its flavour's FIEMAP answers it.
//!
//! Up to EOF, in file order, lengths in whole blocks. What it deliberately does not do: make up for what the cache knows
//! better. A map shows what is on disk, or was, and XFS does not even show every reservation.

use std::io;

use pagefold_engine::layout::{ExtentFlags, RawExtent};
use rustix::io::Errno;

use super::node::{FileBody, Mapped, NodeId};
use super::rng::mix;
use super::world::{Fs, World};

/// XFS reserves copies of shared blocks in aligned windows of this many blocks (its default `cowextsize`).
const COW_WINDOW_BLOCKS: u64 = 32;

impl World {
    /// FIEMAP without `FIEMAP_FLAG_SYNC`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is none, `ENOENT`, `EINVAL`.
    pub fn extent_map(&self, id: NodeId, out: &mut Vec<RawExtent>) -> io::Result<()> {
        out.clear();
        let (fs, file) = self.file(id)?;
        if !fs.habits.fiemap {
            return Err(Errno::OPNOTSUPP.into());
        }
        let block = fs.habits.block_bytes;
        if let Some(inline) = &file.inline {
            let flags = ExtentFlags::DATA_INLINE | ExtentFlags::NOT_ALIGNED;
            let length = (inline.len() as u64).next_multiple_of(block);
            out.push(RawExtent { logical: 0, physical: 0, length, flags });
        }
        for (index, mapped) in file.blocks.range(..file.size.div_ceil(block)) {
            if *mapped == Mapped::Delalloc && self.hidden_beside_cow(fs, file, *index) {
                continue;
            }
            let one = self.one_block(fs, file, *index, *mapped);
            match out.last_mut() {
                Some(last) if joins(last, &one) && !cut_here(*index) => last.length += block,
                _ => out.push(one),
            }
        }
        if let Some(last) = out.last_mut() {
            last.flags |= ExtentFlags::LAST;
        }
        if self.bugs.encoded_looks_plain {
            out.iter_mut().for_each(|e| e.flags.remove(ExtentFlags::ENCODED));
        }
        Ok(())
    }

    fn one_block(&self, fs: &Fs, file: &FileBody, index: u64, mapped: Mapped) -> RawExtent {
        let block = fs.habits.block_bytes;
        let device = fs.device_ref(file.realtime);
        let shared = |refs: u32| if refs > 1 { ExtentFlags::SHARED } else { ExtentFlags::empty() };
        let unallocated = (0, ExtentFlags::DELALLOC | ExtentFlags::UNKNOWN);
        let (physical, flags) = match mapped {
            Mapped::Data(b) => (b.0 * block, shared(device.refs(b))),
            Mapped::Unwritten(b) => {
                let dirty = fs.habits.delalloc_over_unwritten && self.block_is_dirty(file, index, block);
                if dirty {
                    unallocated
                } else {
                    (b.0 * block, ExtentFlags::UNWRITTEN | shared(device.refs(b)))
                }
            }
            Mapped::Delalloc => unallocated,
            // The address is that of the whole compressed extent, whichever slice this is.
            Mapped::Encoded { id, slice } => (
                device.encoded_home(id).0 * block,
                ExtentFlags::ENCODED | shared(device.slice_refs(id, slice)),
            ),
        };
        RawExtent { logical: index * block, physical, length: block, flags }
    }

    /// Whether a reservation lies in a window in which a shared block waits to be copied.
    fn hidden_beside_cow(&self, fs: &Fs, file: &FileBody, index: u64) -> bool {
        if !fs.habits.hides_delalloc_beside_cow {
            return false;
        }
        let start = index - index % COW_WINDOW_BLOCKS;
        let device = fs.device_ref(file.realtime);
        file.blocks.range(start..start + COW_WINDOW_BLOCKS).any(|(i, m)| match m {
            Mapped::Data(b) => device.refs(*b) > 1 && self.block_is_dirty(file, *i, fs.habits.block_bytes),
            _ => false,
        })
    }

    fn block_is_dirty(&self, file: &FileBody, index: u64, block: u64) -> bool {
        let per_page = self.page.bytes() / block;
        let bit = 1 << (index % per_page);
        file.cache.get(&(index / per_page)).is_some_and(|p| (p.dirty | p.writeback) & bit != 0)
    }
}

fn joins(last: &RawExtent, next: &RawExtent) -> bool {
    let follows = last.logical + last.length == next.logical && last.flags == next.flags;
    let addressed = !next.flags.intersects(ExtentFlags::UNKNOWN | ExtentFlags::ENCODED);
    let place = if addressed { last.physical + last.length } else { last.physical };
    follows && place == next.physical
}

/// Now and then one extent is told as two: file systems split records, and nobody may mind.
fn cut_here(index: u64) -> bool {
    mix(index).is_multiple_of(11)
}
