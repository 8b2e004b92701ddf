//! One process at a time: `flock` on the file `lock`, which also says who holds it.
//!
//! Invariant: the lock ends with its holder, however that dies, for the kernel drops it with the last descriptor (close-on-exec,
//! so no child keeps it). What it deliberately does not do: trust the text in the file for anything but a message.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::error::StoreError;

/// How long a second process waits by default: `status` right after `seal` just works.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(10);

const NAME: &str = "lock";
const TEXT_BYTES_MAX: usize = 256;

/// Held while a process works with the store.
#[derive(Debug)]
pub(super) struct Lock {
    file: OwnedFd,
}

impl Lock {
    /// Takes the lock of the store behind `dir`; `who` is the command as others shall read it.
    pub(super) fn take(
        dir: &OwnedFd,
        store: &Path,
        who: &str,
        patience: Duration,
    ) -> Result<Lock, StoreError> {
        let started = Instant::now();
        let path = store.join(NAME);
        let mut pause = Duration::from_millis(1);
        loop {
            let file = open(dir).map_err(|e| StoreError::io("open the lock", &path, e))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_current(dir, &file) => {
                    let lock = Lock { file };
                    lock.write(&format!("{} {}\n", std::process::id(), printable(who)));
                    return Ok(lock);
                }
                // Removed and made again while we waited: the lock we hold guards nothing.
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if started.elapsed() >= patience => {
                    return Err(StoreError::Busy {
                        path: store.to_owned(),
                        holder: holder(&file),
                        waited_s: patience.as_secs(),
                    });
                }
                Err(Errno::WOULDBLOCK) => {
                    std::thread::sleep(pause.min(patience.saturating_sub(started.elapsed())));
                    pause = (pause * 2).min(Duration::from_millis(25));
                }
                Err(e) => return Err(StoreError::io("lock", &path, e)),
            }
        }
    }

    /// Best effort: the text is for people.
    fn write(&self, text: &str) {
        let _ = rustix::fs::ftruncate(&self.file, 0);
        let _ = rustix::io::pwrite(&self.file, text.as_bytes(), 0);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = rustix::fs::ftruncate(&self.file, 0);
    }
}

fn open(dir: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::io::retry_on_intr(|| rustix::fs::openat(dir, NAME, flags, Mode::RUSR | Mode::WUSR))
}

fn is_current(dir: &OwnedFd, file: &OwnedFd) -> bool {
    let named = rustix::fs::statat(dir, NAME, AtFlags::SYMLINK_NOFOLLOW);
    let held = rustix::fs::fstat(file);
    matches!((named, held), (Ok(n), Ok(h)) if n.st_ino == h.st_ino && n.st_dev == h.st_dev)
}

fn holder(file: &OwnedFd) -> String {
    let mut buffer = [0; TEXT_BYTES_MAX];
    let read = rustix::io::pread(file, &mut buffer, 0).unwrap_or(0);
    let text = printable(&String::from_utf8_lossy(&buffer[..read]));
    match text.split_once(' ') {
        Some((pid, command)) if !pid.is_empty() => format!("process {pid} ({command})"),
        _ => "a process that did not say who it is".to_owned(),
    }
}

fn printable(text: &str) -> String {
    text.trim().chars().take(TEXT_BYTES_MAX / 4).map(|c| if c.is_control() { '?' } else { c }).collect()
}
