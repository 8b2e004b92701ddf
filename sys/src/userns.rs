//! A user namespace to take an id map from, and work done under other file-system ids.
//!
//! Invariant: nothing stays behind: the process that carries the namespace is ended and reaped before the call returns, the thread
//! that changed its ids ends with the work. What it deliberately does not do: judge the map; the kernel does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::process::{Pid, Signal, WaitOptions};

use crate::retry;

/// A user namespace with these maps (`/proc/PID/uid_map`, lines of `inside outside count`).
///
/// # Errors
/// `EPERM` (no privilege, user namespaces switched off), `ENOSPC` (too many of them), `EINVAL` (the map).
pub fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let child = Carrier::start()?;
    let path = |name: &str| format!("/proc/{}/{name}", child.0.as_raw_nonzero());
    // One write each: the kernel takes a map once and whole.
    OpenOptions::new().write(true).open(path("uid_map"))?.write_all(uid_map.as_bytes())?;
    OpenOptions::new().write(true).open(path("gid_map"))?.write_all(gid_map.as_bytes())?;
    Ok(File::open(path("ns/user"))?.into())
}

/// A child in a user namespace of its own that does nothing.
struct Carrier(Pid);

impl Carrier {
    /// JUSTIFICATION: `unshare(2)` refuses a process with threads, and a helper program would have to be there.
    fn start() -> io::Result<Carrier> {
        let flags = libc::c_long::from(libc::CLONE_NEWUSER) | libc::c_long::from(libc::SIGCHLD);
        let none: libc::c_long = 0;
        let pid = retry(|| {
            // SAFETY: a fork without shared memory (no CLONE_VM, stack 0 means a copy of ours); the pointers for ids and TLS are
            // null and no flag asks for them. What the child does is below.
            unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) }
        })?;
        if pid == 0 {
            wait_for_the_end();
        }
        Pid::from_raw(pid as i32).map(Carrier).ok_or_else(|| io::Error::from(io::ErrorKind::Other))
    }
}

/// The child's life. Other threads' locks may be held for ever in this copy of memory: only system calls are made.
fn wait_for_the_end() -> ! {
    let kill: libc::c_ulong = libc::SIGKILL as libc::c_ulong;
    // SAFETY: this option takes a number and no pointer.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, kill) };
    loop {
        // SAFETY: takes nothing, touches nothing.
        unsafe { libc::pause() };
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.0), WaitOptions::empty()));
    }
}

/// Does `work` in a thread of its own whose files belong to `uid` and `gid` (`setfsuid(2)`), with all capabilities that this
/// process may have: what is created belongs to them, and nothing is refused to it.
///
/// # Errors
/// When the ids can't be taken; `work` has not run then.
pub fn with_file_ids<T: Send>(uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            take_file_ids(uid, gid)?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Of this thread alone: the system calls themselves know no processes.
fn take_file_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: takes a number; changes credentials of this thread, which ends with the work.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    // An id that names nobody changes nothing and is told by the former id.
    let nobody = libc::c_long::from(-1i32);
    // SAFETY: as above.
    let seen = unsafe { libc::syscall(libc::SYS_setfsuid, nobody) };
    // SAFETY: as above.
    let seen_group = unsafe { libc::syscall(libc::SYS_setfsgid, nobody) };
    if (seen as u32, seen_group as u32) != (uid, gid) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // Leaving id 0 took the file capabilities; they are still permitted.
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets)?;
    Ok(())
}
