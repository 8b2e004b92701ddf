//! Brings anchors into the page cache in a memory group of pagefold's own.
//!
//! The kernel charges a page to the group of the process that brings it in (design 11). Without this the container that reads a
//! shared file first pays for all others. Read here beforehand, the pages are charged to this group and every container gets
//! them for nothing.
//!
//! Invariant: reads only; never more than asked for. The group stays when we are done: its pages are its charge. What it
//! deliberately does not do: move what is already charged to somebody, unless told to drop it from the cache first; keep pages
//! from being reclaimed.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use pagefold_sys::cache::{cachestat, drop_cached};
use serde::Serialize;

use crate::scan::as_text;

use super::tree::{Data, Node};
use crate::memcg::{Hierarchy, MemcgError, kib_field};
use crate::store::manifest::{ManifestError, read_manifest};
use crate::store::{AnchorKey, ImageDigest, RootRow, Store, StoreError};

/// The schema's name.
pub const SCHEMA: &str = "pagefold.prefault/1";
/// The group's name unless the user chooses another.
pub const GROUP: &str = "pagefold";
/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// Which anchors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that have pages in the cache now: somebody used them not long ago. What is missing of them is read.
    Hot,
    /// All that two or more files of sealed roots show, those with the most first.
    Shared,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct PrefaultConfig {
    /// Only anchors of these roots; all when empty.
    pub roots: Vec<RootRow>,
    /// Which of them.
    pub which: Which,
    /// Bytes to read at most.
    pub max_bytes: u64,
    /// Name of the memory group.
    pub group: String,
    /// Drop what is cached first, so that it is charged anew; mapped pages stay where they are.
    pub recharge: bool,
}

impl PrefaultConfig {
    /// Shared anchors of all roots, up to a quarter of the memory that is available now.
    #[must_use]
    pub fn new() -> PrefaultConfig {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        PrefaultConfig {
            roots: Vec::new(),
            which: Which::Shared,
            max_bytes: kib_field(&meminfo, "MemAvailable:") / 4,
            group: GROUP.to_owned(),
            recharge: false,
        }
    }
}

impl Default for PrefaultConfig {
    fn default() -> Self {
        PrefaultConfig::new()
    }
}

/// What was done. Bytes of whole pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PrefaultReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// It was interrupted.
    pub partial: bool,
    /// The group's directory.
    #[serde(serialize_with = "as_text")]
    pub group: PathBuf,
    /// Page cache that the group is charged for now.
    pub group_charge_bytes: u64,
    /// Anchors and images chosen.
    pub chosen: u64,
    /// Of these, read (or what was missing of them).
    pub read: u64,
    /// What was missing and was read.
    pub read_bytes: u64,
    /// Cached before: charged to whoever brought it in.
    pub cached_before_bytes: u64,
    /// Chosen and not read because of the limit.
    pub over_limit: u64,
    /// What could not be read.
    pub errors: Vec<String>,
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrefaultError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Memory groups.
    #[error(transparent)]
    Memcg(#[from] MemcgError),
}

/// Reads what `config` says, with **this whole process** in the group meanwhile.
///
/// # Errors
/// [`PrefaultError`]; a file that can't be read is named in the report.
pub fn prefault(
    store: &Store,
    config: &PrefaultConfig,
    cancel: &AtomicBool,
) -> Result<PrefaultReport, PrefaultError> {
    let chosen = choose(store, config)?;
    let hierarchy = Hierarchy::open(&std::env::temp_dir())?;
    let group = hierarchy.group(&config.group)?;
    let mut report = PrefaultReport {
        schema: SCHEMA,
        partial: false,
        group: group.path().to_owned(),
        group_charge_bytes: 0,
        chosen: 0,
        read: 0,
        read_bytes: 0,
        cached_before_bytes: 0,
        over_limit: 0,
        errors: Vec::new(),
    };
    let entered = group.enter(&hierarchy)?;
    for item in chosen {
        if cancel.load(Ordering::Relaxed) {
            report.partial = true;
            break;
        }
        let opened = match &item {
            Item::Image(digest) => store.open_image(digest),
            Item::Anchor(domain, key) => store.open_anchor(*domain, key),
        };
        let done = opened.map_err(|e| e.to_string()).and_then(|file| {
            bring_in(&file, config, cancel, &mut report).map_err(|e| format!("{item:?}: {e}"))
        });
        report.errors.extend(done.err());
    }
    drop(entered);
    report.group_charge_bytes = group.charge()?.file;
    Ok(report)
}

