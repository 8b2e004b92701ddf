//! The sealed arm: roots sealed into a store of the run's own, views mounted and unmounted through the library.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pagefold_fsadapters::scan::Progress;
use pagefold_fsadapters::sealed::mount::{MountOptions, discard_writes, mount_views, umount_view};
use pagefold_fsadapters::sealed::seal::{SealConfig, seal};
use pagefold_fsadapters::store::{OpenMode, RootRow, Store};

use super::BenchError;
use super::place::Place;
use super::report::ViewCosts;

/// Sealed roots.
#[derive(Debug)]
pub(super) struct Views {
    store: Store,
    rows: Vec<RootRow>,
    at: PathBuf,
    mounting: std::cell::Cell<Option<Duration>>,
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Views(error.to_string())
}

impl Views {
    /// Seals `roots` in one call.
    pub(super) fn seal(
        place: &Place,
        roots: &[PathBuf],
        cancel: &AtomicBool,
    ) -> Result<(Views, ViewCosts), BenchError> {
        let free = place.free()?;
        let started = Instant::now();
        let store =
            Store::open(&place.dir.join("store"), OpenMode::Create, "pagefold farm bench").map_err(failed)?;
        let progress = Progress::default();
        let over = AtomicBool::new(false);
        let report = std::thread::scope(|scope| {
            let _watch = Watch::start(scope, cancel, &progress, &over);
            seal(&store, &SealConfig::new(roots.to_vec()), &progress).map_err(failed)
        })?;
        if progress.is_cancelled() {
            return Err(BenchError::Cancelled);
        }
        if let Some(error) = report.errors.first() {
            return Err(failed(format!("{}: {}", error.path.display(), error.error)));
        }
        let seal_ms = started.elapsed().as_secs_f64() * 1e3;
        let costs = ViewCosts {
            roots: roots.len() as u32,
            seal_ms,
            mount_ms: 0.0,
            store_disk_bytes: free.saturating_sub(place.free()?),
        };
        let rows =
            roots.iter().map(|root| store.find_root(root)).collect::<Result<_, _>>().map_err(failed)?;
        Ok((Views { store, rows, at: place.make("views")?, mounting: None.into() }, costs))
    }

    /// Mounts views of the first `count` roots; their paths, in order.
    pub(super) fn mount(&self, count: usize) -> Result<Vec<PathBuf>, BenchError> {
        let requests: Vec<(RootRow, PathBuf)> =
            self.rows.iter().take(count).map(|row| (row.clone(), self.at.join(&row.name))).collect();
        for (_, target) in &requests {
            std::fs::create_dir_all(target).map_err(|e| BenchError::io("create", target, e))?;
        }
        let started = Instant::now();
        let results = mount_views(&self.store, &requests, &MountOptions::default());
        if self.mounting.get().is_none() {
            self.mounting.set(Some(started.elapsed()));
        }
        for result in results {
            result.map_err(failed)?;
        }
        Ok(requests.into_iter().map(|(_, target)| target).collect())
    }

    /// How long the first mounting took.
    pub(super) fn first_mounting(&self) -> Duration {
        self.mounting.get().unwrap_or_default()
    }

    /// Unmounts all and throws away what their containers wrote, so that the next ones start from the same.
    pub(super) fn unmount(&self) {
        for row in &self.rows {
            let target = self.at.join(&row.name);
            if !is_mounted(&target) {
                continue;
            }
            let done = umount_patiently(&self.store, &target)
                .and_then(|()| discard_writes(&self.store, row).map_err(failed).map(drop));
            if let Err(error) = done {
                eprintln!("pagefold: {error}");
            }
        }
    }
}

impl Drop for Views {
    fn drop(&mut self) {
        self.unmount();
    }
}

fn is_mounted(target: &Path) -> bool {
    let mounts = pagefold_fsadapters::mountinfo::read().unwrap_or_default();
    pagefold_fsadapters::sealed::mount::view_at(&mounts, target).is_some()
}

/// The namespaces of containers that were just killed may hold the view for a moment.
fn umount_patiently(store: &Store, target: &Path) -> Result<(), BenchError> {
    let started = Instant::now();
    loop {
        match umount_view(store, target) {
            Ok(_) => return Ok(()),
            Err(_) if started.elapsed() < Duration::from_secs(2) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Hands a flag on to the progress of a task, until dropped.
struct Watch<'a>(&'a AtomicBool);

impl<'a> Watch<'a> {
    fn start<'scope>(
        scope: &'scope std::thread::Scope<'scope, '_>,
        cancel: &'scope AtomicBool,
        progress: &'scope Progress,
        over: &'a AtomicBool,
    ) -> Watch<'a>
    where
        'a: 'scope,
    {
        use std::sync::atomic::Ordering;
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) && !cancel.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            if cancel.load(Ordering::Relaxed) {
                progress.cancel();
            }
        });
        Watch(over)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}
