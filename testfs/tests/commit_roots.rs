//! Commit, export and unseal of roots of a store: sealed, mounted, written, undone; on real XFS and btrfs.

mod commit_support {
    pub mod ops;
}
mod view_support;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use commit_support::ops::{Change, Rng, carry_out, draw, known};
use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::commit::{CommitError, OnConflict};
use pagefold_fsadapters::sealed::commit_root::{
    CommitOptions, CommitOutcome, CommitReport, commit_root, has_changes,
};
use pagefold_fsadapters::sealed::export::{ExportOptions, export_root};
use pagefold_fsadapters::sealed::mount::MountOptions;
use pagefold_fsadapters::sealed::remains::{RemainKind, look};
use pagefold_fsadapters::sealed::unseal::{Writes, remove_store, unseal_root};
use pagefold_fsadapters::store::{OpenMode, RootRow, Store, StoreError, Task};
use pagefold_testfs::rig::RigFs;
use rustix::fs::XattrFlags;
use view_support::snapshot::{differences, take};
use view_support::{BOTH, Home, clone_tree, patiently, until};

fn commit(store: &Store, row: &RootRow, on_conflict: OnConflict) -> Result<CommitReport, CommitError> {
    let options = CommitOptions { on_conflict, force: false };
    patiently(
        || commit_root(store, row, options, &Progress::default()),
        |r| match r {
            Ok(report) => report.outcome == CommitOutcome::NotSealed,
            Err(e) => matches!(e, CommitError::Live { .. } | CommitError::Refused(_)),
        },
    )
}

fn keep(store: &Store, row: &RootRow) -> CommitReport {
    commit(store, row, OnConflict::Keep).unwrap()
}

/// The row as it is now: a commit makes a new generation.
fn again(store: &Store, row: &RootRow) -> RootRow {
    store.root(row.id).unwrap()
}

/// A small root with a bit of everything.
fn small(home: &Home, name: &str) {
    let at = |p: &str| home.at(name).join(p);
    std::fs::create_dir_all(at("dir/deep")).unwrap();
    std::fs::create_dir_all(at("empty")).unwrap();
    for (n, path) in ["a", "b", "dir/c", "dir/deep/d", "dir/deep/e"].iter().enumerate() {
        std::fs::write(at(path), view_support::bytes(n as u64, 20_000)).unwrap();
    }
    std::fs::hard_link(at("a"), at("dir/link")).unwrap();
    std::os::unix::fs::symlink("../a", at("dir/sym")).unwrap();
}

fn sealed(home: &Home, store: &Store, name: &str) -> RootRow {
    small(home, name);
    home.seal(store, &[name]).remove(0)
}

#[test]
fn privileged_histories_of_views_end_in_their_raw_roots() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let store = home.store();
        for seed in 1..=4 {
            let mut rng = Rng::new(seed * 77);
            let name = format!("r{seed}");
            let (root, plain) = (home.at(&name), home.at(&format!("plain{seed}")));
            std::fs::create_dir(&root).unwrap();
            for _ in 0..120 {
                let change = draw(&mut rng, &known(&root), false);
                if !matches!(change, Change::RemoveAll(_)) {
                    let _ = carry_out(&root, &change);
                }
            }
            clone_tree(&root, &plain);
            let mut row = home.seal(&store, &[&name]).remove(0);
            // Several rounds: each is committed over the seal that the one before made.
            for round in 0..3 {
                let view = home.mount(&store, &row, &format!("view{seed}"));
                for _ in 0..rng.below(60) {
                    let change = draw(&mut rng, &known(&view), true);
                    let (there, here) = (carry_out(&view, &change), carry_out(&plain, &change));
                    assert_eq!(there.is_ok(), here.is_ok(), "{fs:?} {seed}: {change:?} {there:?} {here:?}");
                }
                let shown = take(&view);
                let out = home.at(&format!("out{seed}-{round}"));
                let live = export_root(&store, &row, &out, ExportOptions::default(), &Progress::default());
                assert!(live.unwrap().live);
                home.umount(&store, &view);
                let wrong = differences(&shown, &take(&out), true);
                assert!(wrong.is_empty(), "{fs:?} {seed} exported:\n{}", wrong.join("\n"));
                let report = keep(&store, &row);
                assert!(
                    report.applied.is_complete() && report.seal_error.is_none(),
                    "{fs:?} {seed}: {report:?}"
                );
                let wrong = differences(&shown, &take(&root), true);
                assert!(wrong.is_empty(), "{fs:?} {seed} committed:\n{}", wrong.join("\n"));
                let wrong = differences(&take(&plain), &take(&root), false);
                assert!(wrong.is_empty(), "{fs:?} {seed} against plain:\n{}", wrong.join("\n"));
                row = again(&store, &row);
                assert!(!has_changes(&store, &row).unwrap());
                assert_eq!(store.generations_of(row.id).unwrap(), [row.generation]);
            }
        }
    }
}

