//! A program's time and memory as the kernel accounts for them.
//!
//! A child inherits its parent's peak memory through `exec` (`ru_maxrss` is the larger of both), and this program holds lists of
//! all files. So each program is started by a small copy of ourselves, which starts nothing else, and whose
//! `RUSAGE_CHILDREN` is therefore exactly that program.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

/// First argument of the small copy: `scan_vs <VERB> OUT PROGRAM ARGS...`.
pub const VERB: &str = "--measure-child";

/// What one run of a program cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// From before its start to its end.
    pub wall_s: f64,
    /// Processor time in user mode.
    pub user_s: f64,
    /// Processor time in the kernel, by the program's own threads.
    pub system_s: f64,
    /// Peak resident memory in bytes.
    pub maxrss_bytes: u64,
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
}

/// A finished run and its output.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The cost.
    pub cost: Measured,
    /// Standard output.
    pub stdout: Vec<u8>,
}

/// Where the output of programs goes meanwhile; removed at the end.
#[derive(Debug)]
pub struct Runner<'a> {
    scratch: PathBuf,
    cancel: &'a AtomicBool,
}

impl<'a> Runner<'a> {
    /// `scratch` is an existing directory of the caller's.
    #[must_use]
    pub fn new(scratch: &Path, cancel: &'a AtomicBool) -> Self {
        Runner { scratch: scratch.to_owned(), cancel }
    }

    /// Where files for one program may be put.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// The flag that asks to stop.
    #[must_use]
    pub fn cancel(&self) -> &AtomicBool {
        self.cancel
    }

    /// Fails once the user asked to stop.
    ///
    /// # Errors
    /// Then.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Runs `program` to its end. An exit code that is not in `good` is an error.
    ///
    /// # Errors
    /// It can't be started, fails, or the user asks to stop.
    pub fn run(&self, program: &Path, args: &[OsString], good: &[i32]) -> anyhow::Result<Finished> {
        self.check()?;
        let out = self.scratch.join("out");
        let mut child = Command::new(std::env::current_exe().context("own path")?)
            .arg(VERB)
            .arg(&out)
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A group of its own, so that all of it can be ended.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        // The result is a line: it fits the pipe, so the copy never waits for us.
        while child.try_wait()?.is_none() {
            if self.cancel.load(Ordering::Relaxed) {
                end_group(&child);
                let _ = child.wait();
                bail!("interrupted");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let told = child.wait_with_output()?.stdout;
        let cost: Measured = serde_json::from_slice(&told)
            .with_context(|| format!("{}: {}", program.display(), String::from_utf8_lossy(&told)))?;
        if !cost.code.is_some_and(|code| good.contains(&code)) {
            let said = std::fs::read_to_string(out.with_extension("err")).unwrap_or_default();
            let tail: String = said.chars().rev().take(800).collect::<Vec<_>>().into_iter().rev().collect();
            bail!("{} ended with {:?}: {tail}", program.display(), cost.code);
        }
        Ok(Finished { cost, stdout: std::fs::read(&out)? })
    }
}

fn end_group(child: &std::process::Child) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
}

/// The small copy: runs a program with its output in files and prints what it cost.
#[must_use]
pub fn measure_main(args: &[OsString]) -> ExitCode {
    match measure(args).and_then(|m| Ok(serde_json::to_string(&m)?)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &[OsString]) -> anyhow::Result<Measured> {
    let [out, program, args @ ..] = args else { bail!("{VERB} OUT PROGRAM ARGS...") };
    let out = Path::new(out);
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command.stdout(File::create(out)?).stderr(File::create(out.with_extension("err"))?);
    let start = Instant::now();
    let status = command.status().with_context(|| format!("start {}", program.display()))?;
    let wall_s = start.elapsed().as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok(Measured {
        wall_s,
        user_s: seconds(usage.user_time()),
        system_s: seconds(usage.system_time()),
        maxrss_bytes: usage.max_rss().cast_unsigned() * 1024,
        code: status.code(),
    })
}

pub(crate) fn seconds(t: nix::sys::time::TimeVal) -> f64 {
    t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6
}
