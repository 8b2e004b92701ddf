//! Who wrote which page: from a manifest to pages, and from pages to what extents can decide about them.
//!
//! The second step is the only place that knows a file system: XFS keeps every page of a written file as a block of
//! its own; btrfs keeps files of up to 2 KiB (compressed: up to a page) in metadata, and stores what compresses in
//! compressed extents, cut every 128 KiB from where a write-out began; a piece of one page or less stays plain.

use std::ops::Range;
use std::path::Path;

use crate::farm::content::{Class, Content, PAGE};
use crate::farm::manifest::{ByteRange, Drift, FarmFs, ImageFile, Manifest, NewFile, RootManifest};

use super::{TrueFile, TruePage, TrueRoot, TrueRun, Truth, TruthError};

/// Largest file in bytes that btrfs keeps in metadata without compressing it (its default `max_inline`).
const BTRFS_INLINE_BYTES: u64 = 2048;
/// Pages that btrfs compresses as one piece.
const BTRFS_PIECE_PAGES: u64 = 32;

/// Where a page's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Zero,
    /// Page number `page` of what `object` wrote.
    Written {
        object: u64,
    },
    /// The same, where the file system stored it so that extents don't decide.
    Opaque {
        object: u64,
    },
}

/// A file as runs of pages of one origin; pages of an object are numbered by their place in the file.
#[derive(Clone, Debug)]
struct Pages(Vec<(Range<u64>, Origin)>);

impl Pages {
    fn holes(size: u64) -> Pages {
        Pages(vec![(0..size.div_ceil(PAGE), Origin::Zero)])
    }

    /// Puts `origin` over `range`, growing the file where needed.
    fn put(&mut self, range: Range<u64>, origin: Origin) {
        let mut after = Vec::with_capacity(self.0.len() + 2);
        for (known, what) in self.0.drain(..) {
            if known.start < range.start {
                after.push((known.start..known.end.min(range.start), what));
            }
            if known.end > range.end {
                after.push((known.start.max(range.end)..known.end, what));
            }
        }
        after.push((range, origin));
        after.retain(|(r, _)| !r.is_empty());
        after.sort_by_key(|(r, _)| r.start);
        self.0 = after;
    }
}

/// The file system's part.
#[derive(Clone, Copy)]
struct Rules {
    fs: FarmFs,
    compressed: bool,
}

/// One write-out: byte ranges of `content` into a file that has `size` bytes afterwards.
struct Write<'a> {
    ranges: &'a [ByteRange],
    content: Content,
    size: u64,
    object: u64,
}

impl Rules {
    /// Applies a write and how the file system stores it.
    fn write(self, pages: &mut Pages, write: &Write<'_>) {
        let dirty = dirty_pages(write.ranges);
        let grown = write.size.div_ceil(PAGE);
        let known = pages.0.last().map_or(0, |(r, _)| r.end);
        if grown > known {
            pages.0.push((known..grown, Origin::Zero));
        }
        for range in dirty {
            for (part, opaque) in self.stored(range, write.content.class, write.size) {
                let object = write.object;
                pages.put(part, if opaque { Origin::Opaque { object } } else { Origin::Written { object } });
            }
        }
    }

    /// How one contiguous dirty range is stored: pieces, and whether extents leave them undecided.
    fn stored(self, range: Range<u64>, class: Class, size: u64) -> Vec<(Range<u64>, bool)> {
        if self.fs == FarmFs::Xfs {
            return vec![(range, false)];
        }
        let compresses = self.compressed && class.compresses() == Some(true);
        let inline = size <= BTRFS_INLINE_BYTES || compresses && size <= PAGE;
        if range.start == 0 && inline {
            return vec![(range, true)];
        }
        if !compresses {
            return vec![(range, false)];
        }
        let mut pieces = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let end = (start + BTRFS_PIECE_PAGES).min(range.end);
            let bytes = (end * PAGE).min(size) - start * PAGE;
            pieces.push((start..end, bytes > PAGE));
            start = end;
        }
        pieces
    }
}

/// The pages that ranges of bytes touch, merged where they meet.
fn dirty_pages(ranges: &[ByteRange]) -> Vec<Range<u64>> {
    let mut dirty: Vec<Range<u64>> = Vec::new();
    for &(start, length) in ranges {
        let pages = start / PAGE..(start + length).div_ceil(PAGE);
        match dirty.last_mut() {
            Some(last) if last.end >= pages.start => last.end = last.end.max(pages.end),
            _ => dirty.push(pages),
        }
    }
    dirty
}

