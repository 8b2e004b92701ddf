//! The writable layer of a root's view, before anything is written to it.
//!
//! The image says nothing about the root directory itself (so that clones share one image); the upper's root says it. Quota: what a
//! view writes lies in the upper, so upper and work get the raw root's project id, both the same, for a rename between two
//! projects gives `EXDEV` and overlayfs renames from work to upper.
//!
//! Invariant: [`prepare`] writes nothing outside the directory it is given. What it deliberately does not do: make that
//! directory durable; who publishes the root syncs first.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pagefold_sys::attr::{XFLAG_PROJINHERIT, file_attributes, set_file_attributes};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::tree::{EntryId, Meta, Tree};
use crate::store::{ContentHash, ImageDigest, step};

/// The upper's directory in a root's directory.
pub const UPPER: &str = "upper";
/// Overlayfs' own scratch directory, beside it.
pub const WORK: &str = "work";
/// Beside them while the upper is being emptied: what it holds then is a part, and nobody's state.
const DISCARDING: &str = "discarding";

/// Why an upper could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{op} {path:?}: {error}{hint}")]
pub struct UpperError {
    op: &'static str,
    path: PathBuf,
    error: Errno,
    hint: &'static str,
}

impl UpperError {
    /// What the kernel said.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.error
    }
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> UpperError {
    let path = path.to_path_buf();
    move |error| {
        let hint = match error {
            Errno::NOSPC | Errno::DQUOT => "; make room on the store's file system",
            Errno::OPNOTSUPP => "; the store's file system can't hold this attribute of the root directory",
            _ => "",
        };
        UpperError { op, path, error, hint }
    }
}

/// Makes `upper/` and `work/` in `root_dir` (which exists); the upper's root gets the metadata of the tree's root and both get the
/// project of `raw_root`. Run again it finishes what was begun, as long as nothing was written to the view.
///
/// # Errors
/// [`UpperError`]; what was made stays, for the caller drops all of `root_dir`.
pub fn prepare(root_dir: &Path, tree: &Tree, raw_root: BorrowedFd<'_>) -> Result<(), UpperError> {
    let project = Project::of(raw_root);
    let (upper_path, work_path) = (root_dir.join(UPPER), root_dir.join(WORK));
    let upper = make(&upper_path, project)?;
    let work = make(&work_path, project)?;
    rustix::fs::fchmod(&work, Mode::RWXU).map_err(failed("change the mode of", &work_path))?;
    dress(upper.as_fd(), &upper_path, &tree.inode(EntryId(0)).meta)
}

fn make(path: &Path, project: Project) -> Result<OwnedFd, UpperError> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(failed("create", path)(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))?;
    project.give_to(fd.as_fd()).map_err(|e| failed("set the project id of", path)(errno(&e)))?;
    Ok(fd)
}

/// Whose quota a directory counts to, and whether what is made in it does too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Project {
    id: u32,
    inherit: bool,
}

impl Project {
    /// No project where the file system has none.
    fn of(dir: BorrowedFd<'_>) -> Project {
        file_attributes(dir)
            .map(|a| Project { id: a.project, inherit: a.flags & XFLAG_PROJINHERIT != 0 })
            .unwrap_or_default()
    }

    /// Also where it is none: the store's directory may carry a project, which `dir` has inherited then.
    fn give_to(self, dir: BorrowedFd<'_>) -> io::Result<()> {
        if self == Project::of(dir) {
            return Ok(());
        }
        let mut attributes = file_attributes(dir)?;
        attributes.project = self.id;
        attributes.flags &= !XFLAG_PROJINHERIT;
        if self.inherit {
            attributes.flags |= XFLAG_PROJINHERIT;
        }
        set_file_attributes(dir, attributes)
    }
}

/// Gives `dir` the metadata `meta`: owner first (it clears setuid and setgid), times last.
fn dress(dir: BorrowedFd<'_>, path: &Path, meta: &Meta) -> Result<(), UpperError> {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::fchown(dir, Some(uid), Some(gid)).map_err(failed("change the owner of", path))?;
    let wanted: HashSet<&[u8]> = meta.xattrs.iter().map(|(name, _)| &name[..]).collect();
    for name in list_xattrs(dir).map_err(failed("list the attributes of", path))? {
        // An ACL that the store's directory handed down; overlayfs' own marks stay.
        if name.starts_with(b"system.posix_acl") && !wanted.contains(&name[..]) {
            rustix::fs::fremovexattr(dir, OsStr::from_bytes(&name))
                .map_err(failed("remove an attribute of", path))?;
        }
    }
    for (name, value) in &meta.xattrs {
        rustix::fs::fsetxattr(dir, OsStr::from_bytes(&stored_name(name)), value, XattrFlags::empty())
            .map_err(failed("set an attribute of", path))?;
    }
    rustix::fs::fchmod(dir, Mode::from_raw_mode(meta.mode)).map_err(failed("change the mode of", path))?;
    let mtime = Timespec { tv_sec: meta.mtime.0, tv_nsec: meta.mtime.1.into() };
    let times = Timestamps { last_access: mtime, last_modification: mtime };
    rustix::fs::futimens(dir, &times).map_err(failed("set the times of", path))
}

