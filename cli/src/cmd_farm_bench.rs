//! `pagefold farm bench`: arguments, table and files of the A/B benchmark.
//!
//! What it deliberately does not hold: how anything is measured (see `pagefold_testfs::bench`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use pagefold_testfs::bench::{self, Arm, ArmReport, BenchError, BenchReport, BenchSpec, WalkReport, chart};
use pagefold_testfs::rig::{RigError, RigFs};

use crate::exit::{Ended, Exit};
use crate::format::Format;
use crate::human::{self, bytes, count};
use crate::interrupt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fs {
    Xfs,
    Btrfs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArmName {
    /// Reflinked roots as they are.
    Raw,
    /// One overlay each over one shared lower: the ideal.
    Overlay,
    /// Sealed views.
    View,
}

/// Arguments of `pagefold farm bench`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Starts containers of real programs (python3, node, nginx, redis in turn) from raw reflinked roots, \
        from sealed views of them, and from overlays of one shared lower; each container in namespaces and a memory group \
        of its own. Every arm starts from an empty page cache (the host's is dropped), runs, is measured, and starts \
        again warm.\n\n\
        Needs root, and mmdebstrap for the first run (unless --image). Interrupted or failed, nothing is left.\n\n\
        Exit status: 0 done; 1 interrupted; 2 wrong usage or an error; 3 this host can't."
)]
pub struct BenchArgs {
    /// Containers of each arm; 0: none, only --walk.
    #[arg(long, default_value_t = 20, value_name = "N")]
    containers: u32,
    /// What to compare, in this order.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [ArmName::Raw, ArmName::Overlay, ArmName::View])]
    arms: Vec<ArmName>,
    /// Work in a new directory below DIR, on XFS or btrfs [default: a file system of its own].
    #[arg(long, value_name = "DIR")]
    on: Option<PathBuf>,
    /// The file system of its own.
    #[arg(long, value_enum, default_value_t = Fs::Xfs, conflicts_with = "on")]
    fs: Fs,
    /// The root: a directory or a tar file that holds the programs [default: a Debian made by mmdebstrap].
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Where that Debian is kept between runs [default: pagefold in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Percent of each root's files that change before the run (with --containers 0).
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    drift: f64,
    /// Also read everything in N roots of each arm.
    #[arg(long, value_name = "N")]
    walk: Option<u32>,
    /// Draw the figures into FILE as SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Also write the figures into FILE as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl BenchArgs {
    fn resolve(&self) -> Result<BenchSpec, BenchError> {
        Ok(BenchSpec {
            containers: self.containers,
            arms: self
                .arms
                .iter()
                .map(|arm| match arm {
                    ArmName::Raw => Arm::Raw,
                    ArmName::Overlay => Arm::Overlay,
                    ArmName::View => Arm::View,
                })
                .collect(),
            on: self.on.clone(),
            fs: match self.fs {
                Fs::Xfs => RigFs::Xfs,
                Fs::Btrfs => RigFs::Btrfs,
            },
            image: self.image.as_deref().map(str::parse).transpose()?,
            cache: self.cache.clone().unwrap_or_else(bench::default_cache),
            drift_percent: self.drift,
            walk: self.walk,
        })
    }
}

/// Runs `pagefold farm bench`.
pub fn run(args: &BenchArgs) -> anyhow::Result<Exit> {
    let spec = args.resolve().map_err(|e| named(&e))?;
    let cancel = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        let _interrupt = interrupt::on_interrupt(scope, || cancel.store(true, Ordering::Relaxed));
        bench::run(&spec, &|what| eprintln!("pagefold: {what}"), &cancel)
    });
    match done {
        Ok(report) => {
            write(args, &report)?;
            Ok(Exit::Done)
        }
        Err(error) => {
            let exit = match &error {
                BenchError::Cancelled => Exit::Partial,
                BenchError::Rig(RigError::NotRoot { .. } | RigError::NoProgram { .. }) => Exit::Refused,
                _ => return Err(named(&error)),
            };
            Err(Ended { exit, why: vec![error.to_string()] }.into())
        }
    }
}

/// The error as one line. It tells its cause itself.
fn named(error: &BenchError) -> anyhow::Error {
    anyhow::anyhow!("farm bench: {error}")
}

