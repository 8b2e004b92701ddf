//! Changing names of the raw root: temporaries beside the target, made durable in batches, then swapped in.
//!
//! Order of one batch: temporaries are complete; everything is on disk (`syncfs`, or `fsync` of a few); the journal says what
//! is about to happen, on disk; then each name is changed. A name that is there is *exchanged*, and what comes out must be
//! what was looked at, or the two are exchanged back: so a write that races with us is seen and kept. A plain rename would
//! destroy it. What is to go is first renamed aside, for the same reason.
//!
//! Invariant: nothing is ever unlinked that was not looked at after it left its name. What it deliberately does not do: decide.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, IFlags, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use super::bytes::{Sources, fill};
use super::journal::{Journal, Record};
use super::state::Kind;
use crate::sealed::inode::{Below, Held, Look, join};
use crate::sealed::tree::{Data, Meta, Node};

/// Batches of up to so many temporaries are synced file by file, larger ones with the whole file system.
const FSYNC_FILES_MAX: usize = 8;

/// What becomes of a name.
enum What {
    /// The temporary takes the name; `old` must be there, or nothing.
    Put { built: Look, old: Option<Look> },
    /// The name goes.
    Remove { old: Look },
}

/// A change of one name that waits for its batch.
pub struct Op {
    dir: Rc<OwnedFd>,
    dir_path: Vec<u8>,
    name: Vec<u8>,
    temp: u64,
    what: What,
}

/// How a change ended.
#[derive(Debug)]
pub enum Outcome {
    /// Done; the name was there before.
    Replaced,
    /// Done; the name is new.
    Created,
    /// Done; the name is gone.
    Removed,
    /// Somebody changed it meanwhile: left as it is.
    Raced,
    /// It failed; left as it was.
    Failed(io::Error),
}

/// Makes temporaries and changes names.
pub struct Placer<'a> {
    raw: &'a Below,
    run: u64,
    next: u64,
    ops: Vec<Op>,
    /// Regular files and others to sync before the names change.
    unsynced: Vec<OwnedFd>,
    /// The directory used last.
    dir: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Bytes shared and copied.
    pub shared_bytes: u64,
    /// Bytes copied because they could not be shared.
    pub copied_bytes: u64,
}

/// The name of a temporary.
pub fn temp_name(run: u64, temp: u64) -> Vec<u8> {
    format!(".pagefold-{run:016x}-{temp:x}").into_bytes()
}

/// A temporary that is complete but has not taken its name.
pub struct Temp {
    number: u64,
    /// As it was built.
    pub built: Look,
}

impl<'a> Placer<'a> {
    /// For one try.
    pub fn new(raw: &'a Below, run: u64) -> Self {
        Placer {
            raw,
            run,
            next: 0,
            ops: Vec::new(),
            unsynced: Vec::new(),
            dir: None,
            shared_bytes: 0,
            copied_bytes: 0,
        }
    }

    /// The directory at `path`.
    pub fn dir(&mut self, path: &[u8]) -> io::Result<Rc<OwnedFd>> {
        if let Some((known, dir)) = &self.dir
            && known == path
        {
            return Ok(Rc::clone(dir));
        }
        let dir = Rc::new(self.raw.dir(path)?);
        self.dir = Some((path.to_vec(), Rc::clone(&dir)));
        Ok(dir)
    }

    /// Changes waiting.
    pub fn waiting(&self) -> usize {
        self.ops.len()
    }

    /// Makes an inode of `kind` and `meta` in a directory, with `keep` if it is a regular file.
    pub fn build(
        &mut self,
        dir_path: &[u8],
        (meta, kind): (&Meta, &Kind),
        sources: &Sources<'_>,
        keep: &Keep,
    ) -> io::Result<Temp> {
        let dir = self.dir(dir_path)?;
        let number = self.number();
        let name = temp_name(self.run, number);
        match build_at(dir.as_fd(), &name, (meta, kind), sources, keep) {
            Ok(built) => {
                self.shared_bytes += built.shared_bytes;
                self.copied_bytes += built.copied_bytes;
                self.unsynced.extend(built.file);
                Ok(Temp { number, built: built.look })
            }
            Err(e) => {
                discard(dir.as_fd(), &name, kind.is_dir());
                Err(e)
            }
        }
    }

