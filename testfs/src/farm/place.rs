//! Where a farm lives: in a directory of a reflink file system, or on a loopback file system of its own mounted
//! there. And how it goes away again.
//!
//! Invariant: only what a farm made is removed, and a manifest can't widen that: the backing file's name follows
//! from the directory's (it is not read from anywhere), and everything else removed lies in the directory, under
//! names that farms give. A manifest is in place before anything else is, so that `destroy` works after any crash.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::mountinfo::{self, Mount};
use rustix::fs::{Mode, OFlags};

use crate::rig::{self, KnownFs, RigFs, fs_kind};

use super::manifest::{FarmFs, IMAGE_DIR, MANIFEST, Manifest, ROOTS_DIR, SCHEMA, root_name};
use super::roots::btrfs;
use super::{FarmError, FarmSpec};

/// What was prepared.
#[derive(Debug)]
pub(super) struct Place {
    /// Absolute, without symbolic links.
    pub(super) dir: PathBuf,
    pub(super) own_filesystem: bool,
    pub(super) made_directory: bool,
}

/// The backing file of the farm in `dir`.
fn backing(dir: &Path) -> PathBuf {
    let mut name: OsString = dir.file_name().unwrap_or_default().to_owned();
    name.push(".pagefold-img");
    dir.with_file_name(name)
}

fn rig_fs(fs: FarmFs, compress: bool) -> RigFs {
    match (fs, compress) {
        (FarmFs::Xfs, _) => RigFs::Xfs,
        (FarmFs::Btrfs, false) => RigFs::Btrfs,
        (FarmFs::Btrfs, true) => RigFs::BtrfsZstd,
    }
}

fn wanted(fs: FarmFs, found: KnownFs) -> bool {
    matches!((fs, found), (FarmFs::Xfs, KnownFs::Xfs) | (FarmFs::Btrfs, KnownFs::Btrfs))
}

impl Place {
    /// Makes the directory, and a file system on it where the one it is on won't do. `stub` is written first.
    pub(super) fn prepare(spec: &FarmSpec, stub: &mut Manifest) -> Result<Place, FarmError> {
        let made_directory = match std::fs::create_dir(&spec.dir) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(FarmError::io("create", &spec.dir, e)),
        };
        let dir = spec.dir.canonicalize().map_err(|e| FarmError::io("resolve", &spec.dir, e))?;
        let mut place = Place { dir, own_filesystem: false, made_directory };
        if let Err(e) = place.fill(spec, stub) {
            // What is not empty or not ours was not touched; what was made is taken back.
            if place.made_directory || place.own_filesystem {
                let _ = take_back(&place.dir, place.own_filesystem, place.made_directory);
            }
            return Err(e);
        }
        Ok(place)
    }

    fn fill(&mut self, spec: &FarmSpec, stub: &mut Manifest) -> Result<(), FarmError> {
        let dir = self.dir.clone();
        let mut listing = std::fs::read_dir(&dir).map_err(|e| FarmError::io("list", &dir, e))?;
        if listing.next().is_some() {
            return Err(FarmError::Occupied { dir });
        }
        let found = fs_kind(&dir).map_err(|e| FarmError::io("look at", &dir, e))?;
        stub.made_directory = self.made_directory;
        if wanted(spec.fs, found) {
            if spec.compress {
                let why = "only for a file system that the farm makes; mount yours with compress=zstd";
                return Err(FarmError::spec("--compress", why));
            }
            can_clone(&dir, spec.fs, found)?;
            return write_manifest(&dir, stub);
        }
        let image = backing(&dir);
        if image.symlink_metadata().is_ok() {
            return Err(FarmError::ImageExists { path: image });
        }
        rig::require_root("make a loopback file system for the farm")?;
        stub.own_filesystem = true;
        self.own_filesystem = true;
        write_manifest(&dir, stub)?;
        let fs = rig_fs(spec.fs, spec.compress);
        rig::make_image(fs, &image, spec.size.unwrap_or_else(|| default_size(&dir)))?;
        rig::mount_image(fs, &image, &dir)?;
        write_manifest(&dir, stub)
    }
}