fn write(args: &BenchArgs, report: &BenchReport) -> anyhow::Result<()> {
    use anyhow::Context;
    let mut json = serde_json::to_string_pretty(report)?;
    json.push('\n');
    if let Some(path) = &args.json {
        std::fs::write(path, &json).with_context(|| format!("can't write {}", path.display()))?;
    }
    if let Some(path) = &args.svg {
        let drawn = chart::svg(report).map_err(|e| named(&e))?;
        std::fs::write(path, drawn).with_context(|| format!("can't write {}", path.display()))?;
    }
    args.format.write(|| report, || render(report))
}

fn render(report: &BenchReport) -> String {
    let mut out = format!(
        "{} containers of {} files ({}) on {}, drift {} %, Linux {}, {} processors, {}\n",
        report.containers,
        count(report.root_files),
        bytes(report.root_bytes),
        report.file_system,
        report.drift_percent,
        report.kernel,
        report.cpus,
        human::seconds(report.elapsed_s),
    );
    if let Some(costs) = &report.views {
        out.push_str(&format!(
            "sealing {} roots took {:.0} ms, mounting their views {:.0} ms; the store takes {} of disk\n",
            costs.roots,
            costs.seal_ms,
            costs.mount_ms,
            bytes(costs.store_disk_bytes),
        ));
    }
    out.push_str(&format!("\n{}\n", arms_table(&report.arms)));
    if !report.walks.is_empty() {
        out.push_str(&format!(
            "\neverything read once, from an empty cache (ideal: each distinct file once, from how the roots were made):\n{}\n",
            walks_table(&report.walks)
        ));
    }
    out
}

fn table(headers: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(headers);
    table
}

fn align(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

type Row<'a> = (&'a str, fn(&ArmReport) -> String);

fn arms_table(arms: &[ArmReport]) -> String {
    let rows: [Row<'_>; 10] = [
        ("page cache charged", |a| bytes(a.memory.page_cache_bytes)),
        ("Pss_File", |a| bytes(a.memory.pss_file_bytes)),
        ("anonymous memory", |a| bytes(a.memory.anon_bytes)),
        ("kernel memory charged", |a| bytes(a.memory.kernel_bytes)),
        ("host's slab grew by", |a| signed_bytes(a.memory.slab_delta_bytes)),
        ("cold start, first", |a| format!("{:.0} ms", a.cold_start.first_ms)),
        ("cold start, mean", |a| format!("{:.0} ms", a.cold_start.mean_ms)),
        ("cold start, all", |a| format!("{:.0} ms", a.cold_start.total_ms)),
        ("warm start, mean", |a| format!("{:.0} ms", a.warm_start.mean_ms)),
        ("open + close", |a| format!("{:.2} us", a.open_close_us)),
    ];
    let headers = std::iter::once(String::new()).chain(arms.iter().map(|a| a.arm.name().to_owned()));
    let mut table = table(headers.collect());
    // Without containers only the last was measured.
    let first = if arms.iter().all(|a| a.cold_start.total_ms == 0.0) { rows.len() - 1 } else { 0 };
    for (name, of) in &rows[first..] {
        table.add_row(std::iter::once((*name).to_owned()).chain(arms.iter().map(of)));
    }
    align(&mut table);
    table.to_string()
}

fn walks_table(walks: &[WalkReport]) -> String {
    let headers = [
        "",
        "roots",
        "read",
        "cache of one",
        "cache of all",
        "ideal",
        "ratio",
        "kernel of one",
        "kernel of all",
    ];
    let mut table = table(headers.map(str::to_owned).to_vec());
    for w in walks {
        let ratio = w.cache_bytes as f64 / w.ideal_cache_bytes.max(1) as f64;
        table.add_row([
            w.arm.name().to_owned(),
            count(u64::from(w.roots)),
            bytes(w.read_bytes),
            bytes(w.one_root_cache_bytes),
            bytes(w.cache_bytes),
            bytes(w.ideal_cache_bytes),
            format!("{ratio:.3}"),
            bytes(w.one_root_kernel_bytes),
            bytes(w.kernel_bytes),
        ]);
    }
    align(&mut table);
    table.to_string()
}

fn signed_bytes(n: i64) -> String {
    format!("{}{}", if n < 0 { "-" } else { "" }, bytes(n.unsigned_abs()))
}
