//! The last readings: every anchor that was found by place is read once more, and what it enclosed is proved.
//!
//! Invariant: what leaves here has no open proof. A file whose anchor moved (btrfs balance while we work) is located again, [`ROUNDS`] times;
//! then it gets an anchor of its own, for a clone needs no proof.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pagefold_engine::whole::Closed;
use rustc_hash::FxHashMap;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::Walked;
use super::root::OpenRoot;
use crate::sealed::locate::{Located, Locator, Room};
use crate::sealed::prove::Shown;
use crate::sealed::tree::{EntryId, InodeIndex, Node};
use crate::sealed::walk::{FileAt, FileLook, Sketch, WalkError, meta, raw_facts};
use crate::sealed::xattrs::XattrBuffer;
use crate::store::AnchorKey;

/// How often files whose anchors moved are located again before they get anchors of their own.
const ROUNDS: u32 = 2;

/// Anchors read as one task.
const KEYS_PER_TASK: usize = 64;

type ClosedSet = FxHashMap<AnchorKey, Closed<AnchorKey>>;

/// Proves all that is open in `walked`. Roots in which that failed come back apart.
pub(super) fn close_all(
    walked: Vec<Walked>,
    locator: &mut Locator<'_>,
    threads: usize,
) -> (Vec<Walked>, Vec<(OpenRoot, WalkError)>) {
    let (mut good, mut failed) = (walked, Vec::new());
    for round in 0..=ROUNDS {
        let closed = last_readings(&good, locator, threads);
        let mut open = 0;
        for walked in &mut good {
            open += prove(&mut walked.sketch.found, &closed);
        }
        if open == 0 || locator.progress.is_cancelled() {
            break;
        }
        tracing::info!(open, round, "anchors moved while files were looked at: locating again");
        locator.clone_only = round + 1 == ROUNDS;
        let mut still = Vec::new();
        for mut walked in good {
            match locate_again(&mut walked, locator) {
                Ok(()) => still.push(walked),
                Err(error) => failed.push((walked.root, error)),
            }
        }
        good = still;
    }
    (good, failed)
}

fn open_of(located: &Option<Located>) -> Option<AnchorKey> {
    match located.as_ref()?.shown {
        Shown::Enclosed(enclosed) => Some(enclosed.anchor()),
        _ => None,
    }
}

fn last_readings(walked: &[Walked], locator: &Locator<'_>, threads: usize) -> ClosedSet {
    // In the order of keys: neighbours are in one directory.
    let keys: BTreeSet<AnchorKey> =
        walked.iter().flat_map(|w| w.sketch.found.iter().filter_map(open_of)).collect();
    let keys: Vec<AnchorKey> = keys.into_iter().collect();
    let (next, closed) = (AtomicUsize::new(0), Mutex::new(ClosedSet::default()));
    let tasks: Vec<&[AnchorKey]> = keys.chunks(KEYS_PER_TASK).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.min(tasks.len()) {
            scope.spawn(|| {
                let mut room = Room::default();
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read: Vec<_> =
                        task.iter().map(|key| (*key, locator.close(*key, &mut room))).collect();
                    let mut closed = closed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    closed.extend(read.into_iter().filter_map(|(key, read)| Some((key, read?))));
                }
            });
        }
    });
    let closed = closed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    keys.iter().filter(|key| !closed.contains_key(key)).for_each(|key| locator.forget(key));
    closed
}

/// Turns what was enclosed into proofs; returns how many could not be.
fn prove(found: &mut [Option<Located>], closed: &ClosedSet) -> usize {
    let mut open = 0;
    for located in found.iter_mut().flatten() {
        if let Shown::Enclosed(enclosed) = located.shown {
            match closed.get(&enclosed.anchor()).map(|c| c.prove(&enclosed)) {
                Some(Ok(proof)) => located.shown = Shown::Place(proof),
                _ => open += 1,
            }
        }
    }
    open
}

/// Locates the files of a root whose proofs are open still.
fn locate_again(walked: &mut Walked, locator: &Locator<'_>) -> Result<(), WalkError> {
    let mut room = Room::default();
    let open: Vec<usize> = (0..walked.sketch.found.len())
        .filter(|index| open_of(&walked.sketch.found[*index]).is_some())
        .collect();
    if open.is_empty() {
        return Ok(());
    }
    // The first name of each inode, and whether it is the only one.
    let mut names: FxHashMap<InodeIndex, (EntryId, bool)> = FxHashMap::default();
    for (number, entry) in (0u32..).zip(&walked.sketch.tree.entries) {
        let name = names.entry(entry.inode).or_insert((EntryId(number), true));
        name.1 = name.0 == EntryId(number);
    }
    for index in open {
        let (name, only) = names[&InodeIndex(index as u32)];
        let at = std::path::PathBuf::from(OsStr::from_bytes(&walked.sketch.tree.path(name)));
        let again = Again { index, path: &at, only };
        one_again(&walked.root, &mut walked.sketch, again, locator, &mut room)
            .map_err(|error| error.at(at))?;
    }
    Ok(())
}

/// A file to look at again.
struct Again<'p> {
    /// Its inode in the tree.
    index: usize,
    /// Below the root.
    path: &'p std::path::Path,
    /// The tree has no other name of it.
    only: bool,
}

fn one_again(
    root: &OpenRoot,
    sketch: &mut Sketch<Located>,
    Again { index, path, only }: Again<'_>,
    locator: &Locator<'_>,
    room: &mut Room,
) -> Result<(), WalkError> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let opened = rustix::fs::openat2(root.fd(), path, flags, Mode::empty(), resolve);
    // Gone since it was looked at: what it was can't be had any more.
    let fd = opened.map_err(|e| WalkError::here("open again", e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| WalkError::here("stat", e))?;
    let inode = &mut sketch.tree.inodes[index];
    // Another file has its name now: that one is told, unless other names still show the former.
    let replaced = stat.st_ino != inode.raw.ino;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || (replaced && !only) {
        return Err(WalkError::here("look again at", rustix::io::Errno::STALE));
    }
    let file = FileAt { root: 0, fd: fd.as_fd(), stat: &stat, previous: None, guess: None };
    let (stat, located) = locator.look(file, room)?;
    // As new as the change time that goes with them.
    let xattrs = XattrBuffer::default().of_open(fd.as_fd());
    inode.meta = meta(&stat, xattrs.map_err(|e| WalkError::here("read attributes of", e))?);
    inode.raw = raw_facts(&stat);
    inode.node = Node::File { size: inode.raw.size, data: crate::sealed::tree::Data::Empty };
    sketch.found[index] = Some(Located { unsettled: located.unsettled || replaced, ..located });
    Ok(())
}