    /// Another name, in `dir_path`, for what is at `from_name` of `from_dir`.
    pub fn link(
        &mut self,
        from_dir: &[u8],
        from_name: &[u8],
        built: Look,
        dir_path: &[u8],
    ) -> io::Result<Temp> {
        let (from, to) = (Rc::new(self.raw.dir(from_dir)?), self.dir(dir_path)?);
        let number = self.number();
        let name = temp_name(self.run, number);
        rustix::fs::linkat(&from, from_name, &to, &*name, AtFlags::empty())?;
        let linked = Held::open(to.as_fd(), &name)?.ok_or(Errno::NOENT)?;
        if !linked.look.is_still(&built) {
            discard(to.as_fd(), &name, false);
            return Err(Errno::AGAIN.into());
        }
        Ok(Temp { number, built: linked.look })
    }

    /// The name of a temporary that is not in place yet.
    pub fn name_of(&self, temp: &Temp) -> Vec<u8> {
        temp_name(self.run, temp.number)
    }

    /// The temporary, made in `dir_path`, shall take `name` there; `old` is what must be there now.
    pub fn put(&mut self, dir_path: &[u8], name: &[u8], temp: &Temp, old: Option<Look>) -> io::Result<()> {
        let what = What::Put { built: temp.built, old };
        self.add(dir_path, name, temp.number, what)
    }

    /// `name` in `dir_path` shall go; `old` is what must be there now.
    pub fn remove(&mut self, dir_path: &[u8], name: &[u8], old: Look) -> io::Result<()> {
        let number = self.number();
        self.add(dir_path, name, number, What::Remove { old })
    }

    fn add(&mut self, dir_path: &[u8], name: &[u8], temp: u64, what: What) -> io::Result<()> {
        let dir = self.dir(dir_path)?;
        self.ops.push(Op { dir, dir_path: dir_path.to_vec(), name: name.to_vec(), temp, what });
        Ok(())
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Makes all that waits durable and changes the names: path and outcome of each.
    ///
    /// # Errors
    /// Syncing failed; then no name was changed, and the temporaries are gone.
    pub fn flush(&mut self, journal: &mut Journal) -> io::Result<Vec<(Vec<u8>, Outcome)>> {
        let ops = std::mem::take(&mut self.ops);
        if let Err(e) = self.make_durable(&ops, journal) {
            ops.iter().for_each(|op| op.abandon(self.run));
            return Err(e);
        }
        crate::store::step("commit.batch.durable");
        let mut outcomes = Vec::with_capacity(ops.len());
        for op in ops {
            let outcome = op.carry_out(self.run).unwrap_or_else(|e| {
                op.abandon(self.run);
                Outcome::Failed(e)
            });
            outcomes.push((join(&op.dir_path, &op.name), outcome));
            crate::store::step("commit.name.changed");
        }
        Ok(outcomes)
    }

    fn make_durable(&mut self, ops: &[Op], journal: &mut Journal) -> io::Result<()> {
        let files = std::mem::take(&mut self.unsynced);
        if files.len() > FSYNC_FILES_MAX {
            rustix::fs::syncfs(self.raw.as_fd())?;
        } else {
            files.iter().try_for_each(rustix::fs::fsync)?;
        }
        crate::store::step("commit.batch.built");
        let record = |op: &Op| Record::Op {
            run: self.run,
            temp: op.temp,
            path: join(&op.dir_path, &op.name),
            built: match op.what {
                What::Put { built, .. } => Some(built),
                What::Remove { .. } => None,
            },
        };
        if ops.is_empty() { Ok(()) } else { journal.append(ops.iter().map(record).collect()) }
    }
}

impl Drop for Placer<'_> {
    /// What never took its name goes; after a crash the next try sweeps it.
    fn drop(&mut self) {
        self.ops.iter().for_each(|op| op.abandon(self.run));
    }
}

impl Op {
    /// Removes a temporary that did not take its name.
    fn abandon(&self, run: u64) {
        if let What::Put { built, .. } = &self.what {
            let temp = temp_name(run, self.temp);
            if let Ok(Some(held)) = Held::open(self.dir.as_fd(), &temp)
                && held.look.ino == built.ino
            {
                discard(self.dir.as_fd(), &temp, built.is_dir());
            }
        }
    }

