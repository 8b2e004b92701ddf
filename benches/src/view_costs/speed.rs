//! Reading, mapping and opening in a view beside the raw file and a plain overlay of the same files; the first write to a large
//! file. The arms take turns within one run. What mappings cost in detail: `mapped`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use pagefold_testfs::farm::{ImageSpec, SyntheticSpec};

use super::place::{Place, Tool, drop_caches, files_below, sync};
use super::report::Report;
use super::{Args, Fs, mapped, say};
use crate::bare::own_cpu_s;
use crate::stats::Series;

/// The large file of the root.
pub const LARGE: &str = "large.bin";
/// Its size.
pub const LARGE_BYTES: u64 = 1 << 30;

pub fn measure(args: &Args, tool: &Tool, fs: Fs, report: &mut Report) -> anyhow::Result<()> {
    let kind = fs.rig().kind();
    let spec = SyntheticSpec { files: args.files.min(4000), max_bytes: 64 << 10 };
    let place = Place::new(fs, &ImageSpec::Synthetic(spec), 1, 0.0)?;
    let root = place.roots().remove(0);
    write_large(&root.join(LARGE))?;
    sync(place.path())?;
    place.seal(tool, std::slice::from_ref(&root))?;
    place.mount_all(tool)?;
    let view = place.views()?.remove(0);
    let plain = Overlay::over(&root, place.path())?;
    let runs = args.runs.max(1);
    reading(kind, runs, [&root, &view], report)?;
    mapping(kind, runs, [&root, &view], report)?;
    mapped::measure(kind, runs, [&root, &view, &plain.at], report)?;
    opening(kind, runs, [&root, &view, &plain.at], report)?;
    copy_up(kind, &view, tool, &place, runs, report)?;
    drop(plain);
    place.unmount_all(tool)?;
    place.unseal(tool)
}

fn write_large(path: &Path) -> anyhow::Result<()> {
    say("writing a file of 1 GiB");
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..1u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for _ in 0..LARGE_BYTES / block.len() as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Sequential `read(2)` of the cached large file, in GB a second of processor time: it waits for nothing.
fn reading(kind: &'static str, runs: u32, arms: [&Path; 2], report: &mut Report) -> anyhow::Result<()> {
    let read = |root: &Path| -> anyhow::Result<f64> {
        let mut file = File::open(root.join(LARGE))?;
        let mut buffer = vec![0; 256 << 10];
        let started = own_cpu_s()?;
        let mut total = 0u64;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => total += n as u64,
            }
        }
        ensure!(total == LARGE_BYTES, "the file is short");
        Ok(total as f64 / (own_cpu_s()? - started) / 1e9)
    };
    ratio(kind, "read throughput, view over native", runs, arms, read, report)
}

/// Reading the cached large file through a mapping, in GB/s; by fio, which loads the bytes itself.
fn mapping(kind: &'static str, runs: u32, arms: [&Path; 2], report: &mut Report) -> anyhow::Result<()> {
    let read = |root: &Path| -> anyhow::Result<f64> {
        let output = Command::new("fio")
            .args([
                "--name=map",
                "--ioengine=mmap",
                "--rw=read",
                "--bs=256k",
                "--readonly",
                "--output-format=json",
            ])
            .args(["--invalidate=0", "--size=1g", "--loops=3"])
            .arg(format!("--filename={}", root.join(LARGE).display()))
            .output()
            .context("start fio (apt-get install fio)")?;
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).context("fio's report")?;
        let bytes = json["jobs"][0]["read"]["bw_bytes"].as_f64().context("fio's bandwidth")?;
        Ok(bytes / 1e9)
    };
    ratio(kind, "mmap throughput, view over native", runs, arms, read, report)
}

