//! A root as it was sealed: names, metadata, and where each file's bytes are.
//!
//! The walk makes it, the image writer and the manifest are made from it, and commit compares the raw root with it.
//! Invariant: entry 0 is the root directory, with an empty name and itself as parent; every other entry comes after its
//! parent; entries of one directory are ascending by name; hard links are entries with one inode.

use crate::store::key::{AnchorKey, Signature};

/// Index into [`Tree::entries`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct EntryId(pub u32);

/// Index into [`Tree::inodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct InodeIndex(pub u32);

/// A directory tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Names; see the module's invariant.
    pub entries: Vec<Entry>,
    /// Each inode once.
    pub inodes: Vec<Inode>,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The directory it is in.
    pub parent: EntryId,
    /// Bytes of the name, no slash; empty for the root.
    pub name: Box<[u8]>,
    /// What it names.
    pub inode: InodeIndex,
}

/// An extended attribute: full name (`user.x`, `security.capability`, `system.posix_acl_access`, ...), value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// What a view shows of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky (`0o7777`), without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds, nanoseconds.
    pub mtime: (i64, u32),
    /// Ascending by name, each once.
    pub xattrs: Vec<Xattr>,
}

/// What the raw inode was when it was sealed: by this a later change is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawFacts {
    /// Inode number.
    pub ino: u64,
    /// Change time: seconds, nanoseconds.
    pub ctime: (i64, u32),
    /// `st_size`.
    pub size: u64,
    /// Link count.
    pub links: u32,
    /// Extents, where they decide.
    pub signature: Option<Signature>,
}

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// What the view shows.
    pub meta: Meta,
    /// The raw inode at sealing time.
    pub raw: RawFacts,
    /// Kind and contents.
    pub node: Node,
}

/// The kinds of inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where they are.
        data: Data,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device, `st_rdev` as the kernel encodes it for `mknod`.
    CharDevice(u64),
    /// Block device.
    BlockDevice(u64),
}

/// Where a sealed file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// There are none.
    Empty,
    /// In the anchor.
    Anchor(AnchorKey),
}

impl Tree {
    /// The inode an entry names.
    ///
    /// # Panics
    /// With an id of another tree.
    #[must_use]
    pub fn inode(&self, id: EntryId) -> &Inode {
        &self.inodes[self.entries[id.0 as usize].inode.0 as usize]
    }

    /// The path of an entry below the root, without a leading slash; empty for the root itself.
    ///
    /// # Panics
    /// With an id of another tree.
    #[must_use]
    pub fn path(&self, id: EntryId) -> Vec<u8> {
        let (mut names, mut at) = (Vec::new(), id);
        while at.0 != 0 {
            let entry = &self.entries[at.0 as usize];
            names.push(&entry.name[..]);
            at = entry.parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// The anchors it needs, ascending, each once.
    #[must_use]
    pub fn anchors(&self) -> Vec<AnchorKey> {
        let mut keys: Vec<AnchorKey> = self
            .inodes
            .iter()
            .filter_map(|inode| match &inode.node {
                Node::File { data: Data::Anchor(key), .. } => Some(*key),
                _ => None,
            })
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> Inode {
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        Inode { meta, raw: RawFacts::default(), node: Node::Dir }
    }

    #[test]
    fn paths_are_below_the_root() {
        let entry = |parent, name: &[u8], inode| Entry {
            parent: EntryId(parent),
            name: name.into(),
            inode: InodeIndex(inode),
        };
        let file = Inode { node: Node::File { size: 1, data: Data::Anchor(AnchorKey([1; 32])) }, ..dir() };
        let tree = Tree {
            entries: vec![entry(0, b"", 0), entry(0, b"a", 1), entry(1, b"b", 2), entry(1, b"c", 2)],
            inodes: vec![dir(), dir(), file],
        };
        assert_eq!(tree.path(EntryId(0)), b"");
        assert_eq!(tree.path(EntryId(3)), b"a/c");
        assert_eq!(tree.anchors(), [AnchorKey([1; 32])]);
    }
}
