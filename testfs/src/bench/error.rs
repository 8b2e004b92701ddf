//! Why a benchmark could not be run, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::memcg::MemcgError;

use crate::farm::FarmError;
use crate::rig::RigError;

/// A benchmark failed. What it had mounted, started and made was removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The loopback file system could not be had.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// The roots could not be made.
    #[error(transparent)]
    Farm(#[from] FarmError),
    /// Memory groups.
    #[error(transparent)]
    Memcg(#[from] MemcgError),
    /// A system call failed.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The root of real programs could not be made.
    #[error(
        "mmdebstrap failed ({status}): {output}; apt's sources of this host are used, or give --image TAR"
    )]
    Debian {
        /// How it ended.
        status: String,
        /// The end of what it said.
        output: String,
    },
    /// A program in a container ended or said nothing in time.
    #[error("{program} in {} {why}; it said: {log}", root.display())]
    Container {
        /// Which program.
        program: &'static str,
        /// The container's root.
        root: PathBuf,
        /// What went wrong.
        why: String,
        /// The end of its standard error.
        log: String,
    },
    /// Sealing the roots or mounting their views.
    #[error("sealed views: {0}")]
    Views(String),
    /// What was asked for is out of range.
    #[error("{what}: {why}")]
    Spec {
        /// The argument.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The chart could not be drawn.
    #[error("can't draw the chart: {0}")]
    Chart(String),
    /// The caller asked to stop.
    #[error("interrupted; what had been made was removed")]
    Cancelled,
}

impl BenchError {
    pub(super) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> BenchError {
        BenchError::Io { what, path: path.to_owned(), source: source.into() }
    }
}
