//! What `commit` and `unseal` have in common: the roots they are given, one after the other, each with a result of its own.
//!
//! What it deliberately does not hold: what is done with a root, and what is told of it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::commit::CommitError;
use pagefold_fsadapters::store::{RootRow, Store};

use crate::exit::Exit;
use crate::{human, interrupt, progress_bar};

/// How much of one root was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// All.
    All,
    /// A part.
    Part,
    /// Nothing.
    Not,
}

/// What became of several roots, in their order.
#[derive(Debug)]
pub struct PerRoot<R>(Vec<(RootRow, Result<R, CommitError>)>);

impl<R: Send> PerRoot<R> {
    /// Does `work` with each root; Ctrl-C cancels the progress that it is given.
    pub fn of(
        rows: Vec<RootRow>,
        work: impl Fn(&RootRow, &Progress) -> Result<R, CommitError> + Send + Sync,
    ) -> PerRoot<R> {
        PerRoot(cancellable(|progress| {
            rows.into_iter()
                .map(|row| {
                    let result = work(&row, progress);
                    (row, result)
                })
                .collect()
        }))
    }
}

impl<R> PerRoot<R> {
    /// No root.
    pub fn none() -> PerRoot<R> {
        PerRoot(Vec::new())
    }

    /// The exit code, when `whole` tells how much of a root its report says is done.
    pub fn exit(&self, whole: impl Fn(&R) -> Whole) -> Exit {
        let all: Vec<Whole> = self.0.iter().map(|(_, r)| r.as_ref().map_or(Whole::Not, &whole)).collect();
        match all.iter().all(|w| *w == Whole::All) {
            true => Exit::Done,
            false if all.iter().all(|w| *w == Whole::Not) => Exit::Error,
            false => Exit::Partial,
        }
    }

    /// `{ schema, roots, errors }`.
    pub fn json(&self, schema: &str, report: impl Fn(&R) -> serde_json::Value) -> serde_json::Value {
        let roots: Vec<serde_json::Value> =
            self.0.iter().filter_map(|(_, r)| r.as_ref().ok()).map(report).collect();
        let failed = self.0.iter().filter_map(|(row, r)| Some((row.name.as_str(), r.as_ref().err()?)));
        serde_json::json!({ "schema": schema, "roots": roots, "errors": errors_json(failed) })
    }

    /// Tells of each root in a table's place; errors go to stderr.
    pub fn tell(&self, mut report: impl FnMut(&RootRow, &R) -> std::io::Result<()>) -> std::io::Result<()> {
        for (row, result) in &self.0 {
            match result {
                Ok(done) => report(row, done)?,
                Err(error) => eprintln!("pagefold: {}: {error}", row.name),
            }
        }
        Ok(())
    }
}

/// A report's `errors`: of which root, and what.
pub fn errors_json<'a, E: std::fmt::Display + 'a>(
    errors: impl Iterator<Item = (&'a str, &'a E)>,
) -> Vec<serde_json::Value> {
    errors.map(|(name, error)| serde_json::json!({ "name": name, "error": error.to_string() })).collect()
}

/// The roots that are named, or all of the store.
pub fn rows_of(store: &Store, roots: &[PathBuf], all: bool) -> anyhow::Result<Vec<RootRow>> {
    if all {
        return Ok(store.roots()?);
    }
    roots.iter().map(|root| store.find_root(root).with_context(|| human::path(root).to_string())).collect()
}

/// Where the store is: near the first root if that is a path, be it one that is gone.
pub fn near(roots: &[PathBuf]) -> Option<&Path> {
    roots.first()?.ancestors().find(|path| path.exists())
}

/// Runs `work` with a progress that the terminal shows and Ctrl-C cancels.
pub fn cancellable<T: Send>(work: impl FnOnce(&Progress) -> T + Send) -> T {
    let progress = Progress::default();
    std::thread::scope(|scope| {
        let progress = &progress;
        let _interrupt = interrupt::on_interrupt(scope, move || progress.cancel());
        let _shown = progress_bar::show(scope, progress);
        work(progress)
    })
}
