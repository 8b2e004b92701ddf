//! The end of a store: everything of it goes.
//!
//! Invariant: only an empty store goes (no root, hence no writes and no view); `FORMAT` first, so that a half-removed store is taken for one
//! that was never finished, which the next `unseal --all` or `seal` deals with; the lock last. What it deliberately does not do:
//! remove what pagefold did not make.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::crash::step;
use super::error::StoreError;
use super::lock::{LOCK_PATIENCE, Lock};
use super::open::Store;
use super::remove::{is_empty_dir, remove_tree_in};

/// Directories, then files; the lock comes after them.
const DIRS: [&str; 5] = ["mounts", "tmp", "roots", "images", "anchors"];
const FILES: [&str; 5] = ["index.redb", "index.redb.new", "commits", "FORMAT.new", "lock"];

impl Store {
    /// Removes the store with its directory (on btrfs: subvolume). Nothing may be mounted in it.
    ///
    /// # Errors
    /// [`StoreError::Inconsistent`] while it knows roots; as unlinking fails, `ENOTEMPTY` when there is something in it that pagefold did not
    /// make. Run again it goes on.
    pub fn destroy(self) -> Result<(), StoreError> {
        if let Some(root) = self.roots()?.first() {
            return Err(StoreError::Inconsistent(format!("the store still knows root {:?}", root.name)));
        }
        refuse_writes(&self.dir, &self.fd)?;
        let io = |name: &str, e: Errno| StoreError::io("remove", &self.dir.join(name), e);
        let unlink = |name: &str| match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(io(name, e)),
        };
        unlink("FORMAT")?;
        rustix::fs::fsync(&self.fd).map_err(|e| StoreError::io("sync", &self.dir, e))?;
        step("unseal.format.gone");
        for name in DIRS {
            remove_tree_in(&self.fd, &self.dir, name)?;
        }
        step("unseal.emptied");
        FILES.iter().try_for_each(|name| unlink(name))?;
        let dir = self.dir.clone();
        drop(self);
        remove_dir(&dir)
    }
}

/// Finishes the removal of a store that a crash interrupted: a directory with nothing but what pagefold makes, and no `FORMAT`.
///
/// # Errors
/// As unlinking fails; `ENOTEMPTY` when there is something else in it.
pub fn remove_unfinished(dir: &Path) -> Result<(), StoreError> {
    let Some(fd) = super::place::open_dir(dir)? else { return Ok(()) };
    if super::place::read_format(dir, &fd)?.is_some() {
        return Err(StoreError::Inconsistent(format!("{dir:?} is a whole store")));
    }
    super::place::check_unfinished(dir, &fd)?;
    let lock = Lock::take(&fd, dir, "remove", LOCK_PATIENCE)?;
    refuse_writes(dir, &fd)?;
    for name in DIRS {
        remove_tree_in(&fd, dir, name)?;
    }
    for name in FILES {
        match rustix::fs::unlinkat(&fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(StoreError::io("remove", &dir.join(name), e)),
        }
    }
    drop((lock, fd));
    remove_dir(dir)
}

/// Somebody may have deleted `FORMAT` by hand: then there are uppers, and what views wrote is worth more than a tidy end.
fn refuse_writes(dir: &Path, fd: &OwnedFd) -> Result<(), StoreError> {
    let list = |path: &Path| match std::fs::read_dir(path) {
        Ok(entries) => Ok(entries.flatten().map(|e| e.file_name()).collect::<Vec<_>>()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(StoreError::io("list", path, e)),
    };
    for root in list(&dir.join("roots"))? {
        for generation in list(&dir.join("roots").join(&root))? {
            let upper = Path::new("roots").join(&root).join(generation).join("upper");
            match is_empty_dir(fd, &upper) {
                Ok(true) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                Ok(false) => {
                    let why = format!("{upper:?} holds what a view wrote, and no root goes with it");
                    return Err(StoreError::NotAStore { path: dir.to_owned(), why });
                }
                Err(e) => return Err(StoreError::io("list", &dir.join(upper), e)),
            }
        }
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> Result<(), StoreError> {
    match rustix::fs::rmdir(dir) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(StoreError::io("remove", dir, e)),
    }
}
