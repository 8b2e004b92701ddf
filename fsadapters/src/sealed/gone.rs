//! The layer of whiteouts between a delta and its base: plain directories with device nodes 0/0, overlayfs' mark for "not here".
//!
//! The image format rewrites such nodes (they would hide the image's own names), so they live in the root's directory in the
//! store, with a list beside it: tools that copy or restore a store may leave such nodes out, and a view would show again what is gone.
//! Invariant: every directory of this layer is also in the delta above it, whose metadata is what a view shows.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode};
use rustix::io::Errno;

/// Its directory in a root's directory; absent when nothing is gone.
pub const GONE: &str = "gone";

/// The list, in a root's directory: BLAKE3 of what follows, then each path with a NUL behind it.
const LIST: &str = "gone.list";

/// Longest path of a whiteout, bytes: with the store's own before it, it must not be longer than `PATH_MAX`.
pub const PATH_BYTES_MAX: usize = 3000;

/// A whiteout that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("create the whiteout {path:?} below {dir:?}: {errno}; make room on the store's file system")]
pub struct GoneError {
    dir: PathBuf,
    path: PathBuf,
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
    if !gone.is_empty() {
        let rest: Vec<u8> = gone.iter().flat_map(|path| path.iter().copied().chain([0])).collect();
        let list = [&blake3::hash(&rest).as_bytes()[..], &rest].concat();
        std::fs::write(root_dir.join(LIST), list)
            .map_err(|e| failed(Path::new(LIST), Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
    }
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

/// The paths that are gone by the list of `root_dir`; none where there is no list.
fn listed(root_dir: &Path) -> io::Result<Vec<Vec<u8>>> {
    let list = match std::fs::read(root_dir.join(LIST)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        list => list?,
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the list of whiteouts is damaged");
    let (hash, rest) = list.split_at_checked(blake3::OUT_LEN).ok_or_else(damaged)?;
    if blake3::hash(rest).as_bytes() != hash {
        return Err(damaged());
    }
    Ok(rest.split(|b| *b == 0).filter(|path| !path.is_empty()).map(<[u8]>::to_vec).collect())
}

/// A whiteout that should be in `root_dir` and is not.
///
/// # Errors
/// The list can't be read, or is damaged.
pub fn missing(root_dir: &Path) -> io::Result<Option<PathBuf>> {
    let top = root_dir.join(GONE);
    let is_whiteout = |path: &Path| {
        rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
        })
    };
    let paths = listed(root_dir)?.into_iter().map(|path| top.join(OsStr::from_bytes(&path)));
    Ok(paths.into_iter().find(|path| !is_whiteout(path)))
}

/// Makes those that are missing again.
///
/// # Errors
/// [`GoneError`]. A damaged list stays as it is, for `verify` to tell.
pub fn heal(root_dir: &Path) -> Result<(), GoneError> {
    match (missing(root_dir), listed(root_dir)) {
        (Ok(Some(_)), Ok(paths)) => write(root_dir, &paths),
        _ => Ok(()),
    }
}
