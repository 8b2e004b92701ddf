//! Nothing scanned is ever modified: times, attributes, bytes, dirty pages and what is cached stay as they were.
//!
//! The file systems are mounted `strictatime`: there every ordinary read leaves a trace, as the first test shows.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::{PAGE, Scan, cached_and_dirty, dir, public_binary, reflink, rig, scan, sync, write};
use pagefold_testfs::rig::{LoopRig, RigFs};

const ALL: [RigFs; 4] = [RigFs::Xfs, RigFs::Btrfs, RigFs::BtrfsZstd, RigFs::Ext4];

type Times = [(i64, i64); 3];

/// Every time, mode, owner, size and number of blocks below `at`, links themselves included.
fn traces(at: &Path) -> BTreeMap<PathBuf, (Times, [u64; 6])> {
    let mut all = BTreeMap::new();
    let mut todo = vec![at.to_owned()];
    while let Some(path) = todo.pop() {
        if path.is_dir() && !path.is_symlink() {
            todo.extend(fs::read_dir(&path).expect("listed").map(|e| e.expect("an entry").path()));
        }
        all.insert(path, Default::default());
    }
    // Only now: listing has moved the directories' access times.
    for (path, seen) in &mut all {
        let m = fs::symlink_metadata(path).expect("attributes");
        let times = [(m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())];
        *seen = (times, [m.ino(), u64::from(m.mode()), u64::from(m.uid()), m.nlink(), m.size(), m.blocks()]);
    }
    all
}

fn same(before: &BTreeMap<PathBuf, (Times, [u64; 6])>) -> Vec<&PathBuf> {
    let now = |path: &PathBuf| {
        let m = fs::symlink_metadata(path).expect("attributes");
        let times = [(m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())];
        (times, [m.ino(), u64::from(m.mode()), u64::from(m.uid()), m.nlink(), m.size(), m.blocks()])
    };
    before.iter().filter(|(path, seen)| now(path) != **seen).map(|(path, _)| path).collect()
}

fn strict_rig(fs: RigFs) -> LoopRig {
    let rig = rig(fs);
    common::run(
        "mount",
        &["-o", "remount,strictatime"]
            .map(std::ffi::OsStr::new)
            .into_iter()
            .chain([rig.path().as_os_str()])
            .collect::<Vec<_>>(),
    );
    rig
}

fn tree(rig: &LoopRig) -> PathBuf {
    let root = dir(rig.path(), "root");
    for i in 0..12u64 {
        let at = dir(&root, &format!("d{}", i % 3));
        write(&at.join(format!("f{i}")), i / 2, 3 + i as usize * 5000);
        symlink("f0", at.join(format!("l{i}"))).expect("linked");
    }
    if rig.fs() != RigFs::Ext4 {
        reflink(&root.join("d0/f9"), &root.join("d0/copy"));
    }
    sync(rig.path());
    root
}

#[test]
fn privileged_no_time_moves_and_no_attribute() {
    for fs in ALL {
        let mut rig = strict_rig(fs);
        let root = tree(&rig);
        // The check itself works here: an ordinary read is seen.
        let before = traces(&root);
        fs::read(root.join("d0/f9")).expect("read");
        assert_eq!(same(&before), [&root.join("d0/f9")], "{fs:?}: this mount does not record reads");
        for cold in [false, true] {
            if cold {
                rig.remount().expect("nothing is open");
                let options = ["-o", "remount,strictatime"].map(std::ffi::OsStr::new);
                common::run(
                    "mount",
                    &options.into_iter().chain([rig.path().as_os_str()]).collect::<Vec<_>>(),
                );
            }
            for extra in [&[][..], &["--content"], &["--matrix", "--threads", "2"]] {
                let before = traces(&root);
                let found = scan(&[&root], extra);
                found.expect_clean();
                assert!(found.total("files") >= 12);
                assert_eq!(same(&before), Vec::<&PathBuf>::new(), "{fs:?} {extra:?} cold {cold}");
            }
        }
    }
}

#[test]
fn privileged_partly_cached_files_are_looked_at_without_a_trace() {
    use std::os::unix::fs::FileExt;
    // mincore needs a mapping, and mapping a file would move its access time.
    for fs in ALL {
        let mut rig = rig(fs);
        let root = dir(rig.path(), "root");
        write(&root.join("f"), 1, 64 * PAGE as usize);
        rig.remount().expect("nothing is open");
        let options = ["-o", "remount,strictatime"].map(std::ffi::OsStr::new);
        common::run("mount", &options.into_iter().chain([rig.path().as_os_str()]).collect::<Vec<_>>());
        let file = fs::File::open(root.join("f")).expect("opens");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("advice");
        file.read_exact_at(&mut [0], 20 * PAGE).expect("read");
        drop(file);
        let (cached, _) = cached_and_dirty(&root.join("f"));
        assert!(cached > 0 && cached < 64, "{cached}");
        let before = traces(&root);
        for extra in [&[][..], &["--content"]] {
            scan(&[&root], extra).expect(&[("resident_bytes", cached * PAGE)]);
            assert_eq!(same(&before), Vec::<&PathBuf>::new(), "{fs:?} {extra:?}");
            assert_eq!(cached_and_dirty(&root.join("f")).0, cached, "{fs:?} {extra:?}: the cache changed");
        }
    }
}

/// Neither a scan nor reading for `--content` writes back what others left dirty.
#[test]
fn privileged_dirty_pages_stay_dirty() {
    for fs in ALL {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        write(&root.join("old"), 2, 50 * PAGE as usize);
        write(&root.join("half"), 3, 50 * PAGE as usize);
        sync(rig.path());
        common::overwrite_page(&root.join("old"), 7, 9);
        // Dirty in one page, and nothing else cached: the rest would be read past the cache, O_DIRECT.
        let half = fs::File::open(root.join("half")).expect("opens");
        pagefold_sys::cache::drop_cached(&half, 0, 1 << 30).expect("dropped");
        common::overwrite_page(&root.join("half"), 7, 10);
        // Really new: closing a file that was truncated and written makes XFS write it back.
        write(&root.join("new"), 4, 50 * PAGE as usize);
        let dirty = || ["new", "old", "half"].map(|name| cached_and_dirty(&root.join(name)));
        let before = dirty();
        assert!(
            before[0].1 > 0 && before[1].1 > 0 && before[2].1 > 0 && before[2].0 < 50,
            "{fs:?} {before:?}"
        );
        for extra in [&[][..], &["--content"]] {
            scan(&[&root], extra).expect_clean();
            assert_eq!(dirty(), before, "{fs:?} {extra:?}: pages were written back, or came in");
        }
    }
}

/// Where `O_NOATIME` is not allowed (another's files), the access time of what is only mapped or listed may move, by
/// the kernel's rules; nothing else may.
#[test]
fn privileged_another_user_moves_at_most_access_times() {
    use std::os::unix::fs::PermissionsExt;
    let rig = strict_rig(RigFs::Xfs);
    fs::set_permissions(rig.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    let root = tree(&rig);
    let binary = public_binary(rig.path());
    let before = traces(&root);
    for extra in [&[][..], &["--content"]] {
        let found: Scan = common::scan_as(65_534, &binary, &[&root], extra);
        found.expect(&[("files", 13)]);
    }
    for path in same(&before) {
        let m = fs::symlink_metadata(path).expect("attributes");
        let (times, rest) = &before[path];
        assert_eq!(times[1..], [(m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())], "{path:?}");
        assert_eq!(rest[4..], [m.size(), m.blocks()]);
    }
}
