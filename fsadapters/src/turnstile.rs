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

/// See the module. Not in one cache line with its neighbour.
#[derive(Debug, Default)]
#[repr(align(128))]
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

/// One for each allocation group, as far as they reach; a wrong guess of the group costs what having one for all costs.
#[derive(Debug)]
pub(crate) struct Turnstiles {
    group_bytes: u64,
    gates: [Turnstile; 16],
}

impl Turnstiles {
    /// For groups of that many bytes; 0: one for all.
    pub fn new(group_bytes: u64) -> Turnstiles {
        Turnstiles { group_bytes, gates: Default::default() }
    }

    /// [`Turnstile::pass`] to the group that the byte address `physical` is in.
    pub fn pass(&self, physical: u64) -> Turn<'_> {
        let group = physical.checked_div(self.group_bytes).unwrap_or(0);
        self.gates[(group % self.gates.len() as u64) as usize].pass()
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

    #[test]
    fn nobody_waits_for_who_is_in_another_group() {
        let groups = Turnstiles::new(1 << 30);
        let first = groups.pass(5);
        assert!(first.of.is_some() && groups.pass((1 << 30) - 1).of.is_none());
        assert!(groups.pass(1 << 30).of.is_some());
        let (one, all) = (Turnstiles::new(0), 3 << 40);
        let _first = one.pass(0);
        assert!(one.pass(all).of.is_none());
    }
}
