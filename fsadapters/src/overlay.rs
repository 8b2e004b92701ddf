//! Which real inode holds the pages of a file on overlayfs.
//!
//! Pages belong to the inode of a layer, not to the overlay's: `cachestat` of an overlay file says 0, and two overlays over
//! one lower file share its pages although `st_dev` and `st_ino` differ. So a file is found again in its layer and looked
//! at there.
//!
//! How: `name_to_handle_at(AT_HANDLE_FID)` of an overlay file (Linux 6.6) holds the layer's own handle and file-system UUID.
//! The trap: after a copy-up it still names the *lower* file ("origin"; only a file born in the upper is named there).
//! `statx`, however, is answered from the real inode, birth time included. So the lower file is opened by its handle, and
//! only if its birth time, ctime, mtime, size and blocks are the overlay's is it the real one; otherwise the file of the
//! same path in the upper directory must pass the same test; otherwise nothing is claimed.
//!
//! Invariant: [`RealFile::Open`] is the inode whose pages the overlay file shows, on the file system that
//! [`OverlayFs::layers`] describes. What it deliberately does not do: follow `metacopy` (attributes in one layer, data in
//! another) but into data-only layers (module `metacopy`): such mounts have no physical identity here. Limits: without `CAP_DAC_READ_SEARCH` real inodes can only be named,
//! then a layer scanned beside its overlay is counted apart, and copied-up files whose ctimes and birth times agree to the clock tick count once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pagefold_sys::handle;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};

use crate::fsid::{self, FsFacts};
use crate::mountinfo::{self, Mount};
use crate::regular::Regular;
use crate::source::InodeId;

mod metacopy;

use metacopy::Metacopy;

/// One overlay mount. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OverlayFs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    below: Result<Below, NoLayers>,
    mount_point: PathBuf,
}

/// The layers' file system, when all known layers are on one.
#[derive(Debug)]
struct Below {
    facts: FsFacts,
    /// A directory of it: handles are opened relative to it.
    anchor: OwnedFd,
    /// The upper directory where it could be opened.
    upper: Option<OwnedFd>,
    /// Attributes and data are in different layers.
    metacopy: Option<Metacopy>,
}

/// Why nothing is known of the layers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoLayers {
    /// The mount belongs to another mount namespace.
    #[error("overlay: its mount is not in this mount namespace")]
    NoMount,
    /// Data and attributes may come from different inodes, and no data-only layers say from which.
    #[error("overlay with metacopy: the inode that holds the data is not known")]
    Metacopy,
    /// Layers on more than one file system.
    #[error("overlay: its layers are on several file systems")]
    SeveralFs,
    /// No layer could be opened, nor a file system of its UUID found.
    #[error("overlay: the file system of its layers was not found")]
    NotFound,
    /// The file system of the layers has no physical identity itself.
    #[error("overlay: {0}")]
    Below(String),
}

/// What is known of the inode behind an overlay file.
#[derive(Debug)]
pub enum RealFile {
    /// It, opened for reading: ask it for everything.
    Open(OwnedFd),
    /// Only a name for it: equal names are one inode. No physical identity, and dirty pages can't be asked for.
    Named(InodeId),
}

impl OverlayFs {
    /// Finds out about the overlay mount that `dir` was opened through.
    #[must_use]
    pub fn of(dir: BorrowedFd<'_>) -> Self {
        let mounts = mountinfo::read().unwrap_or_default();
        let id = fsid::mount_id(dir);
        let mount = mounts.iter().find(|m| Some(m.id) == id);
        let below = mount.ok_or(NoLayers::NoMount).and_then(|mount| Below::find(dir, mount, &mounts));
        let mount_point = mount.map(|m| m.mount_point.clone()).unwrap_or_default();
        OverlayFs { inner: Arc::new(Inner { below, mount_point }) }
    }

