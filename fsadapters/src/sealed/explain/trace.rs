//! From a name in a view to the name that its data was sealed under.
//!
//! A file or directory that was renamed or linked in a view carries its sealed name (`trusted.overlay.redirect`): absolute from the
//! root, or a name in the same directory. What lies in a renamed directory has no mark of its own, so the way is followed from the
//! root down. Invariant: nothing is opened. What it deliberately does not do: look at the layers below the upper, or ask whether
//! the sealed root has what is found.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What the upper has at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upper {
    /// Nothing: what was sealed shows.
    Untouched,
    /// Attributes; a file's data is the anchor's still.
    MetadataOnly,
    /// All of it.
    Data,
    /// A whiteout.
    Removed,
}

/// Where a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Traced {
    /// What the upper has there.
    pub upper: Upper,
    /// The path below the root under which the data, or what a file of this name hides, was sealed; `None` where a directory of the view's own
    /// hides everything.
    pub sealed_at: Option<PathBuf>,
}

/// Follows `below` (a path below the view's root, without links on the way).
///
/// # Errors
/// With the path in the upper that could not be looked at.
pub(super) fn follow(upper: &Path, below: &Path) -> Result<Traced, (PathBuf, io::Error)> {
    let (mut at, mut state) = (upper.to_owned(), Upper::Untouched);
    // Below a directory that the upper has not, it has nothing.
    let (mut sealed, mut in_upper) = (Some(PathBuf::new()), true);
    for name in below.iter() {
        sealed = sealed.map(|sealed| sealed.join(name));
        at.push(name);
        if !in_upper {
            continue;
        }
        let failed = |e: rustix::io::Errno| (at.clone(), e.into());
        let meta = match std::fs::symlink_metadata(&at) {
            Ok(meta) => meta,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                // Below a whiteout nothing shows, below a directory that is in the upper what was sealed.
                in_upper = false;
                state = if state == Upper::Removed { state } else { Upper::Untouched };
                continue;
            }
            Err(e) => return Err((at, e)),
        };
        if meta.file_type().is_char_device() && meta.rdev() == 0 {
            (state, in_upper) = (Upper::Removed, false);
            continue;
        }
        let redirect = attribute(&at, "trusted.overlay.redirect").map_err(failed)?;
        let moved = |sealed: Option<PathBuf>| match &redirect {
            Some(to) => redirected(sealed, to),
            None => sealed,
        };
        if meta.is_dir() {
            let opaque = attribute(&at, "trusted.overlay.opaque").map_err(failed)?.is_some_and(|v| v == b"y");
            sealed = if opaque { None } else { moved(sealed) };
            state = if opaque { Upper::Data } else { Upper::MetadataOnly };
        } else if meta.is_file() && attribute(&at, "trusted.overlay.metacopy").map_err(failed)?.is_some() {
            sealed = moved(sealed);
            state = Upper::MetadataOnly;
        } else {
            state = Upper::Data;
        }
    }
    Ok(Traced { upper: state, sealed_at: sealed })
}

fn redirected(sealed: Option<PathBuf>, to: &[u8]) -> Option<PathBuf> {
    match to.strip_prefix(b"/") {
        Some(absolute) => Some(PathBuf::from(OsStr::from_bytes(absolute))),
        None => sealed.map(|path| path.with_file_name(OsStr::from_bytes(to))),
    }
}

fn attribute(path: &Path, name: &str) -> Result<Option<Vec<u8>>, rustix::io::Errno> {
    let mut value = vec![0u8; 64 << 10];
    match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_from_the_root_or_within_the_directory() {
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(redirected(at("a/b"), b"/x/y"), at("x/y"));
        assert_eq!(redirected(None, b"/x"), at("x"));
        assert_eq!(redirected(at("a/b"), b"c"), at("a/c"));
        assert_eq!(redirected(None, b"c"), None);
    }

    #[test]
    fn what_the_upper_has_not_is_as_sealed() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("d")).expect("mkdir");
        std::fs::write(dir.path().join("d/f"), b"12345").expect("write");
        let cases = [
            ("x/y", Upper::Untouched),
            ("d", Upper::MetadataOnly),
            ("d/f", Upper::Data),
            ("d/g", Upper::Untouched),
            ("d/g/h", Upper::Untouched),
        ];
        for (path, upper) in cases {
            let traced = follow(dir.path(), Path::new(path)).expect("readable");
            assert_eq!(traced, Traced { upper, sealed_at: Some(path.into()) }, "{path}");
        }
    }
}
