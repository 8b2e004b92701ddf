//! The program under test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::measured::{Measured, Runner};

/// The binary.
pub struct Pagefold {
    program: PathBuf,
}

/// A scan that ended.
pub struct Scanned {
    /// What it cost.
    pub cost: Measured,
    /// Its own clock: without start and end of the program.
    pub elapsed_s: f64,
    /// Inodes.
    pub files: u64,
}

#[derive(Deserialize)]
struct Output {
    elapsed_s: f64,
    partial: bool,
    totals: Totals,
    errors: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Totals {
    files: u64,
}

impl Pagefold {
    /// The given binary, or the one beside this program.
    ///
    /// # Errors
    /// There is none.
    pub fn find(given: Option<&Path>) -> anyhow::Result<Pagefold> {
        let program = match given {
            Some(path) => path.to_owned(),
            None => std::env::current_exe()?.with_file_name("pagefold"),
        };
        if !program.is_file() {
            bail!(
                "no program {}: build it with `cargo build --release -p pagefold`, or give --pagefold",
                program.display()
            );
        }
        Ok(Pagefold { program })
    }

    /// Scans `roots`. Errors in the report are errors here: it must have looked at everything.
    ///
    /// # Errors
    /// Then, and when it can't be run.
    pub fn scan(
        &self,
        runner: &Runner<'_>,
        roots: &[PathBuf],
        threads: usize,
        content: bool,
    ) -> anyhow::Result<Scanned> {
        let mut args: Vec<OsString> =
            vec!["scan".into(), "--format".into(), "json".into(), format!("--threads={threads}").into()];
        if content {
            args.push("--content".into());
        }
        args.extend(roots.iter().map(OsString::from));
        let finished = runner.run(&self.program, &args, &[0, 1])?;
        let output: Output =
            serde_json::from_slice(&finished.stdout).context("the report of pagefold scan")?;
        if output.partial || !output.errors.is_empty() {
            bail!("the scan is partial or has errors: {:?}", output.errors.first());
        }
        Ok(Scanned { cost: finished.cost, elapsed_s: output.elapsed_s, files: output.totals.files })
    }
}
