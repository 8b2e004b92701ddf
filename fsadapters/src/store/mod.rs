//! The store: what makes sharing possible and outlives a process. Anchors, images, each root's upper and work, and an index
//! of them.
//!
//! ```text
//! <store>/                     0700, owned by root; on btrfs a subvolume of its own
//!   FORMAT                     what this is and which version, for people and for the first check
//!   lock                       one process at a time
//!   index.redb                 the index: what is not in it was never published
//!   anchors/<domain>/xx/<62>   the domain's data-only layer; a file is named by its key in hex, 0400 and immutable
//!   images/<digest>.erofs      metadata images, named by the BLAKE3 of their bytes
//!   roots/<id>/upper, work     the writable layer of a root's view
//!   roots/<id>/manifest        the root as it was sealed
//!   mounts/<digest>/           where an image is mounted while a view uses it
//!   tmp/                       things being built; emptied at open
//! ```
//!
//! Invariant: built, synced, then published by one commit of the index. Whatever the index doesn't name is an orphan of a
//! crash and goes at the next open; whatever it names is complete on disk. What it deliberately does not do: judge whether
//! two files are equal. It remembers hints; `sealed` proves.

mod crash;
pub mod key;
pub mod manifest;
pub mod rows;

pub use crash::{STEPS, step};
pub use key::{AnchorKey, ContentHash, ImageDigest, SealId, Signature, StoreId};
pub use rows::{AnchorRow, DomainRow, ImageRow, RootRow, ViewRow};
