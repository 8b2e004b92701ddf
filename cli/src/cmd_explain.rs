//! `pagefold explain`: why a file is or isn't shared.
//!
//! What it deliberately does not hold: any verdict (see `pagefold_fsadapters::sealed::explain`).

use std::path::{Path, PathBuf};

use clap::Args;
use pagefold_fsadapters::sealed::explain::{ExplainReport, explain};
use pagefold_fsadapters::sealed::mount;
use pagefold_fsadapters::store::OpenMode;

use crate::exit::Exit;
use crate::format::Format;
use crate::human::{self, bytes, count};
use crate::store_arg::StoreArg;

/// Arguments of `pagefold explain`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Exit status: 0 explained; 2 wrong usage, an error, or a path that the store knows nothing of."
)]
pub struct ExplainArgs {
    /// A file in a view, in a sealed root, or an anchor.
    path: PathBuf,
    #[command(flatten)]
    store: StoreArg,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold explain`.
pub fn run(args: &ExplainArgs) -> anyhow::Result<Exit> {
    let dir = match view_above(&args.path) {
        Some(store) if args.store.is_default() => store,
        // What is gone is looked for where it was.
        _ => args.store.dir(args.path.ancestors().find(|path| path.symlink_metadata().is_ok()))?,
    };
    let store = pagefold_fsadapters::store::Store::open(&dir, OpenMode::Existing, "pagefold explain")?;
    let report = explain(&store, &args.path)?;
    args.format.write(|| &report, || render(&report))?;
    Ok(Exit::Done)
}

/// The store of the view that `path` is in, whatever file system the view's mount point is on.
fn view_above(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find_map(mount::store_of)
}

fn render(report: &ExplainReport) -> String {
    let verdict = serde_json::to_value(report.verdict).ok();
    let verdict = verdict.as_ref().and_then(|v| v.as_str()).unwrap_or("?").replace('_', " ");
    let mut out = format!("{}: {verdict}\n", human::path(&report.path));
    for why in &report.why {
        out.push_str(&format!("  {}\n", plain(why)));
    }
    if let Some(anchor) = &report.anchor {
        out.push_str(&format!(
            "anchor: {}, {} pages, {} in cache now\n  {}\n",
            bytes(anchor.size),
            count(anchor.pages),
            count(anchor.resident_pages),
            human::path(&anchor.path),
        ));
    }
    if report.sites > 0 {
        out.push_str(&format!("sealed in {} of sealed roots:\n", human::counted(report.sites, "file")));
        for site in &report.site_list {
            let view = site.view.as_ref().map_or("not mounted".to_owned(), |at| human::path(at));
            out.push_str(&format!("  {} in {} ({view})\n", human::path(&site.path), plain(&site.root)));
        }
        let more = report.sites.saturating_sub(report.site_list.len() as u64);
        if more > 0 {
            out.push_str(&format!("  and {} more\n", count(more)));
        }
    }
    out.push_str(&format!("a write: {}\n", plain(&report.on_write)));
    out
}

/// Without control characters.
fn plain(text: &str) -> String {
    human::path(Path::new(text))
}
