//! `seal`: makes sharing possible for roots.
//!
//! ```text
//! open and check each root -> walk it, an anchor for every file -> close the proofs -> image, manifest, upper -> publish by one commit
//! ```
//!
//! Roots are done in groups of `GROUP`: one first and one last reading of an anchor then serve all clones of the group, and memory
//! holds a group's trees, not all. Invariant: a root is published whole or not at all, and one that fails takes no other with it; raw
//! roots are only read. What it deliberately does not do: mount, or remove what no root needs any more (`gc`).

use std::path::PathBuf;
use std::time::Instant;

use super::locate::{Borrow, Locator};
use super::reading::Readings;
use super::report::{Counts, Outcome, Phases, RootSeal, SEAL_SCHEMA, SKIPPED_MAX, SealReport};
use super::walk::{Model, Sketch, WalkRoot, walk};
use crate::fsid;
use crate::scan::{Failure, Phase, Progress, Skipped};
use crate::store::{DomainRow, Publication, SealId, Store, StoreError, step};

mod base;
mod close;
mod root;
mod write;

use base::Base;
pub use root::unsupported;
use root::{OpenRoot, RootError};
use write::Written;

/// Roots sealed together. More save readings of anchors, and cost memory (2.5 MiB a root of 10,000 files).
const GROUP: usize = 16;

/// What to seal, resolved.
#[derive(Clone, Debug)]
pub struct SealConfig {
    /// The raw roots.
    pub roots: Vec<PathBuf>,
    /// Name of the root, when there is one only; else the last component of its path.
    pub name: Option<String>,
    /// Name of the domain.
    pub domain: String,
    /// Also join equal files that share no blocks.
    pub content: bool,
    /// Trees that the user declares never to be written, for file systems without reflink: their files become anchors, and what has no
    /// equal there is copied. Empty: no borrowing, no copies.
    pub borrow: Vec<PathBuf>,
    /// Copy where there is no reflink, without new borrowing: for the commit of a root that was sealed so.
    pub copy: bool,
    /// Threads, at least 1.
    pub threads: usize,
    /// How long a write may be under way, seconds: a file that changed so shortly before its root was sealed is looked at again by
    /// the next seal, whatever its times say.
    pub under_way_s: i64,
    /// Roots whose uppers were just committed in whole: they may be sealed although their uppers are not empty. For commit only, which
    /// holds the store's lock from the first to the last step.
    pub committed: Vec<SealId>,
}

impl SealConfig {
    /// Whether files may be linked or copied instead of cloned.
    fn without_reflink(&self) -> bool {
        self.copy || !self.borrow.is_empty()
    }

    /// `roots` in the default domain with as many threads as there are processors.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>) -> SealConfig {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        SealConfig {
            roots,
            name: None,
            domain: "default".into(),
            content: false,
            borrow: Vec::new(),
            copy: false,
            threads,
            under_way_s: super::prove::UNDER_WAY_S,
            committed: Vec::new(),
        }
    }
}

/// Seals roots. What could not be sealed is in the report.
///
/// # Errors
/// What concerns all roots: the store.
pub fn seal(store: &Store, config: &SealConfig, progress: &Progress) -> Result<SealReport, StoreError> {
    let started = Instant::now();
    let domain = store.ensure_domain(&config.domain)?;
    let mut session = Session::new(store, config, progress, &domain)?;
    let opened = session.open_roots()?;
    let facts =
        fsid::describe(store.dirfd()).map_err(|e| StoreError::io("describe", store.dir(), e.source))?;
    let (build, lookup) = (store.build(&domain), store.lookup()?);
    let mut locator = Locator::new(store, &build, &lookup, Readings::new(&facts), progress);
    locator.domain = domain.id;
    locator.content = config.content;
    if config.without_reflink() {
        let dirs = root::to_borrow(store, config)?;
        let dev =
            rustix::fs::fstat(store.dirfd()).map_err(|e| StoreError::io("stat", store.dir(), e))?.st_dev;
        locator.borrow = Some(Borrow::collect(&dirs, dev, || progress.is_cancelled())?);
    }
    locator.under_way_s = config.under_way_s;
    let mut opened = opened.into_iter().peekable();
    while opened.peek().is_some() && !progress.is_cancelled() {
        session.base = session.base.take().or_else(|| Base::choose(store, domain.id));
        // The first root of a domain goes alone: the others are told by their differences from it.
        let size = if session.base.is_some() { GROUP } else { 1 };
        let group: Vec<OpenRoot> = opened.by_ref().take(size).collect();
        session.group(group, &mut locator)?;
    }
    session.cancelled(opened);
    let borrow = locator.borrow.as_ref().map(Borrow::counts);
    Ok(SealReport { borrow, ..session.into_report(started) })
}

