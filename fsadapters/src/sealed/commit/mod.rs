//! Commit: what a view changed goes back into its raw root.
//!
//! ```text
//! state   what the view shows          plan    state against seal, by path
//! judge   what the raw root has now    place   temporaries, durable, swapped in
//! journal what earlier tries did       run     the steps in their order
//! ```
//!
//! Invariant: the upper is never touched here, so a commit that fails or is killed at any point has lost nothing and is simply run
//! again. A name of the raw root that is neither as sealed nor as wanted nor ours is left alone and reported. What it
//! deliberately does not do: merge. Two changes of one path are for people.

use std::path::{Path, PathBuf};

use rustc_hash::FxHashSet;

use crate::scan::Progress;
use crate::sealed::tree::Tree;

pub mod bytes;
pub mod error;
mod journal;
mod judge;
pub(super) mod place;
mod plan;
mod run;
pub mod state;

pub use crate::sealed::inode::Below;
pub use bytes::Anchors;
pub use error::CommitError;
use error::at_path;

/// What is to happen where view and raw root both changed a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// Nothing: both stay, the report names it, and the upper stays for a later try.
    #[default]
    Keep,
    /// The view's state replaces the raw root's.
    TakeView,
    /// The raw root's state stays, the view's is given up.
    TakeRaw,
}

/// A path that view and raw root both changed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Conflict {
    /// Below the root.
    pub path: PathBuf,
    /// In words.
    pub why: &'static str,
}

/// What a commit did. Counts are of names, unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Applied {
    /// Files, links and nodes that replaced what was there.
    pub replaced: u64,
    /// New ones (directories included).
    pub created: u64,
    /// Names that went.
    pub removed: u64,
    /// Directories made.
    pub dirs_made: u64,
    /// Directories whose owner, permissions or attributes changed.
    pub dirs_changed: u64,
    /// Names that were as wanted already.
    pub already: u64,
    /// Conflicts decided for the raw root.
    pub raw_kept: u64,
    /// Bytes that the new files share with upper or anchors.
    pub shared_bytes: u64,
    /// Bytes copied because they could not be shared.
    pub copied_bytes: u64,
    /// Paths left alone because both sides changed them.
    pub conflicts: Vec<Conflict>,
    /// Paths that could not be written, and why.
    pub errors: Vec<(PathBuf, String)>,
    /// What is different from the view without being wrong.
    pub notes: Vec<(PathBuf, String)>,
}

impl Applied {
    /// Whether the raw root shows now what the view shows.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.conflicts.is_empty() && self.errors.is_empty()
    }
}

/// What a commit works on.
pub struct Scene<'a> {
    /// The root of the view, mounted detached and read-only: this also proves that nobody else has it mounted.
    pub view: &'a Below,
    /// Its upper directory.
    pub upper: &'a Below,
    /// The index in its work directory, if there is one.
    pub index: Option<&'a Below>,
    /// The raw root.
    pub raw: &'a Below,
    /// The root as it was sealed.
    pub sealed: &'a Tree,
    /// When that sealing began, seconds since 1970 ([`crate::store::RootRow::sealed_at`]).
    pub sealed_at: i64,
    /// Where sealed bytes are.
    pub anchors: &'a dyn Anchors,
    /// Where this commit keeps its journal.
    pub journal: &'a Path,
}

/// Brings a view's changes into the raw root. On success everything is on disk; the upper is as before.
///
/// # Errors
/// [`CommitError`] when it ended early; conflicts and paths that could not be written are in the report instead.
pub fn apply(
    scene: &Scene<'_>,
    on_conflict: OnConflict,
    progress: &Progress,
) -> Result<Applied, CommitError> {
    let children = state::Children::of(scene.sealed);
    let state = state::read(scene.view, scene.upper, scene.index, &children, (false, progress))?;
    let path = scene.journal;
    let io = |what, e| CommitError::Io { what, path: path.to_owned(), source: e };
    let mut journal = journal::Journal::open(path).map_err(|e| io("open", e))?;
    let mut done = Applied::default();
    for left in place::sweep(scene.raw, &journal).map_err(|e| at_path("clear", b"", e))? {
        let why = "left by an interrupted commit, and not what it wrote: look at it and move it away";
        done.conflicts.push(Conflict { path: state::shown_path(&left), why });
    }
    let plan = plan::Plan::of(&state, scene.sealed, &children, &journal);
    let run = new_run();
    journal.append(vec![plan.record(run, &state, scene.sealed)]).map_err(|e| io("write", e))?;
    crate::store::step("commit.begun");
    let sources = bytes::Sources { upper: scene.upper, index: scene.index, anchors: scene.anchors };
    let mut run_state = run::Run {
        raw: scene.raw,
        tree: scene.sealed,
        began_at: scene.sealed_at,
        links: &children.links,
        state: &state,
        plan: &plan,
        sources: &sources,
        journal: &mut journal,
        on_conflict,
        progress,
        done,
        blocked: FxHashSet::default(),
    };
    run_state.run(run)?;
    let mut done = run_state.done;
    for &entry in &state.locked {
        let text = "immutable or append-only in the view (chattr), and not in the raw root".to_owned();
        done.notes.push((state::shown_path(&state.path(entry)), text));
    }
    // A name that had to wait for a directory is looked at twice with all names of its inode.
    done.conflicts.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    done.conflicts.dedup();
    if done.is_complete() {
        journal.append(vec![journal::Record::Done]).map_err(|e| io("write", e))?;
        crate::store::step("commit.done");
    }
    Ok(done)
}

/// What earlier commits of an upper came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// None was begun.
    None,
    /// One was begun and did not end: the raw root holds a part.
    Begun,
    /// All that the upper held then is in the raw root.
    Done,
}

/// Asks the journal at `path`.
///
/// # Errors
/// It can't be read, or is none.
pub fn past(path: &Path) -> Result<Past, CommitError> {
    if !path.exists() {
        return Ok(Past::None);
    }
    let journal = journal::Journal::open(path).map_err(|e| CommitError::Io {
        what: "open",
        path: path.to_owned(),
        source: e,
    })?;
    Ok(match (journal.is_empty(), journal.is_done) {
        (true, _) => Past::None,
        (_, true) => Past::Done,
        _ => Past::Begun,
    })
}

/// A number that no other try has.
fn new_run() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}
