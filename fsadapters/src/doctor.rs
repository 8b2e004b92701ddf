//! What this kernel, this user and a file system can do for pagefold.
//!
//! Each capability is tried, not read off a version number. Invariant: probes leave nothing behind and change no file that
//! exists: they use unnamed temporary files, and file-system contexts that are never mounted. What it deliberately does not do:
//! advise settings; it says what pagefold does without a thing.

mod host;
mod path;

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::Serialize;

/// Name and version of the report's JSON form.
pub const SCHEMA: &str = "pagefold.doctor/1";

/// What trying a capability gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It works.
    Yes,
    /// This kernel or file system lacks it.
    No,
    /// It may exist, but not for this user.
    NotPermitted,
    /// It could not be tried; `detail` says why.
    NotTried,
}

impl State {
    /// One word for a table.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            State::Yes => "yes",
            State::No => "no",
            State::NotPermitted => "not permitted",
            State::NotTried => "not tried",
        }
    }
}

/// What is known of a capability without trying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Short name, stable across versions.
    pub name: &'static str,
    /// First kernel that has it.
    pub since: &'static str,
    /// What pagefold needs it for.
    pub needed_for: &'static str,
    /// What pagefold does where it is missing.
    pub without: &'static str,
    /// Whether `pagefold scan` can't do its main job, finding sharing by extents, without it.
    pub required: bool,
}

/// One capability, tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was tried.
    #[serde(flatten)]
    pub capability: Capability,
    /// How that went.
    pub state: State,
    /// What was seen; an errno in words where it failed.
    pub detail: String,
}

/// A file system, as found at one path.
#[derive(Clone, Debug, Serialize)]
pub struct PathReport {
    /// As given.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Type of the file system; empty when the path could not be opened.
    pub file_system: String,
    /// What was tried there.
    pub checks: Vec<Check>,
    /// Whether `pagefold scan` by extents can run there.
    pub can_scan: bool,
}

fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&crate::scan::path_text(path))
}

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Release of the running kernel.
    pub kernel: String,
    /// Effective user id.
    pub uid: u32,
    /// What concerns the whole host.
    pub host: Vec<Check>,
    /// What concerns each path.
    pub paths: Vec<PathReport>,
    /// Whether the main job can run at every path.
    pub can_scan: bool,
}

/// Tries everything, for the file systems at `paths`.
#[must_use]
pub fn examine<P: AsRef<Path>>(paths: &[P]) -> Report {
    let host = host::checks();
    let host_ok = suffices(&host);
    let mut paths: Vec<PathReport> = paths.iter().map(|p| path::report(p.as_ref())).collect();
    for report in &mut paths {
        report.can_scan &= host_ok;
    }
    Report {
        schema: SCHEMA,
        kernel: kernel_release(),
        uid: rustix::process::geteuid().as_raw(),
        can_scan: host_ok && paths.iter().all(|p| p.can_scan),
        host,
        paths,
    }
}

fn kernel_release() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    text.map_or_else(|_| "unknown".into(), |text| text.trim().into())
}

/// Whether nothing required is known to be missing. What could not be tried is given the benefit of the doubt.
fn suffices(checks: &[Check]) -> bool {
    checks.iter().all(|c| !c.capability.required || matches!(c.state, State::Yes | State::NotTried))
}

impl Check {
    fn new(capability: Capability, state: State, detail: impl Into<String>) -> Check {
        Check { capability, state, detail: detail.into() }
    }

    /// From the result of trying: the text of success, or the errno.
    fn tried(capability: Capability, result: io::Result<impl Into<String>>) -> Check {
        match result {
            Ok(detail) => Check::new(capability, State::Yes, detail),
            Err(error) => {
                let state = match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::PERM | Errno::ACCESS) => State::NotPermitted,
                    _ => State::No,
                };
                Check::new(capability, state, error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUIRED: Capability =
        Capability { name: "x", since: "1", needed_for: "", without: "", required: true };

    #[test]
    fn only_what_is_required_and_missing_stops_a_scan() {
        let optional = Capability { required: false, ..REQUIRED };
        let check = |capability, state| vec![Check::new(capability, state, "")];
        for state in [State::No, State::NotPermitted] {
            assert!(!suffices(&check(REQUIRED, state)));
            assert!(suffices(&check(optional, state)));
        }
        assert!(suffices(&check(REQUIRED, State::Yes)) && suffices(&check(REQUIRED, State::NotTried)));
    }

    #[test]
    fn names_are_unique_and_every_check_explains_itself() {
        let report = examine(&[std::env::temp_dir()]);
        let mut names: Vec<_> = report.host.iter().map(|c| c.capability.name).collect();
        let all: Vec<&Check> = report.host.iter().chain(&report.paths[0].checks).collect();
        for check in all {
            let c = check.capability;
            assert!(![c.name, c.since, c.needed_for, c.without].contains(&""), "{check:?}");
            assert!(!check.detail.is_empty(), "{check:?}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.host.len());
    }

    #[test]
    fn a_path_without_extent_maps_or_without_existence_is_no_place_to_scan() {
        let report = examine(&["/proc", "/nonexistent-for-this-test"]);
        assert!(report.paths.iter().all(|p| !p.can_scan));
        assert!(!report.can_scan);
    }
}
