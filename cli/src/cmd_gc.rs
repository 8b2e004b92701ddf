//! `pagefold gc`: remove what no root and no view needs from a store.
//!
//! What it deliberately does not hold: what is garbage (`pagefold_fsadapters::store` decides).

use clap::Args;
use pagefold_fsadapters::store::{GcReport, OpenMode, RootRow, Store};

use crate::exit::Exit;
use crate::format::Format;
use crate::store_arg::StoreArg;
use crate::{human, task_bar};

/// Arguments of `pagefold gc`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Removed are: uppers of earlier generations that no view uses and nothing was written to, images that no \
    upper needs, anchors that no image names. Nothing that a view, live or not, could need.\n\n\
    Exit status: 0 done; 1 interrupted (what was done is done); 2 wrong usage, or the store can't be used."
)]
pub struct GcArgs {
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold gc`.
pub fn run(args: &GcArgs) -> anyhow::Result<Exit> {
    let mut store = args.store.open(None, OpenMode::Existing, "gc")?;
    let dir = store.dir().to_owned();
    let report = task_bar::watch("removing", |task| {
        let live = |root: &RootRow| is_live(&dir, root);
        Store::gc(&mut store, &live, task)
    })?;
    args.format.write(|| json(&store, &report), || text(&report))?;
    Ok(if report.interrupted { Exit::Partial } else { Exit::Done })
}

/// Whether a view of this generation is mounted in any mount namespace. In doubt: yes.
fn is_live(store: &std::path::Path, root: &RootRow) -> bool {
    use pagefold_fsadapters::sealed::live::{UpperState, probe};
    let dir = store.join(format!("roots/{}/g{}", root.id, root.generation));
    !matches!(probe(&dir, &store.join("mounts")), Ok(UpperState::Free))
}

fn json(store: &Store, report: &GcReport) -> serde_json::Value {
    serde_json::json!({
        "schema": "pagefold.gc/1",
        "store": pagefold_fsadapters::scan::path_text(store.dir()),
        "generations": report.generations,
        "generations_kept": report.generations_kept,
        "images": report.images,
        "image_bytes": report.image_bytes,
        "images_kept": report.images_kept,
        "images_mounted": report.images_mounted,
        "anchors": report.anchors,
        "anchor_logical_bytes": report.anchor_bytes,
        "anchors_kept": report.anchors_kept,
        "orphans": report.orphans,
        "freed_on_disk_bytes": report.freed_on_disk,
        "interrupted": report.interrupted,
    })
}

fn text(report: &GcReport) -> String {
    let mut out = format!(
        "removed {} anchors ({} of files, most of it shared with roots and so not freed), {} images ({}), {} earlier uppers\n\
         kept {} anchors, {} images\n",
        human::count(report.anchors),
        human::bytes(report.anchor_bytes),
        human::count(report.images),
        human::bytes(report.image_bytes),
        human::count(report.generations),
        human::count(report.anchors_kept),
        human::count(report.images_kept),
    );
    let mut note = |count: u64, what: &str| {
        if count > 0 {
            out.push_str(&format!("{} {what}\n", human::count(count)));
        }
    };
    note(report.orphans, "orphaned files removed");
    note(report.generations_kept, "earlier uppers kept: a view uses them or has written to them");
    note(report.images_mounted, "unneeded images kept: they are mounted");
    if report.interrupted {
        out.push_str("interrupted: run it again for the rest\n");
    }
    out
}
