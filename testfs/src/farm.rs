//! Container farms: one image, N roots made from it by reflink (or as btrfs snapshots), seeded drift in each, and a
//! manifest of everything done, from which [`crate::truth`] derives what a scan must find.
//!
//! Invariant: what the manifest says is what was written, recorded while writing; nothing in it was asked back from
//! the file system's extent maps. One seed gives one farm.
//!
//! In a farm's directory: `farm.json`, `image/`, `roots/root-0000/` and so on.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

pub mod content;
mod directory;
mod drift;
mod error;
mod image;
pub mod manifest;
mod place;
mod roots;
mod synthetic;
mod tarball;
mod tree;

pub use error::FarmError;
pub use manifest::{FarmFs, Manifest};
pub use synthetic::SyntheticSpec;

use drift::DriftSpec;
use image::{Image, ImageBuilder};
use manifest::{IMAGE_DIR, ImageManifest, ROOTS_DIR, State};
use place::Place;
use roots::RootsSpec;

/// Where the image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSpec {
    /// A tar file, not compressed.
    Tar(PathBuf),
    /// A directory tree.
    Dir(PathBuf),
    /// Made up.
    Synthetic(SyntheticSpec),
}

impl FromStr for ImageSpec {
    type Err = FarmError;

    /// `synthetic[:files=N,max=BYTES]`, `tar:PATH`, `dir:PATH`, or a path (a directory or a tar file).
    fn from_str(text: &str) -> Result<ImageSpec, FarmError> {
        if text == "synthetic" {
            return Ok(ImageSpec::Synthetic(SyntheticSpec::default()));
        }
        if let Some(rest) = text.strip_prefix("synthetic:") {
            return SyntheticSpec::parse(rest).map(ImageSpec::Synthetic);
        }
        if let Some(path) = text.strip_prefix("tar:") {
            return Ok(ImageSpec::Tar(path.into()));
        }
        if let Some(path) = text.strip_prefix("dir:") {
            return Ok(ImageSpec::Dir(path.into()));
        }
        let path = PathBuf::from(text);
        let known = path.metadata().map_err(|e| {
            FarmError::spec("--image", format!("{text}: {e}; give synthetic, a directory or a tar file"))
        })?;
        Ok(if known.is_dir() { ImageSpec::Dir(path) } else { ImageSpec::Tar(path) })
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSpec::Tar(path) => write!(f, "tar:{}", path.display()),
            ImageSpec::Dir(path) => write!(f, "dir:{}", path.display()),
            ImageSpec::Synthetic(s) => write!(f, "synthetic:files={},max={}", s.files, s.max_bytes),
        }
    }
}

/// A number of bytes, with an optional suffix K, M, G or T (powers of 1024).
#[must_use]
pub fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// What to make.
#[derive(Clone, Debug)]
pub struct FarmSpec {
    /// Where; must not exist or be empty. Its parent must exist.
    pub dir: PathBuf,
    /// Made from what.
    pub image: ImageSpec,
    /// Number of roots, 1 to 10,000.
    pub roots: u32,
    /// Percent of the image's files that change in each root, 0 to 100.
    pub drift_percent: f64,
    /// Seed of the drift and of a synthetic image.
    pub seed: u64,
    /// Which file system. Where `dir` is not on one, a loopback file system is made and mounted there.
    pub fs: FarmFs,
    /// Mount a btrfs that the farm makes with `compress=zstd`.
    pub compress: bool,
    /// Roots as btrfs snapshots.
    pub snapshots: bool,
    /// Size in bytes of a file system that the farm makes; default half of what is free, at most 64 GiB (sparse).
    pub size: Option<u64>,
    /// Leave what was written in the cache, dirty. Then there is no extents-only ground truth.
    pub dirty: bool,
    /// Roots made at a time.
    pub threads: usize,
}

impl FarmSpec {
    /// A farm in `dir` with small defaults: synthetic, 4 roots, 5 % drift, seed 1, XFS.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> FarmSpec {
        FarmSpec {
            dir: dir.into(),
            image: ImageSpec::Synthetic(SyntheticSpec::default()),
            roots: 4,
            drift_percent: 5.0,
            seed: 1,
            fs: FarmFs::Xfs,
            compress: false,
            snapshots: false,
            size: None,
            dirty: false,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    fn check(&self) -> Result<(), FarmError> {
        if !(1..=10_000).contains(&self.roots) {
            return Err(FarmError::spec("--roots", format!("{} is not within 1 and 10000", self.roots)));
        }
        if !(0.0..=100.0).contains(&self.drift_percent) {
            return Err(FarmError::spec("--drift", format!("{} is no percentage", self.drift_percent)));
        }
        if self.fs == FarmFs::Xfs && (self.snapshots || self.compress) {
            return Err(FarmError::spec("--fs xfs", "has no snapshots and no compression; use --fs btrfs"));
        }
        Ok(())
    }
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Building the image; the total is not known.
    Image,
    /// Making roots; entries of all of them.
    Roots,
    /// Writing everything to disk.
    Sync,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Entries done in this stage.
    pub done: u64,
    /// Entries in this stage; 0 when not known.
    pub total: u64,
}

/// Called from several threads, about every 256 entries.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);

/// What every part needs of the caller.
pub(crate) struct Job<'a> {
    progress: OnProgress<'a>,
    pub(crate) cancel: &'a AtomicBool,
}

