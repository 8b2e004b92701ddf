//! Finds the anchor that has a file's bytes, or makes one.
//!
//! In this order: the file is as it was sealed before; an anchor at the same place; (where extents can't decide, or `--content`) an
//! anchor with the same bytes; a new anchor, cloned from the file. Every doubt ends in the last: a clone needs no proof and costs
//! a few blocks of metadata, so a stale hint, a moving anchor or a busy writer never makes a view wrong, only less shared.
//!
//! Invariant: what is told of a file (attributes, size, place of its bytes) belongs to one moment; where a writer prevented that
//! [`TRIES`] times, the bytes are those of one moment still (a clone's) and the file is told as unsettled. Two threads that meet the same new
//! file make one anchor. What it deliberately does not do: publish, or touch the raw root (but for FIDEDUPERANGE under `--content`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use pagefold_engine::layout::RawExtent;
use pagefold_engine::whole::{Closed, Enclosed, Opened, Reading, Unproven};
use rustc_hash::FxBuildHasher;
use rustix::fs::Stat;

use super::bytes::Bytes;
use super::prove::{Protected, SameBytes, Shown, UNDER_WAY_S, Unchanged, looks_whole};
use super::reading::{Readings, signature, stamp};
use super::walk::{FileAt, FileLook, WalkError};
use crate::scan::Progress;
use crate::store::{AnchorKey, AnchorRow, Build, ContentHash, Lookup, Signature, Store};

mod borrow;
mod guess;
mod make;
mod refresh;
mod unread;

pub(crate) use borrow::Borrow;
use guess::Guessed;

/// How often a file that moves is looked at again.
const TRIES: u32 = 4;

/// Anchors up to this size are kept in memory once they were read, so that many clones' small files are compared with one reading.
const SMALL_BYTES_MAX: u64 = 4096;
/// How many of them.
const SMALL_MAX: isize = 32 << 10;

/// What was found out about a file's data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub shown: Shown,
    /// It made a new anchor.
    pub made: bool,
    /// Its bytes were read.
    pub read: bool,
    /// It was being written all the while.
    pub unsettled: bool,
}

impl Located {
    fn at(shown: Shown) -> Located {
        Located { shown, made: false, read: false, unsettled: false }
    }
}

/// Buffers of a thread.
#[derive(Debug, Default)]
pub(crate) struct Room {
    extents: Vec<RawExtent>,
    /// Of an anchor, while `extents` holds a file's.
    first: Vec<RawExtent>,
    bytes: Vec<u8>,
    other: Vec<u8>,
}

/// An anchor that is being made for a place or a content, or was.
type Slot = Arc<Mutex<Option<AnchorKey>>>;
type Map<K, V> = DashMap<K, V, FxBuildHasher>;

/// An anchor's first reading.
struct First {
    opened: Opened<AnchorKey>,
    /// Open still, for its last: opening it is half of what a reading costs.
    kept: Option<Protected>,
}

/// Anchors kept open at most; fewer where the limit of open files is low.
const KEEP_MAX: u64 = 16 << 10;

/// Everything one call of `seal` knows about anchors.
pub(crate) struct Locator<'a> {
    pub store: &'a Store,
    pub build: &'a Build<'a>,
    pub lookup: &'a Lookup,
    pub domain: u32,
    /// Its directory of anchors, once there is one.
    pub layer: Option<OwnedFd>,
    /// One root is walked: an anchor that is opened for one of its files serves no other, and its last reading is made at once.
    pub alone: bool,
    /// Small files whose extents said that their bytes lie in the metadata, and others (see `guess`).
    inline: guess::Inline,
    /// `--content`.
    pub content: bool,
    /// `--borrow`: no place is asked, and nothing is cloned.
    pub borrow: Option<Borrow>,
    pub progress: &'a Progress,
    /// When each root was sealed last, seconds since 1970.
    pub sealed_at: Vec<Option<i64>>,
    /// How long a write may have been under way then, seconds.
    pub under_way_s: i64,
    pub readings: Readings,
    reads: Bytes,
    opened: Map<AnchorKey, Arc<First>>,
    /// How many more anchors may stay open.
    keep: AtomicIsize,
    places: Map<(u64, Signature), Slot>,
    contents: Map<(u64, ContentHash), Slot>,
    unread: unread::Unread,
    small: Map<AnchorKey, Arc<[u8]>>,
    /// How many more of them.
    keep_small: AtomicIsize,
    /// Anchors of files that have not changed: whether they are there still.
    whole: Map<AnchorKey, bool>,
    /// Hints were looked at (see `refresh`).
    refreshed: AtomicBool,
    refreshing: Mutex<bool>,
    /// Made here (or found elsewhere than their hints say), and whether it was told to be published.
    made: Map<AnchorKey, (AnchorRow, bool)>,
    /// Set in the last round: no more proofs, only clones.
    pub clone_only: bool,
}

