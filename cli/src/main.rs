//! The binary `pagefold`: arguments in, exit code out. Everything else is in the library part of this crate.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    pagefold::run_from(std::env::args_os())
}
