//! Raw facts of simulated files, for checkers: what lies under every block, what is cached, what is dirty.
//!
//! Invariant: told from the state itself, never by way of an extent map, `inspect` or the planted bugs. What it
//! deliberately does not do: judge which pages are equal.

use std::collections::BTreeMap;
use std::io;

use super::node::{FsIx, Mapped, NodeId};
use super::world::World;

/// What one block of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawBlock {
    /// Written data in the block of this number on the file's device.
    Data(u64),
    /// Preallocated, never written.
    Unwritten,
    /// A reservation; the bytes are in cache.
    Reserved,
    /// A slice of a compressed extent.
    Compressed,
}

/// One file as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawFile {
    /// Its file system.
    pub fs: FsIx,
    /// On the real-time device.
    pub realtime: bool,
    /// Its file system answers FIEMAP.
    pub has_map: bool,
    /// Bytes in a block.
    pub block_bytes: u64,
    /// Bytes.
    pub size: u64,
    /// Its first block is kept in metadata.
    pub inline: bool,
    /// By index in the file; what is missing is a hole. May go on past EOF.
    pub blocks: BTreeMap<u64, RawBlock>,
    /// Cached pages up to EOF, ascending.
    pub cached: Vec<u64>,
    /// A page up to EOF is dirty or being written.
    pub dirty: bool,
    /// This user may ask what is cached.
    pub may_ask_cache: bool,
    /// Every page up to EOF as a reader sees it, zeros after EOF.
    pub pages: Vec<Vec<u8>>,
}

impl World {
    /// The facts of a file.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL` when it is no regular file.
    pub fn raw_file(&self, id: NodeId) -> io::Result<RawFile> {
        let node = self.node(id)?;
        let (fs, file) = self.file(id)?;
        let end = self.page.pages_covering(file.size).0;
        let raw = |mapped: &Mapped| match mapped {
            Mapped::Data(block) => RawBlock::Data(block.0),
            Mapped::Unwritten(_) => RawBlock::Unwritten,
            Mapped::Delalloc => RawBlock::Reserved,
            Mapped::Encoded { .. } => RawBlock::Compressed,
        };
        Ok(RawFile {
            fs: node.fs,
            realtime: file.realtime,
            has_map: fs.habits.fiemap,
            block_bytes: fs.habits.block_bytes,
            size: file.size,
            inline: file.inline.is_some(),
            blocks: file.blocks.iter().map(|(at, mapped)| (*at, raw(mapped))).collect(),
            cached: file.cache.range(..end).map(|(page, _)| *page).collect(),
            dirty: file.cache.range(..end).any(|(_, page)| page.dirty | page.writeback != 0),
            may_ask_cache: self.privileged || node.owned,
            pages: (0..end).map(|page| self.peek_page(id, page)).collect::<io::Result<_>>()?,
        })
    }

    /// Every name below `path` that is a regular file or a directory, mounts included, as full paths.
    ///
    /// # Errors
    /// Of the path.
    pub fn names_below(&self, path: &std::path::Path) -> io::Result<Vec<(std::path::PathBuf, NodeId)>> {
        use std::os::unix::ffi::OsStrExt;
        let mut found = Vec::new();
        let mut todo = vec![(path.to_owned(), self.resolve(path, true)?)];
        while let Some((path, place)) = todo.pop() {
            let super::node::Body::Dir(entries) = &self.node(place.node)?.body else { continue };
            for name in entries.keys() {
                let (child, below) = (self.child(place, name)?, path.join(std::ffi::OsStr::from_bytes(name)));
                match self.node(child.node)?.body {
                    super::node::Body::File(_) => found.push((below, child.node)),
                    super::node::Body::Dir(_) => {
                        found.push((below.clone(), child.node));
                        todo.push((below, child));
                    }
                    _ => {}
                }
            }
        }
        found.sort();
        Ok(found)
    }
}
