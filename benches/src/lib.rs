//! Macro benchmarks: what the programs `scan_vs` and `view_costs` are made of. The micro-benchmarks are in `benches/`.
//!
//! Invariants: whatever is compared is measured in the same run, alternately, on the same files with the same number of
//! threads; every figure is kept raw with machine, kernel, command and commit. What this deliberately does not do: pull peers
//! into the build. fio, fclones and duperemove are looked up on `PATH`, and where one is missing the report says how to get it.
#![forbid(unsafe_code)]

pub mod bare;
pub mod cached;
pub mod fio;
pub mod hashing;
pub mod machine;
pub mod measured;
pub mod peers;
pub mod scan_vs;
pub mod stats;
pub mod tree;
pub mod view_costs;

/// How a program of this crate ends: what went wrong is told on stderr.
#[must_use]
pub fn end(program: &str, result: anyhow::Result<()>) -> std::process::ExitCode {
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
