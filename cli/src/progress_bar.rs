//! Progress of a scan, seal, commit or export on a terminal: what, how fast, how long still. Silent when stderr is no terminal.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pagefold_fsadapters::scan::{Phase, Progress};

use crate::human;

/// A scan shorter than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(700);

/// Ends the display when dropped.
pub struct Guard {
    over: Option<&'static AtomicBool>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(over) = self.over {
            over.store(true, Ordering::Relaxed);
        }
    }
}

/// Shows `progress` until the guard is dropped.
pub fn show<'scope>(scope: &'scope Scope<'scope, '_>, progress: &'scope Progress) -> Guard {
    if !std::io::stderr().is_terminal() {
        return Guard { over: None };
    }
    let over: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    scope.spawn(move || draw(progress, over));
    Guard { over: Some(over) }
}

fn draw(progress: &Progress, over: &AtomicBool) {
    let started = Instant::now();
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(
        ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    let mut read_since: Option<Instant> = None;
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        if started.elapsed() < PATIENCE {
            continue;
        }
        bar.tick();
        bar.set_message(match progress.phase() {
            Phase::Walk => walk_line(progress, started.elapsed()),
            Phase::Content => read_line(progress, read_since.get_or_insert_with(Instant::now).elapsed()),
            Phase::Apply => write_line(progress),
            Phase::Figures => format!("{} files: computing figures", human::count(progress.files())),
        });
    }
    bar.finish_and_clear();
}

/// The number of directories grows while the walk goes on, so the estimate does too; it is told as "at least".
fn walk_line(progress: &Progress, elapsed: Duration) -> String {
    let files = progress.files();
    let (done, found) = progress.dirs();
    let seconds = elapsed.as_secs_f64().max(0.001);
    let rate = (files as f64 / seconds) as u64;
    let left = if done > 0 { seconds * (found.saturating_sub(done)) as f64 / done as f64 } else { 0.0 };
    // Depth first, what is found is soon done: an estimate below a second says nothing.
    let estimate =
        if left < 1.0 { String::new() } else { format!(", at least {} left", human::seconds(left)) };
    format!(
        "{} files, {}/s, {done} of {found} directories found so far{estimate}",
        human::count(files),
        human::count(rate),
    )
}

fn write_line(progress: &Progress) -> String {
    match progress.steps() {
        (_, 0) => "reading what views wrote".to_owned(),
        (done, total) => format!("{} of {} names written", human::count(done), human::count(total)),
    }
}

fn read_line(progress: &Progress, elapsed: Duration) -> String {
    let (done, total) = progress.pages();
    let page = rustix::param::page_size() as u64;
    let seconds = elapsed.as_secs_f64().max(0.001);
    let rate = done as f64 / seconds;
    let left = if rate > 0.0 { (total.saturating_sub(done)) as f64 / rate } else { 0.0 };
    format!(
        "read {} of {}, {}/s, {} left",
        human::bytes(done * page),
        human::bytes(total * page),
        human::bytes((rate * page as f64) as u64),
        human::seconds(left)
    )
}
