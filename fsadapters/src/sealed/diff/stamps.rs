//! Whether anybody changed a layer since it was compared or made, without reading all of it again.
//!
//! `diff.stamps` beside the list: of each entry, in the list's order, inode number and change time; the list's digest; BLAKE3 of all that. Every change
//! of an inode (bytes, owner, mode, times, attributes, links, names in a directory) moves its change time, which no program can set. So a layer
//! with the same numbers and change times is the one that was there when the stamps were taken.
//!
//! Limits: who sets the clock back first, or changes the disk below the file system, is not seen by stamps; [`super::open_as`] (`verify`, sealing again)
//! compares all. Change times have the clock's tick, so stamps are taken only when the newest is older than that ([`settled`]).
//!
//! Invariant: stamps allow to leave the comparison out and never say that something is damaged; any doubt (none there, not these, an error) means it takes
//! place. What it deliberately does not do: make them durable before the layer is (who publishes syncs; [`keep`] after healing syncs first).

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags, Stat};

use super::{DIFF, DIR_FLAGS, Plan, STAMPS};
use crate::sealed::tree::EntryId;
use crate::store::ContentHash;

const MAGIC: &[u8; 8] = b"pfstamp1";
const HASH: usize = 32;
const STAMP: usize = 20;
/// Twice the longest tick of a kernel's clock (100 Hz): two changes that far apart have different change times.
const TICK: Duration = Duration::from_millis(20);
/// A change time so much later than now comes from another clock.
const FUTURE: Duration = Duration::from_secs(1);
const TRIES: usize = 4;

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Stamp {
    ino: u64,
    ctime: (i64, u32),
}

impl Stamp {
    fn of(stat: &Stat) -> Stamp {
        Stamp { ino: stat.st_ino, ctime: (stat.st_ctime, u32::try_from(stat.st_ctime_nsec).unwrap_or(0)) }
    }

    fn time(&self) -> SystemTime {
        let since = Duration::new(u64::try_from(self.ctime.0).unwrap_or(0), self.ctime.1.min(999_999_999));
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }
}

/// Of each entry of a list.
#[derive(PartialEq, Eq)]
pub(super) struct Stamps(Vec<Stamp>);

/// What is there now. An error where a name is missing, or a path is too long for one call.
///
/// No directory is listed or opened: a name that comes moves the change time of its directory. What is reached by way of something else than the
/// directories of the list differs there already.
pub(super) fn take(top: BorrowedFd<'_>, plan: &Plan<'_>) -> io::Result<Stamps> {
    let mut stamps = vec![Stamp::default(); plan.tree.entries.len()];
    if let Some(first) = stamps.first_mut() {
        *first = Stamp::of(&rustix::fs::fstat(top)?);
    }
    let mut dirs = vec![(EntryId(0), Vec::new())];
    while let Some((dir, path)) = dirs.pop() {
        let mut at = path;
        let length = at.len();
        for entry in plan.children(dir).iter().copied() {
            at.truncate(length);
            at.extend_from_slice(plan.name(entry));
            let stat = rustix::fs::statat(top, &*at, AtFlags::SYMLINK_NOFOLLOW)?;
            stamps[entry.0 as usize] = Stamp::of(&stat);
            if plan.is_dir(entry) {
                dirs.push((entry, [&at, &b"/"[..]].concat()));
            }
        }
    }
    Ok(Stamps(stamps))
}

/// What is there now, when later changes would have later times; waits for that some milliseconds at most. `None`: no stamps then.
pub(super) fn settled(root_dir: &Path, plan: &Plan<'_>) -> Option<Stamps> {
    let top = rustix::fs::open(root_dir.join(DIFF), DIR_FLAGS, Mode::empty()).ok()?;
    for _ in 0..TRIES {
        let before = SystemTime::now();
        let stamps = take(top.as_fd(), plan).ok()?;
        let newest = stamps.0.iter().map(Stamp::time).max()? + TICK;
        match newest.duration_since(before) {
            Err(_) => return Some(stamps),
            Ok(early) if early > TICK + FUTURE => return None,
            Ok(early) => std::thread::sleep(early + Duration::from_millis(1)),
        }
    }
    None
}

/// The stamps beside the list of that digest; `None` where there are none that can be believed.
pub(super) fn read(root_dir: &Path, digest: ContentHash, plan: &Plan<'_>) -> Option<Stamps> {
    let length = MAGIC.len() + HASH + plan.tree.entries.len() * STAMP;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(root_dir.join(STAMPS), flags, Mode::empty()).ok()?);
    let mut bytes = Vec::new();
    (&file).take((length + HASH + 1) as u64).read_to_end(&mut bytes).ok()?;
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    let (body, hash) = bytes.split_at_checked(length)?;
    if hash != blake3::hash(body).as_bytes() {
        return None;
    }
    let (of, stamps) = body.strip_prefix(MAGIC)?.split_at_checked(HASH)?;
    if of != digest.0 {
        return None;
    }
    let stamp = |bytes: &[u8]| {
        let (ino, rest) = bytes.split_first_chunk()?;
        let (seconds, rest) = rest.split_first_chunk()?;
        let nanos = u32::from_le_bytes(rest.try_into().ok()?);
        Some(Stamp { ino: u64::from_le_bytes(*ino), ctime: (i64::from_le_bytes(*seconds), nanos) })
    };
    stamps.chunks(STAMP).map(stamp).collect::<Option<_>>().map(Stamps)
}

/// Writes them in place of what is there. The layer must be durable, or become so before anybody believes them.
pub(super) fn write(root_dir: &Path, digest: ContentHash, stamps: &Stamps) -> io::Result<()> {
    let mut bytes = [&MAGIC[..], &digest.0].concat();
    for Stamp { ino, ctime } in &stamps.0 {
        bytes.extend(ino.to_le_bytes());
        bytes.extend(ctime.0.to_le_bytes());
        bytes.extend(ctime.1.to_le_bytes());
    }
    bytes.extend(blake3::hash(&bytes).as_bytes());
    forget(root_dir)?;
    std::fs::File::create_new(root_dir.join(STAMPS))?.write_all(&bytes)
}

/// From now on all is compared.
pub(super) fn forget(root_dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(root_dir.join(STAMPS)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Puts `stamps`, taken before the layer of a published generation was compared, in place of others.
pub(super) fn keep(root_dir: &Path, digest: ContentHash, plan: &Plan<'_>, stamps: &Stamps) -> io::Result<()> {
    if read(root_dir, digest, plan).as_ref() == Some(stamps) {
        return Ok(());
    }
    // Stamps that outlive what they are about would pass for it.
    rustix::fs::syncfs(&std::fs::File::open(root_dir)?)?;
    write(root_dir, digest, stamps)
}
