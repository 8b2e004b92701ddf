//! The reading half of a scan: what the engine plans, split into jobs, read, and given back as hashes.
//!
//! Each distinct page on disk is read once, whatever the number of files that show it. A file that moved or failed is
//! tried through another file with the same layout; what stays unread keeps the identity its extents gave it, and is
//! named in the report.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pagefold_engine::content::{ContentIndex, ReadPlan};
use pagefold_engine::share_map::{Cached, LayoutId, ShareMap};
use pagefold_engine::units::{MappingId, PageCount, PageIndex, Span};
use rustc_hash::FxHashMap;

use crate::scan::notes::Notes;
use crate::scan::progress::{Phase, Progress};
use crate::scan::unique::Collected;
use crate::source::{FileSource, InodeId, READ_JOB_PAGES_MAX, ReadJob, ReadOptions, ReadOutcome};

type Ranges = Vec<(PageIndex, PageCount)>;

/// How often pages are tried, each time through another file where there is one.
const TRIES: usize = 3;

/// Pages that could not be read through `mapping`, and why.
struct Unread {
    mapping: MappingId,
    ranges: Ranges,
    shared_layout: bool,
    why: String,
}

/// Reads what the map's plan asks for.
pub(crate) fn read_content<S: FileSource>(
    source: &S,
    collected: &Collected,
    options: ReadOptions,
    progress: &Progress,
    notes: &mut Notes,
) -> ContentIndex {
    let map = &collected.map;
    let mut plans = map.read_plan();
    let pages: u64 = plans.iter().flat_map(|p| &p.ranges).map(|r| r.1.0).sum();
    Progress::add(&progress.pages_total, pages);
    progress.set_phase(Phase::Content);
    let roots = collected.dirs.roots().iter().map(|root| source.real_path(root)).collect();
    let reader = Pass { source, collected, roots, options, progress };
    let mut index = ContentIndex::default();
    let mut others = None;
    let mut unread = Vec::new();
    for tried in 1..=TRIES {
        unread = reader.run(plans, &mut index);
        if unread.is_empty() || progress.is_cancelled() || tried == TRIES {
            break;
        }
        let others = others.get_or_insert_with(|| by_layout(map));
        for piece in &mut unread {
            if piece.shared_layout {
                piece.mapping = next_holder(map, others, piece.mapping);
            }
        }
        plans = unread
            .iter()
            .map(|u| ReadPlan {
                mapping: u.mapping,
                ranges: u.ranges.clone(),
                place: None,
                shared_layout: u.shared_layout,
            })
            .collect();
    }
    if !progress.is_cancelled() {
        // A large file is read in many pieces: it is named once.
        unread.sort_by_key(|piece| piece.mapping);
        unread.dedup_by_key(|piece| piece.mapping);
        for piece in unread {
            notes.errors.add(collected.path(piece.mapping), piece.why);
        }
    }
    index
}

fn by_layout(map: &ShareMap) -> FxHashMap<LayoutId, Vec<MappingId>> {
    let mut all: FxHashMap<LayoutId, Vec<MappingId>> = FxHashMap::default();
    for (id, mapping) in map.mappings() {
        all.entry(mapping.layout).or_default().push(id);
    }
    all
}

fn next_holder(
    map: &ShareMap,
    by_layout: &FxHashMap<LayoutId, Vec<MappingId>>,
    mapping: MappingId,
) -> MappingId {
    let holders = &by_layout[&map.mapping(mapping).layout];
    let at = holders.partition_point(|m| *m <= mapping);
    holders[at % holders.len()]
}

struct Pass<'a, S> {
    source: &'a S,
    collected: &'a Collected,
    /// Without symbolic links.
    roots: Vec<PathBuf>,
    options: ReadOptions,
    progress: &'a Progress,
}

/// A job under way.
struct Pending {
    mapping: MappingId,
    ranges: Ranges,
    shared_layout: bool,
}

