//! Counters with KSM's names and meanings, kept per domain and backend; totals are sums.
//!
//! Invariants: every published page count is exclusive of every other (K-010, K-017), and at rest `sites
//! = shared + sharing + unshared + zero + volatile` with no term below zero (K-028; `zero` is ours, see
//! [`Gauges::zero_pages`]). Gauges move only where a site enters or leaves a state (K-011): in `record`,
//! nowhere else. Every decision of the engine has a counter of its own ([`Decision`]). What this module
//! deliberately does not do: derive anything from an allocator (K-027).

use std::collections::BTreeMap;
use std::ops::AddAssign;

use crate::domain::{Backend, Owner};
use crate::units::{DomainId, PageCount};

/// Pages in each state now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Pages the engine keeps a record of (K-021).
    pub sites: u64,
    /// Distinct shared pages in use (K-001). Where sites of several backends show one page it is booked
    /// to the first of them in the order of [`Backend::ALL`], so that sums over backends count it once.
    pub pages_shared: u64,
    /// Further sites that show them (K-002): pages saved.
    pub pages_sharing: u64,
    /// Candidates that wait for a mate (K-020).
    pub pages_unshared: u64,
    /// Sites that show the zero page (`use_zero_pages`): pages saved as well. KSM's `ksm_zero_pages`; not
    /// in K-028's sum, where the kernel has no record of such a page.
    pub zero_pages: u64,
    /// Book-keeping's own count of sites in none of these states; K-028 compares it with
    /// [`Gauges::pages_volatile`].
    pub(crate) rest: u64,
}

impl Gauges {
    /// Pages that change too fast, plus every other condition that keeps a site out of both indexes
    /// (K-022, K-024): computed, never maintained (K-023); negatives show as 0.
    #[must_use]
    pub fn pages_volatile(&self) -> u64 {
        u64::try_from(self.volatile_signed()).unwrap_or(0)
    }

    fn volatile_signed(&self) -> i128 {
        let known = [self.pages_shared, self.pages_sharing, self.pages_unshared, self.zero_pages];
        i128::from(self.sites) - known.iter().map(|n| i128::from(*n)).sum::<i128>()
    }

    /// Pages that are not in memory because others are shown in their place (K-017).
    #[must_use]
    pub fn saved_pages(&self) -> PageCount {
        PageCount(self.pages_sharing + self.zero_pages)
    }

    /// All gauges are at zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Gauges::default()
    }
}

impl AddAssign for Gauges {
    fn add_assign(&mut self, o: Self) {
        self.sites += o.sites;
        self.pages_shared += o.pages_shared;
        self.pages_sharing += o.pages_sharing;
        self.pages_unshared += o.pages_unshared;
        self.zero_pages += o.zero_pages;
        self.rest += o.rest;
    }
}

macro_rules! decisions {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What the engine decided about a page. Counted in pages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Decision { $($(#[$doc])* $name,)* }

        impl Decision {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Decision] = &[$(Decision::$name,)*];

            /// The counter's name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Decision::$name => $text,)* }
            }
        }
    };
}

decisions! {
    /// Merged, proved by extents (W-034).
    MergedPhysical = "merged_physical",
    /// Merged, proved by comparing bytes.
    MergedBytes = "merged_bytes",
    /// Merged, proved by the kernel.
    MergedKernel = "merged_kernel",
    /// Now shows the zero page.
    MergedZero = "merged_zero",
    /// A forked copy of a known shared page was recorded (K-016).
    Forked = "forked",
    /// Entered the unstable index.
    Waiting = "waiting",
    /// Checksum differs from the last pass (K-059).
    ChecksumChanged = "checksum_changed",
    /// Passed over by smart skip.
    SkippedSmart = "skipped_smart",
    /// Place on disk not decided by extents.
    Undecided = "undecided",
    /// A hole or unwritten: nothing to merge by place.
    Hole = "hole",
    /// A page never to be touched (K-075).
    Unsuitable = "unsuitable",
    /// Run shorter than `min_run_pages`.
    ShortRun = "short_run",
    /// A pin (P-001).
    Pinned = "pinned",
    /// A writer, dirty, locked.
    Busy = "busy",
    /// Vanished under our hands.
    Gone = "gone",
    /// Can't be protected.
    Denied = "denied",
    /// Changed between protect and share (P-004).
    Raced = "raced",
    /// Bytes differ: the index was stale, or a digest collided.
    Differs = "differs",
    /// The extent map read after protection says otherwise: the hint was stale (design 5.5).
    HintStale = "hint_stale",
    /// Dirty or writeback pages after protection (design 5.6).
    DirtyCache = "dirty_cache",
    /// `max_kernel_pages` reached (K-005).
    LimitReached = "limit_reached",
    /// A shared page has `max_page_sharing` sites; another copy is made.
    ChainFull = "chain_full",
    /// Of another domain than the shared page it shows: broken.
    ForeignDomain = "foreign_domain",
    /// No memory to make a shared page or to replace a page.
    NoMemory = "no_memory",
    /// First merge of a pair taken back since the second failed (K-056).
    TakenBack = "taken_back",
    /// The last sharer got its own page back (K-030).
    LastSharer = "last_sharer",
    /// Sharing ended without us: a store was copied by the kernel.
    CowBroken = "cow_broken",
    /// A shared page in no index was broken (K-065, K-076).
    StrayBroken = "stray_broken",
    /// Broken by request: a writer, unregistration, `run`=2.
    Broken = "broken",
    /// Break met a truncation race or a page no longer shared: success (K-062, K-063).
    BreakVanished = "break_vanished",
    /// Break failed for want of memory and will be tried again (K-064, K-065).
    BreakNoMemory = "break_no_memory",
    /// Record dropped since the page was truncated, unregistered or absent.
    Dropped = "dropped",
    /// Record dropped with its exiting mapping (K-098).
    Exited = "exited",
    /// The shared page moved and its records followed.
    Relocated = "relocated",
    /// The host could not carry out an operation.
    HostError = "host_error",
}