    fn carry_out(&self, run: u64) -> io::Result<Outcome> {
        let temp = temp_name(run, self.temp);
        match &self.what {
            What::Put { built: _, old: None } => match self.rename(&temp, &self.name, RenameFlags::NOREPLACE)
            {
                Ok(()) => Ok(Outcome::Created),
                Err(Errno::EXIST) => {
                    self.abandon(run);
                    Ok(Outcome::Raced)
                }
                Err(e) => Err(e.into()),
            },
            What::Put { built: _, old: Some(old) } => self.exchange(run, &temp, old),
            What::Remove { old } => self.take_away(&temp, old),
        }
    }

    /// Whether what is at `name` is what was looked at. The change time counts unless a further name of the inode may have been
    /// changed by ourselves since.
    fn is_there(&self, name: &[u8], old: &Look, ctime: bool) -> io::Result<bool> {
        let held = Held::open(self.dir.as_fd(), name)?;
        Ok(held.is_some_and(|h| {
            let own = h.look.is_dir() && h.look.ino == old.ino;
            own || h.look.is_still(old) && (!ctime || old.links > 1 || h.look.ctime == old.ctime)
        }))
    }

    fn exchange(&self, run: u64, temp: &[u8], old: &Look) -> io::Result<Outcome> {
        if !self.is_there(&self.name, old, true)? {
            self.abandon(run);
            return Ok(Outcome::Raced);
        }
        match self.rename(temp, &self.name, RenameFlags::EXCHANGE) {
            Err(Errno::XDEV) => return self.replace_blindly(run, temp, old),
            result => result?,
        }
        crate::store::step("commit.exchanged");
        // The rename itself moved the change time.
        let good = self.is_there(temp, old, false)?;
        let flags = if old.is_dir() { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let gone = if good { rustix::fs::unlinkat(&*self.dir, temp, flags) } else { Err(Errno::BUSY) };
        if gone.is_ok() {
            return Ok(Outcome::Replaced);
        }
        self.rename(temp, &self.name, RenameFlags::EXCHANGE)?;
        self.abandon(run);
        Ok(Outcome::Raced)
    }

    /// XFS lets an inode whose project id is not its directory's go from no name to another, not even beside it. What was looked at a
    /// moment ago is replaced then without seeing what comes out.
    fn replace_blindly(&self, run: u64, temp: &[u8], old: &Look) -> io::Result<Outcome> {
        if old.is_dir() {
            match rustix::fs::unlinkat(&*self.dir, &*self.name, AtFlags::REMOVEDIR) {
                Ok(()) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    self.abandon(run);
                    return Ok(Outcome::Raced);
                }
                Err(e) => return Err(e.into()),
            }
        }
        rustix::fs::renameat(&*self.dir, temp, &*self.dir, &*self.name)?;
        Ok(Outcome::Replaced)
    }

    fn take_away(&self, temp: &[u8], old: &Look) -> io::Result<Outcome> {
        if !self.is_there(&self.name, old, true)? {
            return Ok(Outcome::Raced);
        }
        match self.rename(&self.name, temp, RenameFlags::NOREPLACE) {
            // As in `replace_blindly`.
            Err(Errno::XDEV) => {
                rustix::fs::unlinkat(&*self.dir, &*self.name, AtFlags::empty())?;
                return Ok(Outcome::Removed);
            }
            result => result?,
        }
        crate::store::step("commit.taken.away");
        if self.is_there(temp, old, false)? {
            rustix::fs::unlinkat(&*self.dir, temp, AtFlags::empty())?;
            return Ok(Outcome::Removed);
        }
        self.rename(temp, &self.name, RenameFlags::NOREPLACE)?;
        Ok(Outcome::Raced)
    }

    fn rename(&self, from: &[u8], to: &[u8], flags: RenameFlags) -> rustix::io::Result<()> {
        rustix::fs::renameat_with(&*self.dir, from, &*self.dir, to, flags)
    }
}

/// `FS_NOCOMP_FL`, which rustix has no name for.
const NOCOMP: IFlags = IFlags::from_bits_retain(0x400);

/// Inode flags that a file keeps when it is replaced: how it is stored and treated. What protects it (immutable, append-only) is no such
/// flag: commit replaces no file that has one.
const KEPT: IFlags = IFlags::NOCOW
    .union(IFlags::COMPRESSED)
    .union(NOCOMP)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::SYNC);

