//! Probes of the kernel, with no file system in particular.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use pagefold_sys::uring::Ring;
use pagefold_sys::{cache, handle, probe};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::FsOpenFlags;

use super::{Capability, Check, State};

const fn optional(
    name: &'static str,
    since: &'static str,
    needed_for: &'static str,
    without: &'static str,
) -> Capability {
    Capability { name, since, needed_for, without, required: false }
}

const CACHESTAT: Capability = Capability {
    name: "cachestat",
    since: "6.5",
    needed_for: "scan: resident pages, and that no page is dirty (a dirty file's extents say nothing)",
    without: "scan can't trust extents and reports them as undecided; scan --content reads; mincore tells residency",
    required: true,
};
const MINCORE: Capability = optional(
    "mincore",
    "2.4",
    "scan: which pages of a partly cached file are resident",
    "such files count as of unknown residency",
);
const CACHE_OF_OTHERS: Capability = optional(
    "cache-of-others",
    "5.2 (mincore), 6.15 (cachestat)",
    "scan: cache state of files that this user neither owns nor may write to (needs CAP_FOWNER)",
    "such files are undecided, their residency is unknown",
);
const IO_URING: Capability = optional(
    "io_uring",
    "5.6",
    "scan --content: reads in flight while pages are hashed",
    "plain reads on more threads, slower",
);
const DONT_CACHE: Capability = optional(
    "rwf-dontcache",
    "6.14",
    "scan --content: cached reads that clean up after themselves",
    "pages that a read brought in are dropped with posix_fadvise",
);
const HANDLES: Capability = optional(
    "handle-fid",
    "6.5",
    "scan on overlayfs: the real inode behind a file (6.6 for overlayfs itself)",
    "files on overlayfs have no physical identity",
);
const OVERLAY_DATA: Capability = optional(
    "overlay-data-only",
    "6.5 (one option a layer: 6.7)",
    "sealed views: data of many roots from one set of anchors",
    "seal and mount are not offered",
);
const EROFS_FILE: Capability = optional(
    "erofs-file-backed",
    "6.12",
    "sealed views: metadata images, mounted from their files",
    "views can't be mounted",
);
const FUSE_PASSTHROUGH: Capability = optional(
    "fuse-passthrough",
    "6.9",
    "views whose files are decided at open, with native reads",
    "sealed views by overlayfs only",
);
const UFFD_WP: Capability = optional(
    "userfaultfd-wp",
    "5.7",
    "anonymous merge: write protection around the swap of a page",
    "arenas are left to the kernel's KSM",
);
const UFFD_MOVE: Capability = optional(
    "userfaultfd-move",
    "6.8",
    "anonymous merge: pages in use for I/O are detected",
    "write protection and explicit pins instead",
);
const KSM: Capability = optional(
    "ksm",
    "2.6.32",
    "ksm commands: the kernel's own merging of anonymous memory",
    "only arenas handed to pagefold are merged",
);
const KSM_PROCESS: Capability = optional(
    "ksm-process",
    "6.4",
    "ksm commands: merging switched on for a whole process",
    "only what a program itself advised is merged",
);

/// Tries everything.
pub(super) fn checks() -> Vec<Check> {
    let scratch = rustix::fs::memfd_create(c"pagefold-doctor", MemfdFlags::CLOEXEC).map_err(io::Error::from);
    let scratch = scratch.and_then(|fd| {
        rustix::io::pwrite(&fd, &[1; 8192], 0)?;
        Ok(fd)
    });
    let with = |probe: fn(&OwnedFd) -> io::Result<String>| match &scratch {
        Ok(fd) => probe(fd),
        Err(error) => {
            Err(error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error))
        }
    };
    let uffd = probe::userfaultfd_features();
    vec![
        Check::tried(CACHESTAT, with(cachestat)),
        Check::tried(MINCORE, with(mincore)),
        cache_of_others(),
        Check::tried(IO_URING, Ring::new(8).map(|_| "made a ring that opens and reads")),
        dont_cache(),
        Check::tried(HANDLES, root_handle()),
        Check::tried(OVERLAY_DATA, overlay_data_only()),
        erofs_file_backed(),
        fuse_passthrough(),
        feature(UFFD_WP, &uffd, probe::UFFD_WP),
        feature(UFFD_MOVE, &uffd, probe::UFFD_MOVE),
        ksm(),
        Check::tried(
            KSM_PROCESS,
            probe::ksm_process_merge()
                .map(|on| if on { "on for this process" } else { "off for this process" }),
        ),
    ]
}

fn cachestat(fd: &OwnedFd) -> io::Result<String> {
    let counted = cache::cachestat(fd.as_fd(), 0, 0)?.nr_cache;
    Ok(format!("counted {counted} pages of a scratch file"))
}

fn mincore(fd: &OwnedFd) -> io::Result<String> {
    let mut counted = 0;
    cache::mincore(fd.as_fd(), 8192, |_, pages| counted += pages)?;
    Ok(format!("found {counted} pages of a scratch file"))
}

/// Where the kernel would lie or refuse: asked of an owner who is nobody's user.
fn cache_of_others() -> Check {
    const SOMEBODY_ELSE: u32 = u32::MAX - 1;
    if cache::residency_known_for_owner(SOMEBODY_ELSE) {
        Check::new(CACHE_OF_OTHERS, State::Yes, "CAP_FOWNER is effective")
    } else {
        Check::new(CACHE_OF_OTHERS, State::NotPermitted, "only of files that this user owns or may write to")
    }
}

