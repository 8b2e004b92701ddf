//! What user programs and the kernel itself do to memory and files, with or without the engine looking.
//!
//! Every operation either happens and leaves a fact, or is held back because a protection says so, or fails and
//! changes nothing. Some happen in the middle of the engine's calls (`intrude`), as they would.

use pagefold_engine::domain::Registration;
use pagefold_engine::host::{MappingKind, ProtectKind, SharedPage, SharedSpan, Stamp};
use pagefold_engine::units::{MappingId, PageCount, PageIndex, Site};

use super::bugs::Plant;
use super::memory::{Entry, Event, Held, Kernel, Mapping, Protection};
use super::node::{FsIx, NodeId};
use crate::model::Fact;
use crate::run::plan::Op;

/// How a user's operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    /// It happened.
    Done,
    /// It waits in [`Kernel::held`] until what it touches is un-merged.
    Waits,
    /// It failed (bus error, no space, no such page).
    Failed,
}

impl Kernel {
    /// Maps `pages` pages: of a file (private), or anonymous.
    ///
    /// # Panics
    /// When the file is gone.
    pub fn map(&mut self, reg: Registration, file: Option<NodeId>, pages: u64) {
        if let Some(file) = file {
            self.world.hold(file).expect("only files that live are mapped");
        }
        let (entries, protections, cowed) = Default::default();
        self.mappings.insert(reg.mapping, Mapping { reg, file, pages, entries, protections, cowed });
        self.facts.push(Fact::Mapped { mapping: reg.mapping, file });
    }

    /// Faults a page in; false past EOF.
    pub fn touch(&mut self, site: Site) -> bool {
        if self.entry(site).is_some() {
            return true;
        }
        let Some(mapping) = self.mappings.get(&site.mapping) else { return false };
        let entry = match mapping.file {
            Some(file) => {
                let size = self.world.stat(file).map_or(0, |a| a.size);
                if site.offset.0 >= self.world.page.pages_covering(size).0 {
                    return false;
                }
                Entry::File
            }
            None => Entry::Own(self.new_frame(vec![0; self.page_bytes()])),
        };
        self.change_entry(site, Some(entry));
        true
    }

