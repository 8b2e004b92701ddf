//! The layer of whiteouts between a delta and its base: plain directories with device nodes 0/0, overlayfs' mark for "not here".
//!
//! The image format rewrites such nodes (they would hide the image's own names), so they live in the root's directory in the
//! store. Invariant: every directory of this layer is also in the delta above it, whose metadata is what a view shows.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

/// Its directory in a root's directory; absent when nothing is gone.
pub const GONE: &str = "gone";

/// A whiteout that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("create the whiteout {path:?} below {dir:?}: {errno}; make room on the store's file system")]
pub struct GoneError {
    dir: std::path::PathBuf,
    path: std::path::PathBuf,
    errno: Errno,
}

/// Makes the layer in `root_dir` for the paths that are gone (below the root, no leading slash). Run again it finishes what
/// was begun. Who publishes the root syncs.
///
/// # Errors
/// [`GoneError`]; the caller drops all of `root_dir`.
pub fn write(root_dir: &Path, gone: &[Vec<u8>]) -> Result<(), GoneError> {
    let top = root_dir.join(GONE);
    let failed = |path: &Path, errno| GoneError { dir: top.clone(), path: path.to_owned(), errno };
    for bytes in gone {
        let path = Path::new(OsStr::from_bytes(bytes));
        let whiteout = top.join(path);
        if let Some(parent) = whiteout.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|e| failed(path, Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        }
        match rustix::fs::mknodat(CWD, &whiteout, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(path, errno)),
        }
    }
    Ok(())
}