/// Something to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Image(ImageDigest),
    Anchor(u32, AnchorKey),
}

/// In the order in which they are to be read: images (every view reads them), then anchors, those with most sites first.
fn choose(store: &Store, config: &PrefaultConfig) -> Result<Vec<Item>, PrefaultError> {
    let all = store.roots()?;
    let wanted = |row: &RootRow| config.roots.is_empty() || config.roots.iter().any(|r| r.id == row.id);
    let mut sites: HashMap<(u32, AnchorKey), u64> = HashMap::new();
    let (mut of_wanted, mut images) = (BTreeSet::new(), BTreeSet::new());
    for row in &all {
        let tree = read_manifest(&store.root_dir(row.id, row.generation))?;
        for inode in &tree.inodes {
            if let Node::File { data: Data::Anchor(key), .. } = &inode.node {
                *sites.entry((row.domain, *key)).or_default() += 1;
                if wanted(row) {
                    of_wanted.insert((row.domain, *key));
                }
            }
        }
        if wanted(row) {
            images.extend(row.layers.iter().copied());
        }
    }
    let mut anchors: Vec<(u64, u32, AnchorKey)> =
        of_wanted.into_iter().map(|(domain, key)| (sites[&(domain, key)], domain, key)).collect();
    anchors.retain(|(sites, domain, key)| match config.which {
        Which::Shared => *sites > 1,
        Which::Hot => is_cached(store, *domain, key),
    });
    anchors.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.2.cmp(&b.2)));
    let anchors = anchors.into_iter().map(|(_, domain, key)| Item::Anchor(domain, key));
    Ok(images.into_iter().map(Item::Image).chain(anchors).collect())
}

fn is_cached(store: &Store, domain: u32, key: &AnchorKey) -> bool {
    let file = store.open_anchor(domain, key).ok();
    file.and_then(|f| cachestat(f.as_fd(), 0, 0).ok()).is_some_and(|stat| stat.nr_cache > 0)
}

fn bring_in(
    file: &File,
    config: &PrefaultConfig,
    cancel: &AtomicBool,
    report: &mut PrefaultReport,
) -> io::Result<()> {
    let page = rustix::param::page_size() as u64;
    let size = file.metadata()?.len();
    let pages = size.div_ceil(page);
    report.chosen += 1;
    let fits = |missing: u64, report: &PrefaultReport| report.read_bytes + missing * page <= config.max_bytes;
    if config.recharge {
        // Only what can be read again within the limit: a cold cache would be a poor service.
        if !fits(pages, report) {
            report.over_limit += 1;
            return Ok(());
        }
        drop_cached(file, 0, size)?;
    }
    let cached = cachestat(file.as_fd(), 0, 0)?.nr_cache.min(pages);
    report.cached_before_bytes += cached * page;
    if cached == pages {
        return Ok(());
    }
    if !fits(pages - cached, report) {
        report.over_limit += 1;
        return Ok(());
    }
    let (mut reader, mut buffer) = (file, vec![0; BUFFER.min(usize::try_from(size).unwrap_or(BUFFER))]);
    loop {
        // What was not read to its end is not told as read.
        if cancel.load(Ordering::Relaxed) {
            report.partial = true;
            return Ok(());
        }
        if reader.read(&mut buffer)? == 0 {
            break;
        }
    }
    report.read += 1;
    report.read_bytes += (pages - cached) * page;
    Ok(())
}
