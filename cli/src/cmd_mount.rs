//! `pagefold mount` and `pagefold umount`: views appear and go.
//!
//! What it deliberately does not hold: what a view is made of (see `pagefold_fsadapters::sealed::mount`).

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use pagefold_fsadapters::mountinfo;
use pagefold_fsadapters::scan::path_text;
use pagefold_fsadapters::sealed::commit_root::has_changes;
use pagefold_fsadapters::sealed::idmap::IdMaps;
use pagefold_fsadapters::sealed::live::UpperState;
use pagefold_fsadapters::sealed::mount::{
    self, MountOptions, Mounted, Unmounted, discard_writes, mount_views, umount_view,
};
use pagefold_fsadapters::sealed::prefault;
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};

use crate::cmd_prefault;
use crate::exit::Exit;
use crate::format::{Format, UNWRITTEN, write_json};
use crate::human;
use crate::per_root::errors_json;
use crate::store_arg::StoreArg;

/// Arguments of `pagefold mount`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "A view shows its root as it was sealed, with what was written through the view since. Equal files of all views \
        are in the page cache once. TARGET may be ROOT itself. The flags of the mount that ROOT is on (nosuid, nodev, noexec, \
        nosymfollow, ro) are the view's too.\n\n\
        Refused while a process has its root, its working directory or a file open for writing in ROOT: the view would not \
        see what it writes.\n\n\
        Exit status: 0 all are mounted; 1 some are; 2 none is, or wrong usage; 3 this host can't."
)]
pub struct MountArgs {
    /// The sealed root: its path, or the name that `seal` gave it.
    #[arg(value_name = "ROOT", required_unless_present_any = ["all", "restore"])]
    root: Option<PathBuf>,
    /// An existing directory.
    #[arg(value_name = "TARGET", required_unless_present_any = ["all", "restore"])]
    target: Option<PathBuf>,
    /// Mount the views of all roots of the store, each at DIR/NAME.
    #[arg(long, requires = "at", conflicts_with_all = ["root", "restore"])]
    all: bool,
    /// Where `--all` mounts; directories that are missing are made.
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// Mount again what was mounted when the host went down.
    #[arg(long, conflicts_with = "root")]
    restore: bool,
    /// For `mount.pagefold`: a view that is where it should be is no error, so that `mount -a` may be run again.
    #[arg(long, hide = true)]
    helper: bool,
    /// Read-only.
    #[arg(long)]
    ro: bool,
    /// Show owners through a map: INSIDE:OUTSIDE:COUNT[,...], or one for users and one for groups with a slash between.
    #[arg(long, value_name = "MAP")]
    idmap: Option<IdMaps>,
    /// Although processes use the root.
    #[arg(long)]
    force: bool,
    /// Then read what the views share, charged to this memory group and to no container (see `pagefold prefault`).
    #[arg(long, value_name = "GROUP", num_args = 0..=1, require_equals = true, default_missing_value = prefault::GROUP)]
    charge: Option<String>,
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Arguments of `pagefold umount`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "What was written in the view stays in the store unless --commit or --discard is given.\n\n\
        Exit status: 0 done; 1 unmounted, but not all that was asked for could be done; 2 not unmounted."
)]
pub struct UmountArgs {
    /// Where the view is mounted.
    #[arg(value_name = "TARGET", required = true)]
    targets: Vec<PathBuf>,
    /// Keep what was written (the default).
    #[arg(long, conflicts_with_all = ["commit", "discard"])]
    keep: bool,
    /// Bring what was written back into the raw root.
    #[arg(long, conflicts_with = "discard")]
    commit: bool,
    /// Throw away what was written.
    #[arg(long)]
    discard: bool,
    #[command(flatten)]
    store: StoreArg,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Views that are mounted alike.
type Batch = (MountOptions, Vec<(RootRow, PathBuf)>);
/// What is to be mounted, and roots that have no place to be mounted at.
type Batches = (Vec<Batch>, Vec<(String, ViewError)>);

/// Runs `pagefold mount`.
pub fn run(args: &MountArgs) -> anyhow::Result<Exit> {
    let store = open_store(args)?;
    let (mut results, mut roots) = (Vec::new(), Vec::new());
    let (batches, lost) = batches(args, &store)?;
    for (options, requests) in batches {
        let done = mount_views(&store, &requests, &options);
        let mounted = requests.iter().zip(&done).filter(|(_, done)| done.is_ok());
        roots.extend(mounted.map(|((row, _), _)| row.clone()));
        results.extend(requests.into_iter().map(|(row, _)| row.name).zip(done));
    }
    results.extend(lost.into_iter().map(|(name, error)| (name, Err(error))));
    write_mounted(&results, args.format).context(UNWRITTEN)?;
    if let Some(group) = args.charge.as_ref().filter(|_| !roots.is_empty()) {
        cmd_prefault::charge(&store, roots, group);
    }
    Ok(exit_of(results.iter().map(|(_, r)| r.as_ref().err())))
}

fn open_store(args: &MountArgs) -> anyhow::Result<Store> {
    // A name is no path: then the target is what lies near the store.
    let known = [&args.root, &args.target, &args.at].into_iter().flatten();
    let near = known.flat_map(|p| p.ancestors()).find(|p| p.exists());
    // By name, from where the store is onto another file system.
    let by_name = args.root.as_ref().is_none_or(|root| root.components().count() == 1 && !root.exists());
    let has_store = |near| args.store.dir(near).is_ok_and(|dir| dir.join("FORMAT").exists());
    let near = near.filter(|near| !by_name || has_store(Some(near)) || !has_store(None));
    args.store.open(near, OpenMode::Existing, "mount")
}

fn batches(args: &MountArgs, store: &Store) -> anyhow::Result<Batches> {
    let options = MountOptions {
        read_only: args.ro,
        id_map: args.idmap.clone(),
        force: args.force,
        ..MountOptions::default()
    };
    if args.restore {
        return Ok((restored(args, store)?, Vec::new()));
    }
    if let (Some(root), Some(target)) = (&args.root, &args.target) {
        let row = store.find_root(root)?;
        if args.helper && is_there(store, &row, target)? {
            return Ok((Vec::new(), Vec::new()));
        }
        return Ok((vec![(options, vec![(row, target.clone())])], Vec::new()));
    }
    let at = args.at.as_ref().context("mount --all: name the directory with --at DIR")?;
    let (mut requests, mut lost) = (Vec::new(), Vec::new());
    for row in store.roots()? {
        let target = at.join(&row.name);
        match make_target(&target) {
            Ok(()) => requests.push((row, target)),
            Err(error) => lost.push((row.name, error)),
        }
    }
    Ok((vec![(options, requests)], lost))
}

/// Whether the view of `row` is mounted at `target`.
fn is_there(store: &Store, row: &RootRow, target: &Path) -> anyhow::Result<bool> {
    let Ok(target) = target.canonicalize() else { return Ok(false) };
    let meant = store.view(row.id)?.is_some_and(|view| view.target == target);
    let mounts = mountinfo::read().context("read /proc/self/mountinfo")?;
    Ok(meant && mount::view_at(&mounts, &target).is_some())
}

fn make_target(target: &Path) -> Result<(), ViewError> {
    std::fs::create_dir_all(target).map_err(|e| ViewError::Call {
        op: "make the directory",
        path: target.to_owned(),
        errno: rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO),
    })
}

