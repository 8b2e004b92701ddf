//! What an image or a view can't hold, found before the image writer sees it.
//!
//! The writer asserts, and worse, it truncates: a 65,536-byte attribute wraps its 16-bit length. Overlayfs can't show a
//! character device 0:0, which is its own mark for "deleted". Invariant: what passes [`check`] the writer holds without loss
//! (`testfs/tests` compare views with their roots; a property test throws trees at it). What it deliberately does not do:
//! repair a tree, or leave things out.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::tree::{Data, EntryId, Inode, Node, Tree, Xattr};

/// Longest name of a directory entry, bytes (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest symbolic link, bytes (`PATH_MAX` less the NUL).
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// Longest value of an attribute, bytes: its length is a 16-bit field.
pub const XATTR_VALUE_BYTES_MAX: usize = 65535;
/// All attributes of an inode with their heads, bytes: counted in 16 bits of 4-byte words, with room for ours.
pub const XATTR_BYTES_MAX: usize = 4 * 65535 - 1024;
/// Attributes of an inode: those shared with other inodes are counted in 8 bits, with room for ours.
pub const XATTRS_MAX: usize = 240;
/// Levels of directories. A path as long as `PATH_MAX` has no more.
pub const DEPTH_MAX: usize = 2048;
/// Largest file, bytes (4 PiB): beyond it the writer's chunk list does not fit its block.
pub const FILE_BYTES_MAX: u64 = 1 << 52;
/// Bytes of metadata, all in all: an image is built in memory.
pub const METADATA_BYTES_MAX: u64 = 2 << 30;

/// Something in a root that can't be sealed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path:?}: {why}")]
pub struct Refusal {
    /// Below the root; empty for the root itself or the whole.
    pub path: PathBuf,
    /// Why.
    pub why: Why,
}

/// Why an entry can't be held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// Name longer than `NAME_BYTES_MAX`.
    #[error("the name has {0} bytes, more than 255")]
    NameLength(usize),
    /// Target longer than `SYMLINK_BYTES_MAX`, or empty.
    #[error("the symbolic link has {0} bytes; 1 to 4095 can be held")]
    SymlinkLength(usize),
    /// Value longer than `XATTR_VALUE_BYTES_MAX`.
    #[error("the value of attribute {name:?} has {bytes} bytes; 65535 can be held")]
    XattrValue {
        /// Attribute.
        name: String,
        /// Length of its value.
        bytes: usize,
    },
    /// Name of an attribute that an image has no place for.
    #[error("the attribute {0:?} can't be shown by a view")]
    XattrName(String),
    /// More than `XATTR_BYTES_MAX` or `XATTRS_MAX`.
    #[error("{count} attributes of {bytes} bytes in all are more than an image can hold")]
    XattrTotal {
        /// How many.
        count: usize,
        /// Bytes with heads.
        bytes: usize,
    },
    /// Character device 0:0.
    #[error("a character device 0:0 means \"deleted\" to overlayfs and can't be shown")]
    Whiteout,
    /// Device number beyond 12 bits major, 20 bits minor.
    #[error("the device number {0:#x} is out of range")]
    Device(u64),
    /// Nanoseconds beyond a second.
    #[error("the modification time has {0} nanoseconds")]
    Time(u32),
    /// Deeper than `DEPTH_MAX`.
    #[error("directories are nested deeper than 2048")]
    Depth,
    /// Larger than `FILE_BYTES_MAX`.
    #[error("the file has {0} bytes, more than 4 PiB")]
    FileSize(u64),
    /// More than `METADATA_BYTES_MAX`.
    #[error("the tree has more than 2 GiB of names and attributes")]
    TreeSize,
    /// Not a tree (see [`super::tree`]): a manifest that somebody made, or a defect.
    #[error("the tree is not well formed: {0}")]
    Malformed(String),
}

/// Everything in `tree` that can't be held, in order, at most `limit`. Empty: the image can be built.
#[must_use]
pub fn check(tree: &Tree, limit: usize) -> Vec<Refusal> {
    let mut found = Vec::new();
    if let Err(why) = shape(tree) {
        found.push(Refusal { path: PathBuf::new(), why });
        return found;
    }
    let mut bytes = 0u64;
    let mut seen = vec![false; tree.inodes.len()];
    for (index, entry) in tree.entries.iter().enumerate() {
        if found.len() >= limit {
            return found;
        }
        let id = EntryId(index as u32);
        bytes += 16 + entry.name.len() as u64;
        if entry.name.len() > NAME_BYTES_MAX {
            found.push(refusal(tree, id, Why::NameLength(entry.name.len())));
        }
        let at = entry.inode.0 as usize;
        // The root's own metadata is not in the image.
        if index == 0 || std::mem::replace(&mut seen[at], true) {
            continue;
        }
        let inode = &tree.inodes[at];
        bytes += inode_bytes(inode);
        if let Err(why) = inode_fits(inode) {
            found.push(refusal(tree, id, why));
        }
    }
    if bytes > METADATA_BYTES_MAX {
        found.push(Refusal { path: PathBuf::new(), why: Why::TreeSize });
    }
    if depth(tree) > DEPTH_MAX {
        found.push(Refusal { path: PathBuf::new(), why: Why::Depth });
    }
    found.truncate(limit);
    found
}

