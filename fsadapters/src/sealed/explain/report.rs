//! `pagefold.explain/1`: what is known of one file.

use std::path::PathBuf;

use serde::Serialize;

use crate::scan::{as_text, as_text_if_any};

/// The schema's name.
pub const SCHEMA: &str = "pagefold.explain/1";
/// Sites listed by name.
pub const SITES_LISTED: usize = 20;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In a view.
    View,
    /// In a sealed root itself.
    Raw,
    /// An anchor in the store.
    Anchor,
}

/// The verdict in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Its pages are one copy with those of other files.
    Shared,
    /// It has an anchor that no other file shows: so far nobody to share with.
    Alone,
    /// The view wrote it: it has data of its own.
    Broken,
    /// It has no data.
    Empty,
    /// It was not there, or was something else, when the root was sealed.
    NotSealed,
    /// The raw root's own file: views share its anchor, readers of the raw root do not.
    RawCopy,
    /// It was sealed and is not there any more.
    Removed,
    /// No regular file: nothing to share.
    NotAFile,
}

/// Everything known.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// As found.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Where that is.
    pub place: Place,
    /// In one word.
    pub verdict: Verdict,
    /// In sentences, the most important first.
    pub why: Vec<String>,
    /// What a write to this path will do.
    pub on_write: String,
    /// The sealed root; absent for an anchor.
    pub root: Option<ExplainedRoot>,
    /// The one copy.
    pub anchor: Option<ExplainedAnchor>,
    /// Files of sealed roots that show the anchor.
    pub sites: u64,
    /// Some of them.
    pub site_list: Vec<Site>,
    /// Whether the raw root's file is not what was sealed; absent where that is no question.
    pub raw_changed: Option<bool>,
}

/// The root that a path is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExplainedRoot {
    /// Number in the store.
    pub id: u64,
    /// Short name.
    pub name: String,
    /// The raw root.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// The path below it.
    #[serde(serialize_with = "as_text")]
    pub below: PathBuf,
}

/// An anchor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExplainedAnchor {
    /// Its key in hex.
    pub key: String,
    /// Where it is.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Pages.
    pub pages: u64,
    /// Of these, cached now.
    pub resident_pages: u64,
    /// Extents on disk; absent where they can't be read.
    pub extents: Option<u64>,
    /// Why extents can't tell which files equal it (then their content does); absent where they can.
    pub undecided: Option<&'static str>,
    /// It is an immutable file of somebody else.
    pub borrowed: bool,
}

/// A file of a sealed root that shows the anchor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Site {
    /// The root's name.
    pub root: String,
    /// Below the root.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Where its view is mounted, if it is.
    #[serde(serialize_with = "as_text_if_any")]
    pub view: Option<PathBuf>,
}
