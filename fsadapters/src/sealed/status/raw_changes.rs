//! Whether a raw root changed under its seal: each sealed inode's number, change time and size against today's.
//!
//! Invariant: only stat, and nothing is followed out of the root. A name that was added or removed shows in its directory's change time. What it deliberately does not
//! do: resolve which truth is right; `commit` does that file by file.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, StatxFlags};
use serde::Serialize;

use crate::scan::as_texts;
use crate::sealed::inode::{dir_below, split};
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
    // Entries of a directory stand together.
    let mut last: Option<(EntryId, Option<OwnedFd>)> = None;
    for (index, entry) in tree.entries.iter().enumerate() {
        if cancel.load(Ordering::Relaxed) {
            break;
        }
        // One name of each inode is enough: they share what is compared.
        if std::mem::replace(&mut seen[entry.inode.0 as usize], true) {
            continue;
        }
        let id = EntryId(index as u32);
        let (dir, name) = match index {
            0 => (Some(raw), &b"."[..]),
            _ => {
                if last.as_ref().is_none_or(|(parent, _)| *parent != entry.parent) {
                    last = Some((entry.parent, dir_below(raw, &tree.path(entry.parent)).ok()));
                }
                (last.as_ref().and_then(|(_, dir)| dir.as_ref()).map(AsFd::as_fd), &entry.name[..])
            }
        };
        if !dir.is_some_and(|dir| is_as_sealed_in(dir, name, tree.inode(id))) {
            found.changed += 1;
            if found.examples.len() < EXAMPLES {
                found.examples.push(PathBuf::from(OsStr::from_bytes(&tree.path(id))));
            }
        }
    }
    found
}

/// Whether the name below `raw` is still the inode that was sealed, untouched. Nothing is followed on the way: what a link
/// leads to is not what was sealed.
#[must_use]
pub fn is_as_sealed(raw: BorrowedFd<'_>, path: &[u8], sealed: &Inode) -> bool {
    let (parent, name) = split(path);
    dir_below(raw, parent).is_ok_and(|dir| is_as_sealed_in(dir.as_fd(), name, sealed))
}

fn is_as_sealed_in(dir: BorrowedFd<'_>, name: &[u8], sealed: &Inode) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let Ok(now) = rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS) else { return false };
    let facts = &sealed.raw;
    // The place of a nested subvolume in a btrfs snapshot, made anew whenever it is looked at.
    if facts.ctime == (0, 0) && now.stx_ino == facts.ino && matches!(sealed.node, Node::Dir) {
        return true;
    }
    let same_size = matches!(sealed.node, Node::Dir) || now.stx_size == facts.size;
    now.stx_ino == facts.ino && (now.stx_ctime.tv_sec, now.stx_ctime.tv_nsec) == facts.ctime && same_size
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::tree::{Entry, InodeIndex, Meta, RawFacts};

    fn inode(path: &std::path::Path, node: Node) -> Inode {
        use std::os::unix::fs::MetadataExt;
        let m = std::fs::symlink_metadata(path).unwrap();
        let ctime = (m.ctime(), m.ctime_nsec() as u32);
        let raw = RawFacts { ino: m.ino(), ctime, size: m.len(), ..RawFacts::default() };
        Inode { meta: Meta { mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() }, raw, node }
    }

    /// A directory that was moved out of the root, with a link to it in its place: all below is as it was, and not in the root.
    #[test]
    fn a_link_out_of_the_root_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let (root, outside) = (home.path().join("root"), home.path().join("outside"));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/f"), b"x").unwrap();
        let at = |path: &str| root.join(path);
        let file = Node::File { size: 1, data: crate::sealed::tree::Data::Empty };
        let entry = |parent, name: &str, inode| Entry {
            parent: EntryId(parent),
            name: name.as_bytes().into(),
            inode: InodeIndex(inode),
        };
        let tree = Tree {
            entries: vec![entry(0, "", 0), entry(0, "a", 1), entry(1, "b", 2), entry(2, "f", 3)],
            inodes: vec![
                inode(&root, Node::Dir),
                inode(&at("a"), Node::Dir),
                inode(&at("a/b"), Node::Dir),
                inode(&at("a/b/f"), file),
            ],
        };
        let raw = std::fs::File::open(&root).unwrap();
        let changed = || find(raw.as_fd(), &tree, &AtomicBool::new(false)).changed;
        assert_eq!(changed(), 0);
        // A change time moves with the clock's ticks.
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::rename(at("a"), &outside).unwrap();
        std::os::unix::fs::symlink(&outside, at("a")).unwrap();
        assert_eq!(changed(), 4, "the root, a, and all that is below a no more");
        assert!(!is_as_sealed(raw.as_fd(), b"a/b/f", &tree.inodes[3]));
    }
}
