//! The metadata image of a sealed root: EROFS, written by the `composefs` crate in its format V1.
//!
//! Regular files point at their anchors (`trusted.overlay.metacopy`, `trusted.overlay.redirect`), everything else is in the
//! image itself. A root's own `trusted.overlay.*` attributes are escaped by the writer, so a planted redirect is an attribute
//! and leads nowhere (design 6).
//!
//! Invariants: the bytes are a function of the tree alone. The writer is only called with what it can hold
//! (`super::refuse`), so it never panics. The root directory's own metadata is *not* in the image: the upper's root has it,
//! and clones whose root directories differ share one image. The digest names the bytes; the superblock's UUID is made from
//! it, so that overlayfs with `index=on` refuses an upper that belongs to another image (it compares UUIDs; null UUIDs it
//! takes as equal).
//!
//! What it deliberately does not do: I/O, except to verify an image before the kernel sees it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use composefs::erofs::format::FormatVersion;
use composefs::erofs::writer::{ValidatedFileSystem, mkfs_erofs_versioned};
use composefs::fsverity::Sha256HashValue;
use composefs::generic_tree::LeafId;
use composefs::tree::{Directory, FileSystem, Inode, LeafContent, RegularFile, Stat};

pub use super::refuse::{Refusal, Why, check};
use super::tree::{Data, Inode as TreeInode, Meta, Node, Tree};
use crate::store::key::{AnchorKey, ImageDigest};

/// Where the UUID is: `struct erofs_super_block` starts at 1024, `uuid` is at 48 in it.
const UUID_AT: usize = 1024 + 48;
const UUID_BYTES: usize = 16;

/// An image that is not on disk yet.
#[derive(Clone, Debug)]
pub struct BuiltImage {
    /// Names it.
    pub digest: ImageDigest,
    /// The file's bytes, UUID set.
    pub bytes: Vec<u8>,
    /// Names in it, the root counted.
    pub entries: u64,
    /// The anchors that it needs, ascending, each once.
    pub anchors: Vec<AnchorKey>,
}

/// Makes the image of `tree`.
///
/// # Errors
/// The first thing in the tree that an image or a view can't hold. [`check`] finds them all.
pub fn build(tree: &Tree) -> Result<BuiltImage, Refusal> {
    if let Some(refusal) = check(tree, 1).pop() {
        return Err(refusal);
    }
    // The writer recurses over directories, and so do clone and drop of its tree.
    let deep = super::refuse::depth(tree) > DEPTH_ON_ANY_STACK;
    let bytes = if deep { on_a_big_stack(|| write(tree)) } else { write(tree) };
    let mut bytes = bytes.map_err(|why| Refusal { path: Default::default(), why: Why::Malformed(why) })?;
    let digest = ImageDigest(*blake3::hash(&bytes).as_bytes());
    bytes[UUID_AT..UUID_AT + UUID_BYTES].copy_from_slice(&uuid_of(digest));
    Ok(BuiltImage { digest, bytes, entries: tree.entries.len() as u64, anchors: tree.anchors() })
}

/// The UUID of the file system in the image of this digest.
#[must_use]
pub fn uuid_of(digest: ImageDigest) -> [u8; UUID_BYTES] {
    let mut uuid = [0; UUID_BYTES];
    uuid.copy_from_slice(&digest.0[..UUID_BYTES]);
    uuid
}

/// Levels of directories that are written on the caller's stack.
const DEPTH_ON_ANY_STACK: usize = 64;
/// Enough for [`super::refuse::DEPTH_MAX`] levels without optimisation (a test tries).
const BIG_STACK_BYTES: usize = 64 << 20;

fn on_a_big_stack(write: impl FnOnce() -> Result<Vec<u8>, String> + Send) -> Result<Vec<u8>, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(BIG_STACK_BYTES).spawn_scoped(scope, write);
        let thread = thread.map_err(|e| format!("no thread for a deep tree: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the image writer failed".into()))
    })
}

fn write(tree: &Tree) -> Result<Vec<u8>, String> {
    let filesystem = ValidatedFileSystem::new(convert(tree)?).map_err(|e| e.to_string())?;
    let bytes = mkfs_erofs_versioned(&filesystem, FormatVersion::V1).into_vec();
    if bytes.len() < UUID_AT + UUID_BYTES {
        return Err("the image writer wrote no superblock".into());
    }
    Ok(bytes)
}

