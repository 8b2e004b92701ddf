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