/// Reads one byte of our own program: there is no file system in particular to ask.
fn dont_cache() -> Check {
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(pagefold_sys::uring::RWF_DONTCACHE);
    let tried = rustix::fs::open("/proc/self/exe", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|exe| rustix::io::preadv2(&exe, &mut [io::IoSliceMut::new(&mut [0])], 0, flags));
    match tried {
        Ok(_) => Check::new(DONT_CACHE, State::Yes, "read a byte of this program"),
        // The kernel may have it and the file system of this program may not.
        Err(Errno::OPNOTSUPP) => {
            Check::new(DONT_CACHE, State::No, "not on the file system that holds this program, or nowhere")
        }
        Err(errno) => Check::tried(DONT_CACHE, Err::<&str, _>(errno.into())),
    }
}

fn root_handle() -> io::Result<String> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let handle = handle::name_to_handle(root.as_fd(), c"")?;
    Ok(format!("the root directory has one of {} bytes", handle.bytes.len()))
}

/// Makes an overlay of two directories that exist everywhere, read-only, and never mounts it.
fn overlay_data_only() -> io::Result<&'static str> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(fs.as_fd(), "metacopy", "on")?;
    rustix::mount::fsconfig_set_string(fs.as_fd(), "lowerdir+", "/usr")?;
    rustix::mount::fsconfig_set_string(fs.as_fd(), "datadir+", "/etc")?;
    rustix::mount::fsconfig_create(fs.as_fd())?;
    Ok("made an overlay with a data-only layer, never mounted")
}

/// Offers files that are no EROFS images as images: a kernel that reads files says "no image" (`EINVAL`), another one "no block
/// device" (`ENOTBLK`).
fn erofs_file_backed() -> Check {
    let exe = std::env::current_exe().unwrap_or_default();
    let mut last = Errno::NOTBLK;
    // tmpfs and overlayfs files can't back one: try some that live elsewhere.
    for candidate in [exe.as_path(), Path::new("/etc/passwd"), Path::new("/bin/sh")] {
        last = match try_erofs(candidate) {
            Err(errno) => errno,
            Ok(()) => Errno::INVAL,
        };
        match last {
            Errno::INVAL | Errno::UCLEAN => {
                return Check::new(EROFS_FILE, State::Yes, "the kernel looked into a file for an image");
            }
            Errno::NOTBLK => {}
            _ => break,
        }
    }
    Check::tried(EROFS_FILE, Err::<&str, _>(last.into()))
}

fn try_erofs(file: &Path) -> Result<(), Errno> {
    let fs = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(fs.as_fd(), "source", file)?;
    rustix::mount::fsconfig_set_flag(fs.as_fd(), "ro")?;
    rustix::mount::fsconfig_create(fs.as_fd())
}

/// Makes a FUSE file system, reads the kernel's greeting, and lets both go: never mounted, never answered.
fn fuse_passthrough() -> Check {
    match fuse_init_flags() {
        Ok(flags) if flags & (1 << 37) != 0 => {
            Check::new(FUSE_PASSTHROUGH, State::Yes, "offered in the kernel's INIT message")
        }
        Ok(_) => Check::new(FUSE_PASSTHROUGH, State::No, "not offered in the kernel's INIT message"),
        Err(error) => Check::tried(FUSE_PASSTHROUGH, Err::<&str, _>(error)),
    }
}

/// The flags of `FUSE_INIT`, both halves.
fn fuse_init_flags() -> io::Result<u64> {
    let device =
        rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let number = device.as_raw_fd().to_string();
    let me = rustix::process::geteuid().as_raw().to_string();
    let group = rustix::process::getegid().as_raw().to_string();
    let options = [("fd", &*number), ("rootmode", "40000"), ("user_id", &*me), ("group_id", &*group)];
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(fs.as_fd(), key, value)?;
    }
    rustix::mount::fsconfig_create(fs.as_fd())?;
    // The message is queued before `create` returns. The buffer must hold FUSE_MIN_READ_BUFFER.
    let mut message = [0; 8192];
    let length = rustix::io::read(&device, &mut message)?;
    let word = |at: usize| -> u64 {
        message[..length]
            .get(at..at + 4)
            .map_or(0, |b| u64::from(u32::from_ne_bytes([b[0], b[1], b[2], b[3]])))
    };
    // fuse_in_header is 40 bytes; fuse_init_in: major, minor, max_readahead, flags, flags2.
    const FLAGS: usize = 40 + 12;
    const FUSE_INIT_EXT: u64 = 1 << 30;
    let low = word(FLAGS);
    Ok(if low & FUSE_INIT_EXT != 0 { low | word(FLAGS + 4) << 32 } else { low })
}

fn feature(capability: Capability, features: &io::Result<u64>, bit: u64) -> Check {
    match features {
        Ok(features) if features & bit != 0 => Check::new(capability, State::Yes, "offered by UFFDIO_API"),
        Ok(_) => Check::new(capability, State::No, "not offered by UFFDIO_API"),
        Err(error) => {
            let copy = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
            Check::tried(capability, Err::<&str, _>(copy))
        }
    }
}

fn ksm() -> Check {
    match std::fs::read_to_string("/sys/kernel/mm/ksm/run") {
        Ok(run) => Check::new(KSM, State::Yes, format!("present, run={}", run.trim())),
        Err(error) => Check::tried(KSM, Err::<&str, _>(error)),
    }
}
