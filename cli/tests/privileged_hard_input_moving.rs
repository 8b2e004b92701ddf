//! Files that change and vanish while they are scanned. Nothing here can be counted exactly; what must hold always:
//! no crash, no figure beyond what ever existed, every file counted or named, and quiet files counted right.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{PAGE, Scan, dir, overwrite_page, reflink, rig, scan, sync, write};
use pagefold_testfs::rig::RigFs;

/// Ends the writers also when an assertion fails, which would otherwise wait for them for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Scans again and again while `disturb` runs over and over.
fn beside(disturb: &(dyn Fn(u64) + Sync), scans: usize, check: impl Fn(usize)) {
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                disturb(rounds.fetch_add(1, Ordering::Relaxed));
            }
        });
        let _stop = Stop(&stop);
        for n in 0..scans {
            let before = rounds.load(Ordering::Relaxed);
            check(n);
            // A scan beside which nothing happened proves nothing.
            while rounds.load(Ordering::Relaxed) < before + 2 {
                std::thread::yield_now();
            }
        }
    });
}

fn errors_below<'a>(scan: &'a Scan, dir: &'a Path) -> impl Iterator<Item = (String, String)> + 'a {
    let dir = dir.to_str().expect("UTF-8").to_owned();
    scan.errors().into_iter().chain(scan.skipped()).filter(move |(path, _)| path.starts_with(&dir))
}

/// 60 quiet pairs of equal files, which every scan must count exactly.
fn quiet(home: &Path) {
    let (a, b) = (dir(home, "a/quiet"), dir(home, "b/quiet"));
    for i in 0..60 {
        write(&a.join(i.to_string()), i, 4 * PAGE as usize);
    }
    sync(home);
    for i in 0..60 {
        reflink(&a.join(i.to_string()), &b.join(i.to_string()));
    }
    sync(home);
}

const QUIET: u64 = 60 * 4 * PAGE;

#[test]
fn privileged_files_written_while_scanned_are_never_equal_to_what_they_were() {
    for (fs, content) in
        [(RigFs::Xfs, false), (RigFs::Xfs, true), (RigFs::Btrfs, false), (RigFs::Btrfs, true)]
    {
        let rig = rig(fs);
        quiet(rig.path());
        let (a, b) = (rig.path().join("a"), rig.path().join("b"));
        for i in 0..20 {
            write(&a.join(i.to_string()), 1000 + i, 8 * PAGE as usize);
        }
        sync(rig.path());
        for i in 0..20 {
            reflink(&a.join(i.to_string()), &b.join(i.to_string()));
        }
        sync(rig.path());
        for i in 0..20 {
            // From here on these differ in every page, for ever. In place, so that the map at first tells of the old blocks.
            for page in 0..8 {
                overwrite_page(&b.join(i.to_string()), page, 5000 + i * 8 + page);
            }
        }
        let disturb = |round: u64| {
            for i in 0..20 {
                overwrite_page(&b.join(i.to_string()), round % 8, 1_000_000 + round * 20 + i);
                if (round + i).is_multiple_of(5) {
                    fs::File::open(b.join(i.to_string())).and_then(|f| f.sync_all()).expect("synced");
                }
            }
        };
        beside(&disturb, 15, |n| {
            let found = scan(&[&a, &b], if content { &["--content"] } else { &[] });
            let what = format!("{fs:?} content {content} scan {n}: {:?}", found.errors());
            assert_eq!(found.total("files"), 160, "{what}");
            assert_eq!(found.total("cache_bytes"), 2 * QUIET + 40 * 8 * PAGE, "{what}");
            assert_eq!(found.total("mergeable_page_bytes"), QUIET, "{what}");
            assert_eq!(found.total("mergeable_file_bytes"), QUIET, "{what}");
            assert!(errors_below(&found, &b.join("quiet")).next().is_none(), "{what}");
            // With --content, whatever is left undecided has a name.
            let undecided = found.total("undecided_bytes");
            assert!(!content || undecided == 0 || !found.errors().is_empty(), "{what}: {undecided} bytes");
        });
    }
}

#[test]
fn privileged_files_and_directories_may_vanish_and_change_kind_while_scanned() {
    let rig = rig(RigFs::Xfs);
    quiet(rig.path());
    let (a, b) = (rig.path().join("a"), rig.path().join("b"));
    let wild = dir(&b, "wild");
    let disturb = |round: u64| {
        for i in 0..50u64 {
            let path = wild.join(i.to_string());
            let _ = fs::remove_file(&path);
            let _ = fs::remove_dir_all(&path);
            match (round + i) % 4 {
                0 => write(&path, i, 6 * PAGE as usize),
                1 => write(&dir(&path, "x/y").join("f"), i, PAGE as usize),
                2 => std::os::unix::fs::symlink(&a, &path).expect("linked"),
                _ => {
                    let mode = rustix::fs::Mode::from_raw_mode(0o600);
                    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
                        .expect("FIFO");
                }
            }
        }
    };
    beside(&disturb, 30, |n| {
        let found = scan(&[&a, &b], if n % 2 == 0 { &[] } else { &["--content"] });
        let files = found.total("files");
        assert!((120..=170).contains(&files), "{files}");
        assert_eq!(found.root(0, "cache_bytes"), QUIET);
        assert!(found.total("mergeable_page_bytes") >= QUIET, "{:?}", found.errors());
        assert!(found.total("cache_bytes") <= 2 * QUIET + 50 * 6 * PAGE);
        assert!(errors_below(&found, &b.join("quiet")).next().is_none());
        for (path, error) in found.errors() {
            assert!(path.contains("/wild"), "{path}: {error}");
        }
    });
}

#[test]
fn privileged_files_that_grow_and_shrink_while_scanned_have_one_of_their_sizes() {
    let rig = rig(RigFs::Btrfs);
    quiet(rig.path());
    let (a, b) = (rig.path().join("a"), rig.path().join("b"));
    write(&b.join("moving"), 1, 1 << 20);
    sync(rig.path());
    let disturb = |round: u64| {
        let file = fs::File::options().write(true).open(b.join("moving")).expect("writable");
        file.set_len(round * 7919 % (1 << 20)).expect("truncated");
    };
    beside(&disturb, 30, |n| {
        let found = scan(&[&a, &b], if n % 2 == 0 { &[] } else { &["--content"] });
        assert_eq!(found.total("files"), 121);
        assert!(found.total("logical_bytes") < 2 * QUIET + (1 << 20));
        assert!((QUIET..QUIET + (1 << 20)).contains(&found.total("mergeable_page_bytes")));
        for (path, _) in found.errors() {
            assert!(path.ends_with("/moving"), "{path}");
        }
    });
}

#[test]
fn privileged_a_large_file_that_never_rests_is_named_once() {
    let rig = rig(RigFs::Xfs);
    quiet(rig.path());
    let (a, b) = (rig.path().join("a"), rig.path().join("b"));
    write(&b.join("large"), 1, 48 << 20);
    sync(rig.path());
    let disturb = |round: u64| {
        overwrite_page(&b.join("large"), round * 997 % 12_000, round);
        std::thread::sleep(std::time::Duration::from_micros(200));
    };
    beside(&disturb, 4, |_| {
        let found = scan(&[&a, &b], &["--content"]);
        assert_eq!(found.total("mergeable_page_bytes"), QUIET);
        assert!(found.errors().len() <= 2, "{:?}", found.errors());
        assert!(found.errors().iter().all(|(path, _)| path.ends_with("/large")), "{:?}", found.errors());
    });
}
