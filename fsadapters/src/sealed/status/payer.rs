//! Who pays: which memory group each cached page of the anchors is charged to.
//!
//! The kernel charges a page to the group of the process that brought it in, and it stays there though many use it (design
//! 11). This maps each anchor's cached pages, so it marks them as used: only done when asked for.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use pagefold_sys::frames::Payers;

use super::report::Payer;
use crate::memcg::Hierarchy;

/// Counts pages by group.
pub(super) struct Charges {
    payers: Payers,
    pages: BTreeMap<u64, u64>,
}

impl Charges {
    pub(super) fn new() -> io::Result<Charges> {
        Ok(Charges { payers: Payers::open()?, pages: BTreeMap::new() })
    }

    /// Adds what is cached of `anchor`.
    pub(super) fn add(&mut self, anchor: &File) -> io::Result<()> {
        let size = anchor.metadata()?.len();
        self.payers.of_file(anchor.as_fd(), size, |group| *self.pages.entry(group).or_default() += 1)
    }

    /// By group, the largest first.
    pub(super) fn finish(self, page: u64) -> Vec<Payer> {
        let names = group_names();
        let mut all: Vec<Payer> = self
            .pages
            .into_iter()
            .map(|(number, pages)| Payer {
                group: names.get(&number).cloned().unwrap_or_else(|| format!("(removed group {number})")),
                bytes: pages * page,
            })
            .collect();
        all.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.group.cmp(&b.group)));
        all
    }
}

/// Paths of memory groups by inode number of their directory, which is what the kernel tells.
fn group_names() -> HashMap<u64, String> {
    let mut names = HashMap::new();
    let Ok(Some(hierarchy)) = Hierarchy::mounted() else { return names };
    let top = hierarchy.top();
    if let Ok(meta) = std::fs::metadata(top) {
        names.insert(meta.ino(), "/".to_owned());
    }
    let mut stack = vec![top.to_owned()];
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                names.insert(entry.ino(), name_below(top, &entry.path()));
                stack.push(entry.path());
            }
        }
    }
    names
}

fn name_below(top: &Path, path: &Path) -> String {
    format!("/{}", path.strip_prefix(top).unwrap_or(path).display())
}
