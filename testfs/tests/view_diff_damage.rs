//! Damage to layers of differences, on real XFS and btrfs: it is told before a view is mounted, sealing puts it right, and what says that nothing
//! changed is never believed too much.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use pagefold_fsadapters::sealed::diff::{self, DiffDamage};
use pagefold_fsadapters::sealed::mount::MountOptions;
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::Task;
use pagefold_testfs::rig::RigFs;
use rustix::fs::XattrFlags;

mod view_support;
use view_support::layer::{layer, set_mtime, two};
use view_support::snapshot::{differences, take};
use view_support::{BOTH, Home};

type Damage = (&'static str, fn(&Path));

/// What is damaged, and how: the path that is told ends with it.
const DAMAGES: [Damage; 14] = [
    ("filler/d1/f1", |at| fs::remove_file(at.join("filler/d1/f1")).unwrap()),
    ("filler/d1/f1", |at| {
        File::options().write(true).open(at.join("filler/d1/f1")).unwrap().set_len(5).unwrap();
    }),
    ("filler/d1/f1", |at| set_mtime(&at.join("filler/d1/f1"), 3)),
    ("filler/d1/f1", |at| redirect(&at.join("filler/d1/f1"), &at.join("filler/d1/two"))),
    ("filler/d1/f1", |at| {
        rustix::fs::lremovexattr(at.join("filler/d1/f1"), "trusted.overlay.metacopy").unwrap();
    }),
    // All that a look at the inode tells but its number is as before.
    ("filler/d1/f1", |at| {
        let (file, other) = (at.join("filler/d1/f1"), at.join("other"));
        let old = fs::metadata(&file).unwrap();
        let new = File::create_new(&other).unwrap();
        new.set_len(old.len()).unwrap();
        rustix::fs::lsetxattr(&other, "trusted.overlay.metacopy", b"", XattrFlags::CREATE).unwrap();
        rustix::fs::lsetxattr(
            &other,
            "trusted.overlay.redirect",
            b"/00/0123456789abcdef0123456789abcdef",
            XattrFlags::CREATE,
        )
        .unwrap();
        chown(&other, Some(old.uid()), Some(old.gid())).unwrap();
        fs::set_permissions(&other, old.permissions()).unwrap();
        new.set_modified(old.modified().unwrap()).unwrap();
        let dir = fs::metadata(at.join("filler/d1")).unwrap();
        fs::rename(&other, &file).unwrap();
        File::open(at.join("filler/d1")).unwrap().set_modified(dir.modified().unwrap()).unwrap();
    }),
    ("filler/d1", |at| {
        rustix::fs::lsetxattr(at.join("filler/d1"), "trusted.overlay.opaque", b"y", XattrFlags::CREATE)
            .unwrap();
    }),
    ("filler/d1", |at| {
        fs::set_permissions(at.join("filler/d1"), fs::Permissions::from_mode(0o1755)).unwrap();
    }),
    ("filler/d1/link", |at| {
        fs::remove_file(at.join("filler/d1/link")).unwrap();
        symlink("f2", at.join("filler/d1/link")).unwrap();
    }),
    ("filler/d2/f2", |at| fs::remove_file(at.join("filler/d2/f2")).unwrap()),
    ("filler/d2/more", |at| fs::write(at.join("filler/d2/more"), b"").unwrap()),
    ("filler/d2/f3", |at| fs::hard_link(at.join("filler/d2/f2"), at.join("filler/d2/f3")).unwrap()),
    ("filler/d1/f1", |at| {
        fs::rename(at.join("filler/d1/f1"), at.join("filler/d1/f0")).unwrap();
    }),
    ("filler/names", |at| {
        let bytes = fs::read(at.join("filler/d1/two")).unwrap();
        fs::remove_file(at.join("filler/d1/two")).unwrap();
        fs::write(at.join("filler/d1/two"), bytes).unwrap();
    }),
];

fn redirect(at: &Path, to: &Path) {
    let mut value = [0u8; 128];
    let length = rustix::fs::lgetxattr(to, "trusted.overlay.redirect", &mut value[..]).unwrap();
    rustix::fs::lsetxattr(at, "trusted.overlay.redirect", &value[..length], XattrFlags::REPLACE).unwrap();
}

/// Whether there are stamps and they were taken after the last change: what they say is told only by what is not compared. So the file is
/// read here as it is documented: magic, digest of the list, then number (8), seconds (8) and nanoseconds (4) for each entry in the
/// list's order, of which the first is the top.
fn stamps_hold(layer: &Path) -> bool {
    let Ok(stamps) = fs::read(layer.parent().unwrap().join("diff.stamps")) else { return false };
    let top = fs::metadata(layer).unwrap();
    let all: HashSet<&[u8]> = stamps[40..stamps.len() - 32].chunks(20).collect();
    let stamp = |meta: &fs::Metadata| {
        let nanos = meta.ctime_nsec() as u32;
        [&meta.ino().to_le_bytes()[..], &meta.ctime().to_le_bytes(), &nanos.to_le_bytes()].concat()
    };
    let mut paths = vec![layer.to_path_buf()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        if !all.contains(&*stamp(&meta)) {
            return false;
        }
    }
    stamps[40..60] == *stamp(&top)
}

/// So do changes that leave all as it was but change times.
#[test]
fn privileged_stamps_that_are_lost_or_old_only_mean_that_all_is_compared() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = two(&home);
        let raw = take(&home.at("b"));
        let at = layer(&store, &rows[1]);
        let stamps = at.parent().unwrap().join("diff.stamps");
        let good = fs::read(&stamps).unwrap();
        let mut flipped = good.clone();
        flipped[50] ^= 1;
        let cases: [&dyn Fn(); 8] = [
            &|| fs::remove_file(&stamps).unwrap(),
            &|| fs::write(&stamps, b"").unwrap(),
            &|| fs::write(&stamps, b"garbage").unwrap(),
            &|| fs::write(&stamps, vec![7; 1 << 20]).unwrap(),
            &|| fs::write(&stamps, &flipped).unwrap(),
            &|| fs::write(&stamps, &good[..good.len() - 1]).unwrap(),
            &|| {
                fs::remove_file(&stamps).unwrap();
                fs::create_dir(&stamps).unwrap();
            },
            &|| {
                fs::remove_dir(&stamps).unwrap();
                fs::write(&stamps, &good).unwrap();
                let file = at.join("filler/d1/f1");
                let old = fs::metadata(&file).unwrap().modified().unwrap();
                let open = File::options().write(true).open(&file).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&open, b"x", 9000).unwrap();
                open.set_len(9000).unwrap();
                open.set_modified(old).unwrap();
                assert!(!stamps_hold(&at));
            },
        ];
        for (number, case) in cases.into_iter().enumerate() {
            case();
            let view = home.mount(&store, &rows[1], "view");
            assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{fs:?} {number}");
            home.umount(&store, &view);
            assert_eq!(store.verify(&Task::default()).unwrap().problems, [], "{fs:?} {number}");
            // What is wrong is still found.
            fs::set_permissions(at.join("filler/d1/f1"), fs::Permissions::from_mode(0o600)).unwrap();
            home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
            fs::set_permissions(at.join("filler/d1/f1"), fs::Permissions::from_mode(0o644)).unwrap();
        }
        // Sealing again takes new ones.
        let row = home.seal(&store, &["b"]).remove(0);
        assert!(row.generation == 0 && stamps_hold(&at), "{fs:?}");
    }
}

