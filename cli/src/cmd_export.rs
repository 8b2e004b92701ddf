//! `pagefold export`: a view's present state as a directory of its own.
//!
//! What it deliberately does not hold: how (see `pagefold_fsadapters::sealed::export`).

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use pagefold_fsadapters::scan::path_text;
use pagefold_fsadapters::sealed::export::{ExportOptions, ExportReport, export_root};
use pagefold_fsadapters::sealed::mount::store_of;
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};

use crate::exit::Exit;
use crate::format::Format;
use crate::human;
use crate::per_root::cancellable;
use crate::store_arg::StoreArg;

/// Arguments of `pagefold export`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "A snapshot or backup of a raw root misses what its view wrote. This makes DIR, on the same file system, show what the view shows; \
        files share their blocks, so it costs metadata only. Of a view that is in use each file is whole, but all of them are not of one \
        moment: stop or freeze its programs for that.\n\n\
        Exit status: 0 done; 1 some files are missing in DIR; 2 nothing was exported."
)]
pub struct ExportArgs {
    /// A view (where it is mounted), or a sealed root (its path or name).
    #[arg(value_name = "VIEW|ROOT")]
    subject: PathBuf,
    /// Where; must not be there.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// As a btrfs subvolume.
    #[arg(long)]
    subvolume: bool,
    /// As a read-only btrfs subvolume, for `btrfs send`.
    #[arg(long)]
    read_only_snapshot: bool,
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold export`.
pub fn run(args: &ExportArgs) -> anyhow::Result<Exit> {
    let store = match store_of(&args.subject) {
        Some(dir) => Store::open(&dir, OpenMode::Existing, "pagefold export")?,
        None => {
            // A name is no path: then the target is what lies near the store; one that is a name only lies in the current directory.
            let parent = args.target.parent().filter(|parent| !parent.as_os_str().is_empty());
            let near = Some(&*args.subject).filter(|path| path.exists()).or(parent);
            args.store.open(near, OpenMode::Existing, "pagefold export")?
        }
    };
    let row = find(&store, &args.subject)?;
    let options = ExportOptions { subvolume: args.subvolume, read_only: args.read_only_snapshot };
    let report = cancellable(|progress| export_root(&store, &row, &args.target, options, progress))
        .with_context(|| format!("export {}", row.name))?;
    args.format.write(|| json(&report), || line(&report) + "\n")?;
    Ok(if report.partial { Exit::Partial } else { Exit::Done })
}

/// The root of the view at a path, or the root itself.
fn find(store: &Store, subject: &Path) -> anyhow::Result<RootRow> {
    if let Ok(real) = subject.canonicalize()
        && let Some(view) = store.views()?.into_iter().find(|view| view.target == real)
    {
        return Ok(store.root(view.root)?);
    }
    Ok(store.find_root(subject)?)
}

/// The report as JSON.
pub fn json(report: &ExportReport) -> serde_json::Value {
    let copied = &report.copied;
    let errors: Vec<serde_json::Value> = copied
        .errors
        .iter()
        .map(|(path, error)| serde_json::json!({ "path": path_text(path), "error": error }))
        .collect();
    serde_json::json!({
        "schema": "pagefold.export/1",
        "id": report.id.0,
        "name": report.name,
        "target": path_text(&report.target),
        "live": report.live,
        "partial": report.partial,
        "files": copied.files,
        "links": copied.links,
        "dirs": copied.dirs,
        "shared_bytes": copied.shared_bytes,
        "copied_bytes": copied.copied_bytes,
        "errors": errors,
    })
}

/// The report in a line; what is missing goes to stderr.
pub fn line(report: &ExportReport) -> String {
    let copied = &report.copied;
    for (path, error) in &copied.errors {
        eprintln!("pagefold: {}: {error}", human::path(path));
    }
    format!(
        "{} is at {}: {} files, {} directories, {} shared{}{}",
        report.name,
        human::path(&report.target),
        human::count(copied.files),
        human::count(copied.dirs),
        human::bytes(copied.shared_bytes),
        if copied.copied_bytes > 0 {
            format!(", {} copied", human::bytes(copied.copied_bytes))
        } else {
            String::new()
        },
        if report.live { "; its view was mounted: not of one moment" } else { "" },
    )
}
