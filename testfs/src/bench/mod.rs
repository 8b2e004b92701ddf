//! `farm bench`: N containers of real programs, started from raw reflinked roots, from sealed views, and from overlays of
//! one shared lower; memory and times of each, side by side, in one run.
//!
//! ```text
//! tar of a Debian ─► farm of N roots ─► per arm: mount, empty the cache, start all, measure, kill, start again warm
//!                                       opens: all arms at once, in turn     walk: read all roots, arm by arm
//! ```
//!
//! Invariant: every arm starts from an empty cache and is measured the same way by the same code; each container is the
//! only member of a memory group of its own. What it deliberately does not do: compare with figures of another run.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::memcg::{Hierarchy, Memcg};

use crate::farm::manifest::Drift;
use crate::farm::{self, FarmFs, FarmSpec, ImageSpec, Manifest};
use crate::rig::{RigFs, require_root};

mod arms;
pub mod chart;
mod container;
mod debian;
mod error;
mod measure;
mod place;
mod report;
mod views;

pub use container::Program;
pub use debian::default_cache;
pub use error::BenchError;
pub use report::{Arm, ArmReport, BenchReport, Figures, SCHEMA, Times, ViewCosts, WalkReport};

use arms::Roots;
use container::Container;
use place::Place;
use views::Views;

/// Names of our memory groups begin so; the process's id follows.
const GROUP_PREFIX: &str = "pagefold-bench-";
/// Warm starts of each container; the best counts, for whatever else the machine does only adds.
const WARM_ROUNDS: usize = 3;
/// Rounds of opens, arms in turn.
const OPEN_ROUNDS: usize = 15;
/// Files opened a round.
const OPEN_FILES: usize = 4000;

/// What to run.
#[derive(Clone, Debug)]
pub struct BenchSpec {
    /// Containers of each arm, up to 1000. 0: none are started, only files are opened and read.
    pub containers: u32,
    /// Arms, in this order.
    pub arms: Vec<Arm>,
    /// A directory on XFS or btrfs; otherwise a file system of our own.
    pub on: Option<PathBuf>,
    /// Which, when of our own.
    pub fs: RigFs,
    /// The image; otherwise a Debian made by mmdebstrap.
    pub image: Option<ImageSpec>,
    /// Where that Debian is kept.
    pub cache: PathBuf,
    /// Percent of each root's files that change before the run. Programs change too, so then no containers.
    pub drift_percent: f64,
    /// Also read everything of so many roots.
    pub walk: Option<u32>,
}

impl BenchSpec {
    fn check(&self) -> Result<(), BenchError> {
        let refuse = |what, why: &str| Err(BenchError::Spec { what, why: why.to_owned() });
        if self.containers > 1000 || self.walk.is_some_and(|n| n > 1000) {
            return refuse("--containers, --walk", "at most 1000");
        }
        if self.containers == 0 && self.walk.unwrap_or(0) == 0 {
            return refuse("--containers", "none, and no --walk: nothing to do");
        }
        if self.containers > 0 && self.drift_percent > 0.0 {
            return refuse("--drift", "changes the programs too: only with --containers 0 --walk N");
        }
        Ok(())
    }
}

/// Told what is being done, in words.
pub type OnStep<'a> = &'a dyn Fn(&str);

/// Everything a run has while it runs. Fields are dropped in this order.
struct Bench<'a> {
    spec: &'a BenchSpec,
    step: OnStep<'a>,
    cancel: &'a AtomicBool,
    groups: Hierarchy,
    place: Place,
    raw: Vec<PathBuf>,
    /// What they were made of.
    manifest: Option<Manifest>,
}

