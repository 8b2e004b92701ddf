//! Places where a test can end or stop the process: every step after which a crash leaves something else on disk.
//!
//! Always compiled in, so that what is tested is what is shipped; inert unless an environment variable is set:
//! `PAGEFOLD_CRASH_AT=<step>[:n]` kills the process (SIGKILL: no destructor, no flush) when it comes to the step for the n-th time,
//! `PAGEFOLD_STOP_AT=<step>[:n]` stops it there (SIGSTOP), so that a test can copy the disk or shut the file system down first.
//! `PAGEFOLD_STEPS_TO=<file>` writes the names down, one a line, as they are passed: what a command can be ended at.
//!
//! Invariant: every name passed to [`step`] stands in [`STEPS`], so a test that goes through [`STEPS`] goes through all of them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::Signal;

/// All steps, in the order of a life. Add a line where you add a [`step`].
pub const STEPS: &[&str] = &[
    // Store: creation, opening, recovery.
    "store.create.dir",
    "store.create.index",
    "store.create.format",
    "store.recover.graves",
    "store.recover.anchors",
    "store.recover.images",
    "store.recover.roots",
    // Store: what seal builds.
    "store.domain.dirs",
    "store.reserve",
    "store.anchor.created",
    "store.anchor.finished",
    "store.anchor.borrowed",
    "store.image.written",
    "store.root.dir",
    "store.publish.synced",
    "store.publish.committed",
    "store.publish.done",
    // Store: every commit of the index, before and after.
    "store.commit.before",
    "store.commit.after",
    // Store: removals.
    "store.grave.dug",
    "store.grave.unlinked",
    "store.gc.marked",
    // Seal.
    "seal.walked",
    "seal.written",
    "seal.diff.listed",
    "seal.diff.made",
    // Mount, umount.
    "mount.assembled",
    "mount.published",
    "mount.attached",
    "umount.unmounted",
    "umount.forgotten",
    "discard.entry",
    "discard.emptied",
    // Commit.
    "commit.begun",
    "commit.dirs.made",
    "commit.batch.built",
    "commit.batch.durable",
    "commit.exchanged",
    "commit.taken.away",
    "commit.name.changed",
    "commit.files.placed",
    "commit.names.gone",
    "commit.dirs.finished",
    "commit.synced",
    "commit.done",
    "commit.sealed",
    "commit.emptied",
    // Unseal.
    "unseal.committed",
    "unseal.removed",
    "unseal.format.gone",
    "unseal.emptied",
    // Export.
    "export.entry",
    "export.filled",
    "export.placed",
];

#[derive(Debug)]
struct Trap {
    step: String,
    /// Times still to pass it.
    left: AtomicU64,
    signal: Signal,
}

static LOG: OnceLock<Option<std::fs::File>> = OnceLock::new();
static TRAPS: OnceLock<Vec<Trap>> = OnceLock::new();

/// A place where a test can end the process. Costs one load when no test asks.
///
/// # Panics
/// With a name that is not in [`STEPS`], when a trap is set or in a build with debug assertions.
pub fn step(name: &'static str) {
    let traps = TRAPS.get_or_init(from_environment);
    if cfg!(debug_assertions) || !traps.is_empty() {
        assert!(STEPS.contains(&name), "step {name} is missing in STEPS");
    }
    if let Some(mut log) = LOG.get_or_init(open_log).as_ref() {
        let _ = std::io::Write::write_all(&mut log, format!("{name}\n").as_bytes());
    }
    for trap in traps.iter().filter(|t| t.step == name) {
        if trap.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            let _ = rustix::process::kill_process(rustix::process::getpid(), trap.signal);
            // Another thread may take the signal: until it has stopped this one, this one goes no further.
            while is_pending(trap.signal) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// Whether no thread has taken the signal that the process was sent. The kernel stops all threads in the moment in which one takes it.
fn is_pending(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal.as_raw() - 1)) != 0)
}

fn open_log() -> Option<std::fs::File> {
    let path = std::env::var_os("PAGEFOLD_STEPS_TO")?;
    std::fs::OpenOptions::new().create(true).append(true).open(path).ok()
}

fn from_environment() -> Vec<Trap> {
    [("PAGEFOLD_CRASH_AT", Signal::KILL), ("PAGEFOLD_STOP_AT", Signal::STOP)]
        .into_iter()
        .filter_map(|(variable, signal)| parse(&std::env::var(variable).ok()?, signal))
        .collect()
}

fn parse(text: &str, signal: Signal) -> Option<Trap> {
    let (step, times) = text.split_once(':').unwrap_or((text, "1"));
    let times = times.parse().ok().filter(|n| *n > 0)?;
    (!step.is_empty()).then(|| Trap { step: step.to_owned(), left: AtomicU64::new(times), signal })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_a_step_and_a_count() {
        let trap = parse("store.reserve:3", Signal::KILL).expect("understood");
        assert_eq!((trap.step.as_str(), trap.left.into_inner()), ("store.reserve", 3));
        assert_eq!(parse("x", Signal::KILL).expect("understood").left.into_inner(), 1);
        for bad in ["", ":1", "x:0", "x:y"] {
            assert!(parse(bad, Signal::KILL).is_none(), "{bad}");
        }
    }

    #[test]
    fn names_are_listed_once() {
        let mut names = STEPS.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STEPS.len());
    }
}