    /// The file system that all layers are on; a file behind [`RealFile::Open`] certainly is.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn layers(&self) -> Result<&FsFacts, NoLayers> {
        self.inner.below.as_ref().map(|b| &b.facts).map_err(Clone::clone)
    }

    /// The real file behind `file`, a regular file of this overlay, open but not with `O_PATH`.
    ///
    /// # Errors
    /// Only when `file` itself can't be asked.
    pub fn real_file(&self, file: BorrowedFd<'_>) -> io::Result<RealFile> {
        let seen = Looks::of(file)?;
        let origin = handle::name_to_handle(file, c"").ok().and_then(|h| OriginHandle::parse(&h));
        if let Ok(below) = &self.inner.below
            && let Some(metacopy) = &below.metacopy
        {
            let upper = self.relative_path(file).and_then(|path| below.open_upper(&path));
            if let Some(real) = metacopy.real_file(file, &seen, origin.as_ref(), upper) {
                return Ok(RealFile::Open(real));
            }
        } else if let Ok(below) = &self.inner.below {
            let lower = origin.as_ref().and_then(|o| below.open_origin(o));
            if let Some(real) = lower.filter(|fd| Looks::of(fd.as_fd()).is_ok_and(|l| l.is_same(&seen))) {
                return Ok(RealFile::Open(real));
            }
            let upper = self.relative_path(file).and_then(|path| below.open_upper(&path));
            if let Some(real) = upper.filter(|fd| Looks::of(fd.as_fd()).is_ok_and(|l| l.is_same(&seen))) {
                return Ok(RealFile::Open(real));
            }
        }
        Ok(RealFile::Named(name_for(origin.as_ref(), &seen)))
    }

    /// The path of `file` below the overlay's mount point; redirects concern lower layers only, so it is the path in the
    /// upper directory too.
    fn relative_path(&self, file: BorrowedFd<'_>) -> Option<PathBuf> {
        use std::os::fd::AsRawFd;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        path.strip_prefix(&self.inner.mount_point).ok().map(Path::to_path_buf)
    }
}

impl Below {
    fn find(dir: BorrowedFd<'_>, mount: &Mount, mounts: &[Mount]) -> Result<Below, NoLayers> {
        let options = Options::parse(&mount.fs_options);
        let (facts, anchor, metacopy) = if options.metacopy {
            let (facts, anchor, metacopy) = Metacopy::find(&options)?;
            (facts, anchor, Some(metacopy))
        } else {
            let (facts, anchor) = Below::of_layers(dir, &options, mounts)?;
            (facts, anchor, None)
        };
        if let Some(why) = &facts.description.why_not {
            return Err(NoLayers::Below(why.clone()));
        }
        let upper = options.upper.filter(|p| p.is_absolute());
        let upper = upper.and_then(|path| open_and_describe(&path)).filter(|(f, _)| same_fs(f, &facts));
        Ok(Below { facts, anchor, upper: upper.map(|(_, fd)| fd), metacopy })
    }

    /// The one file system that all layers are on, and a directory of it.
    fn of_layers(
        dir: BorrowedFd<'_>,
        options: &Options,
        mounts: &[Mount],
    ) -> Result<(FsFacts, OwnedFd), NoLayers> {
        let mut found: Option<(FsFacts, OwnedFd)> = None;
        for path in options.layers().filter(|p| p.is_absolute()) {
            let Some((facts, fd)) = open_and_describe(path) else { continue };
            match &found {
                Some((first, _)) if !same_fs(first, &facts) => return Err(NoLayers::SeveralFs),
                Some(_) => {}
                None => found = Some((facts, fd)),
            }
        }
        let found = match found {
            Some(found) => Some(found),
            // Relative paths (container runtimes mount so when the option string would be too long): by UUID.
            None => handle::name_to_handle(dir, c"")
                .ok()
                .and_then(|h| OriginHandle::parse(&h))
                .and_then(|origin| only_fs_with(origin.uuid, mounts)),
        };
        found.ok_or(NoLayers::NotFound)
    }

    fn open_origin(&self, origin: &OriginHandle) -> Option<OwnedFd> {
        if origin.uuid != self.facts.description.uuid {
            return None;
        }
        open_quietly(|flags| handle::open_by_handle(self.anchor.as_fd(), origin.kind, &origin.fid, flags))
            .ok()
    }

    fn open_upper(&self, path: &Path) -> Option<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = rustix::fs::openat2(self.upper.as_ref()?, path, flags, Mode::empty(), resolve).ok()?;
        let regular = Regular::held(held).ok()??;
        open_quietly(|flags| Ok(regular.open(flags)?)).ok()
    }
}

