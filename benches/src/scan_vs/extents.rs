//! Extents only, warm: rate against the bare calls, memory, linearity.

use std::path::PathBuf;

use pagefold_testfs::farm::{self, FarmFs, FarmSpec, ImageSpec, Manifest, SyntheticSpec};
use pagefold_testfs::rig::LoopRig;

use super::report::{Extents, Linear, Report};
use super::{Bench, Fs, Part, say};
use crate::bare;
use crate::stats::Series;

/// Large enough for the farm with its metadata; sparse.
const RIG_BYTES: u64 = 48 << 30;
/// The largest ordinary file of the image: the rate is by files, the drift is written.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// A small scan is repeated until about this many roots have been scanned, at most so often.
const ROOTS_PER_POINT: u32 = 64;
const REPEATS_MAX: u32 = 15;

pub(super) fn measure(bench: &Bench<'_>, fs: Fs, report: &mut Report) -> anyhow::Result<()> {
    let farm = Farm::make(bench, fs)?;
    let threads = bench.args.threads;
    say(format!("{}: warming up", fs.name()));
    let warm = bench.pagefold.scan(bench.runner, &farm.roots, threads, false)?;
    if bench.args.wants(Part::Extents) {
        let mut listings = Vec::new();
        for root in &farm.roots {
            bench.runner.check()?;
            listings.extend(bare::list(root)?);
        }
        let mut row = Extents {
            fs: fs.name(),
            roots: bench.args.roots,
            files: warm.files,
            scans: vec![],
            bare_names: bare::count(&listings),
            bare_s: Series::default(),
            bare_cpu_s: Series::default(),
        };
        for run in 0..bench.args.runs {
            say(format!("{}: extents, run {} of {}", fs.name(), run + 1, bench.args.runs));
            row.scans.push(bench.pagefold.scan(bench.runner, &farm.roots, threads, false)?.cost);
            let bare = bare::open_map_close(&listings, threads, bench.runner.cancel())?;
            row.bare_s.push(bare.wall_s);
            row.bare_cpu_s.push(bare.cpu_s);
        }
        report.extents.push(row);
    }
    if bench.args.wants(Part::Linear) {
        report.linear.extend(linear(bench, fs, &farm.roots)?);
    }
    Ok(())
}

/// 1, 2, 4, ... and all roots, all in turn, so that what disturbs the machine disturbs all of them.
fn linear(bench: &Bench<'_>, fs: Fs, roots: &[PathBuf]) -> anyhow::Result<Vec<Linear>> {
    let all = roots.len() as u32;
    let mut rows: Vec<Linear> = (0..)
        .map(|power| 1u32 << power)
        .take_while(|n| *n < all)
        .chain([all])
        .map(|roots| Linear {
            fs: fs.name(),
            roots,
            files: 0,
            wall_s: Series::default(),
            elapsed_s: Series::default(),
            cpu_s: Series::default(),
        })
        .collect();
    say(format!("{}: linearity", fs.name()));
    for round in 0..REPEATS_MAX.max(bench.args.runs) {
        for row in &mut rows {
            let wanted =
                (ROOTS_PER_POINT / row.roots).clamp(bench.args.runs, REPEATS_MAX.max(bench.args.runs));
            if round < wanted {
                let roots = &roots[..row.roots as usize];
                let scanned = bench.pagefold.scan(bench.runner, roots, bench.args.threads, false)?;
                row.files = scanned.files;
                row.wall_s.push(scanned.cost.wall_s);
                row.elapsed_s.push(scanned.elapsed_s);
                row.cpu_s.push(scanned.cost.user_s + scanned.cost.system_s);
            }
        }
    }
    Ok(rows)
}

/// A farm that is destroyed with this value; on a rig of its own unless the user gave a directory.
pub(super) struct Farm {
    pub(super) roots: Vec<PathBuf>,
    dir: PathBuf,
    /// Goes last.
    pub(super) rig: Option<LoopRig>,
}

impl Farm {
    fn make(bench: &Bench<'_>, fs: Fs) -> anyhow::Result<Farm> {
        let args = bench.args;
        let image = SyntheticSpec { files: args.files, max_bytes: FILE_BYTES_MAX };
        Farm::of(bench, fs, image, args.roots, args.drift)
    }

    /// `roots` roots of a synthetic image.
    pub(super) fn of(
        bench: &Bench<'_>,
        fs: Fs,
        image: SyntheticSpec,
        roots: u32,
        drift_percent: f64,
    ) -> anyhow::Result<Farm> {
        let (rig, parent) = match &bench.args.dir {
            Some(dir) => (None, dir.clone()),
            None => {
                let rig = LoopRig::with_size(fs.rig(), RIG_BYTES)?;
                let path = rig.path().to_owned();
                (Some(rig), path)
            }
        };
        let dir = parent.join(format!("scan-vs-farm-{}", std::process::id()));
        say(format!("{}: making {roots} roots of {} files", fs.name(), image.files));
        let spec = FarmSpec {
            image: ImageSpec::Synthetic(image),
            roots,
            drift_percent,
            fs: if fs == Fs::Btrfs { FarmFs::Btrfs } else { FarmFs::Xfs },
            threads: bench.args.threads,
            ..FarmSpec::new(&dir)
        };
        let manifest: Manifest = farm::create(&spec, &|_| {}, bench.runner.cancel())?;
        let roots = (0..manifest.roots.len()).map(|i| manifest.root_path(&dir, i)).collect();
        Ok(Farm { roots, dir, rig })
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        // A rig goes as a whole, which is faster.
        if self.rig.is_none() {
            let _ = farm::destroy(&self.dir);
        }
    }
}
