//! How written bytes reach the disk: writeback, relocation, crash.
//!
//! Invariant (design 5.6): between a write and the end of its writeback the extent map shows the *old* mapping of
//! every block that had one. The map changes when writeback ends, not when it begins, as with XFS's copy-on-write
//! fork and btrfs's ordered extents.

use std::collections::BTreeMap;
use std::io;

use super::data::release;
use super::disk::BlockNo;
use super::node::{FileBody, FsIx, InFlight, Mapped, NodeId};
use super::rng::Rng;
use super::world::{Fs, World};

/// Blocks in one compressed extent at most (128 KiB of 4 KiB blocks, as on btrfs).
const ENCODED_BLOCKS_MAX: usize = 32;

impl World {
    /// Starts writing every dirty page; their bytes are taken as they are now.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn begin_writeback(&mut self, id: NodeId) -> io::Result<()> {
        let page_bytes = self.page.bytes();
        let (fs, file, _) = self.file_mut(id)?;
        if !fs.habits.fiemap {
            return Ok(());
        }
        let end = file.size.div_ceil(page_bytes);
        for (page, cached) in file.cache.range_mut(..end) {
            if cached.dirty != 0 {
                let blocks = std::mem::take(&mut cached.dirty);
                cached.writeback |= blocks;
                file.inflight.push(InFlight { page: *page, blocks, data: cached.data.clone() });
            }
        }
        Ok(())
    }

    /// Ends what `begin_writeback` started: bytes are on disk, the map tells where.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn finish_writeback(&mut self, id: NodeId) -> io::Result<()> {
        let page_bytes = self.page.bytes();
        let (fs, file, rng) = self.file_mut(id)?;
        let flights = std::mem::take(&mut file.inflight);
        if flights.is_empty() {
            return Ok(());
        }
        let block_bytes = fs.habits.block_bytes;
        let end = file.size.div_ceil(block_bytes);
        let mut arrived: BTreeMap<u64, Box<[u8]>> = BTreeMap::new();
        for flight in flights {
            let first = flight.page * (page_bytes / block_bytes);
            for (i, bytes) in flight.data.chunks(block_bytes as usize).enumerate() {
                if flight.blocks & (1 << i) != 0 && first + (i as u64) < end {
                    arrived.insert(first + i as u64, bytes.into());
                }
            }
            if let Some(cached) = file.cache.get_mut(&flight.page) {
                cached.writeback = 0;
            }
        }
        store(fs, file, rng, arrived);
        Ok(())
    }

    /// `fsync(2)`.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn sync(&mut self, id: NodeId) -> io::Result<()> {
        self.finish_writeback(id)?;
        self.begin_writeback(id)?;
        self.finish_writeback(id)
    }

    /// `sync(2)`.
    pub fn sync_all(&mut self) {
        for id in self.files() {
            self.sync(id).expect("files() gives files");
        }
    }

    /// Every regular file.
    #[must_use]
    pub fn files(&self) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, n)| n.file().is_some()).map(|(id, _)| *id).collect()
    }

    /// Gives every block of a file system another address (btrfs balance). Files do not notice: no time changes.
    pub fn relocate(&mut self, fs: FsIx) {
        let host = &mut self.fses[fs.0];
        let tables = [host.data.relocate(&mut self.rng), host.realtime.relocate(&mut self.rng)];
        for node in self.nodes.values_mut().filter(|n| n.fs == fs) {
            let Some(file) = node.file_mut() else { continue };
            let table = &tables[usize::from(file.realtime)];
            for mapped in file.blocks.values_mut() {
                if let Mapped::Data(b) | Mapped::Unwritten(b) = mapped {
                    *b = table[b];
                }
            }
        }
    }

    /// Power failure: what was only in cache is gone. Sizes survive (see "Divergence from Linux").
    pub fn crash(&mut self) {
        for id in self.files() {
            let Ok((fs, file, _)) = self.file_mut(id) else { continue };
            if !fs.habits.fiemap {
                continue;
            }
            file.cache.clear();
            file.inflight.clear();
            file.blocks.retain(|_, m| *m != Mapped::Delalloc);
        }
    }
}

