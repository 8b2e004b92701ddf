//! Taking a view's mount away, and who is in the way.
//!
//! Invariant: nobody is thrown out; a mount that is in use stays and its users are named. Who holds it for a moment only is waited for. What it
//! deliberately does not do: decide what becomes of the view's writes.

use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::live::{ProbeError, UpperState};
use super::mount::probe_upper;
use super::users::{self, Watched};
use super::view_error::{Busy, ViewError, failed};
use crate::mountinfo::Mount;
use crate::store::{RootRow, Store};

/// Long enough for a process that is just being started to execute its program.
const TRIES: u32 = 20;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// What the upper is doing once those had time to go who hold it for a moment only: a process that is just being started has copies
/// of all descriptors until it executes its program.
pub(super) fn settled_state(store: &Store, row: &RootRow) -> Result<UpperState, ProbeError> {
    let mut state = probe_upper(store, row)?;
    for _ in 0..TRIES {
        if state == UpperState::Free {
            break;
        }
        std::thread::sleep(PAUSE);
        state = probe_upper(store, row)?;
    }
    Ok(state)
}

/// Unmounts and gives the view's root directory as it was known, for the search for its holders.
pub(super) fn unmount_at(target: &Path, mounts: &[Mount]) -> Result<Watched, ViewError> {
    let stat = rustix::fs::stat(target).map_err(failed("look at", target))?;
    let device = Watched { path: target.into(), dev: stat.st_dev, ino: stat.st_ino, whole_device: true };
    let mut tries = 0;
    loop {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(device),
            Err(Errno::BUSY) => {}
            Err(e) => return Err(failed("unmount", target)(e)),
        }
        let below = |m: &&Mount| m.mount_point != target && m.mount_point.starts_with(target);
        let below: Vec<_> = mounts.iter().filter(below).map(|m| m.mount_point.clone()).collect();
        let users = users::find(std::slice::from_ref(&device), &|_| None).unwrap_or_default();
        // Nobody is to be seen: whoever it was is going.
        if tries == TRIES || !users.is_empty() || !below.is_empty() {
            return Err(ViewError::Busy(Busy { target: target.into(), users, mounts: below }));
        }
        tries += 1;
        std::thread::sleep(PAUSE);
    }
}

/// Processes that still use what was unmounted, for messages.
pub(super) fn holders(device: &Watched) -> Vec<String> {
    let found = users::find(std::slice::from_ref(device), &|_| None).unwrap_or_default();
    found.iter().map(ToString::to_string).collect()
}