/// What the index says should be mounted and is not, with the options it had.
fn restored(args: &MountArgs, store: &Store) -> anyhow::Result<Vec<Batch>> {
    let mounts = mountinfo::read().context("read /proc/self/mountinfo")?;
    let mut batches: BTreeMap<(bool, String), Vec<(RootRow, PathBuf)>> = BTreeMap::new();
    for view in store.views()? {
        if mount::view_at(&mounts, &view.target).is_none() {
            let row = store.root(view.root)?;
            batches.entry((view.read_only, view.idmap)).or_default().push((row, view.target));
        }
    }
    let batch = |((read_only, idmap), requests): ((bool, String), Vec<(RootRow, PathBuf)>)| {
        let id_map = if idmap.is_empty() { None } else { Some(idmap.parse()?) };
        let options = MountOptions { read_only, id_map, force: args.force, ..MountOptions::default() };
        anyhow::Ok((options, requests))
    };
    batches.into_iter().map(batch).collect()
}

/// 3 when only the host is to blame.
fn exit_of<'a>(errors: impl Iterator<Item = Option<&'a ViewError>>) -> Exit {
    let (mut done, mut failed, mut host) = (0, 0, true);
    for error in errors {
        match error {
            None => done += 1,
            Some(error) => {
                failed += 1;
                host &= error.is_host_s();
            }
        }
    }
    match (done, failed) {
        (_, 0) => Exit::Done,
        (0, _) if host => Exit::Refused,
        (0, _) => Exit::Error,
        _ => Exit::Partial,
    }
}

fn write_mounted(results: &[(String, Result<Mounted, ViewError>)], format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let views: Vec<serde_json::Value> =
            results.iter().filter_map(|(_, r)| r.as_ref().ok()).map(mounted_json).collect();
        let failed = results.iter().filter_map(|(name, r)| Some((name.as_str(), r.as_ref().err()?)));
        let errors = errors_json(failed);
        return write_json(
            &serde_json::json!({ "schema": "pagefold.mount/1", "views": views, "errors": errors }),
        );
    }
    let mut out = std::io::stdout().lock();
    for (name, result) in results {
        match result {
            Ok(view) => {
                writeln!(out, "{name} is at {}", human::path(&view.target))?;
                view.warnings.iter().for_each(|w| eprintln!("pagefold: warning: {w}"));
            }
            Err(error) => eprintln!("pagefold: {name}: {error}"),
        }
    }
    if results.is_empty() {
        writeln!(out, "nothing to mount")?;
    }
    Ok(())
}

