//! A root before it is sealed: may it be, and what does the store know of it?
//!
//! Invariant: a root whose view is live, or whose upper holds changes, is not sealed again: the view would lose its lower or its
//! writes. What it deliberately does not do: look at what is in the root.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::SealConfig;
use crate::fsid::{self, FsFacts};
use crate::mountinfo::Mount;
use crate::sealed::commit::{self, Past};
use crate::sealed::diff;
use crate::sealed::heal::heal;
use crate::sealed::live::{self, UpperState};
use crate::sealed::tree::EntryId;
use crate::sealed::walk::{Previous, WalkError, WalkRoot};
use crate::sealed::{image, opened, raw, upper};
use crate::store::manifest::{ManifestError, read_manifest};
use crate::store::{DomainRow, RootRow, SealId, Store, StoreError};

/// Why a root is not sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RootError {
    #[error("can't {op}: {source}")]
    Io { op: &'static str, source: std::io::Error },
    #[error("it is no directory: a root is a directory, give the one it is in")]
    NotADirectory,
    #[error("the same directory is given twice: sealed once")]
    Twice,
    #[error(
        "this {kind} can't share blocks between files: nothing to make anchors with. Roots must lie on XFS (with reflink) or btrfs; elsewhere `seal --borrow DIR` uses the files of a directory that is never written"
    )]
    NoReflink { kind: String },
    #[error("a mounted view or another overlay: give the raw root below it")]
    Overlay,
    #[error(
        "it is on another file system than the store {store:?}: use one store for each file system (--store DIR)"
    )]
    OtherFs { store: PathBuf },
    #[error(
        "it is sealed in the domain {0:?}: give --domain {0:?}, or unseal it first to seal it in another"
    )]
    OtherDomain(String),
    #[error("its view is mounted or held by a process: unmount it first (`pagefold umount`)")]
    Live,
    #[error("its view has changes that the raw root has not: `pagefold commit` or `umount --discard` first")]
    Changes,
    #[error(
        "a commit of its view began and did not end, and what the view wrote was discarded: `pagefold commit` first, which puts the raw root right, or `unseal --discard` to keep it as it is"
    )]
    HalfCommitted,
    #[error(transparent)]
    Probe(#[from] live::ProbeError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Walk(#[from] WalkError),
    #[error(transparent)]
    Image(#[from] image::Refusal),
    #[error(transparent)]
    Upper(#[from] upper::UpperError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(
        "{path:?} has the attribute {name}, which a view shows from Linux 6.7 on: remove it, or use a newer kernel"
    )]
    OverlayXattr { path: PathBuf, name: String },
}

impl RootError {
    /// The host or the file system can't.
    pub fn is_unsupported(&self) -> bool {
        match self {
            RootError::NoReflink { .. } => true,
            RootError::Walk(WalkError::Clone { source, .. }) => {
                matches!(source, crate::reflink::ReflinkError::Unsupported)
            }
            RootError::Store(StoreError::NoImmutable { .. }) => true,
            _ => false,
        }
    }
}

/// An opened root.
#[derive(Debug)]
pub(crate) struct OpenRoot {
    /// In the configuration.
    pub index: usize,
    pub path: PathBuf,
    fd: Option<OwnedFd>,
    pub inode: (u64, u64),
    /// Its row when it was sealed before.
    pub row: Option<RootRow>,
    pub previous: Option<Previous>,
    /// Unchanged or not, it gets a new generation: what its view is made of is damaged and can't be made again as it was, or its upper was
    /// just committed, and goes with the old one.
    pub anew: bool,
    pub wanted_name: Option<String>,
    pub name: String,
    /// (device, inode) of the store.
    pub store_inode: Option<(u64, u64)>,
    /// When this sealing began, seconds since 1970.
    pub began_at: i64,
}

impl OpenRoot {
    /// When it was sealed last.
    pub fn sealed_at(&self) -> Option<i64> {
        self.row.as_ref().map(|row| row.sealed_at)
    }

    /// What a walk takes; given back by [`Self::take_back`].
    pub fn give(&mut self) -> (OwnedFd, Option<Previous>) {
        let fd = self.fd.take().expect("a root is walked once at a time");
        (fd, self.previous.take())
    }

    pub fn take_back(&mut self, back: WalkRoot) {
        self.fd = Some(back.fd);
        self.previous = back.previous;
    }

