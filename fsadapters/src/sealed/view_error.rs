//! What can go wrong with a view. Every variant says what to do next.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::assemble::Refused;
use super::diff::DiffDamage;
use super::idmap::IdMapError;
use super::image_mount::ImageMountError;
use super::live::ProbeError;
use super::raw::RawError;
use super::upper::UpperError;
use super::users::User;
use crate::store::StoreError;

/// Why a view could not be mounted, unmounted or emptied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The raw root.
    #[error(transparent)]
    Raw(#[from] RawError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The index, or a manifest.
    #[error("{0}")]
    Index(String),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageMountError),
    /// Whether an upper is in use.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The upper.
    #[error(transparent)]
    Upper(#[from] UpperError),
    /// The id map.
    #[error(transparent)]
    IdMap(#[from] IdMapError),
    /// Processes use the raw root.
    #[error(
        "{path:?} is in use: {}; stop them, for what they write there the view does not show (--force mounts all the same)",
        list(users)
    )]
    InUse {
        /// The raw root.
        path: PathBuf,
        /// They.
        users: Vec<User>,
    },
    /// Who uses it can't be found out.
    #[error("which processes use the root can't be found out: {0}; --force mounts all the same")]
    NoProcesses(String),
    /// The layer over the image.
    #[error(transparent)]
    Diff(#[from] DiffDamage),
    /// The target is in the store.
    #[error("{0:?} lies in the store; choose a target outside of it")]
    InsideStore(PathBuf),
    /// The target is above the store.
    #[error("a view at {0:?} would hide the store; choose another target")]
    HidesStore(PathBuf),
    /// There is a view already.
    #[error("a view is mounted at {0:?} already; unmount it first, or choose another target")]
    AlreadyView(PathBuf),
    /// The root has a view somewhere else.
    #[error("the view of {name:?} is mounted at {target:?}; unmount it first, or bind-mount it")]
    AlreadyMounted {
        /// The root's name.
        name: String,
        /// Where.
        target: PathBuf,
    },
    /// No directory.
    #[error("{0:?} is no directory; make one to mount at")]
    NotADirectory(PathBuf),
    /// The raw root moved.
    #[error("{0:?} is not on the store's file system any more; put it back, or unseal and seal it again")]
    OtherFileSystem(PathBuf),
    /// No view.
    #[error("no view is mounted at {0:?}; `pagefold status` lists the mounted ones")]
    NotAView(PathBuf),
    /// Held by somebody.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Mounted somewhere else.
    #[error(
        "the view of {name:?} is in use: mounted in another mount namespace, or kept by an open file after umount; end what holds it"
    )]
    Live {
        /// The root's name.
        name: String,
    },
    /// `ESTALE`.
    #[error(
        "{upper:?} does not belong to the image of {name:?} (it was mounted with another one); nothing was mounted. Put the right upper back, or `pagefold export` what it holds and seal again"
    )]
    ForeignUpper {
        /// The root's name.
        name: String,
        /// The upper.
        upper: PathBuf,
    },
    /// The kernel refused the overlay.
    #[error("the view of {name:?} could not be mounted: {source}")]
    Refused {
        /// The root's name.
        name: String,
        /// What it said.
        source: Refused,
    },
    /// A call failed.
    #[error("can't {op} {path:?}: {errno}")]
    Call {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        errno: Errno,
    },
}

impl ViewError {
    /// Whether this host lacks what views need (exit code 3), rather than that something is wrong.
    #[must_use]
    pub fn is_host_s(&self) -> bool {
        match self {
            ViewError::Image(ImageMountError::Unsupported(_)) => true,
            ViewError::IdMap(error) => error.is_host_s(),
            ViewError::Refused { source, .. } => {
                matches!(source.errno, Errno::NOSYS | Errno::NODEV | Errno::INVAL | Errno::OPNOTSUPP)
            }
            _ => false,
        }
    }
}

pub(super) fn failed(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> ViewError {
    let path = path.to_path_buf();
    move |errno| ViewError::Call { op, path, errno }
}

/// Who holds a view that can't be unmounted.
#[derive(Debug, thiserror::Error)]
#[error("{target:?} is in use{}{}; end what uses it", mounted_below(mounts), used_by(users))]
pub struct Busy {
    /// The view.
    pub target: PathBuf,
    /// Processes.
    pub users: Vec<User>,
    /// Mounts in it.
    pub mounts: Vec<PathBuf>,
}

/// More are counted only.
const SHOWN_MAX: usize = 5;

fn list(users: &[User]) -> String {
    let mut text: Vec<String> = users.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    if users.len() > SHOWN_MAX {
        text.push(format!("and {} more", users.len() - SHOWN_MAX));
    }
    text.join(", ")
}

fn used_by(users: &[User]) -> String {
    if users.is_empty() { String::new() } else { format!(": {}", list(users)) }
}

fn mounted_below(mounts: &[PathBuf]) -> String {
    match mounts {
        [] => String::new(),
        [one] => format!(", {one:?} is mounted in it"),
        [one, rest @ ..] => format!(", {one:?} and {} more are mounted in it", rest.len()),
    }
}
