//! The headline check: pages with one decided identity have the same bytes, after any sequence of operations.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pagefold_engine::identity::Identity;

use super::{Case, Need, Rig, look};
use crate::sim::Rng;

const PAGE: u64 = 4096;

pub(super) fn cases<R: Rig>() -> Vec<Case<R>> {
    vec![Case { name: "equal_identity_means_equal_bytes", needs: &[Need::Extents], run: headline }]
}

fn headline<R: Rig>(rig: &mut R) {
    for seed in 0..6 {
        let dir = format!("s{seed}");
        rig.mkdir(Path::new(&dir)).expect("mkdir");
        run(rig, Path::new(&dir), seed, 60).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

/// Two pages (file, page) that claim one identity and differ.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The identity both have.
    pub identity: Identity,
    /// One.
    pub first: (PathBuf, u64),
    /// The other.
    pub second: (PathBuf, u64),
    /// Operations until then.
    pub trace: Vec<String>,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:?} and {:?} claim {:?} and differ; operations:",
            self.first, self.second, self.identity
        )?;
        self.trace.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// `steps` random operations on a handful of files in `dir`, every few of them followed by the check.
///
/// # Errors
/// The first pair that is wrong.
pub fn run<R: Rig>(rig: &mut R, dir: &Path, seed: u64, steps: u32) -> Result<(), Box<Wrong>> {
    let mut rng = Rng::new(seed);
    let mut files: Vec<PathBuf> = Vec::new();
    let mut trace = Vec::new();
    for step in 0..steps {
        let line = operation(rig, dir, &mut rng, &mut files);
        trace.push(format!("{step}: {line}"));
        if step % 3 == 2 {
            check(rig, &files).map_err(|mut wrong| {
                wrong.trace = std::mem::take(&mut trace);
                wrong
            })?;
        }
    }
    Ok(())
}

/// Compares every page of every file with the first that had its identity.
///
/// # Errors
/// The first pair that is wrong.
pub fn check<R: Rig>(rig: &mut R, files: &[PathBuf]) -> Result<(), Box<Wrong>> {
    let mut first: BTreeMap<Identity, (Vec<u8>, (PathBuf, u64))> = BTreeMap::new();
    let looks: Vec<_> = files.iter().map(|f| look(rig.source(), &rig.root(), f).expect("look")).collect();
    for (file, seen) in files.iter().zip(&looks) {
        let mut bytes = rig.bytes(file).expect("read");
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        for (page, data) in bytes.chunks(PAGE as usize).enumerate() {
            let identity = seen.page(page as u64);
            if !identity.is_decided() {
                continue;
            }
            let here = (file.clone(), page as u64);
            if identity == Identity::Zero && data.iter().any(|b| *b != 0) {
                let first = (PathBuf::from("(zeros)"), 0);
                return Err(Box::new(Wrong { identity, first, second: here, trace: Vec::new() }));
            }
            let entry = first.entry(identity).or_insert_with(|| (data.to_vec(), here.clone()));
            if entry.0 != data {
                return Err(Box::new(Wrong {
                    identity,
                    first: entry.1.clone(),
                    second: here,
                    trace: Vec::new(),
                }));
            }
        }
    }
    Ok(())
}

fn operation<R: Rig>(rig: &mut R, dir: &Path, rng: &mut Rng, files: &mut Vec<PathBuf>) -> String {
    let fresh = dir.join(format!("f{}", rng.bits()));
    let Some(file) = rng.pick(files).cloned().filter(|_| !rng.percent(8)) else {
        match rng.percent(30) && rig.has(Need::Realtime) {
            true => rig.create_realtime(&fresh).expect("create"),
            false => rig.create(&fresh).expect("create"),
        }
        files.push(fresh.clone());
        let len = rng.below(12 * PAGE) as usize;
        let data = rng.bytes(len);
        rig.write(&fresh, 0, &data).expect("write");
        return format!("create {fresh:?} with {len} bytes");
    };
    let offset = rng.below(14) * PAGE + if rng.percent(40) { rng.below(PAGE) } else { 0 };
    let len = 1 + if rng.percent(50) { rng.below(300) } else { rng.below(4 * PAGE) };
    match rng.below(14) {
        0..=3 => {
            let data = rng.bytes(len as usize);
            rig.write(&file, offset, &data).expect("write");
            format!("write {file:?} {offset}+{len}")
        }
        4 => {
            rig.fsync(&file).expect("fsync");
            format!("fsync {file:?}")
        }
        5 | 6 if rig.has(Need::Reflink) => {
            // Reflinks between device classes fail, as they should.
            let created = rig.reflink(&file, &fresh);
            if created.is_ok() {
                files.push(fresh.clone());
            }
            format!("reflink {file:?} to {fresh:?}: {created:?}")
        }
        7 if rig.has(Need::Reflink) => {
            let other = rng.pick(files).cloned().expect("there is one");
            let (from, to, len) = (rng.below(10) * PAGE, rng.below(10) * PAGE, (1 + rng.below(4)) * PAGE);
            let result = rig.clone_range(&file, from, len, &other, to).map_err(|e| e.raw_os_error());
            format!("clone {file:?} {from}+{len} to {other:?} {to}: {result:?}")
        }
        8 => {
            rig.truncate(&file, offset).expect("truncate");
            format!("truncate {file:?} {offset}")
        }
        9 => {
            rig.punch(&file, offset, len).expect("punch");
            format!("punch {file:?} {offset}+{len}")
        }
        10 if rig.has(Need::Unwritten) => {
            rig.fallocate(&file, offset, len).expect("fallocate");
            format!("fallocate {file:?} {offset}+{len}")
        }
        11 if rig.has(Need::HoldWriteback) => {
            rig.hold_writeback(&file).expect("writeback");
            format!("begin writeback of {file:?}")
        }
        12 => {
            rig.evict(&file).expect("evict");
            format!("evict {file:?}")
        }
        _ => late_operation(rig, rng, files, &file),
    }
}

fn late_operation<R: Rig>(rig: &mut R, rng: &mut Rng, files: &mut Vec<PathBuf>, file: &Path) -> String {
    match rng.below(3) {
        0 if rig.has(Need::Relocate) => {
            rig.relocate().expect("relocate");
            "relocate".to_owned()
        }
        1 if files.len() > 3 => {
            rig.unlink(file).expect("unlink");
            files.retain(|f| f != file);
            format!("unlink {file:?}")
        }
        _ => {
            rig.sync_all().expect("sync");
            "sync".to_owned()
        }
    }
}
