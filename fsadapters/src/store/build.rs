//! Building: anchors, images and roots' directories come to be, and are published together.
//!
//! ```text
//! numbers reserved (a committed row) -> anchors created under their final names, cloned into, made immutable
//!   -> image and root directories written -> all synced (syncfs) -> ONE commit names them -> marks of the unpublished removed
//! ```
//!
//! Invariant: whatever stops this, what no commit names is found again without guessing: anchors by their reserved numbers, images by
//! not being in the index, root directories by the file `unpublished` in them. What it deliberately does not do: clone, or look at what
//! is cloned.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pagefold_sys::attr;
use rustix::fs::{AtFlags, IFlags, Mode, OFlags};
use rustix::io::Errno;

use super::crash::step;
use super::error::StoreError;
use super::index::{BUILDING, GENERATIONS, Generation, NEXT_SERIAL};
use super::key::{AnchorKey, ImageDigest, SealId};
use super::open::{Store, anchor_name, domain_name, image_name, root_name};
use super::remove::{remove_tree, unlink_immutable};
use super::rows::{AnchorRow, AnchorStamp, DiffRow, DomainRow, ImageRow, RootRow};
use super::{place, publish};

/// Anchor numbers reserved by one commit. A recovery looks for every one of them (about 2 µs each).
const RESERVE: u64 = 16 << 10;

/// In a root's directory until it is published.
pub(super) const UNPUBLISHED: &str = "unpublished";

/// Anchor numbers that may be used.
#[derive(Debug, Default)]
pub(super) struct Reservation {
    next: u64,
    end: u64,
    /// First numbers of the committed rows.
    pub rows: Vec<u64>,
}

/// What one seal makes. Many may be under way in one process; each may be used from several threads.
///
/// Dropped unpublished, it removes what it made.
#[derive(Debug)]
pub struct Build<'s> {
    pub(super) store: &'s Store,
    pub(super) domain: DomainRow,
    /// Finished and not published; what they are by their times, unless they are somebody's.
    pub(super) finished: Mutex<BTreeMap<AnchorKey, Option<AnchorStamp>>>,
    /// [`NewAnchor`]s alive.
    pub(super) open: AtomicUsize,
    pub(super) roots: Mutex<BTreeSet<(SealId, u64)>>,
    /// A commit was tried: from then on only the next open knows what is published.
    pub(super) tried: AtomicBool,
}

/// All that becomes visible in one commit.
#[derive(Debug, Default)]
pub struct Publication {
    /// New anchors. Also rows of anchors that are there already: then their hints are replaced (a hint found false is taken back by
    /// a row with what is true now, or `None`).
    pub anchors: Vec<(AnchorKey, AnchorRow)>,
    /// Images; those already published may be among them.
    pub images: Vec<(ImageDigest, ImageRow)>,
    /// Roots, new or with a new generation.
    pub roots: Vec<RootRow>,
    /// Layers over their images, for those of `roots` that have one. A generation that is there already keeps what it has.
    pub diffs: Vec<NewDiff>,
}

/// The layer that a generation has over its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDiff {
    /// Whose.
    pub root: SealId,
    /// Which generation's.
    pub generation: u64,
    /// What it is.
    pub row: DiffRow,
}

