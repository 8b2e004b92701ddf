//! What the tests that run the binary share: running it, reading its report, making files whose extents are known.
//!
//! Invariant: a helper fails loudly where the host can't do what the test needs. What it deliberately does not do:
//! compute expected figures; each test states its own.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod view;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pagefold_testfs::rig::{LoopRig, RigFs};
use serde_json::Value;

pub const PAGE: u64 = 4096;

/// One run of `pagefold scan --format json`.
#[derive(Debug)]
pub struct Scan {
    pub json: Value,
    pub code: i32,
}

/// The binary under test.
pub fn pagefold() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    command.stdin(Stdio::null()).env_remove("PAGEFOLD_LOG");
    command
}

/// Scans `roots`; whatever the tree, stdout is one JSON report and stderr is silent.
pub fn scan(roots: &[&Path], extra: &[&str]) -> Scan {
    let mut command = pagefold();
    command.args(["scan", "--format", "json"]).args(extra).args(roots);
    Scan::of(&command.output().expect("the binary runs"))
}

impl Scan {
    pub fn of(output: &Output) -> Scan {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.is_empty(), "silent when piped: {stderr}");
        let code = output.status.code().unwrap_or_else(|| panic!("ended by a signal: {:?}", output.status));
        let json = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("no JSON: {e}: {}", String::from_utf8_lossy(&output.stdout)));
        let scan = Scan { json, code };
        scan.check_shape();
        scan
    }

    /// What holds for every report, however hard its input.
    fn check_shape(&self) {
        assert_eq!(self.json["schema"], "pagefold.scan/1");
        let roots = self.json["roots"].as_array().expect("roots");
        for sizes in roots.iter().chain([&self.json["totals"]]) {
            let get = |field: &str| sizes[field].as_u64().unwrap_or_else(|| panic!("{field}: {sizes}"));
            assert!(get("mergeable_file_bytes") <= get("mergeable_page_bytes"), "{sizes}");
            assert!(get("mergeable_page_bytes") + get("undecided_bytes") <= get("cache_bytes"), "{sizes}");
            assert!(get("resident_duplicate_bytes") <= get("resident_bytes"), "{sizes}");
        }
        for notes in [self.errors(), self.skipped()] {
            assert!(notes.windows(2).all(|n| n[0] != n[1]), "said twice: {notes:?}");
        }
        let complete = self.errors().is_empty() && self.json["partial"] == false;
        assert_eq!(complete, self.code == 0, "exit code {} and errors {:?}", self.code, self.errors());
    }

    /// A field of `totals`.
    pub fn total(&self, field: &str) -> u64 {
        self.json["totals"][field].as_u64().unwrap_or_else(|| panic!("{field} in {}", self.json))
    }

    /// A field of `roots[index]`.
    pub fn root(&self, index: usize, field: &str) -> u64 {
        self.json["roots"][index][field].as_u64().unwrap_or_else(|| panic!("{field} in {}", self.json))
    }

    /// Compares fields of `totals`, all at once.
    #[track_caller]
    pub fn expect(&self, wanted: &[(&str, u64)]) {
        let found: Vec<_> = wanted.iter().map(|(field, _)| (*field, self.total(field))).collect();
        assert_eq!(found, wanted, "{:#}", self.json);
    }

    /// (path, error) of each error.
    pub fn errors(&self) -> Vec<(String, String)> {
        self.notes("errors", "error")
    }

    /// (path, reason) of each thing left out.
    pub fn skipped(&self) -> Vec<(String, String)> {
        self.notes("skipped", "reason")
    }

    fn notes(&self, list: &str, text: &str) -> Vec<(String, String)> {
        let word = |note: &Value, field: &str| note[field].as_str().expect("text").to_owned();
        let notes = self.json[list].as_array().expect("a list");
        notes.iter().map(|n| (word(n, "path"), word(n, text))).collect()
    }

    /// Done, nothing missing.
    #[track_caller]
    pub fn expect_clean(&self) {
        assert_eq!((self.code, self.errors()), (0, vec![]));
    }
}

