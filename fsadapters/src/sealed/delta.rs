//! What one sealed tree has that another has not: the layer that goes on top of the other's image.
//!
//! Metadata images are cached like files. Sixty-four roots that differ in a few files each would cache sixty-four whole images;
//! with a layer of differences ([`super::diff`]) they cache one. An overlay of [differences, base] shows the new tree:
//!
//! * a directory with a difference below it is in the layer, with its own metadata, and merges with the base's;
//! * a name that is gone is a whiteout: a character device 0/0, which no sealed root itself holds ([`super::image::check`]);
//! * hard links: a group whose names or contents differ in any way is in the layer whole.
//!
//! Invariant: base plus layer is the new tree exactly (tested as a property). What it deliberately does not do: choose the base.

use std::collections::{BTreeMap, HashMap};

use super::tree::{Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree};

/// The children of each directory, ascending by name.
struct Children(Vec<Vec<EntryId>>);

impl Children {
    fn of(tree: &Tree) -> Children {
        let mut lists = vec![Vec::new(); tree.entries.len()];
        for (at, entry) in tree.entries.iter().enumerate().skip(1) {
            lists[entry.parent.0 as usize].push(EntryId(at as u32));
        }
        Children(lists)
    }

    fn get(&self, dir: EntryId) -> &[EntryId] {
        &self.0[dir.0 as usize]
    }
}

fn name_of(tree: &Tree, id: EntryId) -> &[u8] {
    &tree.entries[id.0 as usize].name
}

/// Names of inodes that have several, by inode.
fn link_groups(tree: &Tree) -> HashMap<InodeIndex, Vec<Vec<u8>>> {
    let mut names = vec![0u32; tree.inodes.len()];
    for entry in &tree.entries {
        names[entry.inode.0 as usize] += 1;
    }
    let mut groups: HashMap<InodeIndex, Vec<Vec<u8>>> = HashMap::new();
    for (at, entry) in tree.entries.iter().enumerate() {
        if names[entry.inode.0 as usize] > 1 {
            groups.entry(entry.inode).or_default().push(tree.path(EntryId(at as u32)));
        }
    }
    groups.values_mut().for_each(|paths| paths.sort_unstable());
    groups
}

struct Differ<'a> {
    base: &'a Tree,
    new: &'a Tree,
    base_links: HashMap<InodeIndex, Vec<Vec<u8>>>,
    new_links: HashMap<InodeIndex, Vec<Vec<u8>>>,
    new_children: Children,
    /// Entries of the new tree that go into the delta.
    wanted: Vec<bool>,
    /// Names that the base has and the new tree has not, ascending, by directory of the new tree.
    gone: BTreeMap<EntryId, Vec<Box<[u8]>>>,
}

/// The layer that makes `new` of `base`; raw facts are left out, equal layers are equal. `None` where an overlay would not show it:
/// overlayfs looks for a redirect `/xx/...` in the layers below first, and an entry of two hex digits in the top directory of the base
/// would be taken for the place of anchors.
#[must_use]
pub fn delta(base: &Tree, new: &Tree) -> Option<Tree> {
    let base_children = Children::of(base);
    let hidden = |name: &[u8]| name.len() == 2 && name.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let roots = base_children.get(EntryId(0));
    if roots.iter().any(|id| hidden(&base.entries[id.0 as usize].name)) {
        return None;
    }
    let mut differ = Differ {
        base,
        new,
        base_links: link_groups(base),
        new_links: link_groups(new),
        new_children: Children::of(new),
        wanted: vec![false; new.entries.len()],
        gone: BTreeMap::new(),
    };
    differ.wanted[0] = true;
    let mut dirs = vec![(EntryId(0), EntryId(0))];
    while let Some((in_base, in_new)) = dirs.pop() {
        differ.directory(base_children.get(in_base), in_new, &mut dirs);
    }
    Some(layer(new, &differ.wanted, &differ.gone))
}

