//! What a farm is made of, written down as it was made: the ground truth needs no extent map.
//!
//! Stored is the image's listing once and, for each root, only what differs from the image: a farm of 64 roots of
//! 10,000 files stays at a few MiB. Paths are bytes on Linux and text in JSON: see [`RawPath`].

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::content::Content;

/// Value of `schema`.
pub const SCHEMA: &str = "pagefold.farm/1";
/// File name of the manifest in a farm's directory.
pub const MANIFEST: &str = "farm.json";
/// Directory of the image, in a farm's directory.
pub const IMAGE_DIR: &str = "image";
/// Directory of the roots, in a farm's directory.
pub const ROOTS_DIR: &str = "roots";

/// A path that survives JSON: a backslash is written `\\`, a byte that is no UTF-8 `\xNN`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RawPath(pub PathBuf);

impl RawPath {
    fn escaped(&self) -> String {
        let mut text = String::new();
        for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
            text.push_str(&chunk.valid().replace('\\', "\\\\"));
            for byte in chunk.invalid() {
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
        text
    }

    fn unescape(text: &str) -> Option<RawPath> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&first, after)) = rest.split_first() {
            rest = after;
            if first != b'\\' {
                bytes.push(first);
                continue;
            }
            match *rest.first()? {
                b'\\' => {
                    bytes.push(b'\\');
                    rest = &rest[1..];
                }
                b'x' => {
                    let digits = std::str::from_utf8(rest.get(1..3)?).ok()?;
                    bytes.push(u8::from_str_radix(digits, 16).ok()?);
                    rest = &rest[3..];
                }
                _ => return None,
            }
        }
        Some(RawPath(PathBuf::from(OsString::from_vec(bytes))))
    }
}

impl Serialize for RawPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.escaped())
    }
}

impl<'de> Deserialize<'de> for RawPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        RawPath::unescape(&text).ok_or_else(|| de::Error::custom("bad escape in path"))
    }
}

/// File systems that farms can be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FarmFs {
    /// XFS with reflink.
    Xfs,
    /// btrfs.
    Btrfs,
}

/// How far the making got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Under way, or interrupted in a way that could not be cleaned up: good for `destroy` only.
    Creating,
    /// Done.
    Complete,
}

/// Bytes from (first) for (second) bytes.
pub type ByteRange = (u64, u64);

/// A regular file of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its names in the image: the first, then its hard links.
    pub names: Vec<RawPath>,
    /// Bytes.
    pub size: u64,
    /// What it holds in `data`.
    pub content: Content,
    /// Ranges that were written, ascending, each starting at a page; the rest are holes.
    pub data: Vec<ByteRange>,
    /// Ranges that were preallocated before `data` was written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preallocated: Vec<ByteRange>,
    /// BLAKE3 of the bytes of `data`, one range after the other.
    pub hash: String,
    /// Cloned from a file outside: its extents may be shared with anything, so only reading tells what is equal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cloned: bool,
}

/// A file of a root that the image doesn't have in this form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewFile {
    /// Its name, from the root.
    pub path: RawPath,
    /// Bytes, all written.
    pub size: u64,
    /// What it holds.
    pub content: Content,
    /// BLAKE3 of it.
    pub hash: String,
}

/// One thing that happened to one root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Drift {
    /// Bytes of an image file were overwritten or appended; the inode (and all its names) stayed.
    InPlace {
        /// Index into the image's files.
        file: u32,
        /// Bytes, after.
        size: u64,
        /// What was written, ascending, not overlapping.
        writes: Vec<ByteRange>,
        /// What it was: the bytes of `content` at these offsets.
        content: Content,
        /// BLAKE3 of the written bytes, one range after the other.
        hash: String,
    },
    /// A new inode took the place of an image file's first name; further names keep the old one.
    Replaced {
        /// Index into the image's files.
        file: u32,
        /// What is there now.
        new: NewFile,
    },
    /// A file that the image doesn't have.
    Added {
        /// It.
        new: NewFile,
    },
    /// An image file's first name was removed; further names keep the inode.
    Deleted {
        /// Index into the image's files.
        file: u32,
    },
}

/// The image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageManifest {
    /// What it was made from, in words.
    pub source: String,
    /// Its regular files.
    pub files: Vec<ImageFile>,
    /// Directories in it, without its own.
    pub directories: u64,
    /// Symbolic links, FIFOs, sockets and devices.
    pub others: u64,
}

/// One root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootManifest {
    /// Its directory below [`ROOTS_DIR`].
    pub name: String,
    /// What differs from the image.
    pub drift: Vec<Drift>,
}

/// A farm, as written to `farm.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// How far the making got.
    pub state: State,
    /// The seed of everything random in it.
    pub seed: u64,
    /// Percent of the image's files that drifted in each root.
    pub drift_percent: f64,
    /// File system it is on.
    pub fs: FarmFs,
    /// Whether that compresses what is written (btrfs, `compress=`).
    pub compressed: bool,
    /// Roots are btrfs snapshots, not reflink copies.
    pub snapshots: bool,
    /// Everything was on disk when it was done.
    pub synced: bool,
    /// The farm made a loopback file system of its own; the backing file stands beside the directory.
    pub own_filesystem: bool,
    /// The farm made its directory.
    pub made_directory: bool,
    /// The image.
    pub image: ImageManifest,
    /// The roots.
    pub roots: Vec<RootManifest>,
}

impl Manifest {
    /// Directory of root number `index` of the farm in `dir`.
    #[must_use]
    pub fn root_path(&self, dir: &Path, index: usize) -> PathBuf {
        dir.join(ROOTS_DIR).join(&self.roots[index].name)
    }
}

/// The name of root number `index`.
#[must_use]
pub fn root_name(index: u32) -> String {
    format!("root-{index:04}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_path_survives_json() {
        for bytes in
            [&b"plain/name"[..], b"back\\slash", b"\xff\xfe caf\xc3\xa9 \\x41", b"new\nline\"quote", b""]
        {
            let path = RawPath(PathBuf::from(OsString::from_vec(bytes.to_vec())));
            let json = serde_json::to_string(&path).expect("serializes");
            assert_eq!(serde_json::from_str::<RawPath>(&json).expect("parses"), path, "{json}");
        }
    }

    #[test]
    fn a_bad_escape_is_refused() {
        for bad in [r#""a\\x4""#, r#""a\\q""#, r#""a\\""#, r#""\\xzz""#, r#""\\xé""#] {
            assert!(serde_json::from_str::<RawPath>(bad).is_err(), "{bad}");
        }
    }
}
