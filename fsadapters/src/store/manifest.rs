//! A root as it was sealed, on disk: [`Tree`] to a small file and back.
//!
//! `roots/<id>/g<generation>/manifest`, all integers little-endian:
//!
//! ```text
//! "pagefold manifest" 0x00 | version u16 | BLAKE3 of the rest (32) | length of the body u64 | body, zstd
//! body: store id (16) | number of columns u8 | length of each column u64 ... | columns
//! ```
//!
//! Columns rather than records, numbers as differences: 64 clones have 64 manifests, and what is equal or ascending in neighbours
//! then costs next to nothing. An anchor is written as its number in the store (its key is made from it), not as 32 random
//! bytes.
//!
//! Invariant: [`decode`] ends with a [`Tree`] that keeps all invariants of `sealed::tree`, or with an error, for any bytes; what it
//! allocates is bounded by [`BODY_BYTES_MAX`]. What it deliberately does not keep: `RawFacts::signature`, 16 random bytes a
//! file that are true only until the next balance. Whether a raw file still has the sealed extents is asked of its anchor.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::key::{AnchorKey, StoreId};
use crate::sealed::tree::Tree;

mod column;
mod decode;
mod encode;

/// Name of the file within a root's directory.
pub const MANIFEST_FILE: &str = "manifest";

const MAGIC: &[u8; 18] = b"pagefold manifest\0";
const VERSION: u16 = 1;
const HASHED_FROM: usize = MAGIC.len() + 2 + 32;
const BODY_FROM: usize = HASHED_FROM + 8;

/// The longest body that is written or read, bytes: ten million entries.
pub const BODY_BYTES_MAX: u64 = 1 << 30;

/// zstd's default: a body of 1 MiB takes about 4 ms.
const LEVEL: i32 = 3;

/// Why a manifest could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The file could not be read or written.
    #[error("can't {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// Which file.
        path: PathBuf,
        /// The errno.
        source: std::io::Error,
    },
    /// Its bytes are not what was written: the root must be sealed again (its upper is not touched by that).
    #[error("damaged manifest {}: {why}; unmount its view, commit it with --force or seal the root again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: Damage,
    },
    /// The tree is too large for the format.
    #[error("a manifest of more than {BODY_BYTES_MAX} bytes is not written")]
    TooLarge,
}

/// What is wrong with the bytes of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Not a manifest.
    #[error("it is not a manifest")]
    Magic,
    /// Made by a newer pagefold.
    #[error("its version {0} is not known to this pagefold: use a newer one")]
    Version(u16),
    /// The checksum differs.
    #[error("its checksum is wrong")]
    Checksum,
    /// It ends too early, or a length in it is too large.
    #[error("it is cut short")]
    Short,
    /// What it says can't be a tree.
    #[error("it describes no tree ({0})")]
    Tree(&'static str),
}

/// The numbers that anchors have in their store.
pub struct Numbers<'a> {
    /// Which store.
    pub store: StoreId,
    /// The number of an anchor ([`super::AnchorRow::serial`]), where it is known.
    pub of: &'a dyn Fn(&AnchorKey) -> Option<u64>,
}

/// Writes `tree` as the manifest in directory `dir`, in whole or not at all; it is not synced. Returns its size in bytes.
///
/// `numbers` makes it small; without it each file's anchor costs 32 bytes.
///
/// # Errors
/// [`ManifestError`].
pub fn write_manifest(dir: &Path, tree: &Tree, numbers: Option<&Numbers<'_>>) -> Result<u64, ManifestError> {
    let bytes = encode(tree, numbers)?;
    let path = dir.join(MANIFEST_FILE);
    let new = dir.join("manifest.new");
    let io = |op, path: &Path| {
        let path = path.to_owned();
        move |source| ManifestError::Io { op, path, source }
    };
    let mut file = std::fs::File::create(&new).map_err(io("create", &new))?;
    file.write_all(&bytes).map_err(io("write", &new))?;
    std::fs::rename(&new, &path).map_err(io("rename to", &path))?;
    Ok(bytes.len() as u64)
}

/// Reads the manifest in directory `dir`.
///
/// # Errors
/// [`ManifestError::Io`], [`ManifestError::Damaged`].
pub fn read_manifest(dir: &Path) -> Result<Tree, ManifestError> {
    let path = dir.join(MANIFEST_FILE);
    let read = || -> std::io::Result<Vec<u8>> {
        let file = std::fs::File::open(&path)?;
        let mut bytes = Vec::new();
        file.take(BODY_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => decode(&bytes).map_err(|why| ManifestError::Damaged { path, why }),
        Err(source) => Err(ManifestError::Io { op: "read", path, source }),
    }
}

/// The bytes of a manifest.
///
/// # Errors
/// [`ManifestError::TooLarge`].
pub fn encode(tree: &Tree, numbers: Option<&Numbers<'_>>) -> Result<Vec<u8>, ManifestError> {
    let body = encode::body(tree, numbers);
    if body.len() as u64 > BODY_BYTES_MAX {
        return Err(ManifestError::TooLarge);
    }
    let packed = zstd::bulk::compress(&body, LEVEL).map_err(|source| ManifestError::Io {
        op: "compress",
        path: MANIFEST_FILE.into(),
        source,
    })?;
    let mut rest = (body.len() as u64).to_le_bytes().to_vec();
    rest.extend(packed);
    let mut bytes = Vec::with_capacity(HASHED_FROM + rest.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(blake3::hash(&rest).as_bytes());
    bytes.extend(rest);
    Ok(bytes)
}

/// The tree in the bytes of a manifest; harmless for any bytes.
///
/// # Errors
/// [`Damage`].
pub fn decode(bytes: &[u8]) -> Result<Tree, Damage> {
    if bytes.get(..MAGIC.len()) != Some(MAGIC) {
        return Err(Damage::Magic);
    }
    let version = bytes.get(MAGIC.len()..MAGIC.len() + 2).ok_or(Damage::Short)?;
    let version = u16::from_le_bytes([version[0], version[1]]);
    if version != VERSION {
        return Err(Damage::Version(version));
    }
    let hash = bytes.get(HASHED_FROM - 32..HASHED_FROM).ok_or(Damage::Short)?;
    let packed = bytes.get(BODY_FROM..).ok_or(Damage::Short)?;
    if blake3::hash(&bytes[HASHED_FROM..]).as_bytes() != hash {
        return Err(Damage::Checksum);
    }
    let length = bytes[HASHED_FROM..BODY_FROM].try_into().map_or(u64::MAX, u64::from_le_bytes);
    decode::tree(&unpack(packed, length)?)
}

/// The checksum keeps out accidents, not malice: no more than `length` bytes are unpacked, and no more than the most are
/// believed to come.
fn unpack(packed: &[u8], length: u64) -> Result<Vec<u8>, Damage> {
    if length > BODY_BYTES_MAX {
        return Err(Damage::Short);
    }
    let decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(|_| Damage::Short)?;
    let mut body = Vec::new();
    decoder.take(length + 1).read_to_end(&mut body).map_err(|_| Damage::Short)?;
    if body.len() as u64 == length { Ok(body) } else { Err(Damage::Short) }
}

#[cfg(test)]
mod tests;
