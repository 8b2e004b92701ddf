//! Ctrl-C, SIGTERM and SIGHUP: the first asks the command to end cleanly, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, Thread};
use std::time::Duration;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ends the watching thread when dropped.
pub struct Guard<'a> {
    over: &'a AtomicBool,
    /// Woken at the end: a short command must not wait for the next look at the flag.
    watcher: Thread,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.watcher.unpark();
    }
}

/// Calls `stop` once, from another thread, when the process is asked to end.
///
/// The handler itself only sets a flag: a signal must not wait for locks that `stop` may take.
pub fn on_interrupt<'scope>(
    scope: &'scope Scope<'scope, '_>,
    stop: impl FnOnce() + Send + 'scope,
) -> Guard<'scope> {
    let installed = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    if let Err(error) = installed {
        tracing::warn!("no clean end on Ctrl-C: {error}");
    }
    // Leaked once a process: the guard and the thread outlive neither each other nor the scope.
    let over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let watcher = scope.spawn(move || {
        while !over.load(Ordering::Relaxed) {
            if INTERRUPTED.load(Ordering::Relaxed) {
                eprintln!("pagefold: interrupted, ending cleanly (again to end at once)");
                stop();
                return;
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    Guard { over, watcher: watcher.thread().clone() }
}
