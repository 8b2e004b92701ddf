//! The simulated host: file systems, the tree of names, mounts, attributes.
//!
//! Invariant: every node is reachable by a name or held by a reference; its blocks are released with the last of
//! both. Names are bytes. Data are elsewhere (`data`, `writeback`, `clone`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use pagefold_engine::units::PageSize;
use pagefold_fsadapters::source::{InodeId, SpecialKind};
use rustix::io::Errno;

use super::disk::{BlockNo, Device};
use super::flavour::{Flavour, Habits};
use super::node::{Attributes, Body, CacheCounts, FileBody, FsIx, Node, NodeId};
use super::rng::Rng;

/// Where a path leads: a node, seen through a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub(crate) mount: usize,
    pub(crate) node: NodeId,
}

#[derive(Clone, Debug)]
pub(crate) struct Fs {
    pub flavour: Flavour,
    pub habits: Habits,
    pub uuid: [u8; 16],
    pub data: Device,
    pub realtime: Device,
}

impl Fs {
    pub(crate) fn device(&mut self, realtime: bool) -> &mut Device {
        if realtime { &mut self.realtime } else { &mut self.data }
    }

    pub(crate) fn device_ref(&self, realtime: bool) -> &Device {
        if realtime { &self.realtime } else { &self.data }
    }
}

#[derive(Clone, Debug)]
struct Mount {
    root: NodeId,
}

impl Place {
    /// The node.
    #[must_use]
    pub fn node(self) -> NodeId {
        self.node
    }
}

/// The simulated host.
pub struct World {
    pub(crate) page: PageSize,
    pub(crate) fses: Vec<Fs>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) rng: Rng,
    pub(crate) clock: u64,
    /// Root: may read and ask everything.
    pub privileged: bool,
    /// Planted bugs, for the tests that show that the checkers see them.
    pub bugs: super::bugs::Bugs,
    pub(crate) hook: Option<super::source::Interloper>,
    mounts: Vec<Mount>,
    covered: BTreeMap<(usize, NodeId), usize>,
    next_node: u64,
    next_dev: u64,
    next_ino: u64,
}

const SYMLINKS_MAX: u32 = 40;

fn err<T>(errno: Errno) -> io::Result<T> {
    Err(errno.into())
}

impl World {
    /// A host with one file system of `flavour` mounted at `/`.
    #[must_use]
    pub fn new(flavour: Flavour, page: PageSize, seed: u64) -> World {
        let mut world = World {
            page,
            fses: Vec::new(),
            nodes: BTreeMap::new(),
            rng: Rng::new(seed),
            clock: 1_000,
            privileged: true,
            bugs: super::bugs::Bugs::default(),
            hook: None,
            mounts: Vec::new(),
            covered: BTreeMap::new(),
            next_node: 1,
            next_dev: 0x20,
            next_ino: 256,
        };
        let root = world.new_fs(flavour);
        world.mounts.push(Mount { root });
        world
    }