/// Stamps alone are believed: where they hold nothing is compared, which is what makes mounting cheap.
#[test]
fn privileged_where_stamps_hold_nothing_is_compared() {
    let mut home = Home::new(RigFs::Xfs);
    let (store, rows) = two(&home);
    let at = layer(&store, &rows[1]);
    let root_dir = at.parent().unwrap();
    let digest = store.diff(rows[1].id, 0).unwrap().unwrap().digest;
    set_mtime(&at.join("filler/d1/f1"), 5);
    home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
    // Taken of the damaged layer, as never happens otherwise.
    diff::stamp(root_dir, digest);
    let view = home.mount(&store, &rows[1], "view");
    home.umount(&store, &view);
    assert!(!store.verify(&Task::default()).unwrap().problems.is_empty());
    home.seal(&store, &["b"]);
    assert_eq!(store.verify(&Task::default()).unwrap().problems, []);
    assert!(stamps_hold(&at));
}

#[test]
fn privileged_a_damaged_layer_is_not_mounted_and_sealing_puts_it_right() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = two(&home);
        let raw = take(&home.at("b"));
        let view = home.mount(&store, &rows[1], "view");
        home.umount(&store, &view);
        for (number, (path, damage)) in DAMAGES.into_iter().enumerate() {
            let row = store.find_root(home.at("b")).unwrap();
            let at = layer(&store, &row);
            assert!(stamps_hold(&at), "{fs:?} {number}: sealing left no stamps of what is there");
            damage(&at);
            let error = home.try_mount(&store, &row, "view", &MountOptions::default()).unwrap_err();
            let ViewError::Diff(DiffDamage::Wrong { path: told, .. }) = &error else {
                panic!("{number}: {error:?}")
            };
            assert_eq!(*told, at.join(path), "{fs:?} {number}");
            let problems = store.verify(&Task::default()).unwrap().problems;
            assert!(problems.iter().any(|p| p.path == at.join(path)), "{fs:?} {number}: {problems:?}");
            let row = home.seal(&store, &["b"]).remove(0);
            let view = home.mount(&store, &row, "view");
            assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{fs:?} {number}");
            home.umount(&store, &view);
            // Only of what an upper may know by its inode a new generation is made.
            assert_eq!(row.generation, u64::from(path.ends_with("names")), "{fs:?} {number}");
        }
    }
}

