//! Guesses that save work: which anchor a file of a clone has by its path, and which files lie in the metadata and have no place to ask for.
//!
//! Most roots are clones of one that is sealed, so the file of the same path, size and modification time there tells which anchor to try. Its
//! first reading can then be made *before* the file's: `anchor - file - anchor` with one reading of the file, and no index asked.
//! btrfs keeps files of up to about 2 KiB in its metadata; there a map says only that it can't decide, at the price of reading them.
//!
//! Invariant: a guess chooses what is looked at and shows nothing. What is told in the end is proved as without it, by
//! the same three readings or the same comparison; a wrong one costs a reading. What it deliberately does not do: save a sync or a count
//! of dirty pages of the file.

use std::sync::atomic::{AtomicU32, Ordering};

use pagefold_engine::identity::{Identity, Undecided};
use pagefold_engine::layout::Layout;
use pagefold_engine::whole::{Opened, Proof, Reading};
use rustix::fs::Stat;

use std::os::fd::AsFd;

use super::{Located, Locator, Room};
use crate::sealed::prove::{Shown, anchor_stamp};
use crate::sealed::tree::{Data, Inode, Node};
use crate::sealed::walk::{FileAt, WalkError};
use crate::store::{AnchorKey, ContentHash, Store};

/// What came of a guess.
pub(super) enum Guessed {
    /// It was right.
    Found(Stat, Located),
    /// It was wrong, but the file's map was read.
    Read(Reading, Stat),
    /// There was none, or it said nothing.
    Nothing,
}

/// The longest file that btrfs keeps in its metadata (`max_inline`, as it is by default), bytes.
const INLINE_BYTES_MAX: u64 = 2048;

/// How many small files are asked before others are not.
const ASKED_MIN: u32 = 32;

/// What maps of small files said. On btrfs with `max_inline=0`, and on XFS, all of them have a place.
#[derive(Debug, Default)]
pub(super) struct Inline {
    inline: AtomicU32,
    others: AtomicU32,
}

impl Inline {
    /// Remembers what the map of a small file said.
    pub fn learn(&self, layout: &Layout) {
        if layout.size > INLINE_BYTES_MAX {
            return;
        }
        let is_inline =
            |run: &pagefold_engine::layout::Run| run.identity == Identity::Undecided(Undecided::Inline);
        let said = if layout.runs.iter().any(is_inline) { &self.inline } else { &self.others };
        said.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a file of `size` bytes is so likely to be inline that its bytes are read at once. They decide in either case.
    fn is_likely(&self, size: u64) -> bool {
        let inline = self.inline.load(Ordering::Relaxed);
        size <= INLINE_BYTES_MAX && inline >= ASKED_MIN && self.others.load(Ordering::Relaxed) <= inline / 16
    }
}

/// The anchor that a file has if it is a clone's of what the model has under its name.
fn likely(guess: Option<&Inode>, stat: &Stat) -> Option<AnchorKey> {
    let guess = guess?;
    let Node::File { size, data: Data::Anchor(anchor) } = guess.node else { return None };
    let same = size == stat.st_size.cast_unsigned()
        && guess.meta.mtime == (stat.st_mtime, stat.st_mtime_nsec as u32);
    same.then_some(anchor)
}

impl Locator<'_> {
    /// Looks at a file with a guess at hand.
    pub(super) fn by_guess(&self, file: &FileAt<'_>, room: &mut Room) -> Result<Guessed, WalkError> {
        let size = file.stat.st_size.cast_unsigned();
        if size == 0 || self.clone_only || self.borrow.is_some() {
            return Ok(Guessed::Nothing);
        }
        let anchor = likely(file.guess, file.stat);
        // With --content a file that has a place after all may be made to share it.
        if !self.content && self.inline.is_likely(size) {
            let found = self.small_file(file, anchor, room)?;
            return Ok(found.map_or(Guessed::Nothing, |(stat, located)| Guessed::Found(stat, located)));
        }
        match anchor {
            Some(anchor) if self.alone => self.at_once(file, anchor, room),
            Some(anchor) => self.between(file, anchor, room),
            None => Ok(Guessed::Nothing),
        }
    }

