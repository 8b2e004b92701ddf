//! `verify`: is everything that the index names there, whole and closed, and does the cache hold what the disk holds?
//!
//! Invariant: read only. Every finding names a file and says what is wrong with it; what could not be looked at is a finding too. What it
//! deliberately does not do: repair. An anchor's bytes have no digest of their own (it is a clone: hashing every file would cost what
//! sharing saves), so its disk content is the file system's to check; compared is the cache with the disk.

mod anchors;
mod cached;
mod files;

use std::path::PathBuf;

use super::error::StoreError;
use super::open::Store;
use super::task::Task;

/// What is wrong with something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The index names it and it is not there.
    Missing,
    /// Its bytes, size or kind are not what the index says.
    Damaged,
    /// It could be changed or reached: mode, owner, links, the immutable flag, attributes.
    Open,
    /// Rows contradict each other.
    Index,
    /// Nothing of ours has this name.
    Unexpected,
    /// Cached pages differ from the disk.
    CacheDiffers,
    /// It could not be looked at.
    Unreadable,
}

impl ProblemKind {
    /// One word, as in reports.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            ProblemKind::Missing => "missing",
            ProblemKind::Damaged => "damaged",
            ProblemKind::Open => "open",
            ProblemKind::Index => "index",
            ProblemKind::Unexpected => "unexpected",
            ProblemKind::CacheDiffers => "cache-differs",
            ProblemKind::Unreadable => "unreadable",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// On what.
    pub path: PathBuf,
    /// What kind.
    pub kind: ProblemKind,
    /// In words.
    pub detail: String,
    /// Where in the file, in bytes, if anywhere.
    pub offset: Option<u64>,
}

/// Findings that are kept; beyond, they are only counted.
pub const PROBLEMS_MAX: usize = 10_000;

/// What [`Store::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Images compared with their digests.
    pub images: u64,
    /// Anchors looked at.
    pub anchors: u64,
    /// Roots (generations) looked at.
    pub roots: u64,
    /// Cached bytes of anchors compared with the disk.
    pub compared_bytes: u64,
    /// Cached bytes that the file system can't read past its cache (compressed or inline on btrfs): not compared.
    pub not_compared_bytes: u64,
    /// What is wrong, first found first.
    pub problems: Vec<Problem>,
    /// All findings, kept or not.
    pub problem_count: u64,
    /// Ended before all was looked at.
    pub interrupted: bool,
}

impl VerifyReport {
    pub(super) fn problem(&mut self, path: PathBuf, kind: ProblemKind, detail: impl Into<String>) {
        self.problem_at(path, kind, detail, None);
    }

    pub(super) fn problem_at(
        &mut self,
        path: PathBuf,
        kind: ProblemKind,
        detail: impl Into<String>,
        offset: Option<u64>,
    ) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem { path, kind, detail: detail.into(), offset });
        }
    }
}

impl Store {
    /// Compares everything with the index, and the cached pages of anchors with the disk.
    ///
    /// # Errors
    /// The index can't be read; all else is a finding.
    pub fn verify(&self, task: &Task) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        files::images(self, task, &mut report)?;
        files::roots(self, task, &mut report)?;
        anchors::anchors(self, task, &mut report)?;
        anchors::hints(self, task, &mut report)?;
        files::unexpected(self, task, &mut report)?;
        report.interrupted = task.is_cancelled();
        Ok(report)
    }

    /// Compares where anchors are with where `seal` found them when it made them, and adds to `report`. Apart from
    /// [`Store::verify`], for only `seal` knows what the index's hints mean.
    ///
    /// # Errors
    /// As [`Store::verify`].
    pub fn verify_places(&self, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
        anchors::places(self, task, report)?;
        report.interrupted = task.is_cancelled();
        Ok(())
    }
}
