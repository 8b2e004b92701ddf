//! Building the image: every source (tar, directory, synthetic) makes its files through [`ImageBuilder`], which
//! records what it wrote where. That record, not the file system, is what the ground truth is derived from.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FileType};

use super::content::{Content, PAGE};
use super::manifest::{ByteRange, ImageFile, ImageManifest, RawPath};
use super::tree::{Meta, Tree};
use super::{FarmError, Job, Stage};

/// Copying goes in pieces of this many bytes.
const PIECE: usize = 256 * PAGE as usize;

/// Something to make again in every root.
#[derive(Debug)]
pub(crate) enum Kind {
    Dir,
    /// Index into the manifest's files.
    File(usize),
    /// A further name of that file.
    Link(usize),
    Symlink(PathBuf),
    Node(FileType, u64),
}

/// An entry of the image, in the order in which it was made: parents first.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
}

/// The image as it was built.
#[derive(Debug, Default)]
pub(crate) struct Image {
    pub(crate) entries: Vec<Entry>,
    pub(crate) manifest: ImageManifest,
}

/// How a regular file is laid out.
#[derive(Debug, Default, Clone)]
pub(crate) struct Plan {
    pub(crate) size: u64,
    /// Ascending; each starts at a page and ends at one or at EOF.
    pub(crate) data: Vec<ByteRange>,
    pub(crate) preallocated: Vec<ByteRange>,
}

impl Plan {
    /// Every byte is written.
    pub(crate) fn solid(size: u64) -> Plan {
        Plan { size, data: if size == 0 { vec![] } else { vec![(0, size)] }, preallocated: vec![] }
    }
}

/// Gives the bytes at an offset; asked in ascending order.
pub(crate) type Bytes<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>;

pub(crate) struct ImageBuilder<'a> {
    tree: Tree,
    path: PathBuf,
    image: Image,
    made_dirs: HashSet<PathBuf>,
    buffer: Vec<u8>,
    job: &'a Job<'a>,
}

impl<'a> ImageBuilder<'a> {
    pub(crate) fn new(path: &Path, source: String, job: &'a Job<'a>) -> Result<Self, FarmError> {
        let image = Image { entries: vec![], manifest: ImageManifest { source, ..ImageManifest::default() } };
        Ok(ImageBuilder {
            tree: Tree::open(path)?,
            path: path.to_owned(),
            image,
            made_dirs: HashSet::new(),
            buffer: vec![0; PIECE],
            job,
        })
    }

    /// Attributes of directories come last: filling them changes their times, and some may not be writable.
    pub(crate) fn finish(mut self) -> Result<Image, FarmError> {
        for entry in self.image.entries.iter().rev().filter(|e| matches!(e.kind, Kind::Dir)) {
            self.tree.apply_dir(&entry.path, &entry.meta)?;
        }
        Ok(self.image)
    }

