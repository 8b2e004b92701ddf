//! The reader against plain reading: right hashes, nothing left in the cache, nothing changed, no surprise on hostile input.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use pagefold_engine::units::{PageCount, PageIndex};
use pagefold_fsadapters::reader::{Backend, read_jobs_by};
use pagefold_fsadapters::source::{InodeId, PageHash, READ_JOB_PAGES_MAX, ReadJob, ReadOptions, ReadOutcome};
use pagefold_sys::cache;
use pagefold_testfs::rig::{LoopRig, RigFs};

const PAGE: u64 = 4096;
const OPTIONS: ReadOptions = ReadOptions { threads: 2, queue_depth: 8 };
const BACKENDS: [Backend; 2] = [Backend::Best, Backend::Plain];

fn job(path: &Path, ranges: &[(u64, u64)], resident: bool) -> ReadJob {
    let meta = fs::symlink_metadata(path).unwrap();
    ReadJob {
        tag: 0,
        path: path.to_owned(),
        inode: InodeId { dev: meta.dev(), ino: meta.ino() },
        size: meta.len(),
        ctime: (meta.ctime(), meta.ctime_nsec() as u32),
        ranges: ranges.iter().map(|(s, p)| (PageIndex(*s), PageCount(*p))).collect(),
        resident,
    }
}

/// Jobs for all pages of a file.
fn whole(path: &Path, resident: bool) -> Vec<ReadJob> {
    let pages = fs::metadata(path).unwrap().len().div_ceil(PAGE);
    let most = READ_JOB_PAGES_MAX;
    let starts = (0..pages.max(1)).step_by(most as usize);
    starts.map(|s| job(path, &[(s, most.min(pages - s))], resident)).collect()
}

fn run(backend: Backend, jobs: Vec<ReadJob>) -> Vec<ReadOutcome> {
    let outcomes = Mutex::new(BTreeMap::new());
    let count = jobs.len();
    let mut jobs = jobs.into_iter().enumerate().map(|(i, job)| ReadJob { tag: i as u64, ..job });
    read_jobs_by(backend, &mut jobs, OPTIONS, &AtomicBool::new(false), &|outcome| {
        let tag = match &outcome {
            ReadOutcome::Hashed { tag, .. }
            | ReadOutcome::Moved { tag }
            | ReadOutcome::Failed { tag, .. } => *tag,
        };
        assert!(outcomes.lock().unwrap().insert(tag, outcome).is_none(), "two outcomes for {tag}");
    });
    let outcomes = outcomes.into_inner().unwrap();
    assert_eq!(outcomes.len(), count, "one outcome a job");
    outcomes.into_values().collect()
}

/// Somebody may put a link where a directory was. It leads anywhere: to a device, of which some do something when they are opened.
#[test]
fn no_link_on_the_way_is_followed_and_nothing_but_files_is_opened() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path().canonicalize().unwrap();
    fs::create_dir(home.join("d")).unwrap();
    fs::write(home.join("d/f"), [1; 100]).unwrap();
    let linked = job(&home.join("d/f"), &[(0, 1)], true);
    fs::rename(home.join("d"), home.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(home.join("elsewhere"), home.join("d")).unwrap();
    let pipe = home.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::NONBLOCK).unwrap();
    for path in [&pipe, &home.join("elsewhere/f")] {
        rustix::fs::inotify::add_watch(&watch, path, rustix::fs::inotify::WatchFlags::OPEN).unwrap();
    }
    for backend in BACKENDS {
        let outcomes = run(backend, vec![linked.clone(), job(&pipe, &[(0, 1)], true)]);
        assert!(outcomes.iter().all(|o| matches!(o, ReadOutcome::Moved { .. })), "{outcomes:?}");
        let mut told = [0; 512];
        assert_eq!(
            rustix::io::read(&watch, &mut told),
            Err(rustix::io::Errno::AGAIN),
            "opened by {backend:?}"
        );
    }
}

fn hashes(outcome: ReadOutcome) -> Vec<PageHash> {
    match outcome {
        ReadOutcome::Hashed { hashes, .. } => hashes,
        other => panic!("{other:?}"),
    }
}

/// Hashes of all pages, by the simplest means.
fn oracle(path: &Path) -> Vec<PageHash> {
    let bytes = fs::read(path).unwrap();
    let page = |part: &[u8]| {
        let mut whole = [0; PAGE as usize];
        whole[..part.len()].copy_from_slice(part);
        blake3::hash(&whole).as_bytes()[..16].try_into().unwrap()
    };
    bytes.chunks(PAGE as usize).map(page).collect()
}

