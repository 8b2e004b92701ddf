//! The open store: creation, opening, and the questions everybody asks.
//!
//! Invariant: a `Store` exists only with the lock held, the directory trusted, the index believed and leftovers of crashes gone. What
//! it deliberately does not do: build ([`super::build`]), remove ([`super::remove`]), judge ([`super::verify`]).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::build::Reservation;
use super::crash::step;
use super::error::StoreError;
use super::index::{
    DOMAINS, GENERATIONS, Generation, IMAGES, Identity, Index, NEXT_DOMAIN, NEXT_SEAL, ROOTS, Snapshot,
    StoredImage, VIEWS,
};
use super::key::{AnchorKey, ImageDigest, SealId, StoreId};
use super::lock::{LOCK_PATIENCE, Lock};
use super::lookup::Lookup;
use super::rows::{DiffRow, DomainRow, ImageRow, RootRow, ViewRow};
use super::{place, recovery};

/// Whether a store is made where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Make it.
    Create,
    /// [`StoreError::Absent`].
    Existing,
}

/// An open store. One process at a time; within the process all methods may be called from several threads.
#[derive(Debug)]
pub struct Store {
    pub(super) dir: PathBuf,
    pub(super) fd: OwnedFd,
    identity: Identity,
    // Closed before the lock goes.
    pub(super) index: Index,
    /// Anchor numbers at hand.
    pub(super) reservation: Mutex<Reservation>,
    /// Held by who gives an image its name.
    pub(super) images: Mutex<()>,
    /// What was written may be lost ([`Store::sync`]).
    pub(super) sync_failed: Mutex<bool>,
    /// [`super::Build`]s under way.
    pub(super) builds: AtomicUsize,
    _lock: Lock,
}

const INDEX: &str = "index.redb";
const INDEX_NEW: &str = "index.redb.new";
const COMMITS: &str = "commits";
const SUBDIRS: [&str; 5] = ["anchors", "images", "roots", "mounts", "tmp"];
/// A domain's name is shown in tables and given on command lines.
const DOMAIN_NAME_BYTES_MAX: usize = 64;

impl Store {
    /// Where the store of roots at `path` is by default: `.pagefold` at the mount point of its file system.
    ///
    /// # Errors
    /// `path` is not there, or no mount of its file system is visible.
    pub fn default_dir(path: &Path) -> Result<PathBuf, StoreError> {
        place::default_dir(path)
    }

    /// Opens the store in `dir`, waiting up to [`LOCK_PATIENCE`] for another process to end. `who` is this command, as that other
    /// process's user shall read it.
    ///
    /// # Errors
    /// All of [`StoreError`]: each says what to do. Nothing is changed unless the store is believed.
    pub fn open(dir: &Path, mode: OpenMode, who: &str) -> Result<Store, StoreError> {
        Store::open_within(dir, mode, who, LOCK_PATIENCE)
    }

