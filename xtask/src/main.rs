//! Developer tasks: `cargo xtask <task>`. Arguments in, exit code out; each task is a module.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

mod check;
mod sim;

/// Developer tasks of pagefold.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Look for violations of the architecture invariants: 0 none, 1 some, 2 can't tell.
    Check,
    /// Run seeds of the simulation: 0 all fine, 10 wrong, 11 stuck, 12 crashed.
    Sim(sim::Args),
}

fn main() -> ExitCode {
    match Task::parse() {
        Task::Check => check::exit(),
        Task::Sim(args) => sim::run(&args),
    }
}
