//! Who shows which anchor: sites, counted.
//!
//! Invariant: an anchor belongs to one domain, so nothing is counted across domains.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::report::Figures;
use super::written::{HiddenPaths, hides};
use crate::sealed::tree::{Data, EntryId, InodeIndex, Node, Tree};
use crate::store::AnchorKey;

/// An anchor and its sites.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Use {
    pub domain: u32,
    pub pages: u64,
    /// Inodes of sealed roots.
    pub sites: u64,
    /// Of these, shown by a mounted view that has not written them.
    pub live_sites: u64,
    /// In cache.
    pub resident: u64,
    /// Pages mapped by processes of views, each view for itself.
    pub mapped_by_views: u64,
    /// Distinct pages mapped.
    pub mapped: u64,
}

/// All anchors that roots name.
#[derive(Debug, Default)]
pub(super) struct Sites(pub HashMap<AnchorKey, Use>);

/// What a root shows.
#[derive(Debug, Default)]
pub(super) struct RootSites {
    /// Each inode with data.
    pub anchors: Vec<AnchorKey>,
}

impl Sites {
    /// Counts a root. `hidden` is what its view wrote, if it is mounted.
    pub(super) fn add_root(
        &mut self,
        domain: u32,
        tree: &Tree,
        hidden: Option<&HiddenPaths>,
        page: u64,
    ) -> RootSites {
        let shown = hidden.map(|hidden| shown_inodes(tree, hidden));
        let mut root = RootSites::default();
        for (index, inode) in tree.inodes.iter().enumerate() {
            let Node::File { size, data: Data::Anchor(key) } = &inode.node else { continue };
            let site =
                self.0.entry(*key).or_insert(Use { domain, pages: size.div_ceil(page), ..Use::default() });
            site.sites += 1;
            site.live_sites += u64::from(shown.as_ref().is_some_and(|shown| shown[index]));
            root.anchors.push(*key);
        }
        root
    }

    /// Pages of the root that some other site shows too, all its pages, and resident ones.
    pub(super) fn of_root(&self, root: &RootSites) -> RootPages {
        let mut pages = RootPages::default();
        for site in root.anchors.iter().filter_map(|key| self.0.get(key)) {
            pages.all += site.pages;
            pages.shared += if site.sites > 1 { site.pages } else { 0 };
        }
        let mut distinct = root.anchors.clone();
        distinct.sort_unstable();
        distinct.dedup();
        pages.resident = distinct.iter().filter_map(|key| self.0.get(key)).map(|site| site.resident).sum();
        pages
    }

    /// The figures of one domain, without roots and views.
    pub(super) fn figures(&self, domain: u32, page: u64) -> Figures {
        let mut f = Figures::default();
        for site in self.0.values().filter(|site| site.domain == domain) {
            f.anchors += 1;
            match site.sites {
                0 => {}
                1 => f.pages_unshared += site.pages,
                n => {
                    f.pages_shared += site.pages;
                    f.pages_sharing += site.pages * (n - 1);
                }
            }
            f.is_shared_bytes += site.pages * site.live_sites.saturating_sub(1) * page;
            f.anchors_resident_bytes += site.resident * page;
            f.mapped_bytes += site.mapped * page;
            f.saved_now_bytes += (site.mapped_by_views - site.mapped) * page;
        }
        f.could_be_saved_bytes = f.pages_sharing * page;
        f
    }
}

/// In pages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RootPages {
    pub all: u64,
    pub shared: u64,
    pub resident: u64,
}

/// By inode: whether some name of it still shows what was sealed.
fn shown_inodes(tree: &Tree, hidden: &HiddenPaths) -> Vec<bool> {
    if hidden.is_empty() {
        return vec![true; tree.inodes.len()];
    }
    let mut broken = vec![false; tree.inodes.len()];
    let mut shown = vec![false; tree.inodes.len()];
    for (index, entry) in tree.entries.iter().enumerate() {
        let InodeIndex(inode) = entry.inode;
        let path = tree.path(EntryId(index as u32));
        let hides = hides(hidden, Path::new(std::ffi::OsStr::from_bytes(&path)));
        // A hard link that was written is written under all its names, though the upper may hold only one.
        broken[inode as usize] |= hides;
        shown[inode as usize] |= !hides;
    }
    shown.iter().zip(broken).map(|(shown, broken)| *shown && !broken).collect()
}

/// Sums domains.
pub(super) fn sum(all: impl Iterator<Item = Figures>) -> Figures {
    all.fold(Figures::default(), |mut t, f| {
        t.roots += f.roots;
        t.views += f.views;
        t.anchors += f.anchors;
        t.pages_shared += f.pages_shared;
        t.pages_sharing += f.pages_sharing;
        t.pages_unshared += f.pages_unshared;
        t.could_be_saved_bytes += f.could_be_saved_bytes;
        t.is_shared_bytes += f.is_shared_bytes;
        t.anchors_resident_bytes += f.anchors_resident_bytes;
        t.mapped_bytes += f.mapped_bytes;
        t.saved_now_bytes += f.saved_now_bytes;
        t
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::status::written::Written;
    use crate::sealed::tree::{Entry, Inode, Meta, RawFacts};

    const PAGE: u64 = 4096;

    /// A root directory with one file per anchor number, named by its position.
    fn tree(anchors: &[u8]) -> Tree {
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let inode = |node| Inode { meta: meta.clone(), raw: RawFacts::default(), node };
        let file = |n: &u8| Node::File { size: 2 * PAGE - 1, data: Data::Anchor(AnchorKey([*n; 32])) };
        let entry = |name: String, at: usize| Entry {
            parent: EntryId(0),
            name: name.into_bytes().into(),
            inode: InodeIndex(at as u32),
        };
        let mut tree = Tree { entries: vec![entry(String::new(), 0)], inodes: vec![inode(Node::Dir)] };
        for (at, n) in anchors.iter().enumerate() {
            tree.entries.push(entry(at.to_string(), at + 1));
            tree.inodes.push(inode(file(n)));
        }
        tree
    }

    #[test]
    fn ksm_words_count_what_ksm_counts() {
        let mut sites = Sites::default();
        let first = sites.add_root(1, &tree(&[7, 8]), None, PAGE);
        sites.add_root(1, &tree(&[7]), Some(&HiddenPaths::default()), PAGE);
        sites.add_root(1, &tree(&[7]), Some(&HiddenPaths::default()), PAGE);
        let f = sites.figures(1, PAGE);
        assert_eq!((f.anchors, f.pages_shared, f.pages_sharing, f.pages_unshared), (2, 2, 4, 2));
        assert_eq!((f.could_be_saved_bytes, f.is_shared_bytes), (4 * PAGE, 2 * PAGE));
        let pages = sites.of_root(&first);
        assert_eq!((pages.all, pages.shared), (4, 2));
        assert_eq!(sites.figures(2, PAGE), Figures::default(), "nothing of another domain");
    }

    #[test]
    fn a_broken_site_shares_no_more() {
        let written = Written { broken: vec![("0".into(), 1)], ..Written::default() };
        let mut sites = Sites::default();
        sites.add_root(1, &tree(&[7]), Some(&HiddenPaths::default()), PAGE);
        sites.add_root(1, &tree(&[7]), Some(&HiddenPaths::of(&written)), PAGE);
        let f = sites.figures(1, PAGE);
        assert_eq!((f.could_be_saved_bytes, f.is_shared_bytes), (2 * PAGE, 0));
    }
}
