//! What may stand in a sealed tree as the place of a file's bytes, and how it was shown.
//!
//! The engine's order (`Candidate -> protect -> prove -> share`), for whole files of a root that is in use. The anchor is the protected side:
//! immutable, checked when it is opened. The file is not protected at all; what is proved of it is one moment (see `pagefold_engine::whole`).
//! Invariant: a [`Shown`] that names an anchor is made by this module's functions and by the engine's proof, and by nothing else: a hint from the
//! index can't become one. What it deliberately does not do: look for candidates.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use pagefold_engine::whole::{Enclosed, Proof};
use rustix::fs::{AtFlags, CWD, FileType, IFlags, Stat, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::bytes::Bytes;
use super::reading::Stamp;
use super::tree::{Data, Inode, Node};
use crate::reflink::{self, DedupeDest, Deduped, ReflinkError};
use crate::store::{AnchorKey, AnchorRow};

/// Where a file's bytes were shown to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shown {
    /// It has none.
    Empty,
    /// Same place, between two readings of the anchor: still to be closed.
    Enclosed(Enclosed<AnchorKey>),
    /// Same place.
    Place(Proof<AnchorKey>),
    /// Same bytes.
    Same(SameBytes),
    /// The anchor is a clone of it.
    Cloned(Cloned),
    /// It was sealed before and has not changed since.
    Unchanged(Unchanged),
}

impl Shown {
    /// What goes into the tree; `None` while something is still to be closed.
    pub fn data(&self) -> Option<Data> {
        Some(Data::Anchor(match self {
            Shown::Empty => return Some(Data::Empty),
            Shown::Enclosed(_) => return None,
            Shown::Place(proof) => proof.anchor(),
            Shown::Same(same) => same.anchor,
            Shown::Cloned(cloned) => cloned.anchor,
            Shown::Unchanged(unchanged) => unchanged.anchor,
        }))
    }
}

/// An anchor that is what it must be: of this size, and nobody can write it.
#[derive(Debug)]
pub(crate) struct Protected {
    pub file: File,
    pub key: AnchorKey,
    pub stat: Stat,
}

impl Protected {
    /// `None` when it is not of this size, not immutable or somebody may write it: then it is no anchor any more.
    pub fn new(file: File, key: AnchorKey, size: u64) -> io::Result<Option<Protected>> {
        let stat = rustix::fs::fstat(&file)?;
        let looks = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && stat.st_size.cast_unsigned() == size
            && stat.st_mode & 0o222 == 0;
        if !looks || !is_immutable(file.as_fd())? {
            return Ok(None);
        }
        Ok(Some(Protected { file, key, stat }))
    }

    /// An anchor that is somebody's file (`--borrow`), as `row` says: protected by the user's word alone. `None` where the row names none, and
    /// when it is not of its size or not the file at that path any more.
    pub fn borrowed(file: File, key: AnchorKey, row: &AnchorRow) -> io::Result<Option<Protected>> {
        let Some(path) = &row.borrowed else { return Ok(None) };
        let stat = rustix::fs::fstat(&file)?;
        let there = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
        let looks = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && stat.st_size.cast_unsigned() == row.size
            && stat.st_nlink >= 2
            && (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino);
        Ok(looks.then_some(Protected { file, key, stat }))
    }
}

/// Whether what is at `path` still looks like an anchor of this size: what [`Protected::new`] asks, by one call.
pub(crate) fn looks_whole(path: &Path, size: u64) -> bool {
    let wanted = StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::SIZE;
    let Ok(stat) = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, wanted) else { return false };
    FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::RegularFile
        && stat.stx_size == size
        && stat.stx_mode & 0o222 == 0
        && stat.stx_attributes.contains(StatxAttributes::IMMUTABLE)
}

