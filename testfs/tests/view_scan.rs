//! `scan`'s look at files in views: the real inode is found whatever layer it is in, and the conformance cases hold.

mod view_support;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use pagefold_fsadapters::fsid;
use pagefold_fsadapters::os::Os;
use pagefold_fsadapters::overlay::RealFile;
use pagefold_fsadapters::scan::{Progress, RootSpec, ScanConfig, scan};
use pagefold_fsadapters::source::ReadOptions;
use pagefold_testfs::conformance::{KernelFs, KernelRig, run_all};
use pagefold_testfs::rig::RigFs;
use view_support::*;

fn look(path: &Path) -> RealFile {
    let file = File::open(path).unwrap();
    let facts = fsid::describe(File::open(path.parent().unwrap()).unwrap().as_fd()).unwrap();
    facts.overlay.expect("a view").real_file(file.as_fd()).unwrap()
}

/// Device and inode number of the file whose pages `path` shows.
fn real(path: &Path) -> (u64, u64) {
    match look(path) {
        RealFile::Open(fd) => inode(&File::from(fd)),
        RealFile::Named(_) => panic!("{path:?}: no real inode found"),
    }
}

fn config(roots: &[&Path]) -> ScanConfig {
    let root = |path: &&Path| RootSpec { path: path.to_path_buf(), domain: "default".into() };
    ScanConfig {
        roots: roots.iter().map(root).collect(),
        content: false,
        threads: 2,
        read: ReadOptions { threads: 1, queue_depth: 4 },
        exclude: None,
        one_file_system: true,
        top: 0,
        matrix: false,
        top_directories: false,
    }
}

fn inode(file: &File) -> (u64, u64) {
    let meta = file.metadata().unwrap();
    (meta.dev(), meta.ino())
}

fn raw(path: impl AsRef<Path>) -> (u64, u64) {
    inode(&File::open(path).unwrap())
}

#[test]
fn privileged_the_real_inode_of_a_file_in_a_view_is_found() {
    for kind in BOTH {
        let mut home = Home::new(kind);
        plain_root(&home.at("a"));
        fs::hard_link(home.at("a/f"), home.at("a/dir/link")).unwrap();
        // Enough names that the second root is a layer over the image of the first.
        (0..40).for_each(|n| fs::create_dir(home.at("a").join(format!("filler{n}"))).unwrap());
        clone_tree(&home.at("a"), &home.at("b"));
        fs::write(home.at("b/g"), bytes(77, 9000)).unwrap();
        fs::set_permissions(home.at("b/dir/h"), fs::Permissions::from_mode(0o600)).unwrap();
        settle(&home.at("a"));
        let store = home.store();
        let rows = home.seal(&store, &["a", "b"]);
        assert!(store.diff(rows[1].id, rows[1].generation).unwrap().is_some(), "{kind:?}: no layer");
        let (a, b) = (home.mount(&store, &rows[0], "va"), home.mount(&store, &rows[1], "vb"));
        let anchors = home.at(".pagefold/anchors");
        let anchors: Vec<_> = files(&anchors).iter().map(raw).collect();
        for name in ["f", "dir/link", "dir/h", "dir/sub/i"] {
            assert_eq!(real(&a.join(name)), real(&b.join(name)), "{kind:?} {name}");
            assert!(anchors.contains(&real(&a.join(name))), "{kind:?} {name}: another file's inode");
        }
        assert!(anchors.contains(&real(&b.join("g"))));
        assert_ne!(real(&a.join("g")), real(&b.join("g")), "{kind:?}");

        // Attributes copied up: the data is still the anchor's. Data copied up: it is not, moved or not.
        let upper = store.root_dir(rows[1].id, rows[1].generation).join("upper");
        fs::set_permissions(b.join("dir/h"), fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(b.join("f"), fs::Permissions::from_mode(0o711)).unwrap();
        fs::rename(b.join("dir/sub/i"), b.join("moved")).unwrap();
        assert_eq!(real(&a.join("dir/h")), real(&b.join("dir/h")), "{kind:?}");
        assert_eq!(real(&a.join("f")), real(&b.join("f")), "{kind:?}");
        // The upper knows a hard link only by the name through which it was changed: nothing is claimed for the others.
        assert!(matches!(look(&b.join("dir/link")), RealFile::Named(_)), "{kind:?}");
        assert_eq!(real(&a.join("dir/sub/i")), real(&b.join("moved")), "{kind:?}");
        for name in ["f", "dir/h", "moved"] {
            let file = File::options().write(true).open(b.join(name)).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
            // Until then its blocks may change between two looks at it, and nothing is claimed.
            settle(&home.at("a"));
            assert_eq!(real(&b.join(name)), raw(upper.join(name)), "{kind:?} {name}");
        }
        fs::write(b.join("born"), b"new").unwrap();
        settle(&home.at("a"));
        assert_eq!(real(&b.join("born")), raw(upper.join("born")), "{kind:?}");
    }
}

#[test]
fn privileged_a_scan_of_views_finds_no_waste_and_of_raw_roots_all_of_it() {
    for kind in BOTH {
        let mut home = Home::new(kind);
        let (store, rows) = home.sealed(&["a", "b", "c"]);
        let views: Vec<_> =
            rows.iter().zip(["va", "vb", "vc"]).map(|(row, at)| home.mount(&store, row, at)).collect();
        let figures = |roots: &[&Path]| {
            let report = scan(&Os::new(), &config(roots), &Progress::default());
            assert!(report.errors.is_empty(), "{kind:?}: {:?}", report.errors);
            report.totals
        };
        let one = figures(&[&views[0]]);
        assert!(one.cache_bytes > 0 && one.undecided_bytes == 0, "{kind:?}: {one:?}");
        let all = figures(&[&views[0], &views[1], &views[2]]);
        assert_eq!(all.cache_bytes, one.cache_bytes, "{kind:?}");
        assert_eq!((all.mergeable_page_bytes, all.undecided_bytes), (0, 0), "{kind:?}");
        let raw = figures(&[&home.at("a"), &home.at("b"), &views[2]]);
        assert_eq!(raw.mergeable_page_bytes, 2 * one.cache_bytes, "{kind:?}");
    }
}

fn conformance(kind: RigFs, as_on: KernelFs) {
    let mut home = Home::new(kind);
    let (store, rows) = home.sealed(&["a"]);
    let view = home.mount(&store, &rows[0], "view");
    let ran = run_all(&mut KernelRig::new(as_on, &view));
    for case in ["dirty_clone_is_undecided_never_equal", "equal_identity_means_equal_bytes"] {
        assert!(ran.contains(&case), "`{case}` did not run in a view on {kind:?}, only {ran:?}");
    }
}

#[test]
fn privileged_the_conformance_cases_hold_in_a_view_on_xfs() {
    conformance(RigFs::Xfs, KernelFs::ViewOnXfs);
}

#[test]
fn privileged_the_conformance_cases_hold_in_a_view_on_btrfs() {
    conformance(RigFs::Btrfs, KernelFs::ViewOnBtrfs);
}
