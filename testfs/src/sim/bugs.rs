//! Planted bugs: switches that make the simulated kernel or the adapter over it wrong on purpose.
//!
//! Tests switch one on and expect the checkers to see it. Nothing outside tests sets them.

/// Which bugs are planted. All off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bugs {
    /// `inspect` says the cache is clean whatever it is: the stale map of design 5.6 is believed.
    pub cache_looks_clean: bool,
    /// `inspect` never reports that a file moved between its steps.
    pub moved_unseen: bool,
    /// Real-time files are reported as lying on the data device.
    pub realtime_looks_data: bool,
    /// Compressed extents are reported without their flag.
    pub encoded_looks_plain: bool,
}

/// A planted bug of the merge host: one promise of the trait broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plant {
    /// `share` and `make_shared` do not look at the stamp: a write since `protect` is lost (P-004).
    ShareIgnoresRace,
    /// `reread_map` neither syncs nor sees dirty pages (design 5.6).
    DirtyUnseen,
    /// `reread_map` answers from what it remembers (design 5.5).
    StaleMapTrusted,
    /// `compare` says "same" unseen: digests become proofs.
    CompareSaysSame,
    /// `protect` does not see pins (P-001).
    PinUnseen,
    /// Writers are not held back: leases and write protection tell nobody.
    WriterUnnoticed,
    /// `share` tells listeners nothing (H-021).
    LostInvalidation,
    /// A break gives a fresh page without the bytes.
    BreakLosesBytes,
    /// Breaks never find memory: writers wait for ever.
    NeverMemory,
}

impl Plant {
    /// All of them.
    pub const ALL: [Plant; 9] = [
        Plant::ShareIgnoresRace,
        Plant::DirtyUnseen,
        Plant::StaleMapTrusted,
        Plant::CompareSaysSame,
        Plant::PinUnseen,
        Plant::WriterUnnoticed,
        Plant::LostInvalidation,
        Plant::BreakLosesBytes,
        Plant::NeverMemory,
    ];
}