/// Half of what is free, at least 1 GiB, at most 64 GiB. The backing file is sparse: this is a limit, not a cost.
fn default_size(dir: &Path) -> u64 {
    let free = rustix::fs::statvfs(dir).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize));
    (free / 2).clamp(1 << 30, 64 << 30) >> 20 << 20
}

/// XFS may have been made without reflink: find out before 10,000 files are written.
fn can_clone(dir: &Path, fs: FarmFs, found: KnownFs) -> Result<(), FarmError> {
    let probe = |name| {
        let path = dir.join(name);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| FarmError::io("create", &path, e))
            .map(|fd| (path, fd))
    };
    let (from_path, from) = probe(".pagefold-probe-from")?;
    let cloned = probe(".pagefold-probe-to").map(|(path, to)| {
        let cloned = rustix::io::write(&from, b"probe").and_then(|_| rustix::fs::ioctl_ficlone(&to, &from));
        let _ = std::fs::remove_file(path);
        cloned
    });
    let _ = std::fs::remove_file(from_path);
    cloned?.map_err(|e| FarmError::NoReflink { dir: dir.to_owned(), wanted: fs, found, source: e.into() })
}

/// Writes `farm.json` as a whole or not at all.
pub(super) fn write_manifest(dir: &Path, manifest: &Manifest) -> Result<(), FarmError> {
    let path = dir.join(MANIFEST);
    let partial = dir.join(".farm.json.new");
    let written = (|| {
        // Names and hashes of the image's files are nobody else's business.
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        let mut writer = io::BufWriter::new(file);
        serde_json::to_writer(&mut writer, manifest)?;
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    })();
    written.map_err(|e| FarmError::io("write", &path, e))
}

/// Reads the manifest of the farm in `dir`.
pub(super) fn read_manifest(dir: &Path) -> Result<Manifest, FarmError> {
    let path = dir.join(MANIFEST);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(FarmError::NoManifest { dir: dir.to_owned() });
        }
        Err(e) => return Err(FarmError::io("read", &path, e)),
    };
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|e| FarmError::BadManifest { path: path.clone(), why: e.to_string() })?;
    if manifest.schema == SCHEMA {
        return Ok(manifest);
    }
    Err(FarmError::BadManifest { path, why: format!("schema {:?}, not {SCHEMA:?}", manifest.schema) })
}

/// Removes the farm in `dir`.
pub(super) fn destroy(dir: &Path) -> Result<(), FarmError> {
    let dir = dir.canonicalize().map_err(|e| FarmError::io("resolve", dir, e))?;
    let manifest = read_manifest(&dir)?;
    if !manifest.own_filesystem {
        remove_contents(&dir, manifest.snapshots)?;
    }
    take_back(&dir, manifest.own_filesystem, manifest.made_directory)
}

/// Removes what [`Place::prepare`] made. The contents are gone by now, or go with their file system.
pub(super) fn take_back(dir: &Path, own_filesystem: bool, made_directory: bool) -> Result<(), FarmError> {
    if own_filesystem {
        let image = backing(dir);
        if is_mounted_from(dir, &image) {
            // Not lazily: a farm that is in use stays, whole.
            rig::unmount(dir)?;
        } else if is_mount_point(dir) {
            let busy = "something is mounted there that is not the farm's backing file: unmount it first";
            return Err(FarmError::io("remove", dir, io::Error::new(io::ErrorKind::ResourceBusy, busy)));
        }
        rig::detach_loops_of(&image);
        remove_if_there(&image)?;
    }
    remove_if_there(&dir.join(".farm.json.new"))?;
    remove_if_there(&dir.join(MANIFEST))?;
    if made_directory {
        std::fs::remove_dir(dir).map_err(|e| FarmError::io("remove", dir, e))?;
    }
    Ok(())
}

