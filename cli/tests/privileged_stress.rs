//! No byte wrong, no write lost: several views of clones are written at random at the same time, each against a reference model of
//! its own, while other roots are sealed, unsealed, collected and verified; between the rounds some views are
//! committed and mounted again. What the model says, the view shows; in the end the raw roots hold it and the store is gone.
//!
//! `PAGEFOLD_STRESS_SEED` and `PAGEFOLD_STRESS_ROUNDS` repeat and prolong it. Writes through mappings are exercised by `fsx`
//! (`privileged_suites.rs`).

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::view::{ViewRig, done, must, run, told};
use pagefold_testfs::rig::RigFs;

/// A small generator of its own: one seed, one run (xorshift64*).
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let seed = self.next();
        (0..n).map(|i| (seed.wrapping_add(i as u64 / 7).wrapping_mul(0x9e37_79b9) >> 11) as u8).collect()
    }
}

/// What a view must show: names of files (several names may be one file), their bytes and modes, and directories.
#[derive(Clone, Default)]
struct Model {
    names: BTreeMap<PathBuf, u64>,
    files: BTreeMap<u64, (Vec<u8>, u32)>,
    dirs: BTreeSet<PathBuf>,
    made: u64,
}

impl Model {
    /// The image that all roots are clones of.
    fn image(random: &mut Random) -> Model {
        let mut model = Model::default();
        model.dirs.insert(PathBuf::new());
        for d in 0..4 {
            model.dirs.insert(format!("dir{d}").into());
            for f in 0..10 {
                let size = [0, 1, 700, 4096, 5000, 65_536, 300_001][random.below(7)];
                let bytes = random.bytes(size);
                model.add(format!("dir{d}/f{f}").into(), bytes);
            }
        }
        model.names.insert("dir0/link".into(), model.names[Path::new("dir1/f1")]);
        model
    }

    fn add(&mut self, path: PathBuf, bytes: Vec<u8>) {
        self.made += 1;
        self.names.insert(path, self.made);
        self.files.insert(self.made, (bytes, 0o644));
    }

    fn build(&self, root: &Path) {
        for dir in &self.dirs {
            fs::create_dir_all(root.join(dir)).expect("room on the rig");
        }
        let mut first: BTreeMap<u64, &Path> = BTreeMap::new();
        for (name, id) in &self.names {
            match first.get(id) {
                Some(other) => fs::hard_link(root.join(other), root.join(name)).expect("room on the rig"),
                None => fs::write(root.join(name), &self.files[id].0).expect("room on the rig"),
            }
            first.entry(*id).or_insert(name);
        }
    }

