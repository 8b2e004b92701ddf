//! Measures sealed views against their targets; see `benches/README.md`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match pagefold_benches::view_costs::run_from(std::env::args_os().collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("view_costs: {error:#}");
            ExitCode::FAILURE
        }
    }
}
