//! Columns to [`Tree`], whatever the bytes are.

use super::column::Reader;
use super::encode::{COLUMNS, Readers, kind, place};
use super::{BODY_BYTES_MAX, Damage};
use crate::sealed::tree::{Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree, Xattr};
use crate::store::key::{AnchorKey, StoreId};

pub(super) fn tree(body: &[u8]) -> Result<Tree, Damage> {
    let mut head = Reader::new(body);
    let store = StoreId(head.take(16)?.try_into().map_err(|_| Damage::Short)?);
    if head.take(1)? != [COLUMNS] {
        return Err(Damage::Short);
    }
    let mut lengths = Reader::new(head.take(8 * usize::from(COLUMNS))?);
    let mut columns = Readers::new(|| {
        let length = lengths.take(8)?.try_into().map_or(u64::MAX, u64::from_le_bytes);
        Ok(Reader::new(head.take(usize::try_from(length).map_err(|_| Damage::Short)?)?))
    })?;
    let mut count = |most: usize| {
        let count: usize = columns.counts.number()?;
        // Everything counted costs a byte at least: a count can't make us allocate more than was read.
        if count <= most { Ok(count) } else { Err(Damage::Short) }
    };
    let entries = count(columns.parents.left())?;
    let inodes = count(columns.kinds.left())?;
    let modes = count(columns.modes.left())?;
    let sets = count(columns.xattr_counts.left())?;
    let modes = (0..modes)
        .map(|_| Ok((columns.modes.number()?, columns.modes.number()?, columns.modes.number()?)))
        .collect::<Result<Vec<(u32, u32, u32)>, Damage>>()?;
    let sets = (0..sets).map(|_| xattrs(&mut columns)).collect::<Result<Vec<_>, Damage>>()?;
    let mut tree = Tree { entries: Vec::with_capacity(entries), inodes: Vec::with_capacity(inodes) };
    let mut copied = 0;
    for _ in 0..inodes {
        let meta = meta(&mut columns, &modes, &sets)?;
        copied += meta.xattrs.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum::<u64>();
        if copied > BODY_BYTES_MAX {
            return Err(Damage::Tree("attributes out of order or too large"));
        }
        let raw = raw(&mut columns)?;
        let node = node(&mut columns, store, raw.size)?;
        tree.inodes.push(Inode { meta, raw, node });
    }
    read_entries(&mut columns, entries, &mut tree)?;
    Ok(tree)
}

/// A set of attributes. Sets are shared by many inodes and copied for each: both are bounded.
fn xattrs(columns: &mut Readers<'_>) -> Result<Vec<Xattr>, Damage> {
    let count: usize = columns.xattr_counts.number()?;
    if count > columns.xattr_lengths.left() / 2 {
        return Err(Damage::Short);
    }
    let mut set: Vec<Xattr> = Vec::with_capacity(count);
    let mut bytes = 0;
    for _ in 0..count {
        let name: Box<[u8]> = columns.xattrs.text(&mut columns.xattr_lengths)?.into();
        let value: Box<[u8]> = columns.xattrs.text(&mut columns.xattr_lengths)?.into();
        bytes += name.len() + value.len();
        if set.last().is_some_and(|(last, _)| *last >= name) || name.is_empty() || bytes > XATTR_BYTES_MAX {
            return Err(Damage::Tree("attributes out of order or too large"));
        }
        set.push((name, value));
    }
    Ok(set)
}

/// The most bytes of attributes of one inode: what XFS can hold is less.
const XATTR_BYTES_MAX: usize = 16 << 20;

fn time(column: &mut Reader<'_>) -> Result<(i64, u32), Damage> {
    const SECOND: i128 = 1_000_000_000;
    let nanos: i128 = column.ascending()?;
    let seconds = i64::try_from(nanos.div_euclid(SECOND)).map_err(|_| Damage::Tree("a time"))?;
    Ok((seconds, nanos.rem_euclid(SECOND) as u32))
}