impl Differ<'_> {
    /// Compares two directories that both trees have; those below that both have as well go to `dirs`.
    fn directory(&mut self, base: &[EntryId], new_dir: EntryId, dirs: &mut Vec<(EntryId, EntryId)>) {
        let new_len = self.new_children.get(new_dir).len();
        let (mut b, mut n) = (0, 0);
        loop {
            let left = base.get(b).copied();
            let right = (n < new_len).then(|| self.new_children.get(new_dir)[n]);
            let order = match (left, right) {
                (None, None) => return,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(l), Some(r)) => name_of(self.base, l).cmp(name_of(self.new, r)),
            };
            match (order, left, right) {
                (std::cmp::Ordering::Less, Some(l), _) => {
                    self.gone.entry(new_dir).or_default().push(name_of(self.base, l).into());
                    self.want(new_dir);
                    b += 1;
                }
                (std::cmp::Ordering::Greater, _, Some(r)) => {
                    self.want_below(r);
                    n += 1;
                }
                (_, Some(l), Some(r)) => {
                    self.pair(l, r, dirs);
                    (b, n) = (b + 1, n + 1);
                }
                _ => return,
            }
        }
    }

    fn pair(&mut self, left: EntryId, right: EntryId, dirs: &mut Vec<(EntryId, EntryId)>) {
        let (old, new) = (self.base.inode(left), self.new.inode(right));
        match (&old.node, &new.node) {
            (Node::Dir, Node::Dir) => {
                if old.meta != new.meta {
                    self.want(right);
                }
                dirs.push((left, right));
            }
            // A directory where none was: nothing of the base shows through.
            (_, Node::Dir) => self.want_below(right),
            _ => {
                let same = old.meta == new.meta
                    && old.node == new.node
                    && self.base_links.get(&self.base.entries[left.0 as usize].inode)
                        == self.new_links.get(&self.new.entries[right.0 as usize].inode);
                if !same {
                    self.want(right);
                }
            }
        }
    }

    /// An entry and the directories that lead to it.
    fn want(&mut self, entry: EntryId) {
        let mut at = entry;
        while !self.wanted[at.0 as usize] {
            self.wanted[at.0 as usize] = true;
            at = self.new.entries[at.0 as usize].parent;
        }
    }

    fn want_below(&mut self, entry: EntryId) {
        let mut todo = vec![entry];
        while let Some(at) = todo.pop() {
            self.want(at);
            todo.extend_from_slice(self.new_children.get(at));
        }
    }
}