/// Puts arrived blocks where they belong: in place where that is allowed, else somewhere new.
fn store(fs: &mut Fs, file: &mut FileBody, rng: &mut Rng, mut arrived: BTreeMap<u64, Box<[u8]>>) {
    if keep_inline(fs, file, &arrived) {
        return;
    }
    let mut fresh: Vec<(u64, Box<[u8]>)> = Vec::new();
    while let Some((index, bytes)) = arrived.pop_first() {
        let cow = fs.habits.cow_always;
        let realtime = file.realtime;
        let device = fs.device(realtime);
        let in_place = match file.blocks.get(&index) {
            Some(Mapped::Data(b)) => (!cow && device.refs(*b) == 1).then_some(*b),
            Some(Mapped::Unwritten(b)) => (device.refs(*b) == 1).then_some(*b),
            Some(Mapped::Encoded { .. } | Mapped::Delalloc) => None,
            None if index == 0 && file.inline.is_some() => {
                file.inline = None;
                None
            }
            None => {
                assert!(bytes.iter().all(|b| *b == 0), "bytes written to a hole without reservation");
                continue;
            }
        };
        match in_place {
            Some(block) => {
                device.write(block, &bytes);
                file.blocks.insert(index, Mapped::Data(block));
            }
            None => fresh.push((index, bytes)),
        }
    }
    for run in split_runs(fresh, rng) {
        store_run(fs, file, rng, run);
    }
}

/// Small files of btrfs live in metadata. Says whether that is where the bytes went.
fn keep_inline(fs: &mut Fs, file: &mut FileBody, arrived: &BTreeMap<u64, Box<[u8]>>) -> bool {
    let small = file.size > 0 && file.size <= fs.habits.inline_max_bytes;
    let only_first = file.blocks.keys().all(|b| *b == 0);
    let preallocated = matches!(file.blocks.get(&0), Some(Mapped::Unwritten(_)));
    match arrived.get(&0) {
        Some(bytes) if small && only_first && !preallocated => {
            file.inline = Some(bytes[..file.size as usize].to_vec());
            if let Some(old) = file.blocks.remove(&0) {
                release(fs, file.realtime, old);
            }
            true
        }
        _ => false,
    }
}

type Fresh = Vec<(u64, Box<[u8]>)>;

/// Blocks that follow each other, now and then cut in two: allocators do not always find one place.
fn split_runs(fresh: Fresh, rng: &mut Rng) -> Vec<Fresh> {
    let mut runs: Vec<Fresh> = Vec::new();
    for (index, bytes) in fresh {
        let joins = runs.last().and_then(|r| r.last()).is_some_and(|(last, _)| last + 1 == index);
        if !joins || rng.percent(4) {
            runs.push(Vec::new());
        }
        runs.last_mut().expect("just pushed").push((index, bytes));
    }
    runs
}

fn store_run(fs: &mut Fs, file: &mut FileBody, rng: &mut Rng, run: Fresh) {
    let compress = fs.habits.compress && run.len() >= 2 && compressible(&run);
    if compress {
        let mut rest = run.into_iter().peekable();
        while rest.peek().is_some() {
            let (indexes, slices): (Vec<u64>, Vec<Box<[u8]>>) =
                rest.by_ref().take(ENCODED_BLOCKS_MAX).unzip();
            let id = fs.device(file.realtime).store_encoded(slices, rng);
            for (slice, index) in indexes.into_iter().enumerate() {
                put(fs, file, index, Mapped::Encoded { id, slice: slice as u32 });
            }
        }
        return;
    }
    let places: Vec<BlockNo> = fs.device(file.realtime).alloc(run.len(), rng);
    for ((index, bytes), place) in run.into_iter().zip(places) {
        fs.device(file.realtime).write(place, &bytes);
        put(fs, file, index, Mapped::Data(place));
    }
}

fn put(fs: &mut Fs, file: &mut FileBody, index: u64, mapped: Mapped) {
    if let Some(old) = file.blocks.insert(index, mapped) {
        release(fs, file.realtime, old);
    }
}

/// Few distinct byte values: zstd would do well.
fn compressible(run: &Fresh) -> bool {
    let mut seen = [false; 256];
    run.iter().flat_map(|(_, bytes)| bytes.iter()).for_each(|b| seen[*b as usize] = true);
    seen.iter().filter(|s| **s).count() <= 16
}
