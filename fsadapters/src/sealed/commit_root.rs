//! Commit of a root of a store: its view's changes go into the raw root, then the root is sealed again.
//!
//! ```text
//! held (nobody can mount it) -> applied, on disk, noted -> sealed again: a new generation, published by one commit
//!   -> the old generation's upper emptied and removed
//! ```
//!
//! Until the new generation is published, the old one's upper over the old image shows exactly what the raw root holds now, so a crash
//! anywhere leaves a view that can be mounted and a commit that can be run again. Afterwards nothing needs the old upper.
//! Invariant: an upper is emptied only when all of it is in the raw root, synced, and the root points to another. What it deliberately
//! does not do: stop writers of the raw root; those with a file open for writing are refused, others are seen when a name is changed.

use std::path::PathBuf;

use rustix::fs::fstat;

use super::commit::{self, Applied, Below, CommitError, OnConflict, Past, Scene};
use super::mount::release_images;
use super::opened::{DomainAnchors, Opened, below, call, journal_of, refuse_live, tree_of};
use super::raw::open_raw_root;
use super::seal::{SealConfig, seal, unsupported};
use super::tree::EntryId;
use super::upper;
use super::users::{self, Watched};
use crate::scan::{Phase, Progress};
use crate::store::manifest::read_manifest;
use crate::store::{RootRow, SealId, Store, step};

/// How to commit.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommitOptions {
    /// Where view and raw root both changed a path.
    pub on_conflict: OnConflict,
    /// Although a process has a file of the raw root open for writing.
    pub force: bool,
}

/// What became of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CommitOutcome {
    /// The view had changed nothing.
    Unchanged,
    /// The raw root shows what the view showed, and is sealed as that.
    Committed,
    /// The same, but sealing again failed: the view can be mounted as before, its upper stays until the next commit.
    NotSealed,
    /// Some paths could not be committed. The upper stays.
    Partial,
}

/// What a commit did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CommitReport {
    /// The root.
    pub id: SealId,
    /// Its name.
    pub name: String,
    /// The raw root.
    pub path: PathBuf,
    /// In a word.
    pub outcome: CommitOutcome,
    /// In detail.
    pub applied: Applied,
    /// Why it could not be sealed again.
    pub seal_error: Option<String>,
}

/// Commits the view of `row`, which nobody may have mounted.
///
/// # Errors
/// [`CommitError`]; conflicts and paths that could not be written are in the report.
pub fn commit_root(
    store: &Store,
    row: &RootRow,
    options: CommitOptions,
    progress: &Progress,
) -> Result<CommitReport, CommitError> {
    finish_earlier(store, row)?;
    refuse_live(store, row)?;
    let report = |outcome, applied, seal_error| CommitReport {
        id: row.id,
        name: row.name.clone(),
        path: row.path.clone(),
        outcome,
        applied,
        seal_error,
    };
    let applied = if has_changes(store, row)? {
        apply(store, row, options, progress)?
    } else if commit::past(&journal_of(store, row, row.generation))? == Past::Done {
        // Committed before, but not sealed, and the upper was emptied since.
        Applied::default()
    } else {
        return Ok(report(CommitOutcome::Unchanged, Applied::default(), None));
    };
    if !applied.is_complete() {
        return Ok(report(CommitOutcome::Partial, applied, None));
    }
    if let Err(why) = seal_again(store, row, progress) {
        return Ok(report(CommitOutcome::NotSealed, applied, Some(why)));
    }
    step("commit.sealed");
    finish_earlier(store, row).map_err(|e| {
        CommitError::Below(format!(
            "all is in the raw root and sealed again; only the upper of before is still there, which the next commit removes: {e}"
        ))
    })?;
    Ok(report(CommitOutcome::Committed, applied, None))
}