/// The stamp of an open file that is what [`Protected::new`] asks of an anchor, by one call.
pub(crate) fn anchor_stamp(file: BorrowedFd<'_>, size: u64) -> io::Result<Option<Stamp>> {
    let wanted = StatxFlags::BASIC_STATS;
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted)?;
    let looks = FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::RegularFile
        && stat.stx_size == size
        && stat.stx_mode & 0o222 == 0
        && stat.stx_attributes.contains(StatxAttributes::IMMUTABLE);
    let (c, m) = (stat.stx_ctime, stat.stx_mtime);
    let stamp = (size.cast_signed(), c.tv_sec, u64::from(c.tv_nsec), m.tv_sec, u64::from(m.tv_nsec));
    Ok(looks.then_some(stamp))
}

fn is_immutable(file: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(stat.stx_attributes.contains(StatxAttributes::IMMUTABLE))
}

/// Shows that a file has the bytes of an anchor: compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SameBytes {
    anchor: AnchorKey,
}

impl SameBytes {
    /// Compares a file of `size` bytes with an anchor. Whether the file held still meanwhile is the caller's to see.
    pub fn compare(
        reads: &Bytes,
        file: BorrowedFd<'_>,
        anchor: &Protected,
        size: u64,
        rooms: (&mut Vec<u8>, &mut Vec<u8>),
        cancel: &AtomicBool,
    ) -> io::Result<Option<SameBytes>> {
        let same = reads.same(file, &anchor.file, size, rooms, cancel)?;
        Ok(same.then_some(SameBytes { anchor: anchor.key }))
    }

    /// A file that was just compared and linked.
    pub(super) fn of_borrowed(anchor: &Protected) -> SameBytes {
        SameBytes { anchor: anchor.key }
    }

    /// Compares bytes that were read of a file with the anchor's, read before: an anchor's never change.
    pub fn compare_read(file: &[u8], anchor: AnchorKey, bytes: &[u8]) -> Option<SameBytes> {
        (file == bytes).then_some(SameBytes { anchor })
    }

    /// Lets the kernel compare under both inodes' locks and makes the file share the anchor's blocks. `None`: they differ, or
    /// the kernel can't.
    pub fn dedupe(file: BorrowedFd<'_>, anchor: &Protected, size: u64) -> Option<SameBytes> {
        let dest = [DedupeDest { fd: file, offset: 0 }];
        match reflink::dedupe(&anchor.file, 0, size, &dest).ok()?.as_slice() {
            [Deduped::Same] => Some(SameBytes { anchor: anchor.key }),
            _ => None,
        }
    }
}

/// An anchor that was made of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cloned {
    anchor: AnchorKey,
}

impl Cloned {
    /// Makes `anchor`, still empty and ours alone, a clone of `file`: the kernel writes back and takes all blocks under both inodes' locks, so it holds
    /// the bytes of one moment, whoever writes.
    pub fn clone_to(file: BorrowedFd<'_>, anchor: &File, key: AnchorKey) -> Result<Cloned, ReflinkError> {
        match reflink::clone_file(file, anchor) {
            // btrfs clones between files with and without checksums never: the anchor of a NOCOW file is one too.
            Err(ReflinkError::Refused) if is_nocow(file) => {
                let flags = rustix::fs::ioctl_getflags(anchor).map_err(io_error)?;
                rustix::fs::ioctl_setflags(anchor, flags | IFlags::NOCOW).map_err(io_error)?;
                reflink::clone_file(file, anchor)?;
            }
            other => other?,
        }
        Ok(Cloned { anchor: key })
    }

