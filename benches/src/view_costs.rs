//! The program `view_costs`: what sealing, mounting and living in a view cost, each figure beside its target and, where there is
//! one, beside what it is compared with, measured in the same run.

mod mapped;
mod memory;
mod place;
mod report;
mod seal;
mod speed;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use pagefold_testfs::farm::ImageSpec;
use pagefold_testfs::rig::RigFs;

use crate::machine::Provenance;
use place::Tool;
use report::Report;

/// Measures sealed views. Needs root and a machine on which nothing else runs.
#[derive(Debug, Parser)]
#[command(name = "view_costs")]
struct Args {
    /// What to measure; may be given several times [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// On which file systems.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Fs::Xfs, Fs::Btrfs])]
    fs: Vec<Fs>,
    /// Files of a synthetic root, for `seal`.
    #[arg(long, default_value_t = 10_000)]
    files: u32,
    /// Roots.
    #[arg(long, default_value_t = 64)]
    roots: u32,
    /// The image for `memory`: a Debian root in a tar file, a directory, or `synthetic`.
    #[arg(long, default_value = "synthetic:files=10000,max=1M")]
    image: ImageSpec,
    /// Repetitions of each timing.
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Where to write the raw figures.
    #[arg(long, default_value = "view_costs.json")]
    json: PathBuf,
    /// The program under test [default: `pagefold` beside this program].
    #[arg(long)]
    pagefold: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Times of seal and mount, disk used.
    Seal,
    /// Page cache and kernel memory.
    Memory,
    /// Reading, opening, copy-up.
    Speed,
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
}

/// Parses `args` (the program's name first), measures, prints the table, writes the raw figures.
///
/// # Errors
/// Something that is needed is missing, or a measurement failed. What was measured before is written all the same.
pub fn run_from(args: Vec<OsString>) -> anyhow::Result<()> {
    let args = Args::parse_from(args);
    let tool = Tool::find(args.pagefold.as_deref())?;
    let mut report = Report::new(Provenance::of_this_run());
    let result = measure(&args, &tool, &mut report);
    print!("{}", report.table());
    std::fs::write(&args.json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", args.json.display()))?;
    println!("raw figures: {}", args.json.display());
    result
}

fn measure(args: &Args, tool: &Tool, report: &mut Report) -> anyhow::Result<()> {
    let wants = |part| args.only.is_empty() || args.only.contains(&part);
    for fs in &args.fs {
        if wants(Part::Seal) {
            seal::measure(args, tool, *fs, report)?;
        }
        if wants(Part::Speed) {
            speed::measure(args, tool, *fs, report)?;
        }
        if wants(Part::Memory) {
            memory::measure(args, tool, *fs, report)?;
        }
    }
    Ok(())
}

/// Says on stderr what is going on: measuring takes minutes.
fn say(text: impl std::fmt::Display) {
    eprintln!("view_costs: {text}");
}