/// How an upper stores an attribute: overlayfs takes `overlay.` off again when it is read through the view.
pub(super) fn stored_name(name: &[u8]) -> Vec<u8> {
    const OVERLAY: &[u8] = b"trusted.overlay.";
    match name.strip_prefix(OVERLAY) {
        Some(rest) => [OVERLAY, b"overlay.", rest].concat(),
        None => name.to_vec(),
    }
}

fn list_xattrs(file: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    // The kernel's own limit of a list (XATTR_LIST_MAX).
    let mut buffer = vec![0u8; 64 << 10];
    let length = match rustix::fs::flistxattr(file, &mut buffer[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e),
    };
    Ok(buffer[..length].split(|b| *b == 0).filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Whether nothing was ever written to the view of this root directory: the upper is empty and its root is as sealed.
///
/// `sealed` is the root directory's metadata from the manifest; overlayfs' own marks don't count.
///
/// # Errors
/// As the upper can't be read.
pub fn is_pristine(root_dir: &Path, sealed: &Meta) -> io::Result<bool> {
    if is_half_discarded(root_dir) {
        return Ok(false);
    }
    let path = root_dir.join(UPPER);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let upper = rustix::fs::open(&path, flags, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(&upper)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(is_dressed(upper.as_fd(), sealed)?)
}

fn is_dressed(upper: BorrowedFd<'_>, sealed: &Meta) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(upper)?;
    let same = stat.st_mode & 0o7777 == sealed.mode
        && (stat.st_uid, stat.st_gid) == (sealed.uid, sealed.gid)
        && (stat.st_mtime, stat.st_mtime_nsec) == (sealed.mtime.0, u64::from(sealed.mtime.1));
    if !same {
        return Ok(false);
    }
    let mut found = 0;
    for name in list_xattrs(upper)? {
        let Some(shown) = shown_name(&name) else { continue };
        let Some((_, value)) = sealed.xattrs.iter().find(|(n, _)| n[..] == shown[..]) else {
            return Ok(false);
        };
        let mut buffer = vec![0; 64 << 10];
        let length = rustix::fs::fgetxattr(upper, OsStr::from_bytes(&name), &mut buffer[..])?;
        if buffer[..length] != value[..] {
            return Ok(false);
        }
        found += 1;
    }
    Ok(found == sealed.xattrs.len())
}

/// The name a view shows for an attribute of its upper; `None` for overlayfs' own marks.
fn shown_name(name: &[u8]) -> Option<Vec<u8>> {
    match name.strip_prefix(b"trusted.overlay.") {
        Some(rest) => rest.strip_prefix(b"overlay.").map(|r| [b"trusted.overlay.", r].concat()),
        None => Some(name.to_vec()),
    }
}

/// Whether the upper belongs to views of `layers` with the layer of differences `diff` over them; one that belongs to none yet belongs to them
/// from now on.
///
/// The kernel compares the topmost layer only. The mark's name is in
/// overlayfs' own name space, so no view shows it and none can change it.
///
/// # Errors
/// As reading and setting an attribute.
pub(super) fn belongs_to(
    upper: BorrowedFd<'_>,
    layers: &[ImageDigest],
    diff: Option<ContentHash>,
) -> Result<bool, Errno> {
    const MARK: &std::ffi::CStr = c"trusted.overlay.pagefold";
    let mut hasher = blake3::Hasher::new_derive_key("pagefold layers of an upper 1");
    for digest in layers {
        hasher.update(&digest.0);
    }
    if let Some(digest) = diff {
        hasher.update(b"diff");
        hasher.update(&digest.0);
    }
    let wanted = hasher.finalize();
    let mut value = [0u8; 64];
    match rustix::fs::fgetxattr(upper, MARK, &mut value[..]) {
        Ok(length) => Ok(value[..length] == wanted.as_bytes()[..]),
        Err(Errno::NODATA) => {
            rustix::fs::fsetxattr(upper, MARK, wanted.as_bytes(), XattrFlags::CREATE)?;
            Ok(true)
        }
        // Longer than ours.
        Err(Errno::RANGE) => Ok(false),
        Err(e) => Err(e),
    }
}

/// What [`discard`] left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discarded {
    /// Entries of the upper that were removed, directories counted.
    pub entries: u64,
    /// A commit of them had begun and not ended: the raw root holds a part. To commit again puts it right.
    pub half_committed: bool,
}

/// Whether a [`discard`] was interrupted. A whiteout or an opaque directory that is left without what went with it would hide,
/// and a commit would delete, what the view never lacked.
#[must_use]
pub fn is_half_discarded(root_dir: &Path) -> bool {
    root_dir.join(DISCARDING).exists()
}

/// Empties the upper and makes it as it was when sealed. Only for an upper that nobody has mounted ([`super::live`]).
///
/// The order matters: entries go first, the root's own metadata last, so that an interrupted discard is seen as "not pristine"
/// and is done again: by whoever uses the upper next ([`is_half_discarded`]). Overlayfs' index (in work) goes too, and the marks on
/// the root stay: they name the image.
///
/// # Errors
/// [`UpperError`] of the first thing that could not be removed.
pub fn discard(root_dir: &Path, sealed: &Meta) -> Result<Discarded, UpperError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mark = root_dir.join(DISCARDING);
    put_mark(root_dir, &mark).map_err(failed("create", &mark))?;
    let emptied = |name: &str| {
        let path = root_dir.join(name);
        let dir = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("open", &path))?;
        empty(dir, &path)
    };
    let entries = emptied(UPPER)?;
    // Overlayfs' own: nobody wrote it.
    emptied(WORK)?;
    step("discard.emptied");
    let path = root_dir.join(UPPER);
    let upper = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("open", &path))?;
    let names = list_xattrs(upper.as_fd()).map_err(failed("list the attributes of", &path))?;
    for name in names {
        let kept = shown_name(&name).is_none_or(|n| sealed.xattrs.iter().any(|(s, _)| s[..] == n[..]));
        if !kept {
            rustix::fs::fremovexattr(&upper, OsStr::from_bytes(&name))
                .map_err(failed("remove an attribute of", &path))?;
        }
    }
    dress(upper.as_fd(), &path, sealed)?;
    // All that went is gone on disk before the mark is.
    rustix::fs::syncfs(&upper).map_err(failed("sync", &path))?;
    rustix::fs::unlink(&mark).map_err(failed("remove", &mark))?;
    Ok(Discarded { entries, half_committed: false })
}

