//! Data of files: read, write, truncate, punch, preallocate; everything through the page cache.
//!
//! Invariant: what a page shows is its cached copy if there is one, else what its blocks say; past EOF it is zeros.
//! A write touches the cache only: the map changes when the write reaches the disk (`writeback`), with the one
//! exception that a hole becomes a reservation at once.

use std::io;

use rustix::io::Errno;

use super::node::{CachePage, FileBody, Mapped, NodeId};
use super::world::{Fs, World};

/// A file size no operation goes beyond (bytes), as on XFS with 4 KiB blocks: 8 EiB - 1.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// What a page's blocks say, past EOF zeros.
pub(crate) fn disk_page(fs: &Fs, file: &FileBody, page: u64, page_bytes: u64) -> Vec<u8> {
    let mut out = vec![0; page_bytes as usize];
    let block_bytes = fs.habits.block_bytes as usize;
    let per_page = page_bytes / fs.habits.block_bytes;
    let device = fs.device_ref(file.realtime);
    for (i, part) in out.chunks_mut(block_bytes).enumerate() {
        match file.blocks.get(&(page * per_page + i as u64)) {
            Some(Mapped::Data(block)) => device.read(*block, part),
            Some(Mapped::Encoded { id, slice }) => device.read_slice(*id, *slice, part),
            Some(Mapped::Unwritten(_) | Mapped::Delalloc) | None => {}
        }
    }
    if page == 0
        && let Some(inline) = &file.inline
    {
        out[..inline.len()].copy_from_slice(inline);
    }
    let valid = file.size.saturating_sub(page * page_bytes).min(page_bytes) as usize;
    out[valid..].fill(0);
    out
}

