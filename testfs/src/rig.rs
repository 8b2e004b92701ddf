//! Loopback file systems for tests and fixtures: a sparse backing file, a loop device with direct I/O (so that
//! nothing is cached twice), a fresh file system, a mount in a directory of its own.
//!
//! Invariant: a rig never outlives its process. Three nets, each under the other: `Drop` (also while unwinding); a
//! watcher process that holds the read end of a pipe and cleans up when the owner dies of anything, `SIGKILL`
//! included; and a sweep at the next start for rigs whose owner's lock is gone, should the watcher be killed too.
//! The loop device is set to autoclear, so that whoever unmounts frees it.
//!
//! Deliberately absent: signal handlers (they belong to the program), and any fallback when a rig can't be had: the
//! error names what is missing, and tests fail with it rather than skip.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, Mode, OFlags};

mod base;
mod crash;
mod tools;

pub(crate) use base::unmount;
pub use base::{base_dir, sweep};
pub use tools::{KnownFs, RigError, fs_kind};
pub(crate) use tools::{detach_loops_of, require_root};

/// Which file system a rig carries, and how it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RigFs {
    /// XFS with reflink, blocks of 4 KiB.
    Xfs,
    /// XFS made without reflink.
    XfsNoReflink,
    /// XFS with reflink and blocks of 1 KiB: a page is up to four extents.
    XfsSmallBlocks,
    /// btrfs with default options.
    Btrfs,
    /// btrfs mounted with `compress=zstd`.
    BtrfsZstd,
    /// ext4: FIEMAP, but no reflink.
    Ext4,
}

impl RigFs {
    /// Type name for `mount -t`, as in `/proc/mounts`.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            RigFs::Xfs | RigFs::XfsNoReflink | RigFs::XfsSmallBlocks => "xfs",
            RigFs::Btrfs | RigFs::BtrfsZstd => "btrfs",
            RigFs::Ext4 => "ext4",
        }
    }

    /// Program, package and arguments that make it.
    const fn mkfs(self) -> (&'static str, &'static str, &'static [&'static str]) {
        match self {
            RigFs::Xfs => ("mkfs.xfs", "xfsprogs", &["-q", "-f", "-K", "-m", "reflink=1"]),
            RigFs::XfsNoReflink => ("mkfs.xfs", "xfsprogs", &["-q", "-f", "-K", "-m", "reflink=0"]),
            RigFs::XfsSmallBlocks => {
                ("mkfs.xfs", "xfsprogs", &["-q", "-f", "-K", "-m", "reflink=1", "-b", "size=1024"])
            }
            RigFs::Btrfs | RigFs::BtrfsZstd => ("mkfs.btrfs", "btrfs-progs", &["-q", "-f", "-K"]),
            RigFs::Ext4 => ("mkfs.ext4", "e2fsprogs", &["-q", "-F", "-E", "nodiscard"]),
        }
    }

    const fn mount_options(self) -> &'static str {
        match self {
            // What is unpacked into a rig may come from anywhere: no setuid program and no device of it works.
            RigFs::BtrfsZstd => "nosuid,nodev,compress=zstd",
            _ => "nosuid,nodev",
        }
    }
}

/// The default size of a rig in bytes. The backing file is sparse: only what is written costs disk.
pub const RIG_SIZE_DEFAULT: u64 = 2 << 30;

/// A mounted loopback file system that disappears with this value or this process.
#[derive(Debug)]
pub struct LoopRig {
    fs: RigFs,
    /// Holds the backing file, the mount point and the lock.
    home: PathBuf,
    mount_point: PathBuf,
    direct_io: bool,
    /// Kept open for the rig's life: the lock says that the owner lives.
    lock: Option<OwnedFd>,
    watcher: Option<Child>,
}

impl LoopRig {
    /// A fresh file system of `fs`, [`RIG_SIZE_DEFAULT`] bytes.
    ///
    /// # Errors
    /// Not root, no loop devices, a missing program; each says what to do.
    pub fn new(fs: RigFs) -> Result<LoopRig, RigError> {
        LoopRig::with_size(fs, RIG_SIZE_DEFAULT)
    }

