//! Who takes part: mappings, their registered ranges, and the trust domain each belongs to.
//!
//! Invariant: a mapping belongs to one domain and one backend for as long as it is known, and loses a
//! range only after everything merged in it was broken (K-066; the caller breaks, this module remembers).
//! Nothing is ever shared across domains: indexes are per domain and every merge asserts it. What it
//! deliberately does not do: wait. An exiting mapping is only marked; the scanner cleans up (K-090,
//! K-091).

use std::collections::{BTreeMap, BTreeSet};

use crate::host::{MappingKind, ProtectKind};
use crate::runs::{RunMap, RunValue};
use crate::units::{DomainId, MappingId, PageCount, PageIndex, Span};

/// The route by which a mapping's sites reach the one copy (design section 1). Figures are kept for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Backend {
    /// Whole files through an overlay view.
    Sealed,
    /// Private file mappings re-pointed at anchor pages.
    Remap,
    /// The kernel's own KSM, steered.
    Kernel,
    /// Anonymous memory handed to us.
    Arena,
}

impl Backend {
    /// All of them, in the order of their numbers.
    pub const ALL: [Backend; 4] = [Backend::Sealed, Backend::Remap, Backend::Kernel, Backend::Arena];
    pub(crate) const COUNT: usize = Self::ALL.len();

    /// The name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Backend::Sealed => "sealed",
            Backend::Remap => "remap",
            Backend::Kernel => "kernel",
            Backend::Arena => "arena",
        }
    }
}

/// How equal pages of a mapping are found. W-034: sharing proved by common storage and sharing of mere
/// content are told apart in switches and figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Route {
    /// By place on disk. The checksum filter is left out: storage that is the same does not need two
    /// looks. Pages whose place is undecided are left alone.
    Physical,
    /// By digest, with the checksum filter (K-058, K-059), proved by comparing bytes.
    Content,
    /// By digest; proved by the kernel under its locks where it can, which makes the extents equal on disk.
    ContentDedupe,
}

/// What a mapping is, said once at its first registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Which mapping.
    pub mapping: MappingId,
    /// File or anonymous.
    pub kind: MappingKind,
    /// How its pages are protected.
    pub protect: ProtectKind,
    /// Whom it may share with.
    pub domain: DomainId,
    /// The route its savings are booked to.
    pub backend: Backend,
    /// How equal pages are found.
    pub route: Route,
}

/// To whose account a site goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// The trust domain.
    pub domain: DomainId,
    /// The backend.
    pub backend: Backend,
}

/// Why a mapping can't be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// It is known, but as something else. Unregister it first: a change of domain under merged pages
    /// would mix domains.
    #[error("mapping {0} is registered with another domain, backend, protection or route")]
    Different(MappingId),
    /// It is on its way out.
    #[error("mapping {0} is exiting")]
    Exiting(MappingId),
    /// The span is empty or runs past the last page number.
    #[error("span of mapping {0} is empty or too long")]
    BadSpan(MappingId),
}

/// "Registered" says nothing but that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark;

impl RunValue for Mark {
    fn advance(self, _by: u64) -> Self {
        Mark
    }
}

/// The registered mappings, in scan order.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    known: BTreeMap<MappingId, Registration>,
    ranges: RunMap<MappingId, Mark>,
    exiting: BTreeSet<MappingId>,
}

impl Registry {
    /// K-040: somebody is registered; exiting mappings count until they are cleaned up (K-103).
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    pub fn get(&self, mapping: MappingId) -> Option<&Registration> {
        self.known.get(&mapping)
    }

    /// The account of a mapping whose sites are being handled.
    pub fn owner(&self, mapping: MappingId) -> Owner {
        let r = self.known.get(&mapping).expect("a site's mapping is registered");
        Owner { domain: r.domain, backend: r.backend }
    }

    pub fn is_exiting(&self, mapping: MappingId) -> bool {
        self.exiting.contains(&mapping)
    }

    pub fn register(&mut self, reg: Registration, span: Span) -> Result<(), RegisterError> {
        if span.pages.0 == 0
            || span.start.0.checked_add(span.pages.0).is_none()
            || span.mapping != reg.mapping
        {
            return Err(RegisterError::BadSpan(reg.mapping));
        }
        if self.is_exiting(reg.mapping) {
            return Err(RegisterError::Exiting(reg.mapping));
        }
        if self.known.get(&reg.mapping).is_some_and(|known| *known != reg) {
            return Err(RegisterError::Different(reg.mapping));
        }
        self.known.insert(reg.mapping, reg);
        self.ranges.cut(reg.mapping, span.start.0, span.pages.0);
        self.ranges.put(reg.mapping, span.start.0, span.pages.0, Mark);
        Ok(())
    }

