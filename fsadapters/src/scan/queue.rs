//! Work shared by the threads of a walk: last in, first out, so that few directories are open at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct State<T> {
    tasks: Vec<T>,
    working: usize,
    /// Nothing else is begun, whatever the tasks under way lead to.
    ended: bool,
}

/// A stack of tasks that ends when it is empty and nobody works on a task that could add more.
#[derive(Debug)]
pub(crate) struct TaskStack<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> TaskStack<T> {
    /// `tasks` are taken from the end.
    pub fn new(tasks: Vec<T>) -> Self {
        TaskStack { state: Mutex::new(State { tasks, working: 0, ended: false }), changed: Condvar::new() }
    }

    /// One thread's share of the work, until nothing is left: `each` does a task and adds what it led to. `cancelled`: what is left is
    /// dropped. A thread that panics in a task does not leave the others waiting for it: they end too.
    pub fn work(&self, cancelled: impl Fn() -> bool, mut each: impl FnMut(T, &mut Vec<T>)) {
        let mut more = Vec::new();
        while let Some(task) = self.take() {
            let panicked = EndAll(self);
            if cancelled() {
                self.end();
            } else {
                each(task, &mut more);
            }
            std::mem::forget(panicked);
            self.finish(&mut more);
        }
    }

    /// The next task, or `None` when all is done. Whoever gets one must call [`Self::finish`].
    fn take(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop() {
                state.working += 1;
                return Some(task);
            }
            if state.working == 0 || state.ended {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The task taken is done and led to `more`; drained.
    fn finish(&self, more: &mut Vec<T>) {
        let mut state = self.lock();
        let wake = state.tasks.len() < more.len();
        if !state.ended {
            state.tasks.append(more);
        }
        state.working -= 1;
        let over = state.working == 0 && state.tasks.is_empty();
        drop(state);
        more.clear();
        if wake || over {
            self.changed.notify_all();
        }
    }

    /// Drops what is left, so that [`Self::take`] ends.
    fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        let dropped = std::mem::take(&mut state.tasks);
        drop(state);
        drop(dropped);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dropped only when a task panics: it is counted as done, and nothing else is begun.
struct EndAll<'t, T>(&'t TaskStack<T>);

impl<T> Drop for EndAll<'_, T> {
    fn drop(&mut self) {
        self.0.end();
        self.0.finish(&mut Vec::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    #[test]
    fn every_task_is_done_once_and_all_threads_end() {
        let stack = TaskStack::new(vec![12u32; 3]);
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    stack.work(
                        || false,
                        |depth, more| {
                            done.fetch_add(1, Ordering::Relaxed);
                            if depth > 0 {
                                more.extend([depth - 1; 2]);
                            }
                        },
                    );
                });
            }
        });
        assert_eq!(done.into_inner(), 3 * ((1 << 13) - 1));
    }

    #[test]
    fn what_is_left_after_cancelling_is_dropped() {
        let (stack, cancelled) = (TaskStack::new(vec![0u32; 100]), AtomicBool::new(false));
        let mut done = 0;
        stack.work(
            || cancelled.load(Ordering::Relaxed),
            |_, more| {
                done += 1;
                more.push(1);
                cancelled.store(done == 7, Ordering::Relaxed);
            },
        );
        assert_eq!(done, 7);
        assert!(stack.take().is_none());
    }

    #[test]
    fn a_panic_in_one_thread_ends_the_others() {
        let stack = TaskStack::new(vec![0u32; 8]);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|number| {
                    let stack = &stack;
                    scope.spawn(move || {
                        stack.work(
                            || false,
                            |_, more| {
                                assert!(number > 0, "on purpose");
                                // Without the panic this would never end.
                                more.push(0);
                            },
                        );
                    })
                })
                .collect();
            let ended: Vec<bool> = workers.into_iter().map(|w| w.join().is_ok()).collect();
            assert_eq!(ended, [false, true, true, true]);
        });
    }
}
