//! Real files of overlays whose lower layers hold attributes only, and data-only layers the data: pagefold's own views, and
//! composefs.
//!
//! ```text
//! upper      a whole file           ─► it is the real one
//!            attributes (metacopy) ─┐
//! lower      attributes, redirect ──┴─► file of that name in a data-only layer
//! ```
//!
//! Invariant: a file of a data-only layer is named only if the overlay file has its very extents and size, and the attributes
//! that lead to it are the ones that the overlay shows. What it deliberately does not do: follow redirects between ordinary
//! lower layers (metacopy without data-only layers).

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use pagefold_sys::fiemap::{Sync as MapSync, read_extents};
use pagefold_sys::handle;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use super::{Looks, NoLayers, Options, OriginHandle, open_and_describe, open_quietly, same_fs};
use crate::fsid::{self, FsFacts};

/// The layers of such a mount.
#[derive(Debug)]
pub(super) struct Metacopy {
    /// Ordinary lower layers.
    lowers: Vec<Lower>,
    /// Data-only layers in the order in which the kernel looks into them.
    data: Vec<OwnedFd>,
    /// Files that are born in the upper, copies included, have a birth time; or there is no upper.
    births: bool,
}

#[derive(Debug)]
struct Lower {
    dir: OwnedFd,
    uuid: Option<[u8; 16]>,
    /// It lies on the file system of the data.
    has_identity: bool,
}

impl Metacopy {
    /// Opens the layers; with the file system that all data is on.
    pub(super) fn find(options: &Options) -> Result<(FsFacts, OwnedFd, Metacopy), NoLayers> {
        let mut found: Option<(FsFacts, OwnedFd)> = None;
        let mut data = Vec::new();
        for path in &options.data {
            let (facts, fd) = open_and_describe(path).ok_or(NoLayers::Metacopy)?;
            match &found {
                Some((first, _)) if !same_fs(first, &facts) => return Err(NoLayers::SeveralFs),
                Some(_) => data.push(fd),
                None => {
                    data.push(rustix::io::fcntl_dupfd_cloexec(&fd, 0).map_err(|_| NoLayers::Metacopy)?);
                    found = Some((facts, fd));
                }
            }
        }
        let (facts, anchor) = found.ok_or(NoLayers::Metacopy)?;
        let mut lowers = Vec::new();
        for path in &options.lower {
            let (of_layer, dir) = open_and_describe(path).ok_or(NoLayers::Metacopy)?;
            let has_identity = same_fs(&facts, &of_layer);
            if !has_identity && of_layer.description.kind != "erofs" {
                return Err(NoLayers::SeveralFs);
            }
            lowers.push(Lower { uuid: fsid::uuid(dir.as_fd()), dir, has_identity });
        }
        let births = options.upper.as_deref().is_none_or(has_birth_times);
        Ok((facts, anchor, Metacopy { lowers, data, births }))
    }

    /// The real file behind `file`, which looks as `seen`. `upper` is the file of its path in the upper, if there is one.
    pub(super) fn real_file(
        &self,
        file: BorrowedFd<'_>,
        seen: &Looks,
        origin: Option<&OriginHandle>,
        upper: Option<OwnedFd>,
    ) -> Option<OwnedFd> {
        if let Some(upper) = upper {
            let shown = Looks::of(upper.as_fd()).ok()?;
            if !is_metacopy(upper.as_fd()) {
                if shown.is_same(seen) {
                    return Some(upper);
                }
            } else if shown.is_same_but_blocks(seen) {
                let (lower, _) = self.open_lower(origin?)?;
                return self.data_of(file, seen, lower.as_fd());
            }
        }
        let (lower, has_identity) = self.open_lower(origin?)?;
        let shown = Looks::of(lower.as_fd()).ok()?;
        // An image has no birth times, and what was copied up has one: without any it is not a copy.
        let is_shown = shown.is_same_but_blocks(seen)
            || self.births && !shown.has_birth() && !seen.has_birth() && shown.has_same_attributes(seen);
        if !is_shown {
            return None;
        }
        if is_metacopy(lower.as_fd()) {
            return self.data_of(file, seen, lower.as_fd());
        }
        (has_identity && shown.stat.stx_blocks == seen.stat.stx_blocks).then_some(lower)
    }

    /// The lower file that a handle names, and whether it lies where addresses are identity.
    fn open_lower(&self, origin: &OriginHandle) -> Option<(OwnedFd, bool)> {
        let open = |lower: &Lower| {
            let by_handle =
                |flags| handle::open_by_handle(lower.dir.as_fd(), origin.kind, &origin.fid, flags);
            open_quietly(by_handle).ok().map(|fd| (fd, lower.has_identity))
        };
        self.lowers.iter().filter(|lower| lower.uuid == Some(origin.uuid)).find_map(open)
    }

    /// The file of a data-only layer that the attributes in `lower` lead to.
    fn data_of(&self, file: BorrowedFd<'_>, seen: &Looks, lower: BorrowedFd<'_>) -> Option<OwnedFd> {
        let mut redirect = [0u8; 4096];
        let length = rustix::fs::fgetxattr(lower, "trusted.overlay.redirect", &mut redirect[..]).ok()?;
        let path = Path::new(OsStr::from_bytes(redirect[..length].strip_prefix(b"/")?));
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let data = self.data.iter().find_map(|layer| {
            let open = |flags| {
                Ok(rustix::fs::openat2(layer, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
            };
            open_quietly(open).ok()
        })?;
        let look = Looks::of(data.as_fd()).ok()?;
        let is_it = look.stat.stx_size == seen.stat.stx_size
            && look.stat.stx_blocks == seen.stat.stx_blocks
            && map(data.as_fd(), seen.stat.stx_size)? == map(file, seen.stat.stx_size)?;
        is_it.then_some(data)
    }
}

fn is_metacopy(file: BorrowedFd<'_>) -> bool {
    use rustix::io::Errno;
    let mut value = [0u8; 64];
    match rustix::fs::fgetxattr(file, "trusted.overlay.metacopy", &mut value[..]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => false,
        // Present, whatever it holds; or unknown, and then its data is not claimed to be here.
        Ok(_) | Err(_) => true,
    }
}

fn has_birth_times(upper: &Path) -> bool {
    rustix::fs::statx(rustix::fs::CWD, upper, AtFlags::empty(), StatxFlags::BTIME)
        .is_ok_and(|s| StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::BTIME))
}

/// (logical, physical, length) of each extent, in bytes.
fn map(file: BorrowedFd<'_>, size: u64) -> Option<Vec<(u64, u64, u64)>> {
    let mut map = Vec::new();
    read_extents(file, size, MapSync::No, |e| map.push((e.logical, e.physical, e.length))).ok()?;
    Some(map)
}
