//! `--borrow`: anchors on file systems without reflink. A file of a tree that the user declares never to be written becomes the anchor
//! by a hard link; what has no equal there is copied to an anchor of our own.
//!
//! Invariant: a borrowed file is only ever read and linked; it was clean, opened by no writer, and held still while its bytes were compared.
//! What it deliberately does not do: keep its owner from writing it later (`verify` tells), or anything without the flag.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, Stat};

use super::{Locator, Room};
use crate::sealed::prove::{Protected, SameBytes, Shown};
use crate::sealed::reading::stamp;
use crate::sealed::report::BorrowCounts;
use crate::sealed::walk::WalkError;
use crate::store::{AnchorKey, AnchorRow, ContentHash, StoreError};

/// A regular file of a declared tree. Its hash is a hint: bytes are compared before every use.
struct Candidate {
    path: PathBuf,
    hash: OnceLock<Option<ContentHash>>,
}

/// What may be borrowed, by size, and what was.
#[derive(Default)]
pub(crate) struct Borrow {
    by_size: HashMap<u64, Vec<Candidate>>,
    pub borrowed: AtomicU64,
    pub copied: AtomicU64,
    pub copied_bytes: AtomicU64,
    immutable: AtomicU64,
}

impl Borrow {
    /// Lists the regular files of `dirs` (absolute), on the file system with device number `dev` only; links are not followed.
    pub fn collect(dirs: &[PathBuf], dev: u64, cancelled: impl Fn() -> bool) -> Result<Borrow, StoreError> {
        let mut found = Borrow::default();
        let mut open = dirs.to_vec();
        while let Some(dir) = open.pop() {
            if cancelled() {
                break;
            }
            let io = |e: std::io::Error| StoreError::io("list the files to borrow of", &dir, e);
            for entry in std::fs::read_dir(&dir).map_err(io)? {
                let path = entry.map_err(io)?.path();
                let Ok(meta) = path.symlink_metadata() else { continue };
                if meta.dev() != dev {
                    continue;
                }
                if meta.is_dir() {
                    open.push(path);
                } else if meta.is_file() && meta.len() > 0 {
                    let candidate = Candidate { path, hash: OnceLock::new() };
                    found.by_size.entry(meta.len()).or_default().push(candidate);
                }
            }
        }
        Ok(found)
    }

    /// For the report.
    pub fn counts(&self) -> BorrowCounts {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        BorrowCounts {
            borrowed: get(&self.borrowed),
            copied: get(&self.copied),
            copied_bytes: get(&self.copied_bytes),
            not_linkable: get(&self.immutable),
        }
    }

    pub fn did_copy(&self, bytes: u64) {
        self.copied.fetch_add(1, Ordering::Relaxed);
        self.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Locator<'_> {
    /// A hard link to a declared file with the bytes of `fd`, whose hash and attributes are given. `None`: there is none that may be used.
    pub(super) fn borrow_equal(
        &self,
        borrow: &Borrow,
        fd: BorrowedFd<'_>,
        before: &Stat,
        hash: ContentHash,
        room: &mut Room,
    ) -> Result<Option<(AnchorRow, AnchorKey, Shown)>, WalkError> {
        let size = before.st_size.cast_unsigned();
        let cancel = self.progress.cancel_flag();
        for candidate in borrow.by_size.get(&size).into_iter().flatten() {
            if self.progress.is_cancelled() {
                return Err(WalkError::Cancelled);
            }
            let Some((file, stat)) = open(candidate) else { continue };
            // The root's own file is no immutable sharer of itself.
            if stat.st_ino == before.st_ino || stat.st_dev != before.st_dev || !self.is_quiet(&file, &stat) {
                continue;
            }
            let read = || self.reads.hash(file.as_fd(), size, &mut room.other, cancel).ok();
            if *candidate.hash.get_or_init(read) != Some(hash) {
                continue;
            }
            if rustix::fs::ioctl_getflags(&file)
                .is_ok_and(|f| f.intersects(IFlags::IMMUTABLE | IFlags::APPEND))
            {
                borrow.immutable.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(path = ?candidate.path, "immutable or append-only: it can't be linked, a copy is made");
                continue;
            }
            let rooms = (&mut room.bytes, &mut room.other);
            let same = self.reads.same(fd, &file, size, rooms, cancel);
            if !same.unwrap_or(false) || !self.is_quiet(&file, &stat) || !self.held_still(fd, before)? {
                continue;
            }
            let Ok((key, serial)) = self.build.borrow_anchor(&file) else { continue };
            let row = AnchorRow {
                serial,
                domain: self.domain,
                size,
                signature: None,
                content: Some(hash),
                borrowed: Some(candidate.path.clone()),
                stamp: None,
            };
            // Linking moved its change time: the name must lead to it still. An anchor that is not used goes with the build.
            let Ok(Some(anchor)) = Protected::borrowed(file, key, &row) else { continue };
            borrow.borrowed.fetch_add(1, Ordering::Relaxed);
            return Ok(Some((row, key, Shown::Same(SameBytes::of_borrowed(&anchor)))));
        }
        Ok(None)
    }

    /// Nobody has it open for writing, no page is dirty, and nothing was written since `stat`.
    pub(super) fn is_quiet(&self, file: &File, stat: &Stat) -> bool {
        let now = rustix::fs::fstat(file);
        let size = stat.st_size.cast_unsigned();
        pagefold_sys::probe::read_lease(file.as_fd()).is_ok()
            && now.is_ok_and(|now| stamp(&now) == stamp(stat))
            && self.readings.dirty(file.as_fd(), size).is_ok_and(|dirty| dirty == Some(false))
    }

    /// The row of an anchor that is borrowed. Asked under `--borrow` only.
    pub(super) fn borrowed_row(&self, key: &AnchorKey) -> Option<AnchorRow> {
        self.borrow.as_ref()?;
        let made = self.made.get(key).map(|made| made.0.clone());
        made.or_else(|| self.lookup.anchor(key).ok().flatten()).filter(|row| row.borrowed.is_some())
    }
}

fn open(candidate: &Candidate) -> Option<(File, Stat)> {
    let look = rustix::fs::statat(CWD, &candidate.path, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(&candidate.path, flags, Mode::empty()).ok()?);
    let stat = rustix::fs::fstat(&file).ok()?;
    let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
    (regular && look.st_ino == stat.st_ino && look.st_size == stat.st_size).then_some((file, stat))
}