/// One counter for each [`Decision`], in pages, since start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decisions(Vec<u64>);

impl Default for Decisions {
    fn default() -> Self {
        Decisions(vec![0; Decision::ALL.len()])
    }
}

impl Decisions {
    /// Pages for which this was decided.
    #[must_use]
    pub fn get(&self, decision: Decision) -> u64 {
        self.0[decision as usize]
    }

    /// Name and value of all counters, in fixed order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Decision::ALL.iter().map(|d| (d.name(), self.get(*d)))
    }
}

/// All figures of one account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// States now.
    pub gauges: Gauges,
    /// Decisions so far.
    pub decisions: Decisions,
}

/// The counters of an engine.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    accounts: BTreeMap<Owner, Account>,
    /// Completed passes over everything registered (K-025); back to 0 when `run`=2 succeeded (K-071).
    pub full_scans: u64,
}

impl Counters {
    /// The account of one domain and backend; all zero where nothing happened.
    #[must_use]
    pub fn account(&self, owner: Owner) -> Account {
        self.accounts.get(&owner).cloned().unwrap_or_default()
    }

    /// Sum over the backends of a domain.
    #[must_use]
    pub fn of_domain(&self, domain: DomainId) -> Account {
        self.sum(|o| o.domain == domain)
    }

    /// Sum over the domains of a backend.
    #[must_use]
    pub fn of_backend(&self, backend: Backend) -> Account {
        self.sum(|o| o.backend == backend)
    }

    /// Sum over everything.
    #[must_use]
    pub fn total(&self) -> Account {
        self.sum(|_| true)
    }

    /// Every account there is, in order.
    pub fn accounts(&self) -> impl Iterator<Item = (Owner, &Account)> + '_ {
        self.accounts.iter().map(|(o, a)| (*o, a))
    }

    fn sum(&self, wanted: impl Fn(&Owner) -> bool) -> Account {
        let mut total = Account::default();
        for (_, account) in self.accounts.iter().filter(|(o, _)| wanted(o)) {
            total.gauges += account.gauges;
            total.decisions.0.iter_mut().zip(&account.decisions.0).for_each(|(t, n)| *t += n);
        }
        total
    }

    pub(crate) fn gauges(&mut self, owner: Owner) -> &mut Gauges {
        &mut self.accounts.entry(owner).or_default().gauges
    }

    pub(crate) fn count(&mut self, owner: Owner, decision: Decision, pages: PageCount) {
        self.accounts.entry(owner).or_default().decisions.0[decision as usize] += pages.0;
    }

    /// K-028, in release too.
    ///
    /// # Panics
    /// When the counters don't add up: the book-keeping is broken and merging must stop.
    pub(crate) fn assert_identity(&self) {
        for (owner, Account { gauges, .. }) in &self.accounts {
            let volatile = gauges.volatile_signed();
            assert_eq!(volatile, i128::from(gauges.rest), "K-028 broken for {owner:?}: {gauges:?}");
        }
    }
}

/// Adds `by` to a gauge.
///
/// # Panics
/// When it would fall below zero (K-028).
pub(crate) fn shift(gauge: &mut u64, by: i64) {
    *gauge = gauge.checked_add_signed(by).expect("a gauge fell below zero (K-028)");
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Owner = Owner { domain: DomainId(0), backend: Backend::Remap };
    const B: Owner = Owner { domain: DomainId(1), backend: Backend::Arena };

    #[test]
    fn volatile_is_what_is_left_and_never_negative_k022() {
        let mut g =
            Gauges { sites: 10, pages_shared: 2, pages_sharing: 3, pages_unshared: 1, ..Gauges::default() };
        assert_eq!(g.pages_volatile(), 4);
        g.sites = 1;
        assert_eq!(g.pages_volatile(), 0);
    }

    #[test]
    fn sums_are_over_domains_and_backends_q32() {
        let mut counters = Counters::default();
        counters.gauges(A).sites = 5;
        counters.gauges(B).sites = 7;
        counters.count(B, Decision::Raced, PageCount(2));
        assert_eq!(counters.total().gauges.sites, 12);
        assert_eq!(counters.of_domain(DomainId(1)).gauges.sites, 7);
        assert_eq!(counters.of_backend(Backend::Remap).gauges.sites, 5);
        assert_eq!(counters.total().decisions.get(Decision::Raced), 2);
        assert_eq!(counters.account(A).decisions.get(Decision::Raced), 0);
    }

    #[test]
    #[should_panic(expected = "K-028 broken")]
    fn a_wrong_sum_stops_the_engine_k028() {
        let mut counters = Counters::default();
        counters.gauges(A).sites = 1;
        counters.assert_identity();
    }

    #[test]
    fn every_decision_has_a_name_of_its_own() {
        let mut names: Vec<_> = Decision::ALL.iter().map(|d| d.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Decision::ALL.len());
    }
}
