//! The checkers: what must be true of a simulated kernel and an engine, looked at from outside of both.
//!
//! Invariant: a checker reads and never changes; what it finds is a sentence for a person. The headline: no reader ever
//! sees a byte that was not written to, or inherited by, what it reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagefold_engine::domain::Backend;
use pagefold_engine::engine::Engine;
use pagefold_engine::listener::Listener;
use pagefold_engine::units::{DomainId, MappingId, PageIndex, Site, Span};

use crate::model::Model;
use crate::sim::memory::{Entry, Kernel};

/// Translations that secondary users keep (a device's page table, say): site to what it showed. The kernel drops them
/// when it changes an entry on its own; for what the engine changes, its listeners must.
#[derive(Clone, Debug, Default)]
pub struct Translations {
    kept: Arc<Mutex<BTreeMap<Site, Entry>>>,
}

impl Translations {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<Site, Entry>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A secondary user looks a page up and keeps what it found.
    pub fn keep(&self, site: Site, entry: Entry) {
        self.kept().insert(site, entry);
    }

    /// Drops one.
    pub fn drop_site(&self, site: Site) {
        self.kept().remove(&site);
    }

    fn drop_span(&self, span: Span) {
        self.kept().retain(|site, _| !span.contains(*site));
    }
}

impl Listener for Translations {
    fn start(&mut self, _: Span) {}

    fn invalidate(&mut self, span: Span) {
        self.drop_span(span);
    }

    fn end(&mut self, _: Span) {}
}

/// Every page of every mapping and file against the model.
///
/// # Errors
/// The first page that shows what it should not.
pub fn bytes(kernel: &Kernel, model: &Model) -> Result<(), String> {
    for mapping in kernel.live() {
        let (_, span) = kernel.registration(mapping).expect("it lives");
        for page in span.start.0..span.end().0 {
            let site = Site { mapping, offset: PageIndex(page) };
            let Some(seen) = kernel.shown_bytes(site) else { continue };
            let expected = model.expected(site);
            if expected.as_ref() != Some(&seen) {
                let at = expected.as_ref().map(|e| e.iter().zip(&seen).position(|(a, b)| a != b));
                return Err(format!(
                    "page {page} of mapping {mapping} ({:?}) shows bytes of {}; it should show those of {}; first \
                     difference {at:?}",
                    kernel.entry(site),
                    model.whose(&seen),
                    expected.map_or("nothing (past EOF)".to_owned(), |e| model.whose(&e)),
                ));
            }
        }
    }
    for file in &kernel.files {
        let size = kernel.world.stat(*file).map_err(|e| e.to_string())?.size;
        if size != model.file_size(*file) {
            return Err(format!("{file:?} is {size} bytes, not {}", model.file_size(*file)));
        }
        for page in 0..kernel.world.page.pages_covering(size).0 {
            let seen = kernel.world.peek_page(*file, page).map_err(|e| e.to_string())?;
            if model.file_page(*file, PageIndex(page)).as_ref() != Some(&seen) {
                return Err(format!("page {page} of {file:?} reads bytes of {}", model.whose(&seen)));
            }
        }
    }
    Ok(())
}

/// Shared pages never cross domains, and secondary users keep nothing stale.
///
/// # Errors
/// The first that does.
pub fn structure(kernel: &Kernel) -> Result<(), String> {
    let mut domain_of = BTreeMap::new();
    for (site, entry) in entries(kernel) {
        let Entry::Shared(page, _) = entry else { continue };
        let domain = kernel.registration(site.mapping).expect("it lives").0.domain;
        let first: &mut DomainId = domain_of.entry(page).or_insert(domain);
        if *first != domain {
            return Err(format!("{page:?} is shown in domains {first} and {domain}"));
        }
    }
    for (site, kept) in kernel.translations.kept().iter() {
        if kernel.entry(*site) != Some(*kept) {
            let now = kernel.entry(*site);
            return Err(format!("a secondary user still has {kept:?} for {site:?}, which is {now:?} now"));
        }
    }
    Ok(())
}

fn entries(kernel: &Kernel) -> Vec<(Site, Entry)> {
    let all = |m: MappingId| {
        let (_, span) = kernel.registration(m).expect("it lives");
        (span.start.0..span.end().0).map(move |p| Site { mapping: m, offset: PageIndex(p) })
    };
    kernel.live().into_iter().flat_map(all).filter_map(|s| kernel.entry(s).map(|e| (s, e))).collect()
}

/// K-028 by what is published, in every account and in total.
///
/// # Errors
/// The account that does not add up.
pub fn counters(engine: &Engine) -> Result<(), String> {
    let accounts = engine.counters().accounts().map(|(owner, account)| (Some(owner), account.gauges));
    for (owner, g) in accounts.chain([(None, engine.total().gauges)]) {
        let sum = g.pages_shared + g.pages_sharing + g.pages_unshared + g.zero_pages + g.pages_volatile();
        if sum != g.sites {
            return Err(format!(
                "{owner:?}: {} sites, but the states add up to {sum}: {g:?} (K-028)",
                g.sites
            ));
        }
    }
    Ok(())
}

/// When all is quiet the engine's figures are the kernel's: what is shown as shared is what is counted as shared.
///
/// # Errors
/// The figure that is not.
pub fn figures(kernel: &Kernel, engine: &Engine) -> Result<(), String> {
    let mut pages = BTreeSet::new();
    let (mut sites, mut zeros) = (0, 0);
    for (_, entry) in entries(kernel) {
        match entry {
            Entry::Shared(page, _) => {
                pages.insert(page);
                sites += 1;
            }
            Entry::Zero(_) => zeros += 1,
            Entry::Own(_) | Entry::File => {}
        }
    }
    let told = engine.total().gauges;
    let truth = (pages.len() as u64, sites - pages.len() as u64, zeros);
    if (told.pages_shared, told.pages_sharing, told.zero_pages) != truth {
        return Err(format!(
            "(shared, sharing, zero) are {truth:?} in the kernel, but the engine says {told:?}"
        ));
    }
    let by_backend: u64 = Backend::ALL.iter().map(|b| engine.counters().of_backend(*b).gauges.sites).sum();
    if by_backend != told.sites {
        return Err(format!("backends have {by_backend} sites together, in total there are {}", told.sites));
    }
    Ok(())
}

/// Nothing is left of merging: no shared page, no protection, and, once all mappings are gone, no frame.
///
/// # Errors
/// What is left.
pub fn nothing_left(kernel: &Kernel, engine: &Engine) -> Result<(), String> {
    let left = kernel.leftovers();
    if !left.is_empty() {
        return Err(format!("left behind: {}", left.join(", ")));
    }
    let gauges = engine.total().gauges;
    if kernel.live().is_empty() && !gauges.is_zero() {
        return Err(format!("all mappings are gone and the gauges say {gauges:?}"));
    }
    if gauges.pages_shared + gauges.pages_sharing + gauges.zero_pages != 0 {
        return Err(format!("nothing is merged and the gauges say {gauges:?}"));
    }
    Ok(())
}
