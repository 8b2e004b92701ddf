//! Roots that are shown as a shared image with a layer of differences over it, on real XFS and btrfs: what their views show, what
//! keeps their anchors. What damage does: `view_diff_damage.rs`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::diff::{self, DIFF, DiffDamage};
use pagefold_fsadapters::sealed::mount::{MountOptions, discard_writes};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::Task;
use pagefold_testfs::rig::RigFs;
use rustix::fs::{Mode, OFlags, XattrFlags};

mod view_support;
use view_support::layer::{entries, filler, layer, set_mtime, two};
use view_support::snapshot::{differences, take};
use view_support::{BOTH, Home, bytes, clone_tree, dir, odd_root, settle};

/// Everything odd is in the layer only; names like those that anchors lie under among it.
#[test]
fn privileged_a_layer_shows_every_kind_of_entry_with_all_that_belongs_to_it() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        filler(&home.at("a"));
        clone_tree(&home.at("a"), &home.at("b"));
        odd_root(&home.at("b"));
        let raw = take(&home.at("b"));
        let store = home.store();
        let rows = home.seal(&store, &["a", "b"]);
        assert_eq!((entries(&store, &rows[0]), rows[0].layers == rows[1].layers), (None, true));
        assert!(entries(&store, &rows[1]).is_some_and(|n| n > 30), "{fs:?}");
        let view = home.mount(&store, &rows[1], "view");
        assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{fs:?}");
        let numbers = |view: &Path| {
            ["page", "ab/link", "ab", "fifo", "caps", "filler/d1/f1"].map(|n| {
                let meta = fs::symlink_metadata(view.join(n)).unwrap();
                (meta.ino(), meta.nlink())
            })
        };
        let before = numbers(&view);
        assert_eq!(before[0], before[1], "one inode of three names");
        home.umount(&store, &view);
        assert_eq!(store.verify(&Task::default()).unwrap().problems, []);
        // Nothing cached is left of the layer.
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        home.mount(&store, &rows[1], "view");
        assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{fs:?} again");
        assert_eq!(numbers(&view), before, "{fs:?}");
        home.umount(&store, &view);
        let mapped = MountOptions { id_map: Some("0:100000:65536".parse().unwrap()), ..Default::default() };
        home.try_mount(&store, &rows[1], "view", &mapped).unwrap();
        let owner = |n: &str| fs::symlink_metadata(view.join(n)).map(|m| (m.uid(), m.gid())).unwrap();
        assert_eq!((owner("ab"), owner("filler/d1")), ((100_007, 100_008), (100_000, 100_000)));
        assert_eq!(fs::read(view.join("page")).unwrap(), bytes(1003, 4096));
        assert_eq!(fs::metadata(view.join("page")).unwrap().mode() & 0o7777, 0o4755);
    }
}

/// Every way in which an entry that the base has can differ, each entry of another kind.
fn drift(at: &Path) {
    let odd = at.join("odd");
    set_mtime(&odd.join("fifo"), 99);
    set_mtime(&odd.join("long link"), 98);
    chown(odd.join("socket"), Some(5), Some(6)).unwrap();
    fs::set_permissions(odd.join("null"), fs::Permissions::from_mode(0o604)).unwrap();
    std::os::unix::fs::lchown(odd.join("disk"), Some(9), None).unwrap();
    rustix::fs::lremovexattr(odd.join("caps"), "security.capability").unwrap();
    rustix::fs::lsetxattr(odd.join("more"), "user.small", b"other", XattrFlags::REPLACE).unwrap();
    rustix::fs::lremovexattr(odd.join("ab"), "system.posix_acl_default").unwrap();
    rustix::fs::lsetxattr(odd.join("planted"), "trusted.overlay.origin", b"mine", XattrFlags::CREATE)
        .unwrap();
    // One name of three goes, one of two gets a new inode.
    fs::remove_file(odd.join("ab/link")).unwrap();
    fs::remove_file(odd.join("ab/nothing")).unwrap();
    fs::write(odd.join("ab/nothing"), b"something").unwrap();
    // Kinds are exchanged.
    fs::remove_dir_all(odd.join("deep/1/2/3")).unwrap();
    fs::write(odd.join("deep/1/2/3"), bytes(3000, 5000)).unwrap();
    fs::remove_file(odd.join("ff")).unwrap();
    fs::create_dir_all(odd.join("ff/f2/f3")).unwrap();
    fs::hard_link(odd.join("deep/1/2/3"), odd.join("ff/f2/f3/linked")).unwrap();
    fs::remove_dir_all(odd.join("..dots")).unwrap();
    symlink("nowhere", odd.join("..dots")).unwrap();
    // All in it goes, it stays; it goes with all that was in it.
    for k in 0..10 {
        fs::remove_file(at.join(format!("filler/d3/f{k}"))).unwrap();
    }
    fs::remove_dir_all(at.join("filler/d4")).unwrap();
    fs::rename(at.join("filler/d5/f1"), at.join("filler/d5/g")).unwrap();
    settle(at);
}

