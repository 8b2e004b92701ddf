//! Where a store is, and whether its directory can be trusted.
//!
//! Invariant: a directory is used only if it is a real directory (no symbolic link), owned by who runs this, mode 0700, and on btrfs a
//! subvolume of its own (a snapshot of the roots must not copy uppers and index). What it deliberately does not do: repair any of that;
//! it says how.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pagefold_sys::{attr, btrfs, handle};
use rustix::fs::{AtFlags, FileType, IFlags, Mode, OFlags};
use rustix::io::Errno;

use super::error::StoreError;
use super::index::{FORMAT, Identity};
use super::key::StoreId;
use crate::{fsid, mountinfo};

/// Name of the default directory, at the mount point of its file system.
const DEFAULT_NAME: &str = ".pagefold";
/// The file that says what the directory is.
pub(super) const FORMAT_FILE: &str = "FORMAT";

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The default store for roots at `path`: `.pagefold` at a mount point of its file system. With several mounts of one file
/// system (bind mounts, subvolumes) the one that has a store already, else the one that shows most of it.
///
/// # Errors
/// `path` is not there, or no mount of its file system is visible.
pub fn default_dir(path: &Path) -> Result<PathBuf, StoreError> {
    let io = |e: Errno| StoreError::io("find the file system of", path, e);
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(io)?;
    let id = fsid::mount_id(fd.as_fd());
    let mounts =
        mountinfo::read().map_err(|e| StoreError::io("read", Path::new("/proc/self/mountinfo"), e))?;
    let own = mounts.iter().find(|m| Some(m.id) == id);
    let own = own.ok_or_else(|| StoreError::io("find the mount of", path, Errno::NOENT))?;
    let mut shown: Vec<&mountinfo::Mount> = mounts
        .iter()
        .filter(|m| m.device == own.device && m.kind == own.kind && own.root.starts_with(&m.root))
        .filter(|m| m.id == own.id || is_visible(m))
        .collect();
    shown.sort_by_key(|m| (m.root.as_os_str().len(), m.id));
    let with_store = std::iter::once(&own)
        .chain(&shown)
        .map(|m| m.mount_point.join(DEFAULT_NAME))
        .find(|dir| has_format(dir));
    let most = shown.first().unwrap_or(&own).mount_point.join(DEFAULT_NAME);
    Ok(with_store.unwrap_or(most))
}

/// Whether our own store may be there. The top of a mount may be a user's directory, and what he puts there must not be what is found
/// before it.
fn has_format(dir: &Path) -> bool {
    let mine = |path: &Path| {
        rustix::fs::lstat(path).is_ok_and(|stat| stat.st_uid == rustix::process::geteuid().as_raw())
    };
    mine(dir) && mine(&dir.join(FORMAT_FILE))
}

/// Whether the mount point leads to that mount, and to a directory: others are hidden by later mounts.
fn is_visible(mount: &mountinfo::Mount) -> bool {
    rustix::fs::open(&mount.mount_point, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .is_ok_and(|fd| fsid::mount_id(fd.as_fd()) == Some(mount.id))
}

/// The path of the store without symbolic links above it; the last component need not exist.
pub(super) fn canonical(dir: &Path) -> Result<PathBuf, StoreError> {
    let absolute = std::path::absolute(dir).map_err(|e| StoreError::io("find", dir, e))?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        let why = "it is the root of the file tree".to_owned();
        return Err(StoreError::NotAStore { path: absolute, why });
    };
    let parent = parent.canonicalize().map_err(|e| StoreError::io("find the directory", parent, e))?;
    Ok(parent.join(name))
}

