//! The simulated kernel as the engine's [`MergeHost`].
//!
//! Invariant: does what the trait says, no more; where the trait leaves a choice (which page refuses, how far an
//! observation gets, what fails) chance decides. Others act at the start of every call and, where it hurts, in the middle.
//! Planted bugs break single promises on purpose.

use pagefold_engine::host::{
    BreakOutcome, BreakStop, CompareOutcome, Digest, HostError, HostOp, Invalidate, MakeOutcome, MapReading,
    MergeHost, NodeId as MemoryNode, Observed, Private, ProtectKind, ProtectOutcome, Refusal, ShareOutcome,
    ShareTarget, SharedPage, SharedSpan, Shown, Side, Stamp, Visit,
};
use pagefold_engine::identity::{Identity, Undecided};
use pagefold_engine::layout::{CacheState, Layout, Run};
use pagefold_engine::units::{MappingId, PageCount, PageIndex, PageSize, Site, Span};

use super::bugs::Plant;
use super::memory::{Entry, Home, Kernel, Protection, SharedInfo};
use super::node::NodeId;
use super::source::page_hash;

fn sites(span: Span) -> impl DoubleEndedIterator<Item = Site> {
    (span.start.0..span.end().0).map(move |p| Site { mapping: span.mapping, offset: PageIndex(p) })
}

fn at(span: Span) -> String {
    format!("{}:{}", span.mapping, span.start)
}

fn page_identity(layout: &Layout, page: u64) -> Identity {
    let run = layout.runs.iter().find(|r| r.start.0 <= page && page < r.start.0 + r.pages.0);
    run.map_or(Identity::Undecided(Undecided::Volatile), |r| r.identity.plus(PageCount(page - r.start.0)))
}

/// Joins page identities to runs.
fn push_run(out: &mut Vec<Run>, page: u64, identity: Identity) {
    if let Some(last) = out.last_mut()
        && last.start.0 + last.pages.0 == page
        && last.identity.continues_as(last.pages, identity)
    {
        last.pages.0 += 1;
        return;
    }
    out.push(Run { start: PageIndex(page), pages: PageCount(1), identity });
}

impl Kernel {
    fn fails(&mut self, op: HostOp, site: Site) -> Result<(), HostError> {
        self.intrude();
        if self.rough && self.rng.below(1000) < self.plan.errors_per_mille {
            self.trace.push(format!("  {op:?} at {site:?} fails"));
            return Err(HostError::new(op, site, 5));
        }
        Ok(())
    }

    fn no_memory(&mut self) -> bool {
        self.rough && self.rng.percent(self.plan.no_memory)
    }

    fn refusal(&mut self, site: Site) -> Option<Refusal> {
        let Some(mapping) = self.mappings.get(&site.mapping) else { return Some(Refusal::Gone) };
        let Some(entry) = mapping.entries.get(&site.offset.0) else { return Some(Refusal::Gone) };
        assert!(
            !mapping.protections.contains_key(&site.offset.0),
            "the engine protects a page it has protected: {site:?}"
        );
        assert!(
            matches!(entry, Entry::Own(_) | Entry::File),
            "the engine protects a page that shows {entry:?}"
        );
        if self.pins.contains_key(&site) && self.plant != Some(Plant::PinUnseen) {
            return Some(Refusal::Pinned);
        }
        let writing = mapping.file.is_some_and(|f| self.writers.contains_key(&f));
        if writing || self.storing.contains(&site) || (self.rough && self.rng.percent(self.plan.busy)) {
            return Some(Refusal::Busy);
        }
        None
    }

    fn observed(&self, site: Site, layout: Option<&Layout>) -> Shown {
        match self.entry(site).expect("only present pages are observed") {
            Entry::Own(_) => Shown::Own { hint: Identity::Undecided(Undecided::NoExtentMap) },
            Entry::File => {
                let hint = layout.map(|l| page_identity(l, site.offset.0));
                Shown::Own { hint: hint.unwrap_or(Identity::Undecided(Undecided::NoExtentMap)) }
            }
            Entry::Shared(page, private) => {
                Shown::Shared { page, mappings: self.shared[&page].shown, private }
            }
            Entry::Zero(private) => Shown::SharedZero { private },
        }
    }