/// Runs it all. Must be called from a thread that lives until it returns, such as the main thread.
///
/// # Errors
/// Not root, missing programs, no memory groups, a program that does not start, cancelled. Everything made is removed.
pub fn run(spec: &BenchSpec, step: OnStep<'_>, cancel: &AtomicBool) -> Result<BenchReport, BenchError> {
    let started = Instant::now();
    spec.check()?;
    require_root("start containers")?;
    step("the programs' root");
    let image = match &spec.image {
        Some(image) => image.clone(),
        None => ImageSpec::Tar(debian::tar(&spec.cache, cancel)?),
    };
    let groups = Hierarchy::open(&std::env::temp_dir())?;
    sweep_groups(&groups)?;
    let place = Place::new(spec.on.as_deref(), spec.fs)?;
    let mut bench = Bench { spec, step, cancel, groups, place, raw: Vec::new(), manifest: None };
    bench.make_roots(image)?;
    let size = measure::size_of(&bench.raw[0], cancel)?;
    let (views, mut costs) = match spec.arms.contains(&Arm::View) {
        true => bench.seal().map(|(views, costs)| (Some(views), Some(costs)))?,
        false => (None, None),
    };
    let mut arms = Vec::new();
    for arm in &spec.arms {
        arms.push(bench.run_arm(*arm, views.as_ref())?);
    }
    bench.opens(&mut arms, views.as_ref())?;
    let mut walks = Vec::new();
    if let Some(count) = spec.walk {
        for arm in &spec.arms {
            walks.push(bench.walk(*arm, count as usize, size.bytes, views.as_ref())?);
        }
    }
    if let (Some(costs), Some(views)) = (&mut costs, &views) {
        costs.mount_ms = views.first_mounting().as_secs_f64() * 1e3;
    }
    Ok(BenchReport {
        schema: SCHEMA,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        file_system: bench.file_system(),
        memory_groups: bench.groups.version(),
        containers: spec.containers,
        programs: Program::ALL,
        drift_percent: spec.drift_percent,
        root_files: size.files,
        root_bytes: size.bytes,
        views: costs,
        arms,
        walks,
        elapsed_s: started.elapsed().as_secs_f64(),
    })
}

/// Groups of runs that were killed.
fn sweep_groups(groups: &Hierarchy) -> Result<(), BenchError> {
    for group in groups.groups(GROUP_PREFIX)? {
        // An empty one only: a run at the same time has processes in all of its groups.
        let _ = group.remove();
    }
    Ok(())
}