fn meta(columns: &mut Readers<'_>, modes: &[(u32, u32, u32)], sets: &[Vec<Xattr>]) -> Result<Meta, Damage> {
    let mode: usize = columns.mode_of.number()?;
    let (mode, uid, gid) = *modes.get(mode).ok_or(Damage::Tree("a mode"))?;
    if mode > 0o7777 {
        return Err(Damage::Tree("a mode"));
    }
    let set: usize = columns.xattrs_of.number()?;
    let xattrs = sets.get(set).ok_or(Damage::Tree("a set of attributes"))?.clone();
    Ok(Meta { mode, uid, gid, mtime: time(&mut columns.mtimes)?, xattrs })
}

fn raw(columns: &mut Readers<'_>) -> Result<RawFacts, Damage> {
    Ok(RawFacts {
        ino: columns.inos.ascending()?,
        ctime: time(&mut columns.ctimes)?,
        size: columns.sizes.number()?,
        links: columns.links.number()?,
        signature: None,
    })
}

fn node(columns: &mut Readers<'_>, store: StoreId, raw_size: u64) -> Result<Node, Damage> {
    Ok(match columns.kinds.take(1)? {
        [kind::DIR] => Node::Dir,
        [kind::FILE] => {
            let size = columns.file_sizes.number::<u64>()? ^ raw_size;
            Node::File { size, data: data(columns, store)? }
        }
        [kind::SYMLINK] => Node::Symlink(columns.targets.text(&mut columns.target_lengths)?.into()),
        [kind::FIFO] => Node::Fifo,
        [kind::SOCKET] => Node::Socket,
        [kind::CHAR] => Node::CharDevice(columns.devices.number()?),
        [kind::BLOCK] => Node::BlockDevice(columns.devices.number()?),
        _ => return Err(Damage::Tree("a kind")),
    })
}

fn data(columns: &mut Readers<'_>, store: StoreId) -> Result<Data, Damage> {
    Ok(match columns.places.take(1)? {
        [place::EMPTY] => Data::Empty,
        [place::NUMBERED] => Data::Anchor(AnchorKey::of(store, columns.serials.ascending()?)),
        [place::KEYED] => {
            Data::Anchor(AnchorKey(columns.keys.take(32)?.try_into().map_err(|_| Damage::Short)?))
        }
        _ => return Err(Damage::Tree("a place")),
    })
}

/// Entries, held against every invariant of a tree.
fn read_entries(columns: &mut Readers<'_>, count: usize, tree: &mut Tree) -> Result<(), Damage> {
    let mut last_child: Vec<u32> = vec![0; count];
    let mut named = vec![false; tree.inodes.len()];
    for number in 0..count {
        let parent: u32 = columns.parents.ascending()?;
        let name: Box<[u8]> = columns.names.text(&mut columns.name_lengths)?.into();
        let inode: u32 = columns.inodes.ascending()?;
        let node = &tree.inodes.get(inode as usize).ok_or(Damage::Tree("an inode number"))?.node;
        let is_dir = *node == Node::Dir;
        if is_dir && named[inode as usize] {
            return Err(Damage::Tree("a directory with two names"));
        }
        named[inode as usize] = true;
        if number == 0 {
            if parent != 0 || !name.is_empty() || !is_dir {
                return Err(Damage::Tree("no root"));
            }
        } else {
            let known = tree.entries.get(parent as usize).ok_or(Damage::Tree("a parent"))?;
            if tree.inodes[known.inode.0 as usize].node != Node::Dir {
                return Err(Damage::Tree("a parent that is no directory"));
            }
            let last = std::mem::replace(&mut last_child[parent as usize], number as u32);
            let after = last == 0 || tree.entries[last as usize].name < name;
            if !after || name.is_empty() || matches!(&name[..], b"." | b"..") {
                return Err(Damage::Tree("a name"));
            }
            if name.contains(&b'/') || name.contains(&0) {
                return Err(Damage::Tree("a name"));
            }
        }
        tree.entries.push(Entry { parent: EntryId(parent), name, inode: InodeIndex(inode) });
    }
    if count == 0 || named.contains(&false) {
        return Err(Damage::Tree("an inode without a name, or no entries"));
    }
    Ok(())
}
