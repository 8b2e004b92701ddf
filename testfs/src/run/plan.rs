//! What may happen in one run and how often: drawn from its seed (swarm testing).
//!
//! Each seed switches a random subset of operations and faults off altogether. A run that does everything a little
//! never does anything often enough; runs that leave things out reach corners that the average hides.

use pagefold_engine::policy::Knobs;
use pagefold_engine::units::PageSize;

use crate::sim::{Flavour, Rng};

/// Operations of users and of the kernel itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// A store through a mapping.
    Store,
    /// A page fault.
    Touch,
    /// A device gets hold of a page.
    Pin,
    /// It writes and lets go.
    Dma,
    /// A mapping exits.
    Exit,
    /// A write to a file.
    Write,
    /// A truncation.
    Cut,
    /// `open(O_TRUNC)`.
    SlipCut,
    /// Writeback of a file, whole or begun.
    Writeback,
    /// Reclaim of a file's clean pages.
    Evict,
    /// All physical addresses change.
    Balance,
    /// A file becomes a reflink of another.
    Clone,
}

impl Op {
    const ALL: [(Op, u64); 12] = [
        (Op::Store, 30),
        (Op::Touch, 25),
        (Op::Pin, 6),
        (Op::Dma, 6),
        (Op::Exit, 1),
        (Op::Write, 14),
        (Op::Cut, 3),
        (Op::SlipCut, 2),
        (Op::Writeback, 8),
        (Op::Evict, 3),
        (Op::Balance, 3),
        (Op::Clone, 6),
    ];
}

/// One run's plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The file system.
    pub flavour: Flavour,
    /// Page size.
    pub page: PageSize,
    /// Actions of the run.
    pub actions: u64,
    /// Operations that happen, with their weights.
    pub ops: Vec<(Op, u64)>,
    /// Of 100 calls of the engine, how many are intruded upon.
    pub intrusion: u64,
    /// Host errors in 1,000 calls.
    pub errors_per_mille: u64,
    /// Of 100 allocations, how many fail.
    pub no_memory: u64,
    /// Of 100 pages to protect, how many are busy for a reason of their own.
    pub busy: u64,
    /// Of 100 looks at a map, how many are answered from memory.
    pub stale_hints: u64,
    /// Digests have two bits.
    pub weak_digests: bool,
    /// Of 100 mappings, how many are anonymous.
    pub anonymous: u64,
    /// Of 100 file mappings, how many are merged by place.
    pub by_place: u64,
    /// Memory nodes.
    pub nodes: u64,
    /// Trust domains.
    pub domains: u16,
    /// The engine crashes now and then.
    pub crashes: bool,
    /// The engine's knobs.
    pub knobs: Knobs,
}

impl Plan {
    /// Draws the plan of a run.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Plan {
        let small = PageSize::new(1024).expect("a power of two");
        // A page as small as a block makes runs fast; 4 KiB pages over 1 KiB blocks make them awkward.
        let grounds = [
            (Flavour::XfsSmallBlocks, small),
            (Flavour::XfsSmallBlocks, small),
            (Flavour::XfsSmallBlocks, PageSize::KIB4),
            (Flavour::Xfs, PageSize::KIB4),
            (Flavour::Btrfs, PageSize::KIB4),
            (Flavour::BtrfsZstd, PageSize::KIB4),
            (Flavour::XfsRealtime, PageSize::KIB4),
            (Flavour::Ext4, PageSize::KIB4),
            (Flavour::Tmpfs, PageSize::KIB4),
        ];
        let (flavour, page) = *rng.pick(&grounds).expect("not empty");
        let mut ops: Vec<(Op, u64)> = Vec::new();
        for (op, weight) in Op::ALL {
            // Without faults and stores there is nothing to look at.
            if matches!(op, Op::Touch | Op::Store) || rng.percent(65) {
                ops.push((op, weight));
            }
        }
        let sometimes = |rng: &mut Rng, of_hundred: u64, most: u64| {
            if rng.percent(of_hundred) { 1 + rng.below(most) } else { 0 }
        };
        Plan {
            flavour,
            page,
            actions: 60 + rng.below(120),
            ops,
            intrusion: sometimes(rng, 70, 25),
            errors_per_mille: sometimes(rng, 30, 60),
            no_memory: sometimes(rng, 30, 30),
            busy: sometimes(rng, 30, 20),
            stale_hints: sometimes(rng, 50, 90),
            weak_digests: rng.percent(25),
            anonymous: *rng.pick(&[0, 20, 40, 80]).expect("not empty"),
            by_place: *rng.pick(&[20, 60, 100]).expect("not empty"),
            nodes: 1 + sometimes(rng, 25, 2),
            domains: 1 + sometimes(rng, 40, 2) as u16,
            crashes: rng.percent(15),
            knobs: Plan::knobs(rng),
        }
    }

    /// Bugs in the proof by place show only where places prove something: reflinked files that are written to.
    pub(crate) fn favour_places(&mut self) {
        self.page = PageSize::new(1024).expect("a power of two");
        self.flavour = Flavour::XfsSmallBlocks;
        (self.by_place, self.anonymous, self.domains, self.nodes) = (100, 0, 1, 1);
        self.stale_hints = self.stale_hints.max(60);
        self.ops =
            vec![(Op::Write, 30), (Op::Touch, 25), (Op::Writeback, 8), (Op::Clone, 20), (Op::Store, 2)];
    }

    /// Draws knobs.
    #[must_use]
    pub fn knobs(rng: &mut Rng) -> Knobs {
        Knobs {
            pages_to_scan: 1 + rng.below(80),
            sleep_millisecs: 20,
            max_kernel_pages: if rng.percent(20) { 1 + rng.below(12) } else { 0 },
            max_page_sharing: if rng.percent(30) { 2 + rng.below(4) as u32 } else { 256 },
            merge_across_nodes: rng.percent(70),
            use_zero_pages: rng.percent(40),
            smart_scan: rng.percent(40),
            digest_shared: rng.percent(50),
            min_run_pages: if rng.percent(20) { 2 } else { 1 },
        }
    }

    /// One of the operations by weight.
    pub(crate) fn some_op(&self, rng: &mut Rng) -> Option<Op> {
        let total: u64 = self.ops.iter().map(|(_, w)| w).sum();
        let mut at = rng.below(total);
        for (op, weight) in &self.ops {
            if at < *weight {
                return Some(*op);
            }
            at -= weight;
        }
        None
    }
}
