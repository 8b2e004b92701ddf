//! What `seal` reports.
//!
//! All sizes are bytes; every inode counts once. Nothing here is a saving: sealing makes sharing possible, `status` measures it.

use std::path::Path;

use serde::Serialize;

use crate::scan::{Failure, Skipped, as_text};

/// Name and version of the JSON schema.
pub const SEAL_SCHEMA: &str = "pagefold.seal/1";

/// The report of one call of `seal`.
#[derive(Clone, Debug, Serialize)]
pub struct SealReport {
    /// [`SEAL_SCHEMA`].
    pub schema: &'static str,
    /// The store's directory.
    #[serde(serialize_with = "as_text")]
    pub store: Box<Path>,
    /// In which roots share.
    pub domain: String,
    /// Interrupted: roots that are not in `roots` as sealed are as they were.
    pub partial: bool,
    /// Wall time in seconds.
    pub elapsed_s: f64,
    /// Where it went.
    pub phases: Phases,
    /// One a root, in the order given.
    pub roots: Vec<RootSeal>,
    /// Roots that were not sealed, and why.
    pub errors: Vec<Failure>,
    /// Files and directories that were being written all the while: the bytes sealed are those of one moment. At most
    /// [`SKIPPED_MAX`].
    pub skipped: Vec<Skipped>,
    /// Under `--borrow` only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub borrow: Option<BorrowCounts>,
    /// No root could be sealed because this host or file system can't.
    #[serde(skip)]
    pub refused: bool,
}

/// What `--borrow` did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct BorrowCounts {
    /// Anchors that are hard links to files of the user.
    pub borrowed: u64,
    /// Anchors that are copies: these cost disk.
    pub copied: u64,
    /// Their bytes.
    pub copied_bytes: u64,
    /// Times that a file was equal but immutable or append-only, and so could not be linked.
    pub not_linkable: u64,
}

/// The most entries of [`SealReport::skipped`].
pub const SKIPPED_MAX: usize = 1000;

/// Wall time in seconds; all phases of all roots together are a little less than the whole.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phases {
    /// Walking, reading maps, finding and making anchors.
    pub walk_s: f64,
    /// Last readings of anchors, proofs.
    pub prove_s: f64,
    /// Images, manifests, uppers.
    pub write_s: f64,
    /// Syncing, the commit.
    pub publish_s: f64,
}

/// What became of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Sealed, or sealed anew.
    Sealed,
    /// It is as it was sealed before; nothing was written.
    Unchanged,
    /// Not sealed: see `errors`.
    Failed,
}

/// A root.
#[derive(Clone, Debug, Serialize)]
pub struct RootSeal {
    /// Absolute, without symbolic links.
    #[serde(serialize_with = "as_text")]
    pub path: Box<Path>,
    /// Short name in the store.
    pub name: String,
    /// Number in the store; `None` when it failed.
    pub id: Option<u64>,
    /// Counts re-seals.
    pub generation: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Figures of the tree.
    #[serde(flatten)]
    pub counts: Counts,
    /// The image.
    pub layers: Vec<String>,
    /// Entries of the layer over it, where it is another root's and differs a little.
    pub diff_entries: u64,
    /// Size of the image, where it was made for this root.
    pub image_bytes: u64,
    /// Size of the manifest.
    pub manifest_bytes: u64,
}

/// Figures of a sealed tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Regular files, each inode once.
    pub files: u64,
    /// All names, the root's counted.
    pub entries: u64,
    /// Sum of the files' sizes.
    pub bytes: u64,
    /// Files without bytes.
    pub empty: u64,
    /// Files whose anchor was there already, made for another file or in an earlier call.
    pub hits: u64,
    /// Of these, files that are as they were when the root was sealed last.
    pub unchanged: u64,
    /// Files that made an anchor.
    pub made: u64,
    /// Files whose bytes were read: extents could not decide, or `--content`.
    pub by_content: u64,
    /// Files that were being written all the while.
    pub unsettled: u64,
}

impl SealReport {
    /// Whether every root is sealed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.partial && self.roots.iter().all(|root| root.outcome != Outcome::Failed)
    }
}
