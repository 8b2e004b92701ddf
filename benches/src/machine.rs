//! Where figures come from: machine, kernel, command, commit (style principle 15).

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Provenance of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Provenance {
    /// Seconds since 1970.
    pub unix_time_s: u64,
    /// The command line.
    pub command: Vec<String>,
    /// `git rev-parse HEAD`, with `-dirty` where files differ; `None` outside a checkout.
    pub commit: Option<String>,
    /// Kernel release.
    pub kernel: String,
    /// `model name` of the first processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Load average (1 minute) at the start: above about 0.5 the machine was not quiet.
    pub load_1m: f64,
}

impl Provenance {
    /// Asks the machine.
    #[must_use]
    pub fn of_this_run() -> Provenance {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let memory_kib = crate::cached::meminfo_kib("MemTotal").unwrap_or(0);
        Provenance {
            unix_time_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
            commit: commit(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: read("/proc/cpuinfo")
                .lines()
                .find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()))
                .unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory_kib * 1024,
            load_1m: read("/proc/loadavg").split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN),
        }
    }
}

fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { head } else { head + "-dirty" })
}
