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