/// Extents-only truth.
pub(super) fn decided(dir: &Path, manifest: &Manifest) -> Result<Truth, TruthError> {
    if !manifest.synced {
        return Err(TruthError::NotDerivable { why: "the farm was left dirty" });
    }
    if manifest.image.files.iter().any(|f| f.cloned) {
        return Err(TruthError::NotDerivable { why: "the image was cloned from files outside the farm" });
    }
    let foreign = manifest.image.files.iter().any(|f| f.content.class == Class::Foreign);
    if foreign && manifest.compressed {
        return Err(TruthError::NotDerivable { why: "how well foreign bytes compress is not known" });
    }
    Ok(build(dir, manifest, Rules { fs: manifest.fs, compressed: manifest.compressed }))
}

/// Which pages are holes and which were written; every written page decided, as if no file system had a say.
pub(super) fn origins(dir: &Path, manifest: &Manifest) -> Truth {
    build(dir, manifest, Rules { fs: FarmFs::Xfs, compressed: false })
}

fn build(dir: &Path, manifest: &Manifest, rules: Rules) -> Truth {
    let mut next_object = 0;
    let mut object = || {
        next_object += 1;
        next_object
    };
    let image: Vec<Pages> =
        manifest.image.files.iter().map(|file| image_pages(file, rules, object())).collect();
    let mut roots = Vec::new();
    for (index, root) in manifest.roots.iter().enumerate() {
        let files = root_files(root, &manifest.image.files, &image, rules, &mut object);
        roots.push(TrueRoot { path: manifest.root_path(dir, index), domain: 0, files });
    }
    Truth { roots }
}

fn image_pages(file: &ImageFile, rules: Rules, object: u64) -> Pages {
    let mut pages = Pages::holes(file.size);
    let write = Write { ranges: &file.data, content: file.content, size: file.size, object };
    rules.write(&mut pages, &write);
    pages
}

fn root_files(
    root: &RootManifest,
    image: &[ImageFile],
    pages: &[Pages],
    rules: Rules,
    object: &mut impl FnMut() -> u64,
) -> Vec<TrueFile> {
    let mut files: Vec<TrueFile> = image
        .iter()
        .zip(pages)
        .map(|(file, pages)| true_file(file.names.iter().map(|n| n.0.clone()).collect(), file.size, pages))
        .collect();
    let mut added = Vec::new();
    let mut new_file = |new: &NewFile, object: u64| {
        let mut pages = Pages::holes(new.size);
        let ranges: &[ByteRange] = if new.size > 0 { &[(0, new.size)] } else { &[] };
        rules.write(&mut pages, &Write { ranges, content: new.content, size: new.size, object });
        added.push(true_file(vec![new.path.0.clone()], new.size, &pages));
    };
    for drift in &root.drift {
        let object = object();
        match drift {
            Drift::InPlace { file, size, writes, content, .. } => {
                let mut changed = pages[*file as usize].clone();
                let write = Write { ranges: writes, content: *content, size: *size, object };
                rules.write(&mut changed, &write);
                let names = std::mem::take(&mut files[*file as usize].names);
                files[*file as usize] = true_file(names, *size, &changed);
            }
            Drift::Replaced { file, new } => {
                files[*file as usize].names.remove(0);
                new_file(new, object);
            }
            Drift::Added { new } => new_file(new, object),
            Drift::Deleted { file } => {
                files[*file as usize].names.remove(0);
            }
        }
    }
    files.append(&mut added);
    files.retain(|f| !f.names.is_empty());
    files
}

fn true_file(names: Vec<std::path::PathBuf>, size: u64, pages: &Pages) -> TrueFile {
    let partial = (size % PAGE) as u32;
    let total = size.div_ceil(PAGE);
    let mut runs = Vec::new();
    for (range, origin) in &pages.0 {
        let range = range.start..range.end.min(total);
        let length = range.end.saturating_sub(range.start);
        let object = match origin {
            Origin::Zero => {
                runs.push(TrueRun { pages: length, first: TruePage::Zero });
                continue;
            }
            Origin::Opaque { .. } => {
                runs.push(TrueRun { pages: length, first: TruePage::Undecided });
                continue;
            }
            Origin::Written { object } => *object,
        };
        let tail = range.end == total && partial != 0;
        let same = |page, valid| TruePage::Same { object, page, valid };
        runs.push(TrueRun { pages: length - u64::from(tail), first: same(range.start, 0) });
        if tail {
            runs.push(TrueRun { pages: 1, first: same(total - 1, partial) });
        }
    }
    runs.retain(|r| r.pages > 0);
    TrueFile { names, size, runs, resident: vec![] }
}