/// Opens the directory of an existing store; `None` when there is none.
pub(super) fn open_dir(dir: &Path) -> Result<Option<OwnedFd>, StoreError> {
    match rustix::fs::open(dir, DIR_FLAGS, Mode::empty()) {
        Ok(fd) => check_dir(dir, &fd).map(|()| Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => Err(untrusted(
            dir,
            "it is a symbolic link or no directory".to_owned(),
            "Name the directory itself (--store DIR)",
        )),
        Err(e) => Err(StoreError::io("open the store", dir, e)),
    }
}

fn untrusted(dir: &Path, why: String, remedy: &'static str) -> StoreError {
    StoreError::Untrusted { path: dir.to_owned(), why, remedy }
}

fn check_dir(dir: &Path, fd: &OwnedFd) -> Result<(), StoreError> {
    let stat = rustix::fs::fstat(fd).map_err(|e| StoreError::io("look at the store", dir, e))?;
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != me {
        let why = format!("it belongs to user {}, not to {me}", stat.st_uid);
        return Err(untrusted(dir, why, "Run as its owner (root), or name another directory (--store DIR)"));
    }
    if stat.st_mode & 0o7777 != 0o700 {
        // Somebody's directory: what is no store is not to be made to look like one.
        if read_format(dir, fd)?.is_none() {
            check_unfinished(dir, fd)?;
        }
        let why = format!(
            "its mode is {:04o}, not 0700: others can reach anchors and writes",
            stat.st_mode & 0o7777
        );
        return Err(untrusted(
            dir,
            why,
            "Find out who changed it, look at `pagefold verify`, then chmod 0700 it",
        ));
    }
    if is_btrfs(fd) && stat.st_ino != btrfs::SUBVOLUME_INO {
        let why = "it is a plain directory on btrfs: a snapshot of what it is in would copy index and writes"
            .to_owned();
        return Err(untrusted(
            dir,
            why,
            "Remove it if it is empty (pagefold makes it as a subvolume), or name another (--store DIR)",
        ));
    }
    Ok(())
}

fn is_btrfs(fd: &OwnedFd) -> bool {
    btrfs::subvolume_info(fd.as_fd()).is_ok()
}

/// Makes the directory of a new store.
pub(super) fn make_dir(dir: &Path) -> Result<OwnedFd, StoreError> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(StoreError::io("make the store", dir, Errno::INVAL));
    };
    outside_of_stores(dir, parent)?;
    let io = |e: Errno| StoreError::io("make the store", dir, e);
    let above = rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| StoreError::io("open", parent, e))?;
    if is_btrfs(&above) {
        make_subvolume(&above, name).map_err(|e| StoreError::io("make the subvolume", dir, e))?;
    } else {
        rustix::fs::mkdirat(&above, name, Mode::RWXU).map_err(io)?;
    }
    let fd = rustix::fs::openat(&above, name, DIR_FLAGS, Mode::empty()).map_err(io)?;
    // Whatever the directory above hands down: no access for others, no project, no extent hints, copy-on-write.
    rustix::fs::fchmod(&fd, Mode::RWXU).map_err(io)?;
    rustix::fs::fchown(&fd, Some(rustix::process::geteuid()), Some(rustix::process::getegid()))
        .map_err(io)?;
    check_dir(dir, &fd)?;
    rustix::fs::fsync(&above).map_err(|e| StoreError::io("sync", parent, e))?;
    Ok(fd)
}

/// A subvolume is made with mode 0777 but for the umask; nobody can use the moment until `fchmod`: it is empty, and what
/// others put into it makes it no empty directory, which is refused.
fn make_subvolume(above: &OwnedFd, name: &OsStr) -> std::io::Result<()> {
    btrfs::create_subvolume(above.as_fd(), name)
}

