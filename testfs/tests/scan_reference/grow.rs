//! Random trees for a scan to look at: a seed in, two to five roots with a history out.
//!
//! Each seed leaves some kinds of operation out altogether, so that the others happen often. What it deliberately does
//! not do: know what a scan makes of it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::scan::RootSpec;
use pagefold_fsadapters::source::SpecialKind;
use pagefold_testfs::sim::{Flavour, NodeId, Rng, SimFs, World};

const PAGE: u64 = 4096;
/// No file grows past this: pages are compared one by one.
const FILE_PAGES_MAX: u64 = 30;

/// Trees that grew.
pub struct Grown {
    pub sim: SimFs,
    pub roots: Vec<RootSpec>,
}

struct Grower {
    rng: Rng,
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    count: u64,
    left_out: u64,
}

/// The trees of `seed` on `flavour`.
pub fn grow(flavour: Flavour, seed: u64) -> Grown {
    let mut rng = Rng::new(seed);
    let sim = SimFs::new(flavour, rng.bits());
    let mut roots = Vec::new();
    {
        let mut world = sim.world();
        let left_out = rng.bits() & rng.bits();
        let mut grower = Grower { rng, dirs: Vec::new(), files: Vec::new(), count: 0, left_out };
        grower.plant(&mut world, flavour, &mut roots);
        let steps = 50 + grower.rng.below(110);
        for step in 0..steps {
            if step == steps / 2 && grower.rng.percent(50) {
                grower.snapshot(&mut world, &mut roots);
            }
            grower.operation(&mut world);
        }
        grower.finish(&mut world);
        rng = grower.rng;
    }
    let domains = 1 + u64::from(rng.percent(50));
    let roots: Vec<RootSpec> = roots
        .into_iter()
        .map(|path| RootSpec { path, domain: ["tenant", "other"][rng.below(domains) as usize].to_owned() })
        .collect();
    Grown { sim, roots }
}

impl Grower {
    /// Empty roots: directories, subvolumes, file systems of their own, roots inside roots.
    fn plant(&mut self, world: &mut World, flavour: Flavour, roots: &mut Vec<PathBuf>) {
        let count = 2 + self.rng.below(3);
        for n in 0..count {
            let path = PathBuf::from(format!("/r{n}"));
            if !(flavour.habits().snapshots && self.rng.percent(50)) || world.mksubvolume(&path).is_err() {
                world.mkdir(&path).expect("a fresh name");
            }
            if n == count - 1 && self.rng.percent(30) {
                // Addresses on it begin where those of the first file system begin.
                let other = *self.rng.pick(&Flavour::ALL).expect("not empty");
                world.mount_new(&path, other).expect("it exists");
            }
            for below in ["", "d", "d/e"] {
                let dir = path.join(below);
                if !below.is_empty() {
                    world.mkdir(&dir).expect("a fresh name");
                }
                self.dirs.push(dir);
            }
            roots.push(path);
        }
        if self.rng.percent(40) {
            let inner = roots[0].join("in");
            world.mkdir(&inner).expect("a fresh name");
            let at = self.rng.below(roots.len() as u64 + 1) as usize;
            roots.insert(at, inner.clone());
            self.dirs.push(inner);
        }
        if self.rng.percent(25) {
            let mounted = PathBuf::from("/r1/mounted");
            world.mkdir(&mounted).expect("a fresh name");
            world.mount_new(&mounted, Flavour::Xfs).expect("it exists");
            self.dirs.push(mounted);
        }
        if self.rng.percent(25) {
            let bound = PathBuf::from("/r1/bound");
            world.mkdir(&bound).expect("a fresh name");
            world.bind(Path::new("/r0/d"), &bound).expect("both exist");
        }
    }

    /// A root becomes a snapshot too, where there are any.
    fn snapshot(&mut self, world: &mut World, roots: &mut Vec<PathBuf>) {
        let path = PathBuf::from("/snapshot");
        if world.snapshot(Path::new("/r0"), &path).is_err() {
            return;
        }
        let names = world.names_below(&path).expect("just made");
        for (name, node) in names {
            match world.raw_file(node) {
                Ok(_) => self.files.push(name),
                Err(_) => self.dirs.push(name),
            }
        }
        roots.push(path);
    }

    fn fresh(&mut self) -> PathBuf {
        self.count += 1;
        let dir = self.rng.pick(&self.dirs).expect("there are roots");
        match self.rng.below(20) {
            0 => dir.join(OsStr::from_bytes(format!("f{}-\u{fc}\n", self.count).as_bytes())),
            1 => dir
                .join(OsStr::from_bytes(&[b"\xffname".as_slice(), &self.count.to_be_bytes()[7..]].concat())),
            _ => dir.join(format!("f{}", self.count)),
        }
    }

