//! What a view wrote: a walk of its upper.
//!
//! Invariant: nothing is opened but directories, nothing is changed. What it deliberately does not do: judge a rename; a file
//! that was moved counts as removed from its old place, so sharing is never claimed for it.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::overlay::OriginHandle;
use crate::sealed::inode::{Below, is_absent, join, names};

/// The contents of an upper.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Files of the sealed root that have data of their own now: paths below the root, bytes.
    pub broken: Vec<(PathBuf, u64)>,
    /// What these were copied from: type number and encoding of the layer's file handle. They name a file whatever it is
    /// called now.
    pub origins: HashSet<(i32, Vec<u8>)>,
    /// Files whose metadata changed and whose data is still the anchor's.
    pub metadata_only: Vec<PathBuf>,
    /// Files that the sealed root did not have: number and bytes.
    pub added: u64,
    /// Their bytes.
    pub added_bytes: u64,
    /// Names that were removed (whiteouts).
    pub removed: Vec<PathBuf>,
    /// Directories that hide what the sealed root has in them, or show what it has elsewhere (renamed ones).
    pub opaque: Vec<PathBuf>,
    /// Names that show something else than what was sealed there, if anything was: new files, links, pipes, files that were renamed to it.
    pub replaced: Vec<PathBuf>,
    /// Directories, those on the way to what was written included, links, pipes and devices.
    pub others: u64,
}

/// What [`read`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// What the view wrote, as far as it could be read.
    pub written: Written,
    /// What could not be read. If there is any, more may be written than is known.
    pub unread: Vec<(PathBuf, io::Error)>,
}

/// Errors kept.
const UNREAD_MAX: usize = 8;

impl Written {
    /// Whether the view holds anything that the raw root lacks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Written::default()
    }
}

/// Walks `upper`. One that is not there holds nothing. Whoever writes in the view may move and replace anything meanwhile:
/// a name that goes, or is no directory any more, is none, and no symbolic link is followed.
#[must_use]
pub fn read(upper: &Path, cancel: &AtomicBool) -> Found {
    walk(upper, cancel, &mut |_| ())
}

/// `before` is called with each directory's path before it is opened.
fn walk(upper: &Path, cancel: &AtomicBool, before: &mut dyn FnMut(&[u8])) -> Found {
    let mut walk = Walk { upper, found: Found::default(), stack: Vec::new() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match rustix::fs::open(upper, flags, Mode::empty()) {
        Ok(top) => Below::new(top),
        Err(Errno::NOENT) => return walk.found,
        Err(e) => {
            walk.unread(b"", e.into());
            return walk.found;
        }
    };
    walk.stack.push(Vec::new());
    while let Some(below) = walk.stack.pop() {
        before(&below);
        let dir = match top.dir(&below) {
            Err(e) if is_absent(&e) => continue,
            Err(e) => {
                walk.unread(&below, e);
                continue;
            }
            Ok(dir) => dir,
        };
        let names = names(dir.as_fd()).unwrap_or_else(|e| {
            // Removed since it was opened.
            if !is_absent(&e) {
                walk.unread(&below, e);
            }
            Vec::new()
        });
        for name in names {
            if cancel.load(Ordering::Relaxed) {
                return walk.found;
            }
            if let Err(e) = walk.entry(&dir, &name, &below)
                && !is_absent(&e)
            {
                walk.unread(&join(&below, &name), e);
            }
        }
    }
    walk.found
}

struct Walk<'a> {
    upper: &'a Path,
    found: Found,
    /// Directories yet to be listed, below the upper.
    stack: Vec<Vec<u8>>,
}

impl Walk<'_> {
    fn unread(&mut self, below: &[u8], error: io::Error) {
        if self.found.unread.len() < UNREAD_MAX {
            self.found.unread.push((self.upper.join(OsStr::from_bytes(below)), error));
        }
    }

    fn entry(&mut self, dir: &OwnedFd, name: &[u8], below: &[u8]) -> io::Result<()> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let below = join(below, name);
        // Through the open directory: its own path may lead elsewhere by now.
        let at = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.found.written.others += 1;
            if xattr(&at, c"trusted.overlay.opaque")?.is_some() || is_renamed(&at)? {
                self.found.written.opaque.push(to_path(below.clone()));
            }
            self.stack.push(below);
            return Ok(());
        }
        self.found.written.take(&at, to_path(below), &stat)
    }
}