    /// A fresh file system of `fs` on a sparse backing file of `bytes` bytes.
    ///
    /// # Errors
    /// As [`LoopRig::new`].
    pub fn with_size(fs: RigFs, bytes: u64) -> Result<LoopRig, RigError> {
        require_root("make a loopback file system")?;
        let base = base_dir();
        sweep(&base)?;
        let (home, lock) = base::claim(&base)?;
        // From here on Drop cleans up, whatever fails.
        let mut rig = LoopRig {
            fs,
            mount_point: home.join(base::MOUNT),
            home,
            direct_io: false,
            lock: Some(lock),
            watcher: None,
        };
        rig.watcher = Some(spawn_watcher(&rig.home)?);
        let image = rig.image();
        make_image(fs, &image, bytes)?;
        std::fs::create_dir(&rig.mount_point).map_err(|e| RigError::io("create", &rig.mount_point, e))?;
        rig.direct_io = mount_image(fs, &image, &rig.mount_point)?;
        Ok(rig)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// What it carries.
    #[must_use]
    pub fn fs(&self) -> RigFs {
        self.fs
    }

    /// Whether the loop device bypasses the cache of the backing file (false where that file system can't).
    #[must_use]
    pub fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// Unmounts and mounts again: everything is on disk then and nothing in the page cache.
    ///
    /// # Errors
    /// `EBUSY` while something is open on it.
    pub fn remount(&mut self) -> Result<(), RigError> {
        unmount(&self.mount_point)?;
        self.direct_io = mount_image(self.fs, &self.image(), &self.mount_point)?;
        Ok(())
    }

    fn image(&self) -> PathBuf {
        self.home.join(base::IMAGE)
    }
}

impl Drop for LoopRig {
    fn drop(&mut self) {
        base::dismantle(&self.home);
        self.lock = None;
        if let Some(mut watcher) = self.watcher.take() {
            // A line tells the watcher that there is nothing left to do; a bare end of file means that we died.
            if let Some(mut pipe) = watcher.stdin.take() {
                let _ = pipe.write_all(b"done\n");
            }
            let _ = watcher.wait();
        }
    }
}

/// Makes a sparse file of `bytes` bytes at `image` and a file system of `fs` in it.
///
/// # Errors
/// A missing program, no space, `image` exists.
pub fn make_image(fs: RigFs, image: &Path, bytes: u64) -> Result<(), RigError> {
    let file = rustix::fs::open(
        image,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::RUSR | Mode::WUSR,
    )
    .map_err(|e| RigError::io("create", image, e.into()))?;
    rustix::fs::ftruncate(&file, bytes).map_err(|e| RigError::io("size", image, e.into()))?;
    drop(file);
    let (program, package, args) = fs.mkfs();
    let make = || tools::run(program, package, args.iter().map(OsStr::new).chain([image.as_os_str()]));
    // mkfs.btrfs asks every mounted loop device for its file and gives up when one goes meanwhile.
    let passes = |made: &Result<Vec<u8>, RigError>| match made {
        Err(RigError::Program { stderr, .. }) => stderr.contains("cannot check mount status"),
        _ => false,
    };
    let mut made = make();
    for _ in 0..50 {
        if !passes(&made) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        made = make();
    }
    made.map(drop)
}

/// Mounts the file system in `image` at `at`; the loop device goes away with the mount. True when the loop device
/// does direct I/O.
///
/// # Errors
/// No loop devices, a kernel without this file system, no permission.
pub fn mount_image(fs: RigFs, image: &Path, at: &Path) -> Result<bool, RigError> {
    let (device, direct_io) = tools::attach_loop(image)?;
    let mounted = tools::run(
        "mount",
        "mount",
        ["-t", fs.kind(), "-o", fs.mount_options()]
            .map(OsStr::new)
            .into_iter()
            .chain([device.as_os_str(), at.as_os_str()]),
    );
    // While mounted, "detach" only sets autoclear; when the mount failed it detaches at once. Both are wanted.
    let detached = tools::run("losetup", "mount", [OsStr::new("-d"), device.as_os_str()]);
    mounted?;
    detached?;
    Ok(direct_io)
}

/// Starts the process that outlives us: it waits on a pipe that the kernel closes when we die.
///
/// In a process group of its own, so that Ctrl-C reaches only us. A shell is enough, and unlike a forked copy of this
/// program it holds none of our memory or descriptors.
fn spawn_watcher(home: &Path) -> Result<Child, RigError> {
    use std::os::unix::process::CommandExt;
    const SCRIPT: &str = r#"
        trap '' INT TERM HUP QUIT
        read -r word && [ "$word" = done ] && exit 0
        umount -R "$1/mnt" 2>/dev/null || umount -Rl "$1/mnt" 2>/dev/null
        losetup -j "$1/backing.img" 2>/dev/null | cut -d: -f1 | while read -r dev; do losetup -d "$dev"; done
        rm -rf --one-file-system -- "$1"
    "#;
    Command::new("/bin/sh")
        .args(["-c", SCRIPT, "pagefold-rig-watcher"])
        .arg(home)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| RigError::io("start", Path::new("/bin/sh"), e))
}

/// Takes the lock on `file` if nobody holds it.
fn try_lock(file: &OwnedFd) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}
