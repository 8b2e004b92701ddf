//! `pagefold prefault`, and `mount --charge`: anchors into the page cache, charged to pagefold's own memory group.
//!
//! What it deliberately does not hold: how (see `pagefold_fsadapters::sealed::prefault`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use pagefold_fsadapters::sealed::prefault::{self, PrefaultConfig, PrefaultReport, Which, prefault};
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};

use crate::exit::Exit;
use crate::format::Format;
use crate::human::{self, bytes, count};
use crate::interrupt;
use crate::store_arg::StoreArg;

/// Arguments of `pagefold prefault`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The kernel charges a cached page to the memory group of the process that read it first. Read here before \
        containers start, shared files are charged to pagefold's own group, and to no container. The group stays; remove \
        it when you don't want it any more (rmdir).\n\n\
        --hot: anchors that have pages in the cache now, completed. Otherwise: all anchors that two or more files of \
        sealed roots show, those with most first. Pages that are cached already stay charged to whom they are, unless \
        --recharge drops them first (mapped pages stay).\n\n\
        Exit status: 0 done; 1 interrupted, or not all could be read; 2 wrong usage or an error."
)]
pub struct PrefaultArgs {
    #[command(flatten)]
    store: StoreArg,
    /// Only what this sealed root shows (path or name); may be given again.
    #[arg(long = "root", value_name = "ROOT")]
    roots: Vec<PathBuf>,
    /// Only anchors that are in the cache in part.
    #[arg(long)]
    hot: bool,
    /// All anchors that are shared (the default).
    #[arg(long, conflicts_with = "hot")]
    all: bool,
    /// Read at most so much, such as 2G [default: a quarter of the memory available].
    #[arg(long, value_name = "BYTES", value_parser = human::parse_bytes)]
    max: Option<u64>,
    /// The memory group, below the top of the hierarchy.
    #[arg(long, value_name = "NAME", default_value = prefault::GROUP)]
    cgroup: String,
    /// Drop what is cached first, so that it is charged anew.
    #[arg(long)]
    recharge: bool,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold prefault`.
pub fn run(args: &PrefaultArgs) -> anyhow::Result<Exit> {
    let near = args.roots.first().filter(|root| root.exists()).map(PathBuf::as_path);
    let store = args.store.open(near, OpenMode::Existing, "pagefold prefault")?;
    let defaults = PrefaultConfig::new();
    let config = PrefaultConfig {
        roots: args.roots.iter().map(|root| store.find_root(root)).collect::<Result<_, _>>()?,
        which: if args.hot { Which::Hot } else { Which::Shared },
        max_bytes: args.max.unwrap_or(defaults.max_bytes),
        group: args.cgroup.clone(),
        recharge: args.recharge,
    };
    let report = watched(&store, &config)?;
    args.format.write(|| &report, || render(&report))?;
    Ok(if report.partial || !report.errors.is_empty() { Exit::Partial } else { Exit::Done })
}

/// For `mount --charge NAME`: what the views of `roots` share is read into group `group`. Failing is told and is no failure of
/// the mount.
pub fn charge(store: &Store, roots: Vec<RootRow>, group: &str) {
    let config = PrefaultConfig { roots, group: group.to_owned(), ..PrefaultConfig::new() };
    match watched(store, &config) {
        Ok(report) => eprint!("pagefold: {}", render(&report)),
        Err(error) => eprintln!("pagefold: nothing was read beforehand: {}", crate::told(&error)),
    }
}

fn watched(store: &Store, config: &PrefaultConfig) -> anyhow::Result<PrefaultReport> {
    let cancel = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let _interrupt = interrupt::on_interrupt(scope, || cancel.store(true, Ordering::Relaxed));
        prefault(store, config, &cancel)
    });
    Ok(report?)
}

fn render(report: &PrefaultReport) -> String {
    let mut out = format!(
        "{} read in {} of {} files; {} was cached before\n{} is charged to {}\n",
        bytes(report.read_bytes),
        count(report.read),
        count(report.chosen),
        bytes(report.cached_before_bytes),
        bytes(report.group_charge_bytes),
        human::path(&report.group),
    );
    if report.over_limit > 0 {
        out.push_str(&format!(
            "{} files were left out because of the limit (--max)\n",
            count(report.over_limit)
        ));
    }
    for error in &report.errors {
        out.push_str(&format!("error: {}\n", human::path(std::path::Path::new(error))));
    }
    out
}
