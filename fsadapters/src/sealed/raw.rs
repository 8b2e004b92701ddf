//! The raw root, also while a view is mounted over it.
//!
//! A mount hides what is below it only in its own place. So the mount that holds the raw root is cloned without the mounts on
//! top of it (`open_tree`), and the root is looked up in the clone.
//!
//! Invariant: what is opened is the directory that was sealed: same inode number, and on no overlay. No symbolic link and no
//! mount is followed on the way. What it deliberately does not do: rely on `st_dev`, which btrfs gives anew at each boot.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::assemble::SOURCE;
use crate::fsid;
use crate::mountinfo::{self, Mount};
use crate::store::rows::RootRow;

/// Why a raw root could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RawError {
    /// It is gone, or another directory has its path.
    #[error(
        "{path:?} is not the directory that was sealed (inode {found}, was {sealed}); put the root back, or unseal and seal it again"
    )]
    Replaced {
        /// The root.
        path: PathBuf,
        /// Inode number when sealed.
        sealed: u64,
        /// Now.
        found: u64,
    },
    /// No mount leads to it any more.
    #[error("{0:?} can't be reached below what is mounted over it; unmount its view first")]
    Hidden(PathBuf),
    /// A call failed.
    #[error("open the raw root {path:?}: {errno}{}", moved(*errno))]
    Open {
        /// The root.
        path: PathBuf,
        /// The answer.
        errno: Errno,
    },
}

fn moved(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT | Errno::NOTDIR => {
            "; put it back where it was, or unseal it by its name (with --export DIR where its view wrote something) and seal it where it is now"
        }
        _ => "",
    }
}

/// Opens the raw root of `row`, read-only as a descriptor (what is in it can be written through it, unless its mount is read-only).
/// The descriptor keeps its own clone of the mount: views and umounts at the path don't touch it.
///
/// # Errors
/// [`RawError`].
pub fn open_raw_root(row: &RootRow) -> Result<OwnedFd, RawError> {
    let mounts = mountinfo::read().unwrap_or_default();
    open_raw_root_among(row, &mounts)
}

/// [`open_raw_root`] with the mounts already read: for many roots at once.
///
/// # Errors
/// [`RawError`].
pub fn open_raw_root_among(row: &RootRow, mounts: &[Mount]) -> Result<OwnedFd, RawError> {
    open_first(row, &candidates(&row.path, mounts))
}

/// Opens the raw root through the mount that its path leads to and no other: that mount's flags are the root's.
///
/// # Errors
/// [`RawError`].
pub(super) fn open_named_root(row: &RootRow, mounts: &[Mount]) -> Result<OwnedFd, RawError> {
    let candidates = candidates(&row.path, mounts);
    open_first(row, &candidates[..candidates.len().min(1)])
}

fn open_first(row: &RootRow, candidates: &[(PathBuf, PathBuf)]) -> Result<OwnedFd, RawError> {
    let mut error = RawError::Hidden(row.path.clone());
    for (mount_point, below) in candidates {
        match open_below(mount_point, below, row) {
            Ok(fd) => return Ok(fd),
            Err(e @ RawError::Replaced { .. }) => error = e,
            Err(e) if matches!(error, RawError::Hidden(_)) => error = e,
            Err(_) => {}
        }
    }
    Err(error)
}

/// What is mounted over the place of the raw root and is no view: the mount that its path leads to, where that is not the one by
/// which the store is reached. Of use once the root could not be opened.
#[must_use]
pub fn in_the_way<'a>(row: &RootRow, store: &Path, mounts: &'a [Mount]) -> Option<&'a Mount> {
    let (over, own) = (holder(&row.path, mounts)?, holder(store, mounts)?);
    let covers = over.device != own.device || over.mount_point.starts_with(&own.mount_point);
    (over.id != own.id && covers).then_some(over)
}

fn is_view(mount: &Mount) -> bool {
    mount.kind == "overlay" && mount.source == SOURCE
}

/// The mount that leads to `path`, views aside.
fn holder<'a>(path: &Path, mounts: &'a [Mount]) -> Option<&'a Mount> {
    mounts
        .iter()
        .filter(|m| !is_view(m) && path.starts_with(&m.mount_point))
        // Of several at one place the last is on top.
        .enumerate()
        .max_by_key(|(index, m)| (m.mount_point.components().count(), *index))
        .map(|(_, mount)| mount)
}

/// Where to look: mount points and paths below them, the likeliest first.
fn candidates(path: &Path, mounts: &[Mount]) -> Vec<(PathBuf, PathBuf)> {
    let Some(holder) = holder(path, mounts) else { return Vec::new() };
    let below = |m: &Mount| path.strip_prefix(&m.mount_point).map(Path::to_path_buf).ok();
    let mut found: Vec<(PathBuf, PathBuf)> =
        below(holder).map(|b| (holder.mount_point.clone(), b)).into_iter().collect();
    // The root is a mount point itself: its own mount lies under the view. Another mount of that file system may lead there.
    let inside = holder.root.join(found.first().map_or(Path::new(""), |(_, b)| b));
    for other in mounts.iter().filter(|m| m.device == holder.device && m.id != holder.id && !is_view(m)) {
        if let Ok(below) = inside.strip_prefix(&other.root) {
            found.push((other.mount_point.clone(), below.to_path_buf()));
        }
    }
    found
}

fn open_below(mount_point: &Path, below: &Path, row: &RootRow) -> Result<OwnedFd, RawError> {
    let failed = |errno| RawError::Open { path: row.path.clone(), errno };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(rustix::fs::CWD, mount_point, flags).map_err(failed)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let root = rustix::fs::openat2(&clone, below, flags, Mode::empty(), resolve).map_err(failed)?;
    let found = rustix::fs::fstat(&root).map_err(failed)?.st_ino;
    if found != row.ino || fsid::is_overlay(root.as_fd()) != Some(false) {
        return Err(RawError::Replaced { path: row.path.clone(), sealed: row.ino, found });
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_comes_first_and_views_never() {
        let text = b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
            2 1 8:2 / /data rw - xfs /dev/b rw\n\
            3 2 0:50 / /data/roots/a rw - overlay pagefold rw\n\
            4 2 8:2 /roots /mnt rw - xfs /dev/b rw\n\
            5 1 8:3 / /dat rw - xfs /dev/c rw\n";
        let mounts = mountinfo::parse(text);
        let found = candidates(Path::new("/data/roots/a"), &mounts);
        let want = [("/data", "roots/a"), ("/mnt", "a")];
        assert_eq!(found, want.map(|(m, b)| (PathBuf::from(m), PathBuf::from(b))));
    }
}
