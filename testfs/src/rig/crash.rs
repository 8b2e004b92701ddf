//! Power cuts: a rig's file system as it would be found after the machine went dark now.
//!
//! XFS and ext4 are shut down without their log. btrfs has no such ioctl: its backing file is copied as it is at this
//! moment, and the copy is mounted in its place (what a disk would hold; a commit of the kernel's own in the middle of the
//! copy would tear it, so the copy is taken while nothing writes). What it deliberately does not do: torn sectors and
//! reordered writes within a device's cache.

use std::os::fd::AsFd;
use std::path::Path;

use pagefold_sys::shutdown::{Shutdown, shutdown};

use super::base;
use super::tools::{self, RigError};
use super::{LoopRig, RigFs, mount_image, unmount};

impl LoopRig {
    /// Cuts the power and mounts again what is on disk. Everything mounted on the rig's file system is unmounted first, without
    /// syncing it.
    ///
    /// # Errors
    /// `EBUSY` while something is open on it, and whatever mounting says.
    pub fn cut_power(&mut self) -> Result<(), RigError> {
        self.cut_power_and(|| ())
    }

    /// As [`LoopRig::cut_power`]; `let_go` is called in the dark, to end whoever still has something open.
    ///
    /// # Errors
    /// As [`LoopRig::cut_power`].
    pub fn cut_power_and(&mut self, let_go: impl FnOnce()) -> Result<(), RigError> {
        if matches!(self.fs, RigFs::Btrfs | RigFs::BtrfsZstd) {
            return self.swap_in_a_copy(let_go);
        }
        let dir = open_dir(&self.mount_point)?;
        shutdown(dir.as_fd(), Shutdown::DropLog)
            .map_err(|e| RigError::io("shut down", &self.mount_point, e))?;
        drop(dir);
        let_go();
        base::unmount_below(&self.mount_point);
        self.unmount_for_good()?;
        self.direct_io = mount_image(self.fs, &self.image(), &self.mount_point)?;
        Ok(())
    }

    /// What was unmounted lazily, or is held by a mount namespace that somebody has just copied, ends a moment later, and only
    /// then the file system: until its loop device is gone, another file system of its UUID would be refused.
    fn unmount_for_good(&self) -> Result<(), RigError> {
        if unmount(&self.mount_point).is_err() {
            rustix::mount::unmount(&self.mount_point, rustix::mount::UnmountFlags::DETACH)
                .map_err(|e| RigError::io("unmount", &self.mount_point, e.into()))?;
        }
        let started = std::time::Instant::now();
        while tools::has_loops(&self.image()) && started.elapsed() < std::time::Duration::from_secs(30) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(())
    }

    fn swap_in_a_copy(&mut self, let_go: impl FnOnce()) -> Result<(), RigError> {
        let (image, copy) = (self.image(), self.home.join(base::IMAGE_COPY));
        let args = ["--sparse=always", "--reflink=auto", "--"].map(std::ffi::OsStr::new);
        tools::run("cp", "coreutils", args.into_iter().chain([image.as_os_str(), copy.as_os_str()]))?;
        let_go();
        base::unmount_below(&self.mount_point);
        self.unmount_for_good()?;
        tools::detach_loops_of(&image);
        std::fs::rename(&copy, &image).map_err(|e| RigError::io("rename", &copy, e))?;
        self.direct_io = mount_image(self.fs, &image, &self.mount_point)?;
        Ok(())
    }
}

fn open_dir(path: &Path) -> Result<std::fs::File, RigError> {
    std::fs::File::open(path).map_err(|e| RigError::io("open", path, e))
}
