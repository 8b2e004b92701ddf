//! The floor: open, FIEMAP, close for each of the same files, nothing else.

use std::ffi::{CString, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use nix::sys::resource::{UsageWho, getrusage};
use pagefold_sys::fiemap::{Sync, read_extents};
use rustix::fs::{Mode, OFlags};

use crate::measured::seconds;

/// One directory with the names of its regular files.
#[derive(Debug)]
pub struct Listing {
    dir: PathBuf,
    names: Vec<CString>,
}

/// Lists all directories with regular files at or below `root`, and stops at other file systems' borders nowhere: the trees
/// are our own.
///
/// # Errors
/// A directory can't be read.
pub fn list(root: &Path) -> anyhow::Result<Vec<Listing>> {
    let (mut found, mut todo) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = todo.pop() {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                names.push(CString::new(OsString::into_vec(entry.file_name()))?);
            }
        }
        if !names.is_empty() {
            found.push(Listing { dir, names });
        }
    }
    Ok(found)
}

/// Names in `listings`.
#[must_use]
pub fn count(listings: &[Listing]) -> u64 {
    listings.iter().map(|l| l.names.len() as u64).sum()
}

/// What going through all files cost.
#[derive(Clone, Copy, Debug)]
pub struct BareRun {
    /// From start to end.
    pub wall_s: f64,
    /// Processor time of this process meanwhile.
    pub cpu_s: f64,
}

/// Opens, maps and closes every file on `threads` threads.
///
/// # Errors
/// A file can't be opened or mapped, or the user asks to stop.
pub fn open_map_close(listings: &[Listing], threads: usize, cancel: &AtomicBool) -> anyhow::Result<BareRun> {
    let (next, extents) = (AtomicUsize::new(0), AtomicU64::new(0));
    let (start, cpu) = (Instant::now(), own_cpu_s()?);
    let results: Vec<anyhow::Result<()>> = std::thread::scope(|scope| {
        let work = || -> anyhow::Result<()> {
            let mut told = 0;
            while let Some(listing) = listings.get(next.fetch_add(1, Ordering::Relaxed)) {
                if cancel.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                told += one_directory(listing)?;
            }
            extents.fetch_add(told, Ordering::Relaxed);
            Ok(())
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let run = BareRun { wall_s: start.elapsed().as_secs_f64(), cpu_s: own_cpu_s()? - cpu };
    results.into_iter().collect::<anyhow::Result<()>>()?;
    if extents.into_inner() == 0 {
        bail!("not one extent in {} files: this measures nothing", count(listings));
    }
    Ok(run)
}

fn one_directory(listing: &Listing) -> anyhow::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&listing.dir, flags | OFlags::DIRECTORY, Mode::empty())?;
    let mut told = 0;
    for name in &listing.names {
        let file = rustix::fs::openat(&dir, name, flags, Mode::empty())
            .with_context(|| format!("open {name:?} in {}", listing.dir.display()))?;
        read_extents(file.as_fd(), u64::MAX, Sync::No, |_| told += 1)?;
    }
    Ok(told)
}

/// Processor time of this process so far, in seconds.
///
/// # Errors
/// As `getrusage(2)`.
pub fn own_cpu_s() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
