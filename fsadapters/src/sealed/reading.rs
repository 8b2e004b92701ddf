//! Reads a file's map so that it can be part of a proof (design 5.6): attributes, cache, synced map, cache, attributes.
//!
//! Invariant: a reading that says it is settled told the file's bytes at one moment: no page was dirty before or after the map,
//! the kernel wrote back and waited before it answered, and size and times did not move. What it deliberately does not do: compare;
//! `pagefold_engine::whole` does.
//!
//! Unlike a scan this causes writes: `FIEMAP_FLAG_SYNC` writes dirty pages back. A file that was dirty is read again by the
//! caller and is clean then, unless somebody writes it all the while.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use pagefold_engine::identity::{AddressSpace, Identity, Undecided};
use pagefold_engine::layout::{CacheState, ExtentFlags, Layout, MapFacts, RawExtent};
use pagefold_engine::units::{FsId, PageSize};
use pagefold_engine::whole::{Moment, Reading};
use pagefold_sys::cache;
use pagefold_sys::fiemap::{FiemapError, Sync as MapSync, read_extents};
use rustix::fs::{SeekFrom, Stat};
use rustix::io::Errno;

use crate::fsid::{self, FsFacts};
use crate::store::Signature;
use crate::turnstile::Turnstiles;

/// Reads maps of files of one file system, from several threads.
#[derive(Debug)]
pub(crate) struct Readings {
    /// Addresses of this file system name bytes.
    physical: bool,
    has_realtime: bool,
    relocates: bool,
    page: PageSize,
    /// Before maps of XFS (see [`crate::turnstile`]).
    maps: Option<Turnstiles>,
    moments: AtomicU64,
}

impl Readings {
    /// For files on the file system that `facts` describes.
    ///
    /// # Panics
    /// When the kernel's page size is no power of two (there is no such kernel).
    pub fn new(facts: &FsFacts) -> Readings {
        let page = PageSize::new(rustix::param::page_size() as u64);
        Readings {
            physical: facts.description.physical_identity && facts.overlay.is_none(),
            has_realtime: facts.has_realtime,
            relocates: facts.description.kind == "btrfs",
            page: page.expect("the kernel's page size is a power of two"),
            maps: (facts.description.kind == "xfs").then(|| Turnstiles::new(facts.group_bytes)),
            moments: AtomicU64::new(0),
        }
    }

    /// Whether the file system moves blocks of files that nobody writes (btrfs balance).
    pub fn relocates(&self) -> bool {
        self.relocates
    }

    fn now(&self) -> Moment {
        Moment(self.moments.fetch_add(1, Ordering::AcqRel))
    }

