//! Memory control groups: which hierarchy counts memory here, groups of our own, what a group is charged for.
//!
//! The kernel charges a page of the cache to the group of the process that brought it in, and there it stays (design 11).
//! Both hierarchies are spoken: version 2 where its memory controller is on, else version 1. A memory controller that is
//! mounted nowhere is mounted in a directory of our own while it is used.
//!
//! Invariant: only groups that this module made are killed or removed. What it deliberately does not do: limits; moving
//! charges (no kernel can any more); single threads (a page goes to the group of the process, whatever thread faults).

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::mountinfo;

/// Why a memory group could not be had or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemcgError {
    /// No hierarchy has a memory controller.
    #[error(
        "no memory controller here: the kernel needs CONFIG_MEMCG, and booting without cgroup_disable=memory"
    )]
    NoController,
    /// The name can't be a group's.
    #[error("{name:?} is no name of a group: letters, digits, '-', '_' and '.', not beginning with '.'")]
    BadName {
        /// As given.
        name: String,
    },
    /// A file of the hierarchy could not be used.
    #[error("can't {what} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; run as root, with the cgroup file system writable"
        }
        io::ErrorKind::ResourceBusy => "; something still runs in it",
        _ => "",
    }
}

impl MemcgError {
    fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> MemcgError {
        MemcgError::Io { what, path: path.to_owned(), source: source.into() }
    }
}

/// Which interface the hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// `memory.stat` with `cache`, `memory.kmem.usage_in_bytes`.
    V1,
    /// `memory.stat` with `file`, `kernel`; `cgroup.kill`.
    V2,
}

/// The hierarchy that counts memory.
#[derive(Debug)]
pub struct Hierarchy {
    version: Version,
    top: PathBuf,
    /// Mounted by us, for as long as this lives.
    own_mount: Option<PathBuf>,
}

impl Hierarchy {
    /// The one that is mounted, else one mounted in a new directory below `scratch`.
    ///
    /// # Errors
    /// No memory controller, or not root.
    pub fn open(scratch: &Path) -> Result<Hierarchy, MemcgError> {
        if let Some(found) = Hierarchy::mounted()? {
            return Ok(found);
        }
        for version in [Version::V2, Version::V1] {
            if let Some(found) = Hierarchy::mount(version, scratch)? {
                return Ok(found);
            }
        }
        Err(MemcgError::NoController)
    }

    /// The one that is mounted, if any is.
    ///
    /// # Errors
    /// Mounts can't be read.
    pub fn mounted() -> Result<Option<Hierarchy>, MemcgError> {
        let mounts =
            mountinfo::read().map_err(|e| MemcgError::io("read", Path::new("/proc/self/mountinfo"), e))?;
        let found = mounts.into_iter().find_map(|mount| {
            let version = match mount.kind.as_str() {
                "cgroup2" if controls_memory(&mount.mount_point) => Version::V2,
                "cgroup" if mount.fs_options.split(|b| *b == b',').any(|o| o == b"memory") => Version::V1,
                _ => return None,
            };
            Some(Hierarchy { version, top: mount.mount_point, own_mount: None })
        });
        Ok(found)
    }

    fn mount(version: Version, scratch: &Path) -> Result<Option<Hierarchy>, MemcgError> {
        let at = scratch.join(format!("pagefold-cgroup-{}", std::process::id()));
        std::fs::create_dir(&at).map_err(|e| MemcgError::io("create", &at, e))?;
        let (kind, data) = match version {
            Version::V2 => ("cgroup2", None),
            Version::V1 => ("cgroup", Some(c"memory")),
        };
        if rustix::mount::mount("none", &at, kind, MountFlags::empty(), data).is_err() {
            let _ = std::fs::remove_dir(&at);
            return Ok(None);
        }
        let mounted = Hierarchy { version, top: at.clone(), own_mount: Some(at) };
        let usable = version == Version::V1 || controls_memory(&mounted.top);
        Ok(usable.then_some(mounted))
    }

    /// Which interface it has.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it is mounted.
    #[must_use]
    pub fn top(&self) -> &Path {
        &self.top
    }