/// The rates of both arms, and view over native.
///
/// Raw file and anchor are two inodes, so each is cached in pages of its own, and how fast these are read depends on where in memory they
/// lie: whichever file is read in first after the caches were dropped gets the scattered pages that were just freed, the other one long runs
/// (on btrfs, whose folios are single pages, that alone makes it 1.2 to 1.6 times as fast). So both are read in anew, in either order and as
/// often in the one as in the other, and the ratio is the geometric mean of the ratios of both orders.
fn ratio(
    kind: &'static str,
    what: &str,
    runs: u32,
    arms: [&Path; 2],
    rate: impl Fn(&Path) -> anyhow::Result<f64>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (mut ratios, mut raw) = ([f64::NAN; 2], Vec::new());
    for first in 0..2 {
        let mut series = [Series::default(), Series::default()];
        for _ in 0..runs {
            // What was just written is cached in larger folios than what is read in, and reads faster: both are read in.
            drop_caches("1")?;
            rate(arms[first])?;
            rate(arms[1 - first])?;
            // Who is measured first changes too.
            for turn in 0..4 {
                let arm = (turn / 2 + turn) % 2;
                series[arm].push(rate(arms[arm])?);
            }
        }
        let [native, view] = series.map(|s| s.median());
        ratios[first] = view / native;
        raw.extend([native, view]);
    }
    say(format_args!(
        "{kind} {what}: {:.3} with the raw file read in first, {:.3} with the view's",
        ratios[0], ratios[1]
    ));
    report.at_least(kind, what, ((ratios[0] * ratios[1]).sqrt(), "x"), 0.97, raw);
    Ok(())
}

/// open+close of every file, everything warm, in microseconds a file.
fn opening(kind: &'static str, runs: u32, arms: [&Path; 3], report: &mut Report) -> anyhow::Result<()> {
    let lists: Vec<Vec<PathBuf>> = arms.iter().map(|a| files_below(a)).collect::<Result<_, _>>()?;
    ensure!(lists.iter().all(|l| l.len() == lists[0].len()), "the arms differ");
    let open_all = |list: &[PathBuf]| -> anyhow::Result<f64> {
        let started = Instant::now();
        for path in list {
            drop(File::open(path)?);
        }
        Ok(started.elapsed().as_secs_f64() * 1e6 / list.len() as f64)
    };
    let mut series = [Series::default(), Series::default(), Series::default()];
    for list in &lists {
        open_all(list)?;
    }
    for turn in 0..3 * runs as usize {
        for arm in 0..3 {
            let arm = (arm + turn) % 3;
            let time = open_all(&lists[arm])?;
            series[arm].push(time);
        }
    }
    let [native, view, plain] = series.map(|s| s.median());
    report.at_most(kind, "open+close, view over plain overlay", (view / plain, "x"), 1.2, vec![view, plain]);
    report.note(kind, "open+close, native", (native, "us"), vec![]);
    report.note(kind, "open+close, view", (view, "us"), vec![]);
    Ok(())
}

/// The first write to a file of 1 GiB.
fn copy_up(
    kind: &'static str,
    view: &Path,
    tool: &Tool,
    place: &Place,
    runs: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (mut times, mut disk) = (Series::default(), Series::default());
    for _ in 0..runs {
        sync(place.path())?;
        let before = rustix::fs::statvfs(place.path())?.f_bfree as f64;
        let started = Instant::now();
        let mut file = OpenOptions::new().append(true).open(view.join(LARGE))?;
        file.write_all(b"x")?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
        drop(file);
        sync(place.path())?;
        let block = rustix::fs::statvfs(place.path())?;
        disk.push((before - block.f_bfree as f64) * block.f_frsize as f64 / f64::from(1 << 20));
        tool.run(&["umount".as_ref(), view.as_os_str(), "--discard".as_ref()])?;
        place.mount_all(tool)?;
    }
    report.at_most(
        kind,
        "copy-up of 1 GiB on first write",
        (times.median(), "ms"),
        5.0,
        times.values().to_vec(),
    );
    report.note(kind, "disk taken by that copy-up", (disk.median(), "MiB"), disk.values().to_vec());
    Ok(())
}

/// A plain overlay with `root` as its only lower layer.
struct Overlay {
    at: PathBuf,
}

impl Overlay {
    fn over(root: &Path, scratch: &Path) -> anyhow::Result<Overlay> {
        let [upper, work, at] = ["plain/upper", "plain/work", "plain/view"].map(|n| scratch.join(n));
        for dir in [&upper, &work, &at] {
            std::fs::create_dir_all(dir)?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={},metacopy=on,redirect_dir=on,index=on,xino=on",
            root.display(),
            upper.display(),
            work.display()
        );
        let status =
            Command::new("mount").args(["-t", "overlay", "-o", &options, "plain"]).arg(&at).status()?;
        ensure!(status.success(), "can't mount a plain overlay");
        Ok(Overlay { at })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}
