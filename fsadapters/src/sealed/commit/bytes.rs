//! The bytes of a regular file: where a view has them, how they get into another file, whether two files hold the same.
//!
//! Bytes are shared wherever the file system can (`FICLONE`), copied with holes kept where it can't. What it deliberately
//! does not do: metadata.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use crate::reflink::{ReflinkError, clone_file};
use crate::sealed::inode::{Below, Held, Look, split};
use crate::store::AnchorKey;

/// Where a view has the bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bytes {
    /// There are none.
    Empty,
    /// As sealed: in the anchor.
    Anchor(AnchorKey),
    /// In the upper directory, at this path.
    Upper(Vec<u8>),
    /// In the index of the work directory, under this name: all names that the upper has of a hard link are gone, others live
    /// in the sealed layer.
    Index(Vec<u8>),
}

/// Opens anchors for reading.
pub trait Anchors {
    /// Opens the anchor.
    ///
    /// # Errors
    /// It is missing or can't be opened.
    fn open(&self, key: &AnchorKey) -> io::Result<OwnedFd>;
}

impl<F: Fn(&AnchorKey) -> io::Result<OwnedFd>> Anchors for F {
    fn open(&self, key: &AnchorKey) -> io::Result<OwnedFd> {
        self(key)
    }
}

/// Where bytes come from.
pub struct Sources<'a> {
    /// The upper directory.
    pub upper: &'a Below,
    /// The index of the work directory, where there is one.
    pub index: Option<&'a Below>,
    /// The anchors.
    pub anchors: &'a dyn Anchors,
}

impl Sources<'_> {
    /// Opens what holds `bytes`; `None` for no bytes. `size` is what the view shows, and must be what is found.
    pub fn open(&self, bytes: &Bytes, size: u64) -> io::Result<Option<OwnedFd>> {
        let held = |below: &Below, path: &[u8]| -> io::Result<OwnedFd> {
            let (parent, name) = split(path);
            let found = Held::open(below.dir(parent)?.as_fd(), name)?.ok_or(Errno::NOENT)?;
            found.open_file(OFlags::RDONLY)
        };
        let file = match bytes {
            Bytes::Empty => return Ok(None),
            Bytes::Anchor(key) => self.anchors.open(key)?,
            Bytes::Upper(path) => held(self.upper, path)?,
            Bytes::Index(name) => held(self.index.ok_or(Errno::NOENT)?, name)?,
        };
        let look = Look::of(&file)?;
        if look.is_file() && look.size == size {
            return Ok(Some(file));
        }
        let what = format!("its data has {} bytes where the view shows {size}", look.size);
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// Fills the empty file `dest` with the bytes of `src`: shared where possible, else copied. True when shared.
pub fn fill(src: BorrowedFd<'_>, dest: BorrowedFd<'_>, size: u64) -> io::Result<bool> {
    match clone_file(src, dest) {
        Ok(()) => Ok(true),
        // Refused: one of two btrfs files is without checksums. CrossDevice: stores may be elsewhere where nothing is shared.
        Err(ReflinkError::Unsupported | ReflinkError::CrossDevice | ReflinkError::Refused) => {
            copy(src, dest, size)?;
            Ok(false)
        }
        Err(ReflinkError::NotPermitted(e) | ReflinkError::Io(e)) => Err(e),
    }
}

/// Copies data, leaves holes holes.
fn copy(src: BorrowedFd<'_>, dest: BorrowedFd<'_>, size: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Some((start, end)) = next_data(src, at, size)? {
        at = start;
        while at < end {
            let want = buffer.len().min((end - at) as usize);
            let got = rustix::io::retry_on_intr(|| rustix::io::pread(src, &mut buffer[..want], at))?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            write_all(dest, &buffer[..got], at)?;
            at += got as u64;
        }
    }
    Ok(rustix::fs::ftruncate(dest, size)?)
}

fn write_all(dest: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let wrote = rustix::io::retry_on_intr(|| rustix::io::pwrite(dest, bytes, at))?;
        if wrote == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[wrote..];
        at += wrote as u64;
    }
    Ok(())
}

/// The next run of data at or after `at`; `None` when only a hole is left.
fn next_data(file: BorrowedFd<'_>, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => at,
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
    Ok((start < end).then_some((start, end)))
}

/// Whether the first `size` bytes of both are the same.
pub fn equal(a: BorrowedFd<'_>, b: BorrowedFd<'_>, size: u64) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 256 << 10], vec![0; 256 << 10]);
    let mut at = 0;
    while at < size {
        let want = left.len().min((size - at) as usize);
        let (got_a, got_b) = (read_full(a, &mut left[..want], at)?, read_full(b, &mut right[..want], at)?);
        if got_a != want || got_b != want || left[..want] != right[..want] {
            return Ok(false);
        }
        at += want as u64;
    }
    Ok(true)
}

fn read_full(file: BorrowedFd<'_>, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let got =
            rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut buffer[done..], at + done as u64))?;
        if got == 0 {
            break;
        }
        done += got;
    }
    Ok(done)
}
