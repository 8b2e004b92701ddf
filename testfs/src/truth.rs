//! Ground truth: what a scan of a farm must find, computed without extent maps and without the engine.
//!
//! Two independent ways to know which pages are equal: [`Truth::by_provenance`] from the manifest (who wrote which
//! page of which inode, and who inherited it), and [`Truth::by_bytes`] by reading every page and comparing. The
//! cache comes from `mincore`. [`Truth::expected`] turns either into every figure of `pagefold scan`.
//!
//! Invariant: nothing here uses FIEMAP, `pagefold_engine` or the scan. Figures are counted page by page, the slow
//! and obvious way.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use crate::farm::content::PAGE;
use crate::farm::manifest::Manifest;

mod bytes;
mod provenance;
mod residency;

/// Why the truth can't be known this way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TruthError {
    /// The manifest says too little for extents-only figures.
    #[error("extents can't be derived from the manifest: {why}")]
    NotDerivable {
        /// What is missing.
        why: &'static str,
    },
    /// The farm is not what its manifest says.
    #[error("{}: {why}", path.display())]
    Mismatch {
        /// Where.
        path: PathBuf,
        /// What differs.
        why: String,
    },
    /// A system call failed.
    #[error("can't read {}: {source}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

/// What a page is equal to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TruePage {
    /// A hole or unwritten.
    Zero,
    /// Not decided by extents.
    Undecided,
    /// Equal to every page with the same three numbers: which object, which page of it, and how many bytes of it
    /// are before EOF (0: all; always 0 by bytes, where what counts is what the cache shows).
    Same {
        /// An object that only this way of knowing can name.
        object: u64,
        /// The page of it.
        page: u64,
        /// Valid bytes of a last, partial page.
        valid: u32,
    },
}

/// Pages in a row: for `Same` the page counts up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrueRun {
    /// How many.
    pub pages: u64,
    /// The first.
    pub first: TruePage,
}

/// What equal whole files have in common: size and pages.
type Signature = (u64, Vec<(TruePage, u64)>);

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrueFile {
    /// Its names, from the root.
    pub names: Vec<PathBuf>,
    /// Bytes.
    pub size: u64,
    /// All pages up to EOF.
    pub runs: Vec<TrueRun>,
    /// Which of them are cached: (first, pages). Empty until [`Truth::look_at_cache`].
    pub resident: Vec<(u64, u64)>,
}

impl TrueFile {
    /// Its pages, one by one.
    pub fn pages(&self) -> impl Iterator<Item = TruePage> + '_ {
        self.runs.iter().flat_map(|run| {
            (0..run.pages).map(move |n| match run.first {
                TruePage::Same { object, page, valid } => TruePage::Same { object, page: page + n, valid },
                other => other,
            })
        })
    }

    fn count(&self, wanted: impl Fn(TruePage) -> bool) -> u64 {
        self.runs.iter().filter(|r| wanted(r.first)).map(|r| r.pages).sum()
    }

    fn cache_pages(&self) -> u64 {
        self.count(|p| p != TruePage::Zero)
    }

    /// Equal for equal whole files, `None` where equality isn't known or means nothing.
    fn signature(&self) -> Option<Signature> {
        if self.count(|p| p == TruePage::Undecided) > 0 || self.cache_pages() == 0 {
            return None;
        }
        let mut merged: Vec<(TruePage, u64)> = Vec::new();
        for run in &self.runs {
            // Zeros in one piece; the others page by page, so that how they were cut into runs doesn't show.
            match (run.first, merged.last_mut()) {
                (TruePage::Zero, Some((TruePage::Zero, pages))) => *pages += run.pages,
                (TruePage::Zero, _) => merged.push((TruePage::Zero, run.pages)),
                (TruePage::Same { object, page, valid }, _) => {
                    let one = |n| (TruePage::Same { object, page: page + n, valid }, 1);
                    merged.extend((0..run.pages).map(one));
                }
                (TruePage::Undecided, _) => return None,
            }
        }
        Some((self.size, merged))
    }
}

/// One root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrueRoot {
    /// Its directory.
    pub path: PathBuf,
    /// Trust domain; pages are equal within one only.
    pub domain: u16,
    /// Its inodes.
    pub files: Vec<TrueFile>,
}

/// What is known of a farm's pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truth {
    /// In the order in which they are given to the scan.
    pub roots: Vec<TrueRoot>,
}

/// The figures of one root or of all; fields as in `pagefold.scan/1`, all but the first two in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Figures {
    /// Regular files, by inode.
    pub files: u64,
    /// Further names of inodes already counted.
    pub hard_links: u64,
    /// Sizes.
    pub logical_bytes: u64,
    /// Pages up to EOF without Zero pages.
    pub cache_bytes: u64,
    /// Of these, what goes when equal whole files keep one copy.
    pub mergeable_file_bytes: u64,
    /// What goes when equal pages keep one copy.
    pub mergeable_page_bytes: u64,
    /// Holes and unwritten.
    pub zero_bytes: u64,
    /// Pages that extents can't decide.
    pub undecided_bytes: u64,
    /// Pages in cache, holes included.
    pub resident_bytes: u64,
    /// Cached copies beyond the first of equal pages.
    pub resident_duplicate_bytes: u64,
}

