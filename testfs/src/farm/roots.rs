//! Making the roots: every file of the image by FICLONE, then the drift; several roots at a time.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rustix::fs::OFlags;

use crate::rig::RigError;

use super::drift::{DriftSpec, drift};
use super::image::{Image, Kind};
use super::manifest::{IMAGE_DIR, ROOTS_DIR, RootManifest, root_name};
use super::tree::Tree;
use super::{FarmError, Job, Stage};

/// What [`make_roots`] makes.
#[derive(Clone, Copy, Debug)]
pub(super) struct RootsSpec {
    pub(super) roots: u32,
    pub(super) snapshots: bool,
    pub(super) threads: usize,
    pub(super) drift: DriftSpec,
}

/// Makes all roots of the farm in `dir`. Each worker takes the next root: memory is bounded by the workers, and a
/// root depends on its number alone, not on who made it.
pub(super) fn make_roots(
    dir: &Path,
    image: &Image,
    spec: RootsSpec,
    job: &Job<'_>,
) -> Result<Vec<RootManifest>, FarmError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let made: Mutex<Vec<Option<RootManifest>>> = Mutex::new(vec![None; spec.roots as usize]);
    let total = u64::from(spec.roots) * image.entries.len() as u64;
    let worker = || -> Result<(), FarmError> {
        let mut one = Maker { dir, image, spec, job, done: &done, total, stop: &failed };
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= spec.roots as usize {
                break;
            }
            match one.root(index as u32) {
                Ok(root) => made.lock().unwrap_or_else(|p| p.into_inner())[index] = Some(root),
                Err(e) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(e);
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..spec.threads.clamp(1, 64)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
    })?;
    let made = made.into_inner().unwrap_or_else(|p| p.into_inner());
    Ok(made.into_iter().flatten().collect())
}

struct Maker<'a> {
    dir: &'a Path,
    image: &'a Image,
    spec: RootsSpec,
    job: &'a Job<'a>,
    done: &'a AtomicU64,
    total: u64,
    /// Another worker failed.
    stop: &'a AtomicBool,
}

impl Maker<'_> {
    fn root(&mut self, index: u32) -> Result<RootManifest, FarmError> {
        let name = root_name(index);
        let path = self.dir.join(ROOTS_DIR).join(&name);
        if self.spec.snapshots {
            btrfs(&["subvolume", "snapshot"], &[&self.dir.join(IMAGE_DIR), &path])?;
            self.advance(self.image.entries.len() as u64)?;
        } else {
            std::fs::create_dir(&path).map_err(|e| FarmError::io("create", &path, e))?;
            self.clone_into(&path)?;
        }
        let mut tree = Tree::open(&path)?;
        let drift = drift(&mut tree, &path, &self.image.manifest, self.spec.drift, index, self.job)?;
        Ok(RootManifest { name, drift })
    }

    fn advance(&self, by: u64) -> Result<(), FarmError> {
        let before = self.done.fetch_add(by, Ordering::Relaxed);
        if self.job.cancel.load(Ordering::Relaxed) || self.stop.load(Ordering::Relaxed) {
            return Err(FarmError::Cancelled);
        }
        self.job.tell(Stage::Roots, before + by, self.total);
        Ok(())
    }

    fn clone_into(&self, path: &Path) -> Result<(), FarmError> {
        let mut from = Tree::open(&self.dir.join(IMAGE_DIR))?;
        let mut to = Tree::open(path)?;
        for entry in &self.image.entries {
            match &entry.kind {
                Kind::Dir => to.mkdir(&entry.path)?,
                Kind::File(index) => {
                    let file = to.create(&entry.path)?;
                    if self.image.manifest.files[*index].size > 0 {
                        let source = from.file(&entry.path, OFlags::RDONLY)?;
                        rustix::fs::ioctl_ficlone(&file, &source)
                            .map_err(|e| FarmError::io("clone", &path.join(&entry.path), e))?;
                    }
                    to.apply(file.as_fd(), &entry.path, &entry.meta)?;
                }
                Kind::Link(index) => to.link(&self.image.manifest.files[*index].names[0].0, &entry.path)?,
                Kind::Symlink(target) => to.symlink(&entry.path, target, &entry.meta)?,
                Kind::Node(kind, device) => to.node(&entry.path, *kind, *device, &entry.meta)?,
            }
            self.advance(1)?;
        }
        for entry in self.image.entries.iter().rev().filter(|e| matches!(e.kind, Kind::Dir)) {
            to.apply_dir(&entry.path, &entry.meta)?;
        }
        Ok(())
    }
}

/// Runs `btrfs` with `args` and `paths`.
pub(super) fn btrfs(args: &[&str], paths: &[&Path]) -> Result<(), FarmError> {
    // In a process group of its own: Ctrl-C is for us, who then clean up after the last whole snapshot.
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("btrfs");
    command.args(args).args(paths).env("LC_ALL", "C").process_group(0);
    let output = match command.output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(RigError::NoProgram { program: "btrfs", package: "btrfs-progs" }.into());
        }
        Err(e) => return Err(FarmError::io("run", Path::new("btrfs"), e)),
    };
    if output.status.success() {
        return Ok(());
    }
    let failed = RigError::Program {
        command: format!("btrfs {}", args.join(" ")),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        hint: "",
    };
    Err(failed.into())
}
