//! The pure core of pagefold.
//!
//! Two halves share one vocabulary ([`units`], [`identity`]):
//!
//! * **analysis**: [`layout`] turns an extent map into page identities, [`share_map`] collects the layouts of many
//!   mappings and says which spans are the same page, [`savings`] turns that into figures;
//! * **merging**: the typed protect-prove-share-break protocol over a [`host`].
//!
//! Nothing here does I/O, reads a clock, starts a thread or depends on another crate of this workspace. Expected
//! races are values, not errors.
#![forbid(unsafe_code)]

pub mod content;
pub mod control;
pub mod counters;
pub mod domain;
pub mod engine;
pub mod host;
pub mod identity;
pub mod layout;
pub mod listener;
mod merge;
pub mod policy;
pub mod protocol;
mod record;
mod runs;
pub mod savings;
pub mod scanner;
pub mod share_map;
mod stable;
mod sweep;
pub mod units;
mod unstable;
mod visit;
pub mod whole;