/// Everything that a scan must find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// All roots together.
    pub totals: Figures,
    /// Each root as if scanned alone, and its `shared_with_others_bytes`.
    pub roots: Vec<(Figures, u64)>,
    /// `matrix[i][j]`: bytes of distinct pages in both; on the diagonal those of one root.
    pub matrix: Vec<Vec<u64>>,
}

impl Truth {
    /// From the manifest alone: extents-only figures.
    ///
    /// # Errors
    /// The manifest can't say: not synced, cloned from outside, foreign bytes on a file system that compresses.
    pub fn by_provenance(dir: &Path, manifest: &Manifest) -> Result<Truth, TruthError> {
        provenance::decided(dir, manifest)
    }

    /// By reading everything: figures with `--content`. What is a hole still comes from the manifest, because a
    /// cached page over an unwritten extent looks like data to `SEEK_DATA`.
    ///
    /// # Errors
    /// The farm is not as its manifest says, or can't be read.
    pub fn by_bytes(dir: &Path, manifest: &Manifest) -> Result<Truth, TruthError> {
        bytes::compared(provenance::origins(dir, manifest))
    }

    /// Asks the kernel which pages of every file are cached now.
    ///
    /// # Errors
    /// A file is gone or can't be read.
    pub fn look_at_cache(&mut self) -> Result<(), TruthError> {
        residency::look(self)
    }

    /// Every figure, counted.
    #[must_use]
    pub fn expected(&self) -> Expected {
        let roots: Vec<&TrueRoot> = self.roots.iter().collect();
        let distinct: Vec<HashSet<TruePage>> = roots.iter().map(|r| distinct_pages(r)).collect();
        let alone: Vec<Figures> = roots.iter().map(|r| figures(&[r])).collect();
        let shares = |i: usize, j: usize| roots[i].domain == roots[j].domain;
        let with_others = |i: usize| {
            let elsewhere = |page: &TruePage| {
                (0..roots.len()).any(|j| j != i && shares(i, j) && distinct[j].contains(page))
            };
            distinct[i].iter().filter(|p| elsewhere(p)).count() as u64 * PAGE
        };
        let common = |i: usize, j: usize| match () {
            () if i == j => alone[i].cache_bytes - alone[i].mergeable_page_bytes,
            () if !shares(i, j) => 0,
            () => distinct[i].intersection(&distinct[j]).count() as u64 * PAGE,
        };
        let all = 0..roots.len();
        Expected {
            totals: figures(&roots),
            roots: all.clone().map(|i| (alone[i], with_others(i))).collect(),
            matrix: all.clone().map(|i| all.clone().map(|j| common(i, j)).collect()).collect(),
        }
    }
}

fn distinct_pages(root: &TrueRoot) -> HashSet<TruePage> {
    root.files.iter().flat_map(TrueFile::pages).filter(|p| matches!(p, TruePage::Same { .. })).collect()
}

fn figures(roots: &[&TrueRoot]) -> Figures {
    let mut sums = Figures::default();
    let mut pages: HashMap<(u16, TruePage), (u64, u64)> = HashMap::new();
    let mut whole: HashMap<(u16, Signature), (u64, u64)> = HashMap::new();
    for (root, file) in roots.iter().flat_map(|r| r.files.iter().map(move |f| (r, f))) {
        sums.files += 1;
        sums.hard_links += file.names.len() as u64 - 1;
        sums.logical_bytes += file.size;
        sums.cache_bytes += file.cache_pages() * PAGE;
        sums.zero_bytes += file.count(|p| p == TruePage::Zero) * PAGE;
        sums.undecided_bytes += file.count(|p| p == TruePage::Undecided) * PAGE;
        sums.resident_bytes += file.resident.iter().map(|(_, n)| n * PAGE).sum::<u64>();
        count_pages(root.domain, file, &mut pages);
        if let Some(signature) = file.signature() {
            let group = whole.entry((root.domain, signature)).or_insert((0, file.cache_pages()));
            group.0 += 1;
        }
    }
    for (copies, resident) in pages.values() {
        sums.mergeable_page_bytes += (copies - 1) * PAGE;
        sums.resident_duplicate_bytes += resident.saturating_sub(1) * PAGE;
    }
    sums.mergeable_file_bytes = whole.values().map(|(copies, each)| (copies - 1) * each * PAGE).sum();
    sums
}

/// Adds a file's decided pages: copies, and copies in cache.
fn count_pages(domain: u16, file: &TrueFile, pages: &mut HashMap<(u16, TruePage), (u64, u64)>) {
    let mut start = 0;
    for run in &file.runs {
        if let TruePage::Same { object, page, valid } = run.first {
            for n in 0..run.pages {
                let at = start + n;
                // `resident` ascends: the last run that starts at or before this page is the only one to hold it.
                let before = file.resident.partition_point(|(first, _)| *first <= at);
                let cached = before > 0 && at < file.resident[before - 1].0 + file.resident[before - 1].1;
                let same = TruePage::Same { object, page: page + n, valid };
                let count = pages.entry((domain, same)).or_default();
                count.0 += 1;
                count.1 += u64::from(cached);
            }
        }
        start += run.pages;
    }
}

#[cfg(test)]
mod tests;
