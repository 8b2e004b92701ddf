//! Inodes: attributes, what a file maps to on disk, what of it is cached.

use std::collections::BTreeMap;

use pagefold_fsadapters::source::{InodeId, SpecialKind};

use super::disk::{BlockNo, EncodedId};

/// Handle of an inode in the simulation; unlike `st_ino` never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// Place of a file system in the simulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FsIx(pub usize);

/// What one block of a file maps to. A block that is not in the map is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// Written data.
    Data(BlockNo),
    /// Preallocated, reads as zeros.
    Unwritten(BlockNo),
    /// Reserved only; the bytes are in cache.
    Delalloc,
    /// A slice of a compressed extent.
    Encoded { id: EncodedId, slice: u32 },
}

/// A page in cache. The masks have one bit a block of the page.
#[derive(Clone, Debug)]
pub(crate) struct CachePage {
    pub data: Box<[u8]>,
    pub dirty: u64,
    pub writeback: u64,
}

/// Bytes on their way to disk, as they were when writeback began.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub page: u64,
    pub blocks: u64,
    pub data: Box<[u8]>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct FileBody {
    pub size: u64,
    pub realtime: bool,
    pub blocks: BTreeMap<u64, Mapped>,
    /// Data in metadata, instead of block 0.
    pub inline: Option<Vec<u8>>,
    pub cache: BTreeMap<u64, CachePage>,
    pub inflight: Vec<InFlight>,
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(FileBody),
    Dir(BTreeMap<Vec<u8>, NodeId>),
    Symlink(Vec<u8>),
    Special(SpecialKind),
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub fs: FsIx,
    pub id: InodeId,
    pub links: u64,
    /// References other than names (mappings, open files); an inode lives as long as either.
    pub held: u32,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    /// This user may open it.
    pub readable: bool,
    /// This user may ask for its cache state.
    pub owned: bool,
    /// The directory does not tell its kind (`DT_UNKNOWN`).
    pub shy: bool,
    pub body: Body,
}

impl Node {
    pub(crate) fn file(&self) -> Option<&FileBody> {
        match &self.body {
            Body::File(f) => Some(f),
            _ => None,
        }
    }

    pub(crate) fn file_mut(&mut self) -> Option<&mut FileBody> {
        match &mut self.body {
            Body::File(f) => Some(f),
            _ => None,
        }
    }
}

/// Attributes of an inode as `stat` tells them; times in ticks of the simulated clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode.
    pub inode: InodeId,
    /// Bytes.
    pub size: u64,
    /// Names.
    pub links: u64,
    /// Last access.
    pub atime: u64,
    /// Last change of data.
    pub mtime: u64,
    /// Last change of anything.
    pub ctime: u64,
}

/// Cache of one file in pages up to EOF, as cachestat counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Cached.
    pub resident: u64,
    /// Dirty.
    pub dirty: u64,
    /// Being written.
    pub writeback: u64,
}
