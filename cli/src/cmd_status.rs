//! `pagefold status`: arguments and table.
//!
//! What it deliberately does not hold: any figure (see `pagefold_fsadapters::sealed::status`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use pagefold_fsadapters::sealed::status::{Figures, Payer, RootStatus, StatusConfig, StatusReport, status};
use pagefold_fsadapters::store::OpenMode;

use crate::exit::Exit;
use crate::format::Format;
use crate::human::{self, bytes, count, percent};
use crate::interrupt;
use crate::store_arg::StoreArg;

/// Arguments of `pagefold status`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Three things are told apart. \"Could be saved\": if a view of every sealed root ran and read everything, \
        what one copy of equal files saves. \"Is shared\": the same for the views that are mounted now and what they have \
        not written. \"Saved now\": measured; pages that processes of several views have mapped at this moment, beyond the \
        first. What was only read and is cached counts in no saving.\n\n\
        pages_shared, pages_sharing and pages_unshared are KSM's words: distinct pages of anchors that two or more files \
        show; further files that show them; pages of anchors that one file shows.\n\n\
        Exit status: 0 done; 1 some of it could not be found out; 2 wrong usage or an error."
)]
pub struct StatusArgs {
    #[command(flatten)]
    store: StoreArg,
    /// Any path on the file system whose store is meant [default: the current directory].
    #[arg(value_name = "PATH")]
    near: Option<PathBuf>,
    /// Don't compare the raw roots with their sealed state.
    #[arg(long)]
    quick: bool,
    /// Tell which memory groups are charged for the anchors' cached pages (marks these pages as used).
    #[arg(long)]
    who_pays: bool,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold status`.
pub fn run(args: &StatusArgs) -> anyhow::Result<Exit> {
    let store = args.store.open(args.near.as_deref(), OpenMode::Existing, "pagefold status")?;
    let config = StatusConfig { quick: args.quick, who_pays: args.who_pays };
    let cancel = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let _interrupt = interrupt::on_interrupt(scope, || cancel.store(true, Ordering::Relaxed));
        status(&store, config, &cancel)
    })?;
    args.format.write(|| &report, || render(&report))?;
    Ok(if report.partial || !report.errors.is_empty() { Exit::Partial } else { Exit::Done })
}

fn render(report: &StatusReport) -> String {
    let mut out = String::new();
    if report.partial {
        out.push_str("PARTIAL: interrupted; the figures cover only what was reached.\n\n");
    }
    out.push_str(&headline(report));
    out.push_str(&domains_table(report));
    out.push_str(&roots_table(&report.roots));
    if let Some(payers) = &report.who_pays {
        out.push_str(&payers_table(payers));
    }
    for warning in &report.warnings {
        out.push_str(&format!("warning: {}\n", plain(warning)));
    }
    for error in &report.errors {
        out.push_str(&format!("error: {}: {}\n", human::path(&error.path), plain(&error.error)));
    }
    out
}

/// Without control characters: paths of containers are in it.
fn plain(text: &str) -> String {
    human::path(std::path::Path::new(text))
}

fn headline(report: &StatusReport) -> String {
    let t = &report.totals;
    let all = report.page_size * (t.pages_shared + t.pages_sharing + t.pages_unshared);
    let line = |label: &str, n: u64, note: String| format!("  {label:<30}{:>11}   {note}\n", bytes(n));
    let mut out = format!(
        "{}: {} sealed roots, {} views mounted, {} anchors\n\n",
        human::path(&report.store),
        count(t.roots),
        count(t.views),
        count(t.anchors),
    );
    out.push_str(&line(
        "could be saved, all views",
        t.could_be_saved_bytes,
        format!("{} of what the roots would take in cache", percent(t.could_be_saved_bytes, all)),
    ));
    out.push_str(&line("is shared, mounted views", t.is_shared_bytes, "not written by them".to_owned()));
    out.push_str(&line(
        "saved now, measured",
        t.saved_now_bytes,
        "mapped by processes of several views".to_owned(),
    ));
    out.push_str(&line("anchors in cache now", t.anchors_resident_bytes, String::new()));
    out.push('\n');
    out
}

fn table<const N: usize>(headers: [&str; N], left: usize, rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(headers.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(left) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n\n")
}

fn domains_table(report: &StatusReport) -> String {
    let row = |name: &str, f: &Figures| {
        [
            name.to_owned(),
            count(f.roots),
            count(f.views),
            count(f.pages_shared),
            count(f.pages_sharing),
            count(f.pages_unshared),
            bytes(f.anchors_resident_bytes),
            bytes(f.mapped_bytes),
            bytes(f.saved_now_bytes),
        ]
    };
    let mut rows: Vec<_> = report.domains.iter().map(|d| row(&plain(&d.name), &d.figures)).collect();
    if rows.len() > 1 {
        rows.push(row("total", &report.totals));
    }
    let headers = [
        "domain",
        "roots",
        "views",
        "pages_shared",
        "pages_sharing",
        "pages_unshared",
        "resident",
        "mapped",
        "saved now",
    ];
    table(headers, 1, rows)
}

fn roots_table(roots: &[RootStatus]) -> String {
    if roots.is_empty() {
        return String::new();
    }
    let rows = roots.iter().map(|root| {
        [
            plain(&root.name),
            mounted(root),
            count(root.files),
            bytes(root.cache_bytes),
            percent(root.shared_bytes, root.cache_bytes),
            count(root.processes),
            bytes(root.mapped_bytes),
            wrote(root),
            match &root.raw_changes {
                None if root.raw_covered_by.is_some() => "covered".to_owned(),
                None => "-".to_owned(),
                Some(changes) if changes.changed == 0 => "as sealed".to_owned(),
                Some(changes) => format!("{} changed", count(changes.changed)),
            },
        ]
    });
    let headers =
        ["root", "view at", "files", "cache", "shared", "processes", "mapped", "view wrote", "raw root"];
    table(headers, 2, rows.collect())
}

fn mounted(root: &RootStatus) -> String {
    match (&root.mounted[..], &root.target) {
        ([], None) => "-".to_owned(),
        ([], Some(_)) => "not mounted".to_owned(),
        ([first, more @ ..], _) => {
            let others = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
            format!("{}{others}", human::path(&first.path))
        }
    }
}

fn wrote(root: &RootStatus) -> String {
    let changed = root.broken_files + root.metadata_only_files;
    if changed + root.added_files + root.removed == 0 {
        return match root.other_entries {
            0 => "nothing".to_owned(),
            others => format!("{} directories or links", count(others)),
        };
    }
    format!(
        "{} changed ({}), {} new ({}), {} removed",
        count(changed),
        bytes(root.broken_bytes),
        count(root.added_files),
        bytes(root.added_bytes),
        count(root.removed),
    )
}

fn payers_table(payers: &[Payer]) -> String {
    let rows = payers.iter().map(|p| [plain(&p.group), bytes(p.bytes)]).collect();
    table(["memory group", "charged for anchors"], 1, rows)
}
