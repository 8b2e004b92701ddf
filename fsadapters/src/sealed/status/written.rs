//! What a view wrote: a walk of its upper.
//!
//! Invariant: nothing is opened but directories, nothing is changed. What it deliberately does not do: judge a rename; a file
//! that was moved counts as removed from its old place, so sharing is never claimed for it.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// The contents of an upper.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Files of the sealed root that have data of their own now: paths below the root, bytes.
    pub broken: Vec<(PathBuf, u64)>,
    /// Files whose metadata changed and whose data is still the anchor's.
    pub metadata_only: Vec<PathBuf>,
    /// Files that the sealed root did not have: number and bytes.
    pub added: u64,
    /// Their bytes.
    pub added_bytes: u64,
    /// Names that were removed (whiteouts).
    pub removed: Vec<PathBuf>,
    /// Directories that hide what the sealed root has in them.
    pub opaque: Vec<PathBuf>,
}

impl Written {
    /// Whether the view holds anything that the raw root lacks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Written::default()
    }
}

/// Walks `upper`. One that is not there holds nothing.
///
/// # Errors
/// With the path that could not be read; a name that goes while we look is none.
pub fn read(upper: &Path, cancel: &AtomicBool) -> Result<Written, (PathBuf, io::Error)> {
    let mut written = Written::default();
    let mut stack = vec![PathBuf::new()];
    while let Some(below) = stack.pop() {
        let dir = upper.join(&below);
        let list = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|e| (dir.clone(), e))?,
        };
        for entry in list {
            if cancel.load(Ordering::Relaxed) {
                return Ok(written);
            }
            let entry = entry.map_err(|e| (dir.clone(), e))?;
            let below = below.join(entry.file_name());
            match entry.metadata() {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => {
                    let meta = other.map_err(|e| (entry.path(), e))?;
                    if meta.is_dir() {
                        if has_xattr(&entry.path(), "trusted.overlay.opaque") {
                            written.opaque.push(below.clone());
                        }
                        stack.push(below);
                    } else {
                        written.take(&entry.path(), below, &meta);
                    }
                }
            }
        }
    }
    Ok(written)
}

impl Written {
    fn take(&mut self, path: &Path, below: PathBuf, meta: &std::fs::Metadata) {
        if meta.file_type().is_char_device() && meta.rdev() == 0 {
            self.removed.push(below);
        } else if !meta.is_file() {
            // Links, pipes and devices have no pages.
        } else if has_xattr(path, "trusted.overlay.metacopy") {
            self.metadata_only.push(below);
        } else if has_xattr(path, "trusted.overlay.origin") {
            self.broken.push((below, meta.len()));
        } else {
            self.added += 1;
            self.added_bytes += meta.len();
        }
    }
}

fn has_xattr(path: &Path, name: &str) -> bool {
    let mut value = [0u8; 1024];
    match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Ok(_) => true,
        Err(e) => e == rustix::io::Errno::RANGE,
    }
}

/// Whether `path` (below the root) still shows what was sealed there.
#[must_use]
pub(super) fn hides(written: &HiddenPaths, path: &Path) -> bool {
    path.ancestors().any(|at| written.0.contains(at.as_os_str()))
}

/// Paths at and below which nothing of the sealed root is shared any more.
#[derive(Debug, Default)]
pub(super) struct HiddenPaths(std::collections::HashSet<std::ffi::OsString>);

impl HiddenPaths {
    pub(super) fn of(written: &Written) -> HiddenPaths {
        let broken = written.broken.iter().map(|(path, _)| path.as_os_str());
        let rest = written.removed.iter().chain(&written.opaque).map(|path| path.as_os_str());
        HiddenPaths(broken.chain(rest).map(OsStr::to_owned).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_removed_name_is_hidden() {
        let written = Written {
            broken: vec![("a/b".into(), 1)],
            removed: vec!["c".into()],
            opaque: vec!["d/e".into()],
            ..Written::default()
        };
        let hidden = HiddenPaths::of(&written);
        for (path, want) in [("a/b", true), ("a/bb", false), ("c/x/y", true), ("d/e/f", true), ("d", false)] {
            assert_eq!(hides(&hidden, Path::new(path)), want, "{path}");
        }
    }

    #[test]
    fn a_plain_tree_is_all_added() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("d")).expect("mkdir");
        std::fs::write(dir.path().join("d/f"), b"12345").expect("write");
        let never = AtomicBool::new(false);
        let written = read(dir.path(), &never).expect("walk");
        assert_eq!((written.added, written.added_bytes, written.broken.len()), (1, 5, 0));
        assert!(read(&dir.path().join("gone"), &never).expect("walk").is_empty());
    }
}