fn refusal(tree: &Tree, id: EntryId, why: Why) -> Refusal {
    Refusal { path: OsString::from_vec(tree.path(id)).into(), why }
}

/// The module invariant of [`super::tree`], as far as the writer depends on it.
fn shape(tree: &Tree) -> Result<(), Why> {
    let malformed = |what: &str| Err(Why::Malformed(what.into()));
    let Some(root) = tree.entries.first() else { return malformed("it has no root") };
    if root.parent.0 != 0 || !root.name.is_empty() {
        return malformed("entry 0 is not the root");
    }
    if u32::try_from(tree.entries.len()).is_err() {
        return malformed("too many entries");
    }
    let mut named = vec![false; tree.inodes.len()];
    for (index, entry) in tree.entries.iter().enumerate() {
        let Some(inode) = tree.inodes.get(entry.inode.0 as usize) else {
            return malformed("an entry names no inode");
        };
        let twice = std::mem::replace(&mut named[entry.inode.0 as usize], true);
        let is_dir = inode.node == Node::Dir;
        if twice && is_dir {
            return malformed("a directory has two names");
        }
        if index == 0 {
            if !is_dir {
                return malformed("the root is no directory");
            }
            continue;
        }
        let parent = entry.parent.0 as usize;
        if parent >= index || tree.inode(entry.parent).node != Node::Dir {
            return malformed("an entry's parent is no directory before it");
        }
        let name = &entry.name[..];
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, b'/' | 0)) {
            return malformed("a name that no directory can have");
        }
    }
    Ok(())
}

/// Levels of directories below the root; 0 for a malformed tree.
pub(super) fn depth(tree: &Tree) -> usize {
    let mut levels = vec![0usize; tree.entries.len()];
    for (index, entry) in tree.entries.iter().enumerate().skip(1) {
        levels[index] = levels.get(entry.parent.0 as usize).map_or(0, |l| l + 1);
    }
    levels.into_iter().max().unwrap_or(0)
}

fn inode_fits(inode: &Inode) -> Result<(), Why> {
    let meta = &inode.meta;
    if meta.mode & !0o7777 != 0 {
        return Err(Why::Malformed(format!("mode {:o}", meta.mode)));
    }
    if meta.mtime.1 > 999_999_999 {
        return Err(Why::Time(meta.mtime.1));
    }
    xattrs_fit(&meta.xattrs)?;
    match &inode.node {
        Node::File { size, data } => match data {
            Data::Empty if *size != 0 => Err(Why::Malformed("an empty file with a size".into())),
            _ if *size > FILE_BYTES_MAX => Err(Why::FileSize(*size)),
            _ => Ok(()),
        },
        Node::Symlink(target) if target.is_empty() || target.len() > SYMLINK_BYTES_MAX => {
            Err(Why::SymlinkLength(target.len()))
        }
        Node::Symlink(target) if target.contains(&0) => {
            Err(Why::Malformed("a symbolic link with a NUL".into()))
        }
        Node::CharDevice(0) => Err(Why::Whiteout),
        Node::CharDevice(rdev) | Node::BlockDevice(rdev) if *rdev > u64::from(u32::MAX) => {
            Err(Why::Device(*rdev))
        }
        _ => Ok(()),
    }
}

fn xattrs_fit(xattrs: &[Xattr]) -> Result<(), Why> {
    if !xattrs.is_sorted_by(|a, b| a.0 < b.0) {
        return Err(Why::Malformed("attributes out of order".into()));
    }
    for (name, value) in xattrs {
        if !name_fits(name) {
            return Err(Why::XattrName(String::from_utf8_lossy(name).into_owned()));
        }
        if value.len() > XATTR_VALUE_BYTES_MAX {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(Why::XattrValue { name, bytes: value.len() });
        }
    }
    let bytes = xattr_bytes(xattrs);
    if xattrs.len() > XATTRS_MAX || bytes > XATTR_BYTES_MAX {
        return Err(Why::XattrTotal { count: xattrs.len(), bytes });
    }
    Ok(())
}

/// With what overlayfs puts before an attribute of its own name space, which the kernel takes off again.
const ESCAPE: &[u8] = b"overlay.";
const OVERLAY: &[u8] = b"trusted.overlay.";

/// EROFS has numbers for these prefixes only; a name without one would be written and never be seen.
fn name_fits(name: &[u8]) -> bool {
    if name.contains(&0) {
        return false;
    }
    if matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default") {
        return true;
    }
    let escape = if name.starts_with(OVERLAY) { ESCAPE.len() } else { 0 };
    let prefixed = [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    prefixed && name.len() + escape <= NAME_BYTES_MAX
}

fn xattr_bytes(xattrs: &[Xattr]) -> usize {
    xattrs.iter().map(|(name, value)| 4 + (name.len() + ESCAPE.len() + value.len()).next_multiple_of(4)).sum()
}

fn inode_bytes(inode: &Inode) -> u64 {
    let target = if let Node::Symlink(target) = &inode.node { target.len() } else { 0 };
    (256 + xattr_bytes(&inode.meta.xattrs) + target) as u64
}
