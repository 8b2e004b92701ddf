//! Whoever is looked for, a process that stands in a file system that does not answer holds nobody up. Needs root and `/dev/fuse`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use pagefold_fsadapters::sealed::users::{self, Watched};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Mounted, and its server says nothing.
struct Dead {
    at: tempfile::TempDir,
    server: Option<OwnedFd>,
}

impl Drop for Dead {
    fn drop(&mut self) {
        // Without a server all who wait for it are let go.
        drop(self.server.take());
        let _ = unmount(self.at.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn privileged_a_server_that_does_not_answer_holds_nobody_up() {
    let at = tempfile::tempdir().expect("a directory");
    let server = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .expect("this test needs root and /dev/fuse");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", server.as_raw_fd());
    let options = std::ffi::CString::new(options).expect("text");
    mount("dead", at.path(), "fuse", MountFlags::empty(), Some(&*options)).expect("this test needs root");
    let dead = Dead { at, server: Some(server) };
    let inside = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = rustix::fs::open(dead.at.path(), inside, Mode::empty()).expect("asks nobody");
    let mut holder = Command::new("sleep").arg("60").stdin(Stdio::from(inside)).spawn().expect("it starts");
    let root = tempfile::tempdir().expect("a directory");
    let stat = rustix::fs::stat(root.path()).expect("there");
    let tree = Watched { path: root.path().into(), dev: stat.st_dev, ino: stat.st_ino, whole_device: false };
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(users::find(&[tree], &|_| None)));
    let found = told.recv_timeout(Duration::from_secs(20));
    drop(dead);
    holder.kill().expect("ours");
    holder.wait().expect("ours");
    assert_eq!(found.expect("it hangs").expect("/proc is there"), []);
}
