//! A turnstile before kernel code that sleeps on one lock: whoever would only queue there waits a moment here instead.
//!
//! XFS looks up the owners of an extent under the lock of its allocation group's header, for about a microsecond. Two
//! threads that map files of one group go to sleep and wake each other there, which costs more than the map itself
//! (a fifth of all processor time of a scan with two threads on Linux 6.18: `finish_task_switch` and `wake_up_q` below
//! `xfs_read_agf`, by `perf record -g`). What it deliberately is not: a lock. Nobody waits longer than [`PATIENCE`]
//! turns, so a holder that was preempted delays nobody, and nothing depends on being alone.

use std::sync::atomic::{AtomicBool, Ordering};

/// Turns of the waiting loop, a few microseconds: longer than a map takes, shorter than going to sleep and waking.
const PATIENCE: u32 = 200;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Turnstile {
    taken: AtomicBool,
}

/// Lets the next one through when dropped.
pub(crate) struct Turn<'a> {
    of: Option<&'a Turnstile>,
}

impl Turnstile {
    /// Waits until the one before is through, but not for long.
    pub fn pass(&self) -> Turn<'_> {
        for _ in 0..PATIENCE {
            if !self.taken.load(Ordering::Relaxed) && !self.taken.swap(true, Ordering::Acquire) {
                return Turn { of: Some(self) };
            }
            std::hint::spin_loop();
        }
        Turn { of: None }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(turnstile) = self.of {
            turnstile.taken.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_passes_others_do_not_wait_for_ever_and_the_next_passes_again() {
        let turnstile = Turnstile::default();
        let first = turnstile.pass();
        assert!(first.of.is_some());
        let impatient = turnstile.pass();
        assert!(impatient.of.is_none());
        drop(impatient);
        assert!(turnstile.pass().of.is_none(), "who went round does not let others in");
        drop(first);
        assert!(turnstile.pass().of.is_some());
    }
}
