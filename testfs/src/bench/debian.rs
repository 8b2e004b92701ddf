//! A root of real programs: a Debian made by mmdebstrap, kept as a tar between runs.
//!
//! Invariant: the tar appears under its name only when it is complete. What it deliberately does not do: keep it up to
//! date; delete the file to have it made afresh.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::BenchError;
use crate::rig::RigError;

/// What the containers run.
const PACKAGES: &str = "python3,nodejs,nginx-light,redis-server";

/// Where tars are kept unless the user says otherwise: `$XDG_CACHE_HOME/pagefold`, else `~/.cache/pagefold`.
#[must_use]
pub fn default_cache() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("pagefold")
}

/// The tar in `cache`; made if it isn't there, which takes minutes and the network.
pub(super) fn tar(cache: &Path, cancel: &AtomicBool) -> Result<PathBuf, BenchError> {
    let suite = suite();
    let path = cache.join(format!("farm-bench-debian-{suite}.tar"));
    if path.is_file() {
        return Ok(path);
    }
    std::fs::create_dir_all(cache).map_err(|e| BenchError::io("create", cache, e))?;
    let partial = Partial(cache.join(format!(".farm-bench-{}.partial", std::process::id())));
    make(&suite, &partial.0, cancel)?;
    std::fs::rename(&partial.0, &path).map_err(|e| BenchError::io("name", &path, e))?;
    Ok(path)
}

/// Gone when dropped, unless renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The host's own suite, because its sources are used.
fn suite() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()))
        .unwrap_or_else(|| "stable".to_owned())
}

fn make(suite: &str, out: &Path, cancel: &AtomicBool) -> Result<(), BenchError> {
    let mut said =
        tempfile::tempfile().map_err(|e| BenchError::io("create", Path::new("a temporary file"), e))?;
    let stderr = said.try_clone().map_err(|e| BenchError::io("open", out, e))?;
    let started = Command::new("mmdebstrap")
        .args(["--variant=minbase", "--format=tar"])
        .arg(format!("--include={PACKAGES}"))
        .arg(suite)
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn();
    let mut child = started.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            BenchError::Rig(RigError::NoProgram { program: "mmdebstrap", package: "mmdebstrap" })
        }
        _ => BenchError::io("start", Path::new("mmdebstrap"), e),
    })?;
    loop {
        let ended = child.try_wait().map_err(|e| BenchError::io("wait for", Path::new("mmdebstrap"), e))?;
        match ended {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                return Err(BenchError::Debian { status: status.to_string(), output: tail(&mut said) });
            }
            None if cancel.load(Ordering::Relaxed) => {
                // Asked, not killed: it takes its own mounts apart.
                if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
                let _ = child.wait();
                return Err(BenchError::Cancelled);
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// The last lines of a file, on one line.
pub(super) fn tail(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let from = file.metadata().map_or(0, |m| m.len().saturating_sub(600));
    let _ = file.seek(SeekFrom::Start(from)).and_then(|_| file.take(600).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" | ")
}
