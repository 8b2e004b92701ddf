//! `pagefold seal`: arguments, the report as a table.
//!
//! What it deliberately does not hold: how a root is sealed (see `pagefold_fsadapters::sealed::seal`).

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::report::{Outcome, RootSeal, SealReport};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal, unsupported};
use pagefold_fsadapters::sealed::unseal::remove_store;
use pagefold_fsadapters::store::{OpenMode, Store, Task};

use crate::exit::{Ended, Exit};
use crate::format::Format;
use crate::{human, interrupt, progress_bar, raise_open_files, store_arg};

/// Arguments of `pagefold seal`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Look at every file of each ROOT, give files with the same bytes one anchor, and write an image of each root's \
        metadata, so that `pagefold mount` can show roots whose equal files are one file to the page cache. Roots are only read. \
        Equality comes from extent maps (reflinks, snapshots); bytes are read only where these can't decide.\n\n\
        Sealing a root again takes what changed since. Its view must not be mounted then and must have no uncommitted changes.\n\n\
        Exit status: 0 done; 1 some roots were not sealed, or interrupted; 2 wrong usage or an error; 3 this host or file system can't."
)]
pub struct SealArgs {
    /// Container roots: directories on XFS (with reflink) or btrfs.
    #[arg(required = true, value_name = "ROOT")]
    roots: Vec<PathBuf>,
    /// Name of the root in the store [default: the last component of its path].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Domain: only roots of one domain ever share with each other.
    #[arg(long, default_value = "default", value_name = "DOMAIN")]
    domain: String,
    /// Also join equal files that share no blocks yet: reads all files, and lets the kernel compare and share their blocks.
    #[arg(long)]
    content: bool,
    /// For file systems without reflink: use files of DIR, a tree that is never written (an unpacked image layer), as anchors, by hard
    /// links; files without an equal there are copied into the store. DANGER: whoever writes a file of DIR in place changes it in all views.
    #[arg(long, value_name = "DIR")]
    borrow: Vec<PathBuf>,
    /// The store [default: .pagefold at the mount point of the roots' file system].
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Threads [default: the number of processors].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl SealArgs {
    fn resolve(&self) -> anyhow::Result<(PathBuf, SealConfig)> {
        if self.name.is_some() && self.roots.len() > 1 {
            anyhow::bail!("--name names one root; {} were given", self.roots.len());
        }
        let store = match &self.store {
            Some(dir) => dir.clone(),
            // One that is not there takes no other with it.
            None => store_arg::default_dir(
                self.roots.iter().find(|root| root.exists()).unwrap_or(&self.roots[0]),
            )?,
        };
        let defaults = SealConfig::new(self.roots.clone());
        let config = SealConfig {
            name: self.name.clone(),
            domain: self.domain.clone(),
            content: self.content,
            borrow: self.borrow.clone(),
            threads: self.threads.unwrap_or(defaults.threads).max(1),
            ..defaults
        };
        Ok((store, config))
    }
}

/// Runs `pagefold seal`.
pub fn run(args: &SealArgs) -> anyhow::Result<Exit> {
    // Before a store is made where it would be of no use.
    let reasons: Vec<String> = args.roots.iter().filter_map(|root| unsupported(root)).collect();
    if args.borrow.is_empty() && reasons.len() == args.roots.len() {
        let why = args.roots.iter().zip(reasons).map(|(root, why)| format!("{}: {why}", human::path(root)));
        return Err(Ended { exit: Exit::Refused, why: why.collect() }.into());
    }
    let (dir, config) = args.resolve()?;
    raise_open_files();
    let fresh = !dir.exists();
    let store = Store::open(&dir, OpenMode::Create, "seal")?;
    let progress = Progress::default();
    let report = std::thread::scope(|scope| {
        let progress = &progress;
        let _interrupt = interrupt::on_interrupt(scope, move || progress.cancel());
        let _bar = progress_bar::show(scope, progress);
        seal(&store, &config, progress)
    });
    // A store that nothing is in would only be found later, within a root perhaps.
    if fresh && store.roots().is_ok_and(|roots| roots.is_empty()) {
        let dir = store.dir().to_owned();
        if let Err(error) = remove_store(store, &Task::default()) {
            eprintln!("pagefold: {}: the empty store is still there: {error}", human::path(&dir));
        }
    }
    let report = report?;
    args.format.write(|| &report, || table(&report))?;
    if args.format == Format::Table {
        for error in &report.errors {
            eprintln!("pagefold: {}: {}", human::path(&error.path), error.error);
        }
    }
    Ok(exit_of(&report))
}

fn exit_of(report: &SealReport) -> Exit {
    if report.refused {
        Exit::Refused
    } else if report.is_complete() {
        Exit::Done
    } else if !report.partial && report.roots.iter().all(|root| root.outcome == Outcome::Failed) {
        Exit::Error
    } else {
        Exit::Partial
    }
}

/// The image, with the number of entries that lie over it.
fn image(root: &RootSeal) -> String {
    let digest = root.layers.first().map_or("", |digest| &digest[..12]);
    match root.diff_entries {
        0 => digest.to_owned(),
        entries => format!("{digest} +{}", human::count(entries)),
    }
}

fn table(report: &SealReport) -> String {
    let sealed: Vec<&RootSeal> = report.roots.iter().filter(|root| root.outcome != Outcome::Failed).collect();
    let mut text = String::new();
    if !sealed.is_empty() {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(["ROOT", "NAME", "FILES", "SIZE", "ANCHORS FOUND", "MADE", "READ", "IMAGE", ""]);
        for root in &sealed {
            let counts = &root.counts;
            let note = match (root.outcome, counts.unsettled) {
                (Outcome::Unchanged, _) => "unchanged".to_owned(),
                (_, 0) => String::new(),
                (_, busy) => format!("{busy} being written"),
            };
            table.add_row([
                human::path(&root.path),
                root.name.clone(),
                human::count(counts.files),
                human::bytes(counts.bytes),
                human::count(counts.hits),
                human::count(counts.made),
                human::count(counts.by_content),
                image(root),
                note,
            ]);
        }
        for column in 2..=6 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(comfy_table::CellAlignment::Right);
            }
        }
        let _ = writeln!(text, "{table}");
    }
    for skipped in &report.skipped {
        let _ = writeln!(text, "{}: {}", human::path(&skipped.path), skipped.reason);
    }
    if let Some(borrow) = &report.borrow {
        let (borrowed, copied) = (human::count(borrow.borrowed), human::count(borrow.copied));
        let bytes = human::bytes(borrow.copied_bytes);
        let _ = writeln!(text, "{borrowed} anchors borrowed, {copied} copied ({bytes} of disk)");
    }
    let _ = writeln!(
        text,
        "{} of {} roots sealed in {} (store {}, domain {})",
        sealed.len(),
        report.roots.len(),
        human::seconds(report.elapsed_s),
        human::path(&report.store),
        report.domain
    );
    text
}
