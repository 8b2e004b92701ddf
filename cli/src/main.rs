//! The binary `pagefold`: arguments in, exit code out. Everything else is in the library part of this crate.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use rustix::fs::Mode;
use rustix::process::umask;

fn main() -> ExitCode {
    // What is made here must be readable to us, whatever the caller's umask takes from its owner.
    let asked = umask(Mode::RWXU);
    umask(asked - Mode::RWXU);
    pagefold::run_from(std::env::args_os())
}
