//! Why a commit, export or undo could not be done.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use super::state::shown_path;

/// Why a commit, export or undo ended early. The raw root is then whole, the upper as it was, and the same command run again
/// finishes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// A system call failed.
    #[error("can't {what} {}: {source}{}", path.display(), way_out(source))]
    Io {
        /// The operation.
        what: &'static str,
        /// Path below the root, or absolute.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The view is in use.
    #[error("{what} is in use ({who}): unmount it there first")]
    Live {
        /// Which view.
        what: String,
        /// Where it is mounted.
        who: String,
    },
    /// It was asked to stop.
    #[error("interrupted: run it again to finish")]
    Cancelled,
    /// Refused so that nothing is lost.
    #[error("{0}")]
    Refused(String),
    /// Something that this stands on failed.
    #[error("{0}")]
    Below(String),
}

/// What to do about what more than one file would meet.
fn way_out(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ROFS) => {
            " (make it writable, a btrfs subvolume by `btrfs property set DIR ro false`, and run it again; or bring what the view shows elsewhere by `pagefold export`)"
        }
        Some(Errno::NOSPC | Errno::DQUOT) => " (make room and run it again)",
        _ => "",
    }
}

/// An error of an operation on a path below the root.
pub(crate) fn at_path(what: &'static str, path: &[u8], source: io::Error) -> CommitError {
    let path = if path.is_empty() { PathBuf::from(".") } else { shown_path(path) };
    CommitError::Io { what, path, source }
}

/// Whether going on with other files is pointless: the file system is full, broken or read-only, or we lack means.
pub(crate) fn is_fatal(error: &io::Error) -> bool {
    let fatal =
        [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::ROFS, Errno::NOMEM, Errno::MFILE, Errno::NFILE];
    error.raw_os_error().is_some_and(|code| fatal.contains(&Errno::from_raw_os_error(code)))
}