    /// Takes the mark off `span`. The caller has broken everything in it (K-066).
    pub fn unmark(&mut self, span: Span) {
        self.ranges.cut(span.mapping, span.start.0, span.pages.0);
    }

    /// The registered parts of `span`.
    pub fn ranges_in(&self, span: Span) -> Vec<Span> {
        let pieces = self.ranges.pieces(span.mapping, span.start.0, span.pages.0);
        pieces.map(|p| make_span(span.mapping, p.start, p.pages)).collect()
    }

    /// All registered ranges of a mapping.
    pub fn ranges(&self, mapping: MappingId) -> Vec<Span> {
        self.ranges_in(make_span(mapping, 0, u64::MAX))
    }

    /// The whole registered range around a page; listeners' spans are widened inside it (H-006).
    pub fn range_around(&self, mapping: MappingId, at: PageIndex) -> Option<Span> {
        let run = self.ranges.run_at(mapping, at.0)?;
        Some(make_span(mapping, run.start, run.pages))
    }

    /// The first registered range of a mapping that ends after `from`, clipped to start there.
    pub fn next_range(&self, mapping: MappingId, from: PageIndex) -> Option<Span> {
        let rest = make_span(mapping, from.0, u64::MAX - from.0);
        let piece = self.ranges.pieces(mapping, rest.start.0, rest.pages.0).next();
        piece.map(|p| make_span(mapping, p.start, p.pages))
    }

    /// The first mapping at or after `from` in scan order.
    pub fn at_or_after(&self, from: MappingId) -> Option<MappingId> {
        self.known.range(from..).next().map(|(id, _)| *id)
    }

    pub fn mark_exiting(&mut self, mapping: MappingId) {
        if self.known.contains_key(&mapping) {
            self.exiting.insert(mapping);
        }
    }

    /// The next exiting mapping to clean up.
    pub fn first_exiting(&self) -> Option<MappingId> {
        self.exiting.first().copied()
    }

    pub fn mappings(&self) -> impl Iterator<Item = MappingId> + '_ {
        self.known.keys().copied()
    }

    /// Forgets a mapping. Its records are gone already.
    pub fn remove(&mut self, mapping: MappingId) {
        self.ranges.cut(mapping, 0, u64::MAX);
        self.known.remove(&mapping);
        self.exiting.remove(&mapping);
    }

    /// Entries, for the account of our own memory.
    pub fn entries(&self) -> usize {
        self.known.len() + self.ranges.entries()
    }
}

pub(crate) const fn make_span(mapping: MappingId, start: u64, pages: u64) -> Span {
    Span { mapping, start: PageIndex(start), pages: PageCount(pages) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn registration(mapping: u32) -> Registration {
        Registration {
            mapping: MappingId(mapping),
            kind: MappingKind::File,
            protect: ProtectKind::Lease,
            domain: DomainId(0),
            backend: Backend::Remap,
            route: Route::Physical,
        }
    }

    #[test]
    fn ranges_join_and_a_mapping_never_changes_its_domain() {
        let mut registry = Registry::default();
        let (one, at) = (registration(1), |s, n| make_span(MappingId(1), s, n));
        registry.register(one, at(0, 10)).unwrap();
        registry.register(one, at(5, 15)).unwrap();
        assert_eq!(registry.ranges(MappingId(1)), [at(0, 20)]);
        registry.unmark(at(8, 2));
        assert_eq!(registry.ranges(MappingId(1)), [at(0, 8), at(10, 10)]);
        assert_eq!(registry.range_around(MappingId(1), PageIndex(12)), Some(at(10, 10)));
        assert_eq!(registry.range_around(MappingId(1), PageIndex(9)), None);
        assert_eq!(registry.next_range(MappingId(1), PageIndex(9)), Some(at(10, 10)));
        let other = Registration { domain: DomainId(1), ..one };
        assert_eq!(registry.register(other, at(0, 1)), Err(RegisterError::Different(MappingId(1))));
        assert_eq!(registry.register(one, at(0, 0)), Err(RegisterError::BadSpan(MappingId(1))));
    }

    #[test]
    fn exiting_mappings_keep_the_registry_awake_k103() {
        let mut registry = Registry::default();
        registry.register(registration(1), make_span(MappingId(1), 0, 4)).unwrap();
        registry.mark_exiting(MappingId(1));
        assert!(!registry.is_empty());
        let again = registry.register(registration(1), make_span(MappingId(1), 0, 4));
        assert_eq!(again, Err(RegisterError::Exiting(MappingId(1))));
        registry.remove(MappingId(1));
        assert!(registry.is_empty() && registry.first_exiting().is_none() && registry.entries() == 0);
    }
}