    /// Whether every page of the span is protected since `stamp` was given.
    fn stamp_holds(&self, span: Span, stamp: Stamp) -> bool {
        let Some(mapping) = self.mappings.get(&span.mapping) else { return false };
        let holds = |p: &Protection| p.stamp == stamp && p.holds;
        (span.start.0..span.end().0).all(|p| mapping.protections.get(&p).is_some_and(holds))
    }

    /// Clones file pages to a new anchor. `None` where these pages can't be cloned.
    fn clone_to_anchor(&mut self, file: NodeId, span: Span) -> Option<NodeId> {
        let bytes = self.world.page.bytes();
        let size = self.world.stat(file).ok()?.size;
        let from = span.start.0 * bytes;
        let len = (span.pages.0 * bytes).min(size.checked_sub(from)?);
        let anchor = self.world.unnamed(file).ok()?;
        if self.world.clone_range(file, from, len, anchor, 0).is_err() {
            self.world.let_go(anchor);
            return None;
        }
        Some(anchor)
    }

    fn add_shared(&mut self, homes: Vec<Home>) -> SharedSpan {
        let start = SharedPage(self.fresh() * 64);
        let pages = PageCount(homes.len() as u64);
        for (i, home) in homes.into_iter().enumerate() {
            if let Home::Anchor { node, .. } = home {
                self.world.hold(node).expect("just made");
            }
            let page = start.plus(PageCount(i as u64));
            self.shared.insert(page, SharedInfo { home, creator: true, shown: 0 });
        }
        SharedSpan { start, pages }
    }

    fn map_of_site(&mut self, span: Span, out: &mut Vec<Run>) -> MapReading {
        let Some(mapping) = self.mappings.get(&span.mapping) else { return MapReading::Gone };
        let Some(file) = mapping.file else { return MapReading::NoMap };
        let present = |p| mapping.entries.get(&p);
        if (span.start.0..span.end().0).any(|p| present(p).is_none()) {
            return MapReading::Gone;
        }
        if (span.start.0..span.end().0).any(|p| present(p) != Some(&Entry::File)) {
            return MapReading::NoMap;
        }
        let old = self.hints.get(&file).cloned().filter(|_| self.plant == Some(Plant::StaleMapTrusted));
        let sync = self.plant != Some(Plant::DirtyUnseen);
        let judged = old.map(|l| (l, CacheState::Clean)).or_else(|| self.judged(file, sync));
        let Some((layout, cache)) = judged else { return MapReading::NoMap };
        for page in 0..span.pages.0 {
            push_run(out, page, page_identity(&layout, span.start.0 + page));
        }
        MapReading::Read(cache)
    }

    fn map_of_shared(&mut self, shared: SharedSpan, out: &mut Vec<Run>) -> MapReading {
        let mut state = CacheState::Clean;
        for i in 0..shared.pages.0 {
            let Some(info) = self.shared.get(&shared.start.plus(PageCount(i))) else {
                return MapReading::Gone;
            };
            let Home::Anchor { node, page } = info.home else { return MapReading::NoMap };
            let Some((layout, cache)) = self.judged(node, true) else { return MapReading::NoMap };
            if cache != CacheState::Clean {
                state = cache;
            }
            push_run(out, i, page_identity(&layout, page));
        }
        MapReading::Read(state)
    }

    fn compare_pages(
        &mut self,
        site: Span,
        other: impl Fn(&Kernel, u64) -> Option<Vec<u8>>,
    ) -> CompareOutcome {
        if self.plant == Some(Plant::CompareSaysSame) {
            return CompareOutcome::Same;
        }
        for (i, site) in sites(site).enumerate() {
            let (Some(a), Some(b)) = (self.shown_bytes(site), other(self, i as u64)) else {
                return CompareOutcome::Gone;
            };
            if a != b {
                return CompareOutcome::Differs { at: PageCount(i as u64) };
            }
        }
        CompareOutcome::Same
    }
}