impl Bench<'_> {
    fn check_cancel(&self) -> Result<(), BenchError> {
        if self.cancel.load(Ordering::Relaxed) { Err(BenchError::Cancelled) } else { Ok(()) }
    }

    fn file_system(&self) -> String {
        let kind = crate::rig::fs_kind(&self.place.dir);
        match kind {
            Ok(crate::rig::KnownFs::Xfs) => "XFS".to_owned(),
            Ok(crate::rig::KnownFs::Btrfs) => "btrfs".to_owned(),
            Ok(other) => format!("{other:?}"),
            Err(_) => "?".to_owned(),
        }
    }

    fn make_roots(&mut self, image: ImageSpec) -> Result<(), BenchError> {
        (self.step)("roots");
        let kind =
            crate::rig::fs_kind(&self.place.dir).map_err(|e| BenchError::io("ask", &self.place.dir, e))?;
        let count = self.spec.containers.max(self.spec.walk.unwrap_or(0));
        let spec = FarmSpec {
            image,
            roots: count,
            drift_percent: self.spec.drift_percent,
            fs: if kind == crate::rig::KnownFs::Btrfs { FarmFs::Btrfs } else { FarmFs::Xfs },
            ..FarmSpec::new(self.place.make("farm")?)
        };
        let manifest = farm::create(&spec, &|_| {}, self.cancel).map_err(|e| match e {
            farm::FarmError::Cancelled => BenchError::Cancelled,
            e => BenchError::Farm(e),
        })?;
        let dir = spec.dir.join(farm::manifest::ROOTS_DIR);
        self.raw = manifest.roots.iter().map(|root| dir.join(&root.name)).collect();
        self.manifest = Some(manifest);
        Ok(())
    }

    fn seal(&self) -> Result<(Views, ViewCosts), BenchError> {
        (self.step)("sealing");
        Views::seal(&self.place, &self.raw, self.cancel)
    }

    fn group(&self, arm: Arm, n: usize) -> Result<Memcg, BenchError> {
        Ok(self.groups.group(&format!("{GROUP_PREFIX}{}-{arm:?}-{n:04}", std::process::id()))?)
    }

    fn up<'v>(&self, arm: Arm, count: usize, views: Option<&'v Views>) -> Result<Roots<'v>, BenchError> {
        Roots::up(arm, count, &self.place, &self.raw, views)
    }

    /// Cold start, memory, warm start.
    fn run_arm(&self, arm: Arm, views: Option<&Views>) -> Result<ArmReport, BenchError> {
        if self.spec.containers == 0 {
            return Ok(ArmReport { arm, ..ArmReport::default() });
        }
        (self.step)(&format!("{}: cold start", arm.name()));
        let roots = self.up(arm, self.spec.containers as usize, views)?;
        measure::drop_caches()?;
        container::warm_launcher(&self.place.make("warm/root")?, &self.place.make("warm/run")?)?;
        let slab_before = measure::slab();
        let (running, cold) = self.start_all(&roots)?;
        (self.step)(&format!("{}: memory", arm.name()));
        let memory = measure::figures(running.iter().map(Container::group), slab_before)?;
        drop(running);
        (self.step)(&format!("{}: warm start", arm.name()));
        let mut warm = vec![Duration::MAX; cold.len()];
        for _ in 0..WARM_ROUNDS {
            let (running, took) = self.start_all(&roots)?;
            drop(running);
            warm.iter_mut().zip(took).for_each(|(best, took)| *best = took.min(*best));
        }
        Ok(ArmReport {
            arm,
            memory,
            cold_start: measure::times(&cold),
            warm_start: measure::times(&warm),
            open_close_us: 0.0,
        })
    }

    /// Starts a container in each root, each when the one before answers.
    fn start_all(&self, roots: &Roots<'_>) -> Result<(Vec<Container>, Vec<Duration>), BenchError> {
        let (mut running, mut took) = (Vec::new(), Vec::new());
        for (n, root) in roots.paths().iter().enumerate() {
            self.check_cancel()?;
            let run = self.place.make(format!("run/{n:04}"))?;
            let group = self.group(roots.arm(), n)?;
            let started = Instant::now();
            let mut container = Container::start(Program::ALL[n % 4], root, &run, group)?;
            container.wait_for_answer(self.cancel)?;
            took.push(started.elapsed());
            running.push(container);
        }
        Ok((running, took))
    }

    /// open and close in one root of each arm, in turn, so that noise hits all alike.
    fn opens(&self, arms: &mut [ArmReport], views: Option<&Views>) -> Result<(), BenchError> {
        (self.step)("opens");
        let roots: Vec<Roots<'_>> =
            arms.iter().map(|a| self.up(a.arm, 1, views)).collect::<Result<_, _>>()?;
        let files = measure::some_files(&self.raw[0], OPEN_FILES, self.cancel)?;
        let dirs = roots.iter().map(|r| measure::open_root(r.first())).collect::<Result<Vec<_>, _>>()?;
        let mut means = vec![Vec::new(); dirs.len()];
        for round in 0..=OPEN_ROUNDS {
            self.check_cancel()?;
            for (dir, means) in dirs.iter().zip(&mut means) {
                let mean = measure::open_close(dir, &files)?;
                // The first round fills caches.
                if round > 0 {
                    means.push(mean);
                }
            }
        }
        for (arm, mut means) in arms.iter_mut().zip(means) {
            means.sort_by(f64::total_cmp);
            arm.open_close_us = means[means.len() / 2];
        }
        Ok(())
    }

    /// Reads everything of up to `count` roots of an arm, from an empty cache, in a memory group of its own.
    fn walk(
        &self,
        arm: Arm,
        count: usize,
        root_bytes: u64,
        views: Option<&Views>,
    ) -> Result<WalkReport, BenchError> {
        // Raw roots cost their size each: only what memory can surely hold.
        let fits = usize::try_from(measure::available() / 2 / root_bytes.max(1)).unwrap_or(count).max(1);
        let count = if arm == Arm::Raw { count.min(fits) } else { count };
        (self.step)(&format!("{}: reading everything of {count}", arm.name()));
        let roots = self.up(arm, count, views)?;
        measure::drop_caches()?;
        let group = self.group(arm, 9999)?;
        let group = OwnGroup(group);
        let entered = group.0.enter(&self.groups)?;
        let mut read = measure::read_tree(roots.first(), self.cancel)?.bytes;
        let one = measure::settled_charge(&group.0)?;
        for root in &roots.paths()[1..] {
            read += measure::read_tree(root, self.cancel)?.bytes;
        }
        let all = measure::settled_charge(&group.0)?;
        drop(entered);
        Ok(WalkReport {
            arm,
            roots: roots.paths().len() as u32,
            read_bytes: read,
            ideal_cache_bytes: self.manifest.as_ref().map_or(0, |m| ideal_cache(m, roots.paths().len())),
            one_root_cache_bytes: one.file,
            cache_bytes: all.file,
            one_root_kernel_bytes: one.kernel,
            kernel_bytes: all.kernel,
        })
    }
}

/// Page cache of the first `count` roots if equal files had one copy: the image's files and each root's changed ones, each
/// page once. From the manifest of what was made, not from anything that is under test.
fn ideal_cache(manifest: &Manifest, count: usize) -> u64 {
    let page = rustix::param::page_size() as u64;
    let image = manifest.image.files.iter().map(|file| file.size);
    let changed = manifest.roots.iter().take(count).flat_map(|root| &root.drift).map(|drift| match drift {
        Drift::InPlace { size, .. } => *size,
        Drift::Replaced { new, .. } | Drift::Added { new } => new.size,
        Drift::Deleted { .. } => 0,
    });
    image.chain(changed).map(|size| size.div_ceil(page) * page).sum()
}

/// A group that is removed with this value.
struct OwnGroup(Memcg);

impl Drop for OwnGroup {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}
