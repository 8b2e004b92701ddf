//! A rig with sealed roots, driven through the command line as a user would.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::process::{Pid, Signal, kill_process};

use super::pagefold;

/// A loopback file system with room for roots, a store and views, all below its mount point: what a failed test leaves
/// mounted goes with the rig.
pub struct ViewRig {
    pub rig: LoopRig,
}

impl ViewRig {
    pub fn new(fs: RigFs) -> ViewRig {
        let rig = LoopRig::new(fs).unwrap_or_else(|e| panic!("{e}"));
        // Containers change users and must be able to pass.
        let passable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(rig.path(), passable).expect("own directory");
        ViewRig { rig }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.rig.path().join(name)
    }

    pub fn make_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(&path).expect("room on the rig");
        path
    }

    /// Seals `roots` and mounts a view of each at `view-<name>`.
    pub fn views(&self, roots: &[&str]) -> Vec<PathBuf> {
        let paths: Vec<PathBuf> = roots.iter().map(|r| self.path(r)).collect();
        let mut args: Vec<&OsStr> = vec![OsStr::new("seal")];
        args.extend(paths.iter().map(|p| p.as_os_str()));
        done(&args);
        let mount = |root: &&str| {
            let target = self.make_dir(&format!("view-{root}"));
            done(&["mount".as_ref(), self.path(root).as_os_str(), target.as_os_str()]);
            target
        };
        roots.iter().map(mount).collect()
    }
}

/// Runs pagefold; its exit code must be 0. Standard output. Who starts a mount namespace anywhere on the host has a copy of our views for a
/// moment: what is refused because of that is tried again.
pub fn done<S: AsRef<OsStr>>(args: &[S]) -> String {
    let started = Instant::now();
    let mut output = run(args);
    while !output.status.success()
        && told(&output).contains("another mount namespace")
        && started.elapsed() < Duration::from_secs(30)
    {
        std::thread::sleep(Duration::from_millis(50));
        output = run(args);
    }
    assert!(output.status.success(), "pagefold {}: {}", words(args), told(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs pagefold; its exit code must be `code`. Standard error.
pub fn fails<S: AsRef<OsStr>>(code: i32, args: &[S]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(code), "pagefold {}: {}", words(args), told(&output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs pagefold.
pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    pagefold().args(args).output().expect("pagefold starts")
}

fn words<S: AsRef<OsStr>>(args: &[S]) -> String {
    let words: Vec<_> = args.iter().map(|a| String::from_utf8_lossy(a.as_ref().as_bytes())).collect();
    words.join(" ")
}

/// All that a program said, for a failure's message.
pub fn told(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A program that `tools/setup.sh test` builds (they come as crates, not as packages).
pub fn tool(name: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(|dir| workspace.join(dir));
    let homes = [target, Some(workspace.join("target"))];
    homes
        .into_iter()
        .flatten()
        .map(|dir| dir.join("tools/bin").join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{name} is not built: run tools/setup.sh test"))
}

/// Runs a program that must succeed; standard output and error.
pub fn must(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: run tools/setup.sh test"));
    assert!(output.status.success(), "{command:?}: {}", told(&output));
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs `script` in a mount namespace of its own with a version 2 cgroup tree, which engines expect and test machines may lack.
pub fn with_cgroups(script: &str) -> String {
    let prologue = "set -e; mount --make-rprivate /; mount -t cgroup2 none /sys/fs/cgroup; ";
    must(Command::new("unshare").args(["--mount", "sh", "-c"]).arg(format!("{prologue}{script}")))
}

/// The Debian to install: the host's own, because its package sources are used.
pub fn suite() -> String {
    let text = std::fs::read_to_string("/etc/os-release").expect("a Linux with os-release");
    let name = text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).expect("a Debian");
    name.trim_matches('"').to_owned()
}

/// Waits until process `id` is stopped.
pub fn stops(id: u32) {
    let started = Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "it neither stopped nor ended: {stat}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends process `id` a signal.
pub fn signal(id: u32, signal: Signal) {
    kill_process(Pid::from_raw(id.cast_signed()).expect("a process"), signal).expect("it is there");
}

/// Starts pagefold, which stops itself at `step`.
pub fn at_step(args: &[&OsStr], step: &str) -> Child {
    let mut command = pagefold();
    command.args(args).env("PAGEFOLD_STOP_AT", step).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    stops(child.id());
    child
}

/// Gives `root` a static shell, enough for a container to start.
pub fn install_busybox(root: &Path) {
    let found = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|p| p.exists());
    let busybox = found.expect("busybox is installed: run tools/setup.sh test");
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "var"] {
        std::fs::create_dir_all(root.join(dir)).expect("room on the rig");
    }
    std::fs::copy(busybox, root.join("bin/busybox")).expect("room on the rig");
    for name in ["sh", "cat", "echo", "id", "ls", "mkdir", "mv", "rm", "sync", "touch"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("room on the rig");
    }
    std::fs::write(root.join("usr/lib/os-release"), "ID=test\n").expect("room on the rig");
    std::os::unix::fs::symlink("../usr/lib/os-release", root.join("etc/os-release")).expect("room");
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("room on the rig");
}