/// The writer's tree. Children come after their parents, so from the last entry to the first each directory is complete when
/// its turn comes.
fn convert(tree: &Tree) -> Result<FileSystem<Sha256HashValue>, String> {
    let mut filesystem = FileSystem::new(root_stat());
    let mut directories: Vec<Option<Box<Directory<Sha256HashValue>>>> = Vec::new();
    directories.resize_with(tree.entries.len(), || None);
    let mut leaves: Vec<Option<LeafId>> = vec![None; tree.inodes.len()];
    for (index, entry) in tree.entries.iter().enumerate().skip(1).rev() {
        let at = entry.inode.0 as usize;
        let inode = &tree.inodes[at];
        let child = if inode.node == Node::Dir {
            let mut directory =
                directories[index].take().unwrap_or_else(|| Box::new(Directory::new(root_stat())));
            directory.stat = stat(&inode.meta);
            Inode::Directory(directory)
        } else {
            let leaf =
                *leaves[at].get_or_insert_with(|| filesystem.push_leaf(stat(&inode.meta), content(inode)));
            Inode::leaf(leaf)
        };
        let name = OsStr::from_bytes(&entry.name);
        let fresh = match entry.parent.0 as usize {
            0 => filesystem.root.insert(name, child),
            parent => directories[parent]
                .get_or_insert_with(|| Box::new(Directory::new(root_stat())))
                .insert(name, child),
        };
        if !fresh {
            return Err(format!("the name {:?} is twice in one directory", name));
        }
    }
    Ok(filesystem)
}

/// The image's root directory; the upper's root shows the true one.
fn root_stat() -> Stat {
    Stat { st_mode: 0o755, ..Stat::uninitialized() }
}

fn stat(meta: &Meta) -> Stat {
    let xattrs: BTreeMap<Box<OsStr>, Box<[u8]>> =
        meta.xattrs.iter().map(|(name, value)| (OsStr::from_bytes(name).into(), value.clone())).collect();
    Stat {
        st_mode: meta.mode,
        st_uid: meta.uid,
        st_gid: meta.gid,
        st_mtim_sec: meta.mtime.0,
        st_mtim_nsec: meta.mtime.1,
        xattrs,
    }
}

fn content(inode: &TreeInode) -> LeafContent<Sha256HashValue> {
    match &inode.node {
        Node::File { data: Data::Anchor(key), size } => {
            LeafContent::Regular(RegularFile::ExternalNoVerity(object(*key), *size))
        }
        // `check` has refused directories with two names, so a directory does not come here.
        Node::File { data: Data::Empty, .. } | Node::Dir => {
            LeafContent::Regular(RegularFile::Inline(Box::default()))
        }
        Node::Symlink(target) => LeafContent::Symlink(OsStr::from_bytes(target).into()),
        Node::Fifo => LeafContent::Fifo,
        Node::Socket => LeafContent::Socket,
        Node::CharDevice(rdev) => LeafContent::CharacterDevice(*rdev),
        Node::BlockDevice(rdev) => LeafContent::BlockDevice(*rdev),
    }
}

/// The writer calls it an fs-verity hash; to overlayfs it is only the path `/xx/<62 hex digits>`.
fn object(key: AnchorKey) -> Sha256HashValue {
    Sha256HashValue::from(key.0)
}

/// Why an image must not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageDamage {
    /// It could not be read.
    #[error("the image can't be read: {0}; `pagefold verify` tells what else is damaged")]
    Read(#[from] std::io::Error),
    /// The bytes are not those of its name.
    #[error(
        "the image {wanted} is damaged (its bytes have the digest {found}); seal the root again to make a new one"
    )]
    Digest {
        /// Its name.
        wanted: ImageDigest,
        /// What the bytes say.
        found: ImageDigest,
    },
}

/// Largest image that is read: 4 GiB. [`check`] keeps trees far below.
const IMAGE_BYTES_MAX: u64 = 1 << 32;

