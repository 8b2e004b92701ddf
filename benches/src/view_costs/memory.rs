//! Page cache after everything in all views was read, beside one raw root; kernel memory of a walked view.
//!
//! Page cache is `Cached` of the whole machine less shared memory, so nothing else may run. The loop device does direct I/O: the
//! backing file is not cached.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;

use super::place::{Place, Tool, drop_caches, files_below};
use super::report::Report;
use super::{Args, Fs, say};
use crate::cached::meminfo_kib;

pub fn measure(args: &Args, tool: &Tool, fs: Fs, report: &mut Report) -> anyhow::Result<()> {
    let kind = fs.rig().kind();
    for drift in [0.0, 5.0] {
        say(format_args!("{kind}: making {} roots with {drift} % drift", args.roots));
        let place = Place::new(fs, &args.image, args.roots, drift)?;
        place.seal(tool, &place.roots())?;
        let counts = [16.min(args.roots), args.roots];
        for count in counts {
            let roots = &place.roots()[..count as usize];
            let raw = cache_after_reading(&roots[..1])?;
            // By the farm's own truth: what whole files have in common counts once.
            let ideal = if drift == 0.0 { raw } else { raw + changed_bytes(tool, roots)? };
            place.mount_all(tool)?;
            let views = place.views()?;
            let cached = cache_after_reading(&views[..count as usize])?;
            place.unmount_all(tool)?;
            let what = match drift {
                0.0 => format!("page cache of {count} equal views over one raw root"),
                _ => format!("page cache of {count} views, 5 % changed, over one root and the changes"),
            };
            let mib = |bytes: f64| bytes / f64::from(1 << 20);
            report.at_most(kind, &what, (cached / ideal, "x"), 1.02, vec![mib(cached), mib(ideal), mib(raw)]);
        }
        if drift == 0.0 {
            kernel_memory(kind, &place, tool, report)?;
        }
        place.unseal(tool)?;
    }
    Ok(())
}

/// Bytes of page cache that the roots beyond the first need if equal files were cached once.
fn changed_bytes(tool: &Tool, roots: &[PathBuf]) -> anyhow::Result<f64> {
    let unique = |roots: &[PathBuf]| -> anyhow::Result<f64> {
        let args = ["scan".as_ref(), "--format".as_ref(), "json".as_ref()];
        let args: Vec<&std::ffi::OsStr> =
            args.into_iter().chain(roots.iter().map(|r| r.as_os_str())).collect();
        let json: serde_json::Value = serde_json::from_slice(&tool.run(&args)?.1)?;
        let get = |name: &str| json["totals"][name].as_f64().context("a total");
        Ok(get("cache_bytes")? - get("mergeable_file_bytes")?)
    };
    Ok(unique(roots)? - unique(&roots[..1])?)
}

fn cached_bytes() -> anyhow::Result<f64> {
    let get = |name| meminfo_kib(name).with_context(|| format!("/proc/meminfo has no {name}"));
    Ok((get("Cached")? as f64 - get("Shmem")? as f64) * 1024.0)
}

fn cache_after_reading(roots: &[PathBuf]) -> anyhow::Result<f64> {
    drop_caches("3")?;
    let before = cached_bytes()?;
    let mut buffer = vec![0; 1 << 20];
    for root in roots {
        for file in files_below(root)? {
            let mut file = File::open(&file).with_context(|| file.display().to_string())?;
            while file.read(&mut buffer)? > 0 {}
        }
    }
    Ok(cached_bytes()? - before)
}

/// Slab of the whole machine, in MiB, when dropping caches makes it no smaller: the kernel frees what was dropped only after a while.
fn settled_slab() -> anyhow::Result<f64> {
    let slab = || anyhow::Ok(meminfo_kib("Slab").context("/proc/meminfo has no Slab")? as f64 / 1024.0);
    let mut least = f64::INFINITY;
    for _ in 0..20 {
        drop_caches("3")?;
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = slab()?;
        if now > least - 0.05 {
            return Ok(now);
        }
        least = now;
    }
    Ok(least)
}

/// What walking and opening everything adds to that: of one tree, and of sixteen at once. A view's own part comes on top of what all views
/// have in common (images' and anchors' inodes), so one view alone costs more than one root.
fn kernel_memory(kind: &'static str, place: &Place, tool: &Tool, report: &mut Report) -> anyhow::Result<()> {
    let walk = |roots: &[PathBuf]| -> anyhow::Result<f64> {
        let before = settled_slab()?;
        for root in roots {
            for file in files_below(root)? {
                drop(File::open(&file)?);
            }
        }
        let after = meminfo_kib("Slab").context("/proc/meminfo has no Slab")? as f64 / 1024.0;
        Ok(after - before)
    };
    let many = 16.min(place.roots().len());
    let native = (walk(&place.roots()[..1])?, walk(&place.roots()[..many])?);
    place.mount_all(tool)?;
    let views = place.views()?;
    let view = (walk(&views[..1])?, walk(&views[..many])?);
    place.unmount_all(tool)?;
    let what = format!("kernel memory of {many} walked views over {many} roots");
    report.at_most(kind, &what, (view.1 / native.1, "x"), 1.0, vec![view.1, native.1]);
    // In MiB, no ratio: of one small tree it may be as little as what the rest of the machine does meanwhile.
    report.note(kind, "kernel memory of one walked root", (native.0, "MiB"), vec![]);
    report.note(kind, "kernel memory of one walked view, with what all views share", (view.0, "MiB"), vec![]);
    Ok(())
}