/// Whether there is anything that a commit would have to do.
///
/// # Errors
/// The upper, manifest or journal can't be read.
pub fn has_changes(store: &Store, row: &RootRow) -> Result<bool, CommitError> {
    let root_dir = store.root_dir(row.id, row.generation);
    let tree = tree_of(store, row)?;
    let pristine = upper::is_pristine(&root_dir, &tree.inode(EntryId(0)).meta);
    let pristine = pristine.map_err(|e| call("look into the upper of", &root_dir, e))?;
    // An upper that was emptied after half a commit: the raw root is to be put right. After a whole one the raw root is right, and
    // what the view shows then is older.
    Ok(!pristine || commit::past(&journal_of(store, row, row.generation))? == Past::Begun)
}

/// Brings the changes of `row`'s view into its raw root; leaves the upper as it is.
pub(super) fn apply(
    store: &Store,
    row: &RootRow,
    options: CommitOptions,
    progress: &Progress,
) -> Result<Applied, CommitError> {
    progress.set_phase(Phase::Apply);
    let raw = open_raw_root(row).map_err(below)?;
    if !options.force {
        let stat = fstat(&raw).map_err(|e| call("look at", &row.path, e))?;
        refuse_writers(store, row, (stat.st_dev, stat.st_ino))?;
    }
    let result = {
        let opened = Opened::free(store, row)?;
        let scene = Scene {
            view: &opened.view,
            upper: &opened.upper,
            index: opened.index.as_ref(),
            raw: &Below::new(raw),
            sealed: &opened.tree,
            sealed_at: row.sealed_at,
            anchors: &DomainAnchors { store, domain: row.domain },
            journal: &journal_of(store, row, row.generation),
        };
        commit::apply(&scene, options.on_conflict, progress)
    };
    release_images(store).map_err(below)?;
    result
}

/// A process with a file open for writing would go on writing to what is replaced.
fn refuse_writers(store: &Store, row: &RootRow, (dev, ino): (u64, u64)) -> Result<(), CommitError> {
    let inodes = |_| {
        let tree = read_manifest(&store.root_dir(row.id, row.generation)).ok()?;
        Some(tree.inodes.iter().map(|i| i.raw.ino).collect())
    };
    let tree = Watched { path: row.path.clone(), dev, ino, whole_device: false };
    let found = users::find(&[tree], &inodes).map_err(|e| call("list", "/proc".as_ref(), e))?;
    let writers: Vec<String> = found.iter().filter(|u| u.how.writes()).map(ToString::to_string).collect();
    if writers.is_empty() {
        return Ok(());
    }
    Err(CommitError::Refused(format!(
        "the raw root {:?} is being written: {}; stop them (--force commits all the same, and what they write to replaced files is lost)",
        row.path,
        writers.join(", ")
    )))
}

fn seal_again(store: &Store, row: &RootRow, progress: &Progress) -> Result<(), String> {
    let domain = store.domains().map_err(|e| e.to_string())?.into_iter().find(|d| d.id == row.domain);
    let mut config = SealConfig::new(vec![row.path.clone()]);
    config.domain = domain.ok_or("its domain is not in the index")?.name;
    // It was sealed with `--borrow` then.
    config.copy = unsupported(store.dir()).is_some();
    config.committed = vec![row.id];
    progress.set_phase(Phase::Walk);
    let report = seal(store, &config, progress).map_err(|e| e.to_string())?;
    match report.errors.first() {
        Some(failure) => Err(failure.error.clone()),
        None => Ok(()),
    }
}

/// Removes uppers of earlier generations that were committed in whole.
pub(super) fn finish_earlier(store: &Store, row: &RootRow) -> Result<(), CommitError> {
    let current = store.root(row.id).map_err(below)?.generation;
    for generation in store.generations_of(row.id).map_err(below)? {
        if generation >= current || commit::past(&journal_of(store, row, generation))? != Past::Done {
            continue;
        }
        let root_dir = store.root_dir(row.id, generation);
        let tree = read_manifest(&root_dir).map_err(below)?;
        upper::discard(&root_dir, &tree.inode(EntryId(0)).meta).map_err(below)?;
        step("commit.emptied");
        store.remove_generation(row.id, generation).map_err(below)?;
    }
    Ok(())
}
