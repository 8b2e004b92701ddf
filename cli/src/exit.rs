//! Exit codes, decided in one place (design section 10).

use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// All of it was done.
    Done,
    /// Part of it: the report says what is missing.
    Partial,
    /// Wrong usage, or nothing could be done.
    Error,
    /// This host can't.
    Refused,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(match exit {
            Exit::Done => 0,
            Exit::Partial => 1,
            Exit::Error => 2,
            Exit::Refused => 3,
        })
    }
}

/// A command that came to no report: why, and how it ends. For what is no plain error ([`Exit::Error`]).
#[derive(Debug)]
pub struct Ended {
    /// The exit code.
    pub exit: Exit,
    /// A sentence for each thing there is to say.
    pub why: Vec<String>,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why.join("; "))
    }
}

impl std::error::Error for Ended {}
