//! Reflink and snapshot: two files, one place on disk.
//!
//! Both write dirty pages back first, as Linux does: right after a clone nothing is dirty. The stale map comes from
//! what is written *afterwards* (design 5.6).

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::data::{grab, release};
use super::node::{Body, NodeId};
use super::world::World;

impl World {
    /// `FICLONE`: `dst` gets everything `src` has.
    ///
    /// # Errors
    /// As [`World::clone_range`].
    pub fn reflink(&mut self, src: NodeId, dst: NodeId) -> io::Result<()> {
        let len = self.file(src)?.1.size;
        self.clone_range(src, 0, len, dst, 0)
    }

    /// `FICLONERANGE`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without reflink, `EXDEV` across file systems, `EINVAL` for bad alignment, for a range that is not
    /// inside `src`, or between device classes, `ENOENT`.
    pub fn clone_range(&mut self, src: NodeId, from: u64, len: u64, dst: NodeId, to: u64) -> io::Result<()> {
        self.check_clone(src, from, len, dst, to)?;
        if len == 0 {
            return Ok(());
        }
        self.sync(src)?;
        self.sync(dst)?;
        if let Some(inline) = self.file(src)?.1.inline.clone() {
            return self.clone_inline(inline, len, dst, to);
        }
        let page = self.page.bytes();
        let (fs, file) = self.file(src)?;
        let block = fs.habits.block_bytes;
        let blocks = len.div_ceil(block);
        let shares_unwritten = fs.habits.reflinks_unwritten;
        let shift = |b: u64| b - from / block + to / block;
        let wanted: BTreeMap<u64, super::node::Mapped> = file
            .blocks
            .range(from / block..from / block + blocks)
            .filter(|(_, m)| shares_unwritten || !matches!(m, super::node::Mapped::Unwritten(_)))
            .map(|(b, m)| (shift(*b), *m))
            .collect();
        let (fs, file, _) = self.file_mut(dst)?;
        let realtime = file.realtime;
        wanted.values().for_each(|m| grab(fs, realtime, *m));
        let replaced: Vec<u64> =
            file.blocks.range(to / block..to / block + blocks).map(|(b, _)| *b).collect();
        for b in replaced {
            let old = file.blocks.remove(&b).expect("listed");
            release(fs, realtime, old);
        }
        file.blocks.extend(wanted);
        if to == 0 {
            file.inline = None;
        }
        let old_size = file.size;
        file.size = old_size.max(to + len);
        let range = to / page..(to + len).div_ceil(page);
        file.cache.retain(|p, _| !range.contains(p));
        if self.file(dst)?.1.inline.is_some() {
            self.cached(dst, 0)?.dirty |= 1;
            self.sync(dst)?;
        }
        self.touch(dst);
        Ok(())
    }

    fn check_clone(&self, src: NodeId, from: u64, len: u64, dst: NodeId, to: u64) -> io::Result<()> {
        let fail = |errno: Errno| -> io::Result<()> { Err(errno.into()) };
        if self.node(src)?.fs != self.node(dst)?.fs {
            return fail(Errno::XDEV);
        }
        let (fs, source) = self.file(src)?;
        let (_, target) = self.file(dst)?;
        if !fs.habits.reflink {
            return fail(Errno::OPNOTSUPP);
        }
        let block = fs.habits.block_bytes;
        let aligned = from.is_multiple_of(block) && to.is_multiple_of(block);
        let to_eof = from + len == source.size && to + len >= target.size;
        let inside = from.checked_add(len).is_some_and(|end| end <= source.size);
        if !aligned || !inside || !(len.is_multiple_of(block) || to_eof) {
            return fail(Errno::INVAL);
        }
        let overlap = src == dst && from < to + len && to < from + len;
        if overlap || source.realtime != target.realtime {
            return fail(Errno::INVAL);
        }
        Ok(())
    }

    /// Inline data are copied, into metadata again where they fill the copy, else as ordinary data.
    fn clone_inline(&mut self, inline: Vec<u8>, len: u64, dst: NodeId, to: u64) -> io::Result<()> {
        let (_, file, _) = self.file_mut(dst)?;
        let mut data = inline;
        data.resize(len as usize, 0);
        if to == 0 && file.size <= len && file.blocks.is_empty() {
            file.size = len;
            file.inline = Some(data);
            file.cache.clear();
            self.touch(dst);
            return Ok(());
        }
        self.write_at(dst, to, &data)
    }

    /// `btrfs subvolume snapshot`: the tree at `of` again at `at`, inode numbers kept, `st_dev` another one.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there are no snapshots, or of the paths.
    pub fn snapshot(&mut self, of: &Path, at: &Path) -> io::Result<()> {
        let from = self.resolve(of, true)?.node;
        let fs = self.node(from)?.fs;
        if !self.fses[fs.0].habits.snapshots {
            return Err(Errno::OPNOTSUPP.into());
        }
        let root = self.mkdir(at)?;
        let dev = self.fresh_dev();
        self.nodes.get_mut(&root).expect("just made").id.dev = dev;
        let mut copies = BTreeMap::from([(from, root)]);
        self.copy_children(from, root, dev, &mut copies)
    }

    fn copy_children(
        &mut self,
        from: NodeId,
        to: NodeId,
        dev: u64,
        copies: &mut BTreeMap<NodeId, NodeId>,
    ) -> io::Result<()> {
        let Body::Dir(entries) = self.node(from)?.body.clone() else { return Ok(()) };
        for (name, child) in entries {
            let original = self.node(child)?;
            // A subvolume inside a snapshotted one becomes an empty directory.
            if original.id.dev != self.node(from)?.id.dev || copies.values().any(|c| *c == child) {
                continue;
            }
            let copy = match copies.get(&child) {
                Some(copy) => *copy,
                None => self.copy_node(child, dev)?,
            };
            copies.insert(child, copy);
            let Body::Dir(target) = &mut self.nodes.get_mut(&to).expect("a copy").body else {
                unreachable!("copies of directories are directories")
            };
            target.insert(name, copy);
            self.copy_children(child, copy, dev, copies)?;
        }
        Ok(())
    }

    fn copy_node(&mut self, original: NodeId, dev: u64) -> io::Result<NodeId> {
        if self.node(original)?.file().is_some() {
            self.sync(original)?;
        }
        let mut node = self.node(original)?.clone();
        node.id.dev = dev;
        node.held = 0;
        let fs = &mut self.fses[node.fs.0];
        match &mut node.body {
            Body::File(file) => {
                file.cache.clear();
                file.blocks.values().for_each(|m| grab(fs, file.realtime, *m));
            }
            Body::Dir(entries) => entries.clear(),
            Body::Symlink(_) | Body::Special(_) => {}
        }
        Ok(self.add_node(node))
    }
}
