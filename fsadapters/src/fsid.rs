//! What file system a directory is on, and whether its physical addresses name bytes.
//!
//! Invariant: physical identity is allowed only for file systems whose FIEMAP addresses are known to be unique within the
//! file system (design section 5, rule 1). Two mounted file systems never get one (UUID, instance), even if they are copies
//! of one image. What it deliberately does not do: look at files, except for [`device_class`].

use std::os::fd::BorrowedFd;

use pagefold_engine::identity::DeviceClass;
use pagefold_sys::identity;

use crate::mountinfo;
use crate::overlay::OverlayFs;
use crate::source::{FsDescription, FsError, FsOp};

/// Everything a scan wants to know about a file system.
#[derive(Debug)]
pub struct FsFacts {
    /// The part that the engine's caller sees.
    pub description: FsDescription,
    /// Files may lie on a second device with addresses of its own: ask [`device_class`] of every file.
    pub has_realtime: bool,
    /// An XFS or btrfs whose files can share blocks; an XFS is asked, for it may be made without.
    pub reflink: bool,
    /// Bytes of an allocation group of an XFS; 0 where that is not known or there are none.
    pub group_bytes: u64,
    /// The directory is on overlayfs: cache and inode are those of a file below (see [`crate::overlay`]).
    pub overlay: Option<OverlayFs>,
}

const XFS: u32 = 0x5846_5342;
const BTRFS: u32 = 0x9123_683e;
const EXT: u32 = 0xef53;
const OVERLAY: u32 = 0x794c_7630;
const TMPFS: u32 = 0x0102_1994;

/// Describes the file system that `dir` is on. Costs a few calls; on overlayfs also `/proc/self/mountinfo`.
///
/// # Errors
/// When `dir` can't be asked at all; an unknown file system is no error, it has no physical identity.
pub fn describe(dir: BorrowedFd<'_>) -> Result<FsFacts, FsError> {
    let stat_error = |e: rustix::io::Errno| FsError::new(FsOp::Stat, e);
    let magic = rustix::fs::fstatfs(dir).map_err(stat_error)?.f_type as u32;
    let dev = rustix::fs::fstat(dir).map_err(stat_error)?.st_dev;
    let kind = kind_of(dir, magic);
    if magic == OVERLAY {
        return Ok(describe_overlay(dir, dev, kind));
    }
    let geometry = (magic == XFS).then(|| identity::xfs_geometry(dir).ok()).flatten();
    let uuid = uuid_of(dir, magic, geometry.map(|g| g.uuid));
    let mut why_not = why_not_physical(magic, &kind);
    if uuid.is_none() && magic == BTRFS {
        // Every subvolume would be an identity of its own: equal pages would be counted apart, never different ones as equal.
        why_not = Some("the UUID of the btrfs could not be read".into());
    }
    let description = FsDescription {
        kind,
        uuid: uuid.unwrap_or_else(|| uuid_from_dev(dev)),
        instance: if magic == BTRFS { 0 } else { dev },
        physical_identity: why_not.is_none(),
        why_not,
    };
    // Unreadable geometry: then every file is asked for its device.
    let has_realtime = magic == XFS && geometry.is_none_or(|g| g.rt_blocks > 0);
    let reflink = magic == BTRFS || magic == XFS && geometry.is_none_or(|g| g.reflink);
    let group_bytes = geometry.map_or(0, |g| g.group_bytes);
    Ok(FsFacts { description, has_realtime, reflink, group_bytes, overlay: None })
}

fn describe_overlay(dir: BorrowedFd<'_>, dev: u64, kind: String) -> FsFacts {
    let overlay = OverlayFs::of(dir);
    match overlay.layers() {
        Ok(below) => FsFacts {
            description: FsDescription { kind, ..below.description.clone() },
            has_realtime: below.has_realtime,
            reflink: below.reflink,
            group_bytes: below.group_bytes,
            overlay: Some(overlay),
        },
        Err(why_not) => {
            let description = FsDescription {
                kind,
                uuid: uuid_from_dev(dev),
                instance: dev,
                physical_identity: false,
                why_not: Some(why_not.to_string()),
            };
            FsFacts {
                description,
                has_realtime: false,
                reflink: false,
                group_bytes: 0,
                overlay: Some(overlay),
            }
        }
    }
}