    /// [`Self::open`] with another patience.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_within(
        dir: &Path,
        mode: OpenMode,
        who: &str,
        patience: Duration,
    ) -> Result<Store, StoreError> {
        let dir = place::canonical(dir)?;
        let fd = match (place::open_dir(&dir)?, mode) {
            (Some(fd), _) => fd,
            (None, OpenMode::Existing) => return Err(StoreError::Absent(dir)),
            (None, OpenMode::Create) => {
                let fd = place::make_dir(&dir)?;
                step("store.create.dir");
                fd
            }
        };
        // Before the lock: a later format may lock otherwise, and a directory that is no store gets no file of ours.
        let unfinished = place::read_format(&dir, &fd)?.is_none();
        if unfinished {
            place::check_unfinished(&dir, &fd)?;
            // With an index all but that file is there: it goes on, whatever became of `FORMAT`.
            if mode == OpenMode::Existing && !place::exists(&fd, INDEX) {
                return Err(StoreError::Absent(dir));
            }
        }
        let lock = Lock::take(&fd, &dir, who, patience)?;
        // Another process may have finished it while we waited.
        let unfinished = unfinished && place::read_format(&dir, &fd)?.is_none();
        if unfinished {
            // An ACL's mask shows in the mode.
            place::shed_inheritance(&fd);
            rustix::fs::fchmod(&fd, Mode::RWXU).map_err(|e| StoreError::io("close", &dir, e))?;
            create_index(&dir, &fd)?;
        }
        let (index, identity) = open_index(&dir, &fd)?;
        for name in SUBDIRS {
            place::ensure_subdir(&dir, &fd, name)?;
        }
        if unfinished {
            place::write_format(&dir, &fd)?;
            step("store.create.format");
        }
        let store = Store {
            dir,
            fd,
            identity,
            index,
            reservation: Mutex::default(),
            images: Mutex::default(),
            sync_failed: Mutex::default(),
            builds: AtomicUsize::new(0),
            _lock: lock,
        };
        recovery::recover(&store)?;
        Ok(store)
    }

    /// Its directory, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.identity.id
    }

    /// Its directory, open.
    #[must_use]
    pub fn dirfd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Refuses a root that the store lies in, or that lies in the store. `root` without symbolic links.
    ///
    /// # Errors
    /// [`StoreError::Nested`].
    pub fn check_root_path(&self, root: &Path) -> Result<(), StoreError> {
        if root.starts_with(&self.dir) || self.dir.starts_with(root) {
            return Err(StoreError::Nested { store: self.dir.clone(), root: root.to_owned() });
        }
        Ok(())
    }

    /// The domain of that name, made when it is new.
    ///
    /// # Errors
    /// [`StoreError::BadName`], and as the index and the file system fail.
    pub fn ensure_domain(&self, name: &str) -> Result<DomainRow, StoreError> {
        let why = match name {
            "" => Some("it is empty"),
            n if n.len() > DOMAIN_NAME_BYTES_MAX => Some("it is longer than 64 bytes"),
            n if n.chars().any(char::is_control) => Some("it holds control characters"),
            _ => None,
        };
        if let Some(why) = why {
            return Err(StoreError::BadName { what: "domain", name: name.to_owned(), why });
        }
        if let Some(row) = self.domains()?.into_iter().find(|d| d.name == name) {
            return Ok(row);
        }
        self.index.write(|txn| {
            // Again: another thread may have made it.
            let rows: Vec<DomainRow> = txn.rows(DOMAINS)?;
            if let Some(row) = rows.into_iter().find(|d| d.name == name) {
                return Ok(row);
            }
            let id = txn.bump(NEXT_DOMAIN, 1)?;
            let id = u32::try_from(id).map_err(|_| StoreError::Damaged {
                path: self.dir.clone(),
                detail: "the counter of domains is at its end".to_owned(),
            })?;
            self.make_domain_dirs(id)?;
            step("store.domain.dirs");
            let row = DomainRow { id, name: name.to_owned() };
            txn.put(DOMAINS, id, &row)?;
            Ok(row)
        })
    }

    /// All domains, by number.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn domains(&self) -> Result<Vec<DomainRow>, StoreError> {
        self.index.read(|read| read.rows(DOMAINS))
    }

    /// All sealed roots, by number.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn roots(&self) -> Result<Vec<RootRow>, StoreError> {
        self.index.read(|read| read.rows(ROOTS))
    }

    /// A sealed root.
    ///
    /// # Errors
    /// [`StoreError::NoSuch`]; the index can't be read.
    pub fn root(&self, id: SealId) -> Result<RootRow, StoreError> {
        self.index
            .read(|read| read.get(ROOTS, id.0))?
            .ok_or_else(|| StoreError::NoSuch { what: "root", name: id.to_string() })
    }

    /// The sealed root of that path or short name. A path wins, with its symbolic links resolved if it is there.
    ///
    /// # Errors
    /// [`StoreError::NoSuch`]; the index can't be read.
    pub fn find_root(&self, path_or_name: impl AsRef<Path>) -> Result<RootRow, StoreError> {
        let given = path_or_name.as_ref();
        let roots = self.roots()?;
        let absolute = given.canonicalize().or_else(|_| std::path::absolute(given)).ok();
        let by_path = roots.iter().find(|r| Some(&r.path) == absolute.as_ref());
        let by_name = roots.iter().find(|r| Path::new(&r.name) == given);
        by_path
            .or(by_name)
            .cloned()
            .ok_or_else(|| StoreError::NoSuch { what: "root", name: format!("{given:?}") })
    }

    /// All views that are meant to be mounted, by root.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn views(&self) -> Result<Vec<ViewRow>, StoreError> {
        self.index.read(|read| read.rows(VIEWS))
    }

    /// The view of a root, if it is meant to be mounted.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn view(&self, root: SealId) -> Result<Option<ViewRow>, StoreError> {
        self.index.read(|read| read.get(VIEWS, root.0))
    }

    /// Remembers a view (one a root: an upper can be used once).
    ///
    /// # Errors
    /// [`StoreError::NoSuch`] root; the index can't be written.
    pub fn put_view(&self, row: &ViewRow) -> Result<(), StoreError> {
        self.put_views(std::slice::from_ref(row))
    }

    /// Remembers several views, in one commit or not at all.
    ///
    /// # Errors
    /// As [`Self::put_view`].
    pub fn put_views(&self, rows: &[ViewRow]) -> Result<(), StoreError> {
        if rows.is_empty() {
            return Ok(());
        }
        self.index.write(|txn| {
            for row in rows {
                if txn.get::<_, RootRow>(ROOTS, row.root.0)?.is_none() {
                    return Err(StoreError::NoSuch { what: "root", name: row.root.to_string() });
                }
                txn.put(VIEWS, row.root.0, row)?;
            }
            Ok(())
        })
    }

    /// Forgets a view; whether there was one.
    ///
    /// # Errors
    /// The index can't be written.
    pub fn remove_view(&self, root: SealId) -> Result<bool, StoreError> {
        if self.view(root)?.is_none() {
            return Ok(false);
        }
        self.index.write(|txn| txn.remove(VIEWS, root.0))
    }

    /// An image's row.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn image(&self, digest: &ImageDigest) -> Result<Option<ImageRow>, StoreError> {
        self.index.read(|read| {
            let stored: Option<StoredImage> = read.get(IMAGES, &digest.0)?;
            stored.map(|image| self.image_row(&image)).transpose()
        })
    }

    pub(super) fn image_row(&self, image: &StoredImage) -> Result<ImageRow, StoreError> {
        let keys = image.keys(self.id()).ok_or_else(|| StoreError::Damaged {
            path: self.dir.clone(),
            detail: "an image row with numbers beyond the last".to_owned(),
        })?;
        Ok(ImageRow {
            domain: image.domain,
            bytes: image.bytes,
            entries: image.entries,
            anchors: keys.into_keys().collect(),
        })
    }

    /// The layer that a generation has over its image, if any.
    ///
    /// # Errors
    /// The index can't be read, or does not know that generation.
    pub fn diff(&self, id: SealId, generation: u64) -> Result<Option<DiffRow>, StoreError> {
        let row: Option<Generation> = self.index.read(|read| read.get(GENERATIONS, (id.0, generation)))?;
        let name = || format!("{id} generation {generation}");
        let row = row.ok_or_else(|| StoreError::NoSuch { what: "root", name: name() })?;
        let Some(diff) = row.diff else { return Ok(None) };
        let keys = diff.keys(self.id()).ok_or_else(|| StoreError::Damaged {
            path: self.dir.clone(),
            detail: format!("the row of root {} has numbers beyond the last", name()),
        })?;
        let anchors = keys.into_keys().collect();
        Ok(Some(DiffRow { digest: diff.digest, entries: diff.entries, anchors }))
    }

    /// Where an image is.
    #[must_use]
    pub fn image_path(&self, digest: &ImageDigest) -> PathBuf {
        self.dir.join(image_name(digest))
    }

    /// An image, open read-only. **Its digest has not been checked**: do that before the kernel sees it.
    ///
    /// # Errors
    /// It is not there or no regular file.
    pub fn open_image(&self, digest: &ImageDigest) -> Result<File, StoreError> {
        self.open_file(&image_name(digest))
    }

    /// The data layer of a domain: the directory that its anchors lie below.
    ///
    /// # Errors
    /// There is no such domain.
    pub fn data_layer(&self, domain: u32) -> Result<OwnedFd, StoreError> {
        let name = domain_name(domain);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, &name, flags, Mode::empty())
            .map_err(|e| StoreError::io("open the data layer", &self.dir.join(&name), e))
    }

    /// Where an anchor is.
    #[must_use]
    pub fn anchor_path(&self, domain: u32, key: &AnchorKey) -> PathBuf {
        self.dir.join(anchor_name(domain, key))
    }

    /// An anchor, open read-only.
    ///
    /// # Errors
    /// It is not there or no regular file.
    pub fn open_anchor(&self, domain: u32, key: &AnchorKey) -> Result<File, StoreError> {
        self.open_file(&anchor_name(domain, key))
    }

    /// The same, in a layer that is open already ([`Self::data_layer`]): half the path to walk. Of what kind it is, is for the caller to see.
    ///
    /// # Errors
    /// As `openat(2)`.
    pub(crate) fn open_in_layer(layer: impl AsFd, key: &AnchorKey) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOATIME;
        Ok(rustix::fs::openat(layer, key.path(), flags, Mode::empty())?.into())
    }

    fn open_file(&self, name: &str) -> Result<File, StoreError> {
        let path = || self.dir.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOATIME;
        let file: File = rustix::fs::openat(&self.fd, name, flags, Mode::empty())
            .map_err(|e| StoreError::io("open", &path(), e))?
            .into();
        let kind = file.metadata().map_err(|e| StoreError::io("look at", &path(), e))?;
        if !kind.is_file() {
            return Err(StoreError::io("open", &path(), Errno::INVAL));
        }
        Ok(file)
    }

    /// The directory of one generation of a root: `upper/`, `work/`, `manifest`. Made by `Self::make_root_dir`.
    #[must_use]
    pub fn root_dir(&self, id: SealId, generation: u64) -> PathBuf {
        self.dir.join(root_name(id, generation))
    }

    /// A number for a root that is going to be sealed; never given twice.
    ///
    /// # Errors
    /// The index can't be written.
    pub fn new_seal_id(&self) -> Result<SealId, StoreError> {
        Ok(self.new_seal_ids(1)?[0])
    }

    /// Several at once: one commit.
    ///
    /// # Errors
    /// The index can't be written.
    pub fn new_seal_ids(&self, count: u64) -> Result<Vec<SealId>, StoreError> {
        let first = self.index.write(|txn| txn.bump(NEXT_SEAL, count))?;
        Ok((first + 1..=first + count).map(SealId).collect())
    }

    /// A snapshot of the anchors' hints, for many questions from many threads.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn lookup(&self) -> Result<Lookup, StoreError> {
        Lookup::of(self)
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, StoreError> {
        self.index.snapshot()
    }

    fn make_domain_dirs(&self, domain: u32) -> Result<(), StoreError> {
        let name = domain_name(domain);
        let dir = place::ensure_subdir(&self.dir, &self.fd, &name)?;
        for first in 0..=u8::MAX {
            match rustix::fs::mkdirat(&dir, format!("{first:02x}"), Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(StoreError::io("make a directory in", &self.dir.join(&name), e)),
            }
        }
        Ok(())
    }
}