/// Reads all of `file` and compares with `digest`; the UUID too. A damaged image never reaches the kernel.
///
/// # Errors
/// [`ImageDamage`].
pub fn verify(file: &File, digest: ImageDigest) -> Result<(), ImageDamage> {
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let mut uuid = [0; UUID_BYTES];
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < size.min(IMAGE_BYTES_MAX) {
        let want = buffer.len().min((size - at) as usize);
        // The first buffer holds the whole superblock: 1 MiB, or all of a smaller file.
        file.read_exact_at(&mut buffer[..want], at)?;
        if at == 0 && want >= UUID_AT + UUID_BYTES {
            uuid.copy_from_slice(&buffer[UUID_AT..UUID_AT + UUID_BYTES]);
            buffer[UUID_AT..UUID_AT + UUID_BYTES].fill(0);
        }
        hasher.update(&buffer[..want]);
        at += want as u64;
    }
    let found = ImageDigest(*hasher.finalize().as_bytes());
    if found != digest || uuid != uuid_of(digest) {
        return Err(ImageDamage::Digest { wanted: digest, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::tree::{Entry, EntryId, InodeIndex, RawFacts};

    fn meta() -> Meta {
        Meta { mode: 0o755, uid: 0, gid: 0, mtime: (1, 2), xattrs: Vec::new() }
    }

    fn inode(node: Node) -> TreeInode {
        TreeInode { meta: meta(), raw: RawFacts::default(), node }
    }

    fn entry(parent: u32, name: &[u8], inode: u32) -> Entry {
        Entry { parent: EntryId(parent), name: name.into(), inode: InodeIndex(inode) }
    }

    fn small() -> Tree {
        let file = Node::File { size: 5, data: Data::Anchor(AnchorKey([7; 32])) };
        Tree {
            entries: vec![entry(0, b"", 0), entry(0, b"ab", 1), entry(1, b"f", 2), entry(1, b"g", 2)],
            inodes: vec![inode(Node::Dir), inode(Node::Dir), inode(file)],
        }
    }

    fn deep(levels: u32) -> Tree {
        Tree {
            entries: (0..=levels)
                .map(|i| entry(i.saturating_sub(1), if i == 0 { b"" } else { b"d" }, i))
                .collect(),
            inodes: (0..=levels).map(|_| inode(Node::Dir)).collect(),
        }
    }

    #[test]
    fn the_root_s_own_metadata_is_not_in_the_image_and_the_rest_is() {
        let built = build(&small()).unwrap();
        let mut other = small();
        other.inodes[0].meta = Meta { mode: 0o700, uid: 7, mtime: (9, 9), ..meta() };
        assert_eq!(build(&other).unwrap().bytes, built.bytes);
        other.inodes[1].meta.mode = 0o700;
        assert_ne!(build(&other).unwrap().digest, built.digest);
        assert_eq!(built.anchors, [AnchorKey([7; 32])]);
        assert_eq!(built.entries, 4);
    }

    #[test]
    fn a_changed_byte_is_damage_wherever_it_is() {
        use std::io::Write;
        let built = build(&small()).unwrap();
        let on_disk = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            verify(&file, built.digest)
        };
        on_disk(&built.bytes).unwrap();
        for at in [0, 1023, 1024, UUID_AT, UUID_AT + 15, 1200, built.bytes.len() - 1] {
            let mut bytes = built.bytes.clone();
            bytes[at] ^= 1;
            assert!(matches!(on_disk(&bytes), Err(ImageDamage::Digest { .. })), "at {at}");
        }
        for cut in [0, 100, UUID_AT + 4, built.bytes.len() - 1] {
            assert!(on_disk(&built.bytes[..cut]).is_err(), "cut at {cut}");
        }
        on_disk(&[&built.bytes[..], b"x"].concat()).unwrap_err();
    }

    #[test]
    fn depth_has_a_limit_and_up_to_it_the_stack_holds() {
        build(&deep(super::super::refuse::DEPTH_MAX as u32)).unwrap();
        assert_eq!(build(&deep(1 + super::super::refuse::DEPTH_MAX as u32)).unwrap_err().why, Why::Depth);
        assert_eq!(build(&deep(1_000_000)).unwrap_err().why, Why::Depth);
    }
}