impl MergeHost for Kernel {
    fn page_size(&self) -> PageSize {
        self.world.page
    }

    fn zero_digest(&self) -> Digest {
        self.digest_of(&vec![0; self.page_bytes()])
    }

    fn shareable_unit(&self, mapping: MappingId) -> PageCount {
        PageCount(1 << (mapping.0 % 3))
    }

    fn is_exiting(&self, mapping: MappingId) -> bool {
        !self.mappings.contains_key(&mapping)
    }

    fn observe(
        &mut self,
        from: Site,
        end: PageIndex,
        pages_max: PageCount,
        out: &mut Vec<Observed>,
    ) -> Result<Visit, HostError> {
        self.fails(HostOp::Observe, from)?;
        let Some(mapping) = self.mappings.get(&from.mapping) else { return Ok(Visit::Gone) };
        let file = mapping.file;
        let limit = if self.rng.percent(30) { 1 + self.rng.below(pages_max.0) } else { pages_max.0 };
        let layout = file.map(|f| self.hint(f));
        let present: Vec<u64> =
            self.mappings[&from.mapping].entries.range(from.offset.0..end.0).map(|(p, _)| *p).collect();
        for page in present.iter().take(limit as usize) {
            let site = Site { mapping: from.mapping, offset: PageIndex(*page) };
            let shown = self.observed(site, layout.as_ref());
            let node =
                MemoryNode((super::rng::mix(*page ^ u64::from(from.mapping.0)) % self.plan.nodes) as u16);
            match out.last_mut() {
                Some(last) if last.span.end() == site.offset && last.node == node && goes_on(last, shown) => {
                    last.span.pages.0 += 1;
                }
                _ => {
                    let span = Span { mapping: from.mapping, start: site.offset, pages: PageCount(1) };
                    out.push(Observed { span, node, shown });
                }
            }
        }
        let next = present.get(limit as usize).map_or(end, |p| PageIndex(*p));
        Ok(Visit::Upto { next })
    }

    fn digest(&mut self, span: Span, out: &mut Vec<Option<Digest>>) -> Result<(), HostError> {
        self.fails(HostOp::Digest, Site { mapping: span.mapping, offset: span.start })?;
        out.extend(sites(span).map(|s| self.shown_bytes(s).map(|b| self.digest_of(&b))));
        Ok(())
    }

    fn protect(&mut self, span: Span, kind: ProtectKind) -> Result<ProtectOutcome, HostError> {
        self.fails(HostOp::Protect, Site { mapping: span.mapping, offset: span.start })?;
        for site in sites(span) {
            if let Some(why) = self.refusal(site) {
                self.trace.push(format!("  protect {}+{}: {why:?} at {}", at(span), span.pages, site.offset));
                return Ok(ProtectOutcome::Refused { why, at: site.offset });
            }
        }
        let stamp = Stamp(self.fresh());
        self.trace.push(format!("  protect {}+{}: {stamp:?}", at(span), span.pages));
        let mapping = self.mappings.get_mut(&span.mapping).expect("not refused");
        let protection = Protection { stamp, kind, holds: true, forked: false };
        mapping.protections.extend((span.start.0..span.end().0).map(|p| (p, protection)));
        Ok(ProtectOutcome::Protected(stamp))
    }

    fn unprotect(&mut self, span: Span) -> Result<(), HostError> {
        self.fails(HostOp::Unprotect, Site { mapping: span.mapping, offset: span.start })?;
        self.trace.push(format!("  unprotect {}+{}", at(span), span.pages));
        if let Some(mapping) = self.mappings.get_mut(&span.mapping) {
            mapping.protections.retain(|p, _| !(span.start.0..span.end().0).contains(p));
        }
        Ok(())
    }