/// Whether an open file is on overlayfs; `None` when it can't be asked.
#[must_use]
pub fn is_overlay(file: BorrowedFd<'_>) -> Option<bool> {
    rustix::fs::fstatfs(file).ok().map(|fs| fs.f_type as u32 == OVERLAY)
}

/// Which device the data of an open file is on. Unknown is told as `None`: then its addresses are no identity.
#[must_use]
pub fn device_class(file: BorrowedFd<'_>, has_realtime: bool) -> Option<DeviceClass> {
    if !has_realtime {
        return Some(DeviceClass::Data);
    }
    match identity::is_realtime(file) {
        Ok(true) => Some(DeviceClass::Realtime),
        Ok(false) => Some(DeviceClass::Data),
        Err(_) => None,
    }
}

fn kind_of(dir: BorrowedFd<'_>, magic: u32) -> String {
    match magic {
        XFS => return "xfs".into(),
        BTRFS => return "btrfs".into(),
        OVERLAY => return "overlay".into(),
        TMPFS => return "tmpfs".into(),
        _ => {}
    }
    // Asked for only here: with thousands of mounts the file is long.
    let mount = mount_id(dir);
    let found = mountinfo::read().ok().and_then(|all| all.into_iter().find(|m| Some(m.id) == mount));
    match (found, magic) {
        (Some(mount), _) => mount.kind,
        (None, EXT) => "ext4".into(),
        (None, other) => format!("unknown ({other:#x})"),
    }
}

/// The id of the mount that `fd` was opened through (`STATX_MNT_ID`, Linux 5.8).
#[must_use]
pub fn mount_id(fd: BorrowedFd<'_>) -> Option<u64> {
    use rustix::fs::{AtFlags, StatxFlags};
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::MNT_ID).then_some(stat.stx_mnt_id)
}

/// The UUID of the file system that an open file or directory is on; `None` where it has none (overlayfs, tmpfs, ...).
#[must_use]
pub fn uuid(file: BorrowedFd<'_>) -> Option<[u8; 16]> {
    let magic = rustix::fs::fstatfs(file).ok()?.f_type as u32;
    uuid_of(file, magic, identity::xfs_geometry(file).ok().map(|g| g.uuid))
}

fn uuid_of(dir: BorrowedFd<'_>, magic: u32, xfs: Option<[u8; 16]>) -> Option<[u8; 16]> {
    let announced = identity::fs_uuid(dir).ok().flatten();
    announced.or_else(|| match magic {
        BTRFS => identity::btrfs_fsid(dir).ok(),
        XFS => xfs,
        _ => None,
    })
}

/// Why addresses of this kind of file system are no identity; `None` where they are.
fn why_not_physical(magic: u32, kind: &str) -> Option<String> {
    match magic {
        // ext4 shares no blocks, so there its addresses are only unique; that still names holes and whole files exactly.
        XFS | BTRFS | EXT => None,
        TMPFS => Some("tmpfs has no extent maps".into()),
        // bcachefs, f2fs over several devices: an address is one of several devices'. Others: not examined.
        _ => Some(format!("extent addresses of {kind} are not known to be unique")),
    }
}

fn uuid_from_dev(dev: u64) -> [u8; 16] {
    digest(&[b"pagefold st_dev", &dev.to_le_bytes()])
}

pub(crate) fn digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut out = [0; 16];
    hasher.finalize_xof().fill(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn proc_has_no_physical_identity() {
        let dir = std::fs::File::open("/proc").unwrap();
        let facts = describe(dir.as_fd()).unwrap();
        assert_eq!(facts.description.kind, "proc");
        assert!(!facts.description.physical_identity);
        assert!(facts.description.why_not.is_some());
    }
}