    /// Reads the map of `file`, whose attributes were `before` a moment ago. `room` is a buffer. Returns the attributes after.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn read(
        &self,
        file: BorrowedFd<'_>,
        before: &Stat,
        room: &mut Vec<RawExtent>,
    ) -> io::Result<(Reading, Stat)> {
        let began = self.now();
        let size = before.st_size.cast_unsigned();
        let first = self.dirty(file, size)?;
        let space = self.map(file, size, room)?;
        let second = self.dirty(file, size)?;
        let after = rustix::fs::fstat(file)?;
        let cache = state(first, second);
        let layout = Layout::from_extents(MapFacts { size, extents: room, space, cache, page: self.page });
        let reading =
            Reading { began, ended: self.now(), layout, cache, moved: stamp(before) != stamp(&after) };
        Ok((reading, after))
    }

    /// Two readings of an anchor, one before and one after what `middle` does, for a proof on the spot. `before`: the stamp of the
    /// anchor a moment ago; `rooms` are buffers, the second of which `middle` is given.
    ///
    /// Pages are counted before the first map and after the last, and so are the attributes looked at: for either map that is
    /// before and after it (design 5.6), only further away. That says no less: a store that came and was written back in
    /// between would have moved the change time, which is the same at both ends.
    ///
    /// # Errors
    /// As the kernel says, or `middle`.
    pub fn around<T>(
        &self,
        anchor: BorrowedFd<'_>,
        before: Stamp,
        rooms: (&mut Vec<RawExtent>, &mut Vec<RawExtent>),
        middle: impl FnOnce(&mut Vec<RawExtent>) -> io::Result<T>,
    ) -> io::Result<(Reading, T, Reading)> {
        let (first, last) = rooms;
        let size = before.0.cast_unsigned();
        let opened = self.now();
        let clean = self.dirty(anchor, size)?;
        let space = self.map(anchor, size, first)?;
        let mapped = self.now();
        let between = middle(last)?;
        let again = self.now();
        let space_again = self.map(anchor, size, last)?;
        let cache = state(clean, self.dirty(anchor, size)?);
        let moved = before != stamp(&rustix::fs::fstat(anchor)?);
        let closed = self.now();
        let reading = |began, ended, extents: &[RawExtent], space| {
            let layout = Layout::from_extents(MapFacts { size, extents, space, cache, page: self.page });
            Reading { began, ended, layout, cache, moved }
        };
        let first = reading(opened, mapped, first, space);
        let last = reading(again, closed, last, space_again);
        Ok((first, between, last))
    }

    /// A reading of a file that was not asked for its map: nothing can be proved by place with it.
    pub fn unasked(&self, size: u64) -> Reading {
        let (began, ended) = (self.now(), self.now());
        let layout = Layout::undecided(size, self.page, Undecided::Inline);
        Reading { began, ended, layout, cache: CacheState::Clean, moved: false }
    }

    /// Waits for writes that are under way by `write(2)`: a call that has set the change time and not yet a byte would not show, neither as a
    /// dirty page nor as another change time when it ends. A map of btrfs waits for them by the way; who reads bytes without one asks
    /// for this first. False where it can't be known.
    ///
    /// By `SEEK_DATA` from the end of the file: btrfs takes the lock that writers hold, sees that there is nothing, and gives it back. XFS
    /// takes that of its map only; but there reading takes the writers' lock itself.
    pub fn await_writers(&self, file: BorrowedFd<'_>, size: u64) -> bool {
        // A file that grew meanwhile has data there: its size tells.
        matches!(rustix::fs::seek(file, SeekFrom::Data(size)), Ok(_) | Err(Errno::NXIO))
    }

    /// The synced map, into `room`, and where its addresses are unique. What `room` holds of another file before says in which allocation
    /// group this one is likely to be: the same, for files of a directory are.
    fn map(
        &self,
        file: BorrowedFd<'_>,
        size: u64,
        room: &mut Vec<RawExtent>,
    ) -> io::Result<Option<AddressSpace>> {
        let class = fsid::device_class(file, self.has_realtime).filter(|_| self.physical);
        let near = room.first().map_or(0, |extent| extent.physical);
        room.clear();
        if class.is_some() {
            let _turn = self.maps.as_ref().map(|maps| maps.pass(near));
            let read = read_extents(file, size, MapSync::Yes, |e| {
                let flags = ExtentFlags::from_bits_retain(e.flags);
                room.push(RawExtent { logical: e.logical, physical: e.physical, length: e.length, flags });
            });
            read.map_err(|e: FiemapError| io::Error::from(e))?;
        }
        Ok(class.map(|class| AddressSpace { fs: FsId(0), class }))
    }

    /// Whether a page up to `size` is dirty or under writeback; `None` where that can't be known.
    pub fn dirty(&self, file: BorrowedFd<'_>, size: u64) -> io::Result<Option<bool>> {
        let whole = size.checked_next_multiple_of(self.page.bytes()).unwrap_or(0);
        match cache::cachestat(file, 0, whole) {
            Ok(stat) => Ok(Some(stat.nr_dirty + stat.nr_writeback > 0)),
            Err(e) if pagefold_sys::is_unsupported(&e) => Ok(None),
            Err(e) if e.raw_os_error() == Some(Errno::PERM.raw_os_error()) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn state(first: Option<bool>, second: Option<bool>) -> CacheState {
    match (first, second) {
        (Some(false), Some(false)) => CacheState::Clean,
        (Some(_), Some(_)) => CacheState::Dirty,
        _ => CacheState::Unknown,
    }
}

/// Size, change time, modification time.
pub(crate) type Stamp = (i64, i64, u64, i64, u64);

/// What must not change between two looks.
pub(crate) fn stamp(stat: &Stat) -> Stamp {
    (stat.st_size, stat.st_ctime, stat.st_ctime_nsec, stat.st_mtime, stat.st_mtime_nsec)
}

/// Names a decided layout in the index: size and the place of every page. Equal signatures are a reason to look.
pub(crate) fn signature(layout: &Layout) -> Option<Signature> {
    let mut bytes = Vec::with_capacity(16 + layout.runs.len() * 26);
    bytes.extend(layout.size.to_le_bytes());
    for run in &layout.runs {
        let (kind, space, page, valid) = match run.identity {
            Identity::Physical { space, page } => (1u8, Some(space), page, 0),
            Identity::Tail { space, page, valid } => (2, Some(space), page, valid),
            Identity::Zero => (3, None, 0, 0),
            Identity::Content { .. } | Identity::Undecided(_) => return None,
        };
        bytes.push(kind);
        bytes.push(space.map_or(0, |s| 1 + s.class as u8));
        bytes.extend(page.to_le_bytes());
        bytes.extend(run.pages.0.to_le_bytes());
        bytes.extend(valid.to_le_bytes());
    }
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
    Some(Signature(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagefold_engine::identity::{DeviceClass, Undecided};
    use pagefold_engine::layout::Run;
    use pagefold_engine::units::{PageCount, PageIndex};

    fn layout(size: u64, identity: Identity) -> Layout {
        Layout { size, runs: vec![Run { start: PageIndex(0), pages: PageCount(1), identity }] }
    }

    #[test]
    fn signatures_differ_in_everything_that_counts() {
        let space = |class| AddressSpace { fs: FsId(0), class };
        let (data, rt) = (space(DeviceClass::Data), space(DeviceClass::Realtime));
        let all = [
            layout(4096, Identity::Physical { space: data, page: 7 }),
            layout(4096, Identity::Physical { space: data, page: 8 }),
            layout(4096, Identity::Physical { space: rt, page: 7 }),
            layout(4095, Identity::Tail { space: data, page: 7, valid: 4095 }),
            layout(4096, Identity::Zero),
            layout(8192, Identity::Zero),
        ];
        let names: std::collections::HashSet<_> = all.iter().map(|l| signature(l).unwrap()).collect();
        assert_eq!(names.len(), all.len());
        assert_eq!(signature(&all[0]), signature(&all[0].clone()));
        assert_eq!(signature(&layout(4096, Identity::Undecided(Undecided::Inline))), None);
    }
}