#[test]
fn privileged_a_layer_or_list_that_is_lost_is_made_by_sealing_again() {
    for part in ["diff", "diff.list"] {
        let mut home = Home::new(RigFs::Xfs);
        let (store, rows) = two(&home);
        let raw = take(&home.at("b"));
        let at = store.root_dir(rows[1].id, rows[1].generation).join(part);
        fs::rename(&at, home.at("lost")).unwrap();
        let error = home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
        assert!(matches!(error, ViewError::Diff(_)), "{error:?}");
        assert!(!store.verify(&Task::default()).unwrap().problems.is_empty());
        let row = home.seal(&store, &["b"]).remove(0);
        assert_eq!(row.generation, 1);
        let view = home.mount(&store, &row, "view");
        assert_eq!(differences(&raw, &take(&view), true), [""; 0], "{part}");
    }
}

/// What a view wrote hangs on the layer's inodes: it stays usable when the layer was put right.
#[test]
fn privileged_writes_over_a_layer_that_was_put_right_are_all_there() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let (store, rows) = two(&home);
        let view = home.mount(&store, &rows[1], "view");
        fs::write(view.join("filler/names"), b"both").unwrap();
        fs::set_permissions(view.join("filler/d1/f1"), fs::Permissions::from_mode(0o600)).unwrap();
        let before = take(&view);
        home.umount(&store, &view);
        fs::remove_file(layer(&store, &rows[1]).join("filler/d1/f1")).unwrap();
        fs::remove_file(layer(&store, &rows[1]).join("filler/d2/f2")).unwrap();
        home.try_mount(&store, &rows[1], "view", &MountOptions::default()).unwrap_err();
        // Refused, for there are changes; the layer is whole again.
        let row = home.seal(&store, &["b"]).remove(0);
        assert_eq!(row.generation, 0);
        let view = home.mount(&store, &row, "view");
        assert_eq!(differences(&before, &take(&view), true), [""; 0], "{fs:?}");
        assert_eq!(fs::read(view.join("filler/d1/two")).unwrap(), b"both");
    }
}
