//! The forms of a report, and its way to standard output.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::ValueEnum;
use serde::Serialize;

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: a named, versioned schema.
    Json,
}

/// What is said when a report can't be written: what the command was for is done.
pub const UNWRITTEN: &str = "the report could not be written to standard output";

/// Whether this process has begun a report: a second object behind it would make it no JSON.
static BEGUN: AtomicBool = AtomicBool::new(false);

impl Format {
    /// Writes a report in this form: the one value, or the text.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn write<J: Serialize>(
        self,
        json: impl FnOnce() -> J,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        match self {
            Format::Json => write_json(&json()),
            Format::Table => {
                let mut out = io::stdout().lock();
                out.write_all(text().as_bytes()).and_then(|()| out.flush()).context(UNWRITTEN)
            }
        }
    }
}

/// Writes a report as JSON.
///
/// # Errors
/// Standard output can't be written.
pub fn write_json(report: &impl Serialize) -> anyhow::Result<()> {
    // Whole, or nothing of it.
    let mut text = serde_json::to_vec_pretty(report)?;
    text.push(b'\n');
    BEGUN.store(true, Ordering::Relaxed);
    let mut out = io::stdout().lock();
    out.write_all(&text).and_then(|()| out.flush()).context(UNWRITTEN)
}

/// A command that came to no report says so in the form that was asked for: whoever reads JSON gets an object with `error`.
pub fn write_failure(command: &str, error: &str) {
    if !BEGUN.load(Ordering::Relaxed) {
        let schema = format!("pagefold.{command}/1");
        // Standard output may be what failed; the message is on stderr.
        let _ = write_json(&serde_json::json!({ "schema": schema, "error": error }));
    }
}
