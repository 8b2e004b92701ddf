//! Times of seal and mount as a user sees them (the whole command, its start included), and what the store takes on disk.

use std::os::fd::AsFd;
use std::path::Path;

use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_testfs::farm::{ImageSpec, SyntheticSpec};

use super::place::{Place, Tool, drop_caches, sync};
use super::report::Report;
use super::{Args, Fs, say};
use crate::stats::Series;

pub fn measure(args: &Args, tool: &Tool, fs: Fs, report: &mut Report) -> anyhow::Result<()> {
    let kind = fs.rig().kind();
    let spec = SyntheticSpec { files: args.files, ..SyntheticSpec::default() };
    say(format_args!("{kind}: making {} roots of {} files", args.roots + 1, args.files));
    let place = Place::new(fs, &ImageSpec::Synthetic(spec), args.roots + 1, 0.0)?;
    let roots = place.roots();
    let (mut first, mut next, mut all, mut mount, mut disk) =
        (Series::default(), Series::default(), Series::default(), Series::default(), Series::default());
    let mut cold = Series::default();
    for _ in 0..args.runs.max(1) {
        warm(&roots[..1])?;
        drop_caches("1")?;
        cold.push(place.seal(tool, &roots[..1])?);
        place.unseal(tool)?;
        warm(&roots)?;
        sync(place.path())?;
        let before = used_bytes(place.path())?;
        first.push(place.seal(tool, &roots[..1])?);
        next.push(place.seal(tool, &roots[1..2])?);
        place.unseal(tool)?;
        place.seal(tool, &roots[..1])?;
        all.push(place.seal(tool, &roots[1..])?);
        sync(place.path())?;
        disk.push((used_bytes(place.path())? - before) / f64::from(1 << 20));
        mount.push(place.mount_all(tool)?);
        place.unmount_all(tool)?;
        place.unseal(tool)?;
    }
    let files = args.files;
    let mut at_most = |what: &str, series: Series, unit, target| {
        report.at_most(kind, what, (series.median(), unit), target, series.values().to_vec());
    };
    at_most(&format!("first seal of {files} files"), first, "s", 0.5);
    at_most(&format!("a further clone of {files} files"), next, "s", 0.15);
    at_most(&format!("{} clones in one command", args.roots), all, "s", 6.0);
    at_most(&format!("disk for {} clones", args.roots + 1), disk, "MiB", 50.0);
    at_most(&format!("mount of {} views", args.roots + 1), mount, "s", 0.2);
    let what = format!("first seal of {files} files after the page cache was dropped");
    report.note(kind, &what, (cold.median(), "s"), cold.values().to_vec());
    Ok(())
}

/// Inodes, directories and extents in memory, as on a host that just deployed them; no data. File by file: btrfs keeps its trees in the page
/// cache, and dropping all of that makes it read them from disk, where XFS has them in memory still.
fn warm(roots: &[std::path::PathBuf]) -> anyhow::Result<()> {
    for root in roots {
        for path in super::place::files_below(root)? {
            let file = std::fs::File::open(&path)?;
            read_extents(file.as_fd(), u64::MAX, Sync::No, |_| ())?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

fn used_bytes(path: &Path) -> anyhow::Result<f64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_blocks - stat.f_bfree) as f64 * stat.f_frsize as f64)
}