/// Opens without changing the access time where that is allowed, and without waiting for anything.
fn open_quietly(open: impl Fn(OFlags) -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    open(flags | OFlags::NOATIME).or_else(|_| open(flags))
}

fn same_fs(a: &FsFacts, b: &FsFacts) -> bool {
    (a.description.uuid, a.description.instance) == (b.description.uuid, b.description.instance)
}

fn open_and_describe(path: &Path) -> Option<(FsFacts, OwnedFd)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    // An overlay as a layer is not looked through: its handles would be nested.
    let facts = fsid::describe(fd.as_fd()).ok().filter(|f| f.overlay.is_none())?;
    Some((facts, fd))
}

/// The one mounted file system with this UUID; none if there are two.
fn only_fs_with(uuid: [u8; 16], mounts: &[Mount]) -> Option<(FsFacts, OwnedFd)> {
    let mut found: Option<(FsFacts, OwnedFd)> = None;
    // Only kinds whose addresses may be identity: nothing that could block (autofs, network) is opened.
    let kinds = ["xfs", "btrfs", "ext4", "ext3", "ext2"];
    for mount in mounts.iter().filter(|m| kinds.contains(&m.kind.as_str())) {
        let Some((facts, fd)) = open_and_describe(&mount.mount_point) else { continue };
        if facts.description.uuid != uuid {
            continue;
        }
        match &found {
            Some((first, _)) if !same_fs(first, &facts) => return None,
            Some(_) => {}
            None => found = Some((facts, fd)),
        }
    }
    found
}

fn name_for(origin: Option<&OriginHandle>, seen: &Looks) -> InodeId {
    let Some(origin) = origin else { return seen.inode };
    let times = seen.times_and_size();
    let digest = fsid::digest(&[
        b"pagefold real inode",
        &origin.uuid,
        &origin.kind.to_le_bytes(),
        &origin.fid,
        &times,
    ]);
    let half = |part: &[u8]| u64::from_le_bytes(part.try_into().unwrap_or_default());
    InodeId { dev: half(&digest[..8]), ino: half(&digest[8..]) }
}

/// What overlayfs passes on unchanged from the real inode.
#[derive(Debug)]
struct Looks {
    inode: InodeId,
    stat: Statx,
}

impl Looks {
    fn of(file: BorrowedFd<'_>) -> io::Result<Looks> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask)?;
        let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        Ok(Looks { inode: InodeId { dev, ino: stat.stx_ino }, stat })
    }

    fn times_and_size(&self) -> Vec<u8> {
        let s = &self.stat;
        let mut out = Vec::with_capacity(72);
        for time in [s.stx_btime, s.stx_ctime, s.stx_mtime] {
            out.extend(time.tv_sec.to_le_bytes());
            out.extend(time.tv_nsec.to_le_bytes());
        }
        out.extend(s.stx_size.to_le_bytes());
        out
    }

    /// Whether both are looks of one inode. A birth time is demanded: without it a fresh copy-up could pass for its origin.
    fn is_same(&self, other: &Looks) -> bool {
        self.is_same_but_blocks(other) && self.stat.stx_blocks == other.stat.stx_blocks
    }

    /// The same for an inode whose data may be another's: overlayfs shows that one's blocks.
    fn is_same_but_blocks(&self, other: &Looks) -> bool {
        self.has_birth() && other.has_birth() && self.has_same_attributes(other)
    }

    fn has_birth(&self) -> bool {
        StatxFlags::from_bits_retain(self.stat.stx_mask).contains(StatxFlags::BTIME)
    }

    fn has_same_attributes(&self, other: &Looks) -> bool {
        self.times_and_size() == other.times_and_size() && self.stat.stx_mode == other.stat.stx_mode
    }
}

/// The layer's handle inside an overlay's: `struct ovl_fh` (`fs/overlayfs/overlayfs.h`), three bytes of padding first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct OriginHandle {
    uuid: [u8; 16],
    kind: i32,
    fid: Vec<u8>,
}

impl OriginHandle {
    fn parse(handle: &handle::FileHandle) -> Option<OriginHandle> {
        const OVL_FILEID_V1: i32 = 0xf8;
        if handle.kind & 0xff != OVL_FILEID_V1 {
            return None;
        }
        Self::parse_stored(handle.bytes.get(3..)?)
    }