/// What a file is looked up by.
#[derive(Clone, Copy)]
enum Name {
    Place(Signature),
    Content(ContentHash),
}

fn keep_open() -> isize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    isize::try_from((limit.unwrap_or(u64::MAX) / 4).min(KEEP_MAX)).unwrap_or(0)
}

impl<'a> Locator<'a> {
    pub fn new(
        store: &'a Store,
        build: &'a Build<'a>,
        lookup: &'a Lookup,
        readings: Readings,
        progress: &'a Progress,
    ) -> Self {
        Locator {
            store,
            build,
            lookup,
            domain: 0,
            layer: None,
            alone: false,
            inline: guess::Inline::default(),
            content: false,
            borrow: None,
            progress,
            sealed_at: Vec::new(),
            under_way_s: UNDER_WAY_S,
            readings,
            reads: Bytes::default(),
            opened: Map::default(),
            keep: AtomicIsize::new(keep_open()),
            places: Map::default(),
            contents: Map::default(),
            unread: unread::Unread::default(),
            small: Map::default(),
            keep_small: AtomicIsize::new(SMALL_MAX),
            whole: Map::default(),
            made: Map::default(),
            refreshed: AtomicBool::new(false),
            refreshing: Mutex::new(false),
            clone_only: false,
        }
    }

