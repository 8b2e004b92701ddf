//! Each inode once: hard links, bind mounts and whatever else shows one inode under several names.
//!
//! Which name is kept must not depend on which thread came first: the one in the first root, there the first by path.

use pagefold_engine::share_map::ShareMap;
use pagefold_engine::units::{DomainId, MappingId, RootId};

use crate::scan::table::{DirTable, FileRecord, FileTable};
use crate::scan::walk::Walked;
use std::path::PathBuf;

/// The walk's files as the engine's map, and how to get back to their names.
#[derive(Debug)]
pub(crate) struct Collected {
    pub map: ShareMap,
    /// File record by mapping.
    kept: Vec<u32>,
    pub files: FileTable,
    pub dirs: DirTable,
    pub devs: Vec<u64>,
    /// Further names of counted inodes, by the root they are in.
    pub hard_links: Vec<u64>,
}

impl Collected {
    /// The record of `mapping`.
    pub fn file(&self, mapping: MappingId) -> &FileRecord {
        &self.files.files[self.kept[mapping.0 as usize] as usize]
    }

    /// Where `mapping` was found.
    pub fn path(&self, mapping: MappingId) -> PathBuf {
        self.path_from(self.dirs.roots(), mapping)
    }

    /// Where `mapping` was found, with `roots` for the roots.
    pub fn path_from(&self, roots: &[PathBuf], mapping: MappingId) -> PathBuf {
        let file = self.file(mapping);
        self.dirs.path_from(roots, file.dir).join(self.files.name(file))
    }
}

/// Drops further names and builds the map.
pub(crate) fn collect(
    walked: Walked,
    page: pagefold_engine::units::PageSize,
    domains: Vec<DomainId>,
) -> Collected {
    let Walked { dirs, mut files, layouts, devs, .. } = walked;
    let mut hard_links = vec![0; domains.len()];
    let kept = first_names(&files, &dirs, &mut hard_links);
    let mut map = ShareMap::new(page, domains, layouts);
    for runs in files.take_partial() {
        map.push_partial(runs);
    }
    map.reserve(kept.len());
    for at in &kept {
        let file = &files.files[*at as usize];
        map.push(dirs.root_of(file.dir), file.layout, FileTable::cached(file));
    }
    Collected { map, kept, files, dirs, devs, hard_links }
}

/// Indices of the records to keep, ascending.
fn first_names(files: &FileTable, dirs: &DirTable, hard_links: &mut [u64]) -> Vec<u32> {
    let count = u32::try_from(files.files.len()).expect("fewer than 2^32 files");
    let mut order: Vec<(u32, u64, u32)> =
        (0..count).map(|at| (files.files[at as usize].dev, files.files[at as usize].ino, at)).collect();
    order.sort_unstable();
    let mut kept: Vec<u32> = Vec::with_capacity(order.len());
    for names in order.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
        let best = match names {
            [only] => only.2,
            several => {
                let best = several.iter().map(|n| n.2).min_by_key(|at| name_order(files, dirs, *at));
                let best = best.expect("a group has a member");
                for (_, _, at) in several.iter().filter(|n| n.2 != best) {
                    hard_links[dirs.root_of(files.files[*at as usize].dir).0 as usize] += 1;
                }
                best
            }
        };
        kept.push(best);
    }
    kept.sort_unstable();
    kept
}

fn name_order(files: &FileTable, dirs: &DirTable, at: u32) -> (RootId, PathBuf) {
    let file = &files.files[at as usize];
    (dirs.root_of(file.dir), dirs.relative(file.dir).join(files.name(file)))
}