    fn reread_map(&mut self, side: Side, out: &mut Vec<Run>) -> Result<MapReading, HostError> {
        let site = match side {
            Side::Site(span) => Site { mapping: span.mapping, offset: span.start },
            Side::Shared(shared) => Site { mapping: MappingId(0), offset: PageIndex(shared.start.0) },
        };
        self.fails(HostOp::RereadMap, site)?;
        Ok(match side {
            Side::Site(span) => self.map_of_site(span, out),
            Side::Shared(shared) => self.map_of_shared(shared, out),
        })
    }

    fn compare(&mut self, site: Span, shared: SharedSpan) -> Result<CompareOutcome, HostError> {
        self.fails(HostOp::Compare, Site { mapping: site.mapping, offset: site.start })?;
        Ok(self.compare_pages(site, |k, i| {
            let page = shared.start.plus(PageCount(i));
            k.shared.contains_key(&page).then(|| k.shared_bytes(page))
        }))
    }

    fn compare_in_kernel(&mut self, site: Span, shared: SharedSpan) -> Result<CompareOutcome, HostError> {
        if self.rng.percent(40) {
            return Ok(CompareOutcome::Unsupported);
        }
        self.compare(site, shared)
    }

    fn compare_zero(&mut self, site: Span) -> Result<CompareOutcome, HostError> {
        self.fails(HostOp::Compare, Site { mapping: site.mapping, offset: site.start })?;
        Ok(self.compare_pages(site, |k, _| Some(vec![0; k.page_bytes()])))
    }

    fn make_shared(&mut self, from: Span, stamp: Stamp) -> Result<MakeOutcome, HostError> {
        self.fails(HostOp::MakeShared, Site { mapping: from.mapping, offset: from.start })?;
        if !self.stamp_holds(from, stamp) && self.plant != Some(Plant::ShareIgnoresRace) {
            return Ok(MakeOutcome::Raced);
        }
        if self.no_memory() {
            return Ok(MakeOutcome::NoMemory);
        }
        let Some(bytes) = sites(from).map(|s| self.shown_bytes(s)).collect::<Option<Vec<_>>>() else {
            return Ok(MakeOutcome::Raced);
        };
        let file = self.mappings[&from.mapping].file;
        let of_file = sites(from).all(|s| self.entry(s) == Some(Entry::File));
        let anchor = file.filter(|_| of_file).and_then(|f| self.clone_to_anchor(f, from));
        let homes = match anchor {
            Some(node) => (0..from.pages.0).map(|page| Home::Anchor { node, page }).collect(),
            None => bytes.into_iter().map(|b| Home::Memory(b.into())).collect(),
        };
        let shared = self.add_shared(homes);
        if let Some(node) = anchor {
            self.world.let_go(node);
        }
        Ok(MakeOutcome::Made(shared))
    }

    fn share(
        &mut self,
        site: Span,
        stamp: Stamp,
        target: ShareTarget,
        invalidate: Invalidate<'_>,
    ) -> Result<ShareOutcome, HostError> {
        self.fails(HostOp::Share, Site { mapping: site.mapping, offset: site.start })?;
        let present = sites(site).all(|s| self.entry(s).is_some());
        let ignores = self.plant == Some(Plant::ShareIgnoresRace) && present;
        if !self.stamp_holds(site, stamp) && !ignores {
            self.trace.push(format!("  share {}+{}: raced", at(site), site.pages));
            return Ok(ShareOutcome::Raced);
        }
        if self.no_memory() {
            return Ok(ShareOutcome::NoMemory);
        }
        let private = Private(self.fresh());
        self.trace.push(format!("  share {}+{} as {target:?}", at(site), site.pages));
        for (i, s) in sites(site).enumerate() {
            let entry = match target {
                ShareTarget::Zero => Entry::Zero(private),
                ShareTarget::Shared(to) => Entry::Shared(to.start.plus(PageCount(i as u64)), private),
            };
            self.set_entry(s, Some(entry));
        }
        if self.plant == Some(Plant::LostInvalidation) {
            let nowhere = Span { pages: PageCount(0), ..site };
            invalidate(nowhere);
        } else {
            invalidate(site);
        }
        Ok(ShareOutcome::Shared { private })
    }