/// Drops what the new directory got from the one above and would hand down to anchors. What the file system doesn't have
/// can't be inherited: failures are no harm.
pub(super) fn shed_inheritance(fd: &OwnedFd) {
    for name in [c"system.posix_acl_default", c"system.posix_acl_access"] {
        let _ = rustix::fs::fremovexattr(fd, name);
    }
    if let Ok(mut attributes) = attr::file_attributes(fd.as_fd()) {
        attributes.flags &= !(attr::XFLAG_PROJINHERIT | attr::XFLAG_RTINHERIT | attr::XFLAG_EXTSZINHERIT);
        attributes.project = 0;
        attributes.extent_size = 0;
        if let Err(e) = attr::set_file_attributes(fd.as_fd(), attributes) {
            tracing::debug!("attributes of the store's directory stay as inherited: {e}");
        }
    }
    if let Ok(flags) = rustix::fs::ioctl_getflags(fd) {
        let _ = rustix::fs::ioctl_setflags(fd, flags.difference(IFlags::NOCOW | IFlags::COMPRESSED));
    }
}

/// A store in a store would be removed as garbage.
fn outside_of_stores(dir: &Path, parent: &Path) -> Result<(), StoreError> {
    for above in parent.ancestors() {
        let has = |name: &str| std::fs::symlink_metadata(above.join(name)).is_ok();
        if has(FORMAT_FILE) && has("index.redb") {
            return Err(StoreError::Nested { store: dir.to_owned(), root: above.to_owned() });
        }
    }
    Ok(())
}

/// What identifies the store that is being made in `fd`.
pub(super) fn identify(dir: &Path, fd: &OwnedFd) -> Result<Identity, StoreError> {
    let io = |e: Errno| StoreError::io("look at the store", dir, e);
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut id))
        .map_err(|e| StoreError::io("read", Path::new("/dev/urandom"), e))?;
    let facts = Facts::of(fd).map_err(io)?;
    Ok(Identity {
        format: FORMAT,
        id: StoreId(id),
        fs_uuid: facts.fs_uuid,
        subvolume: facts.subvolume,
        ino: facts.ino,
        handle: facts.handle,
        made_at: super::now(),
    })
}

/// What a copy can't have in common with the original.
struct Facts {
    fs_uuid: Option<[u8; 16]>,
    subvolume: Option<[u8; 16]>,
    ino: u64,
    handle: Option<(i32, Vec<u8>)>,
}

impl Facts {
    fn of(fd: &OwnedFd) -> Result<Facts, Errno> {
        Ok(Facts {
            fs_uuid: fsid::uuid(fd.as_fd()),
            subvolume: btrfs::subvolume_info(fd.as_fd()).ok().map(|s| s.uuid),
            ino: rustix::fs::fstat(fd)?.st_ino,
            handle: handle::name_to_handle(fd.as_fd(), c"").ok().map(|h| (h.kind, h.bytes)),
        })
    }
}

/// Is the store at `dir` the one that `identity` was written for?
pub(super) fn judge(dir: &Path, fd: &OwnedFd, identity: &Identity) -> Result<(), StoreError> {
    judge_format(dir, identity.format)?;
    let here = Facts::of(fd).map_err(|e| StoreError::io("look at the store", dir, e))?;
    let foreign = |why: &str| Err(StoreError::Foreign { path: dir.to_owned(), why: why.to_owned() });
    // An older kernel may not tell the UUID of some file systems.
    if let (Some(then), Some(now)) = (identity.fs_uuid, here.fs_uuid)
        && then != now
    {
        return foreign("it was made on another file system (or the UUID of this one was changed)");
    }
    if here.subvolume != identity.subvolume {
        return foreign("it is a snapshot or a copy: its subvolume is not the one it was made as");
    }
    // A mount option (inode32) or a kernel may change the kind of handle: then they can't be compared.
    let moved = match (&here.handle, &identity.handle) {
        (Some(now), Some(then)) => now.0 == then.0 && now.1.len() == then.1.len() && now.1 != then.1,
        _ => false,
    };
    if here.ino != identity.ino || moved {
        return foreign("it is a copy: its directory is not the one it was made in");
    }
    Ok(())
}

