//! `pagefold commit`: what views wrote goes back into their raw roots.
//!
//! What it deliberately does not hold: how (see `pagefold_fsadapters::sealed::commit_root`).

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use pagefold_fsadapters::scan::path_text;
use pagefold_fsadapters::sealed::commit::{Applied, OnConflict};
use pagefold_fsadapters::sealed::commit_root::{CommitOptions, CommitOutcome, CommitReport, commit_root};
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};

use crate::exit::Exit;
use crate::format::{Format, UNWRITTEN, write_json};
use crate::human;
use crate::per_root::{PerRoot, Whole, cancellable, near, rows_of};
use crate::store_arg::StoreArg;

/// Arguments of `pagefold commit`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The view must not be mounted anywhere. Each changed file is made anew beside its place (sharing its blocks with what \
        the view wrote), brought to disk, then swapped in; whiteouts, renames, hard links, attributes and ownership follow. Then the \
        root is sealed again. An interrupted commit has lost nothing: run it again.\n\n\
        A path that view and raw root both changed is left alone and reported, and what the view wrote stays for a later try: \
        put the raw root right, or choose --ours (the view's state) or --theirs (the raw root's).\n\n\
        Exit status: 0 all is in the raw roots; 1 some paths or roots are not; 2 nothing could be done."
)]
pub struct CommitArgs {
    /// Sealed roots: their paths, or the names that `seal` gave them.
    #[arg(value_name = "ROOT", required_unless_present = "all")]
    roots: Vec<PathBuf>,
    /// All roots of the store.
    #[arg(long, conflicts_with = "roots")]
    all: bool,
    #[command(flatten)]
    how: HowArgs,
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// How to commit.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct HowArgs {
    /// Where both changed a path, the view's state replaces the raw root's.
    #[arg(long, conflicts_with = "theirs")]
    ours: bool,
    /// Where both changed a path, the raw root's state stays and the view's is given up.
    #[arg(long)]
    theirs: bool,
    /// Although a process has a file of the raw root open for writing.
    #[arg(long)]
    force: bool,
}

impl HowArgs {
    /// Resolved.
    pub fn options(self) -> CommitOptions {
        let on_conflict = match (self.ours, self.theirs) {
            (true, _) => OnConflict::TakeView,
            (_, true) => OnConflict::TakeRaw,
            _ => OnConflict::Keep,
        };
        CommitOptions { on_conflict, force: self.force }
    }
}

/// Runs `pagefold commit`.
pub fn run(args: &CommitArgs) -> anyhow::Result<Exit> {
    let store = args.store.open(near(&args.roots), OpenMode::Existing, "pagefold commit")?;
    let rows = rows_of(&store, &args.roots, args.all)?;
    let options = args.how.options();
    let results = PerRoot::of(rows, |row, progress| commit_root(&store, row, options, progress));
    write(&results, args.format).context(UNWRITTEN)?;
    Ok(results.exit(is_complete))
}

fn is_complete(report: &CommitReport) -> Whole {
    match report.outcome {
        CommitOutcome::Unchanged | CommitOutcome::Committed => Whole::All,
        CommitOutcome::NotSealed | CommitOutcome::Partial => Whole::Part,
    }
}

fn write(results: &PerRoot<CommitReport>, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return write_json(&results.json("pagefold.commit/1", report_json));
    }
    let mut out = std::io::stdout().lock();
    results.tell(|row, report| {
        let what = match report.outcome {
            CommitOutcome::Unchanged => "its view has written nothing".to_owned(),
            CommitOutcome::Committed => format!("committed and sealed again: {}", summary(&report.applied)),
            CommitOutcome::NotSealed => format!("committed: {}", summary(&report.applied)),
            CommitOutcome::Partial => format!("committed in part: {}", summary(&report.applied)),
        };
        writeln!(out, "{}: {what}", row.name)?;
        tell(&report.applied);
        tell_way_out(row, &report.applied);
        if let Some(why) = &report.seal_error {
            eprintln!(
                "pagefold: {}: it could not be sealed again, its view can be mounted as before: {why}",
                row.name
            );
        }
        Ok(())
    })?;
    Ok(out.flush()?)
}

