//! The programs a rig needs, and errors that tell how to get what is missing.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a rig (or a farm's own file system) could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RigError {
    /// The user may not mount.
    #[error("can't {what}: not root. Run as root (or in a privileged container with /dev/loop-control)")]
    NotRoot {
        /// What was wanted.
        what: &'static str,
    },
    /// A program is not installed.
    #[error("can't find the program {program}: install package {package} (apt-get install {package})")]
    NoProgram {
        /// Its name.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program failed.
    #[error("{command} failed ({status}): {stderr}{hint}")]
    Program {
        /// The command line.
        command: String,
        /// Exit status in words.
        status: String,
        /// What it said.
        stderr: String,
        /// The way out where one is known; may be empty.
        hint: &'static str,
    },
    /// A system call failed.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

impl RigError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> RigError {
        RigError::Io { what, path: path.to_owned(), source }
    }
}

/// The file systems that fixtures tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KnownFs {
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// Any other, by its `statfs` magic.
    Other(u64),
}

/// What file system `path` is on, by `statfs`.
///
/// # Errors
/// `path` is not there or not reachable.
pub fn fs_kind(path: &Path) -> io::Result<KnownFs> {
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    Ok(match rustix::fs::statfs(path)?.f_type as u64 {
        XFS => KnownFs::Xfs,
        BTRFS => KnownFs::Btrfs,
        other => KnownFs::Other(other),
    })
}

pub(crate) fn require_root(what: &'static str) -> Result<(), RigError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(RigError::NotRoot { what }) }
}

/// Runs `program` to its end; its output.
pub(crate) fn run<'a>(
    program: &'static str,
    package: &'static str,
    args: impl IntoIterator<Item = &'a OsStr>,
) -> Result<Vec<u8>, RigError> {
    let mut command = Command::new(program);
    // mkfs and friends live in sbin, which a user's or a service's PATH often lacks.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    let joined: OsString = std::env::join_paths(dirs).unwrap_or(path);
    command.env("PATH", joined).env("LC_ALL", "C").args(args).stdin(Stdio::null());
    let output = match command.output() {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(RigError::NoProgram { program, package });
        }
        Err(e) => return Err(RigError::io("run", Path::new(program), e)),
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(RigError::Program {
        command: format!("{command:?}")
            .split_once(program)
            .map_or(program.to_owned(), |(_, args)| format!("{program}{}", args.replace('"', ""))),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        hint: hint(program),
    })
}

fn hint(program: &str) -> &'static str {
    match program {
        "losetup" => ". Are there loop devices? Try: modprobe loop; in a container pass /dev/loop-control",
        "mount" => ". Has this kernel the file system (grep it in /proc/filesystems; modprobe it)?",
        _ => "",
    }
}

/// Attaches `image` to a free loop device, with direct I/O where the backing file system can.
pub(super) fn attach_loop(image: &Path) -> Result<(PathBuf, bool), RigError> {
    let direct = ["--find", "--show", "--direct-io=on"].map(OsStr::new);
    let attempt = run("losetup", "mount", direct.into_iter().chain([image.as_os_str()]));
    let output = match attempt {
        Err(RigError::Program { .. }) => {
            let buffered = ["--find", "--show"].map(OsStr::new);
            // A failed attempt may leave the device attached without direct I/O.
            detach_loops_of(image);
            run("losetup", "mount", buffered.into_iter().chain([image.as_os_str()]))?
        }
        other => other?,
    };
    let device = PathBuf::from(OsString::from_vec(output.trim_ascii().to_vec()));
    Ok((device.clone(), is_direct(&device)))
}

fn is_direct(device: &Path) -> bool {
    device.file_name().is_some_and(|name| {
        let flag = Path::new("/sys/block").join(name).join("loop/dio");
        std::fs::read(flag).is_ok_and(|text| text.trim_ascii() == b"1")
    })
}

/// Whether a loop device is on `image`.
pub(super) fn has_loops(image: &Path) -> bool {
    run("losetup", "mount", [OsStr::new("-j"), image.as_os_str()])
        .is_ok_and(|found| !found.trim_ascii().is_empty())
}

/// Frees every loop device on `image` (mounted ones go with their mount).
pub(crate) fn detach_loops_of(image: &Path) {
    let Ok(found) = run("losetup", "mount", [OsStr::new("-j"), image.as_os_str()]) else {
        return;
    };
    for line in found.split(|b| *b == b'\n') {
        if let Some(end) = line.iter().position(|b| *b == b':') {
            let device = OsString::from_vec(line[..end].to_vec());
            let _ = run("losetup", "mount", [OsStr::new("-d"), device.as_os_str()]);
        }
    }
}