    fn break_sharing(&mut self, site: Span, invalidate: Invalidate<'_>) -> Result<BreakOutcome, HostError> {
        self.fails(HostOp::Break, Site { mapping: site.mapping, offset: site.start })?;
        let outcome = |k: &mut Kernel, done, stop| {
            k.trace.push(format!("  break {}+{}: {done} done, {stop:?}", at(site), site.pages));
            Ok(BreakOutcome { done: PageCount(done), stop })
        };
        for (i, s) in sites(site).enumerate() {
            let i = i as u64;
            if !self.mappings.contains_key(&s.mapping) {
                return outcome(self, i, BreakStop::Exiting);
            }
            match self.entry(s) {
                None => return outcome(self, i, BreakStop::Truncated),
                Some(Entry::Own(_) | Entry::File) => return outcome(self, i, BreakStop::NotShared),
                Some(Entry::Shared(..) | Entry::Zero(_)) => {}
            }
            if self.no_memory() || self.plant == Some(Plant::NeverMemory) {
                return outcome(self, i, BreakStop::NoMemory);
            }
            if self.rough && self.rng.below(1000) < self.plan.errors_per_mille {
                return outcome(self, i, BreakStop::Interrupted);
            }
            let mut bytes = self.shown_bytes(s).expect("present");
            if self.plant == Some(Plant::BreakLosesBytes) {
                bytes.fill(0);
            }
            let entry = match self.mappings[&s.mapping].file {
                // A file's site goes back to the file; its private copies (stores) never were shared with a file.
                Some(_) if self.went_to_file(s) => Entry::File,
                _ => Entry::Own(self.new_frame(bytes)),
            };
            self.set_entry(s, Some(entry));
            self.spoil(s);
            invalidate(Span { mapping: s.mapping, start: s.offset, pages: PageCount(1) });
        }
        outcome(self, site.pages.0, BreakStop::Complete)
    }

    fn release(&mut self, shared: SharedSpan) -> Result<(), HostError> {
        let site = Site { mapping: MappingId(0), offset: PageIndex(shared.start.0) };
        self.fails(HostOp::Release, site)?;
        self.trace.push(format!("  release {shared:?}"));
        for i in 0..shared.pages.0 {
            let page = shared.start.plus(PageCount(i));
            let info =
                self.shared.get_mut(&page).unwrap_or_else(|| panic!("release of {page:?}, which is gone"));
            assert!(info.creator, "{page:?} is released twice (K-057)");
            info.creator = false;
            self.reap_shared(page);
        }
        Ok(())
    }
}

impl Kernel {
    /// Digests may be weak: equal ones are no proof.
    fn digest_of(&self, bytes: &[u8]) -> Digest {
        let mut digest = page_hash(bytes);
        if self.plan.weak_digests {
            digest = [digest[0] & 3; 16];
        }
        Digest(digest)
    }

    /// Whether a shared site of a file mapping showed the file's own page before it was merged.
    fn went_to_file(&self, site: Site) -> bool {
        !self.mappings[&site.mapping].cowed.contains(&site.offset.0)
    }
}

fn goes_on(last: &Observed, next: Shown) -> bool {
    let pages = last.span.pages;
    match (last.shown, next) {
        (Shown::Own { hint: a }, Shown::Own { hint: b }) => a.continues_as(pages, b),
        (Shown::SharedZero { private: a }, Shown::SharedZero { private: b }) => a == b,
        (
            Shown::Shared { page: a, mappings: n, private: p },
            Shown::Shared { page: b, mappings: m, private: q },
        ) => a.plus(pages) == b && n == m && p == q,
        (Shown::Unsuitable, Shown::Unsuitable) => true,
        _ => false,
    }
}
