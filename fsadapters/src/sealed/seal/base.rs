//! The image that other roots of a domain are told by their differences from (see [`crate::sealed::delta`]).
//!
//! Invariant: a base is an image of a whole root that is published, and the tree is that root's. What it deliberately does not do:
//! look for the best base. Clones of one image differ little from each other, and any of them will do.

use std::collections::{HashMap, HashSet};

use crate::sealed::delta::delta;
use crate::sealed::heal::is_whole;
use crate::sealed::tree::{Inode, InodeIndex, Tree};
use crate::store::manifest::read_manifest;
use crate::store::{ImageDigest, RootRow, Store};

/// A layer of more than this part of the tree gains little, and costs inodes of the store's file system and directories that must be merged.
const WORTH_IT: usize = 4;

/// Roots that are looked at for a base.
const TRIES: usize = 8;

/// A published image and the tree it shows.
pub(super) struct Base {
    pub digest: ImageDigest,
    tree: Tree,
}

/// How a tree differs from a base.
pub(super) enum Difference {
    /// Not at all, but for the root directory's own metadata, which no image holds.
    None,
    /// A little: the layer that goes over it.
    Some(Tree),
}

impl Base {
    /// The image of a whole root that most roots of the domain stand on. `None`: there is none that is whole
    /// (then roots get images of their own; `verify` tells what is damaged).
    pub fn choose(store: &Store, domain: u32) -> Option<Base> {
        let roots: Vec<RootRow> = store.roots().ok()?.into_iter().filter(|r| r.domain == domain).collect();
        let mut uses: HashMap<ImageDigest, usize> = HashMap::new();
        for digest in roots.iter().filter_map(|r| r.layers.last()) {
            *uses.entry(*digest).or_default() += 1;
        }
        let differ = store.generations().ok()?.into_iter().filter(|g| g.has_diff);
        let differ: HashSet<_> = differ.map(|g| (g.id, g.generation)).collect();
        let whole = |root: &&RootRow| root.layers.len() == 1 && !differ.contains(&(root.id, root.generation));
        let mut candidates: Vec<&RootRow> = roots.iter().filter(whole).collect();
        candidates.sort_by_key(|root| (std::cmp::Reverse(uses[&root.layers[0]]), root.id));
        candidates.into_iter().take(TRIES).find_map(|root| Base::of(store, root))
    }

    fn of(store: &Store, root: &RootRow) -> Option<Base> {
        // A view over a damaged image can't be mounted.
        if !is_whole(store, root.layers[0]) {
            tracing::warn!(root = %root.id, image = %root.layers[0], "not used as a base: its image is damaged");
            return None;
        }
        match read_manifest(&store.root_dir(root.id, root.generation)) {
            Ok(tree) => Some(Base { digest: root.layers[0], tree }),
            Err(error) => {
                tracing::warn!(root = %root.id, %error, "not used as a base");
                None
            }
        }
    }

    /// The root that was chosen, as it was sealed.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What `tree` has that this has not; `None` where that is not worth an image of its own kind.
    pub fn difference(&self, tree: &Tree) -> Option<Difference> {
        // Clones, in a tenth of the time.
        if shows_the_same(&self.tree, tree) {
            return Some(Difference::None);
        }
        let layer = delta(&self.tree, tree)?;
        // The root itself is always in it.
        if layer.entries.len() == 1 {
            return Some(Difference::None);
        }
        (layer.entries.len() <= tree.entries.len() / WORTH_IT).then_some(Difference::Some(layer))
    }
}

/// Whether an image of `a` is one of `b`: all but the raw inodes and the root directory's own metadata is equal.
fn shows_the_same(a: &Tree, b: &Tree) -> bool {
    let shown = |(x, y): (&Inode, &Inode)| x.meta == y.meta && x.node == y.node;
    a.entries == b.entries
        && a.inodes.len() == b.inodes.len()
        && a.entries.first().map(|e| e.inode) == Some(InodeIndex(0))
        && a.inodes.iter().zip(&b.inodes).skip(1).all(shown)
}