/// New anchors that are worth a sync of their own.
const SYNC_EARLY: usize = 512;

fn made_in(walked: &[Walked]) -> usize {
    let found = walked.iter().flat_map(|walked| &walked.sketch.found);
    found.flatten().filter(|located| located.made).count()
}

struct Session<'a> {
    store: &'a Store,
    config: &'a SealConfig,
    progress: &'a Progress,
    domain: &'a DomainRow,
    /// What roots are told by their differences from.
    base: Option<Base>,
    phases: Phases,
    /// By the roots' order in the configuration.
    roots: Vec<Option<RootSeal>>,
    errors: Vec<(usize, Failure)>,
    skipped: Vec<Skipped>,
    unsupported: usize,
    /// Names taken, in the store and by this call.
    names: std::collections::HashSet<String>,
}

/// A root of a group, walked.
struct Walked {
    root: OpenRoot,
    sketch: Sketch<super::locate::Located>,
}

impl<'a> Session<'a> {
    fn new(
        store: &'a Store,
        config: &'a SealConfig,
        progress: &'a Progress,
        domain: &'a DomainRow,
    ) -> Result<Self, StoreError> {
        let names = store.roots()?.into_iter().map(|root| root.name).collect();
        Ok(Session {
            store,
            config,
            progress,
            domain,
            base: None,
            phases: Phases::default(),
            roots: vec![None; config.roots.len()],
            errors: Vec::new(),
            skipped: Vec::new(),
            unsupported: 0,
            names,
        })
    }

    fn open_roots(&mut self) -> Result<Vec<OpenRoot>, StoreError> {
        let mut opened: Vec<OpenRoot> = Vec::new();
        let known = root::Known::of(self.store, self.domain, self.config)?;
        for (index, path) in self.config.roots.iter().enumerate() {
            match known.open(index, path) {
                Ok(root) if opened.iter().any(|other| other.inode == root.inode) => {
                    self.failed(index, root.path, &RootError::Twice);
                }
                Ok(root) => opened.push(root),
                Err((path, error)) => self.failed(index, path, &error),
            }
        }
        if let Some(name) = &self.config.name {
            for root in &mut opened {
                root.wanted_name = Some(name.clone());
            }
        }
        for root in &mut opened {
            root.choose_name(&mut self.names);
        }
        Ok(opened)
    }

    fn failed(&mut self, index: usize, path: PathBuf, error: &RootError) {
        self.unsupported += usize::from(error.is_unsupported());
        let text = error.to_string();
        self.errors.push((index, Failure { path: path.clone().into(), error: text }));
        self.roots[index] = Some(RootSeal {
            path: path.into(),
            name: String::new(),
            id: None,
            generation: 0,
            outcome: Outcome::Failed,
            counts: Counts::default(),
            layers: Vec::new(),
            image_bytes: 0,
            manifest_bytes: 0,
            diff_entries: 0,
        });
    }

