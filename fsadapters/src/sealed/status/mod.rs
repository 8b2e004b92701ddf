//! `status`: what is sealed, what that can save, what is shared, what is saved at this moment, and who pays.
//!
//! ```text
//! index + manifests ──► sites of each anchor          could be saved
//! uppers, mountinfo of all namespaces ──► live sites  is shared
//! maps + pagemap of all processes ──► mapped pages    is saved now
//! ```
//!
//! Invariant: looks only; a figure that can't be had is an error in the report, never a guess. What it deliberately does not
//! do: claim a saving for pages that were read and not mapped (nobody can tell by whom); look into raw roots' data.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pagefold_sys::cache::cachestat;

use crate::sealed::diff::DIFF;
use crate::sealed::raw::{in_the_way, open_raw_root_among};
use crate::sealed::tree::Tree;
use crate::store::manifest::read_manifest;
use crate::store::{AnchorKey, ImageDigest, RootRow, Store};
use crate::{memcg, mountinfo};

mod inodes;
pub mod mapped;
pub mod mounts;
mod payer;
pub mod raw_changes;
pub mod report;
mod sites;
pub mod written;

pub use report::{DomainStatus, Figures, MountedAt, Payer, RootStatus, StatusError, StatusReport};

use inodes::{ImageInodes, ViewInodes};
use mapped::{FrameSet, Mapped};
use mounts::ViewMount;
use sites::{RootSites, Sites};
use written::{Found, HiddenPaths, Written};

/// What to look for.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatusConfig {
    /// Don't compare raw roots with their sealed state.
    pub quick: bool,
    /// Find out which memory groups the anchors' cached pages are charged to.
    pub who_pays: bool,
}

/// A root on its way into the report.
struct Looked {
    row: RootRow,
    sites: RootSites,
    mounts: Vec<ViewMount>,
    written: Written,
    status: RootStatus,
}

/// Everything a look needs.
struct Look<'a> {
    store: &'a Store,
    config: StatusConfig,
    cancel: &'a AtomicBool,
    page: u64,
    sites: Sites,
    errors: Vec<StatusError>,
}

/// Looks at everything in `store`. Cancelled: what was found so far, marked partial.
///
/// # Errors
/// Only when the index can't be read; whatever else can't be had is named in the report.
pub fn status(
    store: &Store,
    config: StatusConfig,
    cancel: &AtomicBool,
) -> Result<StatusReport, crate::store::StoreError> {
    let started = Instant::now();
    let page = rustix::param::page_size() as u64;
    let mut look = Look { store, config, cancel, page, sites: Sites::default(), errors: Vec::new() };
    let domains = store.domains()?;
    let names: HashMap<u32, String> = domains.iter().map(|d| (d.id, d.name.clone())).collect();
    let mut mounted = mounts::of_store(store)?;
    let all_mounts = mountinfo::read().unwrap_or_default();
    let mut roots = Vec::new();
    for row in store.roots()? {
        if look.cancelled() {
            break;
        }
        let target = store.view(row.id)?.map(|view| view.target);
        let at = mounted.remove(&row.id).unwrap_or_default();
        roots.extend(look.root(row, target, at, &names, &all_mounts));
    }
    let who_pays = look.anchors();
    let unreadable = look.mapped(&mut roots);
    let mut report = StatusReport {
        schema: report::SCHEMA,
        store: store.dir().to_owned(),
        page_size: page,
        partial: look.cancelled(),
        elapsed_s: 0.0,
        totals: Figures::default(),
        domains: Vec::new(),
        roots: Vec::new(),
        who_pays,
        warnings: unreadable.into_iter().collect(),
        errors: Vec::new(),
    };
    for domain in domains {
        let mut figures = look.sites.figures(domain.id, page);
        let of_domain = || roots.iter().filter(|root| root.row.domain == domain.id);
        figures.roots = of_domain().count() as u64;
        figures.views = of_domain().filter(|root| !root.mounts.is_empty()).count() as u64;
        report.domains.push(DomainStatus { name: domain.name, figures });
    }
    report.totals = sites::sum(report.domains.iter().map(|d| d.figures));
    for root in roots {
        report.warnings.extend(warnings(&root));
        report.roots.push(look.finish(root));
    }
    report.errors = look.errors;
    report.elapsed_s = started.elapsed().as_secs_f64();
    Ok(report)
}

