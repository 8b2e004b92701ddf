//! Puts layers together: one overlay, not attached anywhere yet.
//!
//! Invariants: `index=on` always: without it the kernel lets two mounts write one upper, and takes an upper that belongs to
//! another image (it only warns). Layers are handed over as descriptors, never looked up by name between check and use.
//! What it deliberately does not do: know stores; attach the mount.

use std::fmt::Write;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_string,
    fsmount, fsopen,
};

/// What an overlay is made of.
#[derive(Debug)]
pub struct Layers {
    /// Writable layer.
    pub upper: OwnedFd,
    /// Overlayfs' scratch directory: on the same mount as `upper`.
    pub work: OwnedFd,
    /// Layers of metadata, from top to bottom: of differences, image.
    pub images: Vec<OwnedFd>,
    /// Where their files find their data.
    pub data: Option<OwnedFd>,
    /// Detached mounts that layers were opened in: such a mount is dissolved when its own descriptor goes, and then overlayfs
    /// can't use it (`EINVAL`).
    pub mounts: Vec<OwnedFd>,
}

/// How layers are handed to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// As descriptors (Linux 6.13).
    Descriptors,
    /// One option a layer, `lowerdir+` and `datadir+`, each a path through `/proc/self/fd` (6.8).
    Options,
    /// One list of paths through `/proc/self/fd`, data behind `::` (6.5).
    List,
}

/// The name that all views have in `/proc/mounts`.
pub const SOURCE: &str = "pagefold";

/// An overlay that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("overlayfs: {errno}{}", if log.is_empty() { String::new() } else { format!(" (kernel: {log})") })]
pub struct Refused {
    /// Its answer.
    pub errno: Errno,
    /// What it wrote to the mount's log.
    pub log: String,
}

/// Assembles `layers`, trying the ways of handing them over from the newest on.
///
/// # Errors
/// `EBUSY`: the upper is mounted somewhere. `ESTALE`: the upper belongs to another image. Others as the kernel says.
pub fn overlay(layers: &Layers, attributes: MountAttrFlags) -> Result<OwnedFd, Refused> {
    let mut last = None;
    for handover in [Handover::Descriptors, Handover::Options, Handover::List] {
        match overlay_by(layers, attributes, handover) {
            // The options are checked before the layers are looked at, so this says nothing about them.
            Err(Step::Option(refused)) if matches!(refused.errno, Errno::INVAL | Errno::OPNOTSUPP) => {
                last = Some(refused);
            }
            Err(Step::Option(refused) | Step::Create(refused)) => return Err(refused),
            Ok(mount) => return Ok(mount),
        }
    }
    Err(last.unwrap_or(Refused { errno: Errno::NOSYS, log: String::new() }))
}

/// Assembles `layers` in one way only.
///
/// # Errors
/// As [`overlay`].
pub fn overlay_with(
    layers: &Layers,
    attributes: MountAttrFlags,
    handover: Handover,
) -> Result<OwnedFd, Refused> {
    overlay_by(layers, attributes, handover)
        .map_err(|(Step::Option(refused) | Step::Create(refused))| refused)
}

/// Where it failed.
enum Step {
    Option(Refused),
    Create(Refused),
}

fn overlay_by(layers: &Layers, attributes: MountAttrFlags, handover: Handover) -> Result<OwnedFd, Step> {
    let none = |errno| Step::Create(Refused { errno, log: String::new() });
    let context = fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(none)?;
    configure(context.as_fd(), layers, handover).map_err(|e| Step::Option(refused(&context, e)))?;
    fsconfig_create(&context).map_err(|e| Step::Create(refused(&context, e)))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|e| Step::Create(refused(&context, e)))
}

fn configure(context: BorrowedFd<'_>, layers: &Layers, handover: Handover) -> Result<(), Errno> {
    fsconfig_set_string(context, "source", SOURCE)?;
    let own = [(c"upperdir", &layers.upper), (c"workdir", &layers.work)];
    let lower = layers.images.iter().map(|fd| (c"lowerdir+", fd));
    let data = layers.data.iter().map(|fd| (c"datadir+", fd));
    match handover {
        Handover::Descriptors => {
            for (key, fd) in lower.chain(data).chain(own) {
                fsconfig_set_fd(context, key, fd)?;
            }
        }
        Handover::Options => {
            for (key, fd) in lower.chain(data).chain(own) {
                fsconfig_set_string(context, key, by_number(fd))?;
            }
        }
        Handover::List => {
            let mut list: Vec<String> = layers.images.iter().map(by_number).collect();
            if let Some(data) = &layers.data {
                let last = list.last_mut().ok_or(Errno::INVAL)?;
                let _ = write!(last, "::{}", by_number(data));
            }
            fsconfig_set_string(context, "lowerdir", list.join(":"))?;
            for (key, fd) in own {
                fsconfig_set_string(context, key, by_number(fd))?;
            }
        }
    }
    for (key, value) in [("metacopy", "on"), ("redirect_dir", "on"), ("index", "on"), ("xino", "on")] {
        fsconfig_set_string(context, key, value)?;
    }
    Ok(())
}

/// A path without anything that would need an escape.
fn by_number(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The log is kept by the kernel for whoever holds the context; an empty one is said by `ENODATA`.
pub(super) fn refused(context: &OwnedFd, errno: Errno) -> Refused {
    let mut log = Vec::new();
    if let Ok(fd) = context.try_clone() {
        let mut file = std::fs::File::from(fd);
        let mut line = [0; 512];
        while let Ok(length @ 1..) = file.read(&mut line) {
            log.push(String::from_utf8_lossy(&line[..length]).trim().to_string());
            if log.len() == 8 {
                break;
            }
        }
    }
    Refused { errno, log: log.join("; ") }
}
