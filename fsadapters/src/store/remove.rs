//! Removal: a commit says that it is gone, then it is unlinked, then the commit is forgotten.
//!
//! Invariant: nothing that a row of the index names is unlinked. Immutable flags are cleared only from files that are about to go, and
//! never from borrowed ones (hard links to somebody's files). What it deliberately does not do: decide what is garbage ([`super::gc`]).

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, IFlags, Mode, OFlags};
use rustix::io::Errno;

use super::codec::encode;
use super::crash::step;
use super::error::StoreError;
use super::index::{ANCHORS, GENERATIONS, GRAVES, Generation, Grave, IMAGES, ROOTS, StoredImage, VIEWS};
use super::key::{ImageDigest, SealId};
use super::manifest::read_manifest;
use super::open::{Store, anchor_name, image_name, root_name};
use super::rows::{AnchorRow, RootRow};
use crate::sealed::tree::EntryId;
use crate::sealed::upper::is_pristine;

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// Directories held open while a tree is removed. What lies deeper is moved up first: a view may nest without limit.
const DEPTH_MAX: usize = 128;
/// The level that it is moved up to: within `upper/` or `work/` for all that is removed here, and so of one project (a rename across
/// project ids is refused).
const DEPTH_TO: usize = 5;

/// One generation of a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedGeneration {
    /// Of which root.
    pub id: SealId,
    /// Its number: re-seals count it up.
    pub generation: u64,
    /// Its image.
    pub layers: Vec<ImageDigest>,
    /// Whether a layer of its own lies over the image; then the image alone is another root's.
    pub has_diff: bool,
}

impl Store {
    /// Forgets a root and removes its uppers. Its image and anchors stay until [`Store::gc`].
    ///
    /// # Errors
    /// [`StoreError::UpperNotEmpty`]: a view wrote something that was not committed; [`StoreError::NoSuch`].
    pub fn remove_root(&self, id: SealId) -> Result<(), StoreError> {
        for generation in self.generations_of(id)? {
            self.refuse_writes(id, generation)?;
        }
        self.discard_root(id)
    }

    /// [`Self::remove_root`] together with what views wrote: **those writes are lost**.
    ///
    /// # Errors
    /// [`StoreError::NoSuch`]; the index can't be written.
    pub fn discard_root(&self, id: SealId) -> Result<(), StoreError> {
        let generations = self.generations_of(id)?;
        self.index.write(|txn| {
            if !txn.remove(ROOTS, id.0)? {
                return Err(StoreError::NoSuch { what: "root", name: id.to_string() });
            }
            txn.remove(VIEWS, id.0)?;
            for generation in &generations {
                txn.remove(GENERATIONS, (id.0, *generation))?;
            }
            txn.bury(&[Grave::Root { id, generation: None }])
        })?;
        step("store.grave.dug");
        self.empty_graves().map(|_| ())
    }

    /// Removes an earlier generation's upper.
    ///
    /// # Errors
    /// [`StoreError::UpperNotEmpty`]; [`StoreError::NoSuch`] for the current generation or none.
    pub fn remove_generation(&self, id: SealId, generation: u64) -> Result<(), StoreError> {
        self.refuse_writes(id, generation)?;
        self.index.write(|txn| {
            let current: Option<RootRow> = txn.get(ROOTS, id.0)?;
            let is_current = current.is_some_and(|root| root.generation == generation);
            if is_current || !txn.remove(GENERATIONS, (id.0, generation))? {
                let name = format!("{id} generation {generation}");
                return Err(StoreError::NoSuch { what: "earlier root", name });
            }
            txn.bury(&[Grave::Root { id, generation: Some(generation) }])
        })?;
        step("store.grave.dug");
        self.empty_graves().map(|_| ())
    }

