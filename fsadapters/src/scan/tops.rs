//! The files and directories with the most to merge, in an order that depends on nothing but the trees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pagefold_engine::savings::FileGroup;
use pagefold_engine::share_map::ShareMap;
use pagefold_engine::units::{MappingId, PageSize, RootId};
use rustc_hash::FxHashMap;

use crate::scan::report::{TopDirectory, TopFile};
use crate::scan::table::DirId;
use crate::scan::unique::Collected;

/// The `most` groups of `map` (the collected map, or that map relabelled by content) with the most to merge.
pub(crate) fn top_files(collected: &Collected, map: &ShareMap, most: usize) -> Vec<TopFile> {
    let page = map.page();
    let mut groups = map.file_groups();
    groups.sort_by_key(|g| std::cmp::Reverse(g.mergeable()));
    // Equal savings are ordered by path: all groups as good as the last one taken compete.
    if let Some(last) = most.checked_sub(1).and_then(|at| groups.get(at)).map(FileGroup::mergeable) {
        groups.truncate(groups.partition_point(|g| g.mergeable() >= last));
    }
    let mut named: Vec<_> = groups.into_iter().map(|g| (first_member(collected, map, &g), g)).collect();
    named.sort_by(|(a, x), (b, y)| y.mergeable().cmp(&x.mergeable()).then_with(|| a.cmp(b)));
    named.truncate(most);
    let top = |((_, path, _), group): (Member, FileGroup)| TopFile {
        path: path.into_boxed_path(),
        copies: group.members.len() as u64,
        cache_bytes_each: group.cache_each.bytes(page),
        resident_duplicate_bytes: map.resident_duplicate_of(&group).bytes(page),
    };
    named.into_iter().map(top).collect()
}

type Member = (RootId, PathBuf, MappingId);

/// The member that stays when the others go: first root, first path.
fn first_member(collected: &Collected, map: &ShareMap, group: &FileGroup) -> Member {
    let root = map.root_of(group.members[0]);
    let in_first = group.members.iter().take_while(|m| map.root_of(**m) == root);
    in_first.map(|m| (root, collected.path(*m), *m)).min().expect("a group has members")
}

/// The `most` directories, by path below the root, whose files are the most cache of further copies.
pub(crate) fn top_directories(collected: &Collected, map: &ShareMap, most: usize) -> Vec<TopDirectory> {
    let mut pages: FxHashMap<DirId, u64> = FxHashMap::default();
    for group in map.file_groups() {
        let several_in_first =
            group.members.len() > 1 && map.root_of(group.members[0]) == map.root_of(group.members[1]);
        let stays = if several_in_first { first_member(collected, map, &group).2 } else { group.members[0] };
        for member in group.members.iter().filter(|m| **m != stays) {
            *pages.entry(collected.file(*member).dir).or_default() += group.cache_each.0;
        }
    }
    by_relative_path(collected, pages, map.page(), most)
}

fn by_relative_path(
    collected: &Collected,
    pages: FxHashMap<DirId, u64>,
    page: PageSize,
    most: usize,
) -> Vec<TopDirectory> {
    let mut sums: BTreeMap<PathBuf, u64> = BTreeMap::new();
    for (dir, pages) in pages {
        *sums.entry(collected.dirs.relative(dir)).or_default() += pages;
    }
    let mut all: Vec<_> = sums.into_iter().collect();
    all.sort_by_key(|(_, pages)| std::cmp::Reverse(*pages));
    all.truncate(most);
    let top = |(path, pages): (PathBuf, u64)| TopDirectory {
        path: if path.as_os_str().is_empty() { Path::new(".").into() } else { path.into_boxed_path() },
        mergeable_file_bytes: pages * page.bytes(),
    };
    all.into_iter().map(top).collect()
}
