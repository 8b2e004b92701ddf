//! A synthetic image: a seeded tree whose sizes are distributed as in a container image (most files are small, most
//! bytes are in few), with the hard cases in it: empty, inline-sized, sparse and preallocated files, duplicates,
//! hard links, symbolic links, a FIFO, names that are no UTF-8.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::FarmError;
use super::content::{Class, Content, PAGE, Rng};
use super::image::{ImageBuilder, Plan};
use super::tree::Meta;

/// Modification time of everything in it (2024-01-01 UTC): a farm made twice from one seed is the same.
const MTIME: (i64, u32) = (1_704_067_200, 123_456_789);

/// What a synthetic image is made of; written `synthetic:files=N,max=BYTES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SyntheticSpec {
    /// Regular files (inodes).
    pub files: u32,
    /// The largest ordinary file in bytes; sparse files are larger.
    pub max_bytes: u64,
}

impl Default for SyntheticSpec {
    fn default() -> Self {
        SyntheticSpec { files: 1000, max_bytes: 8 << 20 }
    }
}

impl SyntheticSpec {
    pub(super) fn parse(text: &str) -> Result<SyntheticSpec, FarmError> {
        let mut spec = SyntheticSpec::default();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let bad = |why: &str| FarmError::spec("--image synthetic", format!("{part}: {why}"));
            let (key, value) = part.split_once('=').ok_or_else(|| bad("expected key=value"))?;
            match key {
                "files" => spec.files = value.parse().map_err(|_| bad("not a number of files"))?,
                "max" => spec.max_bytes = super::parse_bytes(value).ok_or_else(|| bad("not a size"))?,
                _ => return Err(bad("unknown key; known are files and max")),
            }
        }
        Ok(spec)
    }
}

/// Files of each special kind: one in a hundred, but at least two, so that small farms have the hard cases too.
fn few(files: u32) -> u32 {
    (files / 100).max(2).min(files / 16)
}

pub(super) fn build(builder: &mut ImageBuilder<'_>, spec: SyntheticSpec, seed: u64) -> Result<(), FarmError> {
    let mut rng = Rng::new(seed, u64::MAX);
    let dirs = directories(builder, spec.files, &mut rng)?;
    let special = few(spec.files);
    let mut made: Vec<usize> = Vec::new();
    // Directory by directory, so that consecutive files share a parent as they do in a walk.
    let per_dir = spec.files.div_ceil(dirs.len() as u32).max(1);
    for number in 0..spec.files {
        let dir = &dirs[(number / per_dir) as usize % dirs.len()];
        // Spread the special kinds evenly over the tree.
        let lot = (u64::from(number) * 7919 % u64::from(spec.files.max(1))) as u32;
        let path = dir.join(name(number, lot, special));
        let (plan, content) = file(lot, special, spec, &mut rng);
        let meta = meta(&mut rng);
        let index = builder.file(&path, meta, plan, content, &mut |at, buffer| {
            content.fill(at, buffer);
            Ok(())
        })?;
        made.push(index);
    }
    links(builder, &dirs, &made, special, &mut rng)
}

fn meta(rng: &mut Rng) -> Meta {
    let mode = [0o644, 0o644, 0o644, 0o755, 0o600][rng.below(5) as usize];
    Meta { mode, owner: None, mtime: MTIME, xattrs: vec![] }
}

fn directories(builder: &mut ImageBuilder<'_>, files: u32, rng: &mut Rng) -> Result<Vec<PathBuf>, FarmError> {
    let mut dirs = vec![PathBuf::new()];
    for number in 0..(files / 16).max(2) {
        // Mostly below one of the first few: wide, with some deep branches.
        let parent = &dirs[rng.below(dirs.len() as u64) as usize];
        let depth = parent.components().count();
        let parent = if depth > 8 { PathBuf::new() } else { parent.clone() };
        let path = parent.join(format!("d{number:04}"));
        builder.dir(&path, Meta { mode: 0o755, owner: None, mtime: MTIME, xattrs: vec![] })?;
        dirs.push(path);
    }
    dirs.sort();
    Ok(dirs)
}

fn name(number: u32, lot: u32, special: u32) -> PathBuf {
    if (8 * special..9 * special).contains(&lot) {
        let mut bytes = b"latin-\xe9\xff-".to_vec();
        bytes.extend(number.to_string().bytes());
        return PathBuf::from(OsString::from_vec(bytes));
    }
    PathBuf::from(format!("f{number:06}.{}", ["so", "py", "txt", "bin"][number as usize % 4]))
}