    /// A group below the top, made unless it exists.
    ///
    /// # Errors
    /// A bad name; no permission; in version 2 processes in the top group of a container.
    pub fn group(&self, name: &str) -> Result<Memcg, MemcgError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(good) {
            return Err(MemcgError::BadName { name: name.to_owned() });
        }
        if self.version == Version::V2 {
            let control = self.top.join("cgroup.subtree_control");
            std::fs::write(&control, "+memory")
                .map_err(|e| MemcgError::io("turn memory on in", &control, e))?;
        }
        let path = self.top.join(name);
        match std::fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(MemcgError::io("create group", &path, e))
            }
            _ => Ok(Memcg { version: self.version, path }),
        }
    }

    /// Groups below the top whose name begins with `prefix`.
    ///
    /// # Errors
    /// The top can't be listed.
    pub fn groups(&self, prefix: &str) -> Result<Vec<Memcg>, MemcgError> {
        let list = std::fs::read_dir(&self.top).map_err(|e| MemcgError::io("list", &self.top, e))?;
        let ours = list.flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()));
        Ok(ours.map(|e| Memcg { version: self.version, path: e.path() }).collect())
    }

    /// The group that this process is in.
    ///
    /// # Errors
    /// `/proc/self/cgroup` can't be read or names none of this hierarchy.
    pub fn own(&self) -> Result<Memcg, MemcgError> {
        let file = Path::new("/proc/self/cgroup");
        let text = std::fs::read_to_string(file).map_err(|e| MemcgError::io("read", file, e))?;
        let relative = own_path(&text, self.version).ok_or(MemcgError::NoController)?;
        Ok(Memcg { version: self.version, path: self.top.join(relative.trim_start_matches('/')) })
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        if let Some(at) = self.own_mount.take() {
            let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(at);
        }
    }
}

fn controls_memory(top: &Path) -> bool {
    std::fs::read_to_string(top.join("cgroup.controllers"))
        .is_ok_and(|text| text.split_ascii_whitespace().any(|c| c == "memory"))
}

/// From the text of `/proc/self/cgroup`: lines of `number:controllers:path`, version 2 without controllers.
fn own_path(text: &str, version: Version) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let controllers = fields.nth(1)?;
        let path = fields.next()?;
        let this = match version {
            Version::V2 => controllers.is_empty(),
            Version::V1 => controllers.split(',').any(|c| c == "memory"),
        };
        this.then_some(path)
    })
}

/// What a group is charged for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Charge {
    /// Page cache of files; tmpfs and shared memory are not in it.
    pub file: u64,
    /// Anonymous memory.
    pub anon: u64,
    /// Kernel memory: slab, page tables, stacks.
    pub kernel: u64,
}

impl std::ops::AddAssign for Charge {
    fn add_assign(&mut self, other: Charge) {
        self.file += other.file;
        self.anon += other.anon;
        self.kernel += other.kernel;
    }
}

/// A memory group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memcg {
    version: Version,
    path: PathBuf,
}

