//! Counters that a running scan (or seal, commit, export) moves and anybody may read: for a progress bar, never for the report.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// What a scan is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Walking roots and reading extent maps.
    Walk = 0,
    /// Reading and hashing (`--content`).
    Content = 1,
    /// Computing figures.
    Figures = 2,
    /// Writing what was found to differ (commit, export): see [`Progress::steps`].
    Apply = 3,
}

/// Shared state of a running scan.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    pub(crate) files: AtomicU64,
    pub(crate) dirs_found: AtomicU64,
    pub(crate) dirs_done: AtomicU64,
    pub(crate) pages_total: AtomicU64,
    pub(crate) pages_done: AtomicU64,
    steps_total: AtomicU64,
    steps_done: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Asks the scan to stop soon; its report is then marked partial.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The flag behind [`Self::is_cancelled`], for code that takes one.
    #[must_use]
    pub fn cancel_flag(&self) -> &AtomicBool {
        &self.cancelled
    }

    /// What is being done.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Walk,
            1 => Phase::Content,
            3 => Phase::Apply,
            _ => Phase::Figures,
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Files looked at so far.
    #[must_use]
    pub fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// Directories done, and found so far; the second grows while the walk goes on.
    #[must_use]
    pub fn dirs(&self) -> (u64, u64) {
        (self.dirs_done.load(Ordering::Relaxed), self.dirs_found.load(Ordering::Relaxed))
    }

    /// Pages read and hashed, and to read.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        (self.pages_done.load(Ordering::Relaxed), self.pages_total.load(Ordering::Relaxed))
    }

    /// Names written, and to write as far as is known; the second grows with each root.
    #[must_use]
    pub fn steps(&self) -> (u64, u64) {
        (self.steps_done.load(Ordering::Relaxed), self.steps_total.load(Ordering::Relaxed))
    }

    pub(crate) fn expect_steps(&self, more: usize) {
        Progress::add(&self.steps_total, more as u64);
    }

    pub(crate) fn did_step(&self) {
        Progress::add(&self.steps_done, 1);
    }

    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