impl Look<'_> {
    fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    fn error(&mut self, path: &Path, error: impl std::fmt::Display) {
        self.errors.push(StatusError { path: path.to_owned(), error: error.to_string() });
    }

    /// Manifest, upper, raw root. `None` with an error told when the manifest can't be read.
    fn root(
        &mut self,
        row: RootRow,
        target: Option<PathBuf>,
        mounts: Vec<ViewMount>,
        domains: &HashMap<u32, String>,
        all_mounts: &[mountinfo::Mount],
    ) -> Option<Looked> {
        let dir = self.store.root_dir(row.id, row.generation);
        let tree = match read_manifest(&dir) {
            Ok(tree) => tree,
            Err(e) => {
                self.error(&row.path, e);
                return None;
            }
        };
        let Found { written, unread } = written::read(&dir.join("upper"), self.cancel);
        let is_known = unread.is_empty();
        unread.into_iter().for_each(|(path, e)| self.error(&path, e));
        // Where more may be written than is known, nothing is claimed to be shared.
        let hidden = (is_known && !mounts.is_empty()).then(|| HiddenPaths::of(&written));
        let sites = self.sites.add_root(row.domain, &tree, hidden.as_ref(), self.page);
        let (raw_changes, raw_covered_by) =
            if self.config.quick { (None, None) } else { self.raw_changes(&row, &tree, all_mounts) };
        let status = RootStatus {
            id: row.id.0,
            name: row.name.clone(),
            path: row.path.clone(),
            domain: domains.get(&row.domain).cloned().unwrap_or_default(),
            generation: row.generation,
            sealed_at: row.sealed_at,
            files: sites.anchors.len() as u64,
            cache_bytes: 0,
            shared_bytes: 0,
            resident_bytes: 0,
            target,
            mounted: mounts.iter().map(|m| MountedAt { path: m.at.clone(), process: m.process }).collect(),
            processes: 0,
            mapped_bytes: 0,
            pss_file_bytes: 0,
            broken_files: written.broken.len() as u64,
            broken_bytes: written.broken.iter().map(|(_, bytes)| bytes).sum(),
            metadata_only_files: written.metadata_only.len() as u64,
            added_files: written.added,
            added_bytes: written.added_bytes,
            removed: written.removed.len() as u64,
            other_entries: written.others,
            raw_changes,
            raw_covered_by,
        };
        Some(Looked { row, sites, mounts, written, status })
    }

    /// What changed in the raw root; or what covers it.
    fn raw_changes(
        &mut self,
        row: &RootRow,
        tree: &Tree,
        mounts: &[mountinfo::Mount],
    ) -> (Option<raw_changes::RawChanges>, Option<String>) {
        let error = match open_raw_root_among(row, mounts) {
            Ok(raw) => return (Some(raw_changes::find(raw.as_fd(), tree, self.cancel)), None),
            Err(e) => e,
        };
        let cover = in_the_way(row, self.store.dir(), mounts);
        let told = cover.map(|m| format!("{} ({:?}) mounted at {:?}", m.kind, m.source, m.mount_point));
        if told.is_none() {
            self.error(&row.path, error);
        }
        (None, told)
    }

    /// Residency of every anchor, and who is charged for it.
    fn anchors(&mut self) -> Option<Vec<Payer>> {
        let mut charges = self
            .config
            .who_pays
            .then(payer::Charges::new)
            .and_then(|opened| opened.map_err(|e| self.error(Path::new("/proc/kpagecgroup"), e)).ok());
        let mut errors = Vec::new();
        for (key, site) in &mut self.sites.0 {
            if self.cancel.load(Ordering::Relaxed) {
                break;
            }
            if let Err(e) = look_at_anchor(self.store, key, site, charges.as_mut()) {
                let path = self.store.anchor_path(site.domain, key);
                errors.push(StatusError { path, error: e });
            }
        }
        self.errors.append(&mut errors);
        charges.map(|charges| charges.finish(self.page))
    }

    /// Pages that processes have mapped through mounted views.
    fn mapped(&mut self, roots: &mut [Looked]) -> Option<String> {
        let devices: Vec<mapped::Device> =
            roots.iter().filter_map(|root| root.mounts.first()).map(|m| m.device).collect();
        let mapped = mapped::read(&devices, self.cancel);
        // Somebody's protected process, or one of a tracer: it can't be counted, and nothing is claimed for it.
        let unreadable = (!mapped.unreadable.is_empty()).then(|| {
            format!(
                "the memory of some processes may not be read, what they have mapped is not counted: {:?}",
                mapped.unreadable
            )
        });
        if mapped.frames.is_empty() {
            return unreadable;
        }
        let mounts = self.store.dir().join("mounts");
        let images = self.images(roots, &mounts);
        let mut distinct: HashMap<AnchorKey, FrameSet> = HashMap::new();
        for root in roots.iter_mut() {
            let Some(device) = root.mounts.first().map(|m| m.device) else { continue };
            let diff = self.diff_inodes(&root.row);
            let Some(inodes) = ViewInodes::new(diff, &root.row.layers, &images) else { continue };
            for (key, frames) in Self::of_view(root, device, &mapped, &inodes) {
                root.status.mapped_bytes += frames.len() * self.page;
                if let Some(site) = self.sites.0.get_mut(&key) {
                    site.mapped_by_views += frames.len();
                }
                distinct.entry(key).or_default().add_all(&frames);
            }
            let processes = mapped.processes.get(&device).map_or(&[][..], |p| p);
            root.status.processes = processes.len() as u64;
            root.status.pss_file_bytes = processes.iter().map(|p| memcg::pss_file(*p)).sum();
        }
        for (key, frames) in distinct {
            if let Some(site) = self.sites.0.get_mut(&key) {
                site.mapped = frames.len();
            }
        }
        unreadable
    }

    /// Anchor pages that a view's processes have mapped: each once, none of files that the view has written.
    fn of_view(
        root: &Looked,
        device: mapped::Device,
        mapped: &Mapped,
        inodes: &ViewInodes<'_>,
    ) -> HashMap<AnchorKey, FrameSet> {
        let mut found: HashMap<AnchorKey, FrameSet> = HashMap::new();
        for ((_, shown), frames) in mapped.frames.iter().filter(|((of, _), _)| *of == device) {
            // A copied-up file keeps its number, and of a mapping nobody can tell whether it is older than the copy.
            if let Some(file) = inodes.file(*shown).filter(|file| !file.is_origin(&root.written.origins)) {
                found.entry(file.anchor).or_default().add_all(frames);
            }
        }
        found
    }

    /// The layer over the root's image.
    fn diff_inodes(&mut self, row: &RootRow) -> Option<ImageInodes> {
        let has = self.store.diff(row.id, row.generation).map(|diff| diff.is_some());
        let at = self.store.root_dir(row.id, row.generation).join(DIFF);
        let read = match has {
            Ok(false) => return None,
            Ok(true) => ImageInodes::read(&at).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        let too_small = |e| format!("the layer can't be read, savings now are too small: {e}");
        read.map_err(|e| self.error(&at, too_small(e))).ok()
    }

    /// The images of mounted views, each read once.
    fn images(&mut self, roots: &[Looked], mounts: &Path) -> HashMap<ImageDigest, ImageInodes> {
        let mut images = HashMap::new();
        for digest in roots.iter().filter(|r| !r.mounts.is_empty()).flat_map(|r| &r.row.layers) {
            if images.contains_key(digest) {
                continue;
            }
            let at = mounts.join(digest.to_string());
            match ImageInodes::read(&at) {
                Ok(inodes) => drop(images.insert(*digest, inodes)),
                Err(e) => self.error(&at, format!("the image can't be read, savings now are too small: {e}")),
            }
        }
        images
    }

    fn finish(&self, root: Looked) -> RootStatus {
        let pages = self.sites.of_root(&root.sites);
        RootStatus {
            cache_bytes: pages.all * self.page,
            shared_bytes: pages.shared * self.page,
            resident_bytes: pages.resident * self.page,
            ..root.status
        }
    }
}