/// btrfs's own name for how a file is compressed; says more than the flag, and sets it.
const COMPRESSION: &str = "btrfs.compression";

/// What a regular file keeps when it is replaced.
#[derive(Debug)]
pub struct Keep {
    flags: IFlags,
    compression: Option<Box<[u8]>>,
}

impl Keep {
    /// Nothing: as its directory has it.
    pub const NOTHING: Keep = Keep { flags: IFlags::empty(), compression: None };

    /// Of the file that is there; nothing of what is no regular file.
    pub fn of(held: Option<&Held>) -> io::Result<Keep> {
        let Some(held) = held.filter(|held| held.look.is_file()) else { return Ok(Keep::NOTHING) };
        let file = held.open_file(OFlags::RDONLY)?;
        let flags = rustix::fs::ioctl_getflags(file).unwrap_or(IFlags::empty()).intersection(KEPT);
        // Some file systems answer EINVAL for a name that is not theirs.
        Ok(Keep { flags, compression: held.xattr(COMPRESSION.as_bytes()).unwrap_or(None) })
    }

    /// Gives it to the empty `file`, whose bytes come from a file without checksums if `nocow`. Where the file system has no such flag,
    /// there was none to lose.
    fn give(&self, file: BorrowedFd<'_>, nocow: bool) -> io::Result<()> {
        // btrfs shares no blocks between files with and without checksums, and can't change its mind later.
        let nocow = nocow && self.compression.is_none() && !self.flags.contains(IFlags::COMPRESSED);
        let flags = if nocow { self.flags.union(IFlags::NOCOW) } else { self.flags };
        if !flags.is_empty() {
            let now = rustix::fs::ioctl_getflags(file)?;
            match rustix::fs::ioctl_setflags(file, now.difference(KEPT).union(flags)) {
                Err(Errno::OPNOTSUPP | Errno::NOTTY) => {}
                result => result?,
            }
        }
        if let Some(value) = &self.compression {
            rustix::fs::fsetxattr(file, COMPRESSION, value, XattrFlags::empty())?;
        }
        Ok(())
    }
}

/// An inode that was made.
pub struct Built {
    /// As it is now.
    pub look: Look,
    /// A regular file, open.
    pub file: Option<OwnedFd>,
    /// Bytes shared with where they come from.
    pub shared_bytes: u64,
    /// Bytes that had to be copied.
    pub copied_bytes: u64,
}

/// Makes an inode of `kind` and `meta` with its bytes as `name` in `dir`; a regular file gets `keep`, and NOCOW where its
/// bytes come from such a file. What is there after an error is the caller's to remove.
pub fn build_at(
    dir: BorrowedFd<'_>,
    name: &[u8],
    (meta, kind): (&Meta, &Kind),
    sources: &Sources<'_>,
    keep: &Keep,
) -> io::Result<Built> {
    let source = match kind {
        Kind::File { size, bytes } => sources.open(bytes, *size)?,
        Kind::Other(_) => None,
    };
    build_from(dir, name, (meta, kind), source.as_ref().map(AsFd::as_fd), keep)
}

/// [`build_at`] with the bytes from `source`, which the caller has opened.
pub fn build_from(
    dir: BorrowedFd<'_>,
    name: &[u8],
    (meta, kind): (&Meta, &Kind),
    source: Option<BorrowedFd<'_>>,
    keep: &Keep,
) -> io::Result<Built> {
    let (held, file) = match kind {
        Kind::File { .. } => make(dir, name, &Node::File { size: 0, data: Data::Empty })?,
        Kind::Other(node) => make(dir, name, node)?,
    };
    if let Some(file) = &file {
        let flags = source.map(rustix::fs::ioctl_getflags);
        keep.give(file.as_fd(), flags.is_some_and(|f| f.is_ok_and(|f| f.contains(IFlags::NOCOW))))?;
    }
    let (mut shared_bytes, mut copied_bytes) = (0, 0);
    if let (Kind::File { size, .. }, Some(file), Some(source)) = (kind, &file, source) {
        match fill(source, file.as_fd(), *size)? {
            true => shared_bytes = *size,
            false => copied_bytes = *size,
        }
        if Look::of(file)?.size != *size {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its data changed while it was read"));
        }
    }
    held.apply(meta)?;
    Ok(Built { look: Look::of(&held)?, file, shared_bytes, copied_bytes })
}