fn put_mark(root_dir: &Path, mark: &Path) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::fsync(rustix::fs::open(mark, flags, Mode::RUSR)?)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::fsync(rustix::fs::open(root_dir, flags, Mode::empty())?)
}

/// Removes everything in `dir`, without recursion: a hostile tree may be as deep as it likes. Descriptors of the directories on
/// the way are not kept; `..` leads back, and nobody else has this tree.
fn empty(dir: OwnedFd, path: &Path) -> Result<u64, UpperError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let (mut at, mut way, mut removed) = (dir, Vec::<Vec<u8>>::new(), 0u64);
    loop {
        let mut below = None;
        let list = rustix::fs::Dir::read_from(&at).map_err(failed("list", path))?;
        for entry in list {
            let entry = entry.map_err(failed("list", path))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            match rustix::fs::unlinkat(&at, name, AtFlags::empty()) {
                Ok(()) => {
                    removed += 1;
                    step("discard.entry");
                }
                Err(Errno::ISDIR | Errno::PERM) => {
                    match rustix::fs::unlinkat(&at, name, AtFlags::REMOVEDIR) {
                        Ok(()) => removed += 1,
                        Err(Errno::NOTEMPTY | Errno::EXIST) => {
                            below = Some(name.to_owned());
                            break;
                        }
                        Err(e) => return Err(failed("remove from", path)(e)),
                    }
                }
                Err(e) => return Err(failed("remove from", path)(e)),
            }
        }
        at = if let Some(name) = below {
            let next =
                rustix::fs::openat(&at, &name, flags, Mode::empty()).map_err(failed("open in", path))?;
            way.push(name.into_bytes());
            next
        } else if let Some(name) = way.pop() {
            let up = rustix::fs::openat(&at, c"..", flags, Mode::empty()).map_err(failed("open in", path))?;
            rustix::fs::unlinkat(&up, OsStr::from_bytes(&name), AtFlags::REMOVEDIR)
                .map_err(failed("remove from", path))?;
            removed += 1;
            up
        } else {
            return Ok(removed);
        };
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
