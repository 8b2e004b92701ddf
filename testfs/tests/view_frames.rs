//! Which page frames views map: the same where they are to share, none in common where they must not.
//!
//! Invariant: asked of the kernel's page tables, not of pagefold. What it deliberately does not do: count what is saved.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::store::{RootRow, Store};
use pagefold_sys::frames::Frames;

mod view_support;
use view_support::{BOTH, Home, bytes, clone_tree, files, settle};

/// One page, many, and a last page that is not full.
const SIZES: [(&str, usize); 3] = [("page", 4096), ("many", 300 * 4096), ("dir/odd", 70_001)];

fn seal_in(home: &Home, store: &Store, name: &str, domain: &str) -> RootRow {
    let config = SealConfig { domain: domain.to_owned(), ..SealConfig::new(vec![home.at(name)]) };
    seal(store, &config, &Progress::default()).unwrap();
    store.find_root(home.at(name)).unwrap()
}

/// Frames of a file by page, all of them, after reading it.
fn frames(path: &Path, wanted: &[u8]) -> BTreeMap<u64, u64> {
    assert!(fs::read(path).unwrap() == wanted, "{path:?}");
    let file = File::open(path).unwrap();
    let mut found = BTreeMap::new();
    Frames::open()
        .unwrap()
        .of_file(file.as_fd(), wanted.len() as u64, |page, frame| {
            found.insert(page, frame);
        })
        .unwrap();
    assert_eq!(found.len(), wanted.len().div_ceil(4096), "{path:?} is not cached in whole");
    assert!(found.values().all(|frame| *frame != 0), "page frame numbers are shown to root only");
    found
}

/// Frames of one file in all views, all true at once: the kernel may move pages, so looked at until nothing moved meanwhile.
fn quiet_frames(views: &[PathBuf; 3], name: &str, wanted: &[u8]) -> [BTreeMap<u64, u64>; 3] {
    let look = || views.each_ref().map(|view| frames(&view.join(name), wanted));
    let mut before = look();
    for _ in 0..20 {
        let after = look();
        if after == before {
            return after;
        }
        before = after;
    }
    panic!("{name}: frames don't hold still");
}

#[test]
fn privileged_frames_are_one_within_a_domain_and_none_across() {
    for kind in BOTH {
        let mut home = Home::new(kind);
        fs::create_dir_all(home.at("a/dir")).unwrap();
        for (seed, (name, size)) in SIZES.into_iter().enumerate() {
            fs::write(home.at("a").join(name), bytes(seed as u64, size)).unwrap();
        }
        settle(&home.at("a"));
        let roots = [("a", "one"), ("b", "one"), ("c", "two")];
        roots[1..].iter().for_each(|(name, _)| clone_tree(&home.at("a"), &home.at(name)));
        settle(&home.at("a"));
        let store = home.store();
        let views = roots.map(|(name, domain)| {
            let row = seal_in(&home, &store, name, domain);
            home.mount(&store, &row, &format!("view {name}"))
        });
        for (seed, (name, size)) in SIZES.into_iter().enumerate() {
            let wanted = bytes(seed as u64, size);
            let [a, b, c] = quiet_frames(&views, name, &wanted);
            assert_eq!(a, b, "{kind:?} {name}: one domain, one copy in memory");
            let shared: Vec<_> = c.values().filter(|frame| a.values().any(|other| other == *frame)).collect();
            assert!(shared.is_empty(), "{kind:?} {name}: frames of both domains: {shared:?}");
            // The clones themselves have pages of their own: it is the view that shares.
            let raw = frames(&home.at("b").join(name), &wanted);
            assert!(raw.values().all(|frame| !b.values().any(|other| other == frame)), "{kind:?} {name}");
        }
        let of = |domain: u32| files(&store.dir().join(format!("anchors/{domain}"))).len();
        let domains = store.domains().unwrap();
        assert_eq!(domains.iter().map(|d| of(d.id)).collect::<Vec<_>>(), [SIZES.len(); 2]);
    }
}
