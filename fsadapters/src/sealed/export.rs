//! Export: the present state of a root's view as a directory (or btrfs subvolume) of its own.
//!
//! Invariant: what stands at the target is whole: it is built beside it (`workshop`) and renamed. The view, its raw root and the store are only
//! read. What it deliberately does not do: cross file systems (nothing could be shared; `cp -a` from a mounted view does that).

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use pagefold_sys::btrfs;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::commit::CommitError;
use super::copy_out::{Copied, Subject, copy_out};
use super::mount::release_images;
use super::opened::{DomainAnchors, Opened, below, call, open_below};
use super::workshop::Workshop;
use crate::scan::{Phase, Progress};
use crate::store::{RootRow, SealId, Store, step};

/// How to export.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExportOptions {
    /// As a btrfs subvolume.
    pub subvolume: bool,
    /// Read-only, as `btrfs send` wants it; implies `subvolume`.
    pub read_only: bool,
}

/// What was exported.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ExportReport {
    /// The root.
    pub id: SealId,
    /// Its name.
    pub name: String,
    /// Where it is now.
    pub target: PathBuf,
    /// The view was mounted: each file is whole, all of them are not of one moment.
    pub live: bool,
    /// A part is missing: it is at `target` all the same, but not read-only.
    pub partial: bool,
    /// In detail.
    pub copied: Copied,
}

/// Exports the view of `row` to `target`, which must not be there, on the same file system.
///
/// # Errors
/// [`CommitError`]; then nothing is at `target`. Files that could not be copied are in the report.
pub fn export_root(
    store: &Store,
    row: &RootRow,
    target: &Path,
    options: ExportOptions,
    progress: &Progress,
) -> Result<ExportReport, CommitError> {
    let subvolume = options.subvolume || options.read_only;
    let name = target.file_name().ok_or_else(|| CommitError::Refused(format!("{target:?} is no name")))?;
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    refuse_place(store, parent)?;
    progress.set_phase(Phase::Apply);
    // Also where the target is there: an export may have been killed after it was.
    let workshop = Workshop::claim(parent, name)?;
    if rustix::fs::lstat(target).is_ok() {
        return Err(CommitError::Refused(format!("{target:?} is there already")));
    }
    let opened = Opened::any(store, row)?;
    make(&workshop, subvolume)?;
    let result = fill(store, row, &opened, &workshop.tree(), progress);
    let live = opened.live;
    drop(opened);
    if !live {
        release_images(store).map_err(below)?;
    }
    let copied = result?;
    step("export.filled");
    finish(&workshop.tree(), target, options.read_only && copied.errors.is_empty())?;
    step("export.placed");
    drop(workshop);
    let partial = !copied.errors.is_empty();
    Ok(ExportReport { id: row.id, name: row.name.clone(), target: target.to_owned(), live, partial, copied })
}

/// The target must be where blocks can be shared, and not in the store or the root.
fn refuse_place(store: &Store, parent: &Path) -> Result<(), CommitError> {
    let real = parent.canonicalize().map_err(|e| call("find", parent, e))?;
    if real.starts_with(store.dir()) {
        return Err(CommitError::Refused(format!("{parent:?} lies in the store")));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&real, flags, Mode::empty()).map_err(|e| call("open", &real, e))?;
    let of = |fd| crate::fsid::describe(fd).map(|f| f.description.uuid);
    match (of(dir.as_fd()), of(store.dirfd())) {
        (Ok(there), Ok(here)) if there == here => Ok(()),
        (Ok(_), Ok(_)) => Err(CommitError::Refused(format!(
            "{parent:?} is on another file system than the store, where nothing can be shared; mount the view and copy it with `cp -a`"
        ))),
        (Err(e), _) | (_, Err(e)) => Err(call("describe the file system of", parent, e.source)),
    }
}

fn make(workshop: &Workshop, subvolume: bool) -> Result<(), CommitError> {
    let name = Workshop::tree_name();
    let made = if subvolume {
        btrfs::create_subvolume(workshop.dir(), name.as_ref())
    } else {
        rustix::fs::mkdirat(workshop.dir(), name, Mode::RWXU).map_err(Into::into)
    };
    made.map_err(|e| match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOTTY) if subvolume => {
            CommitError::Refused("only btrfs has subvolumes: export without --subvolume".into())
        }
        _ => call("make", &workshop.tree(), e),
    })
}

fn fill(
    store: &Store,
    row: &RootRow,
    opened: &Opened,
    partial: &Path,
    progress: &Progress,
) -> Result<Copied, CommitError> {
    let subject = Subject {
        view: &opened.view,
        upper: &opened.upper,
        index: opened.index.as_ref(),
        sealed: &opened.tree,
        anchors: &DomainAnchors { store, domain: row.domain },
        live: opened.live,
    };
    copy_out(&subject, &open_below(partial)?, progress)
}

fn finish(partial: &Path, target: &Path, read_only: bool) -> Result<(), CommitError> {
    let dir = open_below(partial)?;
    rustix::fs::renameat_with(CWD, partial, CWD, target, RenameFlags::NOREPLACE)
        .map_err(|e| call("rename to", target, e))?;
    if read_only {
        // After the rename: a read-only subvolume can't be renamed.
        btrfs::set_read_only(dir.as_fd()).map_err(|e| call("make read-only", target, e))?;
    }
    rustix::fs::syncfs(dir.as_fd()).map_err(|e| call("sync", target, e))
}
