//! The program `scan_vs`: arguments, the order of things, the report.

mod content;
mod extents;
mod pagefold;
mod report;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use pagefold_testfs::rig::RigFs;

use crate::machine::Provenance;
use crate::measured::Runner;
use pagefold::Pagefold;
use report::Report;

/// Measures `pagefold scan`, side by side with what it can be compared to.
#[derive(Debug, Parser)]
#[command(name = "scan_vs")]
struct Args {
    /// What to measure; may be given several times [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// On which file systems.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Fs::Xfs, Fs::Btrfs])]
    fs: Vec<Fs>,
    /// Roots of the farm for `extents` and `linear`.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    roots: u32,
    /// Files of each root, and of the realistic tree of `content`.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(16..))]
    files: u32,
    /// Percent of a root's files that differ from the image.
    #[arg(long, default_value_t = 2.0)]
    drift: f64,
    /// Which trees for `content`.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [TreeKind::Realistic, TreeKind::Large, TreeKind::Roots])]
    tree: Vec<TreeKind>,
    /// Bytes of the tree of few large files, in MiB.
    #[arg(long, default_value_t = 1536)]
    large_mib: u64,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Threads, for everybody.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// A directory on an existing file system to work in, instead of fresh loopback ones. Parts that need a cold cache then drop
    /// the whole machine's.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where to write the raw figures.
    #[arg(long, default_value = "scan_vs.json")]
    json: PathBuf,
    /// The program under test [default: `pagefold` beside this program].
    #[arg(long)]
    pagefold: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Extents only, warm, against open+FIEMAP+close; memory.
    Extents,
    /// Time per file from 1 root to all.
    Linear,
    /// `--content`, cold, against fio, BLAKE3 and other programs; growth of the page cache.
    Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TreeKind {
    /// Many files of log-normal sizes.
    Realistic,
    /// Few large files.
    Large,
    /// Reflinked roots.
    Roots,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fs {
    Xfs,
    Btrfs,
}

impl Fs {
    const fn rig(self) -> RigFs {
        match self {
            Fs::Xfs => RigFs::Xfs,
            Fs::Btrfs => RigFs::Btrfs,
        }
    }

    const fn name(self) -> &'static str {
        self.rig().kind()
    }
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Parses `args` (the program's name first), measures, prints the table, writes the raw figures.
///
/// # Errors
/// Something that is needed is missing, or a measurement failed. What was measured before is written all the same.
pub fn run_from(args: Vec<OsString>) -> anyhow::Result<()> {
    let args = Args::parse_from(args);
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&cancel);
    // Every wait looks at the flag, and everything made is removed on the way out.
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("signal handler")?;
    let pagefold = Pagefold::find(args.pagefold.as_deref())?;
    raise_open_files();
    let mut report = Report::new(Provenance::of_this_run(), args.threads);
    let result = measure(&args, &pagefold, &cancel, &mut report);
    print!("{}", report.table());
    std::fs::write(&args.json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", args.json.display()))?;
    println!("raw figures: {}", args.json.display());
    result
}

fn measure(args: &Args, pagefold: &Pagefold, cancel: &AtomicBool, report: &mut Report) -> anyhow::Result<()> {
    let fs_list: &[Fs] = &args.fs;
    if fs_list.is_empty() {
        bail!("--fs: no file system");
    }
    // On one file system with everything, and never under what is measured.
    let scratch = Scratch::new()?;
    let runner = Runner::new(&scratch.0, cancel);
    let bench = Bench { args, pagefold, runner: &runner };
    // With --dir there is one file system, whatever it is.
    for fs in if args.dir.is_some() { &fs_list[..1] } else { fs_list } {
        if args.wants(Part::Extents) || args.wants(Part::Linear) {
            extents::measure(&bench, *fs, report)?;
        }
        if args.wants(Part::Content) {
            content::measure(&bench, *fs, report)?;
        }
    }
    Ok(())
}

/// What every part needs.
#[derive(Clone, Copy)]
struct Bench<'a> {
    args: &'a Args,
    pagefold: &'a Pagefold,
    runner: &'a Runner<'a>,
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Scratch> {
        let dir = pagefold_testfs::rig::base_dir().join(format!("pagefold-scan-vs-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// fio keeps many files open; the peers inherit the limit.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Says on stderr what is going on: measuring takes minutes.
fn say(text: impl std::fmt::Display) {
    eprintln!("scan_vs: {text}");
}
