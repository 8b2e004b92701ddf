//! What kinds of file system the simulation can be.
//!
//! A flavour is a set of habits that matter to extent maps and caches, each with the kernel's own reason. It does not
//! imitate on-disk formats.

/// A kind of simulated file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flavour {
    /// XFS, 4 KiB blocks, reflink.
    Xfs,
    /// XFS with 1 KiB blocks: a page may lie in four places, or at an address that is no page boundary.
    XfsSmallBlocks,
    /// XFS with a real-time device: files of either class, whose addresses overlap.
    XfsRealtime,
    /// btrfs: always copy-on-write, inline small files, snapshots.
    Btrfs,
    /// btrfs with `compress=zstd`.
    BtrfsZstd,
    /// ext4-like: extents, no reflink.
    Ext4,
    /// tmpfs-like: no FIEMAP, the cache is the file.
    Tmpfs,
}

/// The habits of one flavour.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Type name as in `/proc/mounts`.
    pub kind: &'static str,
    /// Block size in bytes.
    pub block_bytes: u64,
    /// FICLONE and FICLONERANGE work.
    pub reflink: bool,
    /// FIEMAP works.
    pub fiemap: bool,
    /// Data are never overwritten where they lie.
    pub cow_always: bool,
    /// Files up to this size (bytes) are kept inside metadata; 0: never.
    pub inline_max_bytes: u64,
    /// Runs of several compressible blocks are stored compressed.
    pub compress: bool,
    /// Dirty pages over a preallocated extent show as DELALLOC (btrfs); otherwise they go on showing as UNWRITTEN.
    pub delalloc_over_unwritten: bool,
    /// A write into a hole beside a dirty shared block is reserved with that block's copy, where no map shows it: XFS's
    /// copy-on-write fork reserves aligned windows of 32 blocks. Seen on Linux 6.18 by the conformance cases.
    pub hides_delalloc_beside_cow: bool,
    /// Preallocated extents are shared by a reflink; otherwise the copy has a hole there.
    pub reflinks_unwritten: bool,
    /// Subvolumes and snapshots.
    pub snapshots: bool,
    /// A second device class exists.
    pub realtime: bool,
}

impl Flavour {
    /// Every flavour.
    pub const ALL: [Flavour; 7] = [
        Flavour::Xfs,
        Flavour::XfsSmallBlocks,
        Flavour::XfsRealtime,
        Flavour::Btrfs,
        Flavour::BtrfsZstd,
        Flavour::Ext4,
        Flavour::Tmpfs,
    ];

    /// Its habits.
    #[must_use]
    pub const fn habits(self) -> Habits {
        let xfs = Habits {
            kind: "xfs",
            block_bytes: 4096,
            reflink: true,
            fiemap: true,
            cow_always: false,
            inline_max_bytes: 0,
            compress: false,
            delalloc_over_unwritten: false,
            hides_delalloc_beside_cow: true,
            reflinks_unwritten: false,
            snapshots: false,
            realtime: false,
        };
        let btrfs = Habits {
            kind: "btrfs",
            cow_always: true,
            inline_max_bytes: 2048,
            delalloc_over_unwritten: true,
            hides_delalloc_beside_cow: false,
            reflinks_unwritten: true,
            snapshots: true,
            ..xfs
        };
        match self {
            Flavour::Xfs => xfs,
            Flavour::XfsSmallBlocks => Habits { block_bytes: 1024, ..xfs },
            Flavour::XfsRealtime => Habits { realtime: true, ..xfs },
            Flavour::Btrfs => btrfs,
            Flavour::BtrfsZstd => Habits { compress: true, ..btrfs },
            Flavour::Ext4 => Habits { kind: "ext4", reflink: false, ..xfs },
            Flavour::Tmpfs => Habits { kind: "tmpfs", reflink: false, fiemap: false, ..xfs },
        }
    }
}