    /// Rows to publish with images that need `anchors`: of those made here, each once.
    pub fn rows_of<'k>(&self, anchors: impl Iterator<Item = &'k AnchorKey>) -> Vec<(AnchorKey, AnchorRow)> {
        let wanted: std::collections::BTreeSet<&AnchorKey> = anchors.collect();
        let new = |key: &AnchorKey| {
            let mut made = self.made.get_mut(key)?;
            let told = std::mem::replace(&mut made.1, true);
            (!told).then(|| (*key, made.0.clone()))
        };
        wanted.into_iter().filter_map(new).collect()
    }

    /// The number of an anchor.
    pub fn serial(&self, key: &AnchorKey) -> Option<u64> {
        if let Some(row) = self.made.get(key) {
            return Some(row.0.serial);
        }
        self.lookup.anchor(key).ok().flatten().map(|row| row.serial)
    }

    fn as_sealed_before(&self, file: &FileAt<'_>) -> Result<Option<Located>, WalkError> {
        let (Some(previous), Some(sealed_at)) = (file.previous, self.sealed_at[file.root]) else {
            return Ok(None);
        };
        // Judged without the cache first: most changed files end here.
        let sealed = (sealed_at, self.under_way_s);
        if Unchanged::judge(previous, file.stat, true, sealed).is_none() {
            return Ok(None);
        }
        let size = file.stat.st_size.cast_unsigned();
        let dirty = self.readings.dirty(file.fd, size).map_err(|e| WalkError::here("ask the cache of", e))?;
        let clean = dirty == Some(false);
        let Some(unchanged) = Unchanged::judge(previous, file.stat, clean, sealed) else {
            return Ok(None);
        };
        let anchor = unchanged.anchor();
        if self.lookup.anchor(&anchor)?.is_none_or(|row| row.domain != self.domain) {
            return Ok(None);
        }
        // An anchor that somebody took away is made anew: sealing again is what `verify` advises then.
        let look = || looks_whole(&self.store.anchor_path(self.domain, &anchor), size);
        if !*self.whole.entry(anchor).or_insert_with(look) {
            return Ok(None);
        }
        // Removed or opened up by hand: then sealing again makes another one.
        if self.protected(unchanged.anchor(), size).is_none() {
            return Ok(None);
        }
        Ok(Some(Located::at(Shown::Unchanged(unchanged))))
    }

    /// A file whose map was read and did not move. `None`: it moved now.
    fn settled(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let place =
            if reading.decides() && self.borrow.is_none() { signature(&reading.layout) } else { None };
        if let Some(place) = place {
            let size = reading.layout.size;
            let slot = self.slot(&self.places, &(size, place));
            if let Some(found) = self.enclose_some(slot, fd, stat, reading, room)? {
                return Ok(Some(found));
            }
            let known = self.lookup.by_extents(self.domain, size, &place)?;
            if let Some(found) = self.enclose_some(known, fd, stat, reading, room)? {
                // The next clone's file is found without the index.
                let slot = Arc::clone(&*self.places.entry((size, place)).or_default());
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = known;
                return Ok(Some(found));
            }
            if self.readings.relocates() && !self.refreshed.load(Ordering::Acquire) {
                let mut once = self.refreshing.lock().unwrap_or_else(PoisonError::into_inner);
                if !std::mem::replace(&mut *once, true) {
                    self.refresh()?;
                    self.refreshed.store(true, Ordering::Release);
                }
                drop(once);
                let slot = self.slot(&self.places, &(size, place));
                if let Some(found) = self.enclose_some(slot, fd, stat, reading, room)? {
                    return Ok(Some(found));
                }
            }
            if !self.content {
                return self.make_or_wait(fd, stat, reading, Name::Place(place), room);
            }
        }
        self.by_content(fd, stat, reading, place, room)
    }

    fn enclose_some(
        &self,
        anchor: Option<AnchorKey>,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let Some(anchor) = anchor else { return Ok(None) };
        let enclosed = self.enclose(anchor, fd, stat, reading, room)?;
        Ok(enclosed.map(|(stat, enclosed)| (stat, Located::at(Shown::Enclosed(enclosed)))))
    }

    /// What another thread found or made for this name, once it has.
    fn slot<K: std::hash::Hash + Eq>(&self, slots: &Map<K, Slot>, name: &K) -> Option<AnchorKey> {
        let slot = Arc::clone(&*slots.get(name)?);
        *slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the file is at the place of an anchor. Where this is the anchor's first reading of this call, the file is read again after it.
    fn enclose(
        &self,
        anchor: AnchorKey,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        room: &mut Room,
    ) -> Result<Option<(Stat, Enclosed<AnchorKey>)>, WalkError> {
        let opened = match self.opened.get(&anchor).map(|o| Arc::clone(&*o)) {
            Some(opened) => opened,
            None => match self.open(anchor, reading.layout.size, room) {
                Some(opened) => opened,
                None => return Ok(None),
            },
        };
        match opened.opened.enclose(reading) {
            Ok(enclosed) => Ok(Some((*stat, enclosed))),
            Err(Unproven::Order) => {
                let again = self.readings.read(fd, stat, &mut room.extents);
                let (reading, stat) = again.map_err(|e| WalkError::here("read the extent map of", e))?;
                Ok(opened.opened.enclose(&reading).ok().map(|enclosed| (stat, enclosed)))
            }
            Err(_) => Ok(None),
        }
    }

    /// The first reading of an anchor. An anchor that can't be opened is none: the file gets one of its own.
    fn open(&self, key: AnchorKey, size: u64, room: &mut Room) -> Option<Arc<First>> {
        let anchor = self.protected(key, size)?;
        let (reading, _) = self.readings.read(anchor.file.as_fd(), &anchor.stat, &mut room.extents).ok()?;
        let opened = Opened::new(key, reading).ok()?;
        let keep = self.keep.fetch_sub(1, Ordering::Relaxed) > 0;
        let first = Arc::new(First { opened, kept: keep.then_some(anchor) });
        // Whoever came first: an earlier reading encloses more.
        Some(Arc::clone(&*self.opened.entry(key).or_insert(first)))
    }

    fn protected(&self, key: AnchorKey, size: u64) -> Option<Protected> {
        let opened = match &self.layer {
            Some(layer) => Store::open_in_layer(layer, &key).ok(),
            None => self.store.open_anchor(self.domain, &key).ok(),
        };
        let judge = |file| match self.borrowed_row(&key) {
            Some(row) if row.size == size => Protected::borrowed(file, key, &row),
            _ => Protected::new(file, key, size),
        };
        match opened.map(judge) {
            Some(Ok(Some(anchor))) => Some(anchor),
            _ => {
                tracing::warn!(%key, "anchor is missing or damaged: `pagefold verify` tells more");
                None
            }
        }
    }

    /// The last reading of an anchor.
    pub fn close(&self, key: AnchorKey, room: &mut Room) -> Option<Closed<AnchorKey>> {
        let first = Arc::clone(&*self.opened.get(&key)?);
        let again;
        let anchor = match &first.kept {
            Some(kept) => kept,
            None => {
                again = self.protected(key, first.opened.size())?;
                &again
            }
        };
        let (reading, _) = self.readings.read(anchor.file.as_fd(), &anchor.stat, &mut room.extents).ok()?;
        first.opened.close(&reading).ok()
    }

    /// Forgets where an anchor was: it has moved.
    pub fn forget(&self, key: &AnchorKey) {
        self.opened.remove(key);
    }

    /// The anchor with the file's bytes, or a new one.
    fn by_content(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        place: Option<Signature>,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let size = reading.layout.size;
        let cancel = self.progress.cancel_flag();
        let hash = match self.reads.hash(fd, size, &mut room.bytes, cancel) {
            Ok(hash) => hash,
            Err(e) => return self.while_reading(fd, stat, e).map(|()| None),
        };
        if !self.held_still(fd, stat)? {
            return Ok(None);
        }
        self.by_hash(fd, stat, reading, (place, hash), room)
    }

    /// The same for a file that was hashed and held still meanwhile.
    fn by_hash(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        (place, hash): (Option<Signature>, ContentHash),
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let size = reading.layout.size;
        let known = self.lookup.by_content(self.domain, size, &hash)?;
        let mut slot = self.slot(&self.contents, &(size, hash));
        if known.is_none() && slot.is_none() && self.learn(size, &hash)? {
            slot = self.slot(&self.contents, &(size, hash));
        }
        for key in [known, slot].into_iter().flatten() {
            let same = match self.compare(fd, key, size, place.is_some(), room) {
                Ok(same) => same,
                Err(e) => return self.while_reading(fd, stat, e).map(|()| None),
            };
            if let Some(same) = same {
                if !self.held_still(fd, stat)? {
                    return Ok(None);
                }
                return Ok(Some((*stat, Located { read: true, ..Located::at(Shown::Same(same)) })));
            }
        }
        self.make_or_wait(fd, stat, reading, Name::Content(hash), room)
    }

    /// A file that shrank while it was read moved; anything else is an error.
    fn while_reading(&self, fd: BorrowedFd<'_>, stat: &Stat, error: io::Error) -> Result<(), WalkError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Err(WalkError::Cancelled),
            io::ErrorKind::UnexpectedEof if !self.held_still(fd, stat)? => Ok(()),
            _ => Err(WalkError::here("read", error)),
        }
    }

    /// Whether nothing was written since `stat`, when no page was dirty.
    fn held_still(&self, fd: BorrowedFd<'_>, stat: &Stat) -> Result<bool, WalkError> {
        let now = rustix::fs::fstat(fd).map_err(|e| WalkError::here("stat", e))?;
        let dirty = self.readings.dirty(fd, stat.st_size.cast_unsigned());
        let dirty = dirty.map_err(|e| WalkError::here("ask the cache of", e))?;
        // Where that can't be known (before Linux 6.5) times alone must do: then a store through a mapping that was there before shows late.
        Ok(stamp(&now) == stamp(stat) && dirty != Some(true))
    }

    fn compare(
        &self,
        fd: BorrowedFd<'_>,
        key: AnchorKey,
        size: u64,
        may_share: bool,
        room: &mut Room,
    ) -> io::Result<Option<SameBytes>> {
        // The file's bytes are still in `room.bytes` after hashing, for it was one chunk.
        if size <= SMALL_BYTES_MAX
            && self.borrow.is_none()
            && let Some(known) = self.small.get(&key)
        {
            return Ok(SameBytes::compare_read(&room.bytes, key, &known));
        }
        let Some(anchor) = self.protected(key, size) else { return Ok(None) };
        if self.content
            && may_share
            && let Some(same) = SameBytes::dedupe(fd, &anchor, size)
        {
            return Ok(Some(same));
        }
        let cancel = self.progress.cancel_flag();
        if size <= SMALL_BYTES_MAX && self.borrow.is_none() {
            // An anchor that can't be read is none, and no reason to give the root up.
            if let Err(error) = self.reads.read(anchor.file.as_fd(), size, &mut room.other, |_, _| Ok(true)) {
                tracing::warn!(%key, %error, "anchor can't be read: `pagefold verify` tells more");
                return Ok(None);
            }
            if !self.alone && self.keep_small.fetch_sub(1, Ordering::Relaxed) > 0 {
                self.small.insert(key, room.other[..].into());
            }
            return Ok(SameBytes::compare_read(&room.bytes, key, &room.other));
        }
        let borrowed = self.borrowed_row(&key).is_some();
        if borrowed && !self.is_quiet(&anchor.file, &anchor.stat) {
            return Ok(None);
        }
        let rooms = (&mut room.bytes, &mut room.other);
        let same = SameBytes::compare(&self.reads, fd, &anchor, size, rooms, cancel)?;
        Ok(same.filter(|_| !borrowed || self.is_quiet(&anchor.file, &anchor.stat)))
    }

    /// Makes an anchor under a name that nobody else is making one for; else tries that one.
    fn make_or_wait(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        name: Name,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let size = reading.layout.size;
        let slot = match name {
            Name::Place(place) => Arc::clone(&*self.places.entry((size, place)).or_default()),
            Name::Content(hash) => Arc::clone(&*self.contents.entry((size, hash)).or_default()),
        };
        let mut made = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if made.is_some() {
            // Somebody was quicker. Whatever comes of that one, it is looked at from the start.
            let other = *made;
            drop(made);
            return self.others(fd, stat, reading, other, name, room);
        }
        let Some((row, key, shown, stat)) = self.make(fd, stat, reading, name, room)? else {
            return Ok(None);
        };
        let agrees = match name {
            Name::Place(place) => row.signature == Some(place),
            Name::Content(hash) => row.content == Some(hash),
        };
        *made = agrees.then_some(key);
        drop(made);
        // With --content an anchor is found by both its names.
        if let (Name::Content(_), Some(place)) = (name, row.signature) {
            let slot = Arc::clone(&*self.places.entry((size, place)).or_default());
            slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(key);
        }
        self.made.insert(key, (row, false));
        let read = matches!(name, Name::Content(_));
        Ok(Some((stat, Located { made: true, read, ..Located::at(shown) })))
    }

    fn others(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        reading: &Reading,
        other: Option<AnchorKey>,
        name: Name,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let Some(key) = other else { return Ok(None) };
        let (shown, stat) = match name {
            Name::Place(_) => match self.enclose(key, fd, stat, reading, room)? {
                Some((stat, enclosed)) => (Shown::Enclosed(enclosed), stat),
                None => return Ok(None),
            },
            Name::Content(_) => {
                // Hashed before: a file of one chunk is still in the room.
                match self.compare(fd, key, reading.layout.size, false, room) {
                    Ok(Some(same)) if self.held_still(fd, stat)? => (Shown::Same(same), *stat),
                    Ok(_) => return Ok(None),
                    Err(e) => return self.while_reading(fd, stat, e).map(|()| None),
                }
            }
        };
        let read = matches!(name, Name::Content(_));
        Ok(Some((stat, Located { read, ..Located::at(shown) })))
    }
}

