//! Measures `pagefold scan` against bare system calls, fio, BLAKE3, fclones and duperemove; see `benches/README.md`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.get(1).is_some_and(|a| a == pagefold_benches::measured::VERB) {
        return pagefold_benches::measured::measure_main(&args[2..]);
    }
    pagefold_benches::end("scan_vs", pagefold_benches::scan_vs::run_from(args))
}