/// An anchor that nobody sees yet. Dropped, it is gone.
#[derive(Debug)]
pub struct NewAnchor<'b> {
    /// Empty, open for reading and writing.
    pub file: File,
    /// Its name.
    pub key: AnchorKey,
    /// Its number, for [`AnchorRow::serial`].
    pub serial: u64,
    build: &'b Build<'b>,
    done: bool,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded here is valid between any two statements: a panic elsewhere doesn't spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Makes all that was written to the store's file system so far durable. Publishing does it anyway and has the less to wait for then.
    ///
    /// # Errors
    /// Something could not be written. The kernel tells that once, whoever asks, and not whose it was: it may be what another build is about
    /// to publish. So nothing is published by this store any more; opened again, it drops what was not.
    pub fn sync(&self) -> Result<(), StoreError> {
        let io = |e: Errno| StoreError::io("sync the file system of", &self.dir, e);
        // Over the call: nobody is told "all is well" between the kernel's answer and its being noted.
        let mut failed = locked(&self.sync_failed);
        if *failed {
            return Err(io(Errno::IO));
        }
        let result = rustix::io::retry_on_intr(|| rustix::fs::syncfs(&self.fd));
        *failed = result.is_err();
        result.map_err(io)
    }

    /// Starts to build in a domain.
    #[must_use]
    pub fn build(&self, domain: &DomainRow) -> Build<'_> {
        self.builds.fetch_add(1, Ordering::SeqCst);
        Build {
            store: self,
            domain: domain.clone(),
            finished: Mutex::default(),
            open: AtomicUsize::new(0),
            roots: Mutex::default(),
            tried: AtomicBool::new(false),
        }
    }

    fn next_serial(&self) -> Result<u64, StoreError> {
        let mut reservation = locked(&self.reservation);
        if reservation.next == reservation.end {
            let first = self.index.write(|txn| {
                let first = txn.bump(NEXT_SERIAL, RESERVE)?;
                let mut table = txn.table(BUILDING)?;
                table.insert(first, first + RESERVE).map_err(|e| txn.error(e))?;
                Ok(first)
            })?;
            step("store.reserve");
            reservation.next = first;
            reservation.end = first + RESERVE;
            reservation.rows.push(first);
        }
        reservation.next += 1;
        Ok(reservation.next - 1)
    }
}