impl World {
    /// The page as a reader sees it, without bringing it into cache.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn peek_page(&self, id: NodeId, page: u64) -> io::Result<Vec<u8>> {
        let (fs, file) = self.file(id)?;
        Ok(match file.cache.get(&page) {
            Some(cached) => cached.data.to_vec(),
            None => disk_page(fs, file, page, self.page.bytes()),
        })
    }

    /// The page's cached copy, brought in if need be.
    pub(crate) fn cached(&mut self, id: NodeId, page: u64) -> io::Result<&mut CachePage> {
        let page_bytes = self.page.bytes();
        let (fs, file, _) = self.file_mut(id)?;
        if !file.cache.contains_key(&page) {
            let data = disk_page(fs, file, page, page_bytes).into();
            file.cache.insert(page, CachePage { data, dirty: 0, writeback: 0 });
        }
        Ok(file.cache.get_mut(&page).expect("just put in"))
    }

    /// `read(2)`: through the cache, short at EOF.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn read_at(&mut self, id: NodeId, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let size = self.file(id)?.1.size;
        let end = offset.saturating_add(len).min(size);
        let mut out = Vec::new();
        let bytes = self.page.bytes();
        let mut at = offset;
        while at < end {
            let (page, inner) = (at / bytes, (at % bytes) as usize);
            let n = (bytes - inner as u64).min(end - at) as usize;
            out.extend_from_slice(&self.cached(id, page)?.data[inner..inner + n]);
            at += n as u64;
        }
        Ok(out)
    }

    /// The whole file without touching the cache, for checkers. Sparse files of any size cost what they are long.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`, `EFBIG` past 64 MiB.
    pub fn peek_all(&self, id: NodeId) -> io::Result<Vec<u8>> {
        let size = self.file(id)?.1.size;
        if size > 64 << 20 {
            return Err(Errno::FBIG.into());
        }
        let mut out = Vec::with_capacity(size as usize);
        for page in 0..self.page.pages_covering(size).0 {
            out.extend(self.peek_page(id, page)?);
        }
        out.truncate(size as usize);
        Ok(out)
    }

    /// Buffered `pwrite(2)`.
    ///
    /// # Errors
    /// `EFBIG`, `ENOSPC` when the reservation fails, `ENOENT`, `EINVAL`.
    pub fn write_at(&mut self, id: NodeId, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|e| *e <= FILE_BYTES_MAX);
        let Some(end) = end else { return Err(Errno::FBIG.into()) };
        if data.is_empty() {
            return Ok(());
        }
        self.reserve(id, offset, end)?;
        let bytes = self.page.bytes();
        let block_bytes = self.file(id)?.0.habits.block_bytes;
        let old_size = self.file(id)?.1.size;
        self.file_mut(id)?.1.size = old_size.max(end);
        let mut at = offset;
        while at < end {
            let (page, inner) = (at / bytes, at % bytes);
            let n = (bytes - inner).min(end - at);
            let from = (at - offset) as usize;
            let cached = self.cached(id, page)?;
            cached.data[inner as usize..(inner + n) as usize].copy_from_slice(&data[from..from + n as usize]);
            for block in inner / block_bytes..=(inner + n - 1) / block_bytes {
                cached.dirty |= 1 << block;
            }
            at += n;
        }
        self.outgrow_inline(id, old_size)?;
        self.touch(id);
        Ok(())
    }

    /// Holes that a write goes to become reservations; where there is no room, the write fails before it began.
    fn reserve(&mut self, id: NodeId, start: u64, end: u64) -> io::Result<()> {
        let (fs, file, _) = self.file_mut(id)?;
        if !fs.habits.fiemap {
            return Ok(());
        }
        let block = fs.habits.block_bytes;
        let wanted: Vec<u64> =
            (start / block..end.div_ceil(block)).filter(|b| !file.blocks.contains_key(b)).collect();
        let device = fs.device(file.realtime);
        device.room_for(wanted.len())?;
        for b in wanted {
            // Block 0 of an inline file is metadata, not a hole.
            if !(b == 0 && file.inline.is_some()) {
                file.blocks.insert(b, Mapped::Delalloc);
            }
        }
        Ok(())
    }

    /// A file that grew past its only inline page has that page rewritten as an ordinary one.
    fn outgrow_inline(&mut self, id: NodeId, old_size: u64) -> io::Result<()> {
        let (fs, file, _) = self.file_mut(id)?;
        let grown = file.size > fs.habits.inline_max_bytes && file.size != old_size;
        if file.inline.is_some() && grown {
            self.cached(id, 0)?.dirty |= 1;
        }
        Ok(())
    }

    /// `truncate(2)` to `size`. The cut page's rest is zeroed in cache and dirty, as in Linux.
    ///
    /// # Errors
    /// `EFBIG`, `ENOENT`, `EINVAL`.
    pub fn truncate(&mut self, id: NodeId, size: u64) -> io::Result<()> {
        if size > FILE_BYTES_MAX {
            return Err(Errno::FBIG.into());
        }
        let old = self.file(id)?.1.size;
        if size < old {
            self.shrink(id, size)?;
        }
        self.file_mut(id)?.1.size = size;
        self.outgrow_inline(id, old)?;
        self.touch(id);
        Ok(())
    }

    fn shrink(&mut self, id: NodeId, size: u64) -> io::Result<()> {
        let bytes = self.page.bytes();
        let block_bytes = self.file(id)?.0.habits.block_bytes;
        let cut = size % bytes;
        if cut != 0 {
            let cached = self.cached(id, size / bytes)?;
            let live = cached.data[cut as usize..].iter().any(|b| *b != 0);
            cached.data[cut as usize..].fill(0);
            if live && !size.is_multiple_of(block_bytes) {
                cached.dirty |= 1 << (cut / block_bytes);
            }
            // Blocks of the page that lie past the new end go with the file's end.
            let kept = cut.div_ceil(block_bytes);
            let mask = if kept >= 64 { u64::MAX } else { (1 << kept) - 1 };
            cached.dirty &= mask;
            cached.writeback &= mask;
        }
        let (fs, file, _) = self.file_mut(id)?;
        file.cache.split_off(&size.div_ceil(bytes));
        file.inflight.retain(|i| i.page < size.div_ceil(bytes));
        for flight in file.inflight.iter_mut().filter(|i| (i.page + 1) * bytes > size) {
            flight.data[cut as usize..].fill(0);
        }
        if let Some(inline) = &mut file.inline {
            inline.truncate(size as usize);
        }
        if size == 0 {
            file.inline = None;
        }
        let gone = file.blocks.split_off(&size.div_ceil(block_bytes));
        gone.into_values().for_each(|m| release(fs, file.realtime, m));
        Ok(())
    }

    /// `fallocate(FALLOC_FL_PUNCH_HOLE)`: whole blocks become holes, parts of blocks are zeroed.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`, `ENOSPC`.
    pub fn punch(&mut self, id: NodeId, offset: u64, len: u64) -> io::Result<()> {
        let (fs, file) = self.file(id)?;
        let (block, size) = (fs.habits.block_bytes, file.size);
        let end = offset.saturating_add(len).min(size.next_multiple_of(block));
        if offset >= end {
            return Ok(());
        }
        // Linux writes back first, so that what is punched is what the map says.
        self.sync(id)?;
        let (first, last) = (offset.div_ceil(block), end / block);
        if self.file(id)?.1.inline.is_some() || first > last {
            self.zero_bytes(id, offset, end.min(size))?;
        } else {
            self.zero_bytes(id, offset, (first * block).min(end).min(size))?;
            self.zero_bytes(id, (last * block).max(offset), end.min(size))?;
            self.zero_cache(id, first * block, last * block)?;
            let (fs, file, _) = self.file_mut(id)?;
            let inside: Vec<u64> = file.blocks.range(first..last).map(|(b, _)| *b).collect();
            for b in inside {
                let gone = file.blocks.remove(&b).expect("listed");
                release(fs, file.realtime, gone);
            }
        }
        self.touch(id);
        Ok(())
    }

    /// Zeroes bytes by writing, unless they lie in a hole.
    fn zero_bytes(&mut self, id: NodeId, start: u64, end: u64) -> io::Result<()> {
        if start >= end {
            return Ok(());
        }
        let (fs, file) = self.file(id)?;
        let hole = !file.blocks.contains_key(&(start / fs.habits.block_bytes)) && file.inline.is_none();
        if hole && fs.habits.fiemap {
            return Ok(());
        }
        self.write_at(id, start, &vec![0; (end - start) as usize])
    }

    /// Cached copies of whole blocks that are now holes show zeros and need no writing.
    pub(crate) fn zero_cache(&mut self, id: NodeId, start: u64, end: u64) -> io::Result<()> {
        let bytes = self.page.bytes();
        let (fs, file, _) = self.file_mut(id)?;
        let block = fs.habits.block_bytes;
        for (page, cached) in file.cache.range_mut(start / bytes..end.div_ceil(bytes)) {
            let from = start.saturating_sub(page * bytes).min(bytes);
            let to = end.saturating_sub(page * bytes).min(bytes);
            cached.data[from as usize..to as usize].fill(0);
            for b in from / block..to / block {
                cached.dirty &= !(1 << b);
            }
        }
        Ok(())
    }

    /// `fallocate(2)`: holes in the range become unwritten extents. The file grows unless `keep_size`.
    ///
    /// # Errors
    /// `ENOSPC`, `EOPNOTSUPP` without extents, `ENOENT`, `EINVAL`.
    pub fn fallocate(&mut self, id: NodeId, offset: u64, len: u64, keep_size: bool) -> io::Result<()> {
        if !self.file(id)?.0.habits.fiemap {
            return Err(Errno::OPNOTSUPP.into());
        }
        // A file with inline data is taken out of its metadata first, as on btrfs.
        if self.file(id)?.1.inline.is_some() {
            self.cached(id, 0)?.dirty |= 1;
            self.file_mut(id)?.1.inline = None;
            self.file_mut(id)?.1.blocks.insert(0, Mapped::Delalloc);
        }
        let (fs, file, rng) = self.file_mut(id)?;
        let block = fs.habits.block_bytes;
        let holes: Vec<u64> = (offset / block..(offset + len).div_ceil(block))
            .filter(|b| !file.blocks.contains_key(b))
            .collect();
        fs.device(file.realtime).room_for(holes.len())?;
        let got = fs.device(file.realtime).alloc(holes.len(), rng);
        for (hole, b) in holes.into_iter().zip(got) {
            file.blocks.insert(hole, Mapped::Unwritten(b));
        }
        if !keep_size {
            file.size = file.size.max(offset + len);
        }
        self.touch(id);
        Ok(())
    }

    /// Reads pages into cache (readahead, a mapping's faults).
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn make_resident(&mut self, id: NodeId, first: u64, pages: u64) -> io::Result<()> {
        let end = self.page.pages_covering(self.file(id)?.1.size).0;
        for page in first..(first + pages).min(end) {
            self.cached(id, page)?;
        }
        Ok(())
    }

    /// Drops clean pages from cache (`POSIX_FADV_DONTNEED`, reclaim). On tmpfs there is nowhere to drop them to.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn evict(&mut self, id: NodeId) -> io::Result<()> {
        let (fs, file, _) = self.file_mut(id)?;
        if fs.habits.fiemap {
            file.cache.retain(|_, p| p.dirty != 0 || p.writeback != 0);
        }
        Ok(())
    }

    /// Releases everything a file has on disk.
    pub(crate) fn drop_data(&mut self, id: NodeId) {
        if let Ok((fs, file, _)) = self.file_mut(id) {
            for mapped in std::mem::take(&mut file.blocks).into_values() {
                release(fs, file.realtime, mapped);
            }
        }
    }
}

/// Gives back what one block of a file held.
pub(crate) fn release(fs: &mut Fs, realtime: bool, mapped: Mapped) {
    let device = fs.device(realtime);
    match mapped {
        Mapped::Data(b) | Mapped::Unwritten(b) => device.release(b),
        Mapped::Encoded { id, slice } => device.release_slice(id, slice),
        Mapped::Delalloc => {}
    }
}

/// One more holder of what one block of a file maps to.
pub(crate) fn grab(fs: &mut Fs, realtime: bool, mapped: Mapped) {
    let device = fs.device(realtime);
    match mapped {
        Mapped::Data(b) | Mapped::Unwritten(b) => device.grab(b),
        Mapped::Encoded { id, slice } => device.grab_slice(id, slice),
        Mapped::Delalloc => {}
    }
}