#[test]
fn privileged_what_both_changed_stays_in_both() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let store = home.store();
        for (name, policy) in
            [("k", OnConflict::Keep), ("v", OnConflict::TakeView), ("r", OnConflict::TakeRaw)]
        {
            let row = sealed(&home, &store, name);
            let view = home.mount(&store, &row, &format!("view-{name}"));
            let root = home.at(name);
            std::fs::write(view.join("a"), "view a").unwrap();
            std::fs::remove_file(view.join("b")).unwrap();
            std::fs::write(view.join("new"), "view new").unwrap();
            std::fs::write(view.join("dir/c"), "view c").unwrap();
            std::fs::remove_dir_all(view.join("dir/deep")).unwrap();
            home.umount(&store, &view);
            std::fs::write(root.join("a"), "raw a").unwrap();
            std::fs::write(root.join("b"), "raw b").unwrap();
            std::fs::write(root.join("new"), "raw new").unwrap();
            std::fs::write(root.join("dir/deep/more"), "raw more").unwrap();
            let report = commit(&store, &row, policy).unwrap();
            let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
            assert_eq!(text("dir/c").as_deref(), Some("view c"), "what only the view changed is committed");
            assert_eq!(text("dir/deep/more").as_deref(), Some("raw more"), "nobody asked to remove it");
            let mut told: Vec<String> =
                report.applied.conflicts.iter().map(|c| c.path.display().to_string()).collect();
            told.sort();
            match policy {
                OnConflict::Keep => {
                    assert_eq!(report.outcome, CommitOutcome::Partial);
                    assert_eq!(told, ["a", "b", "dir/deep", "dir/link", "new"]);
                    assert_eq!(text("a").as_deref(), Some("raw a"));
                    assert_eq!(text("b").as_deref(), Some("raw b"));
                    assert_eq!(text("new").as_deref(), Some("raw new"));
                    // The other side is where it was; with the raw root put right it goes through.
                    let view = home.mount(&store, &row, &format!("view-{name}"));
                    assert_eq!(std::fs::read_to_string(view.join("a")).unwrap(), "view a");
                    assert_eq!(std::fs::read_to_string(view.join("new")).unwrap(), "view new");
                    // And what was committed may change once more.
                    std::fs::write(view.join("dir/c"), "view c again").unwrap();
                    home.umount(&store, &view);
                    for path in ["a", "b", "new", "dir/link", "dir/deep/more"] {
                        std::fs::remove_file(root.join(path)).unwrap();
                    }
                    let report = commit(&store, &row, OnConflict::TakeView).unwrap();
                    assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
                    assert_eq!(text("dir/c").as_deref(), Some("view c again"));
                    assert_eq!(text("dir/link").as_deref(), Some("view a"));
                    assert!(!root.join("dir/deep").exists());
                }
                OnConflict::TakeView => {
                    assert_eq!(told, ["dir/deep"], "other names are nobody's to remove");
                    assert_eq!(text("a").as_deref(), Some("view a"));
                    assert_eq!(text("dir/link").as_deref(), Some("view a"));
                    assert_eq!(text("b"), None);
                    assert_eq!(text("new").as_deref(), Some("view new"));
                }
                OnConflict::TakeRaw => {
                    assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
                    assert_eq!(text("a").as_deref(), Some("raw a"));
                    assert_eq!(text("b").as_deref(), Some("raw b"));
                    assert_eq!(text("new").as_deref(), Some("raw new"));
                }
            }
        }
    }
}

