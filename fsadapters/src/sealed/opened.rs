//! A root of a store with its view opened for reading: what commit, export and unseal start from.
//!
//! Invariant: a view that is opened [`Opened::free`] is held: nobody can mount it until this is dropped. What it deliberately does
//! not do: open the raw root (only commit needs it).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::commit::{Anchors, Below, CommitError};
use super::mount::{detached_view, probe_upper, view_at};
use super::remains::mounts_of;
use super::tree::Tree;
use super::upper::{UPPER, WORK};
use super::view_error::ViewError;
use crate::mountinfo;
use crate::store::manifest::read_manifest;
use crate::store::{AnchorKey, RootRow, Store};

/// Name of commit's journal in a root's directory.
pub(super) const JOURNAL: &str = "commit";

/// A view and what it writes into, open.
pub(super) struct Opened {
    pub view: Below,
    pub upper: Below,
    pub index: Option<Below>,
    pub tree: Tree,
    /// Mounted somewhere, so that it may change.
    pub live: bool,
}

/// The anchors of one domain.
pub(super) struct DomainAnchors<'a> {
    pub store: &'a Store,
    pub domain: u32,
}

impl Anchors for DomainAnchors<'_> {
    fn open(&self, key: &AnchorKey) -> io::Result<OwnedFd> {
        self.store.open_anchor(self.domain, key).map(OwnedFd::from).map_err(io::Error::other)
    }
}

impl Opened {
    /// Opens a view that nobody has mounted.
    pub fn free(store: &Store, row: &RootRow) -> Result<Opened, CommitError> {
        let tree = tree_of(store, row)?;
        let view = detached_view(store, row).map_err(|e| match e {
            ViewError::Live { .. } => live_error(store, row),
            other => CommitError::Below(other.to_string()),
        })?;
        Opened::around(store, row, view, tree, false)
    }

    /// Opens a view that is mounted in this mount namespace, or that nobody has mounted.
    pub fn any(store: &Store, row: &RootRow) -> Result<Opened, CommitError> {
        let free = Opened::free(store, row);
        if !matches!(free, Err(CommitError::Live { .. })) {
            return free;
        }
        let mounts = mountinfo::read().unwrap_or_default();
        let Some(view) = store.view(row.id).map_err(below)? else { return free };
        let target = view.target;
        if view_at(&mounts, &target).is_none() {
            return free;
        }
        if !view.idmap.is_empty() {
            return Err(CommitError::Refused(format!(
                "the view of {:?} at {target:?} shows mapped owners, not those on disk: unmount it first",
                row.name
            )));
        }
        // A clone without what is mounted in the view, which is no part of it.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let clone =
            open_tree(rustix::fs::CWD, &target, flags).map_err(|e| call("open the view at", &target, e))?;
        Opened::around(store, row, clone, tree_of(store, row)?, true)
    }

    fn around(
        store: &Store,
        row: &RootRow,
        view: OwnedFd,
        tree: Tree,
        live: bool,
    ) -> Result<Opened, CommitError> {
        let root_dir = store.root_dir(row.id, row.generation);
        let index = root_dir.join(WORK).join("index");
        Ok(Opened {
            view: Below::new(view),
            upper: open_below(&root_dir.join(UPPER))?,
            index: if index.exists() { Some(open_below(&index)?) } else { None },
            tree,
            live,
        })
    }
}

/// The root as it was sealed.
pub(super) fn tree_of(store: &Store, row: &RootRow) -> Result<Tree, CommitError> {
    read_manifest(&store.root_dir(row.id, row.generation)).map_err(below)
}

/// Where the journal of a generation is.
pub(super) fn journal_of(store: &Store, row: &RootRow, generation: u64) -> PathBuf {
    store.root_dir(row.id, generation).join(JOURNAL)
}

/// Refuses a root whose view is mounted anywhere.
pub(super) fn refuse_live(store: &Store, row: &RootRow) -> Result<(), CommitError> {
    match probe_upper(store, row).map_err(below)? {
        super::live::UpperState::Free => Ok(()),
        super::live::UpperState::Live => Err(live_error(store, row)),
    }
}

fn live_error(store: &Store, row: &RootRow) -> CommitError {
    let upper = store.root_dir(row.id, row.generation).join(UPPER);
    let who = match mounts_of(&upper) {
        at if !at.is_empty() => at.join(", "),
        _ => "nowhere that can be seen: a process still has a file of it open".into(),
    };
    CommitError::Live { what: format!("the view of {:?}", row.name), who }
}

/// An error of something below.
pub(super) fn below(error: impl std::fmt::Display) -> CommitError {
    CommitError::Below(error.to_string())
}

pub(super) fn call(what: &'static str, path: &Path, error: impl Into<io::Error>) -> CommitError {
    CommitError::Io { what, path: path.to_owned(), source: error.into() }
}

/// Opens a directory.
pub(super) fn open_below(path: &Path) -> Result<Below, CommitError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| call("open", path, e))?;
    Ok(Below::new(File::from(dir).into()))
}
