//! The memory side of the simulated kernel: mappings, page frames, shared pages, protections.
//!
//! Invariants: a frame is in exactly one entry, or pinned, or gone; a shared page lives while its creator or any entry
//! holds it; a protection is set and lifted only by the merge host, and its stamp dies with the first change of the page.
//! What user programs do is in `user`, what the engine may do in `host`. Expected bytes are nobody's business here:
//! operations leave [`Fact`]s behind, and the reference model makes up its own mind.

use std::collections::{BTreeMap, BTreeSet};

use pagefold_engine::domain::Registration;
use pagefold_engine::host::{Private, ProtectKind, SharedPage, Stamp};
use pagefold_engine::identity::{AddressSpace, DeviceClass, Undecided};
use pagefold_engine::layout::{CacheState, Layout, MapFacts};
use pagefold_engine::units::{FsId, MappingId, PageIndex, Site, Span};

use super::bugs::Plant;
use super::node::NodeId;
use super::rng::Rng;
use super::world::World;
use crate::model::Fact;
use crate::run::plan::Plan;

/// A page frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId(pub u64);

/// What one page of a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Memory of its own.
    Own(FrameId),
    /// The file's page (private mapping, not yet written).
    File,
    /// A shared page.
    Shared(SharedPage, Private),
    /// The zero page.
    Zero(Private),
}

/// A protection of one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protection {
    pub stamp: Stamp,
    pub kind: ProtectKind,
    /// Nothing happened to the page since.
    pub holds: bool,
    /// Came by fork: the engine may not know of it, so it goes by itself when the copy stops being shared.
    pub forked: bool,
}

/// A mapping.
#[derive(Clone, Debug)]
pub(crate) struct Mapping {
    pub reg: Registration,
    pub file: Option<NodeId>,
    pub pages: u64,
    pub entries: BTreeMap<u64, Entry>,
    pub protections: BTreeMap<u64, Protection>,
    /// Pages of a file mapping that were stored to: they are the mapping's own for good, shared or not.
    pub cowed: BTreeSet<u64>,
}

/// Where a shared page's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    /// A page of an anchor, a file that nobody can name.
    Anchor { node: NodeId, page: u64 },
    /// Memory.
    Memory(Box<[u8]>),
}

#[derive(Clone, Debug)]
pub(crate) struct SharedInfo {
    pub home: Home,
    /// The engine has not released it.
    pub creator: bool,
    pub shown: u64,
}

/// A user's operation that has to wait for a break.
#[derive(Clone, Debug)]
pub enum Held {
    /// A store into a write-protected page.
    Store {
        /// Where.
        site: Site,
        /// Byte in the page.
        offset: usize,
        /// What.
        bytes: Vec<u8>,
    },
    /// A write to a leased file.
    Write {
        /// Which.
        file: NodeId,
        /// Byte in the file.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Truncation of a leased file.
    Cut {
        /// Which.
        file: NodeId,
        /// New size in bytes.
        size: u64,
    },
}

/// What the engine has to be told, when the time comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Pages of a mapping from here on are gone.
    Truncated(MappingId, PageIndex),
    /// A mapping exits.
    Exit(MappingId),
}

/// The simulated kernel.
pub struct Kernel {
    /// Files.
    pub world: World,
    /// Chance of intruders and faults.
    pub(crate) rng: Rng,
    /// What may happen, how often.
    pub plan: Plan,
    /// The bug planted, if any.
    pub plant: Option<Plant>,
    /// What was done to bytes, in order; the model takes them.
    pub facts: Vec<Fact>,
    /// Not yet told to the engine.
    pub events: Vec<Event>,
    /// Operations held back since the last look.
    pub held: Vec<Held>,
    /// What other users keep as translations of pages; listeners drop them.
    pub translations: crate::check::Translations,
    /// Operations so far, in words.
    pub trace: Vec<String>,
    /// Whether others may act inside the engine's calls, and calls may fail.
    pub rough: bool,
    pub(crate) frames: BTreeMap<FrameId, Box<[u8]>>,
    pub(crate) pins: BTreeMap<Site, FrameId>,
    pub(crate) mappings: BTreeMap<MappingId, Mapping>,
    pub(crate) shared: BTreeMap<SharedPage, SharedInfo>,
    pub(crate) writers: BTreeMap<NodeId, u32>,
    pub(crate) storing: BTreeSet<Site>,
    pub(crate) hints: BTreeMap<NodeId, Layout>,
    pub(crate) files: Vec<NodeId>,
    next: u64,
}