    /// A store through a mapping.
    pub fn store(&mut self, site: Site, offset: usize, bytes: &[u8]) -> Did {
        if !self.touch(site) {
            return Did::Failed;
        }
        let mapping = &self.mappings[&site.mapping];
        let protection = mapping.protections.get(&site.offset.0).map(|p| p.kind);
        let entry = self.entry(site).expect("just touched");
        let shared = matches!(entry, Entry::Shared(..) | Entry::Zero(_));
        let waits = protection == Some(ProtectKind::Wp) || (shared && mapping.reg.protect == ProtectKind::Wp);
        if waits && self.plant == Some(Plant::WriterUnnoticed) && self.scribble(entry, offset, bytes) {
            self.facts.push(Fact::Stored { site, offset, bytes: bytes.to_vec() });
            return Did::Done;
        }
        if waits {
            self.shake(site);
            self.storing.insert(site);
            self.held.push(Held::Store { site, offset, bytes: bytes.to_vec() });
            return Did::Waits;
        }
        self.spoil(site);
        match entry {
            Entry::Own(frame) => {
                let page = self.frames.get_mut(&frame).expect("an entry's frame lives");
                page[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            _ => {
                let mut page = self.shown_bytes(site).expect("just touched");
                page[offset..offset + bytes.len()].copy_from_slice(bytes);
                let frame = self.new_frame(page);
                self.change_entry(site, Some(Entry::Own(frame)));
                self.mappings.get_mut(&site.mapping).expect("just touched").cowed.insert(site.offset.0);
            }
        }
        self.facts.push(Fact::Stored { site, offset, bytes: bytes.to_vec() });
        Did::Done
    }

    /// The planted bug: a store that nobody noticed goes where the entry points, shared or not.
    fn scribble(&mut self, entry: Entry, offset: usize, bytes: &[u8]) -> bool {
        use super::memory::Home;
        let page = match entry {
            Entry::Own(frame) => self.frames.get_mut(&frame),
            Entry::Shared(page, _) => self.shared.get_mut(&page).and_then(|s| match &mut s.home {
                Home::Memory(bytes) => Some(bytes),
                Home::Anchor { .. } => None,
            }),
            Entry::File | Entry::Zero(_) => None,
        };
        page.map(|p| p[offset..offset + bytes.len()].copy_from_slice(bytes)).is_some()
    }

    /// `write(2)` to a file.
    pub fn write_file(&mut self, file: NodeId, offset: u64, bytes: &[u8]) -> Did {
        if self.is_leased(file) && self.plant != Some(Plant::WriterUnnoticed) {
            *self.writers.entry(file).or_insert(0) += 1;
            self.held.push(Held::Write { file, offset, bytes: bytes.to_vec() });
            return Did::Waits;
        }
        if self.world.write_at(file, offset, bytes).is_err() {
            return Did::Failed;
        }
        self.facts.push(Fact::Written { file, offset, bytes: bytes.to_vec() });
        Did::Done
    }

    /// `truncate(2)` of a file: announced as a write is.
    pub fn cut_file(&mut self, file: NodeId, size: u64) -> Did {
        if self.is_leased(file) && self.plant != Some(Plant::WriterUnnoticed) {
            *self.writers.entry(file).or_insert(0) += 1;
            self.held.push(Held::Cut { file, size });
            return Did::Waits;
        }
        self.cut_now(file, size)
    }

    /// `open(O_TRUNC)`: no lease stops it (design 7); the engine hears of it afterwards.
    pub fn slip_cut(&mut self, file: NodeId) -> Did {
        self.cut_now(file, 0)
    }

    fn cut_now(&mut self, file: NodeId, size: u64) -> Did {
        if self.world.truncate(file, size).is_err() {
            return Did::Failed;
        }
        self.facts.push(Fact::Cut { file, size });
        let from = self.world.page.pages_covering(size).0;
        for mapping in self.mappings_of(file) {
            self.mappings.get_mut(&mapping).expect("listed").cowed.retain(|p| *p < from);
            let gone: Vec<u64> = self.mappings[&mapping].entries.range(from..).map(|(p, _)| *p).collect();
            for page in gone {
                let site = Site { mapping, offset: PageIndex(page) };
                self.spoil(site);
                self.change_entry(site, None);
            }
            self.events.push(Event::Truncated(mapping, PageIndex(from)));
        }
        Did::Done
    }

    /// Pins a page of anonymous memory for a device to write to.
    pub fn pin(&mut self, site: Site) -> Did {
        let Some(Entry::Own(frame)) = self.entry(site) else { return Did::Failed };
        let protected = self.mappings[&site.mapping].protections.get(&site.offset.0).map(|p| p.kind);
        if self.pins.contains_key(&site) || protected == Some(ProtectKind::Wp) {
            return Did::Failed;
        }
        self.spoil(site);
        self.pins.insert(site, frame);
        Did::Done
    }

    /// The device writes to a pinned frame, wherever that is mapped by now, and is done with it.
    pub fn finish_dma(&mut self, bytes: &[u8]) -> Did {
        let sites: Vec<Site> = self.pins.keys().copied().collect();
        let Some(site) = self.rng.pick(&sites).copied() else { return Did::Failed };
        let frame = self.pins[&site];
        self.frames.get_mut(&frame).expect("pinned frames live")[..bytes.len()].copy_from_slice(bytes);
        self.facts.push(Fact::Stored { site, offset: 0, bytes: bytes.to_vec() });
        self.unpin(site);
        Did::Done
    }

    /// Copies a mapping as fork does: entries, not records. Copies of shared pages are as protected as the originals.
    ///
    /// # Panics
    /// When the parent is gone.
    pub fn fork(&mut self, parent: MappingId, child: MappingId) {
        let original = self.mappings[&parent].clone();
        if let Some(file) = original.file {
            self.world.hold(file).expect("a mapped file lives");
        }
        let reg = Registration { mapping: child, ..original.reg };
        let (file, pages, cowed) = (original.file, original.pages, original.cowed);
        let (entries, protections) = Default::default();
        self.mappings.insert(child, Mapping { reg, file, pages, entries, protections, cowed });
        self.facts.push(Fact::Forked { parent, child });
        for (page, entry) in original.entries {
            let site = Site { mapping: child, offset: PageIndex(page) };
            let copy = match entry {
                Entry::Own(frame) => {
                    let bytes = self.frames[&frame].to_vec();
                    Entry::Own(self.new_frame(bytes))
                }
                Entry::Shared(..) | Entry::Zero(_) => {
                    let stamp = Stamp(self.fresh());
                    let protection =
                        Protection { stamp, kind: original.reg.protect, holds: true, forked: true };
                    let child = self.mappings.get_mut(&child).expect("just made");
                    child.protections.insert(page, protection);
                    entry
                }
                Entry::File => entry,
            };
            self.set_entry(site, Some(copy));
        }
    }

    /// A mapping goes, with its pages, pins and protections.
    pub fn exit(&mut self, mapping: MappingId) {
        if !self.mappings.contains_key(&mapping) {
            return;
        }
        let pinned: Vec<Site> = self.pins.keys().copied().filter(|s| s.mapping == mapping).collect();
        pinned.into_iter().for_each(|s| self.unpin(s));
        let pages: Vec<u64> = self.mappings[&mapping].entries.keys().copied().collect();
        for page in pages {
            self.change_entry(Site { mapping, offset: PageIndex(page) }, None);
        }
        let gone = self.mappings.remove(&mapping).expect("looked at above");
        if let Some(file) = gone.file {
            self.world.let_go(file);
        }
        self.storing.retain(|s| s.mapping != mapping);
        self.held.retain(|h| !matches!(h, Held::Store { site, .. } if site.mapping == mapping));
        self.facts.push(Fact::Exited { mapping });
        self.events.push(Event::Exit(mapping));
    }

    /// Tries a held operation again; held once more if it still has to wait.
    pub fn retry(&mut self, held: Held) -> Did {
        match held {
            Held::Store { site, offset, bytes } => {
                self.storing.remove(&site);
                self.store(site, offset, &bytes)
            }
            Held::Write { file, offset, bytes } => {
                self.writer_left(file);
                self.write_file(file, offset, &bytes)
            }
            Held::Cut { file, size } => {
                self.writer_left(file);
                self.cut_file(file, size)
            }
        }
    }

    fn writer_left(&mut self, file: NodeId) {
        if let Some(n) = self.writers.get_mut(&file) {
            *n -= 1;
            if *n == 0 {
                self.writers.remove(&file);
            }
        }
    }

    /// Bytes worth writing: one of a few pages' contents, so that equal pages come about, or something new.
    pub fn some_bytes(&mut self) -> Vec<u8> {
        let len = self.page_bytes();
        match self.rng.below(10) {
            0 => vec![0; len],
            1..=6 => {
                let which = self.rng.below(4);
                super::rng::Rng::new(which + 77).bytes(len)
            }
            _ => {
                let len = 1 + self.rng.below(len as u64) as usize;
                self.rng.bytes(len)
            }
        }
    }

    /// Some page of some mapping.
    pub fn some_site(&mut self, kind: Option<MappingKind>) -> Option<Site> {
        let fits = |m: &Mapping| kind.is_none_or(|k| m.reg.kind == k);
        let all: Vec<(MappingId, u64)> =
            self.mappings.iter().filter(|(_, m)| fits(m)).map(|(id, m)| (*id, m.pages)).collect();
        let (mapping, pages) = *self.rng.pick(&all)?;
        Some(Site { mapping, offset: PageIndex(self.rng.below(pages)) })
    }

    /// One operation that may happen at any time, also while the engine is at work.
    pub fn user_op(&mut self, op: Op) {
        let bytes = self.some_bytes();
        let file = { self.rng.pick(&self.files).copied() };
        let page = self.page_bytes() as u64;
        let did = match (op, file) {
            (Op::Store, _) => self.some_site(None).map(|site| {
                let room = self.page_bytes() - bytes.len();
                let offset = self.rng.below(room as u64 + 1) as usize;
                (format!("{site:?}"), self.store(site, offset, &bytes))
            }),
            (Op::Touch, _) => self.some_site(None).map(|site| (format!("{site:?}"), done(self.touch(site)))),
            (Op::Pin, _) => {
                self.some_site(Some(MappingKind::Anonymous)).map(|site| (format!("{site:?}"), self.pin(site)))
            }
            (Op::Dma, _) => Some((String::new(), self.finish_dma(&bytes))),
            (Op::Exit, _) => self.some_site(None).map(|site| {
                self.exit(site.mapping);
                (format!("{}", site.mapping), Did::Done)
            }),
            (Op::Write, Some(file)) => {
                let offset = self.rng.below(10) * page;
                Some((format!("{file:?} at {offset}"), self.write_file(file, offset, &bytes)))
            }
            (Op::Cut, Some(file)) => {
                let size = self.rng.below(10 * page);
                Some((format!("{file:?} to {size}"), self.cut_file(file, size)))
            }
            (Op::SlipCut, Some(file)) => Some((format!("{file:?}"), self.slip_cut(file))),
            (Op::Writeback, Some(file)) => {
                let half = self.rng.percent(50);
                let result = if half { self.world.begin_writeback(file) } else { self.world.sync(file) };
                Some((format!("{file:?}"), done(result.is_ok())))
            }
            (Op::Evict, Some(file)) => Some((format!("{file:?}"), done(self.world.evict(file).is_ok()))),
            (Op::Balance, _) => {
                self.world.relocate(FsIx(0));
                Some((String::new(), Did::Done))
            }
            (Op::Clone, Some(file)) => Some(self.clone_over(file)),
            _ => None,
        };
        let (what, did) = did.unwrap_or_default_failed();
        self.trace.push(format!("{op:?} {what}: {did:?}"));
    }

    /// A file is replaced by a reflink of another: a write like any other.
    fn clone_over(&mut self, from: NodeId) -> (String, Did) {
        let to = *self.rng.pick(&self.files).expect("there is one");
        let words = format!("{from:?} over {to:?}");
        let same_size =
            self.world.stat(from).map(|a| a.size).ok() >= self.world.stat(to).map(|a| a.size).ok();
        if self.is_leased(to) || from == to || !same_size {
            return (words, Did::Failed);
        }
        match self.world.reflink(from, to) {
            Ok(()) => {
                self.facts.push(Fact::Cloned { from, to });
                (words, Did::Done)
            }
            Err(_) => (words, Did::Failed),
        }
    }

    /// Others act in the middle of an engine's call.
    pub(crate) fn intrude(&mut self) {
        while self.rough && self.rng.percent(self.plan.intrusion) {
            let Some(op) = self.plan.some_op(&mut self.rng) else { return };
            self.trace.push("  meanwhile:".to_owned());
            self.user_op(op);
        }
    }

    /// Moves a run of shared pages to other numbers (compaction, an anchor rewritten); tells from where to where.
    pub fn relocate_shared(&mut self, rng: &mut super::rng::Rng) -> Option<(SharedSpan, SharedSpan)> {
        let held: Vec<SharedPage> = self.shared.iter().filter(|(_, s)| s.creator).map(|(p, _)| *p).collect();
        let start = *rng.pick(&held)?;
        let most = 1 + rng.below(4);
        let pages = (0..most).take_while(|i| held.contains(&start.plus(PageCount(*i)))).count() as u64;
        let from = SharedSpan { start, pages: PageCount(pages) };
        let to = SharedSpan { start: SharedPage(self.fresh() * 64), pages: PageCount(pages) };
        let moved = |page: SharedPage| to.start.plus(PageCount(page.0 - from.start.0));
        let inside = |page: &SharedPage| (from.start..from.end()).contains(page);
        for page in (0..pages).map(|i| from.start.plus(PageCount(i))) {
            let info = self.shared.remove(&page).expect("listed");
            self.shared.insert(moved(page), info);
        }
        let mut sites = Vec::new();
        for (mapping, m) in &mut self.mappings {
            for (offset, entry) in &mut m.entries {
                if let Entry::Shared(page, _) = entry
                    && inside(page)
                {
                    *page = moved(*page);
                    sites.push(Site { mapping: *mapping, offset: PageIndex(*offset) });
                }
            }
        }
        sites.into_iter().for_each(|s| self.translations.drop_site(s));
        Some((from, to))
    }

    /// The engine died: references it held are given back by whoever restarts it, from a journal; protections of pages
    /// that are not shared lapse. Sites that show shared pages go on doing so, protected.
    pub fn engine_died(&mut self) {
        for mapping in self.mappings.values_mut() {
            let shared = |e: Option<&Entry>| matches!(e, Some(Entry::Shared(..) | Entry::Zero(_)));
            let entries = &mapping.entries;
            mapping.protections.retain(|page, _| shared(entries.get(page)));
            // The next engine knows as little of them as of what came by fork.
            mapping.protections.values_mut().for_each(|p| p.forked = true);
        }
        let pages: Vec<SharedPage> = self.shared.keys().copied().collect();
        for page in pages {
            if let Some(info) = self.shared.get_mut(&page) {
                info.creator = false;
            }
            self.reap_shared(page);
        }
    }
}

fn done(yes: bool) -> Did {
    if yes { Did::Done } else { Did::Failed }
}

/// Nothing to do it to is a failure in so many words.
trait OrFailed {
    fn unwrap_or_default_failed(self) -> (String, Did);
}

impl OrFailed for Option<(String, Did)> {
    fn unwrap_or_default_failed(self) -> (String, Did) {
        self.unwrap_or_else(|| ("nothing".to_owned(), Did::Failed))
    }
}
