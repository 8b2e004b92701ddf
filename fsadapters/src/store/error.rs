//! What can go wrong with a store. Every variant says what to do next.
//!
//! Paths are printed quoted and escaped: a name must not write to the terminal.

use std::io;
use std::path::{Path, PathBuf};

use super::key::SealId;

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A system call failed.
    #[error("can't {what} {path:?}: {source}{}", hint(source))]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// There is none.
    #[error("there is no store at {0:?}: `pagefold seal` makes one; `--store DIR` names another place")]
    Absent(PathBuf),
    /// Another process works with it.
    #[error(
        "the store {path:?} is in use by {holder} (waited {waited_s} s): wait until that ends, or end it"
    )]
    Busy {
        /// The store.
        path: PathBuf,
        /// Process id and command.
        holder: String,
        /// How long we waited.
        waited_s: u64,
    },
    /// Somebody else could reach into it, or it is not what it seems.
    #[error("the store {path:?} can't be trusted: {why}. {remedy}")]
    Untrusted {
        /// The store.
        path: PathBuf,
        /// What is wrong.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Store within root or root within store.
    #[error(
        "the store {store:?} and the root {root:?} lie within each other: choose a store outside of all roots (--store DIR)"
    )]
    Nested {
        /// The store.
        store: PathBuf,
        /// The root.
        root: PathBuf,
    },
    /// Something that is no store is in its place.
    #[error(
        "{path:?} is not a pagefold store: {why}. Nothing was changed; name another directory (--store DIR)"
    )]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// Written by a later version.
    #[error(
        "the store {path:?} has format {found}, this pagefold knows up to {known}: use the pagefold that wrote it, or a newer one \
             (stores are upgraded, never downgraded). Nothing was changed"
    )]
    Newer {
        /// The store.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest we know.
        known: u32,
    },
    /// Made before the first release.
    #[error(
        "the store {path:?} has format {found}, this pagefold knows {known} only: use the pagefold that wrote it to `commit` what views \
             wrote and to `unseal`, then seal again with this one. Nothing was changed"
    )]
    Older {
        /// The store.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A copy, a snapshot, something restored from a backup.
    #[error(
        "the store {path:?} is not the one that was made: {why}. Writes of views may be newer elsewhere, so nothing here is used or changed. \
             The raw roots are whole without it. Move it away and seal again; what views had written lies in {}",
        uppers(path)
    )]
    Foreign {
        /// The store.
        path: PathBuf,
        /// By what it is told.
        why: String,
    },
    /// The index can't be read.
    #[error(
        "the index of the store {path:?} is damaged: {detail}. Nothing was changed. The raw roots are whole without it; what views had \
             written lies in {}. Keep a copy of the directory, restore index.redb of the same moment if there is one, \
             or move the store away and seal again",
        uppers(path)
    )]
    Damaged {
        /// The store.
        path: PathBuf,
        /// What the database said, or which row is not understood.
        detail: String,
    },
    /// The index could not be read or written this time (I/O error, disk full). The last committed state holds.
    #[error("can't use the index of the store {path:?}: {source}{}", database_hint(source))]
    Index {
        /// The store.
        path: PathBuf,
        /// What the database said.
        source: Box<redb::Error>,
    },
    /// A name that the store doesn't know.
    #[error("the store has no {what} {name}; `pagefold status` lists what is sealed")]
    NoSuch {
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A name that can't be one.
    #[error("{name:?} can't be the name of a {what}: {why}")]
    BadName {
        /// What kind of thing.
        what: &'static str,
        /// As given.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A publication that contradicts itself or the index: a defect of ours; nothing was published.
    #[error("not published: {0}. This is a defect of pagefold: please report it")]
    Inconsistent(String),
    /// Something is being built in this process.
    #[error("a seal is running in this process: try again when it has ended")]
    Building,
    /// An upper holds what a view wrote.
    #[error(
        "the view of root {root} has written to {path:?}: commit or export it first (`pagefold commit`, `pagefold export`), or discard it"
    )]
    UpperNotEmpty {
        /// Which root.
        root: SealId,
        /// Its upper.
        path: PathBuf,
    },
    /// The file system can't do what an anchor needs.
    #[error(
        "the file system of {path:?} can't make files immutable ({source}): anchors would not be safe there. Use XFS or btrfs"
    )]
    NoImmutable {
        /// The anchor.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

impl StoreError {
    pub(crate) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> StoreError {
        StoreError::Io { what, path: path.to_owned(), source: source.into() }
    }
}

/// Where the writes of views are, for people who have to save them by hand.
fn uppers(store: &Path) -> String {
    format!("{:?}", store.join("roots/*/g*/upper"))
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space and run it again; what was published before still holds)"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            " (the file system is mounted read-only, or went read-only after an error: see dmesg)"
        }
        io::ErrorKind::PermissionDenied => " (run as root)",
        _ => "",
    }
}

fn database_hint(error: &redb::Error) -> &'static str {
    match error {
        redb::Error::Io(e) if !hint(e).is_empty() => hint(e),
        redb::Error::PreviousIo => " (an earlier error of this process: run the command again)",
        _ => " (what was committed before still holds; run the command again when the cause is gone)",
    }
}