fn judge_format(dir: &Path, found: u32) -> Result<(), StoreError> {
    let path = dir.to_owned();
    match found.cmp(&FORMAT) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(StoreError::Newer { path, found, known: FORMAT }),
        std::cmp::Ordering::Less => Err(StoreError::Older { path, found, known: FORMAT }),
    }
}

/// The format of the store in `fd`; `None` when the file is not there: creation was never finished.
pub(super) fn read_format(dir: &Path, fd: &OwnedFd) -> Result<Option<u32>, StoreError> {
    let path = dir.join(FORMAT_FILE);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(fd, FORMAT_FILE, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(StoreError::io("open", &path, e)),
    };
    let mut buffer = [0; 512];
    let bytes = rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut buffer, 0))
        .map_err(|e| StoreError::io("read", &path, e))?;
    let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
    let format = text.lines().find_map(|line| line.strip_prefix("format ")?.trim().parse().ok());
    match format {
        Some(found) if found > FORMAT => judge_format(dir, found).map(|()| None),
        Some(found) if found > 0 && text.starts_with("pagefold store") => {
            judge_format(dir, found).map(|()| Some(found))
        }
        _ => Err(StoreError::NotAStore {
            path: dir.to_owned(),
            why: "its file FORMAT does not say that it is one".to_owned(),
        }),
    }
}

/// Writes `FORMAT`: with it the store exists.
pub(super) fn write_format(dir: &Path, fd: &OwnedFd) -> Result<(), StoreError> {
    let io = |e: Errno| StoreError::io("write", &dir.join(FORMAT_FILE), e);
    const NEW: &str = "FORMAT.new";
    let text = format!(
        "pagefold store\nformat {FORMAT}\n\nAnchors, metadata images and the writes of views. Made and understood by pagefold;\n\
         remove it with `pagefold unseal --all` and `pagefold uninstall`, never by hand.\n"
    );
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(fd, NEW, flags, Mode::RUSR | Mode::WUSR).map_err(io)?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let wrote = rustix::io::retry_on_intr(|| rustix::io::write(&file, rest)).map_err(io)?;
        rest = &rest[wrote..];
    }
    rustix::fs::fsync(&file).map_err(io)?;
    rustix::fs::renameat(fd, NEW, fd, FORMAT_FILE).map_err(io)?;
    rustix::fs::fsync(fd).map_err(io)
}

/// The directory of an unfinished creation holds nothing but what creation makes.
pub(super) fn check_unfinished(dir: &Path, fd: &OwnedFd) -> Result<(), StoreError> {
    let io = |e: Errno| StoreError::io("list", dir, e);
    const OURS: [&str; 10] = [
        "lock",
        "commits",
        "index.redb",
        "index.redb.new",
        "FORMAT.new",
        "anchors",
        "images",
        "roots",
        "mounts",
        "tmp",
    ];
    for entry in rustix::fs::Dir::read_from(fd).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") && !OURS.iter().any(|o| o.as_bytes() == name) {
            let why = format!("it holds {:?}", String::from_utf8_lossy(name));
            return Err(StoreError::NotAStore { path: dir.to_owned(), why });
        }
    }
    Ok(())
}

/// Makes the directory `name` if it is not there; anything else of that name is refused.
pub(super) fn ensure_subdir(dir: &Path, fd: &OwnedFd, name: &str) -> Result<OwnedFd, StoreError> {
    let path = || dir.join(name);
    match rustix::fs::mkdirat(fd, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(StoreError::io("make the directory", &path(), e)),
    }
    rustix::fs::openat(fd, name, DIR_FLAGS, Mode::empty())
        .map_err(|e| StoreError::io("open the directory", &path(), e))
}

/// Whether `name` is there at all.
pub(super) fn exists(fd: &OwnedFd, name: &str) -> bool {
    rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Whether `name` in `fd` is a directory.
pub(super) fn is_dir(fd: &OwnedFd, name: &str) -> bool {
    rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
}