impl Memcg {
    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that takes process ids; `0` written to it moves the writer.
    #[must_use]
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Its processes.
    ///
    /// # Errors
    /// The group is gone.
    pub fn processes(&self) -> Result<Vec<u32>, MemcgError> {
        let file = self.procs_file();
        let text = std::fs::read_to_string(&file).map_err(|e| MemcgError::io("read", &file, e))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// What it is charged for. The kernel adds up per-processor counts about every two seconds: figures of a moment ago may
    /// lack some dozens of pages.
    ///
    /// # Errors
    /// The group is gone.
    pub fn charge(&self) -> Result<Charge, MemcgError> {
        let file = self.path.join("memory.stat");
        let text = std::fs::read_to_string(&file).map_err(|e| MemcgError::io("read", &file, e))?;
        let mut charge = parse_stat(&text, self.version);
        if self.version == Version::V1 {
            let file = self.path.join("memory.kmem.usage_in_bytes");
            let text = std::fs::read_to_string(&file).map_err(|e| MemcgError::io("read", &file, e))?;
            charge.kernel = text.trim().parse().unwrap_or(0);
        }
        Ok(charge)
    }

    /// Moves this whole process into the group until the guard is dropped: what it brings into the cache meanwhile, in
    /// whatever thread, is charged here.
    ///
    /// # Errors
    /// No permission.
    pub fn enter(&self, hierarchy: &Hierarchy) -> Result<Entered, MemcgError> {
        let back = hierarchy.own()?;
        self.add(std::process::id())?;
        Ok(Entered { back })
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    /// No permission, no such process.
    pub fn add(&self, process: u32) -> Result<(), MemcgError> {
        let file = self.procs_file();
        std::fs::write(&file, process.to_string())
            .map_err(|e| MemcgError::io("move a process into", &file, e))
    }

    /// Kills all its processes and waits, at most `patience`, until none is left.
    ///
    /// # Errors
    /// Some are left.
    pub fn kill(&self, patience: Duration) -> Result<(), MemcgError> {
        let started = Instant::now();
        loop {
            let left = self.processes()?;
            if left.is_empty() {
                return Ok(());
            }
            if started.elapsed() > patience {
                return Err(MemcgError::io(
                    "empty",
                    &self.path,
                    io::Error::from(io::ErrorKind::ResourceBusy),
                ));
            }
            if self.version == Version::V1 || std::fs::write(self.path.join("cgroup.kill"), "1").is_err() {
                for process in left {
                    if let Some(pid) = rustix::process::Pid::from_raw(process.cast_signed()) {
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the group; what it was charged for goes to its parent.
    ///
    /// # Errors
    /// It has processes or groups of its own.
    pub fn remove(&self) -> Result<(), MemcgError> {
        std::fs::remove_dir(&self.path).map_err(|e| MemcgError::io("remove group", &self.path, e))
    }
}

fn parse_stat(text: &str, version: Version) -> Charge {
    let field = |wanted: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(wanted)?.strip_prefix(' ')?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let (file, anon) = match version {
        Version::V1 => ("cache", "rss"),
        Version::V2 => ("file", "anon"),
    };
    // tmpfs counts as file in both versions, and its pages are nobody's to share.
    Charge { file: field(file).saturating_sub(field("shmem")), anon: field(anon), kernel: field("kernel") }
}

/// This process is in another group than before; goes back when dropped.
#[derive(Debug)]
pub struct Entered {
    back: Memcg,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Err(error) = self.back.add(std::process::id()) {
            tracing::warn!("still in another memory group: {error}");
        }
    }
}

/// `Pss_File` of a process in bytes: its share of the file pages it has mapped; 0 when it is gone or may not be read.
#[must_use]
pub fn pss_file(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    kib_field(&text, "Pss_File:")
}

/// A line `Name:   123 kB` of a file in `/proc`, in bytes; 0 without one.
#[must_use]
pub fn kib_field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_understood() {
        let v1 = "cache 100\nrss 7\nshmem 40\nmapped_file 3\ntotal_cache 9999\n";
        assert_eq!(parse_stat(v1, Version::V1), Charge { file: 60, anon: 7, kernel: 0 });
        let v2 = "anon 7\nfile 100\nkernel 55\nkernel_stack 5\nshmem 40\nfile_mapped 8\n";
        assert_eq!(parse_stat(v2, Version::V2), Charge { file: 60, anon: 7, kernel: 55 });
        assert_eq!(parse_stat("garbage\nfile x\n", Version::V2), Charge::default());
    }

    #[test]
    fn lines_of_proc_are_understood() {
        let text = "Slab:  12 kB\nPss:   1 kB\nPss_File:    34 kB\n";
        assert_eq!(kib_field(text, "Pss_File:"), 34 << 10);
        assert_eq!(kib_field(text, "Rss:"), 0);
    }

    #[test]
    fn the_own_group_is_found() {
        let text = "9:name=systemd:/\n4:cpu,memory:/a/b:c\n0::/unified\n";
        assert_eq!(own_path(text, Version::V1), Some("/a/b:c"));
        assert_eq!(own_path(text, Version::V2), Some("/unified"));
        assert_eq!(own_path("x\n", Version::V1), None);
    }

    #[test]
    fn names_that_climb_are_refused() {
        let nowhere = Hierarchy { version: Version::V1, top: "/nonexistent".into(), own_mount: None };
        for name in ["", ".", "..", "a/b", ".x", "a b"] {
            assert!(matches!(nowhere.group(name), Err(MemcgError::BadName { .. })), "{name:?}");
        }
    }
}