#[test]
fn privileged_a_layer_over_every_kind_of_entry_shows_each_kind_of_difference() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        filler(&home.at("a"));
        odd_root(&home.at("a").join("odd"));
        clone_tree(&home.at("a"), &home.at("b"));
        drift(&home.at("b"));
        let raw = ["a", "b"].map(|name| take(&home.at(name)));
        let store = home.store();
        let rows = home.seal(&store, &["a", "b"]);
        assert!(entries(&store, &rows[1]).is_some_and(|n| n > 40), "{fs:?}");
        let views = [home.mount(&store, &rows[0], "va"), home.mount(&store, &rows[1], "vb")];
        for (raw, view) in raw.iter().zip(&views) {
            assert_eq!(differences(raw, &take(view), true), [""; 0], "{fs:?} {view:?}");
        }
        // Writes go on over the layer, and a discard shows it again.
        let b = &views[1];
        fs::write(b.join("odd/deep/1/2/3"), b"through one name").unwrap();
        assert_eq!(fs::read(b.join("odd/ff/f2/f3/linked")).unwrap(), b"through one name");
        fs::write(b.join("filler/d4"), b"where a whiteout was").unwrap();
        fs::set_permissions(b.join("odd/more"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::rename(b.join("odd/ff"), b.join("moved")).unwrap();
        home.umount(&store, b);
        let b = home.mount(&store, &rows[1], "vb");
        assert_eq!(fs::read(b.join("moved/f2/f3/linked")).unwrap(), b"through one name");
        assert_eq!(fs::metadata(b.join("odd/more")).unwrap().mode() & 0o7777, 0o4711);
        assert_eq!(fs::read(b.join("odd/more")).unwrap(), fs::read(home.at("b/odd/more")).unwrap());
        home.umount(&store, &b);
        discard_writes(&store, &rows[1]).unwrap();
        let b = home.mount(&store, &rows[1], "vb");
        assert_eq!(differences(&raw[1], &take(&b), true), [""; 0], "{fs:?} discarded");
    }
}

/// Numbers that one seed gives.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Changes about twenty paths below `at`, whatever is there.
fn random_drift(at: &Path, dice: &mut Dice) {
    for step in 0..20 {
        let all: Vec<PathBuf> = take(at)
            .into_keys()
            .map(|p| at.join(String::from_utf8(p).unwrap()))
            .filter(|p| p != at)
            .collect();
        let some = &all[dice.roll(all.len() as u64) as usize];
        let is_dir = fs::symlink_metadata(some).unwrap().is_dir();
        let parent = some.parent().unwrap();
        match dice.roll(8) {
            0 if is_dir && parent != at => fs::remove_dir_all(some).unwrap(),
            0 | 1 if !is_dir => fs::remove_file(some).unwrap(),
            2 => fs::write(parent.join(format!("new{step}")), bytes(dice.roll(1 << 20), 3000)).unwrap(),
            3 if !is_dir => {
                fs::remove_file(some).unwrap();
                fs::create_dir(some).unwrap();
                fs::write(some.join("below"), b"x").unwrap();
            }
            4 if is_dir && parent != at => {
                fs::remove_dir_all(some).unwrap();
                fs::write(some, bytes(dice.roll(1 << 20), 100)).unwrap();
            }
            5 if !is_dir => fs::hard_link(some, at.join(format!("link{}", dice.roll(1 << 30)))).unwrap(),
            6 => set_mtime(some, dice.roll(1 << 30) as i64),
            _ => fs::set_permissions(some, fs::Permissions::from_mode(0o700 + dice.roll(64) as u32)).unwrap(),
        }
    }
    settle(at);
}

