//! What is measured: memory groups, `smaps_rollup`, the host's slab, times.
//!
//! Invariant: one source a figure, and every figure of an arm from the same moment.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::memcg::{Charge, Memcg, kib_field, pss_file};
use rustix::fs::{FileType, Mode, OFlags};

use super::BenchError;
use super::report::{Figures, Times};

/// The kernel sums the counts of memory groups up at least this often.
const STAT_INTERVAL: Duration = Duration::from_millis(2100);

/// Writes everything out and empties the page cache, dentries and inodes.
pub(super) fn drop_caches() -> Result<(), BenchError> {
    let file = Path::new("/proc/sys/vm/drop_caches");
    // Twice: what the first round's inodes held on to goes with the second.
    for _ in 0..2 {
        rustix::fs::sync();
        std::fs::write(file, "3").map_err(|e| BenchError::io("write", file, e))?;
    }
    Ok(())
}

/// The figures of running containers.
pub(super) fn figures<'a>(
    groups: impl Iterator<Item = &'a Memcg>,
    slab_before: u64,
) -> Result<Figures, BenchError> {
    std::thread::sleep(STAT_INTERVAL);
    let (mut charge, mut pss) = (Charge::default(), 0);
    for group in groups {
        charge += group.charge()?;
        for process in group.processes()? {
            pss += pss_file(process);
        }
    }
    Ok(Figures {
        page_cache_bytes: charge.file,
        pss_file_bytes: pss,
        anon_bytes: charge.anon,
        kernel_bytes: charge.kernel,
        slab_delta_bytes: slab().cast_signed() - slab_before.cast_signed(),
    })
}

/// A group's charge once the kernel has summed it up.
pub(super) fn settled_charge(group: &Memcg) -> Result<Charge, BenchError> {
    std::thread::sleep(STAT_INTERVAL);
    Ok(group.charge()?)
}

/// The host's slab, bytes.
pub(super) fn slab() -> u64 {
    kib_field(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "Slab:")
}

/// The host's memory that could be had without swapping, bytes.
pub(super) fn available() -> u64 {
    kib_field(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:")
}

/// Sums samples in milliseconds up.
pub(super) fn times(samples: &[Duration]) -> Times {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let total_ms = ms(samples.iter().sum());
    Times {
        first_ms: samples.first().copied().map_or(0.0, ms),
        mean_ms: total_ms / samples.len().max(1) as f64,
        max_ms: samples.iter().max().copied().map_or(0.0, ms),
        total_ms,
    }
}

/// What reading a tree came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TreeSize {
    pub files: u64,
    pub bytes: u64,
}

/// Reads every regular file below `root` from start to end, without leaving its file system.
pub(super) fn read_tree(root: &Path, cancel: &AtomicBool) -> Result<TreeSize, BenchError> {
    let mut read = TreeSize::default();
    let mut buffer = vec![0; 1 << 20];
    visit(root, cancel, &mut |path| {
        let mut file = File::open(path).map_err(|e| BenchError::io("open", path, e))?;
        read.files += 1;
        loop {
            match file.read(&mut buffer).map_err(|e| BenchError::io("read", path, e))? {
                0 => return Ok(true),
                n => read.bytes += n as u64,
            }
        }
    })?;
    Ok(read)
}

/// Calls `each` with every regular file below `root` until it says false.
fn visit(
    root: &Path,
    cancel: &AtomicBool,
    each: &mut dyn FnMut(&Path) -> Result<bool, BenchError>,
) -> Result<(), BenchError> {
    let mut stack = vec![root.to_owned()];
    while let Some(dir) = stack.pop() {
        if cancel.load(Ordering::Relaxed) {
            return Err(BenchError::Cancelled);
        }
        let list = std::fs::read_dir(&dir).map_err(|e| BenchError::io("list", &dir, e))?;
        for entry in list {
            let entry = entry.map_err(|e| BenchError::io("list", &dir, e))?;
            let kind = entry.file_type().map_err(|e| BenchError::io("stat", &dir, e))?;
            if kind.is_dir() {
                stack.push(entry.path());
            } else if kind.is_file() && !each(&entry.path())? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Paths of up to `max` regular files, relative to `root`.
pub(super) fn some_files(root: &Path, max: usize, cancel: &AtomicBool) -> Result<Vec<PathBuf>, BenchError> {
    let mut found = Vec::new();
    visit(root, cancel, &mut |path| {
        found.extend(path.strip_prefix(root).ok().map(Path::to_owned));
        Ok(found.len() < max)
    })?;
    Ok(found)
}

/// A root to open files in.
pub(super) fn open_root(root: &Path) -> Result<OwnedFd, BenchError> {
    rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| BenchError::io("open", root, e))
}

/// Mean time of open and close, microseconds, over all `files` once.
pub(super) fn open_close(root: &OwnedFd, files: &[PathBuf]) -> Result<f64, BenchError> {
    let started = Instant::now();
    for file in files {
        let opened = rustix::fs::openat(root, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        drop(opened.map_err(|e| BenchError::io("open", file, e))?);
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / files.len().max(1) as f64)
}

/// Regular files and their bytes below `root`; hard links count each name.
pub(super) fn size_of(root: &Path, cancel: &AtomicBool) -> Result<TreeSize, BenchError> {
    let mut size = TreeSize::default();
    visit(root, cancel, &mut |path| {
        let stat = rustix::fs::lstat(path).map_err(|e| BenchError::io("stat", path, e))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            size.files += 1;
            size.bytes += u64::try_from(stat.st_size).unwrap_or(0);
        }
        Ok(true)
    })?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_order() {
        let ms = Duration::from_millis;
        let told = times(&[ms(9), ms(1), ms(2)]);
        assert_eq!((told.first_ms, told.mean_ms, told.max_ms, told.total_ms), (9.0, 4.0, 9.0, 12.0));
        assert_eq!(times(&[]).total_ms, 0.0);
    }
}
