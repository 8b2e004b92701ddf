//! `pagefold verify`: is the store whole, and does the cache hold what the disk holds?
//!
//! What it deliberately does not hold: what is checked (`pagefold_fsadapters::store` does).

use clap::Args;
use pagefold_fsadapters::scan::path_text;
use pagefold_fsadapters::store::{OpenMode, Store, VerifyReport};

use crate::exit::Exit;
use crate::format::Format;
use crate::store_arg::StoreArg;
use crate::{human, task_bar};

/// Arguments of `pagefold verify`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Compares every image with its digest, every anchor, upper and manifest with the index, and the cached pages \
    of anchors with the disk (direct reads; nothing is brought into the cache). Changes nothing.\n\n\
    Exit status: 0 nothing is wrong; 1 something is, or interrupted; 2 wrong usage, or the store can't be used."
)]
pub struct VerifyArgs {
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold verify`.
pub fn run(args: &VerifyArgs) -> anyhow::Result<Exit> {
    let store = args.store.open(None, OpenMode::Existing, "verify")?;
    let report = task_bar::watch("verifying", |task| {
        let mut report = store.verify(task)?;
        store.verify_places(task, &mut report)?;
        Ok::<_, pagefold_fsadapters::store::StoreError>(report)
    })?;
    args.format.write(|| json(&store, &report), || text(&report))?;
    Ok(if report.interrupted || report.problem_count > 0 { Exit::Partial } else { Exit::Done })
}

fn json(store: &Store, report: &VerifyReport) -> serde_json::Value {
    let problems: Vec<serde_json::Value> = report
        .problems
        .iter()
        .map(|p| {
            serde_json::json!({
                "path": path_text(&p.path),
                "kind": p.kind.word(),
                "detail": p.detail,
                "offset": p.offset,
            })
        })
        .collect();
    serde_json::json!({
        "schema": "pagefold.verify/1",
        "store": path_text(store.dir()),
        "images": report.images,
        "roots": report.roots,
        "anchors": report.anchors,
        "compared_bytes": report.compared_bytes,
        "not_compared_bytes": report.not_compared_bytes,
        "problem_count": report.problem_count,
        "problems": problems,
        "interrupted": report.interrupted,
    })
}

fn text(report: &VerifyReport) -> String {
    let mut out = String::new();
    for problem in &report.problems {
        let at = problem.offset.map(|at| format!(" at byte {at}")).unwrap_or_default();
        let (path, kind) = (human::path(&problem.path), problem.kind.word());
        out.push_str(&format!("{kind}: {path}{at}: {}\n", problem.detail));
    }
    out.push_str(&format!(
        "{} images, {} anchors, {} uppers looked at; {} of cached pages compared with the disk\n",
        human::count(report.images),
        human::count(report.anchors),
        human::count(report.roots),
        human::bytes(report.compared_bytes),
    ));
    if report.not_compared_bytes > 0 {
        out.push_str(&format!(
            "{} cached, but compressed or inline on disk: can't be compared\n",
            human::bytes(report.not_compared_bytes)
        ));
    }
    out.push_str(&match report.problem_count {
        0 if report.interrupted => "interrupted: nothing wrong so far\n".to_owned(),
        0 => "nothing is wrong\n".to_owned(),
        n => format!("{} problems\n", human::count(n)),
    });
    out
}
