//! Whether some view still writes an upper.
//!
//! A successful umount proves nothing: another mount namespace may hold the view (design 6). The kernel knows: an upper that an
//! overlay with `index=on` holds refuses the next one with `EBUSY`.
//!
//! How it is asked: an overlay of the upper over a directory that is certainly not its lower. The kernel takes the upper's lock
//! first (`EBUSY`: live), and compares the lower with the one that the upper remembers afterwards (`ESTALE`: free). So no image
//! is needed, and the question can be put when the image is damaged. An upper that remembers no lower was never mounted.
//!
//! Invariant: nothing is left behind and nothing the upper says is changed. What it deliberately does not do: keep the answer
//! true; only the store's lock keeps our own commands from mounting it next.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::assemble::{Layers, Refused, overlay};
use super::upper::{UPPER, WORK};

/// What an upper is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperState {
    /// No overlay holds it.
    Free,
    /// A view is mounted: here, in another mount namespace, or kept alive by an open file.
    Live,
}

/// Why an upper could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// A directory is not there or can't be opened.
    #[error("open {path:?}: {errno}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// The answer.
        errno: Errno,
    },
    /// The kernel said something that means neither.
    #[error("whether the view of {path:?} is live could not be found out: {source}")]
    Unclear {
        /// The root's directory in the store.
        path: PathBuf,
        /// The answer.
        source: Refused,
    },
}

/// Asks. `root_dir` holds `upper/` and `work/`; `stranger` is any other directory that never was a lower layer.
///
/// # Errors
/// [`ProbeError`]; then it must be taken for live.
pub fn probe(root_dir: &Path, stranger: &Path) -> Result<UpperState, ProbeError> {
    let upper = open_dir(&root_dir.join(UPPER))?;
    if !remembers_a_lower(&upper) {
        return Ok(UpperState::Free);
    }
    let layers = Layers {
        upper,
        work: open_dir(&root_dir.join(WORK))?,
        images: vec![open_dir(stranger)?],
        data: None,
        mounts: Vec::new(),
    };
    match overlay(&layers, MountAttrFlags::empty()) {
        Err(refused) if refused.errno == Errno::BUSY => Ok(UpperState::Live),
        Err(refused) if refused.errno == Errno::STALE => Ok(UpperState::Free),
        Err(source) => Err(ProbeError::Unclear { path: root_dir.into(), source }),
        // It can't be: the stranger's handle is not the image's. But nobody else had it.
        Ok(_mount) => Ok(UpperState::Free),
    }
}

/// Whether overlayfs ever mounted this upper with `index=on`: it wrote down its lower then.
fn remembers_a_lower(upper: &OwnedFd) -> bool {
    let mut value = [0u8; 1024];
    !matches!(
        rustix::fs::fgetxattr(upper.as_fd(), c"trusted.overlay.origin", &mut value[..]),
        Err(Errno::NODATA)
    )
}

pub(super) fn open_dir(path: &Path) -> Result<OwnedFd, ProbeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| ProbeError::Open { path: path.into(), errno })
}
