//! The command line of pagefold: raw arguments -> resolved configuration -> `run`.
//!
//! What it deliberately does not hold: logic that a user of the libraries would miss.
#![forbid(unsafe_code)]

mod args;
mod cmd_commit;
mod cmd_demo;
mod cmd_doctor;
mod cmd_explain;
mod cmd_export;
mod cmd_farm;
mod cmd_farm_bench;
mod cmd_gc;
mod cmd_mount;
mod cmd_prefault;
mod cmd_seal;
mod cmd_shell;
mod cmd_status;
mod cmd_unseal;
mod cmd_verify;
mod exit;
mod format;
mod human;
mod interrupt;
mod mount_helper;
mod per_root;
mod progress_bar;
mod scan_args;
mod scan_table;
mod store_arg;
mod task_bar;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches};
use pagefold_fsadapters::os::Os;
use pagefold_fsadapters::scan::{Progress, RootReport, ScanReport, scan};

use args::{Cli, Command};
use exit::Ended;
pub use exit::Exit;
use format::Format;

/// Parses `args` (the program's name first), runs the command and returns its exit code. Reports go to stdout, messages
/// to stderr.
#[must_use]
pub fn run_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if args.first().is_some_and(|name| mount_helper::is_helper(name)) {
        args = match mount_helper::translate(&args[1..]) {
            Ok(translated) => translated,
            Err(told) => {
                eprintln!("mount.pagefold: {told}");
                return Exit::Error.into();
            }
        };
    }
    let wanted = json_wanted(&args);
    let parsed = Cli::command().try_get_matches_from(args);
    let parsed = parsed.and_then(|matches| Ok((json_of(&matches), Cli::from_arg_matches(&matches)?)));
    let (json, cli) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // --help and --version come this way too, and are no error.
            let exit = if error.use_stderr() { Exit::Error } else { Exit::Done };
            let _ = error.print();
            if let Some(command) = wanted.filter(|_| exit == Exit::Error) {
                let text = error.to_string();
                format::write_failure(&command, text.lines().next().unwrap_or_default());
            }
            return exit.into();
        }
    };
    start_logging();
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) if is_broken_pipe(&error) => Exit::Done.into(),
        Err(error) => {
            let ended = error.downcast_ref::<Ended>();
            match ended {
                Some(ended) => ended.why.iter().for_each(|why| eprintln!("pagefold: {why}")),
                None => eprintln!("pagefold: {}", told(&error)),
            }
            if let Some(command) = json {
                format::write_failure(&command, &told(&error));
            }
            ended.map_or(Exit::Error, |ended| ended.exit).into()
        }
    }
}

/// An error and its causes in a line. Errors of the libraries tell their cause themselves, others don't: none is told twice.
pub(crate) fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// [`json_of`] for arguments that can't be parsed, from what they seem to be.
fn json_wanted(args: &[OsString]) -> Option<String> {
    let asked = |pair: &[OsString]| pair[0] == "--format" && pair[1] == "json";
    if !args.windows(2).any(asked) && !args.iter().any(|arg| arg == "--format=json") {
        return None;
    }
    let mut command = Cli::command();
    let mut names = Vec::new();
    for arg in args.iter().skip(1) {
        let Some(deeper) = command.find_subcommand(arg) else { break };
        names.push(deeper.get_name().to_owned());
        command = deeper.clone();
    }
    (!names.is_empty()).then(|| names.join("-"))
}

/// The command's name in schemas, if its report was asked for as JSON.
fn json_of(matches: &ArgMatches) -> Option<String> {
    let (name, inner) = matches.subcommand()?;
    if let Some(deeper) = json_of(inner) {
        return Some(format!("{name}-{deeper}"));
    }
    let format = inner.try_get_one::<Format>("format").ok().flatten();
    (format == Some(&Format::Json)).then(|| name.to_owned())
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    match cli.command {
        Command::Scan(args) => run_scan(&args),
        Command::Seal(args) => cmd_seal::run(&args),
        Command::Gc(args) => cmd_gc::run(&args),
        Command::Verify(args) => cmd_verify::run(&args),
        Command::Mount(args) => cmd_mount::run(&args),
        Command::Umount(args) => cmd_mount::run_umount(&args),
        Command::Commit(args) => cmd_commit::run(&args),
        Command::Export(args) => cmd_export::run(&args),
        Command::Unseal(args) => cmd_unseal::run(&args),
        Command::Uninstall(args) => cmd_unseal::run_uninstall(&args),
        Command::Farm(args) => cmd_farm::run(&args),
        Command::Doctor(args) => cmd_doctor::run(&args),
        Command::Explain(args) => cmd_explain::run(&args),
        Command::Prefault(args) => cmd_prefault::run(&args),
        Command::Status(args) => cmd_status::run(&args),
        Command::Demo(args) => cmd_demo::run(&args),
        Command::Completions(args) => cmd_shell::completions(&args),
        Command::Man(args) => cmd_shell::man(&args),
    }
}

fn run_scan(args: &scan_args::ScanArgs) -> anyhow::Result<Exit> {
    let config = args.resolve()?;
    raise_open_files();
    let progress = Progress::default();
    let report = std::thread::scope(|scope| {
        let progress = &progress;
        let _interrupt = interrupt::on_interrupt(scope, move || progress.cancel());
        let _bar = progress_bar::show(scope, progress);
        scan(&Os::new(), &config, progress)
    });
    let exit = exit_of(&report);
    if exit == Exit::Error && args.format == Format::Table {
        // An empty table would hide the one thing there is to say.
        for error in &report.errors {
            eprintln!("pagefold: {}: {}", human::path(&error.path), error.error);
        }
        return Ok(exit);
    }
    args.format.write(|| &report, || scan_table::render(&report))?;
    Ok(exit)
}

/// 2 when no root could be scanned at all; 1 when something is missing from the figures.
fn exit_of(report: &ScanReport) -> Exit {
    let nothing_of =
        |root: &RootReport| root.sizes.files == 0 && report.errors.iter().any(|e| e.path == root.path);
    if report.roots.iter().all(nothing_of) {
        return Exit::Error;
    }
    if report.partial || !report.errors.is_empty() { Exit::Partial } else { Exit::Done }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
            || cause
                .downcast_ref::<serde_json::Error>()
                .is_some_and(|e| e.io_error_kind() == Some(io::ErrorKind::BrokenPipe))
    })
}

/// `PAGEFOLD_LOG=debug` and the like; silent otherwise.
fn start_logging() {
    if let Ok(filter) = tracing_subscriber::EnvFilter::try_from_env("PAGEFOLD_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).try_init();
    }
}

/// A walk holds a descriptor per open directory: takes what the hard limit allows. Failing is no harm: the walk then
/// names what it could not open.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
