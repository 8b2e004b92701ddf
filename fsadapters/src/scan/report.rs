//! What a scan reports: the JSON of design section 10, field by field.
//!
//! All sizes are bytes, every inode counts once. `mergeable_*` is potential, `resident*` is measured; a scan saves
//! nothing and claims no saving (design section 11).

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pagefold_engine::savings::{Figures, RootFigures};
use pagefold_engine::units::PageSize;
use serde::{Serialize, Serializer};

/// Name and version of the JSON schema; the version rises when a field changes its meaning or goes.
pub const SCHEMA: &str = "pagefold.scan/1";

/// The report of one scan.
#[derive(Clone, Debug, Serialize)]
pub struct ScanReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Bytes in a page.
    pub page_size: u64,
    /// Whether data was read (`--content`).
    pub content: bool,
    /// Whether the scan was interrupted: the figures then cover only what was reached.
    pub partial: bool,
    /// Wall time in seconds.
    pub elapsed_s: f64,
    /// Names of the domains, in the order of their first root.
    pub domains: Vec<String>,
    /// Over all roots.
    pub totals: Sizes,
    /// One a root, in the order given.
    pub roots: Vec<RootReport>,
    /// Equal whole files with the most to merge.
    pub top_files: Vec<TopFile>,
    /// Page bytes that root i and root j both show, each distinct page once; the diagonal is what root i costs with
    /// each page kept once. Only when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matrix: Option<Vec<Vec<u64>>>,
    /// Left out on purpose.
    pub skipped: Vec<Skipped>,
    /// What could not be counted.
    pub errors: Vec<Failure>,
    /// For the table: directories with the most to merge. Not part of the JSON.
    #[serde(skip)]
    pub top_directories: Vec<TopDirectory>,
    /// For the table: files whose cache state this user may not read. Not part of the JSON.
    #[serde(skip)]
    pub resident_unknown_files: u64,
}

/// The figures of a root or of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Regular files, each inode once.
    pub files: u64,
    /// Further names of inodes already counted.
    pub hard_links: u64,
    /// Sum of sizes.
    pub logical_bytes: u64,
    /// Page cache if every file were read: whole pages, without Zero pages.
    pub cache_bytes: u64,
    /// Of `cache_bytes`, what goes when equal whole files keep one copy.
    pub mergeable_file_bytes: u64,
    /// Of `cache_bytes`, what goes when equal pages keep one copy.
    pub mergeable_page_bytes: u64,
    /// Pages that are holes or unwritten.
    pub zero_bytes: u64,
    /// Of `cache_bytes`, what extents could not decide and was not read.
    pub undecided_bytes: u64,
    /// In cache now.
    pub resident_bytes: u64,
    /// Of these, copies beyond the first of equal pages.
    pub resident_duplicate_bytes: u64,
}

impl Sizes {
    pub(crate) fn new(figures: &Figures, hard_links: u64, page: PageSize) -> Self {
        Sizes {
            files: figures.files,
            hard_links,
            logical_bytes: figures.logical_bytes,
            cache_bytes: figures.cache.bytes(page),
            mergeable_file_bytes: figures.mergeable_file.bytes(page),
            mergeable_page_bytes: figures.mergeable_page.bytes(page),
            zero_bytes: figures.zero.bytes(page),
            undecided_bytes: figures.undecided.bytes(page),
            resident_bytes: figures.resident.bytes(page),
            resident_duplicate_bytes: figures.resident_duplicate.bytes(page),
        }
    }
}

/// One root, as if scanned alone, and what it has in common with others of its domain.
#[derive(Clone, Debug, Serialize)]
pub struct RootReport {
    /// As given.
    #[serde(serialize_with = "as_text")]
    pub path: Box<Path>,
    /// Its domain's name.
    pub domain: String,
    /// Its own figures.
    #[serde(flatten)]
    pub sizes: Sizes,
    /// Distinct pages of it that another root of its domain shows too.
    pub shared_with_others_bytes: u64,
}

impl RootReport {
    pub(crate) fn new(
        path: &Path,
        domain: &str,
        root: &RootFigures,
        hard_links: u64,
        page: PageSize,
    ) -> RootReport {
        RootReport {
            path: path.into(),
            domain: domain.to_owned(),
            sizes: Sizes::new(&root.own, hard_links, page),
            shared_with_others_bytes: root.shared_with_others.bytes(page),
        }
    }
}

/// A group of equal whole files.
#[derive(Clone, Debug, Serialize)]
pub struct TopFile {
    /// The first by root, then by name.
    #[serde(serialize_with = "as_text")]
    pub path: Box<Path>,
    /// How many files.
    pub copies: u64,
    /// Page cache of one.
    pub cache_bytes_each: u64,
    /// Cached now beyond the first copy.
    pub resident_duplicate_bytes: u64,
}

/// A directory, by its path below the roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopDirectory {
    /// Below the root; the same directory of several roots is one entry.
    pub path: Box<Path>,
    /// Cache of the files right in it that are further copies of another file.
    pub mergeable_file_bytes: u64,
}

/// Something left out on purpose.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Where.
    #[serde(serialize_with = "as_text")]
    pub path: Box<Path>,
    /// Why.
    pub reason: String,
}

/// Something that could not be counted.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Where.
    #[serde(serialize_with = "as_text")]
    pub path: Box<Path>,
    /// What went wrong.
    pub error: String,
}

/// A path as text: bytes that are no UTF-8 as `\xNN`, everything else as it is.
#[must_use]
pub fn path_text(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

pub(crate) fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path_text(path))
}

pub(crate) fn as_text_if_any<S: Serializer>(
    path: &Option<PathBuf>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    path.as_deref().map(path_text).serialize(serializer)
}

pub(crate) fn as_texts<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path_text(path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn names_that_are_no_utf8_are_spelled_out() {
        let path = Path::new(OsStr::from_bytes(b"a\xff\\\xc3\xa4\xc3"));
        assert_eq!(path_text(path), "a\\xff\\\u{e4}\\xc3");
    }
}