#[test]
fn privileged_a_live_view_and_a_written_root_are_refused() {
    let mut home = Home::new(RigFs::Xfs);
    let store = home.store();
    let row = sealed(&home, &store, "r");
    let view = home.mount(&store, &row, "view");
    std::fs::write(view.join("a"), "changed").unwrap();
    let options = CommitOptions::default();
    let live = commit_root(&store, &row, options, &Progress::default());
    assert!(matches!(live, Err(CommitError::Live { .. })), "{live:?}");
    let live = unseal_root(&store, &row, &Writes::Discard, &Progress::default());
    assert!(matches!(live, Err(CommitError::Live { .. })), "{live:?}");
    home.umount(&store, &view);
    let mut writer = Command::new("/bin/sh")
        .args(["-c", "exec 9>>\"$1\"; echo ready; exec sleep 60", "sh"])
        .arg(home.at("r/b"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 6];
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut line).unwrap();
    let name = format!("/proc/{}/comm", writer.id());
    until("the shell has become what it executes", || std::fs::read_to_string(&name).unwrap() == "sleep\n");
    let written = commit_root(&store, &row, options, &Progress::default());
    let forced = patiently(
        || commit_root(&store, &row, CommitOptions { force: true, ..options }, &Progress::default()),
        |r| r.as_ref().is_ok_and(|report| report.outcome == CommitOutcome::NotSealed),
    );
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(matches!(&written, Err(CommitError::Refused(why)) if why.contains("sleep")), "{written:?}");
    assert_eq!(forced.unwrap().outcome, CommitOutcome::Committed);
}