impl Written {
    fn take(&mut self, at: &[u8], below: PathBuf, stat: &Stat) -> io::Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            self.removed.push(below);
        } else if kind != FileType::RegularFile {
            // Links, pipes and devices have no pages.
            self.others += 1;
            self.replaced.push(below);
        } else if xattr(at, c"trusted.overlay.metacopy")?.is_some() {
            if is_renamed(at)? {
                self.replaced.push(below.clone());
            }
            self.metadata_only.push(below);
        } else if let Some(origin) = xattr(at, c"trusted.overlay.origin")? {
            self.broken.push((below, bytes));
            self.origins.extend(OriginHandle::parse_stored(&origin).map(OriginHandle::fid));
        } else {
            self.added += 1;
            self.added_bytes += bytes;
            self.replaced.push(below);
        }
        Ok(())
    }
}

fn to_path(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

/// Whether overlayfs goes elsewhere in the sealed layers for the rest of it.
fn is_renamed(at: &[u8]) -> io::Result<bool> {
    Ok(xattr(at, c"trusted.overlay.redirect")?.is_some())
}

/// The attribute's value, cut off if it is longer than any of overlayfs'.
fn xattr(at: &[u8], name: &std::ffi::CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = [0u8; 1024];
    match rustix::fs::lgetxattr(at, name, &mut value[..]) {
        Ok(length) => Ok(Some(value[..length].to_vec())),
        Err(Errno::RANGE) => Ok(Some(Vec::new())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Whether `path` (below the root) still shows what was sealed there.
#[must_use]
pub(super) fn hides(written: &HiddenPaths, path: &Path) -> bool {
    path.ancestors().any(|at| written.0.contains(at.as_os_str()))
}

/// Paths at and below which nothing of the sealed root is shared any more.
#[derive(Debug, Default)]
pub(super) struct HiddenPaths(HashSet<OsString>);

impl HiddenPaths {
    pub(super) fn of(written: &Written) -> HiddenPaths {
        let broken = written.broken.iter().map(|(path, _)| path.as_os_str());
        let rest = written.removed.iter().chain(&written.opaque).chain(&written.replaced);
        let rest = rest.map(|path| path.as_os_str());
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

    fn known(upper: &Path) -> Written {
        let found = read(upper, &AtomicBool::new(false));
        assert!(found.unread.is_empty(), "{:?}", found.unread);
        found.written
    }

    #[test]
    fn a_plain_tree_is_all_added() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("d")).expect("mkdir");
        std::fs::write(dir.path().join("d/f"), b"12345").expect("write");
        let written = known(dir.path());
        assert_eq!((written.added, written.added_bytes, written.broken.len()), (1, 5, 0));
        assert!(known(&dir.path().join("gone")).is_empty());
    }

    /// As a container may do while somebody looks: a directory becomes a file, a link out of the upper, nothing.
    #[test]
    fn names_that_change_while_we_look_are_no_errors_and_lead_nowhere() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (upper, outside) = (dir.path().join("upper"), dir.path().join("outside"));
        std::fs::create_dir_all(&outside).expect("mkdir");
        std::fs::write(outside.join("planted"), b"12345").expect("write");
        let changed = upper.join("a/b");
        let changes: [&dyn Fn() -> io::Result<()>; 3] =
            [&|| std::fs::write(&changed, b""), &|| std::os::unix::fs::symlink(&outside, &changed), &|| {
                Ok(())
            }];
        for change in changes {
            std::fs::create_dir_all(&changed).expect("mkdir");
            let found = walk(&upper, &AtomicBool::new(false), &mut |below| {
                if below == b"a/b" {
                    std::fs::remove_dir(&changed).expect("rmdir");
                    change().expect("changed");
                }
            });
            let nothing = Written { others: found.written.others, ..Written::default() };
            assert!(found.unread.is_empty() && found.written == nothing, "{found:?}");
            let _ = std::fs::remove_file(&changed);
        }
    }
}
