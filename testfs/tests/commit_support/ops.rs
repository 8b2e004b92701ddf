//! Random trees and random changes, the same on every tree they are applied to.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

/// A small generator: a run is its seed.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % n as u64) as usize
    }
}

#[derive(Clone, Debug)]
pub enum Change {
    Write(PathBuf, u64, usize, u8),
    Truncate(PathBuf, u64),
    Punch(PathBuf, u64, u64),
    Mkdir(PathBuf, u32),
    Remove(PathBuf),
    RemoveAll(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, String),
    Node(PathBuf, u8),
    Chmod(PathBuf, u32),
    Chown(PathBuf, u32, u32),
    SetXattr(PathBuf, &'static str, Vec<u8>),
    RemoveXattr(PathBuf, &'static str),
    Times(PathBuf, i64, i64),
}

const NAMES: [&str; 9] = ["a", "b", "c", "d", "e", "sp ace", "umläut", "new\nline", "ab"];
const XATTRS: [&str; 5] =
    ["user.note", "user.big", "trusted.own", "trusted.overlay.redirect", "system.posix_acl_default"];

/// A path of up to four names, more often one that is there.
fn path(rng: &mut Rng, known: &[PathBuf]) -> PathBuf {
    if !known.is_empty() && rng.below(10) < 7 {
        return known[rng.below(known.len())].clone();
    }
    let mut path = match known.is_empty() {
        false if rng.below(2) == 0 => known[rng.below(known.len())].clone(),
        _ => PathBuf::new(),
    };
    for _ in 0..=rng.below(2) {
        path.push(NAMES[rng.below(NAMES.len())]);
    }
    path
}

/// All paths below a root, in an order that depends on names only.
pub fn known(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() && path.components().count() < 6 {
                dirs.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A change drawn at random.
pub fn draw(rng: &mut Rng, known: &[PathBuf], escapes: bool) -> Change {
    let (p, q) = (path(rng, known), path(rng, known));
    let page = |rng: &mut Rng, n: usize| rng.below(n) as u64 * 4096;
    match rng.below(34) {
        0..=6 => Change::Write(p, rng.below(70_000) as u64, 1 + rng.below(9000), rng.below(256) as u8),
        7 => Change::Truncate(p, rng.below(40_000) as u64),
        8 => Change::Punch(p, page(rng, 4), 4096 + page(rng, 4)),
        9..=11 => Change::Mkdir(p, [0o755, 0o700, 0o2775, 0o1777][rng.below(4)]),
        12..=14 => Change::Remove(p),
        15 => Change::RemoveAll(p),
        16..=20 => Change::Rename(p, q),
        21 => Change::Exchange(p, q),
        22..=24 => Change::Link(p, q),
        25 => Change::Symlink(p, ["x", "/etc/passwd", "../../../out", "sp ace/a"][rng.below(4)].into()),
        26 => Change::Node(p, rng.below(3) as u8),
        27 => Change::Chmod(p, [0o644, 0o4755, 0o2711, 0o000, 0o600][rng.below(5)]),
        28 => Change::Chown(p, rng.below(3) as u32 * 500, rng.below(3) as u32 * 500),
        29 | 30 => {
            let name = XATTRS[rng.below(XATTRS.len() - 1)];
            let name = if escapes { name } else { name.replace("overlay.redirect", "o").leak() };
            let size = if name == "user.big" { 900 } else { 1 + rng.below(20) };
            Change::SetXattr(p, name, vec![rng.below(256) as u8; size])
        }
        31 => Change::RemoveXattr(p, XATTRS[rng.below(2)]),
        _ => Change::Times(p, 1_000_000_000 + rng.below(1_000_000) as i64, rng.below(1_000_000_000) as i64),
    }
}

/// Carries a change out below `root`. The errno if it can't be.
pub fn carry_out(root: &Path, change: &Change) -> Result<(), i32> {
    let at = |p: &PathBuf| root.join(p);
    let errno = |e: std::io::Error| e.raw_os_error().unwrap_or(0);
    let code = |e: Errno| e.raw_os_error();
    let is_file = |p: &PathBuf| at(p).symlink_metadata().is_ok_and(|m| m.is_file());
    let open = |p: &PathBuf, create: bool| -> Result<File, i32> {
        if at(p).symlink_metadata().is_ok() && !is_file(p) {
            return Err(0);
        }
        OpenOptions::new().write(true).create(create).mode(0o640).open(at(p)).map_err(errno)
    };
    match change {
        Change::Write(p, offset, size, byte) => {
            let bytes: Vec<u8> = (0..*size).map(|i| byte.wrapping_add((i / 97) as u8)).collect();
            open(p, true)?.write_all_at(&bytes, *offset).map_err(errno)
        }
        Change::Truncate(p, size) => open(p, false)?.set_len(*size).map_err(errno),
        Change::Punch(p, offset, length) => {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(open(p, false)?, flags, *offset, *length).map_err(code)
        }
        Change::Mkdir(p, mode) => {
            rustix::fs::mkdir(at(p), Mode::RWXU).map_err(code)?;
            rustix::fs::chmod(at(p), Mode::from_raw_mode(*mode)).map_err(code)
        }
        Change::Remove(p) => match at(p).symlink_metadata().map_err(errno)?.is_dir() {
            true => std::fs::remove_dir(at(p)).map_err(errno),
            false => std::fs::remove_file(at(p)).map_err(errno),
        },
        Change::RemoveAll(p) => match at(p).symlink_metadata().map_err(errno)?.is_dir() {
            true => std::fs::remove_dir_all(at(p)).map_err(errno),
            false => Err(0),
        },
        Change::Rename(p, q) => std::fs::rename(at(p), at(q)).map_err(errno),
        Change::Exchange(p, q) => {
            rustix::fs::renameat_with(CWD, at(p), CWD, at(q), RenameFlags::EXCHANGE).map_err(code)
        }
        Change::Link(p, q) => std::fs::hard_link(at(p), at(q)).map_err(errno),
        Change::Symlink(p, target) => std::os::unix::fs::symlink(target, at(p)).map_err(errno),
        Change::Node(p, which) => {
            let (kind, device) = match which {
                0 => (FileType::Fifo, 0),
                1 => (FileType::Socket, 0),
                _ => (FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
            };
            rustix::fs::mknodat(CWD, at(p), kind, Mode::RUSR | Mode::WUSR, device).map_err(code)
        }
        Change::Chmod(p, mode) => match at(p).symlink_metadata().map_err(errno)?.is_symlink() {
            true => Err(0),
            false => rustix::fs::chmod(at(p), Mode::from_raw_mode(*mode)).map_err(code),
        },
        Change::Chown(p, uid, gid) => {
            let (uid, gid) = (rustix::fs::Uid::from_raw(*uid), rustix::fs::Gid::from_raw(*gid));
            rustix::fs::chownat(CWD, at(p), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(code)
        }
        Change::SetXattr(p, name, value) => {
            rustix::fs::lsetxattr(at(p), *name, value, XattrFlags::empty()).map_err(code)
        }
        Change::RemoveXattr(p, name) => rustix::fs::lremovexattr(at(p), *name).map_err(code),
        Change::Times(p, seconds, nanoseconds) => {
            let time = Timespec { tv_sec: *seconds, tv_nsec: *nanoseconds };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, at(p), &times, AtFlags::SYMLINK_NOFOLLOW).map_err(code)
        }
    }
}
