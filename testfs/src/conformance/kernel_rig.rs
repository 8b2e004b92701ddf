//! The running kernel as a [`Rig`]: a directory on a real file system, looked at through the real source.
//!
//! What it deliberately does not do: make the file system. `rig::LoopRig` does, and outlives this value.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_fsadapters::os::Os;
use rustix::fs::{Advice, FallocateFlags, FileType, Mode};

use super::{Need, Rig};

/// Which real file system a [`KernelRig`] works on; decides what it can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFs {
    /// XFS, 4 KiB blocks.
    Xfs,
    /// XFS, 1 KiB blocks.
    XfsSmallBlocks,
    /// btrfs.
    Btrfs,
    /// btrfs with `compress=zstd`.
    BtrfsZstd,
    /// ext4.
    Ext4,
    /// tmpfs.
    Tmpfs,
    /// A sealed view of a root on XFS.
    ViewOnXfs,
    /// A sealed view of a root on btrfs. Subvolumes can't be made through it.
    ViewOnBtrfs,
}

/// A directory on a real file system.
pub struct KernelRig {
    os: Os,
    fs: KernelFs,
    top: PathBuf,
    root: PathBuf,
}

impl KernelRig {
    /// Works below `top`, which is on a file system of kind `fs`.
    #[must_use]
    pub fn new(fs: KernelFs, top: &Path) -> KernelRig {
        KernelRig { os: Os::new(), fs, top: top.to_owned(), root: top.to_owned() }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn writable(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.at(path))
    }

    fn is_btrfs(&self) -> bool {
        matches!(self.fs, KernelFs::Btrfs | KernelFs::BtrfsZstd)
    }
}

fn btrfs(args: &[&str], paths: &[&Path]) -> io::Result<()> {
    let output = Command::new("btrfs").args(args).args(paths).output()?;
    match output.status.success() {
        true => Ok(()),
        false => {
            Err(io::Error::other(format!("btrfs {args:?}: {}", String::from_utf8_lossy(&output.stderr))))
        }
    }
}

impl Rig for KernelRig {
    type Source = Os;

    fn name(&self) -> String {
        format!("{:?} at {}", self.fs, self.top.display())
    }

    fn has(&self, need: Need) -> bool {
        let tmpfs = self.fs == KernelFs::Tmpfs;
        match need {
            Need::Extents | Need::Unwritten | Need::Evict => !tmpfs,
            Need::PlainPages => !tmpfs && self.fs != KernelFs::XfsSmallBlocks,
            Need::Reflink => !tmpfs && self.fs != KernelFs::Ext4,
            Need::Inline => self.is_btrfs() || self.fs == KernelFs::ViewOnBtrfs,
            Need::Snapshot | Need::Relocate => self.is_btrfs(),
            Need::Compress => self.fs == KernelFs::BtrfsZstd,
            Need::NoExtents => tmpfs,
            // A second device, half-done writeback and another user are the simulation's (docs/untested.md).
            Need::Realtime | Need::HoldWriteback | Need::Unowned => false,
        }
    }

    fn source(&self) -> &Os {
        &self.os
    }

    fn root(&self) -> PathBuf {
        self.root.clone()
    }

    fn enter(&mut self, case: &str) -> io::Result<()> {
        self.root = self.top.join(case);
        fs::create_dir(&self.root)
    }

    fn create(&mut self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).open(self.at(path)).map(drop)
    }

    fn mkdir(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir(self.at(path))
    }

    fn mkfifo(&mut self, path: &Path) -> io::Result<()> {
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::mknodat(rustix::fs::CWD, self.at(path), FileType::Fifo, mode, 0)?)
    }

    fn symlink(&mut self, target: &Path, path: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(target, self.at(path))
    }

    fn write(&mut self, path: &Path, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable(path)?.write_all_at(data, offset)
    }

    fn fsync(&mut self, path: &Path) -> io::Result<()> {
        self.writable(path)?.sync_all()
    }

    fn sync_all(&mut self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(&self.top)?)?)
    }

    fn reflink(&mut self, src: &Path, dst: &Path) -> io::Result<()> {
        let from = File::open(self.at(src))?;
        let to = OpenOptions::new().write(true).create_new(true).open(self.at(dst))?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from)?)
    }

    fn clone_range(&mut self, src: &Path, from: u64, len: u64, dst: &Path, to: u64) -> io::Result<()> {
        let (src, dst) = (File::open(self.at(src))?, self.writable(dst)?);
        pagefold_sys::reflink::clone_range(src.as_fd(), from, len, dst.as_fd(), to)
    }

    fn punch(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self.writable(path)?, flags, offset, len)?)
    }

    fn fallocate(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self.writable(path)?, FallocateFlags::empty(), offset, len)?)
    }

    fn truncate(&mut self, path: &Path, size: u64) -> io::Result<()> {
        self.writable(path)?.set_len(size)
    }

    fn link(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        fs::hard_link(self.at(old), self.at(new))
    }

    fn rename(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        fs::rename(self.at(old), self.at(new))
    }

    fn unlink(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.at(path))
    }

    fn make_resident(&mut self, path: &Path, first: u64, pages: u64) -> io::Result<()> {
        let file = File::open(self.at(path))?;
        // Otherwise readahead brings in what nobody asked for.
        rustix::fs::fadvise(&file, 0, None::<NonZeroU64>, Advice::Random)?;
        let mut page = vec![0; rustix::param::page_size()];
        for number in first..first + pages {
            let offset = number * page.len() as u64;
            file.read_at(&mut page, offset)?;
        }
        Ok(())
    }

    fn evict(&mut self, path: &Path) -> io::Result<()> {
        let file = File::open(self.at(path))?;
        pagefold_sys::cache::drop_cached(&file, 0, u64::MAX >> 1)
    }

    fn snapshot(&mut self, of: &Path, at: &Path) -> io::Result<()> {
        btrfs(&["subvolume", "snapshot"], &[&self.at(of), &self.at(at)])
    }

    fn mksubvolume(&mut self, path: &Path) -> io::Result<()> {
        btrfs(&["subvolume", "create"], &[&self.at(path)])
    }

    fn relocate(&mut self) -> io::Result<()> {
        btrfs(&["balance", "start", "--full-balance"], &[&self.top])
    }

    fn bytes(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        File::open(self.at(path))?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn times(&mut self, path: &Path) -> io::Result<[(i64, i64); 3]> {
        let m = fs::symlink_metadata(self.at(path))?;
        Ok([(m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())])
    }
}
