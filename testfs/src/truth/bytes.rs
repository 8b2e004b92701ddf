//! Equality by reading: every page that is not a hole is compared, byte for byte, with all pages read before it.
//!
//! Also checks that a farm is what its manifest says: the files that are there, their sizes and link counts.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::farm::content::PAGE;

use super::{TrueFile, TruePage, TrueRun, Truth, TruthError};

/// Replaces the origins in `truth` by what the bytes say.
pub(super) fn compared(mut truth: Truth) -> Result<Truth, TruthError> {
    let mut known: HashMap<Box<[u8]>, u64> = HashMap::new();
    for root in &mut truth.roots {
        let facts = |f: &TrueFile| (f.size, f.names.len() as u64);
        let listing = root.files.iter().flat_map(|f| f.names.iter().map(move |n| (n.clone(), facts(f))));
        same_listing(&root.path, &listing.collect())?;
        for file in &mut root.files {
            let path = root.path.join(&file.names[0]);
            file.runs = read_runs(&path, &file.runs, &mut known)
                .map_err(|source| TruthError::Io { path: path.clone(), source })?;
        }
    }
    Ok(truth)
}

/// Opens for reading without changing the access time.
pub(super) fn open_quietly(path: &Path) -> std::io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::NONBLOCK).bits() as i32;
    File::options().read(true).custom_flags(flags).open(path)
}

fn read_runs(
    path: &Path,
    runs: &[TrueRun],
    known: &mut HashMap<Box<[u8]>, u64>,
) -> std::io::Result<Vec<TrueRun>> {
    let file = open_quietly(path)?;
    let mut page = 0;
    let mut found: Vec<TrueRun> = Vec::new();
    for run in runs {
        if run.first == TruePage::Zero {
            found.push(*run);
            page += run.pages;
            continue;
        }
        for _ in 0..run.pages {
            // The last page as the cache shows it: zeros after EOF.
            let mut bytes = vec![0u8; PAGE as usize];
            read_up_to(&file, &mut bytes, page * PAGE)?;
            let next = known.len() as u64;
            let object = *known.entry(bytes.into_boxed_slice()).or_insert(next);
            found.push(TrueRun { pages: 1, first: TruePage::Same { object, page: 0, valid: 0 } });
            page += 1;
        }
    }
    Ok(found)
}

fn read_up_to(file: &File, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => break,
            Ok(read) => {
                buffer = &mut buffer[read..];
                at += read as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Compares the regular files below `root` (size, links) with `wanted`.
fn same_listing(root: &Path, wanted: &BTreeMap<PathBuf, (u64, u64)>) -> Result<(), TruthError> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let here = root.join(&dir);
        let fail = |source| TruthError::Io { path: here.clone(), source };
        for entry in std::fs::read_dir(&here).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = dir.join(entry.file_name());
            let stat = entry.metadata().map_err(fail)?;
            if stat.is_dir() {
                dirs.push(path);
            } else if stat.is_file() {
                found.insert(path, (stat.size(), stat.nlink()));
            }
        }
    }
    if found == *wanted {
        return Ok(());
    }
    let differs = |a: &BTreeMap<PathBuf, _>, b: &BTreeMap<PathBuf, _>| {
        a.iter().find(|(path, facts)| b.get(*path) != Some(*facts)).map(|(path, _)| path.clone())
    };
    let path = differs(wanted, &found).or_else(|| differs(&found, wanted)).unwrap_or_default();
    let why = format!("manifest says {:?}, found {:?}", wanted.get(&path), found.get(&path));
    Err(TruthError::Mismatch { path: root.join(path), why })
}