    /// Copies the first `size` bytes to an anchor that is still empty and ours alone (`--borrow`); pages of zeros stay holes. Whether
    /// the file held still meanwhile is the caller's to see.
    pub fn copy_to(
        reads: &Bytes,
        file: BorrowedFd<'_>,
        (anchor, key): (&File, AnchorKey),
        size: u64,
        room: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> io::Result<Cloned> {
        anchor.set_len(size)?;
        reads.read(file, size, room, |at, bytes| {
            if cancel.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if bytes.iter().any(|b| *b != 0) {
                anchor.write_all_at(bytes, at)?;
            }
            Ok(true)
        })?;
        Ok(Cloned { anchor: key })
    }
}

fn io_error(errno: Errno) -> ReflinkError {
    ReflinkError::Io(errno.into())
}

fn is_nocow(file: BorrowedFd<'_>) -> bool {
    rustix::fs::ioctl_getflags(file).is_ok_and(|flags| flags.contains(IFlags::NOCOW))
}

/// How long a write may be under way, seconds. The kernel sets the change time when a write *begins*: one by direct I/O on XFS lets a map be
/// read meanwhile, ends later, and moves no time again. A minute is twice the kernel's own time limit of a disk command.
pub(crate) const UNDER_WAY_S: i64 = 60;

/// Whether a change time that is the same still says that nothing was written since the sealing that *began* at `sealed_at`, seconds.
/// git's rule for files that are "racily clean", with room for writes that were under way.
pub(crate) fn is_telling(ctime_s: i64, sealed_at: i64, under_way_s: i64) -> bool {
    ctime_s < sealed_at.saturating_sub(under_way_s)
}

/// A file that is as it was when its root was sealed last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unchanged {
    anchor: AnchorKey,
}

impl Unchanged {
    /// Judges by inode, size and a change time that [`is_telling`]. `clean`: no dirty page now, so that every store
    /// since then came through a fault, which sets the change time. `sealed` is when the last sealing *began* and how long a write may
    /// have been under way then, in seconds.
    pub fn judge(previous: &Inode, stat: &Stat, clean: bool, sealed: (i64, i64)) -> Option<Unchanged> {
        let Node::File { size, data: Data::Anchor(anchor) } = previous.node else { return None };
        let raw = &previous.raw;
        let same = raw.ino == stat.st_ino
            && raw.size == size
            && stat.st_size.cast_unsigned() == size
            && raw.ctime == (stat.st_ctime, stat.st_ctime_nsec as u32);
        let old = is_telling(stat.st_ctime, sealed.0, sealed.1);
        (same && old && clean).then_some(Unchanged { anchor })
    }

    /// Which anchor.
    pub fn anchor(&self) -> AnchorKey {
        self.anchor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::tree::Meta;
    use crate::sealed::walk::raw_facts;

    #[test]
    fn only_an_old_clean_and_equal_file_is_unchanged() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let node = Node::File { size: 5, data: Data::Anchor(AnchorKey([3; 32])) };
        let sealed = Inode { meta, raw: raw_facts(&stat), node };
        let later = (stat.st_ctime + UNDER_WAY_S + 1, UNDER_WAY_S);
        let judged = Unchanged::judge(&sealed, &stat, true, later);
        assert_eq!(judged.map(|u| u.anchor()), Some(AnchorKey([3; 32])));
        assert!(Unchanged::judge(&sealed, &stat, false, later).is_none(), "dirty");
        for early in [1, 2, 30, UNDER_WAY_S] {
            let sealed_at = (stat.st_ctime + early, UNDER_WAY_S);
            assert!(
                Unchanged::judge(&sealed, &stat, true, sealed_at).is_none(),
                "a write under way: {early} s"
            );
        }
        for change in [
            |i: &mut Inode| i.raw.ino += 1,
            |i: &mut Inode| i.raw.ctime.1 ^= 1,
            |i: &mut Inode| i.raw.size += 1,
            |i: &mut Inode| i.node = Node::File { size: 5, data: Data::Empty },
            |i: &mut Inode| i.node = Node::Fifo,
        ] {
            let mut other = sealed.clone();
            change(&mut other);
            assert!(Unchanged::judge(&other, &stat, true, later).is_none());
        }
    }

    #[test]
    fn a_file_that_can_be_written_is_no_anchor() {
        let file = tempfile::tempfile().unwrap();
        assert!(Protected::new(file, AnchorKey([1; 32]), 0).unwrap().is_none());
    }
}
