//! Reading whole files for what extents can't decide, without leaving them in the page cache.
//!
//! Invariant: pages that were cached stay, pages that were not are dropped again (`RWF_DONTCACHE`, or by hand where the kernel
//! or the file system has none). A file that ends early is an error, not a shorter file. What it deliberately does not do:
//! guarantee that the file held still; the caller looks at its attributes and dirty pages before and after.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use pagefold_engine::units::{PageCount, PageIndex};
use pagefold_sys::uring::RWF_DONTCACHE;
use rustix::io::{Errno, ReadWriteFlags};

use crate::reader::CacheGuard;
use crate::store::ContentHash;

/// Bytes read at once.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;

/// Kernels and file systems that know `RWF_DONTCACHE`.
#[derive(Debug)]
pub(crate) struct Bytes {
    dont_cache: AtomicBool,
}

impl Default for Bytes {
    fn default() -> Self {
        Bytes { dont_cache: AtomicBool::new(true) }
    }
}

impl Bytes {
    /// Fills `buffer` from byte `offset` on.
    fn fill(&self, file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let dont_cache = self.dont_cache.load(Ordering::Relaxed);
            let flags = ReadWriteFlags::from_bits_retain(if dont_cache { RWF_DONTCACHE } else { 0 });
            let mut parts = [io::IoSliceMut::new(&mut buffer[filled..])];
            match rustix::io::preadv2(file, &mut parts, offset + filled as u64, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => filled += length,
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) if dont_cache => {
                    self.dont_cache.store(false, Ordering::Relaxed);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Calls `chunk` with the bytes `0 .. size` in order, until it says false. `room` is a buffer.
    ///
    /// # Errors
    /// As reading fails; [`io::ErrorKind::UnexpectedEof`] for a file shorter than `size`.
    pub fn read(
        &self,
        file: BorrowedFd<'_>,
        size: u64,
        room: &mut Vec<u8>,
        mut chunk: impl FnMut(u64, &[u8]) -> io::Result<bool>,
    ) -> io::Result<()> {
        let pages = size.div_ceil(rustix::param::page_size() as u64);
        let whole = [(PageIndex(0), PageCount(pages))];
        let guard = (!self.dont_cache.load(Ordering::Relaxed)).then(|| CacheGuard::new(file, &whole, false));
        let mut at = 0;
        let mut result = Ok(true);
        while at < size && matches!(result, Ok(true)) {
            let length = (size - at).min(CHUNK_BYTES as u64) as usize;
            room.resize(length, 0);
            result = self.fill(file, room, at).and_then(|()| chunk(at, room));
            at += length as u64;
        }
        if let Some(guard) = guard {
            guard.restore(file, &whole);
        }
        result.map(|_| ())
    }

    /// BLAKE3 of the bytes `0 .. size`. A file of one chunk is left in `room`.
    ///
    /// # Errors
    /// As [`Self::read`]; `Interrupted` when `cancel` is set.
    pub fn hash(
        &self,
        file: BorrowedFd<'_>,
        size: u64,
        room: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> io::Result<ContentHash> {
        let mut hasher = blake3::Hasher::new();
        self.read(file, size, room, |_, bytes| {
            hasher.update(bytes);
            go_on(cancel)
        })?;
        Ok(ContentHash(*hasher.finalize().as_bytes()))
    }

    /// Whether two files have the same bytes `0 .. size`.
    ///
    /// # Errors
    /// As [`Self::read`]; `Interrupted` when `cancel` is set.
    pub fn same(
        &self,
        a: impl AsFd,
        b: impl AsFd,
        size: u64,
        rooms: (&mut Vec<u8>, &mut Vec<u8>),
        cancel: &AtomicBool,
    ) -> io::Result<bool> {
        let (room, other) = rooms;
        let mut same = true;
        let b = b.as_fd();
        let pages = size.div_ceil(rustix::param::page_size() as u64);
        let whole = [(PageIndex(0), PageCount(pages))];
        let guard = (!self.dont_cache.load(Ordering::Relaxed)).then(|| CacheGuard::new(b, &whole, false));
        let read = self.read(a.as_fd(), size, room, |at, bytes| {
            other.resize(bytes.len(), 0);
            self.fill(b, other, at)?;
            same = bytes == &other[..];
            Ok(same && go_on(cancel)?)
        });
        if let Some(guard) = guard {
            guard.restore(b, &whole);
        }
        read.map(|()| same)
    }
}

fn go_on(cancel: &AtomicBool) -> io::Result<bool> {
    if cancel.load(Ordering::Relaxed) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(true) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn hashes_and_comparisons_see_every_byte() {
        let never = AtomicBool::new(false);
        for length in [1usize, 4096, CHUNK_BYTES - 1, CHUNK_BYTES + 1, 3 * CHUNK_BYTES] {
            let bytes: Vec<u8> = (0..length).map(|n| (n * 31 % 251) as u8).collect();
            let file = |bytes: &[u8]| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(bytes).unwrap();
                file
            };
            let (a, b) = (file(&bytes), file(&bytes));
            let mut last = bytes.clone();
            last[length - 1] ^= 1;
            let c = file(&last);
            for dont_cache in [true, false] {
                let reads = Bytes { dont_cache: AtomicBool::new(dont_cache) };
                let (mut room, mut other) = (Vec::new(), Vec::new());
                let size = length as u64;
                let hash = reads.hash(a.as_fd(), size, &mut room, &never).unwrap();
                assert_eq!(hash.0, *blake3::hash(&bytes).as_bytes());
                assert!(reads.same(&a, &b, size, (&mut room, &mut other), &never).unwrap());
                assert!(!reads.same(&a, &c, size, (&mut room, &mut other), &never).unwrap());
                let short = reads.hash(a.as_fd(), size + 1, &mut room, &never).unwrap_err();
                assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
        let cancelled = AtomicBool::new(true);
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        assert!(Bytes::default().hash(file.as_fd(), 10, &mut Vec::new(), &cancelled).is_err());
    }
}
