//! [`Tree`] to columns. The order of the columns is the format; `decode` reads them in the same.

use std::collections::HashMap;
use std::hash::Hash;

use super::Numbers;
use super::column::Column;
use crate::sealed::tree::{Data, Inode, Node, Tree};

/// Kinds of inode.
pub(super) mod kind {
    pub const DIR: u8 = 0;
    pub const FILE: u8 = 1;
    pub const SYMLINK: u8 = 2;
    pub const FIFO: u8 = 3;
    pub const SOCKET: u8 = 4;
    pub const CHAR: u8 = 5;
    pub const BLOCK: u8 = 6;
}

/// Where data is.
pub(super) mod place {
    pub const EMPTY: u8 = 0;
    /// Followed by the anchor's number.
    pub const NUMBERED: u8 = 1;
    /// Followed by the anchor's key.
    pub const KEYED: u8 = 2;
}

macro_rules! columns {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Default)]
        pub(super) struct Columns { $($(#[$doc])* pub $name: Column),* }

        impl Columns {
            fn into_list(self) -> Vec<Vec<u8>> {
                vec![$(self.$name.bytes),*]
            }
        }

        /// The same for reading.
        pub(super) struct Readers<'a> { $(pub $name: super::column::Reader<'a>),* }

        impl<'a> Readers<'a> {
            /// `next` gives one column after the other.
            pub fn new(
                mut next: impl FnMut() -> Result<super::column::Reader<'a>, super::Damage>,
            ) -> Result<Self, super::Damage> {
                Ok(Readers { $($name: next()?),* })
            }
        }

        pub(super) const COLUMNS: u8 = [$(stringify!($name)),*].len() as u8;
    };
}

columns!(
    /// Number of entries, inodes, modes, sets of attributes.
    counts, parents, name_lengths, names, inodes, kinds, /// Distinct (mode, uid, gid).
    modes, mode_of, /// Distinct sets of attributes: count, then names and values.
    xattr_counts, xattr_lengths, xattrs, xattrs_of, mtimes, inos, ctimes, sizes, links, /// Files only.
    file_sizes, places, serials, keys, target_lengths, targets, devices
);

/// Numbers distinct values in the order of their coming.
struct Table<T> {
    numbers: HashMap<T, u32>,
}

impl<T: Hash + Eq + Clone> Table<T> {
    fn number(&mut self, value: &T, mut new: impl FnMut(&T)) -> u32 {
        if let Some(number) = self.numbers.get(value) {
            return *number;
        }
        let number = self.numbers.len() as u32;
        self.numbers.insert(value.clone(), number);
        new(value);
        number
    }
}

/// Nanoseconds since 1970.
fn nanos((seconds, nanos): (i64, u32)) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanos)
}

pub(super) fn body(tree: &Tree, numbers: Option<&Numbers<'_>>) -> Vec<u8> {
    let mut columns = Columns::default();
    for entry in &tree.entries {
        columns.parents.ascending(entry.parent.0.into());
        columns.names.text(&mut columns.name_lengths, &entry.name);
        columns.inodes.ascending(entry.inode.0.into());
    }
    let mut modes = Table { numbers: HashMap::new() };
    let mut sets = Table { numbers: HashMap::new() };
    for inode in &tree.inodes {
        shared_facts(&mut columns, inode, &mut modes, &mut sets);
        node(&mut columns, inode, numbers);
    }
    for count in [tree.entries.len(), tree.inodes.len(), modes.numbers.len(), sets.numbers.len()] {
        columns.counts.number(count as u128);
    }
    let mut body = numbers.map_or([0; 16], |n| n.store.0).to_vec();
    body.push(COLUMNS);
    let columns = columns.into_list();
    for column in &columns {
        body.extend((column.len() as u64).to_le_bytes());
    }
    body.extend(columns.into_iter().flatten());
    body
}

type XattrSet<'a> = &'a [(Box<[u8]>, Box<[u8]>)];

fn shared_facts<'a>(
    columns: &mut Columns,
    inode: &'a Inode,
    modes: &mut Table<(u32, u32, u32)>,
    sets: &mut Table<XattrSet<'a>>,
) {
    let meta = &inode.meta;
    let mode = modes.number(&(meta.mode, meta.uid, meta.gid), |(mode, uid, gid)| {
        [mode, uid, gid].into_iter().for_each(|v| columns.modes.number((*v).into()));
    });
    columns.mode_of.number(mode.into());
    let set = sets.number(&&meta.xattrs[..], |set| {
        columns.xattr_counts.number(set.len() as u128);
        for (name, value) in *set {
            columns.xattrs.text(&mut columns.xattr_lengths, name);
            columns.xattrs.text(&mut columns.xattr_lengths, value);
        }
    });
    columns.xattrs_of.number(set.into());
    columns.mtimes.ascending(nanos(meta.mtime));
    let raw = &inode.raw;
    columns.inos.ascending(raw.ino.into());
    columns.ctimes.ascending(nanos(raw.ctime));
    columns.sizes.number(raw.size.into());
    columns.links.number(raw.links.into());
}

fn node(columns: &mut Columns, inode: &Inode, numbers: Option<&Numbers<'_>>) {
    let kind = match &inode.node {
        Node::Dir => kind::DIR,
        Node::File { size, data } => {
            // Nearly always what the raw inode's size was.
            columns.file_sizes.number((size ^ inode.raw.size).into());
            data_place(columns, data, numbers);
            kind::FILE
        }
        Node::Symlink(target) => {
            columns.targets.text(&mut columns.target_lengths, target);
            kind::SYMLINK
        }
        Node::Fifo => kind::FIFO,
        Node::Socket => kind::SOCKET,
        Node::CharDevice(rdev) => {
            columns.devices.number((*rdev).into());
            kind::CHAR
        }
        Node::BlockDevice(rdev) => {
            columns.devices.number((*rdev).into());
            kind::BLOCK
        }
    };
    columns.kinds.bytes.push(kind);
}

fn data_place(columns: &mut Columns, data: &Data, numbers: Option<&Numbers<'_>>) {
    let Data::Anchor(key) = data else { return columns.places.bytes.push(place::EMPTY) };
    // Only a number that leads back to the key is one.
    let serial = numbers.and_then(|n| Some((n.store, (n.of)(key)?)));
    match serial.filter(|(store, serial)| crate::store::AnchorKey::of(*store, *serial) == *key) {
        Some((_, serial)) => {
            columns.places.bytes.push(place::NUMBERED);
            columns.serials.ascending(serial.into());
        }
        None => {
            columns.places.bytes.push(place::KEYED);
            columns.keys.bytes.extend(key.0);
        }
    }
}
