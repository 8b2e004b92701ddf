//! The file under the index: positioned reads and writes, held back until the index has been found good.
//!
//! redb repairs a database while it opens it, which may throw a damaged last commit away and go on from the one before. For us that is no
//! repair: views may have been mounted on what the last commit said. So until [`Gate::open`] all writes stay in memory: an index that is
//! refused has not been touched.
//!
//! Invariant: a read sees the newest write, held back or not. What it deliberately does not do: lock (the store's lock does).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::{BackendError, StorageBackend};

/// Bytes of a held-back block.
const BLOCK: u64 = 4096;
/// Held back at most: a repair of an index rewrites little. Beyond, opening fails rather than fills the memory.
const HELD_BLOCKS_MAX: usize = 64 << 10;
/// An index file longer than this is none.
const FILE_BYTES_MAX: u64 = 1 << 44;

/// The file, shared by the database and by who decides whether its writes may pass.
#[derive(Debug)]
pub(super) struct Gate {
    file: File,
    held: RwLock<Option<Held>>,
}

/// What the file would be.
#[derive(Debug)]
struct Held {
    length: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
}

impl Gate {
    /// All writes are held back.
    pub(super) fn closed(file: File) -> io::Result<Arc<Gate>> {
        let length = file.metadata()?.len();
        if length > FILE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is longer than any index"));
        }
        Ok(Arc::new(Gate { file, held: RwLock::new(Some(Held { length, blocks: BTreeMap::new() })) }))
    }

    /// Writes out what was held back; from now on writes pass.
    pub(super) fn open(&self) -> io::Result<()> {
        let mut held = self.write();
        let Some(state) = held.take() else { return Ok(()) };
        if self.file.metadata()?.len() != state.length {
            self.file.set_len(state.length)?;
        }
        // The header names the pages: it goes last, when they are on disk.
        for part in [state.blocks.range(1..), state.blocks.range(..1)] {
            let mut wrote = false;
            for (at, block) in part {
                let bytes = BLOCK.min(state.length.saturating_sub(at * BLOCK)) as usize;
                self.file.write_all_at(&block[..bytes], at * BLOCK)?;
                wrote = true;
            }
            if wrote {
                self.file.sync_data()?;
            }
        }
        Ok(())
    }

    // A panic of the database while it holds the lock leaves plain bytes behind: nothing here can be half done.
    fn read(&self) -> RwLockReadGuard<'_, Option<Held>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<Held>> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_held(&self, held: &Held, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64).filter(|end| *end <= held.length);
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let on_disk = self.file.metadata()?.len();
        let mut at = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let within = (at % BLOCK) as usize;
            let bytes = rest.len().min(BLOCK as usize - within);
            let (head, tail) = rest.split_at_mut(bytes);
            match held.blocks.get(&(at / BLOCK)) {
                Some(block) => head.copy_from_slice(&block[within..within + bytes]),
                None => read_or_zero(&self.file, on_disk, at, head)?,
            }
            at += bytes as u64;
            rest = tail;
        }
        Ok(())
    }

    fn write_held(&self, held: &mut Held, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        if end > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let on_disk = self.file.metadata()?.len();
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (number, within) = (at / BLOCK, (at % BLOCK) as usize);
            let (head, tail) = rest.split_at(rest.len().min(BLOCK as usize - within));
            if !held.blocks.contains_key(&number) {
                if held.blocks.len() >= HELD_BLOCKS_MAX {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                let mut block = Box::new([0; BLOCK as usize]);
                read_or_zero(&self.file, on_disk, number * BLOCK, &mut block[..])?;
                held.blocks.insert(number, block);
            }
            if let Some(block) = held.blocks.get_mut(&number) {
                block[within..within + head.len()].copy_from_slice(head);
            }
            at += head.len() as u64;
            rest = tail;
        }
        held.length = held.length.max(end);
        Ok(())
    }
}

/// What the file holds at `at`; zeros beyond its end.
fn read_or_zero(file: &File, length: u64, at: u64, out: &mut [u8]) -> io::Result<()> {
    let there = length.saturating_sub(at).min(out.len() as u64) as usize;
    let (head, tail) = out.split_at_mut(there);
    tail.fill(0);
    file.read_exact_at(head, at)
}

/// The database's view of a [`Gate`].
#[derive(Debug)]
pub(super) struct Backend(pub Arc<Gate>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        match &*self.0.read() {
            Some(held) => Ok(held.length),
            None => Ok(self.0.file.metadata()?.len()),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match &*self.0.read() {
            Some(held) => self.0.read_held(held, offset, out),
            None => self.0.file.read_exact_at(out, offset),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match &mut *self.0.write() {
            Some(_) if len > FILE_BYTES_MAX => Err(io::ErrorKind::FileTooLarge.into()),
            Some(held) => {
                held.blocks.retain(|at, _| at * BLOCK < len);
                // What lies beyond the new end must read as zeros should the file grow again.
                if len < held.length && !len.is_multiple_of(BLOCK) {
                    let zeros = vec![0; (BLOCK - len % BLOCK) as usize];
                    self.0.write_held(held, len, &zeros)?;
                }
                held.length = len;
                Ok(())
            }
            None => self.0.file.set_len(len),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        match &*self.0.read() {
            Some(_) => Ok(()),
            None => self.0.file.sync_data(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        {
            let held = self.0.read();
            if held.is_none() {
                return self.0.file.write_all_at(data, offset);
            }
        }
        match &mut *self.0.write() {
            Some(held) => self.0.write_held(held, offset, data),
            None => self.0.file.write_all_at(data, offset),
        }
    }

    fn try_lock_range(&self, _start: Bound<u64>, _end: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(&self, _start: Bound<u64>, _end: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
}
