//! Farms on real file systems: made as the manifest says, gone without a trace, and the ground truth derived from
//! the manifest agrees with the bytes and with the extent maps that the kernel reports.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity};
use pagefold_engine::layout::{CacheState, ExtentFlags, Layout, MapFacts, RawExtent};
use pagefold_engine::units::{FsId, PageSize};
use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_testfs::farm::{self, FarmFs, FarmSpec, ImageSpec, Manifest, SyntheticSpec};
use pagefold_testfs::rig::{LoopRig, RigFs};
use pagefold_testfs::truth::{TrueFile, TruePage, TrueRun, Truth};

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::new(fs).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn small(rig: &LoopRig, seed: u64) -> FarmSpec {
    FarmSpec {
        image: ImageSpec::Synthetic(SyntheticSpec { files: 300, max_bytes: 256 << 10 }),
        roots: 3,
        drift_percent: 25.0,
        seed,
        fs: if rig.fs().kind() == "xfs" { FarmFs::Xfs } else { FarmFs::Btrfs },
        ..FarmSpec::new(rig.path().join("farm"))
    }
}

fn make(spec: &FarmSpec) -> Manifest {
    farm::create(spec, &|_| (), &AtomicBool::new(false)).unwrap_or_else(|e| panic!("farm: {e}"))
}

/// The truth as the kernel's extent maps tell it: objects are addresses.
fn by_extents(truth: &Truth) -> Truth {
    let mut mapped = truth.clone();
    for root in &mut mapped.roots {
        for file in &mut root.files {
            file.runs = mapped_runs(&root.path.join(&file.names[0]), file.size);
        }
    }
    mapped
}

fn mapped_runs(path: &Path, size: u64) -> Vec<TrueRun> {
    let file = std::fs::File::open(path).expect("readable");
    let mut extents = Vec::new();
    read_extents(file.as_fd(), size, Sync::No, |e| {
        let flags = ExtentFlags::from_bits_retain(e.flags);
        extents.push(RawExtent { logical: e.logical, physical: e.physical, length: e.length, flags });
    })
    .expect("extent map");
    let space = Some(AddressSpace { fs: FsId(0), class: DeviceClass::Data });
    let facts = MapFacts { size, extents: &extents, space, cache: CacheState::Clean, page: PageSize::KIB4 };
    let to_run = |run: &pagefold_engine::layout::Run| TrueRun {
        pages: run.pages.0,
        first: match run.identity {
            Identity::Physical { page, .. } => TruePage::Same { object: 0, page, valid: 0 },
            Identity::Tail { page, valid, .. } => TruePage::Same { object: 0, page, valid },
            Identity::Zero => TruePage::Zero,
            Identity::Undecided(_) | Identity::Content { .. } => TruePage::Undecided,
        },
    };
    Layout::from_extents(facts).runs.iter().map(to_run).collect()
}

/// Names the first page on which two ways of knowing differ, other than by the names of their objects.
fn assert_same_pages(left: &Truth, right: &Truth, what: &str) {
    let (mut forth, mut back) = (BTreeMap::new(), BTreeMap::new());
    for (a, b) in left.roots.iter().zip(&right.roots) {
        for (f, g) in a.files.iter().zip(&b.files) {
            assert_eq!(f.names, g.names);
            let same_page =
                |f: &TrueFile, g: &TrueFile| format!("{what}: {:?} of {:?}\n{f:?}\n{g:?}", f.names, a.path);
            assert_eq!(f.pages().count(), g.pages().count(), "{}", same_page(f, g));
            for (p, q) in f.pages().zip(g.pages()) {
                let known = *forth.entry(p).or_insert(q);
                let kind = |p| matches!(p, TruePage::Same { .. });
                if kind(p) && kind(q) {
                    assert_eq!(known, q, "{p:?} is two pages; {}", same_page(f, g));
                    assert_eq!(*back.entry(q).or_insert(p), p, "{q:?} is two pages; {}", same_page(f, g));
                } else {
                    assert_eq!(p, q, "{}", same_page(f, g));
                }
            }
        }
    }
}

/// Pages that come from one place have the same bytes.
fn assert_equal_bytes(truth: &Truth, bytes: &Truth) {
    let mut content = BTreeMap::new();
    for (a, b) in truth.roots.iter().zip(&bytes.roots) {
        for (f, g) in a.files.iter().zip(&b.files) {
            for (p, q) in f.pages().zip(g.pages()) {
                assert_eq!(p == TruePage::Zero, q == TruePage::Zero, "{:?}", f.names);
                if matches!(p, TruePage::Same { .. }) {
                    assert_eq!(*content.entry(p).or_insert(q), q, "{p:?} in {:?}", f.names);
                }
            }
        }
    }
}

fn truth_agrees(fs: RigFs, snapshots: bool) {
    let mut rig = rig(fs);
    for seed in 1..=2 {
        let spec = FarmSpec { snapshots, ..small(&rig, seed) };
        let manifest = make(&spec);
        assert_eq!(manifest.compressed, fs == RigFs::BtrfsZstd);
        rig.remount().expect("nothing is open");
        let truth = Truth::by_provenance(&spec.dir, &manifest).expect("derivable");
        assert_same_pages(
            &truth,
            &by_extents(&truth),
            &format!("{fs:?}, snapshots {snapshots}, seed {seed}"),
        );
        assert_equal_bytes(&truth, &Truth::by_bytes(&spec.dir, &manifest).expect("readable"));
        let totals = truth.expected().totals;
        assert!(totals.mergeable_page_bytes > totals.mergeable_file_bytes && totals.mergeable_file_bytes > 0);
        assert!(totals.zero_bytes > 0 && totals.hard_links > 0);
        assert_eq!(totals.undecided_bytes > 0, spec.fs == FarmFs::Btrfs);
        farm::destroy(&spec.dir).expect("destroyable");
        assert!(!spec.dir.exists());
    }
}

#[test]
fn privileged_truth_agrees_with_extents_and_bytes_on_xfs() {
    truth_agrees(RigFs::Xfs, false);
}

#[test]
fn privileged_truth_agrees_with_extents_and_bytes_on_btrfs() {
    truth_agrees(RigFs::Btrfs, false);
}

#[test]
fn privileged_truth_agrees_with_extents_and_bytes_on_compressed_btrfs() {
    truth_agrees(RigFs::BtrfsZstd, false);
}

#[test]
fn privileged_truth_agrees_with_extents_and_bytes_on_snapshots() {
    truth_agrees(RigFs::Btrfs, true);
}