    /// Generations of a root whose uppers are there, ascending.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn generations_of(&self, id: SealId) -> Result<Vec<u64>, StoreError> {
        let mut found = Vec::new();
        self.index.read(|read| {
            read.each(GENERATIONS, |(root, generation), _| {
                if root == id.0 {
                    found.push(generation);
                }
                Ok(())
            })
        })?;
        Ok(found)
    }

    /// All generations of all roots, each with the images that its upper belongs to.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn generations(&self) -> Result<Vec<SealedGeneration>, StoreError> {
        let mut found = Vec::new();
        self.index.read(|read| {
            read.each(GENERATIONS, |(id, generation), bytes| {
                let Generation { layers, diff, .. } = read.decoded(bytes)?;
                let has_diff = diff.is_some();
                found.push(SealedGeneration { id: SealId(id), generation, layers, has_diff });
                Ok(())
            })
        })?;
        Ok(found)
    }

    /// Whether views have written into that upper: entries, or the root directory's own metadata. When the manifest can't be read, and so
    /// can't say what that was, they may have.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn upper_has_writes(&self, id: SealId, generation: u64) -> Result<bool, StoreError> {
        let name = format!("{}/upper", root_name(id, generation));
        match is_empty_dir(&self.fd, &name) {
            Ok(true) => {}
            Ok(false) => return Ok(true),
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(StoreError::io("list", &self.dir.join(name), e)),
        }
        let dir = self.root_dir(id, generation);
        let Ok(tree) = read_manifest(&dir) else { return Ok(true) };
        if tree.entries.is_empty() {
            return Ok(true);
        }
        is_pristine(&dir, &tree.inode(EntryId(0)).meta)
            .map(|pristine| !pristine)
            .map_err(|e| StoreError::io("look at", &self.dir.join(name), e))
    }

    fn refuse_writes(&self, id: SealId, generation: u64) -> Result<(), StoreError> {
        if self.upper_has_writes(id, generation)? {
            let path = self.root_dir(id, generation).join("upper");
            return Err(StoreError::UpperNotEmpty { root: id, path });
        }
        Ok(())
    }

    /// Unlinks what commits have given up, then forgets it; how many things. What resists stays given up, is tried again at every open
    /// and by `gc`, and keeps nobody from using the store.
    pub(super) fn empty_graves(&self) -> Result<u64, StoreError> {
        let mut graves = self.index.read(|read| {
            let mut graves: Vec<Grave> = Vec::new();
            read.each(GRAVES, |bytes, ()| {
                graves.push(read.decoded(bytes)?);
                Ok(())
            })?;
            Ok(graves)
        })?;
        let mut named = Vec::with_capacity(graves.len());
        for grave in &graves {
            named.push(self.is_named(grave)?);
        }
        let mut named = named.into_iter();
        graves.retain(|grave| {
            if named.next().unwrap_or(true) {
                return true;
            }
            self.unlink(grave).inspect_err(|e| tracing::warn!("left for the next time: {e}")).is_ok()
        });
        if graves.is_empty() {
            return Ok(0);
        }
        step("store.grave.unlinked");
        // Forgotten only when gone for good.
        self.sync()?;
        self.index.write(|txn| {
            let mut table = txn.table(GRAVES)?;
            for grave in &graves {
                table.remove(&encode(grave)[..]).map_err(|e| txn.error(e))?;
            }
            Ok(())
        })?;
        Ok(graves.len() as u64)
    }

    /// A grave over something that the index names again.
    fn is_named(&self, grave: &Grave) -> Result<bool, StoreError> {
        self.index.read(|read| {
            Ok(match grave {
                Grave::Anchor { key, .. } => read.get::<_, AnchorRow>(ANCHORS, &key.0)?.is_some(),
                Grave::Image(digest) => read.get::<_, StoredImage>(IMAGES, &digest.0)?.is_some(),
                Grave::Root { id, generation: None } => read.get::<_, RootRow>(ROOTS, id.0)?.is_some(),
                Grave::Root { id, generation: Some(generation) } => {
                    read.get::<_, Generation>(GENERATIONS, (id.0, *generation))?.is_some()
                }
            })
        })
    }

    fn unlink(&self, grave: &Grave) -> Result<(), StoreError> {
        let gone = |name: &str, result: Result<(), Errno>| match result {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(StoreError::io("remove", &self.dir.join(name), e)),
        };
        match grave {
            Grave::Anchor { domain, key, borrowed } => {
                let name = anchor_name(*domain, key);
                let result = if *borrowed {
                    rustix::fs::unlinkat(&self.fd, &name, AtFlags::empty())
                } else {
                    unlink_immutable(&self.fd, &name)
                };
                gone(&name, result)
            }
            Grave::Image(digest) => {
                let name = image_name(digest);
                gone(&name, unlink_immutable(&self.fd, &name))
            }
            Grave::Root { id, generation: Some(generation) } => {
                remove_tree(self, &root_name(*id, *generation))
            }
            Grave::Root { id, generation: None } => remove_tree(self, &format!("roots/{id}")),
        }
    }
}

