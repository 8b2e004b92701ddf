//! Work shared by the threads of a walk: last in, first out, so that few directories are open at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct State<T> {
    tasks: Vec<T>,
    working: usize,
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
        TaskStack { state: Mutex::new(State { tasks, working: 0 }), changed: Condvar::new() }
    }

    /// The next task, or `None` when all is done. Whoever gets one must call [`Self::finish`].
    pub fn take(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop() {
                state.working += 1;
                return Some(task);
            }
            if state.working == 0 {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The task taken is done and led to `more`; drained.
    pub fn finish(&self, more: &mut Vec<T>) {
        let mut state = self.lock();
        let wake = state.tasks.len() < more.len();
        state.tasks.append(more);
        state.working -= 1;
        let over = state.working == 0 && state.tasks.is_empty();
        drop(state);
        if wake || over {
            self.changed.notify_all();
        }
    }

    /// Drops what is left, so that [`Self::take`] ends.
    pub fn clear(&self) {
        let dropped = std::mem::take(&mut self.lock().tasks);
        drop(dropped);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn every_task_is_done_once_and_all_threads_end() {
        let stack = TaskStack::new(vec![12u32; 3]);
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Some(depth) = stack.take() {
                        done.fetch_add(1, Ordering::Relaxed);
                        let mut more = if depth > 0 { vec![depth - 1; 2] } else { Vec::new() };
                        stack.finish(&mut more);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 3 * ((1 << 13) - 1));
    }
}