#[test]
fn privileged_random_differences_are_shown_as_they_are() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        filler(&home.at("r0"));
        let store = home.store();
        let base = home.seal(&store, &["r0"]);
        let mut layers = 0;
        for seed in 1..=6u64 {
            let name = format!("r{seed}");
            // From one that drifted already.
            clone_tree(&home.at(&format!("r{}", seed / 2)), &home.at(&name));
            random_drift(&home.at(&name), &mut Dice(seed));
            let rows = home.seal(&store, &[&name]);
            layers += u32::from(entries(&store, &rows[0]).is_some() && rows[0].layers == base[0].layers);
            let view = home.mount(&store, &rows[0], &format!("v{seed}"));
            assert_eq!(
                differences(&take(&home.at(&name)), &take(&view), true),
                [""; 0],
                "{fs:?} seed {seed}"
            );
        }
        assert!(layers >= 5, "{fs:?}: {layers} of 6");
        assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?}");
    }
}

#[test]
fn privileged_a_layer_of_another_root_is_refused() {
    let mut home = Home::new(RigFs::Xfs);
    let (store, rows) = two(&home);
    clone_tree(&home.at("b"), &home.at("c"));
    fs::write(home.at("c/filler/d1/f1"), bytes(779, 9000)).unwrap();
    settle(&home.at("c"));
    let other = home.seal(&store, &["c"]).remove(0);
    for row in [&rows[1], &other] {
        let view = home.mount(&store, row, "view");
        home.umount(&store, &view);
    }
    let aside = home.at("aside");
    let swap = |part: &str| {
        let [one, two] = [&rows[1], &other].map(|row| store.root_dir(row.id, row.generation).join(part));
        fs::rename(&one, &aside).unwrap();
        fs::rename(&two, &one).unwrap();
        fs::rename(&aside, &two).unwrap();
    };
    let refused =
        |home: &mut Home| home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
    swap(DIFF);
    let error = refused(&mut home);
    assert!(matches!(error, ViewError::Diff(DiffDamage::Wrong { .. })), "{error:?}");
    swap("diff.list");
    let error = refused(&mut home);
    assert!(matches!(error, ViewError::Diff(DiffDamage::List { .. })), "{error:?}");
    swap("diff.list");
    swap(DIFF);
    // An upper that was mounted with another root's layer.
    swap("upper");
    let error = refused(&mut home);
    assert!(matches!(error, ViewError::ForeignUpper { .. }), "{error:?}");
    swap("upper");
    // The same tree, another directory: only the kernel can tell.
    let at = layer(&store, &rows[1]);
    let tree = diff::read(at.parent().unwrap(), store.diff(rows[1].id, 0).unwrap().unwrap().digest).unwrap();
    fs::rename(&at, home.at("aside")).unwrap();
    let again = home.at("again");
    fs::create_dir(&again).unwrap();
    diff::write(&again, &tree, None, &Progress::default()).unwrap();
    fs::rename(again.join(DIFF), &at).unwrap();
    let error = refused(&mut home);
    assert!(matches!(error, ViewError::ForeignUpper { .. }), "{error:?}");
}