    /// The directory.
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_ref().expect("given back after the walk").as_fd()
    }

    /// The name it is known by: as wanted, as before, or its directory's with a number where that is taken.
    pub fn choose_name(&mut self, taken: &mut HashSet<String>) {
        if let Some(wanted) = &self.wanted_name {
            self.name.clone_from(wanted);
        } else if let Some(row) = &self.row {
            self.name.clone_from(&row.name);
        } else {
            let base = self.path.file_name().map_or_else(|| "root".into(), |n| n.to_string_lossy());
            let base: String = base.chars().map(|c| if c.is_control() { '_' } else { c }).collect();
            let mut name = base.clone();
            let mut number = 2;
            while taken.contains(&name) {
                name = format!("{base}-{number}");
                number += 1;
            }
            self.name = name;
        }
        taken.insert(self.name.clone());
    }
}

/// Why no root at `path` could be sealed on this file system; `None` when nothing speaks against it so far.
#[must_use]
pub fn unsupported(path: &Path) -> Option<String> {
    let dir = std::fs::File::open(path).ok()?;
    let facts = fsid::describe(dir.as_fd()).ok()?;
    let error = kind_error(&facts)?;
    error.is_unsupported().then(|| error.to_string())
}

fn kind_error(facts: &FsFacts) -> Option<RootError> {
    if facts.overlay.is_some() {
        return Some(RootError::Overlay);
    }
    (!facts.reflink).then(|| RootError::NoReflink { kind: facts.description.kind.clone() })
}

/// The directories of `--borrow`, resolved and checked.
pub(crate) fn to_borrow(store: &Store, config: &SealConfig) -> Result<Vec<PathBuf>, StoreError> {
    let refuse = |path: &Path, why: &str| {
        let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, why.to_owned());
        Err(StoreError::io("borrow from", path, error))
    };
    let described = fsid::describe(store.dirfd());
    let facts = described.map_err(|e| StoreError::io("describe", store.dir(), e.source))?;
    if kind_error(&facts).is_none() {
        return refuse(
            store.dir(),
            "--borrow is for file systems that can't share blocks, and this one can: leave it out",
        );
    }
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| StoreError::io("find", path, e));
    let here = rustix::fs::fstat(store.dirfd()).map_err(|e| StoreError::io("stat", store.dir(), e))?;
    let mut dirs = Vec::new();
    for dir in &config.borrow {
        let dir = real(dir)?;
        let stat = rustix::fs::stat(&dir).map_err(|e| StoreError::io("stat", &dir, e))?;
        if stat.st_dev != here.st_dev {
            return refuse(&dir, "it is on another file system than the store");
        }
        let store_dir = real(store.dir())?;
        let roots = config.roots.iter().filter_map(|root| std::fs::canonicalize(root).ok());
        for other in roots.chain([store_dir]) {
            if other.starts_with(&dir) || dir.starts_with(&other) {
                return refuse(&dir, "it overlaps a root or the store: give a directory that nobody writes");
            }
        }
        dirs.push(dir);
    }
    Ok(dirs)
}

/// What all roots are held against.
pub(crate) struct Known<'a> {
    store: &'a Store,
    domain: &'a DomainRow,
    rows: Vec<RootRow>,
    facts: FsFacts,
    store_inode: (u64, u64),
    mounts: Vec<Mount>,
    began_at: i64,
    /// Roots whose uppers were just committed in whole.
    committed: &'a [SealId],
    /// `--borrow`: no reflink is asked for.
    borrow: bool,
}

impl<'a> Known<'a> {
    pub fn of(store: &'a Store, domain: &'a DomainRow, config: &'a SealConfig) -> Result<Self, StoreError> {
        let facts = fsid::describe(store.dirfd())
            .map_err(|e| StoreError::io("describe the file system of", store.dir(), e.source))?;
        let stat = rustix::fs::fstat(store.dirfd()).map_err(|e| StoreError::io("stat", store.dir(), e))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(Known {
            store,
            domain,
            rows: store.roots()?,
            facts,
            store_inode: (stat.st_dev, stat.st_ino),
            mounts: crate::mountinfo::read().unwrap_or_default(),
            began_at: now.map_or(0, |d| d.as_secs().cast_signed()),
            committed: &config.committed,
            borrow: config.without_reflink(),
        })
    }

