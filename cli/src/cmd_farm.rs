//! `pagefold farm`: container-farm fixtures, made, removed, compared.
//!
//! What it deliberately does not hold: how a farm is made (see `pagefold_testfs::farm`).

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pagefold_testfs::farm::{
    self, FarmError, FarmFs, FarmSpec, ImageSpec, Manifest, Progress, Stage, SyntheticSpec, parse_bytes,
};
use pagefold_testfs::rig::RigError;

use crate::cmd_farm_bench::{self, BenchArgs};
use crate::exit::{Ended, Exit};
use crate::{human, interrupt};

/// Arguments of `pagefold farm`.
#[derive(Debug, Args)]
pub struct FarmArgs {
    #[command(subcommand)]
    command: FarmCommand,
}

#[derive(Debug, Subcommand)]
enum FarmCommand {
    /// Make N roots from one image by reflink (or as btrfs snapshots), with seeded drift and a manifest of the truth.
    Create(CreateArgs),
    /// Remove a farm: only what its manifest says it made.
    Destroy(DestroyArgs),
    /// Compare containers from raw roots, sealed views and one shared overlay lower: memory, start times, opens.
    Bench(BenchArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fs {
    Xfs,
    Btrfs,
}

/// The error as one line. It tells its cause itself: as the head of a chain it would tell it twice.
fn named(what: &str, error: &FarmError) -> anyhow::Error {
    anyhow::anyhow!("farm {what}: {error}")
}

/// Arguments of `pagefold farm create`.
#[derive(Debug, Args)]
#[command(
    // Not `long_about`: the doc comment of the subcommand would silently replace it.
    after_long_help = "Make a container farm in DIR: image/, roots/root-0000/ and so on, and farm.json, which records what \
        every root shares with the image and what changed.\n\n\
        Where DIR is not on a file system of the wanted kind, one is made in DIR.pagefold-img (sparse) and mounted at \
        DIR; that needs root. Interrupted or failed, nothing is left.\n\n\
        Exit status: 0 done; 1 interrupted; 2 wrong usage or an error; 3 this host can't."
)]
struct CreateArgs {
    /// A new or an empty directory.
    dir: PathBuf,
    /// The image: a directory, a tar file, or synthetic[:files=N,max=BYTES].
    #[arg(long, default_value = "synthetic", value_name = "IMAGE")]
    image: String,
    /// Files of a synthetic image.
    #[arg(long, value_name = "N")]
    files: Option<u32>,
    /// Roots to make.
    #[arg(long, default_value_t = 8, value_name = "N")]
    roots: u32,
    /// Percent of the image's files that change in each root: in place, replaced, added, deleted.
    #[arg(long, default_value_t = 5.0, value_name = "P")]
    drift: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// File system.
    #[arg(long, value_enum, default_value_t = Fs::Xfs)]
    fs: Fs,
    /// Roots as btrfs snapshots, not as reflink copies.
    #[arg(long)]
    snapshots: bool,
    /// Mount a btrfs that the farm makes with compress=zstd.
    #[arg(long)]
    compress: bool,
    /// Size of a file system that the farm makes, such as 8G [default: half of what is free, at most 64G].
    #[arg(long, value_name = "BYTES", value_parser = size)]
    size: Option<u64>,
    /// Leave what was written dirty in the cache instead of syncing it.
    #[arg(long)]
    dirty: bool,
    /// Roots made at a time [default: the number of processors].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Arguments of `pagefold farm destroy`.
#[derive(Debug, Args)]
struct DestroyArgs {
    /// The farm's directory.
    dir: PathBuf,
}

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).ok_or_else(|| "a number of bytes, with K, M, G or T".to_owned())
}

impl CreateArgs {
    fn resolve(&self) -> Result<FarmSpec, FarmError> {
        let image = match (self.image.parse()?, self.files) {
            (ImageSpec::Synthetic(spec), Some(files)) => {
                ImageSpec::Synthetic(SyntheticSpec { files, ..spec })
            }
            (_, Some(_)) => {
                return Err(FarmError::Spec {
                    what: "--files",
                    why: "only for --image synthetic".to_owned(),
                });
            }
            (image, None) => image,
        };
        let defaults = FarmSpec::new(&self.dir);
        Ok(FarmSpec {
            image,
            roots: self.roots,
            drift_percent: self.drift,
            seed: self.seed,
            fs: match self.fs {
                Fs::Xfs => FarmFs::Xfs,
                Fs::Btrfs => FarmFs::Btrfs,
            },
            compress: self.compress,
            snapshots: self.snapshots,
            size: self.size,
            dirty: self.dirty,
            threads: self.threads.unwrap_or(defaults.threads),
            ..defaults
        })
    }
}

/// Runs `pagefold farm`.
pub fn run(args: &FarmArgs) -> anyhow::Result<Exit> {
    match &args.command {
        FarmCommand::Create(args) => create(args),
        FarmCommand::Destroy(args) => {
            farm::destroy(&args.dir).map_err(|e| named("destroy", &e))?;
            Ok(Exit::Done)
        }
        FarmCommand::Bench(args) => cmd_farm_bench::run(args),
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<Exit> {
    let spec = args.resolve()?;
    let cancel = AtomicBool::new(false);
    let bar = bar();
    let made = std::thread::scope(|scope| {
        let _interrupt = interrupt::on_interrupt(scope, || cancel.store(true, Ordering::Relaxed));
        farm::create(&spec, &|progress| show(&bar, progress), &cancel)
    });
    bar.finish_and_clear();
    match made {
        Ok(manifest) => {
            let mut out = std::io::stdout().lock();
            out.write_all(summary(&spec, &manifest).as_bytes())?;
            Ok(Exit::Done)
        }
        Err(error) => {
            let exit = match &error {
                FarmError::Cancelled => Exit::Partial,
                FarmError::Rig(RigError::NotRoot { .. } | RigError::NoProgram { .. })
                | FarmError::NoReflink { .. } => Exit::Refused,
                _ => return Err(named("create", &error)),
            };
            Err(Ended { exit, why: vec![error.to_string()] }.into())
        }
    }
}

fn bar() -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) =
        ProgressStyle::with_template("{spinner} {msg} {human_pos} of {human_len}, {per_sec}, {eta} left")
    {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, progress: Progress) {
    bar.set_message(match progress.stage {
        Stage::Image => "image:",
        Stage::Roots => "roots:",
        Stage::Sync => "writing to disk:",
    });
    bar.set_length(progress.total.max(progress.done));
    bar.set_position(progress.done);
}

fn summary(spec: &FarmSpec, manifest: &Manifest) -> String {
    let files = manifest.image.files.len() as u64;
    let drift: usize = manifest.roots.iter().map(|r| r.drift.len()).sum();
    let bytes = manifest.image.files.iter().map(|f| f.data.iter().map(|(_, n)| n).sum::<u64>()).sum();
    format!(
        "{}: {} roots of {} files ({} each), {} changes; scan it with: pagefold scan {}/roots/*\n",
        spec.dir.display(),
        human::count(u64::from(spec.roots)),
        human::count(files),
        human::bytes(bytes),
        human::count(drift as u64),
        spec.dir.display(),
    )
}