/// Layout and content of the file that drew `lot`.
fn file(lot: u32, special: u32, spec: SyntheticSpec, rng: &mut Rng) -> (Plan, Content) {
    let key = rng.next();
    let content = |class| Content { class, key };
    let size = ordinary_size(spec, rng);
    let class = if rng.chance(45) { Class::Text } else { Class::Random };
    match lot.checked_div(special) {
        Some(0) => (sparse(spec, rng), content(class)),
        // On btrfs a write into a preallocated range may or may not be compressed; what can't be compressed is plain
        // either way.
        Some(1) => (preallocated(rng), content(Class::Random)),
        Some(2) => (Plan::solid(size.max(3 * PAGE)), content(Class::Zeros)),
        Some(3) => (Plan::solid(size.max(7 * PAGE + 5)), content(Class::Repeat)),
        // Copies that share no extent: pairs and triples of one content, some of other length.
        Some(4 | 5) => {
            let copied = Content { class, key: u64::from(lot % 3) };
            (Plan::solid(5 * PAGE + if lot.is_multiple_of(2) { 0 } else { 700 }), copied)
        }
        Some(6) => (Plan::solid(0), content(class)),
        Some(7) => (Plan { size: rng.within(1, 20 * PAGE), ..Plan::default() }, content(class)),
        _ => (Plan::solid(size), content(class)),
    }
}

fn ordinary_size(spec: SyntheticSpec, rng: &mut Rng) -> u64 {
    let size = match rng.below(1000) {
        0..20 => 0,
        20..270 => rng.within(1, 2048),
        270..380 => rng.within(2049, PAGE),
        380..420 => PAGE * rng.within(1, 8),
        420..915 => rng.log_within(PAGE, 64 << 10),
        915..995 => rng.log_within(64 << 10, 512 << 10),
        _ => rng.log_within(1 << 20, 8 << 20),
    };
    size.min(spec.max_bytes)
}

/// Pages of data at random places of a much larger file; begins or ends with a hole in half of the cases.
fn sparse(spec: SyntheticSpec, rng: &mut Rng) -> Plan {
    let size = rng.log_within(100 * PAGE, (8 * spec.max_bytes).max(200 * PAGE));
    let pages = size.div_ceil(PAGE);
    let mut data = Vec::new();
    let mut page = rng.below(3) * rng.below(20);
    while page < pages {
        let length = rng.within(1, 40).min(pages - page);
        let end = ((page + length) * PAGE).min(size);
        data.push((page * PAGE, end - page * PAGE));
        page += length + rng.within(1, (pages / 4).max(1));
    }
    Plan { size, data, preallocated: vec![] }
}

/// Allocated in full, written in part.
fn preallocated(rng: &mut Rng) -> Plan {
    let pages = rng.within(4, 60);
    let size = pages * PAGE - rng.below(2) * rng.within(1, PAGE - 1);
    let first = rng.below(pages - 2);
    let length = rng.within(1, pages - 2 - first);
    let data = if rng.chance(30) { vec![] } else { vec![(first * PAGE, length * PAGE)] };
    Plan { size, data, preallocated: vec![(0, size)] }
}

fn links(
    builder: &mut ImageBuilder<'_>,
    dirs: &[PathBuf],
    files: &[usize],
    special: u32,
    rng: &mut Rng,
) -> Result<(), FarmError> {
    if files.is_empty() {
        return Ok(());
    }
    let any_dir = |rng: &mut Rng| dirs[rng.below(dirs.len() as u64) as usize].clone();
    for number in 0..special.max(1) {
        let file = files[rng.below(files.len() as u64) as usize];
        let path = any_dir(rng).join(format!("hard-{number}"));
        builder.link(&path, file)?;
    }
    for number in 0..2 * special.max(1) {
        let target = PathBuf::from(format!("../somewhere/{number}"));
        let path = any_dir(rng).join(format!("soft-{number}"));
        builder.symlink(&path, &target, Meta { mode: 0o777, owner: None, mtime: MTIME, xattrs: vec![] })?;
    }
    builder.symlink(Path::new("loop"), Path::new("loop"), Meta { mtime: MTIME, ..Meta::default() })?;
    let fifo = Meta { mode: 0o600, owner: None, mtime: MTIME, xattrs: vec![] };
    builder.node(Path::new("pipe"), FileType::Fifo, 0, fifo)
}
