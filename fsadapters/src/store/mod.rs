//! The store: what makes sharing possible and outlives a process. Anchors, images, each root's upper and work, and an index
//! of them.
//!
//! ```text
//! <store>/                     0700, owned by root; on btrfs a subvolume of its own
//!   FORMAT                     what this is and which version, for people and for the first check
//!   commits                    number of the index's last commit: an index that went back in time is seen
//!   lock                       one process at a time
//!   index.redb                 the index: what is not in it was never published
//!   anchors/<domain>/xx/<62>   the domain's data-only layer; a file is named by its key in hex, 0400 and immutable
//!   images/<digest>.erofs      metadata images, named by the BLAKE3 of their bytes
//!   roots/<id>/g<n>/upper, work   the writable layer of the n-th generation of a root's view
//!   roots/<id>/g<n>/manifest      the root as it was sealed then
//!   roots/<id>/g<n>/diff, diff.list   what differs from the image, where that is little; and what must be in there (diff.stamps: when it changed last)
//!   mounts/<digest>/           where an image is mounted while a view uses it
//!   tmp/                       things being built; emptied at open
//! ```
//!
//! Invariant: built, synced, then published by one commit of the index. Whatever the index doesn't name is an orphan of a
//! crash and goes at the next open; whatever it names is complete on disk. What it deliberately does not do: judge whether
//! two files are equal. It remembers hints; `sealed` proves.

mod backend;
mod build;
mod codec;
mod crash;
mod destroy;
mod error;
mod gc;
mod index;
pub mod key;
mod lock;
mod lookup;
pub mod manifest;
mod open;
mod place;
mod publish;
mod recovery;
mod remove;
pub mod rows;
mod task;
#[cfg(test)]
mod tests;
mod verify;

pub use build::{Build, NewAnchor, NewDiff, Publication};
pub use crash::{STEPS, step};
pub use destroy::remove_unfinished;
pub use error::StoreError;
pub use gc::GcReport;
pub use key::{AnchorKey, ContentHash, ImageDigest, SealId, Signature, StoreId};
pub use lock::LOCK_PATIENCE;
pub use lookup::Lookup;
pub use open::{OpenMode, Store};
pub use remove::SealedGeneration;
pub use rows::{AnchorRow, AnchorStamp, DiffRow, DomainRow, ImageRow, RootRow, ViewRow};
pub use task::Task;
pub use verify::{PROBLEMS_MAX, Problem, ProblemKind, VerifyReport};

/// Seconds since 1970.
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}
