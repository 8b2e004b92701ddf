//! Drift: what running containers do to their copy of the image. Seeded, and recorded as it is done.
//!
//! Invariant: what happens to a root depends on the seed, the root's number and the image's listing alone.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;

use super::content::{Class, Content, PAGE, Rng};
use super::image::{Plan, write_all_at, write_plan};
use super::manifest::{ByteRange, Drift, ImageFile, ImageManifest, NewFile, RawPath};
use super::tree::{Meta, Tree};
use super::{FarmError, Job};

/// How much, and which.
#[derive(Clone, Copy, Debug)]
pub(super) struct DriftSpec {
    pub(super) seed: u64,
    pub(super) percent: f64,
}

/// The largest file that drift makes, in bytes.
const NEW_BYTES_MAX: u64 = 128 << 10;

/// Changes the root in `path` and says how.
pub(super) fn drift(
    tree: &mut Tree,
    path: &Path,
    image: &ImageManifest,
    spec: DriftSpec,
    root: u32,
    job: &Job<'_>,
) -> Result<Vec<Drift>, FarmError> {
    let mut rng = Rng::new(spec.seed, u64::from(root));
    let mut drifter =
        Drifter { tree, path, image, seed: spec.seed, root, buffer: vec![0; 256 * PAGE as usize] };
    let mut done = Vec::new();
    for file in choose(image.files.len(), spec.percent, &mut rng) {
        if job.cancel.load(Ordering::Relaxed) {
            return Err(FarmError::Cancelled);
        }
        done.push(match rng.below(100) {
            0..50 => drifter.in_place(file, &mut rng)?,
            50..70 => drifter.replace(file, &mut rng)?,
            70..85 => drifter.add(file, &mut rng)?,
            _ => drifter.delete(file)?,
        });
    }
    Ok(done)
}

/// `percent` of `files` indices, ascending, none twice.
fn choose(files: usize, percent: f64, rng: &mut Rng) -> Vec<usize> {
    let wanted = ((files as f64 * percent / 100.0).round() as usize).min(files);
    let mut chosen = HashSet::with_capacity(wanted);
    // Floyd's sampling: `wanted` draws whatever the ratio.
    for top in files - wanted..files {
        let pick = rng.below(top as u64 + 1) as usize;
        if !chosen.insert(pick) {
            chosen.insert(top);
        }
    }
    let mut chosen: Vec<usize> = chosen.into_iter().collect();
    chosen.sort_unstable();
    chosen
}

struct Drifter<'a> {
    tree: &'a mut Tree,
    path: &'a Path,
    image: &'a ImageManifest,
    seed: u64,
    root: u32,
    buffer: Vec<u8>,
}

impl Drifter<'_> {
    fn io(&self, what: &'static str, path: &Path, source: impl Into<std::io::Error>) -> FarmError {
        FarmError::io(what, &self.path.join(path), source)
    }

    /// A key for new bytes: now and then one that other roots draw too, as when all are updated to one version.
    fn key(&self, file: usize, rng: &mut Rng) -> u64 {
        let own = rng.next();
        if rng.chance(40) { Rng::new(self.seed, (file as u64) | (1 << 40)).next() } else { own }
    }

    fn in_place(&mut self, index: usize, rng: &mut Rng) -> Result<Drift, FarmError> {
        let file = &self.image.files[index];
        let path = &file.names[0].0;
        let (size, writes) = plan_writes(file, rng);
        // Never a kind of bytes that compresses differently next to the old ones in one write-out (see `content`).
        let class = match file.content.class {
            Class::Text | Class::Zeros => Class::Text,
            _ => Class::Random,
        };
        let content = Content { class, key: self.key(index, rng) };
        let open = self.tree.file(path, OFlags::WRONLY)?;
        let mut hasher = blake3::Hasher::new();
        for &(start, length) in &writes {
            let piece = &mut self.buffer[..length as usize];
            content.fill(start, piece);
            hasher.update(piece);
            write_all_at(open.as_fd(), piece, start).map_err(|e| self.io("write", path, e))?;
        }
        let hash = hasher.finalize().to_hex().to_string();
        Ok(Drift::InPlace { file: index as u32, size, writes, content, hash })
    }

    fn replace(&mut self, index: usize, rng: &mut Rng) -> Result<Drift, FarmError> {
        let file = &self.image.files[index];
        let path = file.names[0].0.clone();
        let solid = file.data == [(0, file.size)] && file.content.class != Class::Foreign;
        let (size, content) = if solid && file.size <= NEW_BYTES_MAX && rng.chance(25) {
            // The same bytes over again, in new blocks: a package re-installed.
            (file.size, file.content)
        } else {
            self.new_content(index, rng)
        };
        self.tree.unlink(&path)?;
        let new = self.new_file(path, size, content)?;
        Ok(Drift::Replaced { file: index as u32, new })
    }

    fn add(&mut self, index: usize, rng: &mut Rng) -> Result<Drift, FarmError> {
        let beside = &self.image.files[index].names[0].0;
        let name = format!("pagefold-added-{:04}-{index:06}", self.root);
        let path = beside.parent().unwrap_or(Path::new("")).join(name);
        let (size, content) = self.new_content(index, rng);
        Ok(Drift::Added { new: self.new_file(path, size, content)? })
    }

    fn delete(&mut self, index: usize) -> Result<Drift, FarmError> {
        self.tree.unlink(&self.image.files[index].names[0].0)?;
        Ok(Drift::Deleted { file: index as u32 })
    }

    /// The size follows from the key, so that files of equal key are equal.
    fn new_content(&self, index: usize, rng: &mut Rng) -> (u64, Content) {
        let key = self.key(index, rng);
        let mut of_key = Rng::new(key, 0);
        let class = if of_key.chance(50) { Class::Text } else { Class::Random };
        let size =
            if of_key.chance(30) { of_key.within(0, PAGE) } else { of_key.log_within(PAGE, NEW_BYTES_MAX) };
        (size, Content { class, key })
    }

    fn new_file(&mut self, path: PathBuf, size: u64, content: Content) -> Result<NewFile, FarmError> {
        let file = self.tree.create(&path)?;
        let hash = write_plan(file.as_fd(), &Plan::solid(size), &mut self.buffer, &mut |at, buffer| {
            content.fill(at, buffer);
            Ok(())
        })
        .map_err(|e| self.io("write", &path, e))?;
        let meta = Meta { mode: 0o644, owner: None, mtime: (1_704_153_600, 0), xattrs: vec![] };
        self.tree.apply(file.as_fd(), &path, &meta)?;
        Ok(NewFile { path: RawPath(path), size, content, hash })
    }
}