    /// Whether `root` shows exactly this.
    fn check(&self, root: &Path, what: &str) {
        let (mut names, mut dirs) = (BTreeMap::new(), BTreeSet::from([PathBuf::new()]));
        let mut todo = vec![root.to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{what}: {}: {e}", dir.display())) {
                let path = entry.expect("readable").path();
                let short = path.strip_prefix(root).expect("below").to_owned();
                let meta =
                    path.symlink_metadata().unwrap_or_else(|e| panic!("{what}: {}: {e}", path.display()));
                if meta.is_dir() {
                    dirs.insert(short);
                    todo.push(path);
                } else {
                    names.insert(short, (meta.ino(), meta.permissions().mode() & 0o7777, meta.len()));
                }
            }
        }
        assert_eq!(dirs, self.dirs, "{what}: directories");
        let keys = |k: Vec<&PathBuf>| k.into_iter().cloned().collect::<Vec<_>>();
        assert_eq!(keys(names.keys().collect()), keys(self.names.keys().collect()), "{what}: names");
        let mut inodes: BTreeMap<u64, u64> = BTreeMap::new();
        for (name, (ino, mode, len)) in &names {
            let id = self.names[name];
            let (bytes, wanted_mode) = &self.files[&id];
            assert_eq!(
                inodes.entry(id).or_insert(*ino),
                ino,
                "{what}: {} is linked elsewhere",
                name.display()
            );
            assert_eq!((*mode, *len), (*wanted_mode, bytes.len() as u64), "{what}: {}", name.display());
            let found =
                fs::read(root.join(name)).unwrap_or_else(|e| panic!("{what}: {}: {e}", name.display()));
            let differs = found.iter().zip(bytes).position(|(a, b)| a != b);
            assert!(
                differs.is_none() && found.len() == bytes.len(),
                "{what}: {} at {differs:?}",
                name.display()
            );
        }
        assert_eq!(inodes.values().collect::<BTreeSet<_>>().len(), inodes.len(), "{what}: two files are one");
    }

    fn some_name(&self, random: &mut Random) -> Option<PathBuf> {
        (!self.names.is_empty())
            .then(|| self.names.keys().nth(random.below(self.names.len())).cloned())
            .flatten()
    }

    fn some_dir(&self, random: &mut Random) -> PathBuf {
        self.dirs.iter().nth(random.below(self.dirs.len())).cloned().expect("the root is one")
    }

    fn fresh_name(&mut self, random: &mut Random) -> PathBuf {
        self.made += 1;
        self.some_dir(random).join(format!("n{}", self.made))
    }

    fn content(&mut self, name: &Path) -> &mut Vec<u8> {
        let id = self.names[name];
        &mut self.files.get_mut(&id).expect("named").0
    }

    /// One random operation, done to the view and to the model.
    fn operate(&mut self, view: &Path, random: &mut Random) {
        let Some(name) = self.some_name(random) else {
            let name = self.fresh_name(random);
            fs::write(view.join(&name), b"again").expect("a write");
            self.add(name, b"again".to_vec());
            return;
        };
        let path = view.join(&name);
        match random.below(14) {
            0 | 1 => self.write_at(&path, &name, random),
            2 => self.append(&path, &name, random),
            3 => self.truncate(&path, &name, random),
            4 => self.replace(view, random, &name),
            5 => {
                fs::remove_file(&path).expect("unlink");
                self.names.remove(&name);
            }
            6 => {
                let to = self.fresh_name(random);
                fs::rename(&path, view.join(&to)).expect("rename");
                let id = self.names.remove(&name).expect("named");
                self.names.insert(to, id);
            }
            7 => {
                let to = self.fresh_name(random);
                fs::hard_link(&path, view.join(&to)).expect("link");
                self.names.insert(to, self.names[&name]);
            }
            8 => self.move_directory(view, random),
            9 => self.direct_write(&path, &name, random),
            10 => self.copy_range(view, random, &name),
            11 => {
                let mode = [0o644, 0o600, 0o755, 0o640][random.below(4)];
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
                let id = self.names[&name];
                self.files.get_mut(&id).expect("named").1 = mode;
            }
            12 => self.punch(&path, &name, random),
            _ => {
                let found = fs::read(&path).expect("a read");
                assert!(found == *self.content(&name), "{} reads wrong", path.display());
            }
        }
    }

    fn write_at(&mut self, path: &Path, name: &Path, random: &mut Random) {
        let at = random.below(self.content(name).len() + 5000);
        let count = 1 + random.below(9000);
        let bytes = random.bytes(count);
        OpenOptions::new()
            .write(true)
            .open(path)
            .expect("open")
            .write_all_at(&bytes, at as u64)
            .expect("write");
        let content = self.content(name);
        content.resize(content.len().max(at + bytes.len()), 0);
        content[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    fn append(&mut self, path: &Path, name: &Path, random: &mut Random) {
        let count = 1 + random.below(5000);
        let bytes = random.bytes(count);
        let mut file = OpenOptions::new().append(true).open(path).expect("open");
        std::io::Write::write_all(&mut file, &bytes).expect("append");
        self.content(name).extend_from_slice(&bytes);
    }

    fn truncate(&mut self, path: &Path, name: &Path, random: &mut Random) {
        let size = random.below(2 * self.content(name).len() + 10);
        OpenOptions::new().write(true).open(path).expect("open").set_len(size as u64).expect("truncate");
        self.content(name).resize(size, 0);
    }

    /// As an editor saves: written beside, renamed over.
    fn replace(&mut self, view: &Path, random: &mut Random, name: &Path) {
        let count = random.below(20_000);
        let bytes = random.bytes(count);
        let beside = self.fresh_name(random);
        fs::write(view.join(&beside), &bytes).expect("write");
        fs::rename(view.join(&beside), view.join(name)).expect("rename over");
        self.add(name.to_owned(), bytes);
    }

    fn move_directory(&mut self, view: &Path, random: &mut Random) {
        let from = self.some_dir(random);
        let to = self.fresh_name(random);
        if from.as_os_str().is_empty() || to.starts_with(&from) {
            return;
        }
        fs::rename(view.join(&from), view.join(&to)).expect("rename of a directory");
        let moved = |path: &Path| path.strip_prefix(&from).ok().map(|rest| to.join(rest));
        // A bare join with nothing would end in a slash.
        let tidy = |path: PathBuf| path.components().collect::<PathBuf>();
        let rename = |path: &PathBuf| moved(path).map_or_else(|| path.clone(), tidy);
        self.dirs = self.dirs.iter().map(rename).collect();
        self.names = self.names.iter().map(|(path, id)| (rename(path), *id)).collect();
    }

    fn direct_write(&mut self, path: &Path, name: &Path, random: &mut Random) {
        const O_DIRECT: i32 = 0x4000;
        let Ok(file) = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(path) else { return };
        // A page inside a vector of three is aligned somewhere.
        let mut buffer = vec![random.next() as u8; 3 * 4096];
        buffer.rotate_left(1);
        let start = buffer.as_ptr().align_offset(4096);
        let page = random.below(self.content(name).len() / 4096 + 1);
        let bytes = buffer[start..start + 4096].to_vec();
        file.write_all_at(&buffer[start..start + 4096], page as u64 * 4096).expect("direct write");
        let content = self.content(name);
        content.resize(content.len().max((page + 1) * 4096), 0);
        content[page * 4096..(page + 1) * 4096].copy_from_slice(&bytes);
    }

    fn copy_range(&mut self, view: &Path, random: &mut Random, name: &Path) {
        let Some(from) = self.some_name(random).filter(|f| self.names[f] != self.names[name]) else { return };
        let source = self.content(&from).clone();
        let to = OpenOptions::new().write(true).open(view.join(name)).expect("open");
        let input = File::open(view.join(&from)).expect("open");
        let (mut read_at, mut write_at) = (0u64, 0u64);
        loop {
            let left = source.len() - read_at as usize;
            let moved =
                rustix::fs::copy_file_range(&input, Some(&mut read_at), &to, Some(&mut write_at), left);
            if left == 0 || moved.expect("copy_file_range") == 0 {
                break;
            }
        }
        let content = self.content(name);
        content.resize(content.len().max(source.len()), 0);
        content[..source.len()].copy_from_slice(&source);
    }

    fn punch(&mut self, path: &Path, name: &Path, random: &mut Random) {
        use rustix::fs::FallocateFlags;
        let len = self.content(name).len();
        let (at, count) = (random.below(len + 1), 1 + random.below(10_000));
        let file = OpenOptions::new().write(true).open(path).expect("open");
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, at as u64, count as u64).expect("punch");
        let content = self.content(name);
        content[at..len.min(at + count)].fill(0);
    }
}

