//! Trees of seeded bytes to read: many files of realistic sizes, or few large ones; and the files of a tree in the order in
//! which they lie on disk.
//!
//! All sizes are multiples of 4 KiB, so that fio, which reads whole blocks, can read every byte with `O_DIRECT`. One file in
//! seven is a byte-for-byte copy of an earlier one, written, not cloned: something to find for all who look.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_testfs::farm::content::{Class, Content, PAGE};

/// What a tree is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `files` files, sizes log-normal with a median of 16 KiB and a mean of about 80 KiB; 16 to a directory.
    Realistic {
        /// How many.
        files: u64,
    },
    /// `files` files of `bytes` bytes each.
    Large {
        /// How many.
        files: u64,
        /// Of what size.
        bytes: u64,
    },
}

const COPY_EVERY: u64 = 7;
const FILES_PER_DIR: u64 = 16;
const MEDIAN_BYTES: f64 = 16384.0;
const SIGMA: f64 = 1.8;
const BYTES_MAX: u64 = 32 << 20;

/// Writes a tree at `root`, which is created, and syncs its file system.
///
/// # Errors
/// No space, or the user asks to stop.
pub fn write(root: &Path, shape: Shape, seed: u64, cancel: &AtomicBool) -> anyhow::Result<()> {
    let (files, per_dir) = match shape {
        Shape::Realistic { files } => (files, FILES_PER_DIR),
        Shape::Large { files, .. } => (files, files.max(1)),
    };
    for number in 0..files {
        if cancel.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        let original = if number % COPY_EVERY == COPY_EVERY - 1 { number / 2 } else { number };
        let size = match shape {
            Shape::Realistic { .. } => log_normal(seed, original),
            Shape::Large { bytes, .. } => bytes.next_multiple_of(PAGE),
        };
        let dir = root.join(format!("d{:05}", number / per_dir));
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(format!("f{number:06}"));
        write_file(&path, size, Content { class: Class::Random, key: mix(seed ^ mix(original)) })
            .with_context(|| format!("write {}", path.display()))?;
    }
    rustix::fs::syncfs(File::open(root)?)?;
    Ok(())
}

fn write_file(path: &Path, size: u64, content: Content) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    let mut buffer = vec![0; (1 << 20).min(size as usize)];
    let mut at = 0;
    while at < size {
        let length = buffer.len().min((size - at) as usize);
        content.fill(at, &mut buffer[..length]);
        file.write_all(&buffer[..length])?;
        at += length as u64;
    }
    Ok(())
}

/// The size of file `number`: log-normal by Box and Muller, in whole pages, at least one.
fn log_normal(seed: u64, number: u64) -> u64 {
    let unit = |stream: u64| {
        let bits = mix(seed ^ mix(2 * number + stream + 1)) >> 11;
        (bits as f64 + 1.0) / (1u64 << 53) as f64
    };
    let normal = (-2.0 * unit(0).ln()).sqrt() * (std::f64::consts::TAU * unit(1)).cos();
    let bytes = MEDIAN_BYTES * (SIGMA * normal).exp();
    (bytes as u64).clamp(1, BYTES_MAX).next_multiple_of(PAGE)
}

/// SplitMix64's finisher.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A file of a tree.
#[derive(Clone, Debug)]
pub struct TreeFile {
    /// Where.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    physical: u64,
}

/// The regular files below `root` that are not empty, in physical order of their first extents.
///
/// # Errors
/// Something can't be listed, opened or mapped.
pub fn in_physical_order(root: &Path) -> anyhow::Result<Vec<TreeFile>> {
    let (mut found, mut todo) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                todo.push(entry.path());
            } else if meta.is_file() && meta.size() > 0 {
                let file = File::open(entry.path())?;
                let mut physical = None;
                read_extents(file.as_fd(), meta.size(), Sync::No, |e| {
                    physical.get_or_insert(e.physical);
                })?;
                let physical = physical.unwrap_or(u64::MAX);
                found.push(TreeFile { path: entry.path(), size: meta.size(), physical });
            }
        }
    }
    found.sort_by(|a, b| (a.physical, &a.path).cmp(&(b.physical, &b.path)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pages_and_distributed_as_told() {
        let mut sizes: Vec<u64> = (0..10_000).map(|n| log_normal(1, n)).collect();
        sizes.sort_unstable();
        assert!(sizes.iter().all(|s| *s > 0 && s.is_multiple_of(PAGE)));
        assert!((12_000..24_000).contains(&sizes[5000]), "median {}", sizes[5000]);
        let mean = sizes.iter().sum::<u64>() / 10_000;
        assert!((50_000..130_000).contains(&mean), "mean {mean}");
    }

    #[test]
    fn a_tree_is_what_was_asked_for() {
        let dir = tempfile::tempdir().expect("temp dir");
        let root = dir.path().join("tree");
        let never = AtomicBool::new(false);
        write(&root, Shape::Realistic { files: 40 }, 3, &never).expect("written");
        let files = in_physical_order(&root).expect("listed");
        assert_eq!(files.len(), 40);
        let bytes = |n: u64| std::fs::read(root.join(format!("d{:05}/f{n:06}", n / 16))).expect("read");
        assert_eq!(bytes(6), bytes(3), "the seventh is a copy");
        assert_ne!(bytes(5), bytes(4));
        write(&root, Shape::Realistic { files: 40 }, 3, &AtomicBool::new(true)).expect_err("interrupted");
    }
}