impl FileLook for Locator<'_> {
    type Found = Located;
    type Scratch = Room;

    fn look(&self, file: FileAt<'_>, room: &mut Room) -> Result<(Stat, Located), WalkError> {
        if let Some(located) = self.as_sealed_before(&file)? {
            return Ok((*file.stat, located));
        }
        let mut before = *file.stat;
        let mut read = match self.by_guess(&file, room)? {
            Guessed::Found(stat, located) => return Ok((stat, located)),
            Guessed::Read(reading, stat) => Some((reading, stat)),
            Guessed::Nothing => None,
        };
        for _ in 0..TRIES {
            if self.clone_only {
                break;
            }
            if before.st_size == 0 {
                return Ok((before, Located::at(Shown::Empty)));
            }
            let (reading, after) = match read.take() {
                Some(read) => read,
                None => {
                    let read = self.readings.read(file.fd, &before, &mut room.extents);
                    let read = read.map_err(|e| WalkError::here("read the extent map of", e))?;
                    self.inline.learn(&read.0.layout);
                    read
                }
            };
            // Before Linux 6.5 nobody knows what is dirty: the bytes decide then.
            let usable = reading.is_settled()
                || (!reading.moved && reading.cache == pagefold_engine::layout::CacheState::Unknown);
            if usable && let Some(found) = self.settled(file.fd, &after, &reading, room)? {
                return Ok(found);
            }
            before = rustix::fs::fstat(file.fd).map_err(|e| WalkError::here("stat", e))?;
        }
        self.clone_anyway(file.fd, room)
    }
}