#[test]
fn privileged_commit_shares_blocks_and_crosses_project_ids() {
    let mut home = Home::new(RigFs::Xfs);
    let store = home.store();
    small(&home, "r");
    let project = |path: &str, id: &str| {
        let status = Command::new("xfs_io")
            .args(["-c", &format!("chproj {id}"), "-c", "chattr +P"])
            .arg(home.at(path))
            .status();
        assert!(status.unwrap().success());
    };
    project("r", "7");
    project("r/dir", "8");
    let row = home.seal(&store, &["r"]).remove(0);
    let view = home.mount(&store, &row, "view");
    let big = std::fs::File::create(view.join("dir/big")).unwrap();
    (0..16).for_each(|n| big.write_all_at(&view_support::bytes(n, 1 << 20), n << 20).unwrap());
    drop(big);
    std::fs::rename(view.join("b"), view.join("dir/b")).unwrap();
    std::fs::rename(view.join("dir/c"), view.join("c")).unwrap();
    std::fs::write(view.join("dir/c2"), "one file, two names").unwrap();
    // One inode in two projects: in a view that is possible, in the raw root it is not.
    std::fs::hard_link(view.join("dir/c2"), view.join("d")).unwrap();
    let shown = take(&view);
    home.umount(&store, &view);
    let report = keep(&store, &row);
    assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
    assert_eq!(report.applied.copied_bytes, 0);
    let wrong = differences(&shown, &take(&home.at("r")), true);
    let links = |line: &String| line.starts_with("d: ") || line.starts_with("dir/c2: ");
    assert!(wrong.iter().all(links), "{}", wrong.join("\n"));
    let ids = |path: &str| {
        let out = Command::new("xfs_io").args(["-c", "lsproj"]).arg(home.at(path)).output().unwrap();
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    assert_eq!(
        (ids("r/dir/big"), ids("r/dir/b"), ids("r/c")),
        ("projid = 8".into(), "projid = 8".into(), "projid = 7".into())
    );
}

#[test]
fn privileged_an_id_mapped_view_is_committed_with_the_ids_of_the_disk() {
    let mut home = Home::new(RigFs::Xfs);
    let store = home.store();
    let row = sealed(&home, &store, "r");
    let options = MountOptions { id_map: Some("0:100000:65536".parse().unwrap()), ..MountOptions::default() };
    let view = home.try_mount(&store, &row, "view", &options).unwrap().target;
    std::fs::write(view.join("dir/c"), "changed").unwrap();
    std::os::unix::fs::chown(view.join("dir/c"), Some(100_005), Some(100_006)).unwrap();
    std::os::unix::fs::chown(view.join("b"), Some(100_007), None).unwrap();
    home.umount(&store, &view);
    let report = keep(&store, &row);
    assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
    let owner = |p: &str| std::fs::metadata(home.at("r").join(p)).map(|m| (m.uid(), m.gid())).unwrap();
    assert_eq!((owner("dir/c"), owner("b")), ((5, 6), (7, 0)));
}

/// An ACL as the kernel takes it: owner rwx, user `id` `permissions`, group r-x, mask rwx, others r-x.
fn acl(id: u32, permissions: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries =
        [(1u16, 7u16, NOBODY), (2, permissions, id), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY)];
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        out.extend(tag.to_le_bytes());
        out.extend(permissions.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

#[test]
fn privileged_attributes_capabilities_and_modes_are_committed() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let store = home.store();
        let row = sealed(&home, &store, "r");
        let view = home.mount(&store, &row, "view");
        let set = |path: &str, name: &str, value: &[u8]| {
            let set = rustix::fs::lsetxattr(view.join(path), name, value, XattrFlags::empty());
            set.unwrap_or_else(|e| panic!("{path} {name}: {e}"));
        };
        // cap_net_raw+ep, an ACL for user 5, an attribute that overlayfs would take for its own, and a large one.
        let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        std::os::unix::fs::chown(view.join("a"), Some(3), Some(4)).unwrap();
        set("a", "security.capability", &capability);
        set("b", "trusted.overlay.redirect", b"/a");
        set("b", "trusted.overlay.metacopy", b"");
        set("dir", "trusted.overlay.opaque", b"y");
        set("dir/c", "user.large", &[7; 3000]);
        // Overlayfs takes an ACL only for what is in the upper already when the layer below is EROFS.
        rustix::fs::chmod(view.join("dir/deep"), rustix::fs::Mode::from_raw_mode(0o750)).unwrap();
        set("dir/deep", "system.posix_acl_access", &acl(5, 6));
        set("dir/deep", "system.posix_acl_default", &acl(6, 4));
        std::fs::write(view.join("dir/deep/inherits"), "x").unwrap();
        rustix::fs::chmod(view.join("dir/deep/d"), rustix::fs::Mode::from_raw_mode(0o6755)).unwrap();
        let shown = take(&view);
        home.umount(&store, &view);
        let report = keep(&store, &row);
        assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
        let wrong = differences(&shown, &take(&home.at("r")), true);
        assert!(wrong.is_empty(), "{fs:?}:\n{}", wrong.join("\n"));
        let view = home.mount(&store, &again(&store, &row), "view");
        let wrong = differences(&shown, &take(&view), true);
        assert!(wrong.is_empty(), "{fs:?} sealed again:\n{}", wrong.join("\n"));
        home.umount(&store, &view);
    }
}

#[test]
fn privileged_a_rename_undone_after_half_a_commit_loses_nothing() {
    // The first commit stops on a conflict after it has moved the directory; the view then moves it back.
    let mut home = Home::new(RigFs::Xfs);
    let store = home.store();
    let row = sealed(&home, &store, "r");
    let root = home.at("r");
    let before = take(&root.join("dir"));
    let view = home.mount(&store, &row, "view");
    std::fs::rename(view.join("dir"), view.join("moved")).unwrap();
    std::fs::write(view.join("b"), "view").unwrap();
    home.umount(&store, &view);
    std::fs::write(root.join("b"), "raw").unwrap();
    assert_eq!(keep(&store, &row).outcome, CommitOutcome::Partial);
    assert!(!root.join("dir").exists() && root.join("moved/deep/d").exists());
    let view = home.mount(&store, &row, "view");
    std::fs::rename(view.join("moved"), view.join("dir")).unwrap();
    home.umount(&store, &view);
    let report = commit(&store, &row, OnConflict::TakeRaw).unwrap();
    assert_eq!(report.outcome, CommitOutcome::Committed, "{report:?}");
    let wrong = differences(&before, &take(&root.join("dir")), true);
    assert!(wrong.is_empty() && !root.join("moved").exists(), "{}", wrong.join("\n"));
}