/// A file system of its own; the test fails, with instructions, where there is none to be had.
pub fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 512 << 20).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

/// Makes directory `name` in `home`.
pub fn dir(home: &Path, name: &str) -> PathBuf {
    let path = home.join(name);
    fs::create_dir_all(&path).expect("a directory");
    path
}

/// Bytes that repeat nowhere, not even compressed: no two pages of any two seeds are equal.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// A file of `bytes` bytes of noise.
pub fn write(path: &Path, seed: u64, bytes: usize) {
    fs::write(path, noise(seed, bytes)).expect("written");
}

/// A reflink copy.
pub fn reflink(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).expect("source"), File::create(to).expect("copy"));
    rustix::fs::ioctl_ficlone(&to, &from).expect("this file system can reflink");
}

/// Overwrites one page with noise, through the cache.
pub fn overwrite_page(path: &Path, page: u64, seed: u64) {
    let file = File::options().write(true).open(path).expect("writable");
    file.write_all_at(&noise(seed, PAGE as usize), page * PAGE).expect("written");
}

/// Writes back everything on `path`'s file system.
pub fn sync(path: &Path) {
    rustix::fs::syncfs(File::open(path).expect("opens")).expect("synced");
}

/// Pages of `path` that are (cached, dirty or under writeback), as the kernel counts them.
pub fn cached_and_dirty(path: &Path) -> (u64, u64) {
    let file = File::open(path).expect("opens");
    let stat =
        pagefold_sys::cache::cachestat(file.as_fd(), 0, 0).expect("this test needs cachestat (Linux 6.5)");
    (stat.nr_cache, stat.nr_dirty + stat.nr_writeback)
}

/// Runs a program that the test can't do without.
pub fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("this test needs the program {program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A mount that goes with the value.
#[derive(Debug)]
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// `mount ARGS AT`, after making directory `at`.
    pub fn new(args: &[&str], at: &Path) -> Mounted {
        fs::create_dir_all(at).expect("a mount point");
        let mut all: Vec<&std::ffi::OsStr> = args.iter().map(std::ffi::OsStr::new).collect();
        all.push(at.as_os_str());
        run("mount", &all);
        Mounted(at.to_owned())
    }

    /// Mounts one file over another.
    pub fn file(what: &Path, at: &Path) -> Mounted {
        run("mount", &["--bind".as_ref(), what.as_os_str(), at.as_os_str()]);
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Starts a program that this process has written: it can't be executed while a child that another test is just starting has a copy of the
/// descriptor that it was written by.
pub fn start_written<T>(mut start: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let started = std::time::Instant::now();
    loop {
        match start() {
            Err(e)
                if e.kind() == std::io::ErrorKind::ExecutableFileBusy && started.elapsed().as_secs() < 30 =>
            {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// The binary where any user may run it: the build directory may be closed to others.
pub fn public_binary(home: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = home.join("pagefold-for-all");
    fs::copy(env!("CARGO_BIN_EXE_pagefold"), &path).expect("copied");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    path
}

/// Scans as user and group `id`.
pub fn scan_as(id: u32, binary: &Path, roots: &[&Path], extra: &[&str]) -> Scan {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(binary);
    command.uid(id).gid(id).current_dir("/").stdin(Stdio::null());
    command.args(["scan", "--format", "json"]).args(extra).args(roots);
    Scan::of(&start_written(|| command.output()).expect("the binary runs as another user"))
}

/// Writes `bytes` bytes of noise at `offset` of an existing or new file, leaving holes.
pub fn write_at(path: &Path, offset: u64, seed: u64, bytes: usize) {
    let file = File::options().write(true).create(true).truncate(false).open(path).expect("writable");
    file.write_all_at(&noise(seed, bytes), offset).expect("written");
}

/// Appends to a file.
pub fn append(path: &Path, bytes: &[u8]) {
    File::options().append(true).open(path).expect("writable").write_all(bytes).expect("written");
}