impl Kernel {
    /// A kernel over `world`, with nothing mapped.
    #[must_use]
    pub fn new(world: World, plan: Plan, rng: Rng) -> Kernel {
        Kernel {
            world,
            rng,
            plan,
            plant: None,
            facts: Vec::new(),
            events: Vec::new(),
            held: Vec::new(),
            translations: crate::check::Translations::default(),
            trace: Vec::new(),
            rough: true,
            frames: BTreeMap::new(),
            pins: BTreeMap::new(),
            mappings: BTreeMap::new(),
            shared: BTreeMap::new(),
            writers: BTreeMap::new(),
            storing: BTreeSet::new(),
            hints: BTreeMap::new(),
            files: Vec::new(),
            next: 1,
        }
    }

    pub(crate) fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.world.page.bytes() as usize
    }

    /// Mappings that live.
    #[must_use]
    pub fn live(&self) -> Vec<MappingId> {
        self.mappings.keys().copied().collect()
    }

    /// How a mapping registers, and how long it is; `None` when it is gone.
    #[must_use]
    pub fn registration(&self, mapping: MappingId) -> Option<(Registration, Span)> {
        let m = self.mappings.get(&mapping)?;
        Some((
            m.reg,
            Span { mapping, start: PageIndex(0), pages: pagefold_engine::units::PageCount(m.pages) },
        ))
    }

    /// What a page shows; `None` when nothing is mapped there.
    #[must_use]
    pub fn entry(&self, site: Site) -> Option<Entry> {
        self.mappings.get(&site.mapping)?.entries.get(&site.offset.0).copied()
    }

    /// What a reader of the mapping sees, without a fault; `None` when nothing is there yet.
    #[must_use]
    pub fn shown_bytes(&self, site: Site) -> Option<Vec<u8>> {
        let mapping = self.mappings.get(&site.mapping)?;
        Some(match self.entry(site)? {
            Entry::Own(frame) => self.frames[&frame].to_vec(),
            Entry::File => self.world.peek_page(mapping.file?, site.offset.0).expect("a mapped file lives"),
            Entry::Shared(page, _) => self.shared_bytes(page),
            Entry::Zero(_) => vec![0; self.page_bytes()],
        })
    }

    pub(crate) fn shared_bytes(&self, page: SharedPage) -> Vec<u8> {
        match &self.shared.get(&page).unwrap_or_else(|| panic!("shared page {page:?} is shown and gone")).home
        {
            Home::Anchor { node, page } => self.world.peek_page(*node, *page).expect("an anchor lives"),
            Home::Memory(bytes) => bytes.to_vec(),
        }
    }

    pub(crate) fn new_frame(&mut self, bytes: Vec<u8>) -> FrameId {
        let id = FrameId(self.fresh());
        self.frames.insert(id, bytes.into());
        id
    }

    /// Replaces an entry, dropping what it held. The one place where entries change.
    pub(crate) fn set_entry(&mut self, site: Site, entry: Option<Entry>) {
        let mapping = self.mappings.get_mut(&site.mapping).expect("the mapping lives");
        let before = match entry {
            Some(e) => mapping.entries.insert(site.offset.0, e),
            None => mapping.entries.remove(&site.offset.0),
        };
        if let Some(Entry::Shared(page, _)) = entry {
            self.shared.get_mut(&page).expect("only live pages are shown").shown += 1;
        }
        match before {
            Some(Entry::Own(frame)) if entry != before => self.drop_frame(frame),
            Some(Entry::Shared(page, _)) => {
                self.shared.get_mut(&page).expect("it was shown").shown -= 1;
                self.reap_shared(page);
            }
            _ => {}
        }
    }

    /// The same for what user programs and the kernel do on their own: secondary users are told by the kernel.
    pub(crate) fn change_entry(&mut self, site: Site, entry: Option<Entry>) {
        self.set_entry(site, entry);
        self.translations.drop_site(site);
    }

    fn drop_frame(&mut self, frame: FrameId) {
        if !self.pins.values().any(|f| *f == frame) {
            self.frames.remove(&frame);
        }
    }

    pub(crate) fn unpin(&mut self, site: Site) {
        let Some(frame) = self.pins.remove(&site) else { return };
        if self.entry(site) != Some(Entry::Own(frame)) {
            self.drop_frame(frame);
        }
    }

    pub(crate) fn reap_shared(&mut self, page: SharedPage) {
        let gone = self.shared.get(&page).is_some_and(|s| !s.creator && s.shown == 0);
        if gone && let Some(SharedInfo { home: Home::Anchor { node, .. }, .. }) = self.shared.remove(&page) {
            self.world.let_go(node);
        }
    }

    /// The page changed: whatever stamp it has holds no more.
    pub(crate) fn spoil(&mut self, site: Site) {
        let Some(mapping) = self.mappings.get_mut(&site.mapping) else { return };
        match mapping.protections.get_mut(&site.offset.0) {
            Some(p) if p.forked => drop(mapping.protections.remove(&site.offset.0)),
            Some(p) => p.holds = false,
            None => {}
        }
    }

    /// Somebody waits to change the page.
    pub(crate) fn shake(&mut self, site: Site) {
        let mapping = self.mappings.get_mut(&site.mapping);
        if let Some(p) = mapping.and_then(|m| m.protections.get_mut(&site.offset.0)) {
            p.holds = false;
        }
    }

    /// Mappings of a file.
    pub(crate) fn mappings_of(&self, file: NodeId) -> Vec<MappingId> {
        self.mappings.iter().filter(|(_, m)| m.file == Some(file)).map(|(id, _)| *id).collect()
    }

    /// Whether a writer of this file must wait: somebody holds a lease on it.
    pub(crate) fn is_leased(&self, file: NodeId) -> bool {
        self.mappings.values().any(|m| m.file == Some(file) && !m.protections.is_empty())
    }

    /// A file's map judged as of now, or `None` where there is none to have. With `sync` dirty pages are written first.
    pub(crate) fn judged(&mut self, file: NodeId, sync: bool) -> Option<(Layout, CacheState)> {
        if sync {
            self.world.sync(file).ok()?;
        }
        let dirty = |w: &World| w.cache_counts(file).map(|c| c.dirty + c.writeback).unwrap_or(1);
        let before = dirty(&self.world);
        let mut extents = Vec::new();
        self.world.extent_map(file, &mut extents).ok()?;
        let clean = before == 0 && dirty(&self.world) == 0;
        let blind = matches!(self.plant, Some(Plant::DirtyUnseen));
        let cache = if clean || blind { CacheState::Clean } else { CacheState::Dirty };
        let node = self.world.node(file).ok()?;
        let realtime = node.file()?.realtime;
        let class = if realtime { DeviceClass::Realtime } else { DeviceClass::Data };
        let space = Some(AddressSpace { fs: FsId(node.fs.0 as u16), class });
        let size = node.file()?.size;
        let facts = MapFacts { size, extents: &extents, space, cache, page: self.world.page };
        Some((Layout::from_extents(facts), cache))
    }

    /// What is remembered of a file's map, which may be old.
    pub(crate) fn hint(&mut self, file: NodeId) -> Layout {
        if self.rng.percent(self.plan.stale_hints)
            && let Some(old) = self.hints.get(&file)
        {
            return old.clone();
        }
        let size = self.world.stat(file).map_or(0, |a| a.size);
        let page = self.world.page;
        let now = self.judged(file, false).map(|j| j.0);
        let layout = now.unwrap_or_else(|| Layout::undecided(size, page, Undecided::NoExtentMap));
        self.hints.insert(file, layout.clone());
        layout
    }

    /// What of merging is left, in words; with all mappings gone also what of memory.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = self.shared.keys().map(|p| format!("{p:?}")).collect();
        for (id, m) in &self.mappings {
            left.extend(m.protections.keys().map(|p| format!("the protection of page {p} of mapping {id}")));
        }
        if self.mappings.is_empty() {
            left.extend(self.frames.keys().map(|f| format!("{f:?}")));
            left.extend(self.world.unnamed_files().iter().map(|f| format!("anchor {f:?}")));
        }
        left
    }
}
