//! Reading a cached file through a mapping: natively, in a view and in a plain overlay of the same files, each mapped where the kernel
//! puts it and at a multiple of 2 MiB.
//!
//! Why both: a file system may ask for addresses at which huge pages can be mapped (XFS and btrfs do), and overlayfs does not. A large folio
//! of the cache is then mapped in one fault instead of in a fault for every sixteen pages. Faults and huge mappings are counted, so that
//! this is seen and not guessed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use pagefold_sys::mapping::{FileMapping, Place};
use rustix::fs::MemfdFlags;

use super::place::drop_caches;
use super::report::Report;
use super::speed::{LARGE, LARGE_BYTES};
use crate::bare::own_cpu_s;
use crate::stats::Series;

/// Read at a time.
const PIECE: usize = 256 << 10;

/// Names of the arms, in their order.
const ARMS: [&str; 3] = ["native", "view", "plain overlay"];

/// What reading the file once through a fresh mapping took.
struct Pass {
    /// GB in a second of processor time.
    rate: f64,
    /// Page faults.
    faults: f64,
    /// MiB mapped by huge pages at the end.
    huge: f64,
}

pub fn measure(kind: &'static str, runs: u32, arms: [&Path; 3], report: &mut Report) -> anyhow::Result<()> {
    for (place, how) in [(Place::Default, "mapped by default"), (Place::Aligned, "mapped at 2 MiB")] {
        let mut orders = Vec::new();
        // Raw file and anchor are read in anew in either order: see `speed::ratio`.
        for order in [[0, 1, 2], [1, 0, 2]] {
            drop_caches("1")?;
            for arm in order {
                pass(arms[arm], place)?;
            }
            let mut passes: [Vec<Pass>; 3] = Default::default();
            // Who goes first changes from turn to turn.
            for turn in 0..3 * runs as usize {
                for arm in 0..3 {
                    let arm = (arm + turn) % 3;
                    passes[arm].push(pass(arms[arm], place)?);
                }
            }
            orders.push(passes);
        }
        let medians = |what: fn(&Pass) -> f64| -> [f64; 3] {
            let median = |passes: &[Pass]| passes.iter().map(what).collect::<Series>().median();
            [0, 1, 2].map(|arm| (median(&orders[0][arm]) * median(&orders[1][arm])).sqrt())
        };
        let rates = medians(|p| p.rate);
        let [native, view, plain] = rates;
        let what = format!("reading, {how}, view over native");
        match place {
            // The plain overlay's affair as well: no target.
            Place::Default => report.note(kind, &what, (view / native, "x"), rates.to_vec()),
            Place::Aligned => report.at_least(kind, &what, (view / native, "x"), 0.97, rates.to_vec()),
        }
        report.at_least(
            kind,
            &format!("reading, {how}, view over plain overlay"),
            (view / plain, "x"),
            0.97,
            rates.to_vec(),
        );
        for (arm, (faults, huge)) in medians(|p| p.faults).into_iter().zip(medians(|p| p.huge)).enumerate() {
            let what = format!("page faults for 1 GiB, {how}, {}", ARMS[arm]);
            report.note(kind, &what, (faults, "faults"), vec![]);
            let what = format!("mapped by huge pages, {how}, {}", ARMS[arm]);
            report.note(kind, &what, (huge, "MiB"), vec![]);
        }
    }
    Ok(())
}

fn pass(root: &Path, place: Place) -> anyhow::Result<Pass> {
    let file = File::open(root.join(LARGE))?;
    let sink = rustix::fs::memfd_create("sink", MemfdFlags::CLOEXEC)?;
    let _above = unaligned_below(sink.as_fd())?;
    let mapping = FileMapping::new(file.as_fd(), LARGE_BYTES as usize, place)?;
    ensure!(place == Place::Default || mapping.is_aligned(), "the mapping is not where it was asked for");
    // The sink's own pages are no part of it.
    mapping.write_to(sink.as_fd(), 0, PIECE)?;
    let faults = || anyhow::Ok(getrusage(UsageWho::RUSAGE_SELF)?.minor_page_faults());
    // Processor time: nothing here waits, and something else may run.
    let (before, started) = (faults()?, own_cpu_s()?);
    for from in (0..LARGE_BYTES as usize).step_by(PIECE) {
        let done = mapping.write_to(sink.as_fd(), from, PIECE)?;
        ensure!(done == PIECE, "the file is short");
    }
    let elapsed = own_cpu_s()? - started;
    let faults = (faults()? - before) as f64;
    Ok(Pass { rate: LARGE_BYTES as f64 / elapsed / 1e9, faults, huge: huge_mib()? })
}

/// Takes address space so that the next mapping of the size of the file lies where huge pages can't be mapped, unless its file system asks
/// for better: below the mappings that happen to be there it could be aligned by luck.
fn unaligned_below(sink: BorrowedFd<'_>) -> anyhow::Result<FileMapping> {
    let size = LARGE_BYTES as usize;
    for pages in 1..4 {
        let above = FileMapping::new(sink, size + pages * rustix::param::page_size(), Place::Default)?;
        if !FileMapping::new(sink, size, Place::Default)?.is_aligned() {
            return Ok(above);
        }
    }
    bail!("mappings of memory files are aligned here (shmem_enabled): nothing to compare with")
}

/// What this process has mapped of files by huge pages, in MiB.
fn huge_mib() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/smaps").context("/proc/self/smaps")?;
    let kib =
        |line: &str| line.strip_prefix("FilePmdMapped:")?.split_whitespace().next()?.parse::<f64>().ok();
    Ok(text.lines().filter_map(kib).sum::<f64>() / 1024.0)
}