    /// As `trusted.overlay.origin` of a copied-up file holds it, without the padding.
    pub(crate) fn parse_stored(fh: &[u8]) -> Option<OriginHandle> {
        const MAGIC: u8 = 0xfb;
        const HEAD: usize = 5 + 16;
        let &[0, MAGIC, length, _flags, kind, ..] = fh else { return None };
        let uuid = fh.get(5..HEAD)?.try_into().ok()?;
        let fid = fh.get(HEAD..usize::from(length))?.to_vec();
        Some(OriginHandle { uuid, kind: i32::from(kind), fid })
    }

    /// Type number and encoding of the layer's own handle, whatever the layer's UUID.
    pub(crate) fn fid(self) -> (i32, Vec<u8>) {
        (self.kind, self.fid)
    }
}

/// The options of an overlay mount that say where its layers are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// Ordinary lower layers.
    lower: Vec<PathBuf>,
    /// Data-only layers.
    data: Vec<PathBuf>,
    upper: Option<PathBuf>,
    metacopy: bool,
}

impl Options {
    fn parse(text: &[u8]) -> Options {
        let mut options = Options::default();
        for option in text.split(|b| *b == b',') {
            let mut parts = option.splitn(2, |b| *b == b'=');
            let (key, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            match key {
                b"upperdir" => options.upper = Some(path(value)),
                // One list on older mounts, one option a layer on newer ones; "::" precedes data-only layers.
                b"lowerdir" => {
                    let mut is_data = false;
                    for part in value.split(|b| *b == b':') {
                        match (part.is_empty(), is_data) {
                            (true, _) => is_data = true,
                            (false, false) => options.lower.push(path(part)),
                            (false, true) => options.data.push(path(part)),
                        }
                    }
                }
                b"lowerdir+" => options.lower.push(path(value)),
                b"datadir+" => options.data.push(path(value)),
                b"metacopy" => options.metacopy = value == b"on",
                _ => {}
            }
        }
        options
    }

    fn layers(&self) -> impl Iterator<Item = &PathBuf> {
        self.lower.iter().chain(&self.data).chain(&self.upper)
    }
}

/// Undoes `/proc`'s escapes. A colon inside a name is `\072` there, so lists are split before.
fn path(value: &[u8]) -> PathBuf {
    mountinfo::unescape(value).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_name_all_layers() {
        let text = b"rw,lowerdir+=/a,lowerdir+=/b\\040c,datadir+=/d,upperdir=/u,workdir=/w,metacopy=on";
        let options = Options::parse(text);
        assert_eq!(options.lower, ["/a", "/b c"].map(PathBuf::from));
        assert_eq!(options.data, ["/d"].map(PathBuf::from));
        assert_eq!(options.upper, Some("/u".into()));
        assert!(options.metacopy);
        let options = Options::parse(b"rw,lowerdir=/a\\072x:l/B::/d,metacopy=off");
        assert_eq!(options.lower, ["/a:x", "l/B"].map(PathBuf::from));
        assert_eq!(options.data, ["/d"].map(PathBuf::from));
        assert!(!options.metacopy && options.upper.is_none());
    }

    #[test]
    fn a_handle_that_is_no_overlay_handle_is_refused() {
        let good = {
            let mut bytes = vec![0, 0, 0, 0, 0xfb, 5 + 16 + 2, 0, 0x81];
            bytes.extend([9; 16]);
            bytes.extend([1, 2]);
            bytes
        };
        let handle = |kind, bytes: &[u8]| handle::FileHandle { kind, bytes: bytes.to_vec(), mount: 1 };
        let parsed = OriginHandle::parse(&handle(0xf8, &good)).unwrap();
        assert_eq!(parsed, OriginHandle { uuid: [9; 16], kind: 0x81, fid: vec![1, 2] });
        assert_eq!(OriginHandle::parse(&handle(0x81, &good)), None);
        for cut in 0..good.len() {
            assert_eq!(OriginHandle::parse(&handle(0xf8, &good[..cut])), None, "cut at {cut}");
        }
        for length in 0..21 {
            let mut bad = good.clone();
            bad[5] = length;
            assert_eq!(OriginHandle::parse(&handle(0xf8, &bad)), None, "length {length}");
        }
    }
}