/// Unlinks a file of ours. The immutable flag goes first, and only from a regular file with one name.
pub(super) fn unlink_immutable(dir: &OwnedFd, name: &str) -> Result<(), Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::PERM) => {}
        other => return other,
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
        return Err(Errno::PERM);
    }
    clear_flags(&file)?;
    rustix::fs::unlinkat(dir, name, AtFlags::empty())
}

fn clear_flags(file: impl AsFd) -> Result<(), Errno> {
    let flags = rustix::fs::ioctl_getflags(&file)?;
    rustix::fs::ioctl_setflags(&file, flags.difference(IFlags::IMMUTABLE | IFlags::APPEND))
}

/// Whether a directory has no entries.
pub(super) fn is_empty_dir(dir: &OwnedFd, name: impl rustix::path::Arg) -> Result<bool, Errno> {
    let fd = rustix::fs::openat(dir, name, DIR_FLAGS, Mode::empty())?;
    for entry in Dir::new(fd)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes a directory of the store with all that is in it; nothing there is fine. Stays on its file system, follows no
/// links, crosses no mounts (a mount point is busy and stays, with an error).
pub(super) fn remove_tree(store: &Store, name: &str) -> Result<(), StoreError> {
    remove_tree_in(&store.fd, &store.dir, name)
}

pub(super) fn remove_tree_in(dir: &OwnedFd, shown: &Path, name: &str) -> Result<(), StoreError> {
    let io = |e: Errno| StoreError::io("remove", &shown.join(name), e);
    let top = match rustix::fs::openat(dir, name, DIR_FLAGS, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(io(e)),
    };
    // (directory, its own name in the one above): no recursion, whatever the depth.
    let mut open: Vec<(OwnedFd, std::ffi::CString)> = vec![(top, std::ffi::CString::default())];
    let mut moved: u64 = 0;
    while let Some((at, _)) = open.last() {
        match empty_once(at).map_err(io)? {
            Some((below, below_name)) if open.len() < DEPTH_MAX => open.push((below, below_name)),
            Some((_, below_name)) => {
                let up = format!(".pagefold-removed-{moved}");
                moved += 1;
                match rustix::fs::renameat(at, &below_name, &open[DEPTH_TO].0, &up) {
                    // A name of the tree's own: the next one then.
                    Ok(()) | Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                    Err(e) => return Err(io(e)),
                }
            }
            None => {
                let (_, done) = open.pop().unwrap_or_else(|| unreachable!("it was just looked at"));
                if let Some((above, _)) = open.last() {
                    rustix::fs::unlinkat(above, &done, AtFlags::REMOVEDIR).map_err(io)?;
                }
            }
        }
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(io)
}

/// Unlinks what is no directory in `at`; the first directory that has something in it, or `None` when `at` is empty.
fn empty_once(at: &OwnedFd) -> Result<Option<(OwnedFd, std::ffi::CString)>, Errno> {
    for entry in Dir::read_from(at)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match unlink_entry(at, name) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let below = rustix::fs::openat(at, name, DIR_FLAGS, Mode::empty())?;
                return Ok(Some((below, name.to_owned())));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

fn unlink_entry(at: &OwnedFd, name: &std::ffi::CStr) -> Result<(), Errno> {
    let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let how = if kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    match rustix::fs::unlinkat(at, name, how) {
        // Somebody made it (or this directory) immutable or append-only from within the view.
        Err(Errno::PERM) if matches!(kind, FileType::Directory | FileType::RegularFile) => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = rustix::fs::openat(at, name, flags, Mode::empty())?;
            if kind == FileType::Directory || stat.st_nlink == 1 {
                clear_flags(&file)?;
            }
            let _ = clear_flags(at);
            rustix::fs::unlinkat(at, name, how)
        }
        other => other,
    }
}