fn report_json(report: &CommitReport) -> serde_json::Value {
    serde_json::json!({
        "id": report.id.0,
        "name": report.name,
        "path": path_text(&report.path),
        "outcome": report.outcome,
        "applied": applied_json(&report.applied),
        "seal_error": report.seal_error,
    })
}

/// A commit's figures.
pub fn applied_json(applied: &Applied) -> serde_json::Value {
    let told = |list: &[(PathBuf, String)], key: &str| -> Vec<serde_json::Value> {
        list.iter().map(|(path, text)| serde_json::json!({ "path": path_text(path), key: text })).collect()
    };
    let conflicts: Vec<serde_json::Value> = applied
        .conflicts
        .iter()
        .map(|c| serde_json::json!({ "path": path_text(&c.path), "why": c.why }))
        .collect();
    serde_json::json!({
        "replaced": applied.replaced,
        "created": applied.created,
        "removed": applied.removed,
        "dirs_made": applied.dirs_made,
        "dirs_changed": applied.dirs_changed,
        "already": applied.already,
        "raw_kept": applied.raw_kept,
        "shared_bytes": applied.shared_bytes,
        "copied_bytes": applied.copied_bytes,
        "conflicts": conflicts,
        "errors": told(&applied.errors, "error"),
        "notes": told(&applied.notes, "note"),
    })
}

/// A commit in a line.
pub fn summary(applied: &Applied) -> String {
    let mut text = format!(
        "{} replaced, {} new, {} removed, {} shared",
        human::count(applied.replaced),
        human::count(applied.created),
        human::count(applied.removed),
        human::bytes(applied.shared_bytes),
    );
    if applied.dirs_changed > 0 {
        text.push_str(&format!(", attributes of {} directories", human::count(applied.dirs_changed)));
    }
    if applied.copied_bytes > 0 {
        text.push_str(&format!(", {} copied", human::bytes(applied.copied_bytes)));
    }
    text
}

/// What is missing in a commit, on stderr.
pub fn tell(applied: &Applied) {
    for conflict in &applied.conflicts {
        eprintln!("pagefold: conflict: {}: {}", human::path(&conflict.path), conflict.why);
    }
    for (path, error) in &applied.errors {
        eprintln!("pagefold: {}: {error}", human::path(path));
    }
    for (path, note) in &applied.notes {
        eprintln!("pagefold: note: {}: {note}", human::path(path));
    }
}

fn tell_way_out(row: &RootRow, applied: &Applied) {
    if !applied.conflicts.is_empty() {
        let name = human::path(Path::new(&row.name));
        eprintln!(
            "pagefold: nothing is lost: make the raw root's state what it should be and run `pagefold commit {name}`, which takes what is \
             equal as done; or --ours takes the view's state, --theirs the raw root's (`pagefold export {name} DIR` shows the view's)"
        );
    }
}

/// Commits one root, for `umount --commit`: a sentence, or why not.
pub fn commit_one(store: &Store, row: &RootRow) -> Result<String, String> {
    let result = cancellable(|progress| commit_root(store, row, CommitOptions::default(), progress));
    let report = result.map_err(|e| e.to_string())?;
    tell(&report.applied);
    tell_way_out(row, &report.applied);
    match (report.outcome, &report.seal_error) {
        (CommitOutcome::Unchanged, _) => Ok("nothing had been written".into()),
        (CommitOutcome::Committed, _) => Ok(format!("committed: {}", summary(&report.applied))),
        (_, Some(why)) => Err(format!("committed, but not sealed again: {why}")),
        _ => Err(format!(
            "committed in part ({} conflicts, {} errors); the rest is kept",
            report.applied.conflicts.len(),
            report.applied.errors.len()
        )),
    }
}
