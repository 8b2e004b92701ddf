//! An image from a directory: cloned where source and farm are on one file system, else copied, holes kept.
//!
//! A clone may share extents with anything (its source may itself have been cloned), so a farm made that way has
//! no extents-only ground truth; reading still decides. The walk stays on the source's file system.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, SeekFrom};

use super::FarmError;
use super::content::{Content, PAGE};
use super::image::{ImageBuilder, Plan};
use super::manifest::ByteRange;
use super::tree::Meta;

pub(super) fn build(builder: &mut ImageBuilder<'_>, source: &Path) -> Result<(), FarmError> {
    let root = source.metadata().map_err(|e| FarmError::io("look at", source, e))?;
    let mut walk = Walk { builder, source, device: root.dev(), linked: HashMap::new() };
    walk.dir(Path::new(""))
}

struct Walk<'a, 'b> {
    builder: &'a mut ImageBuilder<'b>,
    source: &'a Path,
    device: u64,
    /// Files with several links, by inode.
    linked: HashMap<u64, usize>,
}

impl Walk<'_, '_> {
    fn dir(&mut self, below: &Path) -> Result<(), FarmError> {
        let here = self.source.join(below);
        let listing = std::fs::read_dir(&here).map_err(|e| FarmError::io("list", &here, e))?;
        let mut names: Vec<_> = Vec::new();
        for entry in listing {
            names.push(entry.map_err(|e| FarmError::io("list", &here, e))?.file_name());
        }
        // In a fixed order, so that a seed means the same drift every time; directories last.
        names.sort();
        let mut dirs = Vec::new();
        for name in names {
            let path = below.join(name);
            if self.entry(&path)? {
                dirs.push(path);
            }
        }
        dirs.into_iter().try_for_each(|path| self.dir(&path))
    }

    /// Copies one entry; true for a directory that is to be walked.
    fn entry(&mut self, path: &Path) -> Result<bool, FarmError> {
        let from = self.source.join(path);
        let stat = std::fs::symlink_metadata(&from).map_err(|e| FarmError::io("look at", &from, e))?;
        let meta = meta_of(&from, &stat)?;
        let kind = stat.file_type();
        if kind.is_dir() {
            self.builder.dir(path, meta)?;
            return Ok(stat.dev() == self.device);
        }
        if kind.is_symlink() {
            let target = std::fs::read_link(&from).map_err(|e| FarmError::io("read link", &from, e))?;
            self.builder.symlink(path, &target, meta)?;
        } else if !kind.is_file() {
            let raw = FileType::from_raw_mode(stat.mode());
            self.builder.node(path, raw, stat.rdev(), meta)?;
        } else if let Some(&known) = self.linked.get(&stat.ino()) {
            self.builder.link(path, known)?;
        } else {
            let index = self.file(path, &from, meta)?;
            if stat.nlink() > 1 {
                self.linked.insert(stat.ino(), index);
            }
        }
        Ok(false)
    }

    fn file(&mut self, path: &Path, from: &PathBuf, meta: Meta) -> Result<usize, FarmError> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(from);
        let file = file.map_err(|e| FarmError::io("open", from, e))?;
        let size = file.metadata().map_err(|e| FarmError::io("look at", from, e))?.len();
        let data =
            data_ranges(file.as_fd(), size).map_err(|e| FarmError::io("find the holes of", from, e))?;
        let plan = Plan { size, data, preallocated: vec![] };
        if size > 0
            && let Some(index) = self.builder.cloned(path, &meta, &plan, file.as_fd())?
        {
            return Ok(index);
        }
        self.builder
            .file(path, meta, plan, Content::FOREIGN, &mut |at, buffer| file.read_exact_at(buffer, at))
    }
}

/// Where a file has data, widened to whole pages and merged.
pub(super) fn data_ranges(file: BorrowedFd<'_>, size: u64) -> rustix::io::Result<Vec<ByteRange>> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(size));
        match ranges.last_mut() {
            Some((known, length)) if *known + *length >= first => *length = last - *known,
            _ if first < last => ranges.push((first, last - first)),
            _ => {}
        }
        at = end.max(at + 1);
    }
    Ok(ranges)
}

fn meta_of(path: &Path, stat: &std::fs::Metadata) -> Result<Meta, FarmError> {
    let mut xattrs = Vec::new();
    // Symbolic links may have some too, but only security ones; those follow from the policy of the host.
    if stat.is_file() || stat.is_dir() {
        xattrs = read_xattrs(path).map_err(|e| FarmError::io("read extended attributes of", path, e))?;
    }
    Ok(Meta {
        mode: stat.mode(),
        owner: Some((stat.uid(), stat.gid())),
        mtime: (stat.mtime(), stat.mtime_nsec() as u32),
        xattrs,
    })
}

fn read_xattrs(path: &Path) -> rustix::io::Result<Vec<(OsString, Vec<u8>)>> {
    let length = match rustix::fs::llistxattr_query(path) {
        Ok(0) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(vec![]),
        Ok(length) => length,
        Err(e) => return Err(e),
    };
    let mut names = Vec::with_capacity(length);
    rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names))?;
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = OsString::from_vec(name.to_vec());
        let length = rustix::fs::lgetxattr_query(path, name.as_os_str())?;
        let mut value = Vec::with_capacity(length);
        if length > 0 {
            rustix::fs::lgetxattr(path, name.as_os_str(), rustix::buffer::spare_capacity(&mut value))?;
        }
        found.push((name, value));
    }
    Ok(found)
}
