//! What the index holds about each thing.
//!
//! Rows are written with `postcard` behind one byte of row version. Fields are only ever appended with a new row version
//! (the upgrade rule stands in `docs/src/operations.md`).

use std::os::fd::AsFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::key::{AnchorKey, ContentHash, ImageDigest, SealId, Signature};

/// A domain: roots that may share with each other, and a data layer of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRow {
    /// Number in this store; names the directory below `anchors/`.
    pub id: u32,
    /// As the user gave it.
    pub name: String,
}

/// An anchor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnchorRow {
    /// Its number; the key is made from it.
    pub serial: u64,
    /// [`DomainRow::id`].
    pub domain: u32,
    /// Bytes.
    pub size: u64,
    /// Hint: extents when it was made or last proved. `None`: extents could not decide (inline, compressed, ...).
    pub signature: Option<Signature>,
    /// BLAKE3 of its bytes where they were read.
    pub content: Option<ContentHash>,
    /// Not a clone of ours but an immutable file of somebody (`--borrow`), given by absolute path: then the entry in the data
    /// layer is a hard link to it.
    #[serde(with = "path_bytes::optional")]
    pub borrowed: Option<PathBuf>,
    /// What it was when it was made: set when it is published. `None`: borrowed (its times are its owner's).
    pub stamp: Option<AnchorStamp>,
}

/// By what a later change of an anchor is seen. Reading, cloning from it, balance, and another place for its blocks leave it as it
/// is; writing, `chattr`, `chmod` and links don't.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnchorStamp {
    /// Inode number.
    pub ino: u64,
    /// Change time: seconds, nanoseconds.
    pub ctime: (i64, u32),
}

impl AnchorStamp {
    /// Of an open file.
    ///
    /// # Errors
    /// As `fstat(2)`.
    pub fn of(file: impl AsFd) -> rustix::io::Result<AnchorStamp> {
        let stat = rustix::fs::fstat(file)?;
        Ok(AnchorStamp { ino: stat.st_ino, ctime: (stat.st_ctime, stat.st_ctime_nsec as u32) })
    }
}

/// A metadata image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// [`DomainRow::id`]: images are per domain, for they name anchors.
    pub domain: u32,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Entries in it.
    pub entries: u64,
    /// Anchors that it names, ascending, each once.
    pub anchors: Vec<AnchorKey>,
}

/// The layer of plain files in one generation's directory that lies over a shared image (`sealed::diff`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffRow {
    /// BLAKE3 of the list that says what the layer must hold.
    pub digest: ContentHash,
    /// Entries in it, its top directory and whiteouts counted.
    pub entries: u64,
    /// Anchors that it names, ascending, each once.
    pub anchors: Vec<AnchorKey>,
}

/// A sealed root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootRow {
    /// Its number.
    pub id: SealId,
    /// Absolute path of the raw root when it was sealed, without symbolic links.
    #[serde(with = "path_bytes")]
    pub path: PathBuf,
    /// Short name, unique in the store; by default the last component of `path`, with a number where that is taken.
    pub name: String,
    /// [`DomainRow::id`].
    pub domain: u32,
    /// `st_dev` of the raw root when sealed. Changes with a reboot on btrfs: told, not relied on.
    pub dev: u64,
    /// Inode number of the raw root.
    pub ino: u64,
    /// The image, always one. What differs from it lies over it in the generation's own directory ([`DiffRow`]).
    pub layers: Vec<ImageDigest>,
    /// Counts re-seals; each has a manifest and an upper of its own.
    pub generation: u64,
    /// When, in seconds since 1970.
    pub sealed_at: i64,
    /// Regular files (inodes).
    pub files: u64,
    /// All entries.
    pub entries: u64,
    /// Sum of sizes of the regular files' inodes, bytes.
    pub bytes: u64,
    /// Files whose data the view takes from anchors that some other root of the domain used already when this was sealed.
    pub hits: u64,
    /// Files that made a new anchor.
    pub made: u64,
    /// Files that were still being written when sealed (the last try took the state it found).
    pub unsettled: u64,
}

/// A view that is meant to be mounted: what a reboot brings back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewRow {
    /// Of which root.
    pub root: SealId,
    /// Where, absolute.
    #[serde(with = "path_bytes")]
    pub target: PathBuf,
    /// Mounted read-only.
    pub read_only: bool,
    /// Id mapping as given to `--idmap`, empty without.
    pub idmap: String,
    /// When it was mounted, seconds since 1970.
    pub mounted_at: i64,
}

/// Paths as bytes: serde's own way refuses those that are no UTF-8.
mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(OsString::from_vec(Vec::deserialize(from)?).into())
    }

    pub mod optional {
        use super::{
            Deserialize, Deserializer, OsStrExt, OsString, OsStringExt, PathBuf, Serialize, Serializer,
        };

        pub fn serialize<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
            path.as_ref().map(|p| p.as_os_str().as_bytes()).serialize(to)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
            Ok(Option::<Vec<u8>>::deserialize(from)?.map(|bytes| OsString::from_vec(bytes).into()))
        }
    }
}
