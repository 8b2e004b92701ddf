//! Makes an anchor of a file: a clone; under `--borrow` a link to an equal file, or a copy.
//!
//! Invariant: an anchor that is made here is closed before anybody is told of it, or it is discarded. What it deliberately does not do: look
//! whether there is one already.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use pagefold_engine::whole::{Opened, Reading};
use rustix::fs::Stat;

use super::{First, Located, Locator, Name, Room};
use crate::sealed::prove::{Cloned, Shown};
use crate::sealed::reading::signature;
use crate::sealed::walk::WalkError;
use crate::store::{AnchorKey, AnchorRow, ContentHash, NewAnchor};

impl Locator<'_> {
    /// Clones the file to a new anchor. `None`: the file moved meanwhile, there is no anchor.
    pub(super) fn make(
        &self,
        fd: BorrowedFd<'_>,
        before: &Stat,
        reading: &Reading,
        name: Name,
        room: &mut Room,
    ) -> Result<Option<(AnchorRow, AnchorKey, Shown, Stat)>, WalkError> {
        if let (Some(borrow), Name::Content(hash)) = (&self.borrow, name)
            && let Some((row, key, shown)) = self.borrow_equal(borrow, fd, before, hash, room)?
        {
            return Ok(Some((row, key, shown, *before)));
        }
        let new = self.build.create_anchor()?;
        let size = before.st_size.cast_unsigned();
        let cloned = match self.fill(fd, &new, size, room) {
            Ok(cloned) => cloned,
            Err(error) => {
                new.discard();
                return Err(error);
            }
        };
        if !self.held_still(fd, before)? {
            new.discard();
            return Ok(None);
        }
        let content = match name {
            Name::Content(hash) => Some(hash),
            Name::Place(_) => None,
        };
        if self.borrow.is_some() || !reading.is_settled() {
            let (row, key) = self.finish(new, size, content, room)?;
            return Ok(Some((row, key, Shown::Cloned(cloned), *before)));
        }
        // A clone lies where the file lies, which held still: no need to ask. This is a hint, and read again before anything is proved with it.
        let signature = signature(&reading.layout);
        let (key, serial) = (new.key, new.serial);
        new.finish()?;
        let row =
            AnchorRow { serial, domain: self.domain, size, signature, content, borrowed: None, stamp: None };
        Ok(Some((row, key, Shown::Cloned(cloned), *before)))
    }

    /// Clones the file; under `--borrow` copies it: of one moment only if it held still, which the caller sees.
    fn fill(
        &self,
        fd: BorrowedFd<'_>,
        new: &NewAnchor<'_>,
        size: u64,
        room: &mut Room,
    ) -> Result<Cloned, WalkError> {
        if self.borrow.is_none() {
            return Cloned::clone_to(fd, &new.file, new.key).map_err(WalkError::clone);
        }
        let cancel = self.progress.cancel_flag();
        let copied = Cloned::copy_to(&self.reads, fd, (&new.file, new.key), size, &mut room.bytes, cancel);
        copied.map_err(|e| match e.kind() {
            io::ErrorKind::Interrupted => WalkError::Cancelled,
            _ => WalkError::here("copy", e),
        })
    }

    /// Reads a new anchor's map (its first reading of this call) and makes it immutable.
    fn finish(
        &self,
        new: NewAnchor<'_>,
        size: u64,
        content: Option<ContentHash>,
        room: &mut Room,
    ) -> Result<(AnchorRow, AnchorKey), WalkError> {
        let (key, serial) = (new.key, new.serial);
        let stat = rustix::fs::fstat(&new.file).map_err(|e| WalkError::here("stat the anchor of", e))?;
        let read = self.readings.read(new.file.as_fd(), &stat, &mut room.extents);
        let (reading, _) = read.map_err(|e| WalkError::here("read the extent map of the anchor of", e))?;
        let placed = reading.decides() && self.borrow.is_none();
        let signature = if placed { signature(&reading.layout) } else { None };
        new.finish()?;
        if let Some(borrow) = &self.borrow {
            borrow.did_copy(size);
        }
        // Nobody could write it before either: it is ours alone, and the descriptor that could is closed.
        if let Ok(opened) = Opened::new(key, reading) {
            self.opened.insert(key, Arc::new(First { opened, kept: None }));
        }
        let row =
            AnchorRow { serial, domain: self.domain, size, signature, content, borrowed: None, stamp: None };
        Ok((row, key))
    }

    /// A file that somebody writes all the while: the bytes of one moment.
    pub(super) fn clone_anyway(
        &self,
        fd: BorrowedFd<'_>,
        room: &mut Room,
    ) -> Result<(Stat, Located), WalkError> {
        let mut stat = rustix::fs::fstat(fd).map_err(|e| WalkError::here("stat", e))?;
        let new = self.build.create_anchor()?;
        let cloned = match self.fill(fd, &new, stat.st_size.cast_unsigned(), room) {
            Ok(cloned) => cloned,
            Err(error) => {
                new.discard();
                return Err(error);
            }
        };
        let settled = self.held_still(fd, &stat)?;
        // Attributes from before the clone: a write after them shows as a change since the root was sealed. The size is that of the bytes.
        let anchor = rustix::fs::fstat(&new.file).map_err(|e| WalkError::here("stat the anchor of", e))?;
        stat.st_size = anchor.st_size;
        if stat.st_size == 0 {
            new.discard();
            return Ok((stat, Located { unsettled: !settled, ..Located::at(Shown::Empty) }));
        }
        let (row, key) = self.finish(new, stat.st_size.cast_unsigned(), None, room)?;
        self.made.insert(key, (row, false));
        Ok((stat, Located { made: true, unsettled: !settled, ..Located::at(Shown::Cloned(cloned)) }))
    }
}