#[test]
fn privileged_export_makes_a_directory_or_a_read_only_subvolume() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let store = home.store();
        let row = sealed(&home, &store, "r");
        let view = home.mount(&store, &row, "view");
        std::fs::remove_file(view.join("a")).unwrap();
        std::fs::write(view.join("dir/link"), "written through the other name").unwrap();
        std::fs::rename(view.join("dir/deep"), view.join("deeper")).unwrap();
        let shown = take(&view);
        home.umount(&store, &view);
        let export = |name: &str, options| {
            patiently(
                || export_root(&store, &row, &home.at(name), options, &Progress::default()),
                |r| matches!(r, Err(CommitError::Live { .. })),
            )
        };
        let report = export("out", ExportOptions::default()).unwrap();
        assert!(!report.live && !report.partial && report.copied.copied_bytes == 0, "{report:?}");
        assert!(differences(&shown, &take(&home.at("out")), true).is_empty());
        assert!(matches!(export("out", ExportOptions::default()), Err(CommitError::Refused(_))));
        let snapshot = export("snap", ExportOptions { subvolume: false, read_only: true });
        if fs == RigFs::Xfs {
            assert!(matches!(snapshot, Err(CommitError::Refused(_))), "{snapshot:?}");
            assert!(!home.at("snap").exists());
            continue;
        }
        snapshot.unwrap();
        assert!(differences(&shown, &take(&home.at("snap")), true).is_empty());
        assert!(std::fs::write(home.at("snap/x"), "x").is_err());
        let mut send = Command::new("btrfs");
        send.args(["send", "-q", "-f"]).arg(home.at("stream")).arg(home.at("snap"));
        assert!(send.status().unwrap().success());
        assert!(std::fs::metadata(home.at("stream")).unwrap().len() > 20_000);
    }
}

#[test]
fn privileged_unseal_keeps_every_write_and_leaves_nothing() {
    for fs in BOTH {
        let mut home = Home::new(fs);
        let store = home.store();
        for name in ["c", "e", "d", "q"] {
            small(&home, name);
        }
        let rows = home.seal(&store, &["c", "e", "d", "q"]);
        let before = take(&home.at("q"));
        let mut shown = Vec::new();
        for row in &rows[..3] {
            let view = home.mount(&store, row, &format!("view-{}", row.name));
            std::fs::write(view.join("a"), format!("written in {}", row.name)).unwrap();
            std::fs::remove_file(view.join("b")).unwrap();
            shown.push(take(&view));
            home.umount(&store, &view);
        }
        let unseal = |row: &RootRow, writes: Writes| {
            patiently(
                || unseal_root(&store, row, &writes, &Progress::default()),
                |r| matches!(r, Err(CommitError::Live { .. })),
            )
        };
        for row in &rows[..3] {
            let refused = unseal(row, Writes::Refuse);
            assert!(matches!(refused, Err(CommitError::Refused(_))), "{refused:?}");
        }
        assert!(unseal(&rows[0], Writes::Commit(CommitOptions::default())).unwrap().unsealed);
        assert!(differences(&shown[0], &take(&home.at("c")), true).is_empty());
        assert!(unseal(&rows[1], Writes::Export(home.at("out"))).unwrap().unsealed);
        assert!(differences(&shown[1], &take(&home.at("out")), true).is_empty());
        assert!(unseal(&rows[2], Writes::Discard).unwrap().unsealed);
        assert!(unseal(&rows[3], Writes::Refuse).unwrap().unsealed);
        assert!(differences(&before, &take(&home.at("q")), true).is_empty());
        let store_dir = home.at(".pagefold");
        assert!(
            look(&[])
                .iter()
                .any(|r| r.kind == RemainKind::Store && r.what == store_dir.display().to_string())
        );
        remove_store(store, &Task::default()).unwrap();
        assert!(!store_dir.exists());
        assert!(!look(&[]).iter().any(|r| r.what.starts_with(&home.at("").display().to_string())));
        let gone = Store::open(&store_dir, OpenMode::Existing, "a test");
        assert!(matches!(gone, Err(StoreError::Absent(_))), "{gone:?}");
    }
}
