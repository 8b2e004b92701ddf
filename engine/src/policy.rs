//! When and how much: KSM's knobs under KSM's names, and the state of `run`.
//!
//! Defaults are KSM's (K-125) except where said. What this module deliberately does not do: keep time. A
//! batch ends with an [`Action`] that says until which tick the caller should sleep.

use crate::units::PageCount;

/// Milliseconds on a clock of the caller's that never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

/// `run`: what the engine may do (K-133).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Run {
    /// 0: stop, keep what is merged.
    Stop,
    /// 1: merge. The default: works at once for whoever registers (K-125).
    #[default]
    Merge,
    /// 2: stop and unmerge everything; mappings stay registered (K-009).
    Unmerge,
}

impl TryFrom<u8> for Run {
    type Error = BadRun;

    /// Values other than 0, 1 and 2 are refused (requirements 1.14).
    fn try_from(value: u8) -> Result<Self, BadRun> {
        match value {
            0 => Ok(Run::Stop),
            1 => Ok(Run::Merge),
            2 => Ok(Run::Unmerge),
            other => Err(BadRun(other)),
        }
    }
}

/// A value of `run` that means nothing (EINVAL).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("run = {0}: only 0 (stop), 1 (merge) and 2 (unmerge) mean something")]
pub struct BadRun(pub u8);

/// The knobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// Present pages a batch looks at (K-125: 200). A run that is judged by its place on disk costs 1,
    /// however long: unlike KSM's pages it is not read.
    pub pages_to_scan: u64,
    /// Pause between batches in milliseconds (K-125: 20).
    pub sleep_millisecs: u64,
    /// Shared pages that may exist; 0 = no limit (K-004..K-007). KSM's 2000 was a demo value for pages
    /// locked in memory; file pages can be dropped and read again, so the default here is 0.
    pub max_kernel_pages: u64,
    /// Sites that may show one shared page; then another copy is made (KSM's default: 256). At least 2.
    pub max_page_sharing: u32,
    /// Merge pages of different memory nodes (M-017: 1).
    pub merge_across_nodes: bool,
    /// Show the zero page instead of a shared page full of zeros. Applies to digested candidates.
    pub use_zero_pages: bool,
    /// Pass over pages that never merge, more often the longer they don't.
    pub smart_scan: bool,
    /// Also index shared pages that were merged by place under their digest, so that digested candidates
    /// (anonymous memory) find them (W-003). Costs one read of each shared page, once.
    pub digest_shared: bool,
    /// Shortest run of pages merged by place; every run costs a mapping of a file a VMA (design 7).
    pub min_run_pages: u64,
}

impl Default for Knobs {
    fn default() -> Self {
        Knobs {
            pages_to_scan: 200,
            sleep_millisecs: 20,
            max_kernel_pages: 0,
            max_page_sharing: 256,
            merge_across_nodes: true,
            use_zero_pages: false,
            smart_scan: true,
            digest_shared: false,
            min_run_pages: 1,
        }
    }
}

impl Knobs {
    /// How many new shared pages may be made while `shared` exist (K-005, K-006).
    pub(crate) fn room_for_shared(&self, shared: u64) -> PageCount {
        match self.max_kernel_pages {
            0 => PageCount(u64::MAX),
            limit => PageCount(limit.saturating_sub(shared)),
        }
    }
}

/// What the caller should do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Sleep until then, or until something wakes you, then step again (K-043).
    SleepUntil(Tick),
    /// Wait until a registration or a change of `run` says to wake (K-041, K-043): there is nothing to
    /// do, and no CPU to be used for it.
    Wait,
}

/// What is remembered of a page between passes to judge whether it is worth a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct History {
    /// Checksum of the last pass that computed one (K-059).
    pub checksum: Option<u64>,
    /// Looks after which it had not merged, saturating.
    pub age: u8,
}

impl History {
    /// Looks without a merge before any pass is left out.
    const PATIENCE: u8 = 3;

    /// Whether pass number `generation` is to be left out; ages the page if not. After [`Self::PATIENCE`]
    /// fruitless looks every second pass is left out, then three of four, then seven of eight.
    ///
    /// Which passes is the same for all pages: those whose number the page's period does not divide. The
    /// tempting alternative, KSM's own countdown for each page, lets two equal pages that fell out of
    /// step take turns in an unstable index that is emptied in between, and never meet.
    pub fn pass(&mut self, generation: u64) -> bool {
        let period = 1 << self.age.saturating_sub(Self::PATIENCE).min(3);
        if !generation.is_multiple_of(period) {
            return true;
        }
        self.age = self.age.saturating_add(1);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_zero_means_none_and_a_full_one_leaves_no_room_k005_k006() {
        let mut knobs = Knobs::default();
        assert_eq!(knobs.room_for_shared(1 << 40).0, u64::MAX);
        knobs.max_kernel_pages = 10;
        assert_eq!([9, 10, 11].map(|n| knobs.room_for_shared(n).0), [1, 0, 0]);
    }

    #[test]
    fn run_refuses_what_means_nothing() {
        assert_eq!(
            [0, 1, 2, 3].map(|n| Run::try_from(n).ok()),
            [Some(Run::Stop), Some(Run::Merge), Some(Run::Unmerge), None]
        );
    }

    #[test]
    fn smart_skip_looks_less_and_less_but_never_stops() {
        let mut history = History::default();
        let looks: Vec<_> = (1..60).filter(|g| !history.pass(*g)).collect();
        assert_eq!(looks, [1, 2, 3, 4, 6, 8, 16, 24, 32, 40, 48, 56]);
    }

    #[test]
    fn old_and_new_pages_are_looked_at_in_the_same_pass() {
        let (mut old, mut new) = (History::default(), History::default());
        for g in 1..100 {
            old.pass(g);
        }
        assert!((100..110).any(|g| {
            let (a, b) = (old.pass(g), new.pass(g));
            !a && !b
        }));
    }
}