    /// Makes a directory and what is missing above it; said twice, the later attributes count.
    pub(crate) fn dir(&mut self, path: &Path, meta: Meta) -> Result<(), FarmError> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        if self.made_dirs.contains(path) {
            if let Some(known) = self.image.entries.iter_mut().find(|e| e.path == path) {
                known.meta = meta;
            }
            return Ok(());
        }
        self.parents(path)?;
        self.tree.mkdir(path)?;
        self.made_dirs.insert(path.to_owned());
        self.image.manifest.directories += 1;
        self.push(path, Kind::Dir, meta)
    }

    fn parents(&mut self, path: &Path) -> Result<(), FarmError> {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() && !self.made_dirs.contains(parent) => {
                self.dir(parent, Meta { mode: 0o755, ..Meta::default() })
            }
            _ => Ok(()),
        }
    }

    fn push(&mut self, path: &Path, kind: Kind, meta: Meta) -> Result<(), FarmError> {
        self.image.entries.push(Entry { path: path.to_owned(), kind, meta });
        if self.job.cancel.load(Ordering::Relaxed) {
            return Err(FarmError::Cancelled);
        }
        self.job.tell(Stage::Image, self.image.entries.len() as u64, 0);
        Ok(())
    }

    /// Makes a regular file from `bytes`; its index.
    pub(crate) fn file(
        &mut self,
        path: &Path,
        meta: Meta,
        plan: Plan,
        content: Content,
        bytes: Bytes<'_>,
    ) -> Result<usize, FarmError> {
        self.parents(path)?;
        let file = self.tree.create(path)?;
        let hash = write_plan(file.as_fd(), &plan, &mut self.buffer, bytes)
            .map_err(|e| FarmError::io("write", &self.path.join(path), e))?;
        self.tree.apply(file.as_fd(), path, &meta)?;
        self.record(path, meta, plan, content, hash, false)
    }

    /// Makes a regular file as a clone of `from`; `None` where the file systems differ.
    pub(crate) fn cloned(
        &mut self,
        path: &Path,
        meta: &Meta,
        plan: &Plan,
        from: BorrowedFd<'_>,
    ) -> Result<Option<usize>, FarmError> {
        self.parents(path)?;
        let file = self.tree.create(path)?;
        if rustix::fs::ioctl_ficlone(&file, from).is_err() {
            drop(file);
            self.tree.unlink(path)?;
            return Ok(None);
        }
        self.tree.apply(file.as_fd(), path, meta)?;
        self.record(path, meta.clone(), plan.clone(), Content::FOREIGN, String::new(), true).map(Some)
    }

    fn record(
        &mut self,
        path: &Path,
        meta: Meta,
        plan: Plan,
        content: Content,
        hash: String,
        cloned: bool,
    ) -> Result<usize, FarmError> {
        let index = self.image.manifest.files.len();
        self.image.manifest.files.push(ImageFile {
            names: vec![RawPath(path.to_owned())],
            size: plan.size,
            content,
            data: plan.data,
            preallocated: plan.preallocated,
            hash,
            cloned,
        });
        self.push(path, Kind::File(index), meta)?;
        Ok(index)
    }

    /// Gives file number `file` a further name.
    pub(crate) fn link(&mut self, path: &Path, file: usize) -> Result<(), FarmError> {
        self.parents(path)?;
        let existing = self.image.manifest.files[file].names[0].0.clone();
        self.tree.link(&existing, path)?;
        self.image.manifest.files[file].names.push(RawPath(path.to_owned()));
        self.push(path, Kind::Link(file), Meta::default())
    }

    pub(crate) fn symlink(&mut self, path: &Path, target: &Path, meta: Meta) -> Result<(), FarmError> {
        self.parents(path)?;
        self.tree.symlink(path, target, &meta)?;
        self.image.manifest.others += 1;
        self.push(path, Kind::Symlink(target.to_owned()), meta)
    }

    pub(crate) fn node(
        &mut self,
        path: &Path,
        kind: FileType,
        device: u64,
        meta: Meta,
    ) -> Result<(), FarmError> {
        self.parents(path)?;
        self.tree.node(path, kind, device, &meta)?;
        self.image.manifest.others += 1;
        self.push(path, Kind::Node(kind, device), meta)
    }
}

/// Writes a file as planned; BLAKE3 of what was written.
///
/// The size is set first: a write that extends a file over a hole makes some file systems zero the page around the
/// old EOF, and then that page is data where the plan says hole.
pub(crate) fn write_plan(
    file: BorrowedFd<'_>,
    plan: &Plan,
    buffer: &mut [u8],
    bytes: Bytes<'_>,
) -> io::Result<String> {
    let solid = plan.data.len() == 1 && plan.data[0] == (0, plan.size);
    if !solid && plan.size > 0 {
        rustix::fs::ftruncate(file, plan.size)?;
    }
    for &(start, length) in &plan.preallocated {
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, start, length)?;
    }
    let mut hasher = blake3::Hasher::new();
    for &(start, length) in &plan.data {
        let mut at = start;
        while at < start + length {
            let piece = &mut buffer[..(start + length - at).min(PIECE as u64) as usize];
            bytes(at, piece)?;
            hasher.update(piece);
            write_all_at(file, piece, at)?;
            at += piece.len() as u64;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// `pwrite` until all is written.
pub(crate) fn write_all_at(file: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
