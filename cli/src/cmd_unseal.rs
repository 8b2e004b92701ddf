//! `pagefold unseal` and `pagefold uninstall --check`: the absolute undo, and the proof that nothing is left.
//!
//! What it deliberately does not hold: how (see `pagefold_fsadapters::sealed::{unseal, remains}`).

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use pagefold_fsadapters::scan::path_text;
use pagefold_fsadapters::sealed::remains::{self, Remain};
use pagefold_fsadapters::sealed::unseal::{UnsealReport, Writes, remove_store, unseal_root};
use pagefold_fsadapters::store::{GcReport, OpenMode, RootRow, Store, StoreError, Task, remove_unfinished};

use crate::cmd_commit::{self, HowArgs, applied_json};
use crate::exit::Exit;
use crate::format::{Format, UNWRITTEN, write_json};
use crate::per_root::{PerRoot, Whole, near, rows_of};
use crate::store_arg::StoreArg;
use crate::{cmd_export, human, task_bar};

/// Arguments of `pagefold unseal`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The raw roots stay, whole and ordinary. Views must be unmounted. A root whose view wrote something is refused unless \
        --commit, --export or --discard says what becomes of that. With --all the store is removed too: nothing of pagefold is left on that file \
        system.\n\n\
        Exit status: 0 done; 1 some roots are still sealed; 2 nothing was done."
)]
pub struct UnsealArgs {
    /// Sealed roots: their paths, or the names that `seal` gave them.
    #[arg(value_name = "ROOT", required_unless_present = "all")]
    roots: Vec<PathBuf>,
    /// All roots, and the store.
    #[arg(long, conflicts_with = "roots")]
    all: bool,
    /// Bring what views wrote into the raw roots first.
    #[arg(long, conflicts_with_all = ["export", "discard"])]
    commit: bool,
    /// Put what views show into DIR first (with --all or several roots: DIR/NAME).
    #[arg(long, value_name = "DIR", conflicts_with = "discard")]
    export: Option<PathBuf>,
    /// Lose what views wrote.
    #[arg(long)]
    discard: bool,
    #[command(flatten)]
    how: HowArgs,
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Arguments of `pagefold uninstall`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Looks for views in all mount namespaces, stores at the top of mounted file systems, lines of fstab, systemd units and \
        running processes. Changes nothing.\n\n\
        Exit status: 0 nothing is left; 1 something is: the list says what to do about it."
)]
pub struct UninstallArgs {
    /// Look whether anything still depends on pagefold.
    #[arg(long, required = true)]
    check: bool,
    /// Further directories where a store may be.
    #[arg(long = "store", value_name = "DIR")]
    stores: Vec<PathBuf>,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold unseal`.
pub fn run(args: &UnsealArgs) -> anyhow::Result<Exit> {
    let dir = args.store.dir(near(&args.roots))?;
    let store = match Store::open(&dir, OpenMode::Existing, "pagefold unseal") {
        // What an earlier `unseal --all` did not come to remove.
        Err(StoreError::Absent(path)) if args.all && path.is_dir() => {
            remove_unfinished(&path)?;
            write(&PerRoot::none(), Some(&GcReport::default()), args.format).context(UNWRITTEN)?;
            return Ok(Exit::Done);
        }
        other => other?,
    };
    let rows = rows_of(&store, &args.roots, args.all)?;
    if let Some(dir) = args.export.as_ref().filter(|_| args.all || rows.len() > 1) {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", human::path(dir)))?;
    }
    let several = rows.len() > 1;
    let results =
        PerRoot::of(rows, |row, progress| unseal_root(&store, row, &writes(args, row, several), progress));
    let exit = results.exit(|report| if report.unsealed { Whole::All } else { Whole::Part });
    let removed = match args.all && exit == Exit::Done {
        true => Some(task_bar::watch("removing", |task: &Task| remove_store(store, task))),
        false => None,
    };
    let gone = removed.transpose();
    write(&results, gone.as_ref().ok().and_then(Option::as_ref), args.format).context(UNWRITTEN)?;
    if let Err(error) = gone {
        bail!("all roots are unsealed, but the store is still there: {error}");
    }
    Ok(exit)
}

fn writes(args: &UnsealArgs, row: &RootRow, several: bool) -> Writes {
    match (&args.export, args.commit, args.discard) {
        (Some(dir), ..) if several || args.all => Writes::Export(dir.join(&row.name)),
        (Some(dir), ..) => Writes::Export(dir.clone()),
        (_, true, _) => Writes::Commit(args.how.options()),
        (_, _, true) => Writes::Discard,
        _ => Writes::Refuse,
    }
}

fn write(results: &PerRoot<UnsealReport>, removed: Option<&GcReport>, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let mut report = results.json("pagefold.unseal/1", report_json);
        report["store_removed"] = removed.is_some().into();
        return write_json(&report);
    }
    let mut out = std::io::stdout().lock();
    results.tell(|row, report| write_one(&mut out, row, report))?;
    if let Some(gone) = removed {
        writeln!(
            out,
            "the store is removed ({} anchors, {} images)",
            human::count(gone.anchors),
            human::count(gone.images)
        )?;
    }
    Ok(out.flush()?)
}

fn write_one(out: &mut impl Write, row: &RootRow, report: &UnsealReport) -> std::io::Result<()> {
    if let Some(applied) = &report.applied {
        writeln!(out, "{}: committed: {}", row.name, cmd_commit::summary(applied))?;
        cmd_commit::tell(applied);
    }
    if let Some(exported) = &report.exported {
        writeln!(out, "{}", cmd_export::line(exported))?;
    }
    report.notes.iter().for_each(|note| eprintln!("pagefold: note: {}: {note}", row.name));
    match report.unsealed {
        true if row.path.is_dir() => writeln!(
            out,
            "{}: no longer sealed; {} is an ordinary directory",
            row.name,
            human::path(&row.path)
        )?,
        true => writeln!(out, "{}: no longer sealed; {} is not there", row.name, human::path(&row.path))?,
        false => eprintln!("pagefold: {}: still sealed, for not all that its view wrote is safe", row.name),
    }
    Ok(())
}

fn report_json(report: &UnsealReport) -> serde_json::Value {
    serde_json::json!({
        "id": report.id.0,
        "name": report.name,
        "path": path_text(&report.path),
        "unsealed": report.unsealed,
        "applied": report.applied.as_ref().map(applied_json),
        "exported": report.exported.as_ref().map(cmd_export::json),
        "notes": report.notes,
    })
}

/// Runs `pagefold uninstall --check`.
pub fn run_uninstall(args: &UninstallArgs) -> anyhow::Result<Exit> {
    let found = remains::look(&args.stores);
    args.format.write(
        || serde_json::json!({ "schema": "pagefold.uninstall/1", "remains": found }),
        || match found.is_empty() {
            true => "nothing on this host depends on pagefold\n".to_owned(),
            false => found.iter().map(|remain| remain_line(remain) + "\n").collect(),
        },
    )?;
    Ok(if found.is_empty() { Exit::Done } else { Exit::Partial })
}

fn remain_line(remain: &Remain) -> String {
    let kind = serde_json::to_value(remain.kind).ok();
    let kind = kind.as_ref().and_then(|k| k.as_str()).unwrap_or_default().to_owned();
    format!("{kind}: {}: {}", human::path(Path::new(&remain.what)), remain.remedy)
}
