//! A container: a real program in a root, with mount and process namespaces and a memory group of its own.
//!
//! Invariant: a container never outlives its value (killed in `Drop`) nor this process (the kernel kills it then). What it
//! runs before the program itself (shell, mount, chroot) runs outside its memory group, so the group is charged for
//! nothing but the program. What it deliberately is not: a sandbox.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagefold_fsadapters::memcg::Memcg;

use super::BenchError;
use super::debian::tail;

/// Longest time a program may take until it answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Programs that containers run, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// CPython with the modules of a small service.
    Python,
    /// Node.js.
    Node,
    /// nginx, one worker.
    Nginx,
    /// Redis.
    Redis,
}

impl Program {
    /// All of them.
    pub const ALL: [Program; 4] = [Program::Python, Program::Node, Program::Nginx, Program::Redis];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Program::Python => "python3",
            Program::Node => "node",
            Program::Nginx => "nginx",
            Program::Redis => "redis",
        }
    }

    const fn command(self) -> &'static [&'static str] {
        match self {
            Program::Python => &["python3", "-c", PYTHON],
            Program::Node => &["node", "-e", NODE],
            Program::Nginx => &["nginx", "-e", "stderr", "-c", "/run/nginx.conf"],
            Program::Redis => &["redis-server", "--port", "0", "--unixsocket", "/run/app.sock", "--save", ""],
        }
    }
}

const PYTHON: &str = "
import asyncio, hashlib, http.client, json, logging, sqlite3, ssl, socket
s = socket.socket(socket.AF_UNIX)
s.bind('/run/app.sock')
s.listen()
while True:
    c, _ = s.accept()
    c.recv(64)
    c.sendall(b'+ok\\r\\n')
    c.close()
";

const NODE: &str = "
for (const m of ['http', 'https', 'crypto', 'zlib', 'stream', 'url']) require(m);
require('net').createServer(c => c.on('data', () => c.end('+ok\\r\\n'))).listen('/run/app.sock');
";

const NGINX_CONF: &str = "
user root; daemon off; worker_processes 1; pid /run/app.pid;
events { worker_connections 64; }
http { access_log off; server { listen unix:/run/app.sock; location / { return 200 ok; } } }
";

/// Runs in the new namespaces; then becomes the program. Only the last two steps happen in the memory group.
const SCRIPT: &str = r#"
    root=$1; run=$2; procs=$3; shift 3
    mount -t proc none "$root/proc"
    mount -t tmpfs -o mode=755,size=1m none "$root/dev"
    for d in null zero random urandom; do : > "$root/dev/$d"; mount --bind "/dev/$d" "$root/dev/$d"; done
    mount -t tmpfs -o size=16m none "$root/tmp"
    mount --bind "$run" "$root/run"
    [ $# -gt 0 ] || exit 0
    echo 0 > "$procs"
    exec chroot "$root" "$@"
"#;

/// A running container.
#[derive(Debug)]
pub(super) struct Container {
    program: Program,
    root: PathBuf,
    group: Memcg,
    /// Holds the socket; on the host's side.
    run: PathBuf,
    child: Child,
    log: File,
}

impl Container {
    /// Starts `program` in `root`. `run` becomes its `/run`, an empty directory is made of it first.
    ///
    /// Must be called from a thread that lives as long as the container: the kernel kills it when that thread ends.
    pub(super) fn start(
        program: Program,
        root: &Path,
        run: &Path,
        group: Memcg,
    ) -> Result<Container, BenchError> {
        let _ = std::fs::remove_dir_all(run);
        std::fs::create_dir_all(run).map_err(|e| BenchError::io("create", run, e))?;
        let conf = run.join("nginx.conf");
        if program == Program::Nginx {
            std::fs::write(&conf, NGINX_CONF).map_err(|e| BenchError::io("write", &conf, e))?;
        }
        let log = tempfile::tempfile_in(run).map_err(|e| BenchError::io("create a log in", run, e))?;
        let stderr = log.try_clone().map_err(|e| BenchError::io("open the log in", run, e))?;
        let child = launch(root, run, &group.procs_file(), program.command(), Stdio::from(stderr))?;
        Ok(Container { program, root: root.to_owned(), group, run: run.to_owned(), child, log })
    }

    pub(super) fn group(&self) -> &Memcg {
        &self.group
    }

    /// Waits until the program answers a request.
    pub(super) fn wait_for_answer(&mut self, cancel: &AtomicBool) -> Result<(), BenchError> {
        let started = Instant::now();
        loop {
            let error = match ask(&self.run) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if cancel.load(Ordering::Relaxed) {
                return Err(BenchError::Cancelled);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(format!("ended ({status})")));
            }
            if started.elapsed() > PATIENCE {
                return Err(self.failed(format!("did not answer in {} s ({error})", PATIENCE.as_secs())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn failed(&mut self, why: String) -> BenchError {
        let log = tail(&mut self.log);
        BenchError::Container { program: self.program.name(), root: self.root.clone(), why, log }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // The group first: what unshare started may have left unshare behind.
        if let Err(error) = self.group.kill(Duration::from_secs(10)) {
            eprintln!("pagefold: {error}");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.group.remove();
        let _ = std::fs::remove_dir_all(&self.run);
    }
}

/// Runs the launching script without a program in `root`, an empty directory: then the host's own programs that it
/// needs are cached and no container is charged for them.
pub(super) fn warm_launcher(root: &Path, run: &Path) -> Result<(), BenchError> {
    for dir in [root.join("proc"), root.join("dev"), root.join("tmp"), root.join("run"), run.to_owned()] {
        std::fs::create_dir_all(&dir).map_err(|e| BenchError::io("create", &dir, e))?;
    }
    let mut child = launch(root, run, Path::new("/dev/null"), &[], Stdio::inherit())?;
    let status = child.wait().map_err(|e| BenchError::io("wait for", Path::new("unshare"), e))?;
    let chroot = Command::new("chroot").arg("--version").stdout(Stdio::null()).status();
    match (status.success(), chroot) {
        (true, Ok(_)) => Ok(()),
        (true, Err(e)) => Err(BenchError::io("run", Path::new("chroot"), e)),
        (false, _) => {
            let e = io::Error::other(format!("{status}: are unshare, setpriv and mount of util-linux here?"));
            Err(BenchError::io("start a container in", root, e))
        }
    }
}

fn launch(
    root: &Path,
    run: &Path,
    procs: &Path,
    command: &[&str],
    stderr: Stdio,
) -> Result<Child, BenchError> {
    use std::os::unix::process::CommandExt;
    // The kernel kills unshare when we die, and with --kill-child the container with it. A process group of its own, so
    // that Ctrl-C reaches only us.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"])
        .args(["/bin/sh", "-ec", SCRIPT, "pagefold-container"])
        .args([root, run, procs])
        .args(command)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .process_group(0)
        .spawn()
        .map_err(|e| BenchError::io("start", Path::new("setpriv"), e))
}

/// One request and at least one byte of an answer, through the socket in `run`.
fn ask(run: &Path) -> io::Result<()> {
    // Through the descriptor: a socket's path may have 107 bytes, a temporary directory's more.
    let dir = File::open(run)?;
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/app.sock", dir.as_raw_fd()))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"PING / HTTP/1.0\r\n\r\n")?;
    stream.read_exact(&mut [0; 1])
}
