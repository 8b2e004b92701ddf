//! Why a farm could not be made or destroyed, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::rig::{KnownFs, RigError};

use super::manifest::FarmFs;

/// Making or destroying a farm failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FarmError {
    /// The loopback file system could not be had.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// A system call failed.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// Making failed, and so did removing what was made.
    #[error("{error}; not all of it could be removed again ({clean_up}): then `farm destroy {}`", dir.display())]
    LeftBehind {
        /// The directory.
        dir: PathBuf,
        /// Why making failed.
        error: Box<FarmError>,
        /// Why removing failed.
        clean_up: Box<FarmError>,
    },
    /// The directory holds something.
    #[error("{} is not empty: give a new or an empty directory, or `farm destroy` the farm in it", dir.display())]
    Occupied {
        /// The directory.
        dir: PathBuf,
    },
    /// An existing backing file.
    #[error("{} exists: the backing file of another farm? `farm destroy` that, or remove it", path.display())]
    ImageExists {
        /// The backing file.
        path: PathBuf,
    },
    /// The directory holds no farm.
    #[error("{} holds no farm (no {}): nothing was deleted", dir.display(), super::manifest::MANIFEST)]
    NoManifest {
        /// The directory.
        dir: PathBuf,
    },
    /// The manifest is not one of ours, or of another version.
    #[error("{}: {why}: nothing was deleted", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// What was asked for contradicts itself or is out of range.
    #[error("{what}: {why}")]
    Spec {
        /// The argument.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The file system can't clone.
    #[error("{} ({found:?}) can't clone files; wanted {wanted:?} with reflink: {source}", dir.display())]
    NoReflink {
        /// The directory.
        dir: PathBuf,
        /// What was asked for.
        wanted: FarmFs,
        /// What is there.
        found: KnownFs,
        /// The errno of FICLONE.
        source: io::Error,
    },
    /// An entry of a tar file can't be unpacked safely.
    #[error("{}: entry {}: {why}", archive.display(), entry.display())]
    TarEntry {
        /// The tar file.
        archive: PathBuf,
        /// The entry's path as stored.
        entry: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The caller asked to stop. What had been made was removed.
    #[error("interrupted; what had been made was removed")]
    Cancelled,
}

impl FarmError {
    pub(crate) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> FarmError {
        FarmError::Io { what, path: path.to_owned(), source: source.into() }
    }

    pub(crate) fn spec(what: &'static str, why: impl Into<String>) -> FarmError {
        FarmError::Spec { what, why: why.into() }
    }
}