#[test]
fn privileged_anchors_and_the_base_stay_as_long_as_a_layer_needs_them() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (mut store, rows) = two(&home);
        let raw = take(&home.at("b"));
        store.remove_root(rows[0].id).unwrap();
        let report = store.gc(&|_| false, &Task::default()).unwrap();
        assert_eq!((report.images, report.anchors), (0, 0), "{fs:?}");
        let view = home.mount(&store, &rows[1], "view");
        assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{fs:?}");
        home.umount(&store, &view);
        // Sealed again with a change: the earlier generation goes, and with it the one anchor that only it named.
        fs::write(home.at("b/filler/d1/f1"), bytes(900, 50)).unwrap();
        settle(&home.at("b"));
        let row = home.seal(&store, &["b"]).remove(0);
        assert!(
            row.generation == 1 && entries(&store, &row).is_none(),
            "no whole root is left to differ from"
        );
        let view = home.mount(&store, &row, "view");
        let report = store.gc(&|_| false, &Task::default()).unwrap();
        assert_eq!((report.generations, report.images), (1, 1), "{fs:?}: {report:?}");
        assert!(report.anchors >= 1, "{fs:?}: {report:?}");
        assert_eq!(differences(&take(&home.at("b")), &take(&view), true), [""; 0], "{fs:?}");
        home.umount(&store, &view);
        store.remove_root(row.id).unwrap();
        store.gc(&|_| false, &Task::default()).unwrap();
        assert!(view_support::files(&home.at(".pagefold/anchors")).is_empty(), "{fs:?}");
        store.destroy().unwrap();
        assert!(!home.at(".pagefold").exists());
    }
}

/// Ended while its layer is being made, a root is not sealed: nothing else is tried for it, and nothing of it stays.
#[test]
fn privileged_making_a_layer_can_be_interrupted() {
    let home = Home::new(RigFs::Xfs);
    fs::create_dir(home.at("a")).unwrap();
    for number in 0..4000 {
        fs::write(home.at("a").join(format!("file-{number}")), b"bytes").unwrap();
    }
    clone_tree(&home.at("a"), &home.at("b"));
    for number in 0..900 {
        fs::set_permissions(home.at("b").join(format!("file-{number}")), fs::Permissions::from_mode(0o4755))
            .unwrap();
    }
    settle(&home.at("a"));
    let store = home.store();
    home.seal(&store, &["a"]);
    let progress = Progress::default();
    let sealed = std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            while progress.steps().0 == 0 && begun.elapsed() < Duration::from_secs(30) {
                std::hint::spin_loop();
            }
            progress.cancel();
        });
        seal(&store, &SealConfig::new(vec![home.at("b")]), &progress).unwrap()
    });
    let (done, all) = progress.steps();
    assert!(done < all, "all {all} were made");
    assert!(sealed.partial && sealed.errors.len() == 1, "{sealed:?}");
    assert!(sealed.errors[0].error.contains("interrupted"), "{sealed:?}");
    assert_eq!(store.roots().unwrap().len(), 1);
    let images = || fs::read_dir(home.at(".pagefold/images")).unwrap().count();
    assert_eq!((images(), fs::read_dir(home.at(".pagefold/roots")).unwrap().count()), (1, 1));
    let row = home.seal(&store, &["b"]).remove(0);
    assert_eq!((images(), entries(&store, &row)), (1, Some(901)));
}

/// Deeper than a path may be long: made, compared, shown and removed step by step.
#[test]
fn privileged_a_layer_may_be_deeper_than_paths_are_long() {
    const LEVELS: usize = 300;
    let name = "x".repeat(20);
    for fs in BOTH {
        let mut home = Home::new(fs);
        for n in 0..(5 * LEVELS) {
            fs::create_dir_all(home.at(&format!("a/many/{n}"))).unwrap();
        }
        clone_tree(&home.at("a"), &home.at("b"));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = dir(&home.at("b"));
        for _ in 0..LEVELS {
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, &name, flags, Mode::empty()).unwrap();
        }
        rustix::fs::symlinkat("deep", &at, "bottom").unwrap();
        let mut store = home.store();
        let rows = home.seal(&store, &["a", "b"]);
        assert_eq!(entries(&store, &rows[1]), Some(LEVELS as u64 + 2), "{fs:?}");
        let view = home.mount(&store, &rows[1], "view");
        let mut at = dir(&view);
        for _ in 0..LEVELS {
            at = rustix::fs::openat(&at, &name, flags, Mode::empty()).unwrap();
        }
        assert_eq!(rustix::fs::readlinkat(&at, "bottom", Vec::new()).unwrap().as_bytes(), b"deep");
        drop(at);
        assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?}");
        home.umount(&store, &view);
        store.remove_root(rows[1].id).unwrap();
        store.gc(&|_| false, &Task::default()).unwrap();
        assert!(!layer(&store, &rows[1]).exists());
    }
}