impl Build<'_> {
    /// The domain that is built in.
    #[must_use]
    pub fn domain(&self) -> &DomainRow {
        &self.domain
    }

    /// A new, empty anchor: clone into its file, then [`NewAnchor::finish`].
    ///
    /// # Errors
    /// No space, the index can't be written, ...
    pub fn create_anchor(&self) -> Result<NewAnchor<'_>, StoreError> {
        let (file, key, serial) = self.create(|name| {
            // The mode binds later opens, not this one.
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.store.fd, name, flags, Mode::RUSR)
        })?;
        self.open.fetch_add(1, Ordering::SeqCst);
        let anchor = NewAnchor { file: file.into(), key, serial, build: self, done: false };
        step("store.anchor.created");
        Ok(anchor)
    }

    /// An anchor that is somebody's file: a further hard link to it (`--borrow`). The caller answers for nobody writing to it.
    ///
    /// # Errors
    /// Another file system; an immutable file (it can't be linked).
    pub fn borrow_anchor(&self, file: impl AsFd) -> Result<(AnchorKey, u64), StoreError> {
        let ((), key, serial) =
            self.create(|name| rustix::fs::linkat(&file, c"", &self.store.fd, name, AtFlags::EMPTY_PATH))?;
        locked(&self.finished).insert(key, None);
        step("store.anchor.borrowed");
        Ok((key, serial))
    }

    fn create<T>(&self, make: impl Fn(&str) -> Result<T, Errno>) -> Result<(T, AnchorKey, u64), StoreError> {
        let mut dirs_made = false;
        loop {
            let serial = self.store.next_serial()?;
            let key = AnchorKey::of(self.store.id(), serial);
            let name = anchor_name(self.domain.id, &key);
            let mut result = make(&name);
            if result.as_ref().err() == Some(&Errno::NOENT) && !dirs_made {
                // A power failure may have taken the directories: they are not synced on their own.
                self.make_dir_of(&key)?;
                dirs_made = true;
                result = make(&name);
            }
            match result {
                Ok(made) => return Ok((made, key, serial)),
                // A file that no row names: not ours to judge here, and numbers are plenty.
                Err(Errno::EXIST | Errno::INTR) => {}
                Err(e) => return Err(StoreError::io("make the anchor", &self.store.dir.join(name), e)),
            }
        }
    }

    fn make_dir_of(&self, key: &AnchorKey) -> Result<(), StoreError> {
        let (dir, fd) = (&self.store.dir, &self.store.fd);
        let domain = domain_name(self.domain.id);
        place::ensure_subdir(dir, fd, &domain)?;
        place::ensure_subdir(dir, fd, &format!("{domain}/{}", &key.path()[..2]))?;
        Ok(())
    }

    /// Writes an image, unless it is there with the same bytes. Mode 0400 and immutable, where the file system can.
    ///
    /// # Errors
    /// No space, I/O error.
    pub fn write_image(&self, digest: &ImageDigest, bytes: &[u8]) -> Result<(), StoreError> {
        let store = self.store;
        let name = image_name(digest);
        let path = store.dir.join(&name);
        let is_whole = || {
            std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() == bytes.len() as u64)
                && std::fs::read(&path).is_ok_and(|there| there == bytes)
        };
        if is_whole() {
            return Ok(());
        }
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let temporary = format!("tmp/{digest}-{thread}");
        let file = write_file(store, &temporary, bytes)?;
        // Clones have one image, and each may be sealed by another thread: no name can be taken from what one has just made immutable.
        let _turn = locked(&store.images);
        if is_whole() {
            return rustix::fs::unlinkat(&store.fd, &temporary, AtFlags::empty())
                .map_err(|e| StoreError::io("remove", &store.dir.join(&temporary), e));
        }
        if place::exists(&store.fd, &name) {
            // Damaged: what replaces it must be whole at any time.
            rustix::fs::fsync(&file).map_err(|e| StoreError::io("sync", &path, e))?;
            unlink_immutable(&store.fd, &name).map_err(|e| StoreError::io("replace", &path, e))?;
        }
        rustix::fs::renameat(&store.fd, &temporary, &store.fd, &name)
            .map_err(|e| StoreError::io("name", &path, e))?;
        // Not where the file system can't: the digest is checked before every mount anyway.
        let _ = make_immutable(&file);
        step("store.image.written");
        Ok(())
    }

    /// Makes the directory of one generation of a root, empty, marked as unpublished until [`Self::publish`]. What an earlier
    /// attempt left there goes.
    ///
    /// # Errors
    /// This generation was published before; no space.
    pub fn make_root_dir(&self, id: SealId, generation: u64) -> Result<PathBuf, StoreError> {
        let store = self.store;
        let name = root_name(id, generation);
        let io = |what, e: Errno| StoreError::io(what, &store.dir.join(&name), e);
        drop(place::ensure_subdir(&store.dir, &store.fd, &format!("roots/{id}"))?);
        if place::exists(&store.fd, &name) {
            // The mark alone does not decide: a crash right after the commit leaves it behind.
            let row: Option<Generation> =
                store.index.read(|read| read.get(GENERATIONS, (id.0, generation)))?;
            if row.is_some() || !is_unpublished(store, &name) {
                return Err(StoreError::Inconsistent(format!("{name} is there already")));
            }
            remove_unpublished(store, id, generation)?;
        }
        locked(&self.roots).insert((id, generation));
        rustix::fs::mkdirat(&store.fd, &name, Mode::RWXU).map_err(|e| io("make the directory", e))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mark = format!("{name}/{UNPUBLISHED}");
        rustix::fs::openat(&store.fd, &mark, flags, Mode::RUSR).map_err(|e| io("mark the directory", e))?;
        step("store.root.dir");
        Ok(store.root_dir(id, generation))
    }

    /// Removes `name` with all that is in it from a directory that [`Self::make_root_dir`] made, and that is not published.
    ///
    /// # Errors
    /// As unlinking fails.
    pub fn remove_from_root_dir(&self, id: SealId, generation: u64, name: &str) -> Result<(), StoreError> {
        let dir = root_name(id, generation);
        if !locked(&self.roots).contains(&(id, generation)) {
            return Err(StoreError::Inconsistent(format!("{dir} is not being built")));
        }
        let name = format!("{dir}/{name}");
        match rustix::fs::unlinkat(&self.store.fd, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => remove_tree(self.store, &name),
            Err(e) => Err(StoreError::io("remove", &self.store.dir.join(name), e)),
        }
    }

    /// Syncs all that was built and names it in the index by one commit: afterwards it is there, whatever happens.
    ///
    /// # Errors
    /// Nothing was published, unless the commit itself failed: then the next open tells, and this store should be closed.
    pub fn publish(&self, publication: &Publication) -> Result<(), StoreError> {
        publish::publish(self, publication)
    }
}

/// A directory of a root that no commit has named: marked as such, or still without anything in it.
pub(super) fn is_unpublished(store: &Store, name: &str) -> bool {
    place::exists(&store.fd, &format!("{name}/{UNPUBLISHED}"))
        || place::is_dir(&store.fd, name) && super::remove::is_empty_dir(&store.fd, name).unwrap_or(false)
}

