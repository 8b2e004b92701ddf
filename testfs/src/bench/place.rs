//! Where a run happens: a file system of its own or a directory of an existing one, the roots in it, mounts of them.
//!
//! Invariant: everything mounted or made here goes when the value goes, mounts before what they stand on. The directory
//! is a fresh one with our process's id in its name.

use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::BenchError;
use crate::rig::{LoopRig, RigFs};

/// Size of the sparse file of a file system of our own, bytes.
const RIG_SIZE: u64 = 64 << 30;

/// The directory of a run.
#[derive(Debug)]
pub(super) struct Place {
    /// On the file system under test.
    pub dir: PathBuf,
    /// Unmounted after `dir` was emptied, by its own `Drop`.
    _rig: Option<LoopRig>,
}

impl Place {
    /// In `on`, or on a new file system of `fs`.
    pub(super) fn new(on: Option<&Path>, fs: RigFs) -> Result<Place, BenchError> {
        let (parent, rig) = match on {
            Some(dir) => (dir.canonicalize().map_err(|e| BenchError::io("resolve", dir, e))?, None),
            None => {
                let rig = LoopRig::with_size(fs, RIG_SIZE)?;
                (rig.path().to_owned(), Some(rig))
            }
        };
        let dir = parent.join(format!("pagefold-bench-{}", std::process::id()));
        make_private(&dir)?;
        Ok(Place { dir, _rig: rig })
    }

    /// A new directory in it, for us only.
    pub(super) fn make(&self, name: impl AsRef<Path>) -> Result<PathBuf, BenchError> {
        let dir = self.dir.join(name);
        make_private(&dir)?;
        Ok(dir)
    }

    /// Bytes free on its file system, everything written out.
    pub(super) fn free(&self) -> Result<u64, BenchError> {
        let open = std::fs::File::open(&self.dir).map_err(|e| BenchError::io("open", &self.dir, e))?;
        rustix::fs::syncfs(&open).map_err(|e| BenchError::io("sync", &self.dir, e))?;
        let stat = rustix::fs::fstatvfs(&open).map_err(|e| BenchError::io("ask", &self.dir, e))?;
        Ok(stat.f_bfree * stat.f_frsize)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A file system of our own goes as a whole.
        if self._rig.is_none()
            && let Err(error) = std::fs::remove_dir_all(&self.dir)
        {
            eprintln!("pagefold: can't remove {}: {error}", self.dir.display());
        }
    }
}

fn make_private(dir: &Path) -> Result<(), BenchError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(dir)
        .map_err(|e| BenchError::io("create", dir, e))
}

/// A mount that goes with this value.
#[derive(Debug)]
pub(super) struct Mounted(PathBuf);

impl Mounted {
    /// An overlay over `lower` at `<dir>/root`, with the kernel's default options.
    pub(super) fn overlay(lower: &Path, dir: &Path) -> Result<Mounted, BenchError> {
        let [upper, work, at] = ["upper", "work", "root"].map(|name| dir.join(name));
        for each in [&upper, &work, &at] {
            make_private(each)?;
        }
        let failed = |e: rustix::io::Errno| BenchError::io("mount an overlay at", &at, e);
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        for (key, path) in [("lowerdir+", lower), ("upperdir", &upper), ("workdir", &work)] {
            fsconfig_set_string(&fs, key, path).map_err(failed)?;
        }
        fsconfig_create(&fs).map_err(failed)?;
        let mount = fsmount(
            &fs,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
        )
        .map_err(failed)?;
        move_mount(&mount, "", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)?;
        Ok(Mounted(at))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if crate::rig::unmount(&self.0).is_err() {
            let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
        }
    }
}