impl Job<'_> {
    pub(crate) fn tell(&self, stage: Stage, done: u64, total: u64) {
        if done.is_multiple_of(256) || done == total {
            (self.progress)(Progress { stage, done, total });
        }
    }
}

/// Makes a farm. When it fails or is cancelled, what had been made is removed.
///
/// # Errors
/// The directory is not empty, the file system can't clone or can't be made, no space, bad input, cancelled.
pub fn create(spec: &FarmSpec, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Manifest, FarmError> {
    spec.check()?;
    let job = Job { progress, cancel };
    let mut manifest = Manifest {
        schema: manifest::SCHEMA.to_owned(),
        state: State::Creating,
        seed: spec.seed,
        drift_percent: spec.drift_percent,
        fs: spec.fs,
        compressed: false,
        snapshots: spec.snapshots,
        synced: false,
        own_filesystem: false,
        made_directory: false,
        image: ImageManifest::default(),
        roots: vec![],
    };
    let place = Place::prepare(spec, &mut manifest)?;
    let made = fill(&place.dir, spec, &mut manifest, &job);
    if let Err(e) = made {
        let contents = match place.own_filesystem {
            true => Ok(()),
            false => place::remove_contents(&place.dir, spec.snapshots),
        };
        // Only when the contents are gone may the manifest go: without it they could not be destroyed any more.
        let cleaned =
            contents.and_then(|()| place::take_back(&place.dir, place.own_filesystem, place.made_directory));
        return Err(match cleaned {
            Ok(()) => e,
            Err(clean_up) => {
                FarmError::LeftBehind { dir: place.dir, error: Box::new(e), clean_up: Box::new(clean_up) }
            }
        });
    }
    Ok(manifest)
}

fn fill(dir: &Path, spec: &FarmSpec, manifest: &mut Manifest, job: &Job<'_>) -> Result<(), FarmError> {
    manifest.compressed = place::compresses(dir);
    let image_dir = dir.join(IMAGE_DIR);
    if spec.snapshots {
        roots::btrfs(&["subvolume", "create"], &[&image_dir])?;
    } else {
        std::fs::create_dir(&image_dir).map_err(|e| FarmError::io("create", &image_dir, e))?;
    }
    let roots_dir = dir.join(ROOTS_DIR);
    std::fs::create_dir(&roots_dir).map_err(|e| FarmError::io("create", &roots_dir, e))?;
    for private in [&image_dir, &roots_dir] {
        // An image may hold setuid programs and files that its own directory kept from others (design 12).
        use std::os::unix::fs::PermissionsExt;
        let owner_only = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(private, owner_only).map_err(|e| FarmError::io("protect", private, e))?;
    }
    let image = build_image(dir, &image_dir, spec, job)?;
    // Written out as a whole before anything is cloned: a clone made half-way splits the write-out, and where a
    // compressed extent begins would depend on the clock.
    sync(dir, job)?;
    let wanted = RootsSpec {
        roots: spec.roots,
        snapshots: spec.snapshots,
        threads: spec.threads,
        drift: DriftSpec { seed: spec.seed, percent: spec.drift_percent },
    };
    manifest.roots = roots::make_roots(dir, &image, wanted, job)?;
    if !spec.dirty {
        sync(dir, job)?;
        manifest.synced = true;
    }
    manifest.image = image.manifest;
    manifest.state = State::Complete;
    place::write_manifest(dir, manifest)
}

fn build_image(dir: &Path, image_dir: &Path, spec: &FarmSpec, job: &Job<'_>) -> Result<Image, FarmError> {
    let mut builder = ImageBuilder::new(image_dir, spec.image.to_string(), job)?;
    match &spec.image {
        ImageSpec::Synthetic(synthetic) => synthetic::build(&mut builder, *synthetic, spec.seed)?,
        ImageSpec::Tar(path) => tarball::build(&mut builder, path)?,
        ImageSpec::Dir(path) => {
            let source = path.canonicalize().map_err(|e| FarmError::io("resolve", path, e))?;
            if dir.starts_with(&source) {
                return Err(FarmError::spec("--image", "the farm's directory lies inside the image's"));
            }
            directory::build(&mut builder, &source)?;
        }
    }
    builder.finish()
}

fn sync(dir: &Path, job: &Job<'_>) -> Result<(), FarmError> {
    if job.cancel.load(Ordering::Relaxed) {
        return Err(FarmError::Cancelled);
    }
    job.tell(Stage::Sync, 0, 1);
    let open = std::fs::File::open(dir).map_err(|e| FarmError::io("open", dir, e))?;
    rustix::fs::syncfs(open).map_err(|e| FarmError::io("sync", dir, e))?;
    job.tell(Stage::Sync, 1, 1);
    Ok(())
}

/// Reads the manifest of the farm in `dir`.
///
/// # Errors
/// There is none, or it is not ours.
pub fn open(dir: &Path) -> Result<Manifest, FarmError> {
    place::read_manifest(dir)
}

/// Removes the farm in `dir`: only what its manifest says it made.
///
/// # Errors
/// No farm there, in use, no permission. What is left stays destroyable.
pub fn destroy(dir: &Path) -> Result<(), FarmError> {
    place::destroy(dir)
}
