//! A long task that somebody watches and may end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Progress of a `gc` or `verify`; units are things looked at. The second figure may grow.
#[derive(Debug, Default)]
pub struct Task {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Task {
    /// Asks the task to end soon; its report is marked as interrupted.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Things done, and to do.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    pub(super) fn expect(&self, more: u64) {
        self.total.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn did(&self, things: u64) {
        self.done.fetch_add(things, Ordering::Relaxed);
    }
}
