//! Whether a raw root changed under its seal: each sealed inode's number, change time and size against today's.
//!
//! Invariant: only stat. A name that was added or removed shows in its directory's change time. What it deliberately does not
//! do: resolve which truth is right; `commit` does that file by file.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, StatxFlags};
use serde::Serialize;

use crate::scan::as_texts;

use crate::sealed::tree::{EntryId, Inode, Node, Tree};

/// Paths kept as examples.
const EXAMPLES: usize = 5;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RawChanges {
    /// Files and directories that are not what was sealed: written, replaced, gone; directories with other names in them.
    pub changed: u64,
    /// Some of them, below the root.
    #[serde(serialize_with = "as_texts")]
    pub examples: Vec<PathBuf>,
}

/// Compares the open raw root with its sealed state.
#[must_use]
pub fn find(raw: BorrowedFd<'_>, tree: &Tree, cancel: &AtomicBool) -> RawChanges {
    let mut found = RawChanges::default();
    let mut seen = vec![false; tree.inodes.len()];
    for (index, entry) in tree.entries.iter().enumerate() {
        if cancel.load(Ordering::Relaxed) {
            break;
        }
        // One name of each inode is enough: they share what is compared.
        if std::mem::replace(&mut seen[entry.inode.0 as usize], true) {
            continue;
        }
        let id = EntryId(index as u32);
        let path = tree.path(id);
        if !is_as_sealed(raw, &path, tree.inode(id)) {
            found.changed += 1;
            if found.examples.len() < EXAMPLES {
                found.examples.push(PathBuf::from(OsStr::from_bytes(&path)));
            }
        }
    }
    found
}

/// Whether the name below `raw` is still the inode that was sealed, untouched.
#[must_use]
pub fn is_as_sealed(raw: BorrowedFd<'_>, path: &[u8], sealed: &Inode) -> bool {
    let path = OsStr::from_bytes(if path.is_empty() { b"." } else { path });
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let Ok(now) = rustix::fs::statx(raw, path, flags, StatxFlags::BASIC_STATS) else { return false };
    let facts = &sealed.raw;
    // The place of a nested subvolume in a btrfs snapshot, made anew whenever it is looked at.
    if facts.ctime == (0, 0) && now.stx_ino == facts.ino && matches!(sealed.node, Node::Dir) {
        return true;
    }
    let same_size = matches!(sealed.node, Node::Dir) || now.stx_size == facts.size;
    now.stx_ino == facts.ino && (now.stx_ctime.tv_sec, now.stx_ctime.tv_nsec) == facts.ctime && same_size
}