    /// Opens and checks the root at `path`; an error comes with the path as far as it was resolved.
    pub fn open(&self, index: usize, path: &Path) -> Result<OpenRoot, (PathBuf, RootError)> {
        let real = std::fs::canonicalize(path)
            .map_err(|source| (path.to_owned(), RootError::Io { op: "find the root", source }))?;
        self.open_real(index, &real).map_err(|error| (real, error))
    }

    fn open_real(&self, index: usize, path: &Path) -> Result<OpenRoot, RootError> {
        self.store.check_root_path(path)?;
        let row = self.rows.iter().find(|row| row.path == path).cloned();
        let fd = match row.as_ref().and_then(|row| raw::open_raw_root_among(row, &self.mounts).ok()) {
            // Below a view that is mounted in place.
            Some(fd) => fd,
            None => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
                    rustix::io::Errno::NOTDIR => RootError::NotADirectory,
                    e => RootError::Io { op: "open the root", source: e.into() },
                })?
            }
        };
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| RootError::Io { op: "stat the root", source: e.into() })?;
        self.check_fs(&fd)?;
        let mut anew = false;
        let previous = row.as_ref().map_or(Ok(None), |row| self.sealed_before(row, &mut anew))?;
        Ok(OpenRoot {
            index,
            path: path.to_owned(),
            fd: Some(fd),
            inode: (stat.st_dev, stat.st_ino),
            row,
            previous,
            anew,
            wanted_name: None,
            name: String::new(),
            store_inode: Some(self.store_inode),
            began_at: self.began_at,
        })
    }

    fn check_fs(&self, fd: &OwnedFd) -> Result<(), RootError> {
        let facts = fsid::describe(fd.as_fd())
            .map_err(|e| RootError::Io { op: "describe the file system of", source: e.source })?;
        if let Some(error) =
            kind_error(&facts).filter(|e| !(self.borrow && matches!(e, RootError::NoReflink { .. })))
        {
            return Err(error);
        }
        let of = |facts: &FsFacts| (facts.description.uuid, facts.description.instance);
        if of(&facts) != of(&self.facts) {
            return Err(RootError::OtherFs { store: self.store.dir().to_owned() });
        }
        Ok(())
    }

    /// The tree as it was sealed last, when it may be sealed again.
    fn sealed_before(&self, row: &RootRow, anew: &mut bool) -> Result<Option<Previous>, RootError> {
        if row.domain != self.domain.id {
            let domain = self.store.domains()?.into_iter().find(|domain| domain.id == row.domain);
            return Err(RootError::OtherDomain(domain.map_or_else(String::new, |domain| domain.name)));
        }
        // Whatever becomes of this seal: what views wrote needs the image that it was written over.
        for lost in heal(self.store, row, self.domain)? {
            tracing::warn!("image {lost} is damaged and can't be made again");
            *anew = true;
        }
        let dir = self.store.root_dir(row.id, row.generation);
        if live::probe(&dir, &self.store.dir().join("tmp"))? == UpperState::Live {
            return Err(RootError::Live);
        }
        if let Some(row) = self.store.diff(row.id, row.generation)?
            && let Err(left) = diff::heal(&dir, row.digest)
        {
            tracing::warn!("left as it is: {left}");
            *anew = true;
        }
        // Without it nobody can say whether the upper is as it was made.
        let tree = read_manifest(&dir)?;
        if self.committed.contains(&row.id) {
            // Else an upper that holds nothing new (a directory that was copied up and is as it was) would stay, and the root could
            // never be sealed or unsealed again.
            *anew = true;
            return Ok(Previous::new(tree));
        }
        let top = &tree.inode(EntryId(0)).meta;
        if upper::is_half_discarded(&dir) {
            upper::discard(&dir, top)?;
        }
        let pristine = upper::is_pristine(&dir, top);
        if !pristine.map_err(|source| RootError::Io { op: "look into the upper of the view of", source })? {
            return Err(RootError::Changes);
        }
        let past = commit::past(&opened::journal_of(self.store, row, row.generation));
        if past.map_err(|e| RootError::Io { op: "read", source: std::io::Error::other(e) })? == Past::Begun {
            return Err(RootError::HalfCommitted);
        }
        Ok(Previous::new(tree))
    }
}