fn look_at_anchor(
    store: &Store,
    key: &AnchorKey,
    site: &mut sites::Use,
    charges: Option<&mut payer::Charges>,
) -> Result<(), String> {
    let anchor = store.open_anchor(site.domain, key).map_err(|e| e.to_string())?;
    let of_cache = |e: io::Error| format!("what is cached of it can't be known: {e}");
    site.resident = cachestat(anchor.as_fd(), 0, 0).map_err(of_cache)?.nr_cache;
    match charges {
        Some(charges) if site.resident > 0 => charges.add(&anchor).map_err(of_cache),
        _ => Ok(()),
    }
}

fn warnings(root: &Looked) -> Vec<String> {
    let name = &root.row.name;
    let mut warnings = Vec::new();
    if !root.written.is_empty() {
        warnings.push(format!(
            "a snapshot or backup of the raw root of {name} misses what its view wrote ({} files changed, {} added, {} names \
             removed, {} directories, links and others touched): take it from the view, or use `pagefold export`",
            root.written.broken.len() + root.written.metadata_only.len(),
            root.written.added,
            root.written.removed.len(),
            root.written.others,
        ));
    }
    if let Some(changes) = root.status.raw_changes.as_ref().filter(|c| c.changed > 0) {
        let some = changes.examples.iter().map(|path| format!("{path:?}")).collect::<Vec<_>>().join(", ");
        warnings.push(format!(
            "the raw root of {name} changed after it was sealed ({} files or directories, such as {some}): its view shows it as \
             sealed; `pagefold seal` it again",
            changes.changed,
        ));
    }
    if let Some(cover) = &root.status.raw_covered_by {
        warnings.push(format!(
            "the raw root of {name} can't be reached, in the way is {cover}: whether it changed after it was sealed is not known, \
             and `commit` will refuse; unmount what is in the way",
        ));
    }
    if root.status.target.is_some() && root.mounts.is_empty() {
        warnings.push(format!(
            "the view of {name} is meant to be mounted and is not: `pagefold mount --restore`"
        ));
    }
    warnings
}
