//! Rate of the reader over a tree: `reader_rate DIR [threads] [depth] [ring|plain] [--list]`.
//!
//! Reads all regular files once, in physical order, and prints bytes, seconds and MB/s; with `--list` prints the files in that
//! order instead, for fio. Drop the caches yourself.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pagefold_engine::units::{PageCount, PageIndex};
use pagefold_fsadapters::reader::{Backend, read_jobs_by};
use pagefold_fsadapters::source::{InodeId, READ_JOB_PAGES_MAX, ReadJob, ReadOptions, ReadOutcome};
use pagefold_sys::fiemap::{Sync, read_extents};

fn walk(dir: &Path, found: &mut Vec<(u64, PathBuf, std::fs::Metadata)>) {
    for entry in std::fs::read_dir(dir).expect("readable directory").flatten() {
        let meta = entry.metadata().expect("attributes");
        if meta.is_dir() {
            walk(&entry.path(), found);
        } else if meta.is_file() && meta.len() > 0 {
            let file = std::fs::File::open(entry.path()).expect("readable file");
            let mut first = None;
            let _ = read_extents(file.as_fd(), meta.len(), Sync::No, |e| {
                first.get_or_insert(e.physical);
            });
            found.push((first.unwrap_or(0), entry.path(), meta));
        }
    }
}

fn jobs(files: &[(u64, PathBuf, std::fs::Metadata)]) -> Vec<ReadJob> {
    let mut jobs = Vec::new();
    for (_, path, meta) in files {
        let pages = meta.len().div_ceil(4096);
        for start in (0..pages).step_by(READ_JOB_PAGES_MAX as usize) {
            jobs.push(ReadJob {
                tag: jobs.len() as u64,
                path: path.clone(),
                inode: InodeId { dev: meta.dev(), ino: meta.ino() },
                size: meta.len(),
                ctime: (meta.ctime(), meta.ctime_nsec() as u32),
                ranges: vec![(PageIndex(start), PageCount(READ_JOB_PAGES_MAX.min(pages - start)))],
                resident: false,
            });
        }
    }
    jobs
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut files = Vec::new();
    walk(Path::new(&args[0]), &mut files);
    files.sort_by_key(|(physical, ..)| *physical);
    if args.iter().any(|a| a == "--list") {
        let mut out = std::io::stdout().lock();
        files.iter().for_each(|(_, path, _)| writeln!(out, "{}", path.display()).expect("stdout"));
        return;
    }
    let number = |at: usize, or: usize| args.get(at).and_then(|a| a.parse().ok()).unwrap_or(or);
    let options = ReadOptions { threads: number(1, 2), queue_depth: number(2, 32) as u32 };
    let backend = if args.iter().any(|a| a == "plain") { Backend::Plain } else { Backend::Best };
    let bytes: u64 = files.iter().map(|(_, _, meta)| meta.len()).sum();
    let (pages, bad) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = std::time::Instant::now();
    read_jobs_by(backend, &mut jobs(&files).into_iter(), options, &AtomicBool::new(false), &|o| match o {
        ReadOutcome::Hashed { hashes, .. } => drop(pages.fetch_add(hashes.len() as u64, Ordering::Relaxed)),
        other => {
            bad.fetch_add(1, Ordering::Relaxed);
            eprintln!("{other:?}");
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let rate = bytes as f64 / 1e6 / seconds;
    println!(
        "{} files, {bytes} bytes, {pages:?} pages, {bad:?} bad, {seconds:.3} s, {rate:.0} MB/s",
        files.len()
    );
}