fn mounted_json(view: &Mounted) -> serde_json::Value {
    serde_json::json!({
        "root": view.root.0,
        "name": view.name,
        "target": path_text(&view.target),
        "warnings": view.warnings,
    })
}

/// Runs `pagefold umount`.
pub fn run_umount(args: &UmountArgs) -> anyhow::Result<Exit> {
    let (mut exits, mut reports) = (Vec::new(), Vec::new());
    for target in &args.targets {
        let outcome = umount_one(args, target);
        let (exit, report) = match outcome {
            Ok((done, extra)) => {
                let exit = if extra.is_err() { Exit::Partial } else { Exit::Done };
                (exit, unmounted_json(&done, extra))
            }
            Err(error) => {
                let text = crate::told(&error);
                (Exit::Error, serde_json::json!({ "target": path_text(target), "error": text }))
            }
        };
        exits.push(exit);
        reports.push(report);
    }
    write_unmounted(&reports, args.format).context(UNWRITTEN)?;
    Ok(match (exits.contains(&Exit::Error), exits.iter().all(|e| *e == Exit::Error)) {
        (true, true) => Exit::Error,
        (true, false) => Exit::Partial,
        _ if exits.contains(&Exit::Partial) => Exit::Partial,
        _ => Exit::Done,
    })
}

/// What became of the writes: a sentence, or why not.
type Extra = Result<String, String>;

fn umount_one(args: &UmountArgs, target: &Path) -> anyhow::Result<(Unmounted, Extra)> {
    let told = mount::store_of(target);
    let store = match &told {
        Some(dir) => args.store.open_at(dir, OpenMode::Existing, "umount")?,
        // Not mounted: perhaps it was, before the host went down.
        None => args.store.open(Some(target), OpenMode::Existing, "umount")?,
    };
    let done = umount_view(&store, target)?;
    let extra = after(args, &store, &done);
    Ok((done, extra))
}

fn after(args: &UmountArgs, store: &Store, done: &Unmounted) -> Extra {
    if !args.commit && !args.discard {
        return Ok("what was written is kept".into());
    }
    let root = done.root.ok_or("the index does not know this view, so nothing was done with its writes")?;
    if done.state == Some(UpperState::Live) {
        return Err(format!(
            "nothing was {}: the view is still in use",
            if args.commit { "committed" } else { "discarded" }
        ));
    }
    let row = store.root(root).map_err(|e| e.to_string())?;
    if args.discard {
        // Where that can't be told, what is there goes all the same.
        let any = has_changes(store, &row).unwrap_or(true);
        let gone = discard_writes(store, &row).map_err(|e| e.to_string())?;
        if gone.half_committed {
            return Err(format!(
                "{} written entries were discarded, but a commit of them had begun: `pagefold commit {:?}` takes its part out of the raw root again",
                gone.entries, row.name
            ));
        }
        return Ok(match any {
            true => format!("{} written entries were discarded", gone.entries),
            false => "nothing had been written".to_owned(),
        });
    }
    crate::cmd_commit::commit_one(store, &row)
}

fn unmounted_json(done: &Unmounted, extra: Extra) -> serde_json::Value {
    let (note, error) = match extra {
        Ok(note) => (Some(note), None),
        Err(error) => (None, Some(error)),
    };
    serde_json::json!({
        "target": path_text(&done.target),
        "root": done.root.map(|r| r.0),
        "was_mounted": done.was_mounted,
        "live": done.state == Some(UpperState::Live),
        "holders": done.holders,
        "note": note,
        "error": error,
    })
}

fn write_unmounted(reports: &[serde_json::Value], format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return write_json(&serde_json::json!({ "schema": "pagefold.umount/1", "views": reports }));
    }
    let mut out = std::io::stdout().lock();
    for report in reports {
        let text = |key: &str| report[key].as_str().unwrap_or_default().to_owned();
        let target = human::path(Path::new(&text("target")));
        match (report["note"].as_str(), report["error"].as_str()) {
            (Some(note), _) => writeln!(out, "{target}: unmounted; {note}")?,
            (_, Some(error)) => eprintln!("pagefold: {target}: {error}"),
            _ => {}
        }
        if report["live"] == true {
            let held: Vec<&str> =
                report["holders"].as_array().into_iter().flatten().filter_map(|h| h.as_str()).collect();
            let who = if held.is_empty() { "another mount namespace".to_owned() } else { held.join(", ") };
            eprintln!("pagefold: warning: {target}: the view is gone from here and still in use: {who}");
        }
    }
    Ok(())
}