/// Overlayfs looks for anchors in the layers below first: a base with a directory of such a name can't be one.
#[test]
fn privileged_a_base_with_a_name_like_those_of_anchors_gets_no_layer_over_it() {
    let mut home = Home::new(RigFs::Xfs);
    filler(&home.at("a"));
    fs::create_dir(home.at("a/7f")).unwrap();
    clone_tree(&home.at("a"), &home.at("b"));
    fs::write(home.at("b/filler/d1/f1"), b"other").unwrap();
    settle(&home.at("b"));
    let store = home.store();
    let rows = home.seal(&store, &["a", "b"]);
    assert_eq!(entries(&store, &rows[1]), None);
    let view = home.mount(&store, &rows[1], "view");
    assert_eq!(differences(&take(&home.at("b")), &take(&view), true), [""; 0]);
}

/// A view over it could not be mounted, and nobody would have said so before.
#[test]
fn privileged_a_damaged_image_gets_no_layer_over_it() {
    let mut home = Home::new(RigFs::Xfs);
    filler(&home.at("a"));
    clone_tree(&home.at("a"), &home.at("b"));
    fs::write(home.at("b/filler/d1/f1"), b"other").unwrap();
    for name in ["c", "d"] {
        clone_tree(&home.at("b"), &home.at(name));
    }
    fs::write(home.at("d/filler/d1/f2"), b"other").unwrap();
    settle(&home.at("d"));
    let store = home.store();
    let base = home.seal(&store, &["a"]).remove(0);
    let image = store.image_path(&base.layers[0]);
    assert!(Command::new("chattr").arg("-i").arg(&image).status().unwrap().success());
    fs::write(&image, b"damaged").unwrap();
    let row = home.seal(&store, &["b"]).remove(0);
    assert!(entries(&store, &row).is_none() && row.layers != base.layers);
    let view = home.mount(&store, &row, "view");
    assert_eq!(differences(&take(&home.at("b")), &take(&view), true), [""; 0]);
    // The next ones differ from that, by nothing or a little.
    for (name, differs) in [("c", false), ("d", true)] {
        let next = home.seal(&store, &[name]).remove(0);
        assert_eq!((entries(&store, &next).is_some(), &next.layers), (differs, &row.layers), "{name}");
    }
}

/// An attribute that just fits without what an escape adds to its name: an image holds it, a layer can't.
#[test]
fn privileged_what_a_layer_cannot_hold_an_image_shows() {
    let mut home = Home::new(RigFs::Btrfs);
    filler(&home.at("a"));
    clone_tree(&home.at("a"), &home.at("b"));
    let large = home.at("b/filler/d1/f1");
    let fits = |length: usize| {
        rustix::fs::lsetxattr(&large, "trusted.overlay.large", &bytes(5, length), XattrFlags::empty()).is_ok()
    };
    let most = (1..65_536).rev().find(|length| fits(*length)).unwrap();
    assert!(most > 3000, "{most}");
    fs::remove_file(home.at("b/filler/d3/f3")).unwrap();
    settle(&home.at("b"));
    let store = home.store();
    let rows = home.seal(&store, &["a", "b"]);
    assert!(entries(&store, &rows[1]).is_none() && rows[0].layers != rows[1].layers);
    let root_dir = store.root_dir(rows[1].id, rows[1].generation);
    assert!(diff::PARTS.iter().all(|part| !root_dir.join(part).exists()));
    let view = home.mount(&store, &rows[1], "view");
    assert_eq!(differences(&take(&home.at("b")), &take(&view), true), [""; 0]);
    assert_eq!(store.verify(&Task::default()).unwrap().problems, []);
}
