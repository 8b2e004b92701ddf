//! `pagefold demo`: a small farm of reflinked roots, scanned, and gone again.
//!
//! Invariant: nothing outlives the command, however it ends: the farm lies on a loopback file system of its own, and
//! [`LoopRig`] takes that away even from a killed owner. What it deliberately does not do: pass a simulation off as
//! the real thing. Where no file system can be made, the same is shown over the simulated one, and the report says so
//! before and after.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use pagefold_fsadapters::os::Os;
use pagefold_fsadapters::scan::{Progress, RootSpec, ScanConfig, ScanReport, scan};
use pagefold_fsadapters::source::{FileSource, ReadOptions};
use pagefold_testfs::farm::{self, FarmError, FarmSpec, ImageSpec, SyntheticSpec};
use pagefold_testfs::rig::{LoopRig, RigError, RigFs};
use pagefold_testfs::sim::{Flavour, SimFs};

use crate::exit::Exit;
use crate::{human, interrupt, scan_table};

/// Percent of the files of each root that differ from the image.
const DRIFT_PERCENT: f64 = 5.0;
/// Seed of image and drift: every run shows the same farm.
const SEED: u64 = 1;
/// The largest ordinary file of the image, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The simulation keeps all bytes in memory, so its farm has fewer and smaller files.
const SIM_FILES_MAX: u32 = 200;

/// Arguments of `pagefold demo`.
#[derive(Debug, Args)]
#[command(
    // Not `long_about`: the doc comment of the subcommand would silently replace it.
    after_long_help = "The roots are reflinked on a loopback XFS and read once, as their containers would. That needs root; \
        without root the same is shown over a simulated file system.\n\n\
        The backing file lies in the directory PAGEFOLD_TMPDIR, or the system's temporary one.\n\n\
        Exit status: 0 shown; 1 interrupted, or root but no file system could be made (the simulation was shown); \
        2 an error."
)]
pub struct DemoArgs {
    /// Container roots to make.
    #[arg(long, default_value_t = 6, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    roots: u32,
    /// Files in the image.
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=20_000))]
    files: u32,
    /// Show the simulated file system even where a real one could be made.
    #[arg(long)]
    simulated: bool,
}

/// How far an interrupted demo goes: not at all.
#[derive(Default)]
struct Stop {
    farm: AtomicBool,
    scan: Progress,
}

impl Stop {
    fn all(&self) {
        self.farm.store(true, Ordering::Relaxed);
        self.scan.cancel();
    }
}

/// Runs `pagefold demo`.
///
/// # Errors
/// The farm could not be made for another reason than that no file system can be made here.
pub fn run(args: &DemoArgs) -> anyhow::Result<Exit> {
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let _interrupt = interrupt::on_interrupt(scope, || stop.all());
        if args.simulated {
            return simulated(args, &stop, "asked for with --simulated");
        }
        match LoopRig::new(RigFs::Xfs) {
            Ok(rig) => real(args, &stop, rig),
            Err(why @ RigError::NotRoot { .. }) => simulated(args, &stop, &why.to_string()),
            Err(why) => {
                simulated(args, &stop, &why.to_string())?;
                Ok(Exit::Partial)
            }
        }
    })
}

fn real(args: &DemoArgs, stop: &Stop, mut rig: LoopRig) -> anyhow::Result<Exit> {
    let dir = rig.path().join("farm");
    let spec = FarmSpec {
        image: ImageSpec::Synthetic(SyntheticSpec { files: args.files, max_bytes: FILE_BYTES_MAX }),
        roots: args.roots,
        drift_percent: DRIFT_PERCENT,
        seed: SEED,
        ..FarmSpec::new(&dir)
    };
    say(&format!(
        "Making {} container roots of {} files by reflink from one image, {DRIFT_PERCENT} % of the files changed in \
         each, on a loopback XFS ...",
        args.roots,
        human::count(u64::from(args.files)),
    ))?;
    let manifest = match farm::create(&spec, &|_| (), &stop.farm) {
        Ok(manifest) => manifest,
        Err(FarmError::Cancelled) => return interrupted(),
        Err(error) => anyhow::bail!("demo farm: {error}"),
    };
    // What writing left in the cache would blur the picture: containers read, they don't build their image.
    rig.remount().context("demo file system")?;
    let roots: Vec<PathBuf> = (0..manifest.roots.len()).map(|at| manifest.root_path(&dir, at)).collect();
    say(
        "Reading every file of every root once, as its container would (holes too: they then take memory, see \"cached now\") ...",
    )?;
    for root in &roots {
        read_tree(root, &stop.farm)?;
    }
    if stop.farm.load(Ordering::Relaxed) {
        return interrupted();
    }
    let shown: Vec<String> = roots.iter().map(|r| r.display().to_string()).collect();
    say(&format!("$ pagefold scan --matrix {}\n", shown.join(" ")))?;
    let exit = show(&Os::new(), &roots, stop)?;
    drop(rig);
    say("\nThe loopback file system and its roots are gone again.")?;
    Ok(exit)
}