/// What else goes on in the store meanwhile.
fn bystanders(rig: &ViewRig, stop: &AtomicBool) {
    let store = rig.path(".pagefold");
    let on_store = |words: &[&str]| {
        let args: Vec<&std::ffi::OsStr> =
            words.iter().map(std::ffi::OsStr::new).chain(["--store".as_ref(), store.as_os_str()]).collect();
        let output = run(&args);
        assert!(output.status.success(), "{words:?}: {}", told(&output));
    };
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let other = rig.path(&format!("other-{}", round % 3));
        let _ = fs::remove_dir_all(&other);
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(rig.path("image")).arg(&other));
        fs::write(other.join("dir0/own"), format!("{round}").repeat(3000)).expect("room on the rig");
        done(&["seal".as_ref(), other.as_os_str()]);
        on_store(&["status"]);
        done(&["unseal".as_ref(), other.as_os_str()]);
        on_store(&["gc"]);
        on_store(&["verify"]);
    }
}

fn stress(fs: RigFs, default_rounds: u64) {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|t| t.parse().ok()).unwrap_or(default);
    let seed = number("PAGEFOLD_STRESS_SEED", u64::from(std::process::id()));
    println!("PAGEFOLD_STRESS_SEED={seed}");
    let mut random = Random(seed | 1);
    let rig = ViewRig::new(fs);
    let image = Model::image(&mut random);
    image.build(&rig.make_dir("image"));
    let names = ["r0", "r1", "r2"];
    for name in names {
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(rig.path("image")).arg(rig.path(name)));
    }
    let mut models: Vec<Model> = names.iter().map(|_| image.clone()).collect();
    // Two of them differ from the image a little before they are sealed.
    for (model, name) in models.iter_mut().zip(names).skip(1) {
        (0..4).for_each(|_| model.operate(&rig.path(name), &mut random));
    }
    let views = rig.views(&names);
    for round in 0..number("PAGEFOLD_STRESS_ROUNDS", default_rounds) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| bystanders(&rig, &stop));
            let writers: Vec<_> = models
                .iter_mut()
                .zip(&views)
                .map(|(model, view)| {
                    let mut own = Random(random.next() | 1);
                    scope.spawn(move || (0..150).for_each(|_| model.operate(view, &mut own)))
                })
                .collect();
            let ended: Vec<_> = writers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            stop.store(true, Ordering::Relaxed);
            let bystander = other.join();
            for end in ended.into_iter().chain([bystander]) {
                end.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
        });
        for ((model, view), name) in models.iter().zip(&views).zip(names) {
            model.check(view, &format!("seed {seed} round {round} view {name}"));
            if random.below(2) == 0 {
                done(&["umount".as_ref(), view.as_os_str(), "--commit".as_ref()]);
                model.check(&rig.path(name), &format!("seed {seed} round {round} committed {name}"));
                done(&["mount".as_ref(), rig.path(name).as_os_str(), view.as_os_str()]);
                model.check(view, &format!("seed {seed} round {round} mounted again {name}"));
            }
        }
    }
    for view in &views {
        done(&["umount".as_ref(), view.as_os_str()]);
    }
    let store = rig.path(".pagefold");
    done(&["unseal".as_ref(), "--all".as_ref(), "--commit".as_ref(), "--store".as_ref(), store.as_os_str()]);
    assert!(!store.exists(), "the store is still there");
    for (model, name) in models.iter().zip(names) {
        model.check(&rig.path(name), &format!("seed {seed}: {name} in the end"));
    }
    image.check(&rig.path("image"), "the image");
}

#[test]
fn privileged_stress_on_xfs() {
    stress(RigFs::Xfs, 4);
}

#[test]
fn privileged_stress_on_btrfs() {
    stress(RigFs::Btrfs, 3);
}

/// The model is on trial too: on a plain directory it must be right.
#[test]
fn the_model_is_right_about_a_plain_directory() {
    for seed in 1..6 {
        let mut random = Random(seed);
        let mut model = Model::image(&mut random);
        let dir = tempfile::tempdir().expect("temporary directory");
        model.build(dir.path());
        for _ in 0..400 {
            model.operate(dir.path(), &mut random);
        }
        model.check(dir.path(), &format!("seed {seed}"));
    }
}
