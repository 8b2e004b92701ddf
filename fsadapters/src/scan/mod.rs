//! The scan: how much page cache a set of roots wastes, and what merging would give back.
//!
//! Walk, extent maps and cache state of every file; each inode once; the engine's figures; on request the bytes of
//! what extents can't decide. Generic over [`FileSource`], so that the same code runs over the kernel's file systems
//! and over the simulated one. Nothing scanned is modified.

mod content;
mod filesystems;
mod notes;
mod progress;
pub(crate) mod queue;
mod report;
mod table;
mod tops;
mod unique;
mod walk;

use std::path::PathBuf;
use std::time::Instant;

use globset::GlobSet;
use pagefold_engine::savings::Savings;
use pagefold_engine::units::{DomainId, PageSize, RootId};
use rustc_hash::FxHashMap;

pub use notes::{NOTES_MAX, Note};
pub use progress::{Phase, Progress};
pub use report::{Failure, RootReport, SCHEMA, ScanReport, Sizes, Skipped, TopDirectory, TopFile, path_text};
pub(crate) use report::{as_text, as_text_if_any, as_texts};

use crate::source::{FileSource, FsError, ReadOptions};
use notes::Notes;
use unique::Collected;

/// The most domains of one scan: they are numbered in 16 bits.
pub const DOMAINS_MAX: usize = u16::MAX as usize;

/// A root to scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootSpec {
    /// The directory.
    pub path: PathBuf,
    /// Name of the domain it may share with.
    pub domain: String,
}

/// What to scan and how.
#[derive(Clone, Debug)]
pub struct ScanConfig {
    /// The roots, in the order in which they are reported.
    pub roots: Vec<RootSpec>,
    /// Read what extents can't decide, and find equal bytes that are not reflinked.
    pub content: bool,
    /// Threads of the walk, at least 1.
    pub threads: usize,
    /// How to read.
    pub read: ReadOptions,
    /// Paths below a root that are left out.
    pub exclude: Option<GlobSet>,
    /// Stay on each root's file system (by UUID: btrfs subvolumes are on it).
    pub one_file_system: bool,
    /// How many top files and directories to report.
    pub top: usize,
    /// Whether to compute the root-by-root matrix.
    pub matrix: bool,
    /// Whether to compute top directories (only the table shows them).
    pub top_directories: bool,
}

/// Scans. What can't be looked at is named in the report; when `progress` is cancelled the report covers what was
/// reached and says so.
///
/// # Panics
/// With more than [`DOMAINS_MAX`] domains.
pub fn scan<S: FileSource>(source: &S, config: &ScanConfig, progress: &Progress) -> ScanReport {
    let started = Instant::now();
    progress.set_phase(Phase::Walk);
    let mut notes = Notes::default();
    let (roots, inodes) = distinct_roots(source, &config.roots, &mut notes);
    let plan = walk::WalkPlan {
        roots: roots.iter().map(|r| r.path.clone()).collect(),
        root_inodes: inodes,
        exclude: config.exclude.as_ref(),
        one_file_system: config.one_file_system,
        threads: config.threads,
        content: config.content,
    };
    let mut walked = walk::walk(source, &plan, progress);
    notes.append(std::mem::take(&mut walked.notes));
    let domains = number_domains(&roots);
    let page = source.page_size();
    let collected = unique::collect(walked, page, domains.iter().map(|d| d.0).collect());
    let relabelled = (config.content && !progress.is_cancelled()).then(|| {
        let index = content::read_content(source, &collected, config.read, progress, &mut notes);
        collected.map.relabelled(&index)
    });
    progress.set_phase(Phase::Figures);
    let map = relabelled.as_ref().unwrap_or(&collected.map);
    let savings = map.savings(config.matrix);
    note_unknown_cache(&roots, &savings, &mut notes);
    let facts = Facts { config, roots: &roots, page, collected: &collected, map, savings: &savings };
    let mut report = facts.report(notes);
    report.partial = progress.is_cancelled();
    report.elapsed_s = started.elapsed().as_secs_f64();
    report
}