    fn group(&mut self, group: Vec<OpenRoot>, locator: &mut Locator<'_>) -> Result<(), StoreError> {
        let started = Instant::now();
        let walked = self.walk(group, locator);
        self.phases.walk_s += started.elapsed().as_secs_f64();
        step("seal.walked");

        let started = Instant::now();
        let (proved, failed) = close::close_all(walked, locator, self.config.threads);
        for (root, error) in failed {
            self.failed(root.index, root.path.clone(), &error.into());
        }
        self.phases.prove_s += started.elapsed().as_secs_f64();
        if self.progress.is_cancelled() {
            return Ok(());
        }

        let started = Instant::now();
        let place = write::Place {
            store: self.store,
            domain: self.domain,
            locator,
            base: self.base.as_ref(),
            split: proved.len() < self.config.threads,
        };
        let written = std::thread::scope(|scope| {
            // New anchors are most of what must be on disk before it is published: that need not wait for the images.
            let early = (made_in(&proved) >= SYNC_EARLY).then(|| scope.spawn(|| self.store.sync()));
            let written = write::write_all(proved, place, self.config.threads);
            early.map_or(Ok(()), |sync| {
                sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
            Ok::<_, StoreError>(written)
        })?;
        let mut good = Vec::new();
        for (root, result) in written {
            match result {
                Ok(written) => good.push((root, written)),
                Err(error) => self.failed(root.index, root.path.clone(), &error),
            }
        }
        self.phases.write_s += started.elapsed().as_secs_f64();
        step("seal.written");

        let started = Instant::now();
        let mut publication = Publication::default();
        for (_, written) in &mut good {
            publication.images.extend(written.image.take());
            publication.roots.extend(written.row.take());
            publication.diffs.extend(written.diff.take());
        }
        publication.images.sort_by_key(|(digest, _)| *digest);
        publication.images.dedup_by_key(|(digest, _)| *digest);
        let of_images = publication.images.iter().flat_map(|(_, row)| &row.anchors);
        let of_diffs = publication.diffs.iter().flat_map(|diff| &diff.row.anchors);
        publication.anchors = locator.rows_of(of_images.chain(of_diffs));
        if !publication.roots.is_empty() || !publication.anchors.is_empty() {
            locator.build.publish(&publication)?;
        }
        self.phases.publish_s += started.elapsed().as_secs_f64();
        for (root, written) in good {
            self.done(&root, written);
        }
        Ok(())
    }

    fn walk(&mut self, group: Vec<OpenRoot>, locator: &mut Locator<'_>) -> Vec<Walked> {
        locator.sealed_at = group.iter().map(|root| root.sealed_at()).collect();
        locator.clone_only = false;
        locator.alone = group.len() == 1;
        locator.layer = locator.layer.take().or_else(|| self.store.data_layer(self.domain.id).ok());
        let mut rest = Vec::new();
        let mut roots = Vec::new();
        for mut root in group {
            let (fd, previous) = root.give();
            roots.push(WalkRoot { fd, path: root.path.clone(), previous, avoid: root.store_inode });
            rest.push(root);
        }
        self.progress.set_phase(Phase::Walk);
        let model = self.base.as_ref().and_then(|base| Model::new(base.tree()));
        let sketches = walk(&roots, model.as_ref(), locator, self.config.threads, self.progress);
        let mut walked = Vec::new();
        for ((mut root, back), sketch) in rest.into_iter().zip(roots).zip(sketches) {
            root.take_back(back);
            match sketch {
                Ok(sketch) => walked.push(Walked { root, sketch }),
                Err(error) => self.failed(root.index, root.path.clone(), &error.into()),
            }
        }
        walked
    }

    fn done(&mut self, root: &OpenRoot, written: Written) {
        for skipped in written.unsettled {
            if self.skipped.len() < SKIPPED_MAX {
                self.skipped.push(skipped);
            }
        }
        self.roots[root.index] = Some(written.report);
    }

    fn cancelled(&mut self, rest: impl Iterator<Item = OpenRoot>) {
        for root in rest {
            let error = super::walk::WalkError::Cancelled.into();
            self.failed(root.index, root.path.clone(), &error);
        }
    }

    fn into_report(mut self, started: Instant) -> SealReport {
        self.errors.sort_by_key(|(index, _)| *index);
        let roots = self.roots.len();
        SealReport {
            schema: SEAL_SCHEMA,
            store: self.store.dir().into(),
            domain: self.domain.name.clone(),
            partial: self.progress.is_cancelled(),
            elapsed_s: started.elapsed().as_secs_f64(),
            phases: self.phases,
            roots: self.roots.into_iter().flatten().collect(),
            errors: self.errors.into_iter().map(|(_, failure)| failure).collect(),
            skipped: self.skipped,
            borrow: None,
            refused: roots > 0 && self.unsupported == roots,
        }
    }
}