/// Where an image file is written to, and its size after: one to three ranges inside it, or bytes after its end.
fn plan_writes(file: &ImageFile, rng: &mut Rng) -> (u64, Vec<ByteRange>) {
    if file.size == 0 || rng.chance(20) {
        let length = rng.within(1, 2 * PAGE);
        return (file.size + length, vec![whole_hole_pages(file, (file.size, length))]);
    }
    let mut writes: Vec<ByteRange> = Vec::new();
    for _ in 0..rng.within(1, 3) {
        let mut start = rng.below(file.size);
        if rng.chance(50) {
            start = start / PAGE * PAGE;
        }
        let length = rng.log_within(1, 3 * PAGE).min(file.size - start);
        writes.push(whole_hole_pages(file, (start, length)));
    }
    writes.sort_unstable();
    let mut merged: Vec<ByteRange> = Vec::new();
    for (start, length) in writes {
        match merged.last_mut() {
            Some((known, known_length)) if *known + *known_length >= start => {
                *known_length = (*known_length).max(start + length - *known);
            }
            _ => merged.push((start, length)),
        }
    }
    (file.size, merged)
}

/// Widens a write that touches a hole to whole pages, up to EOF: a page that is half zeros compresses, or not, as the
/// file system's heuristics have it, and the manifest could not say which.
fn whole_hole_pages(file: &ImageFile, (start, length): ByteRange) -> ByteRange {
    let (first, last) = (start / PAGE, (start + length - 1) / PAGE);
    let is_data =
        |page: u64| file.data.iter().any(|(s, l)| s / PAGE <= page && page < (s + l).div_ceil(PAGE));
    // Past the old last page there is nothing but what is written now.
    let mut old = first..=last.min(file.size.div_ceil(PAGE).saturating_sub(1)).max(first);
    let beyond = first >= file.size.div_ceil(PAGE);
    if beyond || old.all(is_data) {
        return (start, length);
    }
    let end = ((last + 1) * PAGE).min(file.size.max(start + length));
    (first * PAGE, end - first * PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_exactly_the_share_asked_for_and_none_twice() {
        for (files, percent, wanted) in
            [(100, 5.0, 5), (10, 100.0, 10), (1000, 0.0, 0), (3, 50.0, 2), (0, 50.0, 0)]
        {
            let chosen = choose(files, percent, &mut Rng::new(1, 1));
            assert_eq!(chosen.len(), wanted);
            assert!(chosen.is_sorted_by(|a, b| a < b) && chosen.iter().all(|c| *c < files));
        }
    }

    #[test]
    fn writes_lie_apart_and_within_the_new_size() {
        let mut rng = Rng::new(3, 3);
        for size in [0, 1, 100, 4096, 4097, 1 << 20] {
            for _ in 0..500 {
                let file = ImageFile {
                    names: vec![],
                    size,
                    content: Content::FOREIGN,
                    data: vec![],
                    preallocated: vec![],
                    hash: String::new(),
                    cloned: false,
                };
                let (after, writes) = plan_writes(&file, &mut rng);
                assert!(after >= size && !writes.is_empty());
                assert!(writes.iter().all(|(s, l)| *l > 0 && s + l <= after));
                assert!(writes.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0));
            }
        }
    }
}