/// The resident figures lack files whose cache is none of this user's business: that must not go unsaid.
fn note_unknown_cache(roots: &[RootSpec], savings: &Savings, notes: &mut Notes) {
    for (root, figures) in roots.iter().zip(&savings.roots) {
        let files = figures.own.resident_unknown_files;
        if files > 0 {
            let text = format!(
                "what is cached of {files} files is not known (not this user's to ask, or too large to ask page by \
                 page): they are not in the resident figures"
            );
            notes.errors.add(root.path.clone(), text);
        }
    }
}

type RootInodes = FxHashMap<crate::source::InodeId, RootId>;

/// The error, and what to do about it where that is plain.
fn root_failed(error: &FsError) -> String {
    let advice = match error.source.kind() {
        std::io::ErrorKind::NotADirectory => ": a root is a directory, give the one it is in",
        std::io::ErrorKind::PermissionDenied => ": run as root, or as its owner",
        _ => "",
    };
    format!("{error}{advice}")
}

/// The roots that can be opened and are not another name of an earlier one.
fn distinct_roots<S: FileSource>(
    source: &S,
    given: &[RootSpec],
    notes: &mut Notes,
) -> (Vec<RootSpec>, RootInodes) {
    let mut roots: Vec<RootSpec> = Vec::new();
    let mut inodes = RootInodes::default();
    for root in given {
        match source.open_root(&root.path) {
            Err(error) => notes.errors.add(root.path.clone(), root_failed(&error)),
            Ok(opened) => {
                if let Some(first) = inodes.get(&opened.inode) {
                    let first = &roots[first.0 as usize];
                    let text = format!("the same directory as {}: counted once", path_text(&first.path));
                    notes.skipped.add(root.path.clone(), text);
                    continue;
                }
                inodes.insert(opened.inode, RootId(roots.len() as u32));
                roots.push(root.clone());
            }
        }
    }
    (roots, inodes)
}

/// Each root's domain number and name; numbers by first appearance.
fn number_domains(roots: &[RootSpec]) -> Vec<(DomainId, &str)> {
    let mut names: Vec<&str> = Vec::new();
    roots
        .iter()
        .map(|root| {
            let name = root.domain.as_str();
            let at = names.iter().position(|n| *n == name).unwrap_or_else(|| {
                names.push(name);
                names.len() - 1
            });
            (DomainId(u16::try_from(at).expect("fewer than 65,536 domains")), name)
        })
        .collect()
}

struct Facts<'a> {
    config: &'a ScanConfig,
    roots: &'a [RootSpec],
    page: PageSize,
    collected: &'a Collected,
    map: &'a pagefold_engine::share_map::ShareMap,
    savings: &'a Savings,
}

impl Facts<'_> {
    fn report(&self, notes: Notes) -> ScanReport {
        let links = &self.collected.hard_links;
        let root = |(at, root): (usize, &RootSpec)| {
            RootReport::new(&root.path, &root.domain, &self.savings.roots[at], links[at], self.page)
        };
        let mut domains: Vec<String> = Vec::new();
        for root in self.roots {
            if !domains.contains(&root.domain) {
                domains.push(root.domain.clone());
            }
        }
        let bytes =
            |row: &Vec<pagefold_engine::units::PageCount>| row.iter().map(|p| p.bytes(self.page)).collect();
        let top_directories = if self.config.top_directories {
            tops::top_directories(self.collected, self.map, self.config.top)
        } else {
            Vec::new()
        };
        ScanReport {
            schema: SCHEMA,
            page_size: self.page.bytes(),
            content: self.config.content,
            partial: false,
            elapsed_s: 0.0,
            domains,
            totals: Sizes::new(&self.savings.total, links.iter().sum(), self.page),
            roots: self.roots.iter().enumerate().map(root).collect(),
            top_files: tops::top_files(self.collected, self.map, self.config.top),
            matrix: self.config.matrix.then(|| self.savings.matrix.iter().map(bytes).collect()),
            skipped: notes
                .skipped
                .into_sorted()
                .into_iter()
                .map(|n| Skipped { path: n.path.into(), reason: n.text })
                .collect(),
            errors: notes
                .errors
                .into_sorted()
                .into_iter()
                .map(|n| Failure { path: n.path.into(), error: n.text })
                .collect(),
            top_directories,
            resident_unknown_files: self.savings.total.resident_unknown_files,
        }
    }
}
