//! A tree that was sealed before, asked by directory and name: the root itself, or another one that it may be a clone of.

use crate::sealed::tree::{EntryId, Inode, Tree};

/// For each entry of a tree the range of its entries.
#[derive(Debug)]
struct Children(Vec<(u32, u32)>);

impl Children {
    /// `None` for a tree whose directories' entries don't stand together.
    fn of(tree: &Tree) -> Option<Children> {
        let mut children = vec![(0, 0); tree.entries.len()];
        for (number, entry) in (0u32..).zip(&tree.entries).skip(1) {
            let (start, end) = children.get_mut(entry.parent.0 as usize)?;
            if *start == 0 {
                (*start, *end) = (number, number);
            }
            if *end != number {
                return None;
            }
            *end += 1;
        }
        Some(Children(children))
    }

    fn child(&self, tree: &Tree, dir: EntryId, name: &[u8]) -> Option<EntryId> {
        let (start, end) = *self.0.get(dir.0 as usize)?;
        let names = &tree.entries[start as usize..end as usize];
        let at = names.binary_search_by(|entry| entry.name[..].cmp(name)).ok()?;
        Some(EntryId(start + at as u32))
    }
}

/// A root as it was sealed last, with an index of its directories.
#[derive(Debug)]
pub struct Previous {
    tree: Tree,
    children: Children,
}

impl Previous {
    /// Indexes `tree`. One whose directories' entries don't stand together has none: then everything is looked at anew.
    #[must_use]
    pub fn new(tree: Tree) -> Option<Previous> {
        let children = Children::of(&tree)?;
        Some(Previous { tree, children })
    }

    /// The entry `name` of directory `dir`.
    pub(super) fn child(&self, dir: EntryId, name: &[u8]) -> Option<EntryId> {
        self.children.child(&self.tree, dir, name)
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

/// Another root of the domain, of which those that are walked may be clones. What it has under a name is a guess and nothing more.
#[derive(Debug)]
pub struct Model<'a> {
    tree: &'a Tree,
    children: Children,
}

impl<'a> Model<'a> {
    /// Indexes `tree`; `None` where its directories' entries don't stand together.
    #[must_use]
    pub fn new(tree: &'a Tree) -> Option<Model<'a>> {
        Some(Model { tree, children: Children::of(tree)? })
    }

    pub(super) fn child(&self, dir: EntryId, name: &[u8]) -> Option<EntryId> {
        self.children.child(self.tree, dir, name)
    }

    pub(super) fn inode(&self, entry: EntryId) -> &Inode {
        self.tree.inode(entry)
    }
}
