//! From a name in a view to the name that its data was sealed under.
//!
//! A file or directory that was renamed or linked in a view carries its sealed name (`trusted.overlay.redirect`): absolute from the
//! root, or a name in the same directory. What lies in a renamed directory has no mark of its own, so the way is followed from the
//! root down. Invariant: nothing is opened but directories. What it deliberately does not do: look at the layers below the upper, or ask whether
//! the sealed root has what is found.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::sealed::inode::Held;
use crate::sealed::tree::Node;

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

/// Follows `below` (a path below the view's root, without links on the way). Whoever works in the view may put a link anywhere meanwhile:
/// each name is looked up in its open directory, and none is followed.
///
/// # Errors
/// With the path in the upper that could not be looked at.
pub(super) fn follow(upper: &Path, below: &Path) -> Result<Traced, (PathBuf, io::Error)> {
    let (mut at, mut traced) = (upper.to_owned(), Traced::top());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Below a directory that the upper has not, it has nothing.
    let mut dir = Some(rustix::fs::open(upper, flags, Mode::empty()).map_err(|e| (at.clone(), e.into()))?);
    let mut names = below.iter().peekable();
    while let Some(name) = names.next() {
        traced.sealed_at = traced.sealed_at.map(|sealed| sealed.join(name));
        at.push(name);
        let held = match &dir {
            Some(dir) => Held::open(dir.as_fd(), name.as_bytes()).map_err(|e| (at.clone(), e))?,
            None if traced.upper == Upper::Removed => continue,
            None => None,
        };
        let Some(held) = held else {
            (traced.upper, dir) = (Upper::Untouched, None);
            continue;
        };
        traced.step(&held).map_err(|e| (at.clone(), e))?;
        dir = match held.look.is_dir() {
            true => Some(held.open_file(OFlags::RDONLY | OFlags::DIRECTORY).map_err(|e| (at.clone(), e))?),
            false => None,
        };
        if dir.is_none() && names.peek().is_some() {
            // Below a whiteout or what is no directory nothing shows.
            traced.upper = Upper::Removed;
        }
    }
    Ok(traced)
}

impl Traced {
    fn top() -> Traced {
        Traced { upper: Upper::Untouched, sealed_at: Some(PathBuf::new()) }
    }

    /// To what the upper holds under the next name.
    fn step(&mut self, held: &Held) -> io::Result<()> {
        if held.special()? == Some(Node::CharDevice(0)) {
            self.upper = Upper::Removed;
            return Ok(());
        }
        let is_dir = held.look.is_dir();
        let has_layer_below =
            is_dir || held.look.is_file() && held.xattr(b"trusted.overlay.metacopy")?.is_some();
        if !has_layer_below {
            self.upper = Upper::Data;
            return Ok(());
        }
        let opaque = is_dir && held.xattr(b"trusted.overlay.opaque")?.is_some_and(|value| &*value == b"y");
        self.upper = if opaque { Upper::Data } else { Upper::MetadataOnly };
        self.sealed_at = match held.xattr(b"trusted.overlay.redirect")? {
            _ if opaque => None,
            Some(to) => redirected(self.sealed_at.take(), &to),
            None => self.sealed_at.take(),
        };
        Ok(())
    }
}

fn redirected(sealed: Option<PathBuf>, to: &[u8]) -> Option<PathBuf> {
    match to.strip_prefix(b"/") {
        Some(absolute) => Some(PathBuf::from(OsStr::from_bytes(absolute))),
        None => sealed.map(|path| path.with_file_name(OsStr::from_bytes(to))),
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
        std::os::unix::fs::symlink("d", dir.path().join("l")).expect("symlink");
        let cases = [
            ("x/y", Upper::Untouched),
            ("d", Upper::MetadataOnly),
            ("d/f", Upper::Data),
            ("d/g", Upper::Untouched),
            ("d/g/h", Upper::Untouched),
            ("d/f/g", Upper::Removed),
            ("l/f", Upper::Removed),
        ];
        for (path, upper) in cases {
            let traced = follow(dir.path(), Path::new(path)).expect("readable");
            assert_eq!(traced, Traced { upper, sealed_at: Some(path.into()) }, "{path}");
        }
    }
}
