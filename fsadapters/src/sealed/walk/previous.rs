//! A root as it was sealed last, asked by directory and name.

use crate::sealed::tree::{EntryId, Inode, Tree};

/// A tree with an index of its directories.
#[derive(Debug)]
pub struct Previous {
    tree: Tree,
    /// For each entry the range of its entries.
    children: Vec<(u32, u32)>,
}

impl Previous {
    /// Indexes `tree`. One whose directories' entries don't stand together has none: then everything is looked at anew.
    #[must_use]
    pub fn new(tree: Tree) -> Option<Previous> {
        let mut children = vec![(0, 0); tree.entries.len()];
        for (number, entry) in (0u32..).zip(&tree.entries).skip(1) {
            let (start, end) = &mut children[entry.parent.0 as usize];
            if *start == 0 {
                (*start, *end) = (number, number);
            }
            if *end != number {
                return None;
            }
            *end += 1;
        }
        Some(Previous { tree, children })
    }

    /// The entry `name` of directory `dir`.
    pub(super) fn child(&self, dir: EntryId, name: &[u8]) -> Option<EntryId> {
        let (start, end) = *self.children.get(dir.0 as usize)?;
        let names = &self.tree.entries[start as usize..end as usize];
        let at = names.binary_search_by(|entry| entry.name[..].cmp(name)).ok()?;
        Some(EntryId(start + at as u32))
    }

    pub(super) fn inode(&self, entry: EntryId) -> &Inode {
        self.tree.inode(entry)
    }

    /// The tree.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}
