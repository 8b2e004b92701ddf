//! The absolute undo: a root is forgotten, its raw directory stays as what its containers saw.
//!
//! ```text
//! not live -> writes committed, exported or given up -> root forgotten by one commit -> upper removed
//! all roots gone -> garbage collected -> store removed
//! ```
//!
//! Invariant: without being told so in words, nothing that a view wrote is lost. A crash anywhere leaves a root that is sealed, or one that
//! is not; what to do is the same command again. What it deliberately does not do: unmount views.

use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use super::commit::{self, Applied, CommitError, Past};
use super::commit_root::{CommitOptions, apply, finish_earlier, has_changes};
use super::export::{ExportOptions, ExportReport, export_root};
use super::opened::{below, call, journal_of, refuse_live};
use super::upper::UPPER;
use crate::mountinfo;
use crate::scan::Progress;
use crate::store::{GcReport, RootRow, SealId, Store, Task, step};

/// What is to become of what a view wrote and nobody committed.
#[derive(Clone, Debug, Default)]
pub enum Writes {
    /// Nothing: the root stays sealed.
    #[default]
    Refuse,
    /// Into the raw root.
    Commit(CommitOptions),
    /// The view's state into this directory (not there yet).
    Export(PathBuf),
    /// It is lost.
    Discard,
}

/// How a root was unsealed.
#[derive(Clone, Debug, serde::Serialize)]
pub struct UnsealReport {
    /// The root.
    pub id: SealId,
    /// Its name.
    pub name: String,
    /// The raw root.
    pub path: PathBuf,
    /// It is forgotten. If not, the report says why: conflicts, or files that could not be exported.
    pub unsealed: bool,
    /// What a commit did.
    pub applied: Option<Applied>,
    /// What an export did.
    pub exported: Option<ExportReport>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Forgets `row`'s root.
///
/// # Errors
/// [`CommitError`]: it is mounted, it has writes and `writes` does not say what with them, or something failed. Then it is sealed as before.
pub fn unseal_root(
    store: &Store,
    row: &RootRow,
    writes: &Writes,
    progress: &Progress,
) -> Result<UnsealReport, CommitError> {
    let given_up = matches!(writes, Writes::Discard);
    // Somebody took the upper away: nobody can mount it, and nothing in it can be lost any more.
    let is_gone = given_up && !store.root_dir(row.id, row.generation).join(UPPER).exists();
    if !is_gone {
        finish_earlier(store, row)?;
        refuse_live(store, row)?;
        refuse_earlier(store, row, writes)?;
    }
    let mut report = UnsealReport {
        id: row.id,
        name: row.name.clone(),
        path: row.path.clone(),
        unsealed: false,
        applied: None,
        exported: None,
        notes: Vec::new(),
    };
    // A damaged manifest does not keep a root sealed whose writes are given up.
    let has_changes = match has_changes(store, row) {
        Err(_) if given_up => true,
        result => result?,
    };
    if has_changes && !settle(store, row, writes, &mut report, progress)? {
        return Ok(report);
    }
    step("unseal.committed");
    // With its view row and all its uppers, by one commit.
    store.discard_root(row.id).map_err(below)?;
    step("unseal.removed");
    report.unsealed = true;
    Ok(report)
}

/// Sees to what the view wrote. False: not all of it is safe.
fn settle(
    store: &Store,
    row: &RootRow,
    writes: &Writes,
    report: &mut UnsealReport,
    progress: &Progress,
) -> Result<bool, CommitError> {
    match writes {
        Writes::Refuse => Err(CommitError::Refused(format!(
            "the view of {:?} has written what its raw root has not: unseal it with --commit, --export DIR, or --discard, which loses it",
            row.name
        ))),
        Writes::Commit(options) => {
            let applied = apply(store, row, *options, progress)?;
            let complete = applied.is_complete();
            report.applied = Some(applied);
            Ok(complete)
        }
        Writes::Export(target) => {
            let exported = export_root(store, row, target, ExportOptions::default(), progress)?;
            let complete = !exported.partial;
            report.exported = Some(exported);
            Ok(complete)
        }
        Writes::Discard => {
            if matches!(commit::past(&journal_of(store, row, row.generation)), Ok(Past::Begun)) {
                let note = "a commit of it was begun and did not end: the raw root holds a part of what the view wrote";
                report.notes.push(note.into());
            }
            Ok(true)
        }
    }
}

/// Earlier generations whose uppers hold something: nobody can say any more over what it was written.
fn refuse_earlier(store: &Store, row: &RootRow, writes: &Writes) -> Result<(), CommitError> {
    for generation in store.generations_of(row.id).map_err(below)? {
        let earlier = RootRow { generation, ..row.clone() };
        refuse_live(store, &earlier)?;
        let is_current = generation == store.root(row.id).map_err(below)?.generation;
        if is_current || matches!(writes, Writes::Discard) {
            continue;
        }
        if store.upper_has_writes(row.id, generation).map_err(below)? {
            return Err(CommitError::Refused(format!(
                "an earlier upper of {:?} holds writes: look at {:?}, then unseal with --discard",
                row.name,
                store.root_dir(row.id, generation).join(UPPER)
            )));
        }
    }
    Ok(())
}

/// Removes a store that has no roots any more, with everything in it.
///
/// # Errors
/// It still has roots, something in it is mounted and in use, or as removing fails.
pub fn remove_store(mut store: Store, task: &Task) -> Result<GcReport, CommitError> {
    if let Some(root) = store.roots().map_err(below)?.first() {
        return Err(CommitError::Refused(format!("the store still has the sealed root {:?}", root.name)));
    }
    unmount_all(store.dir())?;
    // No root is left, so no view can be live that needs an image: each was probed before it was forgotten.
    let report = store.gc(&|_| false, task).map_err(below)?;
    if report.interrupted {
        return Err(CommitError::Cancelled);
    }
    store.destroy().map_err(below)?;
    Ok(report)
}

/// Takes down what pagefold mounted in the store: images, and their private directory.
fn unmount_all(store: &Path) -> Result<(), CommitError> {
    let mounts = mountinfo::read().map_err(|e| call("read", Path::new("/proc/self/mountinfo"), e))?;
    let mut below: Vec<&Path> =
        mounts.iter().map(|m| &*m.mount_point).filter(|at| at.starts_with(store) && *at != store).collect();
    below.reverse();
    for at in below {
        unmount(at, UnmountFlags::NOFOLLOW).map_err(|e| call("unmount", at, e))?;
    }
    Ok(())
}
