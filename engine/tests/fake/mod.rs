//! A small scripted host for the engine's own tests.
//!
//! Pages hold one number instead of bytes. What every site must read is kept apart (`truth`) and changed by writes and forks only,
//! so that [`FakeHost::check`] sees any merge of unequal pages. It asserts the engine's side of the host contract: no
//! double protection, no share with a stale stamp, no second release. What it deliberately does not do: simulate a file
//! system or the kernel; that is `testfs`.
#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]

mod rig;

use std::collections::{BTreeMap, VecDeque};

use pagefold_engine::domain::{Backend, Registration, Route};
use pagefold_engine::host::*;
use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity, Undecided};
use pagefold_engine::layout::{CacheState, Run};
use pagefold_engine::units::*;

pub use rig::{Rig, content};

/// What happens right before an operation.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    Write(Site, u64),
    Pin(Site),
    Truncate(Site),
    Dirty(Site),
    Exit(MappingId),
    Error(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shows {
    Own,
    Shared(u64),
    Zero,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    content: u64,
    place: Option<u64>,
    dirty: bool,
    pins: u32,
    busy: bool,
    protected: bool,
    stamp: u64,
    shows: Shows,
    node: u16,
}

#[derive(Clone, Copy, Debug)]
struct Copy1 {
    content: u64,
    place: Option<u64>,
    creator: bool,
}

#[derive(Default, Debug)]
struct Map {
    pages: BTreeMap<u64, Page>,
    exiting: bool,
}

#[derive(Debug, Default)]
pub struct FakeHost {
    maps: BTreeMap<MappingId, Map>,
    shared: BTreeMap<u64, Copy1>,
    truth: BTreeMap<Site, u64>,
    clock: u64,
    next_shared: u64,
    /// Private copies that can still be made.
    pub memory: u64,
    /// Shared pages that can still be made.
    pub shared_memory: u64,
    pub before: VecDeque<(HostOp, Hook)>,
    pub calls: BTreeMap<HostOp, u64>,
    pub unit: u64,
    /// Signals pending after this many broken pages.
    pub interrupt_after: Option<u64>,
    /// A broken host: `share` does not look at the stamp. Tests prove that `check` sees it.
    pub planted_share_ignores_stamp: bool,
}

pub const ZERO: u64 = 0;

pub fn site(mapping: u32, offset: u64) -> Site {
    Site { mapping: MappingId(mapping), offset: PageIndex(offset) }
}

pub fn span(mapping: u32, start: u64, pages: u64) -> Span {
    Span { mapping: MappingId(mapping), start: PageIndex(start), pages: PageCount(pages) }
}

pub fn file(mapping: u32, domain: u16) -> Registration {
    Registration {
        mapping: MappingId(mapping),
        kind: MappingKind::File,
        protect: ProtectKind::Lease,
        domain: DomainId(domain),
        backend: Backend::Remap,
        route: Route::Physical,
    }
}

pub fn anon(mapping: u32, domain: u16) -> Registration {
    Registration {
        kind: MappingKind::Anonymous,
        protect: ProtectKind::KernelCow,
        backend: Backend::Arena,
        route: Route::Content,
        ..file(mapping, domain)
    }
}

const SPACE: AddressSpace = AddressSpace { fs: FsId(0), class: DeviceClass::Data };

pub fn identity(place: Option<u64>) -> Identity {
    place
        .map_or(Identity::Undecided(Undecided::NoExtentMap), |page| Identity::Physical { space: SPACE, page })
}

impl FakeHost {
    pub fn new() -> Self {
        FakeHost {
            memory: u64::MAX,
            shared_memory: u64::MAX,
            unit: 1,
            next_shared: 1000,
            ..FakeHost::default()
        }
    }

    /// Adds pages with these contents; with a place if the mapping is a file on disk.
    pub fn map(&mut self, mapping: u32, start: u64, contents: &[u64], place: Option<u64>) {
        for (i, content) in contents.iter().enumerate() {
            self.put(site(mapping, start + i as u64), *content, place.map(|p| p + i as u64));
        }
    }

    pub fn put(&mut self, at: Site, content: u64, place: Option<u64>) {
        let page = Page {
            content,
            place,
            dirty: false,
            pins: 0,
            busy: false,
            protected: false,
            stamp: 0,
            shows: Shows::Own,
            node: 0,
        };
        self.maps.entry(at.mapping).or_default().pages.insert(at.offset.0, page);
        self.truth.insert(at, content);
    }

    fn page(&mut self, at: Site) -> Option<&mut Page> {
        self.maps.get_mut(&at.mapping)?.pages.get_mut(&at.offset.0)
    }

    pub fn set_node(&mut self, mapping: u32, node: u16) {
        let map = self.maps.get_mut(&MappingId(mapping)).expect("mapped");
        map.pages.values_mut().for_each(|p| p.node = node);
    }

    pub fn exists(&self, at: Site) -> bool {
        self.maps.get(&at.mapping).is_some_and(|m| m.pages.contains_key(&at.offset.0))
    }

    pub fn is_shared(&self, at: Site) -> bool {
        self.maps[&at.mapping].pages[&at.offset.0].shows != Shows::Own
    }

    pub fn is_protected(&self, at: Site) -> bool {
        self.maps[&at.mapping].pages[&at.offset.0].protected
    }

    /// Neither protected nor merged: a writer may dirty it without anyone hearing.
    pub fn is_plain(&self, at: Site) -> bool {
        let page = &self.maps[&at.mapping].pages[&at.offset.0];
        page.shows == Shows::Own && !page.protected
    }

    /// A store that nobody holds back: the kernel copies, protection and place are gone.
    pub fn write(&mut self, at: Site, content: u64) {
        if let Some(page) = self.page(at) {
            *page = Page { content, place: None, protected: false, stamp: 0, shows: Shows::Own, ..*page };
            self.truth.insert(at, content);
            self.collect();
        }
    }

    /// A store that the kernel copies for under a protection that outlives the copy (a lease: private mappings do not
    /// break it).
    pub fn copy_under_lease(&mut self, at: Site, content: u64) {
        if let Some(page) = self.page(at) {
            *page = Page { content, place: None, stamp: 0, shows: Shows::Own, ..*page };
            self.truth.insert(at, content);
            self.collect();
        }
    }

    pub fn pin(&mut self, at: Site, by: i32) {
        if let Some(page) = self.page(at) {
            page.pins = page.pins.saturating_add_signed(by);
            page.stamp = 0;
        }
    }

    pub fn set_busy(&mut self, at: Site, busy: bool) {
        if let Some(page) = self.page(at) {
            page.busy = busy;
        }
    }

    pub fn set_dirty(&mut self, at: Site, content: u64) {
        if let Some(page) = self.page(at) {
            (page.content, page.dirty) = (content, true);
            self.truth.insert(at, content);
        }
    }

    pub fn truncate(&mut self, mapping: u32, from: u64) {
        if let Some(map) = self.maps.get_mut(&MappingId(mapping)) {
            map.pages.retain(|o, _| *o < from);
        }
        self.truth.retain(|s, _| s.mapping.0 != mapping || s.offset.0 < from);
        self.collect();
    }

    /// The live count fell to 0; the pages are there until [`Self::teardown`].
    pub fn set_exiting(&mut self, mapping: u32) {
        if let Some(map) = self.maps.get_mut(&MappingId(mapping)) {
            map.exiting = true;
        }
    }

    pub fn teardown(&mut self, mapping: u32) {
        self.maps.remove(&MappingId(mapping));
        self.truth.retain(|s, _| s.mapping.0 != mapping);
        self.collect();
    }

    /// Table entries are copied with their protection; records are the engine's business (K-053).
    pub fn fork(&mut self, parent: u32, child: u32) {
        let pages = self.maps[&MappingId(parent)].pages.clone();
        for (offset, page) in pages {
            self.truth.insert(site(child, offset), self.truth[&site(parent, offset)]);
            let mut page = Page { pins: 0, busy: false, stamp: 0, ..page };
            page.protected = page.protected && page.shows != Shows::Own;
            self.maps.entry(MappingId(child)).or_default().pages.insert(offset, page);
        }
    }

    pub fn relocate(&mut self, from: u64, place: Option<u64>) -> u64 {
        let to = self.next_shared;
        self.next_shared += 1;
        let mut copy = self.shared.remove(&from).expect("relocated page exists");
        copy.place = place.or(copy.place);
        self.shared.insert(to, copy);
        for page in self.maps.values_mut().flat_map(|m| m.pages.values_mut()) {
            if page.shows == Shows::Shared(from) {
                page.shows = Shows::Shared(to);
            }
        }
        to
    }

    pub fn any_shared(&self) -> Option<u64> {
        self.shared.keys().next().copied()
    }

    pub fn shared_count(&self) -> usize {
        self.shared.len()
    }

    pub fn protected_count(&self) -> usize {
        self.maps.values().flat_map(|m| m.pages.values()).filter(|p| p.protected).count()
    }

    pub fn merged_sites(&self) -> u64 {
        self.maps.values().flat_map(|m| m.pages.values()).filter(|p| p.shows != Shows::Own).count() as u64
    }

    /// The headline property: every site reads what was written to it or inherited by it.
    pub fn check(&self) {
        for (id, map) in &self.maps {
            for (offset, page) in &map.pages {
                let read = match page.shows {
                    Shows::Own => page.content,
                    Shows::Shared(n) => self.shared[&n].content,
                    Shows::Zero => ZERO,
                };
                let at = Site { mapping: *id, offset: PageIndex(*offset) };
                assert_eq!(read, self.truth[&at], "{at:?} reads bytes nobody wrote to it");
            }
        }
    }

    fn collect(&mut self) {
        let maps = &self.maps;
        let shown =
            |n: u64| maps.values().flat_map(|m| m.pages.values()).any(|p| p.shows == Shows::Shared(n));
        self.shared.retain(|n, c| c.creator || shown(*n));
    }

    fn enter(&mut self, op: HostOp, at: Site) -> Result<(), HostError> {
        *self.calls.entry(op).or_default() += 1;
        if self.before.front().is_none_or(|(wanted, _)| *wanted != op) {
            return Ok(());
        }
        match self.before.pop_front().expect("front exists").1 {
            Hook::Write(at, content) => self.write(at, content),
            Hook::Pin(at) => self.pin(at, 1),
            Hook::Truncate(at) => self.truncate(at.mapping.0, at.offset.0),
            Hook::Dirty(at) => {
                let content = self.truth[&at];
                self.set_dirty(at, content);
            }
            Hook::Exit(mapping) => self.set_exiting(mapping.0),
            Hook::Error(errno) => return Err(HostError::new(op, at, errno)),
        }
        Ok(())
    }

    fn shown(&self, page: &Page) -> Shown {
        match page.shows {
            Shows::Own => Shown::Own { hint: identity(page.place) },
            Shows::Zero => Shown::SharedZero { private: Private(7) },
            Shows::Shared(n) => {
                let all = self.maps.values().flat_map(|m| m.pages.values());
                let mappings = all.filter(|p| p.shows == Shows::Shared(n)).count() as u64;
                Shown::Shared { page: SharedPage(n), mappings, private: Private(7) }
            }
        }
    }

    fn offsets(of: Span) -> impl Iterator<Item = Site> {
        (of.start.0..of.end().0).map(move |o| Site { mapping: of.mapping, offset: PageIndex(o) })
    }
}

fn goes_on(before: &Observed, next: Shown, at: u64) -> bool {
    let n = before.span.pages;
    before.span.end().0 == at
        && match (before.shown, next) {
            (Shown::Own { hint: a }, Shown::Own { hint: b }) => a.continues_as(n, b),
            (
                Shown::Shared { page: a, mappings: x, private: p },
                Shown::Shared { page: b, mappings: y, private: q },
            ) => a.plus(n) == b && (x, p) == (y, q),
            (a, b) => a == b,
        }
}

impl MergeHost for FakeHost {
    fn page_size(&self) -> PageSize {
        PageSize::KIB4
    }

    fn zero_digest(&self) -> Digest {
        digest_of(ZERO)
    }

    fn shareable_unit(&self, _mapping: MappingId) -> PageCount {
        PageCount(self.unit)
    }

    fn is_exiting(&self, mapping: MappingId) -> bool {
        self.maps.get(&mapping).is_none_or(|m| m.exiting)
    }

    fn observe(
        &mut self,
        from: Site,
        end: PageIndex,
        pages_max: PageCount,
        out: &mut Vec<Observed>,
    ) -> Result<Visit, HostError> {
        self.enter(HostOp::Observe, from)?;
        if self.is_exiting(from.mapping) {
            return Ok(Visit::Gone);
        }
        let map = &self.maps[&from.mapping];
        let first = out.len();
        for (seen, (offset, page)) in map.pages.range(from.offset.0..end.0).enumerate() {
            if seen as u64 == pages_max.0 {
                return Ok(Visit::Upto { next: PageIndex(*offset) });
            }
            let shown = self.shown(page);
            match out[first..].last_mut() {
                Some(last) if last.node.0 == page.node && goes_on(last, shown, *offset) => {
                    last.span.pages.0 += 1;
                }
                _ => {
                    let span = span(from.mapping.0, *offset, 1);
                    out.push(Observed { span, node: NodeId(page.node), shown });
                }
            }
        }
        Ok(Visit::Upto { next: end })
    }

    fn digest(&mut self, of: Span, out: &mut Vec<Option<Digest>>) -> Result<(), HostError> {
        self.enter(HostOp::Digest, Site { mapping: of.mapping, offset: of.start })?;
        for at in Self::offsets(of) {
            out.push(self.page(at).map(|p| *p).map(|p| {
                digest_of(match p.shows {
                    Shows::Own => p.content,
                    Shows::Shared(n) => self.shared[&n].content,
                    Shows::Zero => ZERO,
                })
            }));
        }
        Ok(())
    }

    fn protect(&mut self, of: Span, _kind: ProtectKind) -> Result<ProtectOutcome, HostError> {
        self.enter(HostOp::Protect, Site { mapping: of.mapping, offset: of.start })?;
        let exiting = self.is_exiting(of.mapping);
        for at in Self::offsets(of) {
            let why = match self.page(at) {
                _ if exiting => Some(Refusal::Gone),
                None => Some(Refusal::Gone),
                Some(p) if p.pins > 0 => Some(Refusal::Pinned),
                Some(p) if p.busy => Some(Refusal::Busy),
                Some(_) => None,
            };
            if let Some(why) = why {
                return Ok(ProtectOutcome::Refused { why, at: at.offset });
            }
        }
        self.clock += 1;
        let stamp = self.clock;
        for at in Self::offsets(of) {
            let page = self.page(at).expect("checked");
            assert!(!page.protected, "{at:?} is protected twice");
            (page.protected, page.stamp) = (true, stamp);
        }
        Ok(ProtectOutcome::Protected(Stamp(stamp)))
    }

    fn unprotect(&mut self, of: Span) -> Result<(), HostError> {
        self.enter(HostOp::Unprotect, Site { mapping: of.mapping, offset: of.start })?;
        for at in Self::offsets(of) {
            if let Some(page) = self.page(at) {
                assert_eq!(
                    page.shows,
                    Shows::Own,
                    "{at:?} loses its protection while it shows a shared page"
                );
                (page.protected, page.stamp) = (false, 0);
            }
        }
        Ok(())
    }

    fn reread_map(&mut self, side: Side, out: &mut Vec<Run>) -> Result<MapReading, HostError> {
        self.enter(HostOp::RereadMap, site(0, 0))?;
        let mut state = CacheState::Clean;
        let places: Vec<Option<u64>> = match side {
            Side::Site(of) => {
                let pages: Vec<_> = Self::offsets(of).map(|at| self.page(at).map(|p| *p)).collect();
                if pages.iter().any(Option::is_none) {
                    return Ok(MapReading::Gone);
                }
                if pages.iter().flatten().any(|p| p.dirty) {
                    state = CacheState::Dirty;
                }
                pages.iter().flatten().map(|p| p.place).collect()
            }
            Side::Shared(s) => (s.start.0..s.end().0).map(|n| self.shared[&n].place).collect(),
        };
        for (i, place) in places.into_iter().enumerate() {
            let start = PageIndex(i as u64);
            out.push(Run { start, pages: PageCount(1), identity: identity(place) });
        }
        Ok(MapReading::Read(state))
    }

    fn compare(&mut self, of: Span, shared: SharedSpan) -> Result<CompareOutcome, HostError> {
        self.enter(HostOp::Compare, Site { mapping: of.mapping, offset: of.start })?;
        for (i, at) in Self::offsets(of).enumerate() {
            let theirs = self.shared[&(shared.start.0 + i as u64)].content;
            match self.page(at) {
                None => return Ok(CompareOutcome::Gone),
                Some(p) if p.content != theirs => {
                    return Ok(CompareOutcome::Differs { at: PageCount(i as u64) });
                }
                Some(_) => {}
            }
        }
        Ok(CompareOutcome::Same)
    }

    fn compare_in_kernel(&mut self, _of: Span, _shared: SharedSpan) -> Result<CompareOutcome, HostError> {
        Ok(CompareOutcome::Unsupported)
    }

    fn compare_zero(&mut self, of: Span) -> Result<CompareOutcome, HostError> {
        let differs = Self::offsets(of).position(|at| self.page(at).is_none_or(|p| p.content != ZERO));
        Ok(differs.map_or(CompareOutcome::Same, |i| CompareOutcome::Differs { at: PageCount(i as u64) }))
    }

    fn make_shared(&mut self, from: Span, stamp: Stamp) -> Result<MakeOutcome, HostError> {
        self.enter(HostOp::MakeShared, Site { mapping: from.mapping, offset: from.start })?;
        if self.shared_memory < from.pages.0 {
            return Ok(MakeOutcome::NoMemory);
        }
        let pages: Vec<_> = Self::offsets(from).map(|at| self.page(at).map(|p| *p)).collect();
        if pages.iter().any(|p| p.is_none_or(|p| p.stamp != stamp.0)) {
            return Ok(MakeOutcome::Raced);
        }
        self.shared_memory -= from.pages.0;
        let start = self.next_shared;
        for page in pages.into_iter().flatten() {
            let copy = Copy1 { content: page.content, place: page.place, creator: true };
            self.shared.insert(self.next_shared, copy);
            self.next_shared += 1;
        }
        Ok(MakeOutcome::Made(SharedSpan { start: SharedPage(start), pages: from.pages }))
    }

    fn share(
        &mut self,
        of: Span,
        stamp: Stamp,
        target: ShareTarget,
        invalidate: Invalidate<'_>,
    ) -> Result<ShareOutcome, HostError> {
        self.enter(HostOp::Share, Site { mapping: of.mapping, offset: of.start })?;
        let planted = self.planted_share_ignores_stamp;
        for at in Self::offsets(of) {
            if self.page(at).is_none_or(|p| p.stamp != stamp.0 && !planted) {
                return Ok(ShareOutcome::Raced);
            }
        }
        for (i, at) in Self::offsets(of).enumerate() {
            let page = self.page(at).expect("checked");
            assert_eq!(page.shows, Shows::Own, "{at:?} is shared twice");
            page.protected = true;
            page.shows = match target {
                ShareTarget::Shared(to) => Shows::Shared(to.start.0 + i as u64),
                ShareTarget::Zero => Shows::Zero,
            };
        }
        invalidate(of);
        Ok(ShareOutcome::Shared { private: Private(7) })
    }

    fn break_sharing(&mut self, of: Span, invalidate: Invalidate<'_>) -> Result<BreakOutcome, HostError> {
        self.enter(HostOp::Break, Site { mapping: of.mapping, offset: of.start })?;
        let stop = |done: u64, stop| Ok(BreakOutcome { done: PageCount(done), stop });
        if self.is_exiting(of.mapping) {
            return stop(0, BreakStop::Exiting);
        }
        for (i, at) in Self::offsets(of).enumerate() {
            let i = i as u64;
            let Some(page) = self.page(at).map(|p| *p) else { return stop(i, BreakStop::Truncated) };
            let content = match page.shows {
                Shows::Own => return stop(i, BreakStop::NotShared),
                Shows::Shared(n) => self.shared[&n].content,
                Shows::Zero => ZERO,
            };
            if self.interrupt_after == Some(0) {
                self.interrupt_after = None;
                return stop(i, BreakStop::Interrupted);
            }
            if self.memory == 0 {
                return stop(i, BreakStop::NoMemory);
            }
            self.memory -= 1;
            self.interrupt_after = self.interrupt_after.map(|n| n - 1);
            let page = self.page(at).expect("it is there");
            (page.content, page.shows) = (content, Shows::Own);
            invalidate(Span { start: at.offset, pages: PageCount(1), ..of });
        }
        self.collect();
        stop(of.pages.0, BreakStop::Complete)
    }

    fn release(&mut self, shared: SharedSpan) -> Result<(), HostError> {
        self.enter(HostOp::Release, site(0, shared.start.0))?;
        for n in shared.start.0..shared.end().0 {
            let copy = self.shared.get_mut(&n).expect("a released page exists");
            assert!(copy.creator, "shared page {n} is released twice (K-057)");
            copy.creator = false;
        }
        self.collect();
        Ok(())
    }
}

pub fn digest_of(content: u64) -> Digest {
    let mut bytes = [0; 16];
    // Contents 100..110 collide on purpose: digests are hints (M-024).
    let digest = if (100..110).contains(&content) { 100 } else { content };
    bytes[..8].copy_from_slice(&digest.to_le_bytes());
    Digest(bytes)
}