/// Makes the index under another name, so that an index is there whole or not at all.
fn create_index(dir: &Path, fd: &OwnedFd) -> Result<(), StoreError> {
    if place::exists(fd, INDEX) {
        return Ok(());
    }
    let io = |e: Errno| StoreError::io("make the index of", dir, e);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(fd, INDEX_NEW, flags, Mode::RUSR | Mode::WUSR).map_err(io)?;
    let identity = place::identify(dir, fd)?;
    Index::create(file.into(), open_commits(dir, fd, true)?, dir, &identity)?;
    step("store.create.index");
    rustix::fs::renameat(fd, INDEX_NEW, fd, INDEX).map_err(io)?;
    rustix::fs::fsync(fd).map_err(io)
}

fn open_index(dir: &Path, fd: &OwnedFd) -> Result<(Index, Identity), StoreError> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(fd, INDEX, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::LOOP) => {
            return Err(StoreError::Damaged {
                path: dir.to_owned(),
                detail: "index.redb is gone".to_owned(),
            });
        }
        Err(e) => return Err(StoreError::io("open the index of", dir, e)),
    };
    Index::open(file, open_commits(dir, fd, false)?, dir, |identity| place::judge(dir, fd, identity))
}

fn open_commits(dir: &Path, fd: &OwnedFd, fresh: bool) -> Result<File, StoreError> {
    let mut flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    flags.set(OFlags::TRUNC, fresh);
    let file = rustix::fs::openat(fd, COMMITS, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| StoreError::io("open", &dir.join(COMMITS), e))?;
    Ok(file.into())
}

pub(super) fn domain_name(domain: u32) -> String {
    format!("anchors/{domain}")
}

pub(super) fn anchor_name(domain: u32, key: &AnchorKey) -> String {
    format!("anchors/{domain}/{}", key.path())
}

pub(super) fn image_name(digest: &ImageDigest) -> String {
    format!("images/{digest}.erofs")
}

pub(super) fn root_name(id: SealId, generation: u64) -> String {
    format!("roots/{id}/g{generation}")
}
