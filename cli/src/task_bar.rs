//! A line on the terminal while a task of the store runs. Silent when stderr is no terminal, or when it is soon over.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget};
use pagefold_fsadapters::store::Task;

use crate::{human, interrupt};

const PATIENCE: Duration = Duration::from_millis(700);

/// Runs `work` with a task that Ctrl-C ends and the terminal shows as `what`.
pub fn watch<T: Send>(what: &str, work: impl FnOnce(&Task) -> T + Send) -> T {
    let task = Task::default();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (task, over) = (&task, &over);
        let _interrupt = interrupt::on_interrupt(scope, || task.cancel());
        if std::io::stderr().is_terminal() {
            scope.spawn(move || draw(what, task, over));
        }
        let result = work(task);
        over.store(true, Ordering::Relaxed);
        result
    })
}

fn draw(what: &str, task: &Task, over: &AtomicBool) {
    let started = Instant::now();
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        if started.elapsed() < PATIENCE {
            continue;
        }
        let (done, total) = task.progress();
        bar.set_message(format!("{what}: {} of {}", human::count(done), human::count(total.max(done))));
        bar.tick();
    }
    bar.finish_and_clear();
}