    fn new_fs(&mut self, flavour: Flavour) -> NodeId {
        let habits = flavour.habits();
        assert!(habits.block_bytes <= self.page.bytes() && self.page.bytes() / habits.block_bytes <= 64);
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&self.rng.bits().to_le_bytes());
        uuid[8..].copy_from_slice(&(self.fses.len() as u64).to_le_bytes());
        let (data, realtime) = (Device::new(habits.block_bytes), Device::new(habits.block_bytes));
        self.fses.push(Fs { flavour, habits, uuid, data, realtime });
        let dev = self.fresh_dev();
        self.new_node(FsIx(self.fses.len() - 1), dev, Body::Dir(BTreeMap::new()))
    }

    pub(crate) fn fresh_dev(&mut self) -> u64 {
        self.next_dev += 1;
        self.next_dev
    }

    fn new_node(&mut self, fs: FsIx, dev: u64, body: Body) -> NodeId {
        self.next_ino += 1;
        let id = InodeId { dev, ino: self.next_ino };
        let now = self.tick();
        let (readable, owned, shy) = (true, true, false);
        self.add_node(Node {
            fs,
            id,
            links: 1,
            held: 0,
            atime: now,
            mtime: now,
            ctime: now,
            readable,
            owned,
            shy,
            body,
        })
    }

    pub(crate) fn add_node(&mut self, node: Node) -> NodeId {
        let id = NodeId(self.next_node);
        self.next_node += 1;
        self.nodes.insert(id, node);
        id
    }

    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub(crate) fn node(&self, id: NodeId) -> io::Result<&Node> {
        self.nodes.get(&id).ok_or_else(|| Errno::NOENT.into())
    }

    pub(crate) fn file(&self, id: NodeId) -> io::Result<(&Fs, &FileBody)> {
        let node = self.node(id)?;
        node.file().map(|f| (&self.fses[node.fs.0], f)).ok_or_else(|| Errno::INVAL.into())
    }

    /// A file with its file system and the generator, all mutable at once.
    pub(crate) fn file_mut(&mut self, id: NodeId) -> io::Result<(&mut Fs, &mut FileBody, &mut Rng)> {
        let Some(node) = self.nodes.get_mut(&id) else { return err(Errno::NOENT) };
        let fs = &mut self.fses[node.fs.0];
        match node.file_mut() {
            Some(file) => Ok((fs, file, &mut self.rng)),
            None => err(Errno::INVAL),
        }
    }

    /// Data changed: mtime and ctime.
    pub(crate) fn touch(&mut self, id: NodeId) {
        let now = self.tick();
        if let Some(node) = self.nodes.get_mut(&id) {
            node.mtime = now;
            node.ctime = now;
        }
    }

    pub(crate) fn touch_ctime(&mut self, id: NodeId) {
        let now = self.tick();
        if let Some(node) = self.nodes.get_mut(&id) {
            node.ctime = now;
        }
    }

    // ---- paths ----

    /// The root of the tree.
    #[must_use]
    pub fn root(&self) -> Place {
        Place { mount: 0, node: self.mounts[0].root }
    }

    /// The place behind a child's name, under what is mounted there.
    pub(crate) fn child(&self, parent: Place, name: &[u8]) -> io::Result<Place> {
        let Body::Dir(entries) = &self.node(parent.node)?.body else { return err(Errno::NOTDIR) };
        let Some(node) = entries.get(name) else { return err(Errno::NOENT) };
        Ok(self.under_mounts(Place { mount: parent.mount, node: *node }))
    }

    fn under_mounts(&self, mut place: Place) -> Place {
        while let Some(&mount) = self.covered.get(&(place.mount, place.node)) {
            place = Place { mount, node: self.mounts[mount].root };
        }
        place
    }

    /// Walks an absolute path. Symbolic links on the way are followed; the last only if `follow_last`.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ELOOP`.
    pub fn resolve(&self, path: &Path, follow_last: bool) -> io::Result<Place> {
        let mut budget = SYMLINKS_MAX;
        let root = self.under_mounts(self.root());
        self.walk(root, path, follow_last, &mut budget)
    }

    fn walk(&self, start: Place, path: &Path, follow_last: bool, budget: &mut u32) -> io::Result<Place> {
        let mut stack = vec![start];
        let mut parts = path.components().peekable();
        while let Some(part) = parts.next() {
            let here = *stack.last().expect("never empty");
            match part {
                Component::RootDir | Component::Prefix(_) => stack = vec![self.under_mounts(self.root())],
                Component::CurDir => {}
                Component::ParentDir => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                }
                Component::Normal(name) => {
                    let next = self.child(here, name.as_bytes())?;
                    let last = parts.peek().is_none();
                    match &self.node(next.node)?.body {
                        Body::Symlink(target) if !last || follow_last => {
                            if *budget == 0 {
                                return err(Errno::LOOP);
                            }
                            *budget -= 1;
                            stack.push(self.walk(
                                here,
                                Path::new(OsStr::from_bytes(target)),
                                true,
                                budget,
                            )?);
                        }
                        _ => stack.push(next),
                    }
                }
            }
        }
        Ok(*stack.last().expect("never empty"))
    }

    /// The parent of `path` and its last component.
    fn parent_of<'a>(&self, path: &'a Path) -> io::Result<(Place, &'a [u8])> {
        let Some(name) = path.file_name() else { return err(Errno::INVAL) };
        let parent = path.parent().unwrap_or(Path::new("/"));
        Ok((self.resolve(parent, true)?, name.as_bytes()))
    }

    fn entries_mut(&mut self, dir: NodeId) -> io::Result<&mut BTreeMap<Vec<u8>, NodeId>> {
        self.touch(dir);
        match self.nodes.get_mut(&dir).map(|n| &mut n.body) {
            Some(Body::Dir(entries)) => Ok(entries),
            Some(_) => err(Errno::NOTDIR),
            None => err(Errno::NOENT),
        }
    }

    fn add(&mut self, path: &Path, body: Body) -> io::Result<NodeId> {
        let (parent, name) = self.parent_of(path)?;
        if self.child(parent, name).is_ok() {
            return err(Errno::EXIST);
        }
        let (fs, dev) = {
            let node = self.node(parent.node)?;
            (node.fs, node.id.dev)
        };
        let node = self.new_node(fs, dev, body);
        self.entries_mut(parent.node)?.insert(name.to_vec(), node);
        Ok(node)
    }

    // ---- operations on names ----

    /// An empty regular file; on the real-time device if `realtime` and there is one.
    ///
    /// # Errors
    /// `EEXIST`, or of the path.
    pub fn create(&mut self, path: &Path, realtime: bool) -> io::Result<NodeId> {
        let node = self.add(path, Body::File(FileBody::default()))?;
        let (fs, file, _) = self.file_mut(node)?;
        file.realtime = realtime && fs.habits.realtime;
        Ok(node)
    }

    /// A file without a name beside `of` (`O_TMPFILE`), held once: gone with the last [`World::let_go`].
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL` when `of` is no file.
    pub fn unnamed(&mut self, of: NodeId) -> io::Result<NodeId> {
        let realtime = self.file(of)?.1.realtime;
        let (fs, dev) = (self.node(of)?.fs, self.node(of)?.id.dev);
        let node = self.new_node(fs, dev, Body::File(FileBody { realtime, ..FileBody::default() }));
        let fresh = self.nodes.get_mut(&node).expect("just made");
        (fresh.links, fresh.held) = (0, 1);
        Ok(node)
    }

    /// A directory.
    ///
    /// # Errors
    /// `EEXIST`, or of the path.
    pub fn mkdir(&mut self, path: &Path) -> io::Result<NodeId> {
        self.add(path, Body::Dir(BTreeMap::new()))
    }

    /// A subvolume: a directory with an `st_dev` of its own.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there are none, `EEXIST`, or of the path.
    pub fn mksubvolume(&mut self, path: &Path) -> io::Result<NodeId> {
        let node = self.mkdir(path)?;
        if !self.fses[self.node(node)?.fs.0].habits.snapshots {
            self.unlink(path)?;
            return err(Errno::OPNOTSUPP);
        }
        let dev = self.fresh_dev();
        self.nodes.get_mut(&node).expect("just made").id.dev = dev;
        Ok(node)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// `EEXIST`, or of the path.
    pub fn symlink(&mut self, target: &Path, path: &Path) -> io::Result<NodeId> {
        self.add(path, Body::Symlink(target.as_os_str().as_bytes().to_vec()))
    }

    /// A FIFO, socket or device.
    ///
    /// # Errors
    /// `EEXIST`, or of the path.
    pub fn mknod(&mut self, path: &Path, kind: SpecialKind) -> io::Result<NodeId> {
        self.add(path, Body::Special(kind))
    }

    /// A further name for a file.
    ///
    /// # Errors
    /// `EEXIST`, `EXDEV`, `EPERM` for a directory, or of the path.
    pub fn link(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        let node = self.resolve(old, false)?.node;
        let (parent, name) = self.parent_of(new)?;
        if matches!(self.node(node)?.body, Body::Dir(_)) {
            return err(Errno::PERM);
        }
        if self.node(node)?.id.dev != self.node(parent.node)?.id.dev {
            return err(Errno::XDEV);
        }
        if self.child(parent, name).is_ok() {
            return err(Errno::EXIST);
        }
        self.entries_mut(parent.node)?.insert(name.to_vec(), node);
        self.nodes.get_mut(&node).expect("resolved").links += 1;
        self.touch_ctime(node);
        Ok(())
    }

    /// Removes a name; a directory must be empty.
    ///
    /// # Errors
    /// `ENOTEMPTY`, or of the path.
    pub fn unlink(&mut self, path: &Path) -> io::Result<()> {
        let (parent, name) = self.parent_of(path)?;
        let node = self.child(parent, name)?.node;
        if matches!(&self.node(node)?.body, Body::Dir(entries) if !entries.is_empty()) {
            return err(Errno::NOTEMPTY);
        }
        self.entries_mut(parent.node)?.remove(name);
        self.nodes.get_mut(&node).expect("resolved").links -= 1;
        self.touch_ctime(node);
        self.reap(node);
        Ok(())
    }

    /// Gives a file another name; what had that name loses it.
    ///
    /// # Errors
    /// `EXDEV`, or of the paths.
    pub fn rename(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        let node = self.resolve(old, false)?.node;
        let (from, from_name) = self.parent_of(old)?;
        let (to, to_name) = self.parent_of(new)?;
        if self.node(from.node)?.id.dev != self.node(to.node)?.id.dev {
            return err(Errno::XDEV);
        }
        if let Ok(there) = self.child(to, to_name) {
            if there.node == node {
                return Ok(());
            }
            self.unlink(new)?;
        }
        self.entries_mut(from.node)?.remove(from_name);
        self.entries_mut(to.node)?.insert(to_name.to_vec(), node);
        self.touch_ctime(node);
        Ok(())
    }

    /// Mounts a fresh file system of `flavour` on a directory.
    ///
    /// # Errors
    /// Of the path.
    pub fn mount_new(&mut self, at: &Path, flavour: Flavour) -> io::Result<()> {
        let place = self.resolve(at, true)?;
        let root = self.new_fs(flavour);
        self.mount(place, root);
        Ok(())
    }

    /// Shows the tree at `what` (a directory) at `at` too (`mount --bind`).
    ///
    /// # Errors
    /// Of the paths.
    pub fn bind(&mut self, what: &Path, at: &Path) -> io::Result<()> {
        let root = self.resolve(what, true)?.node;
        let place = self.resolve(at, true)?;
        self.mount(place, root);
        Ok(())
    }

    fn mount(&mut self, at: Place, root: NodeId) {
        self.mounts.push(Mount { root });
        self.covered.insert((at.mount, at.node), self.mounts.len() - 1);
    }

    /// Says who may read a node (`readable`), ask for its cache (`owned`), and whether listings tell its kind.
    ///
    /// # Errors
    /// Of the path.
    pub fn set_access(&mut self, path: &Path, readable: bool, owned: bool, shy: bool) -> io::Result<()> {
        let id = self.resolve(path, false)?.node;
        let node = self.nodes.get_mut(&id).expect("resolved");
        (node.readable, node.owned, node.shy) = (readable, owned, shy);
        Ok(())
    }

    pub(crate) fn may_read(&self, node: &Node) -> bool {
        self.privileged || node.readable
    }

    /// Files that live without a name.
    #[must_use]
    pub fn unnamed_files(&self) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, n)| n.links == 0).map(|(id, _)| *id).collect()
    }

    /// What a file's file system is.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn flavour_of(&self, id: NodeId) -> io::Result<Flavour> {
        Ok(self.fses[self.node(id)?.fs.0].flavour)
    }

    /// `len` bytes at a physical byte address as they are now, for checkers: `None` where nothing is allocated.
    #[must_use]
    pub fn physical_bytes(&self, fs: FsIx, realtime: bool, address: u64, len: usize) -> Option<Vec<u8>> {
        let host = &self.fses[fs.0];
        let block = host.habits.block_bytes;
        let device = host.device_ref(realtime);
        let mut out = vec![0; len.next_multiple_of(block as usize)];
        for (i, part) in out.chunks_mut(block as usize).enumerate() {
            let number = BlockNo(address / block + i as u64);
            if device.refs(number) == 0 {
                return None;
            }
            device.read(number, part);
        }
        out.truncate(len);
        Some(out)
    }

    // ---- attributes ----

    /// Attributes of a node.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn stat(&self, id: NodeId) -> io::Result<Attributes> {
        let node = self.node(id)?;
        let size = node.file().map_or(0, |f| f.size);
        let Node { id: inode, links, atime, mtime, ctime, .. } = *node;
        Ok(Attributes { inode, size, links, atime, mtime, ctime })
    }

    /// Cache of a file up to EOF.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL`.
    pub fn cache_counts(&self, id: NodeId) -> io::Result<CacheCounts> {
        let (_, file) = self.file(id)?;
        let end = self.page.pages_covering(file.size).0;
        let mut counts = CacheCounts::default();
        for (_, page) in file.cache.range(..end) {
            counts.resident += 1;
            counts.dirty += u64::from(page.dirty != 0);
            counts.writeback += u64::from(page.writeback != 0);
        }
        Ok(counts)
    }

    /// One more reference (a mapping, an open file): the inode outlives its names.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn hold(&mut self, id: NodeId) -> io::Result<()> {
        match self.nodes.get_mut(&id) {
            Some(node) => {
                node.held += 1;
                Ok(())
            }
            None => err(Errno::NOENT),
        }
    }

    /// Gives a reference back.
    pub fn let_go(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.held -= 1;
            self.reap(id);
        }
    }

    fn reap(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get(&id) else { return };
        if node.links == 0 && node.held == 0 {
            self.drop_data(id);
            self.nodes.remove(&id);
        }
    }
}