/// Reads all regular files below `dir` through the page cache.
fn read_tree(dir: &Path, stop: &AtomicBool) -> anyhow::Result<()> {
    let listing = std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    for entry in listing {
        let entry = entry?;
        let kind = entry.file_type()?;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if kind.is_dir() {
            read_tree(&entry.path(), stop)?;
        } else if kind.is_file() {
            let mut file = std::fs::File::open(entry.path())?;
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
    }
    Ok(())
}

fn simulated(args: &DemoArgs, stop: &Stop, why: &str) -> anyhow::Result<Exit> {
    let notice =
        format!("SIMULATED: no real file system here ({why}).\nThe roots below exist in this process only");
    say(&format!("{notice}; as root `pagefold demo` makes real ones.\n"))?;
    let fs = SimFs::new(Flavour::Xfs, SEED);
    let roots = simulated_farm(&fs, args.roots, args.files.min(SIM_FILES_MAX)).context("simulated farm")?;
    if stop.farm.load(Ordering::Relaxed) {
        return interrupted();
    }
    let exit = show(&fs, &roots, stop)?;
    say("\nSIMULATED: these figures describe the simulation, not this host.")?;
    Ok(exit)
}

/// One image, cloned `roots` times; in each clone every twentieth file is changed in place. Everything was read.
fn simulated_farm(fs: &SimFs, roots: u32, files: u32) -> std::io::Result<Vec<PathBuf>> {
    let page = fs.page_size().bytes();
    let mut world = fs.world();
    let name = |dir: &Path, file: u32| dir.join(format!("file-{file:04}"));
    let image = PathBuf::from("/image");
    world.mkdir(&image)?;
    let mut originals = Vec::new();
    for file in 0..files {
        let id = world.create(&name(&image, file), false)?;
        let pages = 1 + u64::from(file % 7) * u64::from(file % 3);
        let pattern: Vec<u8> = file.to_le_bytes().into_iter().cycle().take((pages * page) as usize).collect();
        world.write_at(id, 0, &pattern)?;
        originals.push(id);
    }
    let mut made = Vec::new();
    for root in 0..roots {
        let dir = PathBuf::from(format!("/root-{root:04}"));
        world.mkdir(&dir)?;
        for (file, original) in (0..).zip(&originals) {
            let id = world.create(&name(&dir, file), false)?;
            world.reflink(*original, id)?;
            if (file + root).is_multiple_of(20) {
                world.write_at(id, 0, format!("written by root {root}").as_bytes())?;
            }
        }
        made.push(dir);
    }
    world.sync_all();
    for id in world.files() {
        world.make_resident(id, 0, u64::MAX)?;
    }
    Ok(made)
}

/// Scans and prints; what a user of `pagefold scan --matrix` sees.
fn show<S: FileSource>(source: &S, roots: &[PathBuf], stop: &Stop) -> anyhow::Result<Exit> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let domain = "default".to_owned();
    let config = ScanConfig {
        roots: roots.iter().map(|path| RootSpec { path: path.clone(), domain: domain.clone() }).collect(),
        content: false,
        threads,
        read: ReadOptions { threads, queue_depth: 1 },
        exclude: None,
        one_file_system: true,
        top: 5,
        matrix: true,
        top_directories: true,
    };
    let report: ScanReport = scan(source, &config, &stop.scan);
    say(scan_table::render(&report).trim_end())?;
    Ok(if report.partial || !report.errors.is_empty() { Exit::Partial } else { Exit::Done })
}

fn interrupted() -> anyhow::Result<Exit> {
    say("Interrupted: what was made is removed again.")?;
    Ok(Exit::Partial)
}

fn say(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(simulated: bool) -> DemoArgs {
        DemoArgs { roots: 3, files: 40, simulated }
    }

    fn scanned(fs: &SimFs, roots: &[PathBuf]) -> ScanReport {
        let spec = |path: &PathBuf| RootSpec { path: path.clone(), domain: "default".to_owned() };
        let config = ScanConfig {
            roots: roots.iter().map(spec).collect(),
            content: false,
            threads: 1,
            read: ReadOptions { threads: 1, queue_depth: 1 },
            exclude: None,
            one_file_system: true,
            top: 1,
            matrix: false,
            top_directories: false,
        };
        scan(fs, &config, &Progress::default())
    }

    #[test]
    fn the_simulated_farm_shares_all_but_what_was_written() {
        let fs = SimFs::new(Flavour::Xfs, SEED);
        let roots = simulated_farm(&fs, 3, 40).expect("the simulation has room");
        let totals = scanned(&fs, &roots).totals;
        assert_eq!(totals.files, 3 * 40);
        assert_eq!(totals.undecided_bytes, 0);
        // Of three copies of a page two can go, of a page that one root changed only one: six pages are such.
        let each = totals.cache_bytes / 3;
        assert_eq!(totals.mergeable_page_bytes, 2 * each - 6 * 4096);
        assert_eq!(totals.resident_bytes, totals.cache_bytes);
        assert_eq!(totals.resident_duplicate_bytes, totals.mergeable_page_bytes);
    }

    #[test]
    fn the_simulated_demo_ends_well() {
        assert_eq!(simulated(&args(true), &Stop::default(), "test").expect("runs"), Exit::Done);
    }

    #[test]
    fn an_interrupted_demo_is_partial() {
        let stop = Stop::default();
        stop.all();
        assert_eq!(simulated(&args(true), &stop, "test").expect("runs"), Exit::Partial);
    }
}
