//! Where rigs live, how one is claimed, how leftovers of dead owners are found and taken apart.
//!
//! Invariant: a directory is taken apart only when its lock could be taken, so never under a living owner. The lock
//! is `flock`: the kernel drops it with the owner, however that died, and a reused process id can't fake it.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::mountinfo::{self, Mount};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::mount::UnmountFlags;

use super::{RigError, tools, try_lock};

/// Names inside a rig's home; the watcher's script knows the first two as well.
pub(super) const IMAGE: &str = "backing.img";
pub(super) const MOUNT: &str = "mnt";
pub(super) const IMAGE_COPY: &str = "backing.copy";
const LOCK: &str = "owner.lock";
const PREFIX: &str = "pagefold-rig-";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The directory for backing files: `PAGEFOLD_TMPDIR`, else the system's temporary directory.
#[must_use]
pub fn base_dir() -> PathBuf {
    std::env::var_os("PAGEFOLD_TMPDIR")
        .filter(|v| !v.is_empty())
        .map_or_else(std::env::temp_dir, PathBuf::from)
}

/// A new, empty home for a rig, with its lock held.
pub(super) fn claim(base: &Path) -> Result<(PathBuf, OwnedFd), RigError> {
    let _gate = gate(base)?;
    loop {
        let home =
            base.join(format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        // Others may pass through (tests that drop privileges) but not list it.
        match std::fs::DirBuilder::new().mode(0o711).create(&home) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(RigError::io("create", &home, e)),
        }
        let lock = open_lock(&home.join(LOCK), OFlags::CREATE)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|e| RigError::io("lock", &home.join(LOCK), e.into()))?;
        return Ok((home, lock));
    }
}

/// Takes apart every rig below `base` whose owner is dead. Rigs of other users are left alone.
///
/// # Errors
/// `base` can't be read or locked. A leftover that resists is left for the next sweep.
pub fn sweep(base: &Path) -> Result<(), RigError> {
    let _gate = gate(base)?;
    let me = rustix::process::geteuid().as_raw();
    let entries = std::fs::read_dir(base).map_err(|e| RigError::io("list", base, e))?;
    for entry in entries.flatten() {
        let ours = entry.file_name().to_str().is_some_and(|n| n.starts_with(PREFIX))
            && entry.metadata().is_ok_and(|m| m.is_dir() && m.uid() == me);
        if !ours {
            continue;
        }
        let home = entry.path();
        // Without a lock file the owner died between making the directory and taking the lock (the gate is ours now).
        match open_lock(&home.join(LOCK), OFlags::empty()) {
            Ok(lock) if !try_lock(&lock) => {}
            Ok(_) => dismantle(&home),
            Err(e) if is_not_found(&e) => dismantle(&home),
            // No more descriptors, say: that tells nothing of the owner.
            Err(_) => {}
        }
    }
    Ok(())
}

/// Unmounts (lazily when busy), frees the loop device, removes the directory. Never crosses into the mount: what is
/// still mounted there is not ours to delete file by file.
pub(super) fn dismantle(home: &Path) {
    let mount = home.join(MOUNT);
    unmount_below(&mount);
    if unmount(&mount).is_err() {
        let _ = rustix::mount::unmount(&mount, UnmountFlags::DETACH);
    }
    let image = home.join(IMAGE);
    tools::detach_loops_of(&image);
    let _ = std::fs::remove_file(image);
    let _ = std::fs::remove_file(home.join(IMAGE_COPY));
    // Plain rmdir: fails, rather than deletes, should anything still be mounted.
    let _ = std::fs::remove_dir(mount);
    let _ = std::fs::remove_file(home.join(LOCK));
    let _ = std::fs::remove_dir(home);
}

/// Unmounts, lazily, whatever is mounted below `path` (views, images, nested rigs), the last mounted first.
pub(super) fn unmount_below(path: &Path) {
    let below = |m: &Mount| m.mount_point.starts_with(path) && m.mount_point != path;
    for mount in mountinfo::read().unwrap_or_default().iter().rev().filter(|m| below(m)) {
        let _ = rustix::mount::unmount(&mount.mount_point, UnmountFlags::DETACH);
    }
}

/// Unmounts what is mounted at `path`. Busy is tried again for a while: a process that another thread is just starting
/// holds copies of all our descriptors until it executes its program.
///
/// # Errors
/// `EBUSY` when it stays in use, `EINVAL` when nothing is mounted there.
pub(crate) fn unmount(path: &Path) -> Result<(), RigError> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let started = Instant::now();
    loop {
        match rustix::mount::unmount(path, UnmountFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::BUSY) if started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(RigError::io("unmount (is it in use?)", path, e.into())),
        }
    }
}

fn is_not_found(error: &RigError) -> bool {
    matches!(error, RigError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

fn open_lock(path: &Path, flags: OFlags) -> Result<OwnedFd, RigError> {
    rustix::fs::open(
        path,
        flags | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK,
        Mode::RUSR | Mode::WUSR,
    )
    .map_err(|e| RigError::io("open", path, e.into()))
}

/// Between "directory made" and "lock taken" a rig looks dead: claims and sweeps take turns. One gate a user, so that
/// nobody can make another user wait.
fn gate(base: &Path) -> Result<OwnedFd, RigError> {
    let path = base.join(format!(".pagefold-rigs-{}.lock", rustix::process::geteuid().as_raw()));
    let file = open_lock(&path, OFlags::CREATE)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|e| RigError::io("lock", &path, e.into()))?;
    Ok(file)
}