impl<S: FileSource> Pass<'_, S> {
    fn run(&self, plans: Vec<ReadPlan>, index: &mut ContentIndex) -> Vec<Unread> {
        let pending: Mutex<FxHashMap<u64, Pending>> = Mutex::default();
        let unread = Mutex::new(Vec::new());
        let index = Mutex::new(index);
        let mut next_tag = 0;
        let mut jobs = plans.into_iter().flat_map(|plan| self.split(plan)).map(|(job, resident)| {
            let tag = next_tag;
            next_tag += 1;
            let read = self.job(tag, &job, resident);
            pending.lock().unwrap_or_else(PoisonError::into_inner).insert(tag, job);
            read
        });
        let done = |outcome: ReadOutcome| {
            let (tag, result) = match outcome {
                ReadOutcome::Hashed { tag, hashes } => (tag, Ok(hashes)),
                ReadOutcome::Moved { tag } => (tag, Err("changed while its data was read".to_owned())),
                ReadOutcome::Failed { tag, error } => (tag, Err(error.to_string())),
            };
            let job = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&tag);
            let Pending { mapping, ranges, shared_layout } =
                job.expect("an outcome is of a job given out, once");
            match result {
                Ok(hashes) => {
                    let mut index = index.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut rest = &hashes[..];
                    for (start, pages) in ranges {
                        let (these, after) = rest.split_at(pages.0 as usize);
                        index.learn(&self.collected.map, Span { mapping, start, pages }, these);
                        rest = after;
                    }
                    Progress::add(&self.progress.pages_done, hashes.len() as u64);
                }
                Err(why) => {
                    let piece = Unread { mapping, ranges, shared_layout, why };
                    unread.lock().unwrap_or_else(PoisonError::into_inner).push(piece);
                }
            }
        };
        self.source.read(&mut jobs, self.options, self.progress.cancel_flag(), &done);
        unread.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// A plan as jobs of bounded size, cached pages apart from the others.
    fn split(&self, plan: ReadPlan) -> impl Iterator<Item = (Pending, bool)> + use<'_, S> {
        let ReadPlan { mapping, ranges, shared_layout, .. } = plan;
        let (cached, others) = match self.collected.map.mapping(mapping).cached {
            Cached::All => (ranges, Vec::new()),
            Cached::Partial(_) => self.collected.map.split_by_cache(mapping, &ranges),
            Cached::None | Cached::Unknown => (Vec::new(), ranges),
        };
        let cached = bounded(cached).map(|r| (r, true));
        let others = bounded(others).map(|r| (r, false));
        others
            .chain(cached)
            .map(move |(ranges, resident)| (Pending { mapping, ranges, shared_layout }, resident))
    }

    fn job(&self, tag: u64, pending: &Pending, resident: bool) -> ReadJob {
        let file = self.collected.file(pending.mapping);
        let path: PathBuf = self.collected.path_from(&self.roots, pending.mapping);
        let map = &self.collected.map;
        let ns = file.ctime_ns;
        ReadJob {
            tag,
            path,
            inode: InodeId { dev: self.collected.devs[file.dev as usize], ino: file.ino },
            size: map.layout(map.mapping(pending.mapping).layout).size,
            ctime: (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000) as u32),
            ranges: pending.ranges.clone(),
            resident,
        }
    }
}

/// Cuts ranges into lists of at most [`READ_JOB_PAGES_MAX`] pages, one at a time: a file may have 2^51 of them.
fn bounded(ranges: Ranges) -> impl Iterator<Item = Ranges> {
    let mut rest = ranges.into_iter();
    let mut open: Option<(PageIndex, PageCount)> = None;
    std::iter::from_fn(move || {
        let mut job: Ranges = Vec::new();
        let mut room = READ_JOB_PAGES_MAX;
        while room > 0 {
            let Some((start, pages)) = open.take().or_else(|| rest.next()) else { break };
            let take = pages.0.min(room);
            if take > 0 {
                job.push((start, PageCount(take)));
            }
            if pages.0 > take {
                open = Some((start.plus(PageCount(take)), PageCount(pages.0 - take)));
            }
            room -= take;
        }
        (!job.is_empty()).then_some(job)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_bounded_and_lose_nothing() {
        let ranges = vec![
            (PageIndex(0), PageCount(5000)),
            (PageIndex(9000), PageCount(1)),
            (PageIndex(9005), PageCount(9000)),
        ];
        let jobs: Vec<Ranges> = bounded(ranges.clone()).collect();
        let sum = |r: &Ranges| r.iter().map(|x| x.1.0).sum::<u64>();
        assert!(jobs.iter().all(|j| sum(j) <= READ_JOB_PAGES_MAX && !j.is_empty()));
        let pages =
            |all: &[Ranges]| -> Vec<u64> { all.iter().flatten().flat_map(|(s, n)| s.0..s.0 + n.0).collect() };
        assert_eq!(pages(&jobs), pages(&[ranges]));
        assert_eq!(bounded(Vec::new()).count(), 0);
        let endless = vec![(PageIndex(0), PageCount(1 << 51))];
        assert_eq!(bounded(endless).take(3).count(), 3, "without making the other 2^39 first");
    }
}