/// Removes image and roots from a directory that the farm doesn't have to itself.
pub(super) fn remove_contents(dir: &Path, snapshots: bool) -> Result<(), FarmError> {
    refuse_mounts_below(dir)?;
    let roots = dir.join(ROOTS_DIR);
    let listing = match std::fs::read_dir(&roots) {
        Ok(listing) => Some(listing),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(FarmError::io("list", &roots, e)),
    };
    for entry in listing.into_iter().flatten().flatten() {
        let name = entry.file_name();
        // Only names that farms give; somebody else's directory in there makes the last rmdir fail, as it should.
        let number = name.to_str().and_then(|n| n.strip_prefix("root-")).and_then(|n| n.parse().ok());
        if number.is_some_and(|n| name.to_str() == Some(&root_name(n))) {
            remove_tree(&entry.path(), snapshots)?;
        }
    }
    remove_tree(&dir.join(IMAGE_DIR), snapshots)?;
    match std::fs::remove_dir(&roots) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FarmError::io("remove", &roots, e)),
        _ => Ok(()),
    }
}

fn remove_tree(path: &Path, subvolume: bool) -> Result<(), FarmError> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    // A half-made farm may hold a plain directory here; then the ordinary way follows.
    if subvolume && is_subvolume(path) {
        return btrfs(&["subvolume", "delete"], &[path]);
    }
    std::fs::remove_dir_all(path).map_err(|e| FarmError::io("remove", path, e))
}

/// The top directory of a btrfs subvolume has a number of its own.
fn is_subvolume(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    const TOP_OF_SUBVOLUME: u64 = 256;
    path.symlink_metadata().is_ok_and(|m| m.ino() == TOP_OF_SUBVOLUME)
}

fn remove_if_there(path: &Path) -> Result<(), FarmError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FarmError::io("remove", path, e)),
        _ => Ok(()),
    }
}

fn is_mount_point(dir: &Path) -> bool {
    mount_of(dir).is_some_and(|m| m.mount_point == dir)
}

/// Whether the topmost mount at `dir` is a loop device on `image`.
fn is_mounted_from(dir: &Path, image: &Path) -> bool {
    if !is_mount_point(dir) {
        return false;
    }
    let Some(mount) = mount_of(dir) else { return false };
    let Some(name) = Path::new(&mount.source).file_name() else { return false };
    let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
    std::fs::read(backing).is_ok_and(|text| {
        use std::os::unix::ffi::OsStrExt;
        text.trim_ascii_end() == image.as_os_str().as_bytes()
    })
}

/// The mount that `path` is on; later lines of mountinfo lie on top of earlier ones.
fn mount_of(path: &Path) -> Option<Mount> {
    let all = mountinfo::read().ok()?.into_iter().filter(|m| path.starts_with(&m.mount_point));
    all.enumerate().max_by_key(|(line, m)| (m.mount_point.components().count(), *line)).map(|(_, m)| m)
}

/// Fails if anything is mounted below `dir`: removing file by file would go on in there, in somebody else's files.
fn refuse_mounts_below(dir: &Path) -> Result<(), FarmError> {
    let mounts =
        mountinfo::read().map_err(|e| FarmError::io("read", Path::new("/proc/self/mountinfo"), e))?;
    match mounts.into_iter().find(|m| m.mount_point.starts_with(dir) && m.mount_point != dir) {
        None => Ok(()),
        Some(mount) => {
            let busy =
                io::Error::new(io::ErrorKind::ResourceBusy, "something is mounted there: unmount it first");
            Err(FarmError::io("remove", &mount.mount_point, busy))
        }
    }
}

/// Whether the file system at `path` compresses what is written to it.
pub(super) fn compresses(path: &Path) -> bool {
    mount_of(path).is_some_and(|m| m.fs_options.split(|b| *b == b',').any(|o| o.starts_with(b"compress")))
}
