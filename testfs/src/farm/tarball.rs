//! An image from a tar file: ownership, modes, times, extended attributes, links and special files as stored.
//!
//! The archive is hostile input: paths that climb out or pass through a symbolic link are refused by name, never
//! followed. Compressed archives are not read; the error names the program that unpacks them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;
use tar::EntryType;

use super::FarmError;
use super::content::Content;
use super::image::{ImageBuilder, Plan};
use super::tree::Meta;

pub(super) fn build(builder: &mut ImageBuilder<'_>, archive: &Path) -> Result<(), FarmError> {
    let file = File::open(archive).map_err(|e| FarmError::io("open", archive, e))?;
    refuse_compressed(archive, &file)?;
    let mut unpacker = Unpacker { builder, archive, files: HashMap::new() };
    let mut tar = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    for entry in tar.entries().map_err(|e| unreadable(archive, e))? {
        unpacker.entry(entry.map_err(|e| unreadable(archive, e))?)?;
    }
    Ok(())
}

/// The crate's own messages quote the bytes that it took for a header: no text for a terminal.
fn unreadable(archive: &Path, error: std::io::Error) -> FarmError {
    match error.raw_os_error() {
        Some(_) => FarmError::io("read", archive, error),
        None => FarmError::spec("--image", format!("{} is no tar file, or is damaged", archive.display())),
    }
}

fn refuse_compressed(archive: &Path, file: &File) -> Result<(), FarmError> {
    use std::os::unix::fs::FileExt;
    let mut magic = [0u8; 4];
    let read = file.read_at(&mut magic, 0).map_err(|e| FarmError::io("read", archive, e))?;
    let program = match &magic[..read] {
        [0x1f, 0x8b, ..] => "gunzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "unzstd",
        [0xfd, b'7', b'z', b'X'] => "unxz",
        [b'B', b'Z', b'h', ..] => "bunzip2",
        _ => return Ok(()),
    };
    Err(FarmError::spec("--image", format!("{} is compressed: run {program} first", archive.display())))
}

struct Unpacker<'a, 'b> {
    builder: &'a mut ImageBuilder<'b>,
    archive: &'a Path,
    /// Regular files by path, for hard links.
    files: HashMap<PathBuf, usize>,
}

impl Unpacker<'_, '_> {
    fn bad(&self, entry: &Path, why: &'static str) -> FarmError {
        FarmError::TarEntry { archive: self.archive.to_owned(), entry: entry.to_owned(), why }
    }

    fn plain(&self, path: &Path) -> Result<PathBuf, FarmError> {
        let mut plain = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => plain.push(name),
                Component::CurDir | Component::RootDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(self.bad(path, "climbs out of the archive"));
                }
            }
        }
        Ok(plain)
    }

    fn entry<R: Read>(&mut self, mut entry: tar::Entry<'_, R>) -> Result<(), FarmError> {
        let stored = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        let path = self.plain(&stored)?;
        let kind = entry.header().entry_type();
        let meta = self.meta(&mut entry)?;
        if path.as_os_str().is_empty() && !kind.is_dir() {
            return Err(self.bad(&stored, "has no name"));
        }
        match kind {
            EntryType::Directory => self.builder.dir(&path, meta),
            EntryType::Symlink => {
                let target = self.target(&entry, &stored)?;
                self.builder.symlink(&path, &target, meta)
            }
            EntryType::Link => {
                let target = self.plain(&self.target(&entry, &stored)?)?;
                let known = self.files.get(&target).copied();
                let file = known.ok_or_else(|| self.bad(&stored, "hard link to what is no earlier file"))?;
                self.builder.link(&path, file)?;
                self.files.insert(path, file);
                Ok(())
            }
            EntryType::Fifo => self.builder.node(&path, FileType::Fifo, 0, meta),
            EntryType::Char | EntryType::Block => {
                let number = |n: std::io::Result<Option<u32>>| {
                    n.ok().flatten().ok_or_else(|| self.bad(&stored, "device without a number"))
                };
                let (major, minor) =
                    (number(entry.header().device_major())?, number(entry.header().device_minor())?);
                let raw =
                    if kind == EntryType::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                self.builder.node(&path, raw, rustix::fs::makedev(major, minor), meta)
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let plan = Plan::solid(entry.size());
                let index = self
                    .builder
                    .file(&path, meta, plan, Content::FOREIGN, &mut |_, buffer| entry.read_exact(buffer))?;
                self.files.insert(path, index);
                Ok(())
            }
            _ => Err(self.bad(&stored, "is of a kind that this does not unpack")),
        }
    }

    fn target<R: Read>(&self, entry: &tar::Entry<'_, R>, stored: &Path) -> Result<PathBuf, FarmError> {
        let bytes = entry.link_name_bytes().ok_or_else(|| self.bad(stored, "link without a target"))?;
        Ok(PathBuf::from(OsString::from_vec(bytes.into_owned())))
    }

    fn meta<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Meta, FarmError> {
        let failed = |e| FarmError::io("read", self.archive, e);
        let mut xattrs = Vec::new();
        if let Some(extensions) = entry.pax_extensions().map_err(failed)? {
            for extension in extensions {
                let extension = extension.map_err(failed)?;
                if let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") {
                    xattrs.push((OsString::from_vec(name.to_vec()), extension.value_bytes().to_vec()));
                }
            }
        }
        let header = entry.header();
        let id = |n: std::io::Result<u64>| n.map(|n| n as u32).map_err(failed);
        Ok(Meta {
            mode: header.mode().map_err(failed)?,
            owner: Some((id(header.uid())?, id(header.gid())?)),
            mtime: (header.mtime().map_err(failed)? as i64, 0),
            xattrs,
        })
    }
}