/// Files of awkward sizes with bytes that differ from page to page; synced.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let sizes =
        [0, 1, 511, 512, 2000, 4095, 4096, 4097, 70_000, (1 << 20) - 1, (1 << 20) + 4097, (17 << 20) + 5];
    let mut files = Vec::new();
    for (i, size) in sizes.into_iter().enumerate() {
        let bytes: Vec<u8> = (0..size).map(|at: usize| (at / 4096 * 31 + at % 251 + i) as u8).collect();
        files.push(dir.join(format!("f{i}")));
        fs::write(&files[i], bytes).unwrap();
    }
    let sparse = dir.join("sparse");
    File::create(&sparse).unwrap().write_all_at(b"end", 3 << 20).unwrap();
    files.push(sparse);
    for file in &files {
        File::open(file).unwrap().sync_all().unwrap();
    }
    files
}

fn drop_cache(path: &Path) {
    cache::drop_cached(File::open(path).unwrap(), 0, u64::MAX >> 1).unwrap();
}

fn cached(path: &Path) -> u64 {
    cache::cachestat(File::open(path).unwrap().as_fd(), 0, 0).unwrap().nr_cache
}

fn check_tree(dir: &Path) {
    let files = tree(dir);
    for backend in BACKENDS {
        for resident in [false, true] {
            for file in &files {
                let wanted = oracle(file);
                if !resident {
                    drop_cache(file);
                }
                let got: Vec<PageHash> =
                    run(backend, whole(file, resident)).into_iter().flat_map(hashes).collect();
                assert!(got == wanted, "{} {backend:?} resident={resident}", file.display());
            }
        }
    }
}

#[test]
fn hashes_are_right_on_a_disk() {
    check_tree(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap().path());
}

#[test]
fn hashes_are_right_on_tmpfs() {
    check_tree(tempfile::tempdir_in("/dev/shm").expect("this test needs a tmpfs on /dev/shm").path());
}

#[test]
fn parts_come_in_the_order_asked_for() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = &tree(dir.path())[11];
    let wanted = oracle(file);
    let ranges = [(3, 1), (4, 2), (100, 700), (4000, 1), (4352, 1)];
    let expected: Vec<PageHash> =
        ranges.iter().flat_map(|(s, p)| &wanted[*s as usize..(*s + *p) as usize]).copied().collect();
    for backend in BACKENDS {
        for resident in [false, true] {
            let got = run(backend, vec![job(file, &ranges, resident)]).pop().unwrap();
            assert!(hashes(got) == expected, "{backend:?} resident={resident}");
        }
    }
    let nothing = run(Backend::Best, vec![job(file, &[], false)]).pop().unwrap();
    assert!(hashes(nothing).is_empty());
}

