//! Where images are mounted: `<store>/mounts/<digest>`, each once, however many views use it.
//!
//! One mount per view would double the views' kernel memory (inodes and names of the image, design 6). `mounts/` is a private
//! mount of its own, so that nothing mounted there travels to other mount namespaces.
//!
//! Invariant: an image reaches the kernel only after all its bytes were compared with its digest. What it deliberately does not
//! do: count users. Overlays hold an image by themselves; unmounting it here only ends the reuse.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use pagefold_sys::identity;
use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind, mount_change,
    move_mount, unmount,
};

use super::assemble::{Refused, refused};
use super::image::{ImageDamage, uuid_of, verify};
use crate::store::key::ImageDigest;

/// Magic of EROFS (`include/uapi/linux/magic.h`).
const EROFS: u32 = 0xe0f5_e1e2;

/// Why an image could not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageMountError {
    /// Its bytes are not its name's.
    #[error("{path:?}: {source}")]
    Damaged {
        /// The image.
        path: PathBuf,
        /// How.
        source: ImageDamage,
    },
    /// This kernel can't mount a file as EROFS.
    #[error("this kernel can't mount an image file (EROFS, Linux 6.12): {0}")]
    Unsupported(Refused),
    /// The kernel refused this image.
    #[error("{path:?} could not be mounted: {source}")]
    Refused {
        /// The image.
        path: PathBuf,
        /// What it said.
        source: Refused,
    },
    /// A call on `path` failed.
    #[error("{op} {path:?}: {errno}")]
    Call {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        errno: Errno,
    },
    /// Something that pagefold did not mount is where an image belongs.
    #[error("{0:?} is a mount of something else; unmount it")]
    Foreign(PathBuf),
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> ImageMountError {
    let path = path.to_path_buf();
    move |errno| ImageMountError::Call { op, path, errno }
}

/// The directory of the mounted image `digest`; mounts it if it is not. `mounts` is the store's directory for them, `image` the
/// file.
///
/// # Errors
/// [`ImageMountError`].
pub fn mounted(mounts: &Path, image: &Path, digest: ImageDigest) -> Result<OwnedFd, ImageMountError> {
    let at = mounts.join(digest.to_string());
    make_private(mounts)?;
    make_dir(&at)?;
    let dir = open_dir(&at)?;
    let file = File::open(image)
        .map_err(|e| failed("open", image)(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
    verify_once(&file, image, digest)?;
    match what_is(dir.as_fd(), digest) {
        Found::Image => return Ok(dir),
        Found::Other if is_mount(dir.as_fd()) => return Err(ImageMountError::Foreign(at)),
        Found::Other => {}
    }
    let mount = mount_image(image)?;
    // What fsmount gives is a path only; questions need an open directory.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = rustix::fs::openat(&mount, c".", flags, Mode::empty()).map_err(failed("open", image))?;
    if what_is(inside.as_fd(), digest) != Found::Image {
        // The file of that name was exchanged between the two looks.
        return Err(ImageMountError::Foreign(image.into()));
    }
    move_mount(&mount, c"", rustix::fs::CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("mount the image at", &at))?;
    open_dir(&at)
}

/// Takes the image's mount away, and `mounts` itself when that was the last. Not mounted is no error. Who still stands in it keeps
/// what he sees (the mount is detached): it is read-only, and waiting for him would gain nothing.
///
/// # Errors
/// As `umount(2)`.
pub fn unmounted(mounts: &Path, digest: ImageDigest) -> Result<(), ImageMountError> {
    let at = mounts.join(digest.to_string());
    let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
    if open_dir(&at).is_ok_and(|dir| what_is(dir.as_fd(), digest) == Found::Image) {
        unmount(&at, flags).map_err(failed("unmount", &at))?;
    }
    match rustix::fs::unlinkat(rustix::fs::CWD, &at, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT | Errno::BUSY | Errno::NOTEMPTY) => {}
        Err(e) => return Err(failed("remove", &at)(e)),
    }
    let empty = std::fs::read_dir(mounts).is_ok_and(|mut list| list.next().is_none());
    if empty && open_dir(mounts).is_ok_and(|dir| is_mount(dir.as_fd())) {
        unmount(mounts, flags).map_err(failed("unmount", mounts))?;
    }
    Ok(())
}

/// Makes `mounts` a private mount of itself.
fn make_private(mounts: &Path) -> Result<(), ImageMountError> {
    make_dir(mounts)?;
    if is_mount(open_dir(mounts)?.as_fd()) {
        return Ok(());
    }
    mount_bind(mounts, mounts).map_err(failed("bind", mounts))?;
    mount_change(mounts, MountPropagationFlags::PRIVATE).map_err(failed("make private", mounts))
}

fn make_dir(path: &Path) -> Result<(), ImageMountError> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(failed("create", path)(e)),
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, ImageMountError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))
}

/// Whether `dir` is the root of a mount (`STATX_ATTR_MOUNT_ROOT`, Linux 5.8).
pub(super) fn is_mount(dir: BorrowedFd<'_>) -> bool {
    rustix::fs::statx(dir, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[derive(PartialEq, Eq)]
enum Found {
    Image,
    Other,
}

fn what_is(dir: BorrowedFd<'_>, digest: ImageDigest) -> Found {
    let erofs = rustix::fs::fstatfs(dir).is_ok_and(|fs| fs.f_type as u32 == EROFS);
    // Before Linux 6.9 the UUID can't be asked for; then the name of the mount point must do.
    let same = match identity::fs_uuid(dir) {
        Ok(uuid) => uuid == Some(uuid_of(digest)),
        Err(e) => pagefold_sys::is_unsupported(&e),
    };
    if erofs && same { Found::Image } else { Found::Other }
}

fn mount_image(image: &Path) -> Result<OwnedFd, ImageMountError> {
    let unsupported = |errno| ImageMountError::Unsupported(Refused { errno, log: String::new() });
    let context = fsopen(c"erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(unsupported)?;
    let configured =
        fsconfig_set_string(&context, "source", image).and_then(|()| fsconfig_set_flag(&context, "ro"));
    configured.and_then(|()| fsconfig_create(&context)).map_err(|e| {
        let source = refused(&context, e);
        match e {
            Errno::NOTBLK => ImageMountError::Unsupported(source),
            _ => ImageMountError::Refused { path: image.into(), source },
        }
    })?;
    // Nobody works in an image directly; overlayfs goes by the flags of its own mount.
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|e| ImageMountError::Refused { path: image.into(), source: refused(&context, e) })
}

/// A file as it was when it was verified: digest, device, inode, size, change time.
type Verified = (ImageDigest, u64, u64, u64, i64, i64);
static VERIFIED: Mutex<Option<HashSet<Verified>>> = Mutex::new(None);

/// [`verify`], once in this process for a file that has not changed since.
fn verify_once(file: &File, path: &Path, digest: ImageDigest) -> Result<(), ImageMountError> {
    let damaged = |source| ImageMountError::Damaged { path: path.into(), source };
    let stat = file.metadata().map_err(|e| damaged(e.into()))?;
    let key = (digest, stat.dev(), stat.ino(), stat.size(), stat.ctime(), stat.ctime_nsec());
    let known = |set: &mut Option<HashSet<Verified>>| set.get_or_insert_default().contains(&key);
    if VERIFIED.lock().is_ok_and(|mut set| known(&mut set)) {
        return Ok(());
    }
    verify(file, digest).map_err(damaged)?;
    if let Ok(mut set) = VERIFIED.lock() {
        set.get_or_insert_default().insert(key);
    }
    Ok(())
}