/// Removes a directory that [`is_unpublished`]. It goes aside first: the mark is not to go before what it marks, for then nobody could tell
/// what the rest is, and the root could never be sealed again. What is left aside goes at the next open.
pub(super) fn remove_unpublished(store: &Store, id: SealId, generation: u64) -> Result<(), StoreError> {
    let (name, aside) = (root_name(id, generation), format!("tmp/unpublished-{id}-{generation}"));
    remove_tree(store, &aside)?;
    match rustix::fs::renameat(&store.fd, &name, &store.fd, &aside) {
        Ok(()) => remove_tree(store, &aside),
        Err(Errno::NOENT) if !place::exists(&store.fd, &name) => Ok(()),
        Err(e) => Err(StoreError::io("move aside", &store.dir.join(name), e)),
    }
}

fn write_file(store: &Store, name: &str, bytes: &[u8]) -> Result<OwnedFd, StoreError> {
    let io = |e: Errno| StoreError::io("write", &store.dir.join(name), e);
    let _ = rustix::fs::unlinkat(&store.fd, name, AtFlags::empty());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&store.fd, name, flags, Mode::RUSR).map_err(io)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let wrote = rustix::io::retry_on_intr(|| rustix::io::write(&file, rest)).map_err(io)?;
        rest = &rest[wrote..];
    }
    Ok(file)
}

fn make_immutable(file: impl AsFd) -> Result<(), Errno> {
    // By the wider call where there is one: btrfs then changes this flag alone; for the older call it looks for the file's compression
    // property too, to take it away, and reserves room for that.
    let wide = attr::file_attributes(file.as_fd()).and_then(|mut attributes| {
        attributes.flags |= attr::XFLAG_IMMUTABLE;
        attr::set_file_attributes(file.as_fd(), attributes)
    });
    if wide.is_ok() {
        return Ok(());
    }
    let flags = rustix::fs::ioctl_getflags(&file)?;
    rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE)
}

/// What a security module or a default ACL put on a new file. Labels that can't go stay: overlayfs shows none of them.
fn drop_xattrs(file: &File) {
    let mut names = [0; 4096];
    let Ok(length) = rustix::fs::flistxattr(file, &mut names) else { return };
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let _ = rustix::fs::fremovexattr(file, name);
    }
}

impl NewAnchor<'_> {
    /// Closes it for ever: mode 0400, no extended attributes, immutable. Publish its key.
    ///
    /// # Errors
    /// [`StoreError::NoImmutable`]; the anchor is gone then.
    pub fn finish(mut self) -> Result<AnchorKey, StoreError> {
        drop_xattrs(&self.file);
        make_immutable(&self.file).map_err(|e| StoreError::NoImmutable {
            path: self.build.store.anchor_path(self.build.domain.id, &self.key),
            source: e.into(),
        })?;
        // Read after the last change of ours; one that can't be had costs `verify` a look.
        let stamp = AnchorStamp::of(&self.file).ok();
        locked(&self.build.finished).insert(self.key, stamp);
        self.done = true;
        step("store.anchor.finished");
        Ok(self.key)
    }

    /// Removes it.
    pub fn discard(self) {
        drop(self);
    }
}

impl Drop for NewAnchor<'_> {
    fn drop(&mut self) {
        if !self.done {
            let name = anchor_name(self.build.domain.id, &self.key);
            if let Err(e) = rustix::fs::unlinkat(&self.build.store.fd, &name, AtFlags::empty()) {
                tracing::warn!("an unfinished anchor stays until the next start: {name}: {e}");
            }
        }
        self.build.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Build<'_> {
    fn drop(&mut self) {
        // After a commit that may or may not have happened only the next open knows what is named.
        if !self.tried.load(Ordering::SeqCst) {
            for key in std::mem::take(&mut *locked(&self.finished)).into_keys() {
                let name = anchor_name(self.domain.id, &key);
                if let Err(e) = unlink_immutable(&self.store.fd, &name) {
                    tracing::warn!("an unpublished anchor stays until the next start: {name}: {e}");
                }
            }
            for (id, generation) in std::mem::take(&mut *locked(&self.roots)) {
                if let Err(e) = remove_unpublished(self.store, id, generation) {
                    tracing::warn!("an unpublished directory stays until the next start: {e}");
                }
                let _ = rustix::fs::unlinkat(&self.store.fd, format!("roots/{id}"), AtFlags::REMOVEDIR);
            }
        }
        self.store.builds.fetch_sub(1, Ordering::SeqCst);
    }
}
