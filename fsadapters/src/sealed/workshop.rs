//! Where an export is built: a private directory beside the target, marked and locked while it is used.
//!
//! Invariant: what is emptied or removed carries our mark, or is empty, and nobody holds its lock; the lock ends with its process,
//! however that ends. So what a killed export left goes with the next one to the same place, and one that is under way never does. What it
//! deliberately does not do: look for what was left elsewhere.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::commit::CommitError;
use super::inode::names;
use super::opened::call;

/// Extended attribute that says whose it is.
const MARK: &str = "trusted.pagefold.export";
/// What is built has this name in it.
const TREE: &str = "tree";
/// Another process may be removing it just now, so often.
const TRIES: usize = 8;

/// A directory of our own; gone with what is in it when dropped.
#[derive(Debug)]
pub(super) struct Workshop {
    path: PathBuf,
    /// Holds the lock.
    dir: OwnedFd,
}

impl Workshop {
    /// Makes the workshop for `name` in `parent`, or takes over what a process that is no more left there.
    ///
    /// # Errors
    /// [`CommitError::Refused`]: somebody works in it, or it is none of ours.
    pub fn claim(parent: &Path, name: &OsStr) -> Result<Workshop, CommitError> {
        let mut own = OsString::from(".pagefold-export-");
        own.push(name);
        let path = parent.join(own);
        for _ in 0..TRIES {
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(call("make", &path, e)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let dir = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(dir) => dir,
                Err(Errno::NOENT) => continue,
                Err(Errno::NOTDIR | Errno::LOOP) => return Err(foreign(&path)),
                Err(e) => return Err(call("open", &path, e)),
            };
            match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(CommitError::Refused(format!(
                        "another export is making {path:?}: wait for it, or choose another target"
                    )));
                }
                Err(e) => return Err(call("lock", &path, e)),
            }
            // Its last owner may have removed it before we had the lock.
            if is_at(&path, dir.as_fd()) {
                take_over(&path, dir.as_fd())?;
                return Ok(Workshop { path, dir });
            }
        }
        Err(CommitError::Refused(format!("{path:?} comes and goes: try again")))
    }

    /// The directory, open.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The name in [`Self::dir`] of what is to be built.
    pub const fn tree_name() -> &'static str {
        TREE
    }

    /// Where that is.
    pub fn tree(&self) -> PathBuf {
        self.path.join(TREE)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // What can't be removed is locked no more when we are gone: the next export to this place tries again.
        if is_at(&self.path, self.dir.as_fd())
            && let Err(e) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!("{:?} is left and can be removed: {e}", self.path);
        }
    }
}

fn is_at(path: &Path, dir: BorrowedFd<'_>) -> bool {
    let there = rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW);
    let (Ok(there), Ok(ours)) = (there, rustix::fs::fstat(dir)) else { return false };
    (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
}

/// Empties a marked directory; one without a mark and with something in it is somebody's.
fn take_over(path: &Path, dir: BorrowedFd<'_>) -> Result<(), CommitError> {
    let owner = rustix::fs::fstat(dir).map_err(|e| call("look at", path, e))?.st_uid;
    let left = names(dir).map_err(|e| call("list", path, e))?;
    let marked = rustix::fs::fgetxattr(dir, MARK, &mut [0; 64][..]).is_ok();
    if owner != rustix::process::geteuid().as_raw() || !left.is_empty() && !marked {
        return Err(foreign(path));
    }
    for name in left {
        use std::os::unix::ffi::OsStrExt;
        let below = path.join(OsStr::from_bytes(&name));
        let removed = match below.symlink_metadata() {
            Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(&below),
            Ok(_) => std::fs::remove_file(&below),
            Err(e) => Err(e),
        };
        removed.map_err(|e| call("remove what an export that did not end left at", &below, e))?;
        tracing::info!("removed {below:?}, left by an export that did not end");
    }
    rustix::fs::fsetxattr(dir, MARK, b"1", XattrFlags::empty()).map_err(|e| call("mark", path, e))
}

fn foreign(path: &Path) -> CommitError {
    CommitError::Refused(format!("{path:?} is in the way and no export made it: move it away"))
}