    /// The anchor's first reading is there or made now; its last comes with those of all others.
    fn between(&self, file: &FileAt<'_>, anchor: AnchorKey, room: &mut Room) -> Result<Guessed, WalkError> {
        let size = file.stat.st_size.cast_unsigned();
        let known = self.opened.get(&anchor).map(|opened| std::sync::Arc::clone(&*opened));
        let Some(first) = known.or_else(|| self.open(anchor, size, room)) else {
            return Ok(Guessed::Nothing);
        };
        let read = self.readings.read(file.fd, file.stat, &mut room.extents);
        let (reading, stat) = read.map_err(|e| WalkError::here("read the extent map of", e))?;
        self.inline.learn(&reading.layout);
        Ok(match first.opened.enclose(&reading) {
            Ok(enclosed) => Guessed::Found(stat, Located::at(Shown::Enclosed(enclosed))),
            Err(_) => Guessed::Read(reading, stat),
        })
    }

    /// All three readings, one after the other.
    fn at_once(&self, file: &FileAt<'_>, anchor: AnchorKey, room: &mut Room) -> Result<Guessed, WalkError> {
        let Some(layer) = &self.layer else { return Ok(Guessed::Nothing) };
        let size = file.stat.st_size.cast_unsigned();
        // Removed or opened up by hand: it is no anchor any more, and the file gets another one.
        let Ok(opened) = Store::open_in_layer(layer, &anchor) else { return Ok(Guessed::Nothing) };
        let Ok(Some(stamp)) = anchor_stamp(opened.as_fd(), size) else { return Ok(Guessed::Nothing) };
        let mut of_file = None;
        let rooms = (&mut room.first, &mut room.extents);
        let read = self.readings.around(opened.as_fd(), stamp, rooms, |extents| {
            of_file = Some(self.readings.read(file.fd, file.stat, extents)?);
            Ok(())
        });
        // An error of the file comes again when it is looked at without a guess; one of the anchor is none of the file's.
        let (Some((reading, stat)), read) = (of_file, read) else { return Ok(Guessed::Nothing) };
        self.inline.learn(&reading.layout);
        let proof = read.ok().and_then(|(first, (), last)| prove(anchor, first, &reading, &last));
        Ok(match proof {
            Some(proof) => Guessed::Found(stat, Located::at(Shown::Place(proof))),
            None => Guessed::Read(reading, stat),
        })
    }

    /// A file that has no place, most likely: compared with the anchor that is likely its own, or found by what it holds.
    ///
    /// Writers of before its times were read are through, its pages were clean before and after its bytes were read, and its times are the
    /// same: what was read is what it held at one moment, as in [`Locator::by_content`], where the map is what waits for writers.
    /// `None`: it moved, or is dirty; then it is looked at in full.
    fn small_file(
        &self,
        file: &FileAt<'_>,
        anchor: Option<AnchorKey>,
        room: &mut Room,
    ) -> Result<Option<(Stat, Located)>, WalkError> {
        let (fd, stat, size) = (file.fd, file.stat, file.stat.st_size.cast_unsigned());
        let none_writes = self.readings.await_writers(fd, size);
        let dirty = self.readings.dirty(fd, size).map_err(|e| WalkError::here("ask the cache of", e))?;
        if !none_writes || dirty != Some(false) {
            return Ok(None);
        }
        if let Err(e) = self.reads.read(fd, size, &mut room.bytes, |_, _| Ok(true)) {
            return self.while_reading(fd, stat, e).map(|()| None);
        }
        let same = match anchor {
            Some(anchor) => match self.compare(fd, anchor, size, false, room) {
                Ok(same) => same,
                Err(e) => return self.while_reading(fd, stat, e).map(|()| None),
            },
            None => None,
        };
        if !self.held_still(fd, stat)? {
            return Ok(None);
        }
        if let Some(same) = same {
            return Ok(Some((*stat, Located { read: true, ..Located::at(Shown::Same(same)) })));
        }
        let hash = ContentHash(*blake3::hash(&room.bytes).as_bytes());
        self.by_hash(fd, stat, &self.readings.unasked(size), (None, hash), room)
    }
}

fn prove(anchor: AnchorKey, first: Reading, file: &Reading, last: &Reading) -> Option<Proof<AnchorKey>> {
    let opened = Opened::new(anchor, first).ok()?;
    let enclosed = opened.enclose(file).ok()?;
    opened.close(last).ok()?.prove(&enclosed).ok()
}