#[test]
fn what_is_not_the_expected_file_is_moved_or_failed() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("f");
    fs::write(&path, [1; 10_000]).unwrap();
    let good = job(&path, &[(0, 3)], false);
    let named = |name: &str| ReadJob { path: dir.path().join(name), ..good.clone() };
    std::os::unix::fs::symlink("f", dir.path().join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let absurd = ReadJob { ranges: vec![(PageIndex(u64::MAX), PageCount(2))], ..good.clone() };
    for backend in BACKENDS {
        let moved = vec![
            ReadJob { size: 9_999, ..good.clone() },
            ReadJob { inode: InodeId { ino: good.inode.ino + 1, ..good.inode }, ..good.clone() },
            ReadJob { ctime: (good.ctime.0, good.ctime.1 ^ 1), ..good.clone() },
            named("link"),
            named("fifo"),
        ];
        for outcome in run(backend, moved) {
            assert!(matches!(outcome, ReadOutcome::Moved { .. }), "{backend:?} {outcome:?}");
        }
        for outcome in run(backend, vec![named("none"), named("a\0b"), absurd.clone()]) {
            assert!(matches!(outcome, ReadOutcome::Failed { .. }), "{backend:?} {outcome:?}");
        }
        let [ReadOutcome::Failed { error, .. }] = &run(backend, vec![named("none")])[..] else { panic!() };
        assert!(error.is_vanished());
        assert!(matches!(run(backend, vec![good.clone()])[..], [ReadOutcome::Hashed { .. }]));
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_never_hashed() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("f");
    fs::write(&path, vec![1; 64 << 20]).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    for backend in BACKENDS {
        let jobs = whole(&path, false);
        // The first job handed out is made before the change, the second after: only the first may be hashed.
        let mut handed = jobs.into_iter().enumerate().map(|(i, job)| {
            if i == 1 {
                // More than a tick of the clock that stamps ctime.
                std::thread::sleep(std::time::Duration::from_millis(20));
                File::options().write(true).open(&path).unwrap().write_all_at(&[i as u8], 0).unwrap();
            }
            ReadJob { tag: i as u64, ..job }
        });
        let hashed = Mutex::new(Vec::new());
        read_jobs_by(backend, &mut handed, OPTIONS, &AtomicBool::new(false), &|outcome| {
            if let ReadOutcome::Hashed { tag, .. } = outcome {
                hashed.lock().unwrap().push(tag);
            }
        });
        assert!(hashed.into_inner().unwrap().iter().all(|tag| *tag == 0), "{backend:?}");
    }
}

#[test]
fn cancel_ends_soon_and_tells_nothing_more() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = &tree(dir.path())[11];
    for backend in BACKENDS {
        let cancel = AtomicBool::new(false);
        let told = std::sync::atomic::AtomicU64::new(0);
        // Without an end: only the flag can stop this.
        let mut jobs = std::iter::repeat_with(|| job(file, &[(0, 4000)], false));
        read_jobs_by(backend, &mut jobs, OPTIONS, &cancel, &|_| {
            told.fetch_add(1, Ordering::Relaxed);
            cancel.store(true, Ordering::Relaxed);
        });
        assert!(told.into_inner() < 100, "{backend:?}");
    }
}

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 1 << 30).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

#[test]
fn privileged_nothing_stays_in_the_cache_and_no_time_changes() {
    for kind in [RigFs::Xfs, RigFs::Btrfs, RigFs::BtrfsZstd, RigFs::Ext4] {
        let rig = rig(kind);
        let files = tree(rig.path());
        // Read before, so that relatime has no reason of its own to move atime back and forth.
        let wanted: Vec<_> = files.iter().map(|f| oracle(f)).collect();
        let times = |path: &PathBuf| {
            let m = fs::metadata(path).unwrap();
            (m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())
        };
        // An access time older than the last change would move at the next ordinary read.
        for file in &files {
            let old = fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH);
            File::open(file).unwrap().set_times(old).unwrap();
        }
        let before: Vec<_> = files.iter().map(times).collect();
        for backend in BACKENDS {
            for resident in [false, true] {
                files.iter().for_each(|f| drop_cache(f));
                for (file, wanted) in files.iter().zip(&wanted) {
                    // `resident` although it is not: evicted since it was inspected.
                    let got =
                        run(backend, whole(file, resident)).into_iter().flat_map(hashes).collect::<Vec<_>>();
                    assert!(got == *wanted, "{kind:?} {backend:?} {}", file.display());
                    let left = cached(file);
                    assert!(
                        left == 0,
                        "{kind:?} {backend:?} resident={resident} {}: {left} pages",
                        file.display()
                    );
                }
            }
        }
        assert_eq!(before, files.iter().map(times).collect::<Vec<_>>(), "{kind:?}");
    }
}

#[test]
fn privileged_pages_that_were_cached_stay_cached() {
    for kind in [RigFs::Xfs, RigFs::Btrfs, RigFs::BtrfsZstd, RigFs::Ext4] {
        let rig = rig(kind);
        let path = tree(rig.path()).swap_remove(11);
        for backend in BACKENDS {
            for resident in [false, true] {
                let before_and_after = || {
                    drop_cache(&path);
                    let file = File::open(&path).unwrap();
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
                    file.read_exact_at(&mut vec![0; 1 << 20], 8 << 20).unwrap();
                    let runs = || {
                        let mut runs = Vec::new();
                        cache::mincore(file.as_fd(), 17 << 20, |s, p| runs.push((s, p))).unwrap();
                        runs
                    };
                    let before = runs();
                    assert!(!before.is_empty());
                    run(backend, whole(&path, resident));
                    (before, runs())
                };
                // The kernel may take pages for others at any time, and moves some; the reader would do it each time.
                let seen: Vec<_> = (0..5).map(|_| before_and_after()).take_while(|(a, b)| a != b).collect();
                assert!(seen.len() < 5, "{kind:?} {backend:?} resident={resident}: {seen:?}");
            }
        }
    }
}