/// Overlayfs' mark for "not here".
pub(super) fn whiteout() -> Inode {
    let meta = Meta { mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
    Inode { meta, raw: RawFacts::default(), node: Node::CharDevice(0) }
}

/// The wanted entries of a tree in its order, with whiteouts for the names that are gone. The top directory's own metadata is not
/// told: no layer shows it.
fn layer(tree: &Tree, wanted: &[bool], gone: &BTreeMap<EntryId, Vec<Box<[u8]>>>) -> Tree {
    let mut out = Tree { entries: Vec::new(), inodes: vec![Inode { node: Node::Dir, ..whiteout() }] };
    let mut entry_at = vec![EntryId(0); tree.entries.len()];
    let mut inode_at = HashMap::from([(InodeIndex(0), InodeIndex(0))]);
    let mut left: BTreeMap<EntryId, &[Box<[u8]>]> =
        gone.iter().map(|(dir, names)| (*dir, &names[..])).collect();
    // One inode for all: it has nothing that would differ.
    let mut nothing: Option<InodeIndex> = None;
    let mut hide = |out: &mut Tree, parent: EntryId, name: &[u8]| {
        let inode = *nothing.get_or_insert_with(|| add_inode(out, whiteout()));
        out.entries.push(Entry { parent, name: name.into(), inode });
    };
    for (at, entry) in tree.entries.iter().enumerate().filter(|(at, _)| wanted[*at]) {
        let parent = entry_at[entry.parent.0 as usize];
        // Names stay ascending.
        if let Some(names) = left.get_mut(&entry.parent).filter(|_| at > 0) {
            while let Some((name, rest)) = names.split_first().filter(|(name, _)| **name < entry.name) {
                hide(&mut out, parent, name);
                *names = rest;
            }
        }
        let inode = match inode_at.get(&entry.inode) {
            Some(known) => *known,
            None => {
                let inode = Inode { raw: RawFacts::default(), ..tree.inodes[entry.inode.0 as usize].clone() };
                let new = add_inode(&mut out, inode);
                inode_at.insert(entry.inode, new);
                new
            }
        };
        entry_at[at] = EntryId(out.entries.len() as u32);
        out.entries.push(Entry { parent, name: entry.name.clone(), inode });
    }
    for (dir, names) in left {
        names.iter().for_each(|name| hide(&mut out, entry_at[dir.0 as usize], name));
    }
    out
}

fn add_inode(tree: &mut Tree, inode: Inode) -> InodeIndex {
    tree.inodes.push(inode);
    InodeIndex(tree.inodes.len() as u32 - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::sealed::tree::Data;
    use crate::store::key::AnchorKey;
    use crate::store::manifest::{decode, encode};

    /// A tree as a map from path to (what, link group); directories are made as needed.
    type Plan = BTreeMap<Vec<u8>, (u8, Option<u8>)>;

    fn inode(what: u8) -> Inode {
        let meta = Meta { mode: u32::from(what), uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let node = Node::File { size: 1, data: Data::Anchor(AnchorKey([what; 32])) };
        Inode { meta, raw: RawFacts::default(), node }
    }

    fn tree_of(plan: &Plan) -> Tree {
        let dir = |what| Inode { node: Node::Dir, ..inode(what) };
        let mut tree = Tree::default();
        tree.inodes.push(dir(0));
        tree.entries.push(Entry { parent: EntryId(0), name: Box::default(), inode: InodeIndex(0) });
        let mut ids: BTreeMap<Vec<u8>, EntryId> = BTreeMap::from([(Vec::new(), EntryId(0))]);
        let mut groups: BTreeMap<u8, InodeIndex> = BTreeMap::new();
        // Ascending paths of single letters: parents come first, children ascending.
        for (path, (what, group)) in plan {
            let below = path.len().saturating_sub(2);
            let Some(parent) = ids.get(&path[..below]).copied() else { continue };
            if !matches!(tree.inode(parent).node, Node::Dir) {
                continue;
            }
            let is_dir = what % 3 == 0;
            let node = match group.filter(|_| !is_dir).and_then(|g| groups.get(&g).copied()) {
                Some(known) => known,
                None => {
                    tree.inodes.push(if is_dir { dir(*what) } else { inode(*what) });
                    InodeIndex(tree.inodes.len() as u32 - 1)
                }
            };
            if let Some(group) = group.filter(|_| !is_dir) {
                groups.entry(group).or_insert(node);
            }
            ids.insert(path.clone(), EntryId(tree.entries.len() as u32));
            tree.entries.push(Entry { parent, name: path[path.len() - 1..].into(), inode: node });
        }
        tree
    }

    /// Path to (mode, kind, the names it is linked with).
    type View = BTreeMap<Vec<u8>, (u32, Node, Vec<Vec<u8>>)>;

    /// What an overlay of one layer shows.
    fn shown(tree: &Tree) -> View {
        let mut all = View::new();
        let groups = link_groups(tree);
        for at in 0..tree.entries.len() {
            let id = EntryId(at as u32);
            let links = groups.get(&tree.entries[at].inode).cloned().unwrap_or_default();
            let inode = tree.inode(id);
            all.insert(tree.path(id), (inode.meta.mode, inode.node.clone(), links));
        }
        all
    }

    /// Base plus delta by overlayfs' rules, from bottom to top.
    fn merged(base: &Tree, layer: &Tree) -> View {
        let mut all = shown(base);
        let below = |path: &[u8], dir: &[u8]| {
            path.len() > dir.len() && path.starts_with(dir) && path[dir.len()] == b'/'
        };
        for (path, entry) in shown(layer) {
            if entry.1 == Node::CharDevice(0) {
                all.retain(|other, _| *other != path && !below(other, &path));
                continue;
            }
            let hides = !matches!(entry.1, Node::Dir) || !matches!(all.get(&path), Some((_, Node::Dir, _)));
            if hides && !path.is_empty() {
                all.retain(|other, _| !below(other, &path));
            }
            // The top directory's own metadata is told by no layer.
            if !path.is_empty() {
                all.insert(path, entry);
            }
        }
        all
    }

    fn plans() -> impl Strategy<Value = Plan> {
        let path = prop::collection::vec(prop::sample::select(b"xyz".to_vec()), 1..4).prop_map(|letters| {
            let parts: Vec<&[u8]> = letters.chunks(1).collect();
            parts.join(&b'/')
        });
        prop::collection::btree_map(path, (0u8..6, prop::option::of(0u8..2)), 0..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn base_and_delta_are_the_new_tree(base in plans(), new in plans()) {
            let (base, new) = (tree_of(&base), tree_of(&new));
            let layer = delta(&base, &new).expect("no name is hidden");
            prop_assert_eq!(merged(&base, &layer), shown(&new));
            // What it is written down as holds it to all invariants of a tree.
            let bytes = encode(&layer, None).expect("small");
            prop_assert_eq!(decode(&bytes), Ok(layer));
        }
    }

    #[test]
    fn equal_trees_have_no_difference_and_hidden_names_no_delta() {
        let plan: Plan = [(b"x".to_vec(), (3, None)), (b"x/y".to_vec(), (1, Some(1)))].into();
        let same = delta(&tree_of(&plan), &tree_of(&plan)).expect("nothing is hidden");
        assert_eq!(same.entries.len(), 1);
        let mut hidden = tree_of(&plan);
        hidden.entries[1].name = (*b"a7").into();
        assert_eq!(delta(&hidden, &tree_of(&plan)), None);
    }
}