    /// Bytes of which the same pages come again and again, reflinked or not.
    fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while (out.len() as u64) < len {
            let pattern = self.rng.below(9);
            match pattern {
                0..=4 => out.extend(Rng::new(pattern).bytes(PAGE as usize)),
                5 => out.extend(vec![0; PAGE as usize]),
                _ => out.extend(self.rng.bytes(PAGE as usize)),
            }
        }
        out.truncate(len as usize);
        out
    }

    fn some_file(&mut self, world: &World) -> Option<(PathBuf, NodeId)> {
        let path = self.rng.pick(&self.files)?.clone();
        let node = world.resolve(&path, false).ok()?.node();
        Some((path, node))
    }

    fn create(&mut self, world: &mut World) -> Option<NodeId> {
        let path = self.fresh();
        let node = world.create(&path, self.rng.percent(35)).ok()?;
        self.files.push(path);
        Some(node)
    }

    fn created_with_bytes(&mut self, world: &mut World) {
        let Some(node) = self.create(world) else { return };
        let len = match self.rng.below(8) {
            0 => 0,
            1 | 2 => self.rng.below(2100),
            3 | 4 => self.rng.below(9) * PAGE,
            _ => self.rng.below(9 * PAGE),
        };
        let bytes = self.bytes(len);
        world.write_at(node, 0, &bytes).expect("room on the device");
        if self.rng.percent(60) {
            world.sync(node).expect("a file");
        }
    }

    /// One operation. Those that a file system can't do, or that come at the wrong moment, do nothing.
    fn operation(&mut self, world: &mut World) {
        let what = self.rng.below(24);
        if self.left_out >> what & 1 == 1 && what > 4 {
            return;
        }
        let Some((path, node)) = self.some_file(world).filter(|_| what > 4) else {
            return self.created_with_bytes(world);
        };
        let offset = self.rng.below(14) * PAGE + if self.rng.percent(30) { self.rng.below(PAGE) } else { 0 };
        let len = 1 + self.rng.below(3 * PAGE);
        match what {
            5..=8 => self.cloned(world, node),
            9 | 10 => {
                // In place: the map goes on showing the old extent until the write is on disk (design 5.6).
                let size = world.stat(node).expect("a file").size;
                let bytes = self.bytes(len);
                let _ = world.write_at(node, self.rng.below(size.max(1)), &bytes);
                if self.rng.percent(50) {
                    let _ = world.sync(node);
                }
            }
            11 => {
                let bytes = self.bytes(len);
                let _ = world.write_at(node, offset, &bytes);
            }
            12 | 13 => {
                let size = world.stat(node).expect("a file").size;
                let near = (size / PAGE * PAGE + 1 + self.rng.below(PAGE)).min(FILE_PAGES_MAX * PAGE);
                let to = if what == 12 { offset } else { near };
                let _ = world.truncate(node, to);
            }
            14 => drop(world.punch(node, offset, len)),
            15 => drop(world.fallocate(node, offset, len, self.rng.percent(30))),
            16 => {
                let to = self.fresh();
                if world.link(&path, &to).is_ok() {
                    self.files.push(to);
                }
            }
            17 if self.files.len() > 6 => {
                let _ = world.unlink(&path);
                self.files.retain(|f| *f != path);
            }
            18 => drop(world.evict(node)),
            19 => drop(world.make_resident(node, self.rng.below(8), 1 + self.rng.below(6))),
            20 => drop(world.begin_writeback(node)),
            21 => world.sync_all(),
            22 => drop(world.sync(node)),
            _ => {
                let to = self.fresh();
                let _ = world.symlink(&path, &to);
                let _ = world.mknod(&self.fresh(), SpecialKind::Fifo);
            }
        }
    }

    fn cloned(&mut self, world: &mut World, node: NodeId) {
        if self.rng.percent(70) {
            if let Some(copy) = self.create(world) {
                let _ = world.reflink(node, copy);
            }
            return;
        }
        let Some((_, other)) = self.some_file(world) else { return };
        let (from, to) = (self.rng.below(10) * 1024 * 2, self.rng.below(10) * 1024 * 2);
        let _ = world.clone_range(node, from, (1 + self.rng.below(6)) * PAGE, other, to);
    }

    /// Most of it is on disk and clean in the end, or extents would decide nothing; a few things may not be looked at.
    fn finish(&mut self, world: &mut World) {
        if self.rng.percent(70) {
            for file in world.files() {
                if self.rng.percent(85) {
                    let _ = world.sync(file);
                }
                if self.rng.percent(50) {
                    let _ = world.evict(file);
                }
                if self.rng.percent(40) {
                    let _ = world.make_resident(file, self.rng.below(4), 1 + self.rng.below(9));
                }
            }
        }
        world.privileged = self.rng.percent(70);
        for path in self.files.clone() {
            if self.rng.percent(12) {
                let (readable, owned, shy) =
                    (self.rng.percent(70), self.rng.percent(50), self.rng.percent(50));
                let _ = world.set_access(&path, readable, owned, shy);
            }
        }
        if self.rng.percent(20) {
            let _ = world.set_access(Path::new("/r1/d"), false, true, false);
        }
    }
}
