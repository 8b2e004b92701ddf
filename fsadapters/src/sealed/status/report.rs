//! `pagefold.status/1`: the figures and their meaning. Bytes are of whole pages.
//!
//! Words as KSM has them, for what KSM counts: `pages_shared` distinct pages of anchors that two or more sites show;
//! `pages_sharing` the sites beyond the first, so that `pages_sharing` pages are what sharing can save; `pages_unshared`
//! pages of anchors with one site. A *site* is an inode of a sealed root: each would have a page cache of its own.
//!
//! Three things are told apart (design 11): `could_be_saved` counts the sites of all sealed roots; `is_shared` only those
//! that a mounted view shows and has not written; `saved_now` only pages that processes of several views have mapped at this
//! moment: pages mapped, each view for itself, minus distinct pages. What was read and not mapped is in
//! `anchors_resident` and in no saving: nobody can tell which view read it.

use std::path::PathBuf;

use serde::Serialize;

use crate::scan::{as_text, as_text_if_any};

use super::raw_changes::RawChanges;

/// The schema's name.
pub const SCHEMA: &str = "pagefold.status/1";

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub struct StatusReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The store.
    #[serde(serialize_with = "as_text")]
    pub store: PathBuf,
    /// Bytes.
    pub page_size: u64,
    /// It was interrupted: figures are too small.
    pub partial: bool,
    /// Seconds it took.
    pub elapsed_s: f64,
    /// Of all domains.
    pub totals: Figures,
    /// By domain.
    pub domains: Vec<DomainStatus>,
    /// By root.
    pub roots: Vec<RootStatus>,
    /// Which memory groups the anchors' cached pages are charged to, largest first; only when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who_pays: Option<Vec<Payer>>,
    /// What somebody should know.
    pub warnings: Vec<String>,
    /// What could not be found out; not in the figures.
    pub errors: Vec<StatusError>,
}

/// Sharing of a set of roots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Sealed roots.
    pub roots: u64,
    /// Of these, with a view mounted in some mount namespace.
    pub views: u64,
    /// Anchors that the roots name.
    pub anchors: u64,
    /// Distinct anchor pages with two or more sites.
    pub pages_shared: u64,
    /// Sites of these beyond the first.
    pub pages_sharing: u64,
    /// Anchor pages with one site.
    pub pages_unshared: u64,
    /// `pages_sharing` in bytes: saved if every view ran and read everything.
    pub could_be_saved_bytes: u64,
    /// As `could_be_saved_bytes`, for sites that mounted views show and have not written.
    pub is_shared_bytes: u64,
    /// Of anchors in the page cache now.
    pub anchors_resident_bytes: u64,
    /// Distinct anchor pages mapped by processes in views.
    pub mapped_bytes: u64,
    /// What is saved at this moment, measured (see the module).
    pub saved_now_bytes: u64,
}

/// A domain.
#[derive(Clone, Debug, Serialize)]
pub struct DomainStatus {
    /// Its name.
    pub name: String,
    /// Its sharing.
    pub figures: Figures,
}

/// A root.
#[derive(Clone, Debug, Serialize)]
pub struct RootStatus {
    /// Its number in the store.
    pub id: u64,
    /// Short name.
    pub name: String,
    /// The raw root.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Name of its domain.
    pub domain: String,
    /// Re-seals.
    pub generation: u64,
    /// Seconds since 1970.
    pub sealed_at: i64,
    /// Inodes with data.
    pub files: u64,
    /// Their pages in bytes.
    pub cache_bytes: u64,
    /// Of these, pages that some other site shows too.
    pub shared_bytes: u64,
    /// Of its anchors in the page cache now, whoever read them.
    pub resident_bytes: u64,
    /// Where its view is meant to be.
    #[serde(serialize_with = "as_text_if_any")]
    pub target: Option<PathBuf>,
    /// Where its view is mounted.
    pub mounted: Vec<MountedAt>,
    /// Processes that have its files mapped.
    pub processes: u64,
    /// Anchor pages they have mapped, each once.
    pub mapped_bytes: u64,
    /// `Pss_File` of these processes, of all their files.
    pub pss_file_bytes: u64,
    /// Files that the view has written: they have data of their own.
    pub broken_files: u64,
    /// Their sizes.
    pub broken_bytes: u64,
    /// Files of which the view has changed attributes or name only: their data is shared still.
    pub metadata_only_files: u64,
    /// Files that the view added.
    pub added_files: u64,
    /// Their sizes.
    pub added_bytes: u64,
    /// Names that the view removed.
    pub removed: u64,
    /// Directories that the view changed or has changes below, and its links, pipes and devices.
    pub other_entries: u64,
    /// Changes of the raw root since it was sealed; absent when not looked for or not to be had.
    pub raw_changes: Option<RawChanges>,
    /// What is mounted over the raw root, no view of it: whether the root changed is not known then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_covered_by: Option<String>,
}

/// A mount of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MountedAt {
    /// As its mount namespace shows it.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// A process in that namespace; absent: our own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
}

/// A memory group and what it is charged for of the anchors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Payer {
    /// Path below the hierarchy's top; its number where no such group is there any more.
    pub group: String,
    /// Bytes.
    pub bytes: u64,
}

/// Something that could not be found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StatusError {
    /// Of what.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Why.
    pub error: String,
}
