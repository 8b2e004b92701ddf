//! Probes of the file system at a path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use pagefold_sys::cache;
use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_sys::probe;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{Capability, Check, PathReport, State, suffices};
use crate::fsid;
use crate::reflink;

const OPEN: Capability = Capability {
    name: "open",
    since: "any",
    needed_for: "everything",
    without: "the path is reported as an error",
    required: true,
};
const IDENTITY: Capability = Capability {
    name: "physical-identity",
    since: "any",
    needed_for: "scan: equal extents mean equal pages",
    without: "scan reports every page as undecided; scan --content reads and compares",
    required: true,
};
const FIEMAP: Capability = Capability {
    name: "fiemap",
    since: "2.6.28",
    needed_for: "scan: where a file's blocks are, without reading them",
    without: "scan reports every page as undecided; scan --content reads and compares",
    required: true,
};
const REFLINK: Capability = Capability {
    name: "reflink",
    since: "4.5 (btrfs 2.6.29, XFS 4.9)",
    needed_for: "anchors, seal, farm, and turning equal content into equal extents",
    without: "scan works; nothing can be made to share on disk",
    required: false,
};
const LEASE: Capability = Capability {
    name: "lease",
    since: "2.4",
    needed_for: "merged mappings: hearing of a writer before he writes",
    without: "mappings of files on this file system are not merged",
    required: false,
};
const DIRECT: Capability = Capability {
    name: "direct-io",
    since: "2.4",
    needed_for: "scan --content: reading without the page cache",
    without: "reads go through the cache and what they brought in is dropped again",
    required: false,
};

/// Tries everything at `path`.
pub(super) fn report(path: &Path) -> PathReport {
    let mut report =
        PathReport { path: path.to_owned(), file_system: String::new(), checks: Vec::new(), can_scan: false };
    let opened = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    );
    let dir = match opened {
        Ok(dir) => dir,
        Err(errno) => {
            report.checks.push(Check::tried(OPEN, Err::<&str, _>(errno.into())));
            return report;
        }
    };
    report.checks.push(Check::new(OPEN, State::Yes, "readable directory"));
    match fsid::describe(dir.as_fd()) {
        Ok(facts) => {
            let (state, detail) = match facts.description.why_not {
                None => (State::Yes, format!("addresses of {} are unique", facts.description.kind)),
                Some(why) => (State::No, why),
            };
            report.file_system = facts.description.kind;
            report.checks.push(Check::new(IDENTITY, state, detail));
        }
        Err(error) => report.checks.push(Check::new(IDENTITY, State::No, error.to_string())),
    }
    report.checks.extend(file_checks(dir.as_fd()));
    report.can_scan = suffices(&report.checks);
    report
}

fn file_checks(dir: BorrowedFd<'_>) -> Vec<Check> {
    let scratch = match scratch(dir) {
        Ok(scratch) => scratch,
        Err(error) => return without_scratch(dir, &error),
    };
    let reader = reopened(&scratch, OFlags::RDONLY);
    let lease = reader.and_then(|reader| {
        // A lease is refused while anybody, we included, has the file open for writing.
        drop(scratch);
        probe::read_lease(reader.as_fd())
    });
    let scratch = self::scratch(dir);
    let file = match scratch {
        Ok(file) => file,
        Err(error) => return without_scratch(dir, &error),
    };
    let clone = self::scratch(dir)
        .and_then(|dest| reflink::clone_file(&file, &dest).map_err(|e| io::Error::other(e.to_string())));
    let direct = reopened(&file, OFlags::RDONLY | OFlags::DIRECT);
    vec![
        Check::tried(FIEMAP, extents(file.as_fd())),
        Check::tried(REFLINK, clone.map(|()| "cloned an unnamed file")),
        Check::tried(LEASE, lease.map(|()| "took a read lease and gave it back")),
        Check::tried(DIRECT, direct.map(|_| "opened with O_DIRECT")),
    ]
}

/// The probes for a place where nothing can be written: an existing file serves for the one that is required.
fn without_scratch(dir: BorrowedFd<'_>, error: &io::Error) -> Vec<Check> {
    let why = format!("no unnamed file can be made here: {error}");
    let fiemap = match some_file(dir) {
        Some(file) => Check::tried(FIEMAP, extents(file.as_fd())),
        None => Check::new(FIEMAP, State::NotTried, why.clone()),
    };
    let others = [REFLINK, LEASE, DIRECT].map(|c| Check::new(c, State::NotTried, why.clone()));
    std::iter::once(fiemap).chain(others).collect()
}

/// An unnamed file of two pages: nothing to clean up, however we end.
///
/// Not on overlayfs: there even an unnamed file makes the kernel copy its directory up, for good (`ovl_tmpfile`).
fn scratch(dir: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const OVERLAYFS_MAGIC: u32 = 0x794c_7630;
    if rustix::fs::fstatfs(dir)?.f_type as u32 == OVERLAYFS_MAGIC {
        return Err(io::Error::other("on overlayfs that would change the upper layer"));
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, c".", flags, Mode::RUSR | Mode::WUSR)?;
    rustix::io::pwrite(&file, &[0xa5; 8192], 0)?;
    Ok(file)
}

fn reopened(file: &OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

fn extents(file: BorrowedFd<'_>) -> io::Result<String> {
    let mut count = 0;
    // No sync: the file may be somebody's. A new one then has no addresses yet, but a map all the same.
    read_extents(file, u64::MAX, Sync::No, |_| count += 1)?;
    let dirty = cache::cachestat(file, 0, 0).map_or(0, |s| s.nr_dirty);
    let note = if dirty > 0 { " (not yet written)" } else { "" };
    Ok(format!("{count} extent(s) told{note}"))
}

/// A regular file in `dir`, not looking far.
fn some_file(dir: BorrowedFd<'_>) -> Option<OwnedFd> {
    const ENTRIES_MAX: usize = 1000;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let entries = rustix::fs::Dir::read_from(dir).ok()?;
    for entry in entries.take(ENTRIES_MAX).flatten().filter(|e| e.file_type().is_file()) {
        let opened = match rustix::fs::openat(dir, entry.file_name(), flags | OFlags::NOATIME, Mode::empty())
        {
            Err(Errno::PERM) => rustix::fs::openat(dir, entry.file_name(), flags, Mode::empty()),
            other => other,
        };
        if let Ok(file) = opened {
            return Some(file);
        }
    }
    None
}
