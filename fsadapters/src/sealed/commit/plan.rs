//! What has to be done: the state of a view against the sealed tree, by path.
//!
//! Invariant: names only. Whether the raw root still is what was sealed is asked when a name is changed, not here. What it
//! deliberately does not do: follow renames. A renamed directory is a new directory filled from anchors (25 µs a file, no disk
//! space) and an old one that goes: both are idempotent, and a rename in the raw root is neither that nor possible across
//! project ids.

use rustc_hash::FxHashSet;

use super::journal::{Journal, Record, meta_digest};
use super::state::{Children, State};
use crate::sealed::tree::{EntryId, Node, Tree};

/// The work of one commit. Indices are of [`State`].
pub struct Plan {
    /// For each shown entry the sealed entry at the same path.
    pub at: Vec<Option<EntryId>>,
    /// Directories to make, or to see that they are there: parents first.
    pub dirs: Vec<usize>,
    /// Inodes (not directories) that have to be put in place.
    pub inodes: Vec<usize>,
    /// Sealed names that the view does not have: parents first.
    pub gone: Vec<EntryId>,
    /// Names that earlier tries made and neither view nor seal have.
    pub stale: Vec<Vec<u8>>,
    /// Directories whose metadata is to be set: parents first.
    pub metas: Vec<usize>,
}

impl Plan {
    /// Compares.
    pub fn of(state: &State, tree: &Tree, sealed: &Children<'_>, journal: &Journal) -> Plan {
        let (at, kept) = pair(state, tree, sealed);
        let paths: Vec<Option<Vec<u8>>> = match journal.is_empty() {
            true => Vec::new(),
            false => (0..state.entries.len()).map(|e| Some(state.path(e))).collect(),
        };
        let touched = |entry: usize| {
            paths.get(entry).and_then(Option::as_ref).is_some_and(|p| journal.touched.contains(p))
        };
        let sealed_dir = |entry: usize| at[entry].filter(|id| tree.inode(*id).node == Node::Dir);
        let mut inodes = Vec::new();
        let mut near = FxHashSet::default();
        for (index, inode) in state.inodes.iter().enumerate() {
            let same = |name: &usize| {
                let here = at[*name].map(|id| tree.entries[id.0 as usize].inode);
                here.is_some() && here == inode.untouched && !touched(*name)
            };
            if !inode.kind.is_dir() && !inode.names.iter().all(same) {
                inodes.push(index);
                near.extend(inode.names.iter().map(|n| state.entries[*n].parent));
            }
        }
        let is_new = |e: usize| state.inode(e).kind.is_dir() && sealed_dir(e).is_none();
        let all_dirs = || (0..state.entries.len()).filter(|e| state.inode(*e).kind.is_dir());
        let dirs = all_dirs()
            .filter(|&e| {
                e != 0 && (is_new(e) || state.entries[e].in_upper || near.contains(&e) || touched(e))
            })
            .collect();
        let metas = all_dirs()
            .filter(|&e| is_new(e) || state.entries[e].in_upper || near.contains(&e) || touched(e))
            .collect();
        let gone = (1..tree.entries.len()).filter(|i| !kept[*i]).map(|i| EntryId(i as u32)).collect();
        let shown: FxHashSet<&Vec<u8>> = paths.iter().flatten().collect();
        let known = |path: &Vec<u8>| shown.contains(path) || sealed.at(path).is_some();
        let mut stale: Vec<Vec<u8>> = journal.built.keys().filter(|p| !known(p)).cloned().collect();
        stale.sort_unstable();
        Plan { at, dirs, inodes, gone, stale, metas }
    }

    /// The record that has to be written before the first step.
    pub fn record(&self, run: u64, state: &State, tree: &Tree) -> Record {
        let mut dirs = FxHashSet::default();
        let mut paths = Vec::new();
        let mut add = |path: Vec<u8>| {
            dirs.insert(crate::sealed::inode::split(&path).0.to_vec());
            paths.push(path);
        };
        for &inode in &self.inodes {
            state.inodes[inode].names.iter().for_each(|name| add(state.path(*name)));
        }
        self.dirs
            .iter()
            .filter(|e| self.at[**e].is_none_or(|id| tree.inode(id).node != Node::Dir))
            .for_each(|e| add(state.path(*e)));
        self.gone.iter().for_each(|id| add(tree.path(*id)));
        self.stale.iter().for_each(|path| add(path.clone()));
        let metas = self.metas.iter().map(|e| (state.path(*e), meta_digest(&state.inode(*e).meta))).collect();
        let mut dirs: Vec<Vec<u8>> = dirs.into_iter().collect();
        dirs.sort_unstable();
        Record::Run { run, dirs, paths, metas }
    }
}

/// Which sealed entry is at each shown path, and which sealed entries are shown.
fn pair(state: &State, tree: &Tree, sealed: &Children<'_>) -> (Vec<Option<EntryId>>, Vec<bool>) {
    let mut at: Vec<Option<EntryId>> = Vec::with_capacity(state.entries.len());
    let mut kept = vec![false; tree.entries.len()];
    for (index, entry) in state.entries.iter().enumerate() {
        let found = match index {
            0 => Some(EntryId(0)),
            _ => at[entry.parent]
                .filter(|id| tree.inode(*id).node == Node::Dir)
                .and_then(|dir| sealed.child(dir, &entry.name)),
        };
        if let Some(id) = found {
            kept[id.0 as usize] = true;
        }
        at.push(found);
    }
    (at, kept)
}
