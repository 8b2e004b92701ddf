//! A real file system with a store and raw roots, for tests of views.

#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use pagefold_fsadapters::reflink::clone_file;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::mount::{MountOptions, Mounted, Unmounted, mount_view, umount_view};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};
use pagefold_sys::cache;
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::{AtFlags, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::UnmountFlags;

pub mod layer;
#[path = "../commit_support/snapshot.rs"]
pub mod snapshot;

/// The file systems that views are for.
pub const BOTH: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

pub struct Home {
    // Before the rig goes, so does what is mounted on it.
    mounted: Vec<PathBuf>,
    pub rig: LoopRig,
    _turn: Turn,
}

/// A process in a new mount namespace gets a copy of every view that is mounted then and keeps it alive: a test that starts one runs
/// alone.
static NAMESPACES: RwLock<()> = RwLock::new(());

enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Home {
    pub fn new(fs: RigFs) -> Home {
        Home::with(fs, Turn::Shared(NAMESPACES.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// For a test that makes mount namespaces.
    pub fn alone(fs: RigFs) -> Home {
        Home::with(fs, Turn::Alone(NAMESPACES.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn with(fs: RigFs, turn: Turn) -> Home {
        let rig = LoopRig::with_size(fs, 3 << 30)
            .unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"));
        Home { mounted: Vec::new(), rig, _turn: turn }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.rig.path().join(name)
    }

    pub fn store(&self) -> Store {
        Store::open(&self.at(".pagefold"), OpenMode::Create, "a test").unwrap()
    }

    /// Seals the roots of these names.
    pub fn seal(&self, store: &Store, names: &[&str]) -> Vec<RootRow> {
        let roots = names.iter().map(|n| self.at(n)).collect();
        let report = seal(store, &SealConfig::new(roots), &Progress::default()).unwrap();
        names
            .iter()
            .map(|n| store.find_root(self.at(n)).unwrap_or_else(|e| panic!("{n}: {e}; {report:?}")))
            .collect()
    }

    /// Makes a small root of ordinary files for each name, the further ones clones of the first, and seals them.
    pub fn sealed(&self, names: &[&str]) -> (Store, Vec<RootRow>) {
        plain_root(&self.at(names[0]));
        for name in &names[1..] {
            clone_tree(&self.at(names[0]), &self.at(name));
        }
        settle(&self.at(names[0]));
        let store = self.store();
        let rows = self.seal(&store, names);
        (store, rows)
    }

    /// A root that is a mount of its own: `a`, which is `real` bound to another place.
    pub fn bound_root(&self) {
        plain_root(&self.at("real"));
        fs::create_dir(self.at("a")).unwrap();
        rustix::mount::mount_bind(self.at("real"), self.at("a")).unwrap();
    }

    /// Mounts at a directory of this name, which is made.
    pub fn mount(&mut self, store: &Store, row: &RootRow, name: &str) -> PathBuf {
        self.try_mount(store, row, name, &MountOptions::default()).unwrap().target
    }

    /// Whatever comes of it, save that the root's last view is still live: that passes.
    pub fn try_mount(
        &mut self,
        store: &Store,
        row: &RootRow,
        name: &str,
        options: &MountOptions,
    ) -> Result<Mounted, ViewError> {
        let target = self.at(name);
        fs::create_dir_all(&target).unwrap();
        let mounted = patiently(
            || mount_view(store, row, &target, options),
            |r| matches!(r, Err(ViewError::Live { .. })),
        )?;
        self.mounted.push(target);
        Ok(mounted)
    }

    pub fn umount(&mut self, store: &Store, target: &Path) -> Unmounted {
        self.try_umount(store, target).unwrap()
    }

    /// Whatever comes of it, save that the view is in use: that passes.
    pub fn try_umount(&mut self, store: &Store, target: &Path) -> Result<Unmounted, ViewError> {
        patiently(|| umount_view(store, target), |r| matches!(r, Err(ViewError::Busy(_))))
    }
}

/// How long what passes may take to pass. A busy machine starts a program in seconds; who waits for longer waits in vain.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tests run beside each other: a child that another is just starting holds our descriptors until it executes its program, and a container
/// that somebody else starts has a copy of our mounts for a moment. Not for what is expected to stay `passing`.
pub fn patiently<T>(mut call: impl FnMut() -> T, passing: impl Fn(&T) -> bool) -> T {
    let started = Instant::now();
    loop {
        let result = call();
        if !passing(&result) || started.elapsed() > PATIENCE {
            return result;
        }
        std::thread::sleep(Duration::from_millis(4));
    }
}

/// Waits until it is so.
pub fn until(what: &str, so: impl Fn() -> bool) {
    assert!(patiently(so, |so| !so), "in vain waited until {what}");
}

impl Drop for Home {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
        }
        let mounts = self.at(".pagefold/mounts");
        for entry in fs::read_dir(&mounts).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path(), UnmountFlags::DETACH);
        }
        let _ = rustix::mount::unmount(&mounts, UnmountFlags::DETACH);
    }
}

pub fn dir(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

/// Cached pages of a file.
pub fn cached(path: &Path) -> u64 {
    cache::cachestat(File::open(path).unwrap().as_fd(), 0, 0).unwrap().nr_cache
}

/// All regular files below.
pub fn files(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap() {
                t if t.is_dir() => dirs.push(entry.path()),
                t if t.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// The same tree with shared blocks.
pub fn clone_tree(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").args(["-a", "--reflink=always"]).arg(from).arg(to).status();
    assert!(status.unwrap().success());
}

/// Bytes that no other seed gives.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut out = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// A small root of ordinary files.
pub fn plain_root(at: &Path) {
    fs::create_dir_all(at.join("dir/sub")).unwrap();
    for (seed, (name, length)) in
        [("f", 100_000), ("g", 4096), ("dir/h", 50_001), ("dir/sub/i", 300_000)].into_iter().enumerate()
    {
        fs::write(at.join(name), bytes(seed as u64, length)).unwrap();
    }
    settle(at);
}

/// Written out: a file with dirty pages is not looked at by its extents.
pub fn settle(at: &Path) {
    rustix::fs::syncfs(dir(at)).unwrap();
}

fn acl() -> Vec<u8> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 0, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// All kinds of entries, attributes and odd names.
pub fn odd_root(at: &Path) {
    let long = "n".repeat(255);
    for name in ["ab", "00", "dir with space", "new\nline", "..dots", "deep/1/2/3/4/5/6/7/8"] {
        fs::create_dir_all(at.join(name)).unwrap();
    }
    let raw_name = std::ffi::OsStr::from_bytes(b"\xff\xfe\x01");
    for (seed, (name, length)) in [
        (raw_name, 10),
        (long.as_ref(), 1),
        ("empty".as_ref(), 0),
        ("page".as_ref(), 4096),
        ("more".as_ref(), 4097),
        ("ab/large".as_ref(), 700_000),
        ("deep/1/2/3/4/5/6/7/8/f".as_ref(), 77),
        ("caps".as_ref(), 5000),
        ("planted".as_ref(), 5000),
        ("ff".as_ref(), 5000),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(at.join(name), bytes(1000 + seed as u64, length)).unwrap();
    }
    fs::hard_link(at.join("page"), at.join("ab/link")).unwrap();
    fs::hard_link(at.join("page"), at.join("deep/link")).unwrap();
    fs::hard_link(at.join("empty"), at.join("ab/nothing")).unwrap();
    symlink("x".repeat(1000), at.join("long link")).unwrap();
    symlink("../ab/./large", at.join("deep/link to large")).unwrap();
    let here = dir(at);
    let node = |name: &str, kind, rdev| {
        rustix::fs::mknodat(&here, name, kind, Mode::from_raw_mode(0o640), rdev).unwrap();
    };
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("disk", FileType::BlockDevice, rustix::fs::makedev(259, 200_000));
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    attributes(at);
    let times = |name: &str, seconds, nanos| {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(&here, name, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    };
    times("page", -1_000_000_000, 1);
    times("more", 4_000_000_000, 999_999_999);
    times("ab", 1, 500);
    times("long link", 77, 77);
    times(".", 1_234_567, 891);
    settle(at);
}

fn attributes(at: &Path) {
    let set = |name: &str, attribute: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at.join(name), attribute, value, XattrFlags::empty())
            .unwrap_or_else(|e| panic!("{name} {attribute}: {e}"));
    };
    set("more", "user.small", b"value");
    set("more", "user.empty", b"");
    set("more", "security.selinux", b"system_u:object_r:root_t:s0\0");
    set("ab", "security.selinux", b"system_u:object_r:root_t:s0\0");
    set("ab", "user.large", &bytes(7, 3000));
    set("page", "trusted.thing", &bytes(8, 2000));
    set("more", "system.posix_acl_access", &acl());
    set("ab", "system.posix_acl_default", &acl());
    set(".", "user.of the root", b"yes");
    set("long link", "trusted.of a link", b"yes");
    // cap_net_raw+ep
    set("caps", "security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    set("planted", "trusted.overlay.redirect", b"/00/11");
    set("planted", "trusted.overlay.metacopy", b"");
    set("dir with space", "trusted.overlay.opaque", b"y");
    for (name, mode, uid, gid) in
        [("page", 0o4755, 0, 0), ("ab", 0o2777, 7, 8), ("deep", 0o1777, 70_000, 1 << 31), (".", 0o750, 3, 4)]
    {
        std::os::unix::fs::chown(at.join(name), Some(uid), Some(gid)).unwrap();
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    assert_eq!(fs::metadata(at.join("page")).unwrap().mode() & 0o7777, 0o4755);
}

/// A second name space for the blocks of a file: `length` bytes made of clones of the first ones.
pub fn large_file(at: &Path, length: u64) {
    let piece = 64 << 20;
    let source = at.with_extension("piece");
    fs::write(&source, bytes(99, piece as usize)).unwrap();
    let (from, to) = (File::open(&source).unwrap(), File::create(at).unwrap());
    clone_file(&from, &to).unwrap();
    for offset in (piece..length).step_by(piece as usize) {
        pagefold_fsadapters::reflink::clone_range(&from, 0, piece, &to, offset).unwrap();
    }
    fs::remove_file(source).unwrap();
}
