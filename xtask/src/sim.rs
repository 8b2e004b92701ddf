//! `cargo xtask sim`: many seeds, or one with its whole trace.
//!
//! The exit code tells what kind of bad news it is: 10 a check failed, 11 something waits for ever, 12 a panic. The first
//! bad seed ends the run and is printed with the command that repeats it.

use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pagefold_testfs::run::{Report, Summary, Verdict, run as run_seed};

/// Which seeds.
#[derive(clap::Args)]
pub struct Args {
    /// How many seeds, counted up from a base taken from the clock.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Only this one, with its trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Start here instead of at a base from the clock.
    #[arg(long, conflicts_with = "seed")]
    base: Option<u64>,
}

const WRONG: u8 = 10;
const STUCK: u8 = 11;
const CRASHED: u8 = 12;

/// Runs them.
pub fn run(args: &Args) -> ExitCode {
    if let Some(seed) = args.seed {
        let report = run_seed(seed, None);
        report.trace.iter().for_each(|line| println!("{line}"));
        return conclude(seed, &report).unwrap_or_else(|| {
            println!("seed {seed}: {:?}", report.verdict);
            ExitCode::SUCCESS
        });
    }
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let base = args.base.unwrap_or_else(clock);
    println!("{} seeds from {base}", args.seeds);
    let start = Instant::now();
    let mut total = Summary::default();
    for seed in (0..args.seeds).map(|i| base.wrapping_add(i)) {
        let report = run_seed(seed, None);
        if let Some(code) = conclude(seed, &report) {
            return code;
        }
        if let Verdict::Fine(one) = report.verdict {
            total.merged += one.merged;
            total.held += one.held;
            total.raced += one.raced;
            total.physical += one.physical;
            total.saved_max = total.saved_max.max(one.saved_max);
        }
    }
    println!("all fine in {:.1} s: {total:?}", start.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}

fn conclude(seed: u64, report: &Report) -> Option<ExitCode> {
    let (code, kind, what) = match &report.verdict {
        Verdict::Fine(_) => return None,
        Verdict::Wrong(what) => (WRONG, "wrong", what),
        Verdict::Stuck(what) => (STUCK, "stuck", what),
        Verdict::Crashed(what) => (CRASHED, "crashed", what),
    };
    println!("seed {seed} {kind}: {what}\nreplay: cargo xtask sim --seed {seed}");
    Some(ExitCode::from(code))
}
