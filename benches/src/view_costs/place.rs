//! Where measuring happens: a loopback file system with a farm on it, and the program under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, bail};
use pagefold_testfs::farm::{self, FarmFs, FarmSpec, ImageSpec};
use pagefold_testfs::rig::LoopRig;

use super::Fs;

/// The program under test.
pub struct Tool(PathBuf);

impl Tool {
    /// The given binary, or the one beside this program.
    pub fn find(given: Option<&Path>) -> anyhow::Result<Tool> {
        let program = match given {
            Some(path) => path.to_owned(),
            None => std::env::current_exe()?.with_file_name("pagefold"),
        };
        if !program.is_file() {
            bail!(
                "no program {}: `cargo build --release -p pagefold`, or give --pagefold",
                program.display()
            );
        }
        Ok(Tool(program))
    }

    /// Runs it; seconds from start to end, and its standard output.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<(f64, Vec<u8>)> {
        let mut command = Command::new(&self.0);
        command.args(args).stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
        let started = Instant::now();
        let output = command.output().with_context(|| format!("start {}", self.0.display()))?;
        let elapsed = started.elapsed().as_secs_f64();
        if !output.status.success() {
            bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok((elapsed, output.stdout))
    }
}

/// A rig and a farm of clean roots on it; views below `views/`, the store where it is by default.
pub struct Place {
    rig: LoopRig,
    roots: u32,
}

impl Place {
    /// Makes `roots` roots from `image`, `drift` percent of each changed, on disk.
    pub fn new(fs: Fs, image: &ImageSpec, roots: u32, drift: f64) -> anyhow::Result<Place> {
        let rig = LoopRig::with_size(fs.rig(), 48 << 30)?;
        let spec = FarmSpec {
            dir: rig.path().join("farm"),
            image: image.clone(),
            roots,
            drift_percent: drift,
            seed: 1,
            fs: if fs == Fs::Xfs { FarmFs::Xfs } else { FarmFs::Btrfs },
            compress: false,
            snapshots: false,
            size: None,
            dirty: false,
            threads: 2,
        };
        farm::create(&spec, &|_| (), &AtomicBool::new(false))?;
        std::fs::create_dir(rig.path().join("views"))?;
        sync(rig.path())?;
        Ok(Place { rig, roots })
    }

    /// The file system's mount point.
    pub fn path(&self) -> &Path {
        self.rig.path()
    }

    /// All roots.
    pub fn roots(&self) -> Vec<PathBuf> {
        (0..self.roots).map(|n| self.rig.path().join(format!("farm/roots/root-{n:04}"))).collect()
    }

    /// Where the view of a root is put by `mount --all --at`.
    pub fn views_dir(&self) -> PathBuf {
        self.rig.path().join("views")
    }

    /// Seals `roots`; seconds.
    pub fn seal(&self, tool: &Tool, roots: &[PathBuf]) -> anyhow::Result<f64> {
        let args: Vec<&OsStr> =
            [OsStr::new("seal")].into_iter().chain(roots.iter().map(|r| r.as_os_str())).collect();
        Ok(tool.run(&args)?.0)
    }

    /// Mounts all views; seconds.
    pub fn mount_all(&self, tool: &Tool) -> anyhow::Result<f64> {
        let (store, at) = (self.path().join(".pagefold"), self.views_dir());
        let args = ["mount".as_ref(), "--all".as_ref(), "--at".as_ref(), at.as_os_str()];
        Ok(tool.run(&[&args[..], &["--store".as_ref(), store.as_os_str()]].concat())?.0)
    }

    /// The mounted views.
    pub fn views(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut views: Vec<PathBuf> =
            std::fs::read_dir(self.views_dir())?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        views.sort();
        Ok(views)
    }

    /// Unmounts all views.
    pub fn unmount_all(&self, tool: &Tool) -> anyhow::Result<()> {
        for view in self.views()? {
            tool.run(&["umount".as_ref(), view.as_os_str()])?;
        }
        Ok(())
    }

    /// Removes the store and whatever views wrote.
    pub fn unseal(&self, tool: &Tool) -> anyhow::Result<()> {
        let store = self.path().join(".pagefold");
        let args = ["unseal", "--all", "--discard", "--store"].map(OsStr::new);
        tool.run(&[&args[..], &[store.as_os_str()]].concat())?;
        Ok(())
    }
}

/// Writes everything of `path`'s file system back.
pub fn sync(path: &Path) -> anyhow::Result<()> {
    rustix::fs::syncfs(std::fs::File::open(path)?)?;
    Ok(())
}

/// Drops the page cache (1), or dentries and inodes as well (3), of the whole machine.
pub fn drop_caches(what: &str) -> anyhow::Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", what).context("drop caches")
}

/// Regular files below `root`, in the order in which a walk finds them.
pub fn files_below(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut files, mut dirs) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}
