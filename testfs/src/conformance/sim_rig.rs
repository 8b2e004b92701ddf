//! The simulation as a [`Rig`].

use std::io;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::source::SpecialKind;

use super::{Need, Rig};
use crate::sim::{Flavour, FsIx, NodeId, SimFs};

/// A simulated host with one file system of a flavour.
pub struct SimRig {
    sim: SimFs,
    flavour: Flavour,
    root: PathBuf,
}

impl SimRig {
    /// A fresh one.
    #[must_use]
    pub fn new(flavour: Flavour, seed: u64) -> SimRig {
        SimRig { sim: SimFs::new(flavour, seed), flavour, root: PathBuf::from("/") }
    }

    /// The host, for what rigs in general can't do.
    #[must_use]
    pub fn sim(&self) -> &SimFs {
        &self.sim
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn node(&self, path: &Path) -> io::Result<NodeId> {
        Ok(self.sim.world().resolve(&self.at(path), true)?.node)
    }
}

impl Rig for SimRig {
    type Source = SimFs;

    fn name(&self) -> String {
        format!("simulated {:?}", self.flavour)
    }

    fn has(&self, need: Need) -> bool {
        let habits = self.flavour.habits();
        match need {
            Need::Extents | Need::Unwritten | Need::Evict | Need::Relocate | Need::HoldWriteback => {
                habits.fiemap
            }
            Need::PlainPages => habits.fiemap && habits.block_bytes == 4096,
            Need::Reflink => habits.reflink,
            Need::Inline => habits.inline_max_bytes > 0,
            Need::Compress => habits.compress,
            Need::Snapshot => habits.snapshots,
            Need::Realtime => habits.realtime,
            Need::NoExtents => !habits.fiemap,
            Need::Unowned => habits.fiemap,
        }
    }

    fn source(&self) -> &SimFs {
        &self.sim
    }

    fn root(&self) -> PathBuf {
        self.root.clone()
    }

    fn enter(&mut self, case: &str) -> io::Result<()> {
        self.root = Path::new("/").join(case);
        self.sim.world().privileged = true;
        self.sim.world().mkdir(&self.root).map(drop)
    }

    fn create(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().create(&self.at(path), false).map(drop)
    }

    fn create_realtime(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().create(&self.at(path), true).map(drop)
    }

    fn mkdir(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().mkdir(&self.at(path)).map(drop)
    }

    fn mkfifo(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().mknod(&self.at(path), SpecialKind::Fifo).map(drop)
    }

    fn symlink(&mut self, target: &Path, path: &Path) -> io::Result<()> {
        self.sim.world().symlink(target, &self.at(path)).map(drop)
    }

    fn write(&mut self, path: &Path, offset: u64, data: &[u8]) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().write_at(node, offset, data)
    }

    fn fsync(&mut self, path: &Path) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().sync(node)
    }

    fn sync_all(&mut self) -> io::Result<()> {
        self.sim.world().sync_all();
        Ok(())
    }

    fn reflink(&mut self, src: &Path, dst: &Path) -> io::Result<()> {
        let from = self.node(src)?;
        let mut world = self.sim.world();
        let to = world.create(&self.at(dst), false)?;
        let result = world.reflink(from, to);
        if result.is_err() {
            world.unlink(&self.at(dst))?;
        }
        result
    }

    fn clone_range(&mut self, src: &Path, from: u64, len: u64, dst: &Path, to: u64) -> io::Result<()> {
        let (src, dst) = (self.node(src)?, self.node(dst)?);
        self.sim.world().clone_range(src, from, len, dst, to)
    }

    fn punch(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().punch(node, offset, len)
    }

    fn fallocate(&mut self, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().fallocate(node, offset, len, false)
    }

    fn truncate(&mut self, path: &Path, size: u64) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().truncate(node, size)
    }

    fn link(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        self.sim.world().link(&self.at(old), &self.at(new))
    }

    fn rename(&mut self, old: &Path, new: &Path) -> io::Result<()> {
        self.sim.world().rename(&self.at(old), &self.at(new))
    }

    fn unlink(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().unlink(&self.at(path))
    }

    fn make_resident(&mut self, path: &Path, first: u64, pages: u64) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().make_resident(node, first, pages)
    }

    fn evict(&mut self, path: &Path) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().evict(node)
    }

    fn snapshot(&mut self, of: &Path, at: &Path) -> io::Result<()> {
        self.sim.world().snapshot(&self.at(of), &self.at(at))
    }

    fn mksubvolume(&mut self, path: &Path) -> io::Result<()> {
        self.sim.world().mksubvolume(&self.at(path)).map(drop)
    }

    fn relocate(&mut self) -> io::Result<()> {
        self.sim.world().relocate(FsIx(0));
        Ok(())
    }

    fn hold_writeback(&mut self, path: &Path) -> io::Result<()> {
        let node = self.node(path)?;
        self.sim.world().begin_writeback(node)
    }

    fn disown(&mut self, path: &Path) -> io::Result<()> {
        let mut world = self.sim.world();
        world.privileged = false;
        world.set_access(&self.at(path), true, false, false)
    }

    fn bytes(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        let node = self.node(path)?;
        let mut world = self.sim.world();
        let size = world.stat(node)?.size;
        world.read_at(node, 0, size)
    }

    fn times(&mut self, path: &Path) -> io::Result<[(i64, i64); 3]> {
        let node = self.node(path)?;
        let a = self.sim.world().stat(node)?;
        Ok([a.atime, a.mtime, a.ctime].map(|t| (t as i64, 0)))
    }
}
