//! Measures sealed views against their targets; see `benches/README.md`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    pagefold_benches::end("view_costs", pagefold_benches::view_costs::run_from(std::env::args_os().collect()))
}