/// Makes an empty inode of the kind of `made` that nobody else may open yet; for regular files also opened for writing.
pub(in crate::sealed) fn make(
    dir: BorrowedFd<'_>,
    name: &[u8],
    made: &Node,
) -> io::Result<(Held, Option<OwnedFd>)> {
    let private = Mode::RUSR | Mode::WUSR;
    let node = |kind, device| rustix::fs::mknodat(dir, name, kind, private, device);
    let mut file = None;
    match made {
        Node::File { .. } => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            file = Some(rustix::fs::openat(dir, name, flags, private)?);
        }
        Node::Dir => rustix::fs::mkdirat(dir, name, Mode::RWXU)?,
        Node::Symlink(target) => rustix::fs::symlinkat(&**target, dir, name)?,
        Node::Fifo => node(FileType::Fifo, 0)?,
        Node::Socket => node(FileType::Socket, 0)?,
        Node::CharDevice(device) => node(FileType::CharacterDevice, *device)?,
        Node::BlockDevice(device) => node(FileType::BlockDevice, *device)?,
    }
    let held = Held::open(dir, name)?.ok_or(Errno::NOENT)?;
    if let Some(file) = &file
        && Look::of(file)?.ino != held.look.ino
    {
        return Err(Errno::STALE.into());
    }
    Ok((held, file))
}

/// Removes a temporary; that it is gone already or can't go is found by the next sweep.
fn discard(dir: BorrowedFd<'_>, name: &[u8], is_dir: bool) {
    let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    let _ = rustix::fs::unlinkat(dir, name, flags);
}

/// Clears what earlier tries left below `raw`: temporaries go, what was swapped out or put aside by a try that ended at that very
/// moment gets its name back. Returns names that could not be settled.
pub fn sweep(raw: &Below, journal: &Journal) -> io::Result<Vec<Vec<u8>>> {
    let mut unsettled = Vec::new();
    for (run, dirs) in &journal.runs {
        let prefix = format!(".pagefold-{run:016x}-").into_bytes();
        for path in dirs {
            let dir = match raw.dir(path) {
                Ok(dir) => dir,
                Err(e) if crate::sealed::inode::is_absent(&e) => continue,
                Err(e) => return Err(e),
            };
            for name in crate::sealed::inode::names(dir.as_fd())? {
                let number = name.strip_prefix(&*prefix).and_then(|n| std::str::from_utf8(n).ok());
                let Some(number) = number.and_then(|n| u64::from_str_radix(n, 16).ok()) else { continue };
                if !settle(dir.as_fd(), path, &name, journal.temps.get(&(*run, number)))? {
                    unsettled.push(join(path, &name));
                }
            }
        }
    }
    Ok(unsettled)
}

/// One temporary of an earlier try, and what the journal says of it. False: it can't be told what it is.
fn settle(
    dir: BorrowedFd<'_>,
    path: &[u8],
    temp: &[u8],
    record: Option<&(Vec<u8>, Option<Look>)>,
) -> io::Result<bool> {
    let Some(held) = Held::open(dir, temp)? else { return Ok(true) };
    let ours = match record {
        // Never came so far that a name was changed.
        None => true,
        Some((_, built)) => built.is_some_and(|b| b.ino == held.look.ino),
    };
    let is_dir = held.look.is_dir();
    let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    if ours {
        return match rustix::fs::unlinkat(dir, temp, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(e) => Err(e.into()),
        };
    }
    let Some((target, built)) = record else { return Ok(false) };
    let (parent, name) = crate::sealed::inode::split(target);
    if parent != path {
        return Ok(false);
    }
    match rustix::fs::renameat_with(dir, temp, dir, name, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    let there = Held::open(dir, name)?;
    // Written since: then it is not only ours any more.
    if !there.is_some_and(|t| built.is_some_and(|b| b.is_still(&t.look))) {
        return Ok(false);
    }
    rustix::fs::renameat_with(dir, temp, dir, name, RenameFlags::EXCHANGE)?;
    rustix::fs::unlinkat(
        dir,
        temp,
        if built.is_some_and(|b| b.is_dir()) { AtFlags::REMOVEDIR } else { AtFlags::empty() },
    )?;
    Ok(true)
}
