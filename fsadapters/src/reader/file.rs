//! One open file of a job: proof that it is the expected one, how to read it, and its hashes so far.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use pagefold_sys::uring::RWF_DONTCACHE;
use rustc_hash::{FxHashMap, FxHashSet};
use rustix::fs::{AtFlags, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::guard::CacheGuard;
use super::hash_page;
use super::plan::{self, Chunk};
use crate::overlay::{OverlayFs, RealFile};
use crate::regular::Regular;
use crate::source::{FsError, FsOp, InodeId, PageHash, ReadJob, ReadOutcome};

/// How a job ended without hashes.
#[derive(Debug)]
pub(super) enum Verdict {
    Moved,
    Failed(FsError),
}

impl Verdict {
    pub(super) fn outcome(self, tag: u64) -> ReadOutcome {
        match self {
            Verdict::Moved => ReadOutcome::Moved { tag },
            Verdict::Failed(error) => ReadOutcome::Failed { tag, error },
        }
    }
}

/// Which flags an open is tried with next.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenMode {
    direct: bool,
    no_atime: bool,
}

impl OpenMode {
    pub(super) fn of(job: &ReadJob) -> OpenMode {
        OpenMode { direct: !job.resident, no_atime: true }
    }

    pub(super) fn flags(self) -> OFlags {
        // Not to wait for whoever holds a lease.
        let mut flags = OFlags::RDONLY | OFlags::NONBLOCK;
        flags.set(OFlags::DIRECT, self.direct);
        flags.set(OFlags::NOATIME, self.no_atime);
        flags
    }

    /// What to try after `error`: `O_NOATIME` is the owner's (`EPERM`), `O_DIRECT` not every file system's (`EINVAL`).
    pub(super) fn after(self, error: &io::Error) -> Result<OpenMode, Verdict> {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::PERM) if self.no_atime => Ok(OpenMode { no_atime: false, ..self }),
            Some(Errno::INVAL) if self.direct => Ok(OpenMode { direct: false, ..self }),
            Some(errno) => Err(Verdict::Failed(FsError::new(FsOp::Open, errno))),
            None => Err(Verdict::Failed(FsError::new(FsOp::Open, io::Error::from(error.kind())))),
        }
    }
}

/// How a job's path is resolved. It was found by walking, so a symbolic link on it was put there since, and leads to wherever
/// somebody wanted.
pub(super) const HOLD: (OFlags, ResolveFlags) =
    (OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC), ResolveFlags::NO_SYMLINKS);

/// What a path that can't be held means.
pub(super) fn not_held(error: io::Error) -> Verdict {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::LOOP | Errno::NOTDIR) => Verdict::Moved,
        _ => Verdict::Failed(FsError::new(FsOp::Open, error)),
    }
}

/// Opens what the job's path led to, held by [`HOLD`], for reading.
pub(super) fn open_held(job: &ReadJob, held: OwnedFd) -> Result<(OwnedFd, OpenMode), Verdict> {
    let regular = Regular::held(held).map_err(|e| Verdict::Failed(FsError::new(FsOp::Stat, e)))?;
    let regular = regular.ok_or(Verdict::Moved)?;
    let mut mode = OpenMode::of(job);
    loop {
        match regular.open(mode.flags()) {
            Ok(fd) => return Ok((fd, mode)),
            Err(errno) => mode = mode.after(&errno.into())?,
        }
    }
}

/// The path for the kernel; a NUL inside can't be opened.
pub(super) fn c_path(job: &ReadJob) -> Result<CString, Verdict> {
    CString::new(job.path.as_os_str().as_bytes())
        .map_err(|_| Verdict::Failed(FsError::new(FsOp::Open, Errno::INVAL)))
}

/// What one thread has learnt of file systems, by the `st_dev` of their files.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    overlays: FxHashMap<u64, OverlayFs>,
    /// Those that refuse `RWF_DONTCACHE`.
    no_dont_cache: FxHashSet<u64>,
}

/// How one read was asked for. Kept with the read: others of the same file may have taught us better meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    direct: bool,
    dont_cache: bool,
}

impl Asked {
    /// `RWF_*`.
    pub(super) fn flags(self) -> u32 {
        if self.dont_cache { RWF_DONTCACHE } else { 0 }
    }
}

/// An open file that is being read.
#[derive(Debug)]
pub(super) struct JobFile {
    pub(super) job: ReadJob,
    pub(super) fd: Arc<OwnedFd>,
    direct: bool,
    dont_cache: bool,
    /// Reads not yet asked for, last first.
    pub(super) todo: Vec<Chunk>,
    pub(super) in_flight: usize,
    pub(super) verdict: Option<Verdict>,
    hashes: Vec<PageHash>,
    guard: CacheGuard,
    retries_left: u32,
}

/// Interrupted or postponed reads of one job that are tried again.
const RETRIES_MAX: u32 = 1000;

/// What a completed read means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The chunk is hashed, or its job has failed.
    Done,
    /// Ask again, filling the buffer from this byte on.
    Again(usize),
}

/// Kernel facts of a look at an open file.
struct Look {
    inode: InodeId,
    size: u64,
    ctime: (i64, u32),
    regular: bool,
    /// `Some(0)`: the file can't be read directly.
    direct_align: Option<u32>,
}

fn look(fd: impl AsFd) -> Result<Look, FsError> {
    const DIOALIGN: StatxFlags = StatxFlags::DIOALIGN;
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | DIOALIGN)
        .map_err(|e| FsError::new(FsOp::Stat, e))?;
    let told = StatxFlags::from_bits_retain(stat.stx_mask);
    Ok(Look {
        inode: InodeId {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        },
        size: stat.stx_size,
        ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        regular: rustix::fs::FileType::from_raw_mode(u32::from(stat.stx_mode)).is_file(),
        direct_align: told.contains(DIOALIGN).then_some(stat.stx_dio_offset_align),
    })
}

impl JobFile {
    /// Takes `fd`, opened by `mode`, if it is the file that `job` means.
    pub(super) fn accept(
        job: ReadJob,
        fd: OwnedFd,
        mode: OpenMode,
        buffer_pages: usize,
        learnt: &mut Learnt,
    ) -> Result<JobFile, (ReadJob, Verdict)> {
        match Self::examine(&job, fd, mode, buffer_pages, learnt) {
            Ok(make) => Ok(make(job)),
            Err(verdict) => Err((job, verdict)),
        }
    }

    fn examine(
        job: &ReadJob,
        fd: OwnedFd,
        mode: OpenMode,
        buffer_pages: usize,
        learnt: &mut Learnt,
    ) -> Result<impl FnOnce(ReadJob) -> JobFile + use<>, Verdict> {
        let mut now = look(&fd).map_err(Verdict::Failed)?;
        if !now.regular {
            return Err(Verdict::Moved);
        }
        let (mut fd, mut stat_lies) = (fd, false);
        let replaced = now.inode != job.inode;
        if replaced {
            (fd, stat_lies) = real_file(job.inode, now.inode.dev, fd, &mut learnt.overlays)?;
            now = Look { inode: job.inode, ..look(&fd).map_err(Verdict::Failed)? };
        }
        if !is_expected(&now, job) {
            return Err(Verdict::Moved);
        }
        let page = rustix::param::page_size();
        let (mut todo, pages) = plan::chunks(&job.ranges, page as u64, buffer_pages)
            .ok_or_else(|| Verdict::Failed(FsError::new(FsOp::Read, Errno::INVAL)))?;
        todo.reverse();
        let direct = mode.direct && now.direct_align.is_none_or(|align| align > 0 && align as usize <= page);
        // As opened: nothing to change. O_NONBLOCK, set for the open, does not matter to the file systems that read directly.
        let direct = if direct && !replaced { true } else { set_direct(&fd, direct) };
        if direct {
            // btrfs finishes a direct read that came out short through the cache, and reads ahead: past the ranges that the
            // guard knows.
            let _ = rustix::fs::fadvise(&fd, 0, None, rustix::fs::Advice::Random);
        }
        let guard = CacheGuard::new(&fd, &job.ranges, stat_lies);
        let dont_cache = !learnt.no_dont_cache.contains(&job.inode.dev);
        let hashes = vec![PageHash::default(); pages];
        let fd = Arc::new(fd);
        Ok(move |job| JobFile {
            job,
            fd,
            direct,
            dont_cache,
            todo,
            in_flight: 0,
            verdict: None,
            hashes,
            guard,
            retries_left: RETRIES_MAX,
        })
    }

    /// How the next read is to be asked for.
    pub(super) fn ask(&self) -> Asked {
        Asked { direct: self.direct, dont_cache: self.dont_cache }
    }

    /// Bytes of `chunk` to ask for when `filled` are there: whole pages, so that direct reads stay aligned; the
    /// kernel stops at EOF.
    pub(super) fn bytes_to_ask(chunk: &Chunk, filled: usize) -> usize {
        let whole = chunk.pages * rustix::param::page_size() - filled;
        // The last page of a file of 8 EiB - 1 ends beyond what an offset can say: refused, unless asked for less. Direct
        // reads then are refused as unaligned, and asked again through the cache.
        let room = i64::MAX.cast_unsigned().saturating_sub(chunk.offset + filled as u64);
        whole.min(usize::try_from(room).unwrap_or(usize::MAX))
    }

    /// Judges the end of a read of `chunk` that filled `buffer` from `filled` on.
    pub(super) fn read_done(
        &mut self,
        chunk: &Chunk,
        filled: usize,
        asked: Asked,
        buffer: &mut [u8],
        result: io::Result<usize>,
    ) -> Step {
        if self.verdict.is_some() {
            return Step::Done;
        }
        let read = match result {
            Ok(read) => read,
            Err(error) => return self.read_failed(filled, asked, &error),
        };
        let page = rustix::param::page_size();
        let have = filled + read;
        let whole = chunk.pages * page;
        let wanted = self.job.size.saturating_sub(chunk.offset).min(whole as u64) as usize;
        if have < wanted {
            if read == 0 {
                // EOF before its time: truncated.
                self.verdict = Some(Verdict::Moved);
                return Step::Done;
            }
            // Direct reads go on at a page boundary only. A read that ends within the page it began in will do so again
            // where the file was cut short: not for ever.
            let next = have - have % page;
            if next <= filled {
                if self.retries_left == 0 {
                    self.verdict = Some(Verdict::Moved);
                    return Step::Done;
                }
                self.retries_left -= 1;
            }
            return Step::Again(next);
        }
        buffer[wanted..whole].fill(0);
        for (hash, bytes) in
            self.hashes[chunk.first_hash..].iter_mut().zip(buffer[..whole].chunks_exact(page))
        {
            *hash = hash_page(bytes);
        }
        Step::Done
    }

    fn read_failed(&mut self, filled: usize, asked: Asked, error: &io::Error) -> Step {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::INTR | Errno::AGAIN) if self.retries_left > 0 => {
                self.retries_left -= 1;
                // Clears O_NONBLOCK, without which no file system says EAGAIN for ever.
                self.direct = set_direct(&*self.fd, self.direct);
                Step::Again(filled)
            }
            Some(Errno::OPNOTSUPP | Errno::INVAL) if asked.dont_cache => {
                self.dont_cache = false;
                Step::Again(filled)
            }
            Some(Errno::INVAL | Errno::OPNOTSUPP) if asked.direct => {
                self.direct = set_direct(&*self.fd, false);
                Step::Again(filled)
            }
            errno => {
                let source = errno.map_or_else(|| io::Error::from(error.kind()), io::Error::from);
                self.verdict = Some(Verdict::Failed(FsError::new(FsOp::Read, source)));
                Step::Done
            }
        }
    }

    /// Looks at the file once more, cleans up, and tells.
    pub(super) fn finish(self, learnt: &mut Learnt) -> ReadOutcome {
        if !self.dont_cache && self.verdict.is_none() {
            learnt.no_dont_cache.insert(self.job.inode.dev);
        }
        self.guard.restore(&*self.fd, &self.job.ranges);
        let tag = self.job.tag;
        let verdict = self.verdict.or_else(|| match look(&*self.fd) {
            Ok(now) if is_expected(&Look { inode: self.job.inode, ..now }, &self.job) => None,
            Ok(_) => Some(Verdict::Moved),
            Err(error) => Some(Verdict::Failed(error)),
        });
        verdict.map_or(ReadOutcome::Hashed { tag, hashes: self.hashes }, |v| v.outcome(tag))
    }

    /// Cleans up after a cancelled job, of which nothing is told.
    pub(super) fn abandon(self) {
        self.guard.restore(&*self.fd, &self.job.ranges);
    }
}

fn is_expected(now: &Look, job: &ReadJob) -> bool {
    now.inode == job.inode && now.size == job.size && now.ctime == job.ctime
}

/// Another inode than expected: right on overlayfs, where the scan names the real inode. Gives the descriptor to read
/// from, and whether `cachestat` of it speaks of nothing.
fn real_file(
    wanted: InodeId,
    dev: u64,
    fd: OwnedFd,
    overlays: &mut FxHashMap<u64, OverlayFs>,
) -> Result<(OwnedFd, bool), Verdict> {
    const OVERLAYFS_MAGIC: u32 = 0x794c_7630;
    let fs = rustix::fs::fstatfs(&fd).map_err(|e| Verdict::Failed(FsError::new(FsOp::Stat, e)))?;
    if fs.f_type as u32 != OVERLAYFS_MAGIC {
        return Err(Verdict::Moved);
    }
    let overlay = overlays.entry(dev).or_insert_with(|| OverlayFs::of(fd.as_fd()));
    let real = overlay.real_file(fd.as_fd()).map_err(|e| Verdict::Failed(FsError::new(FsOp::Stat, e)))?;
    match real {
        RealFile::Named(name) if name == wanted => Ok((fd, true)),
        RealFile::Named(_) => Err(Verdict::Moved),
        RealFile::Open(real) => {
            let found = look(&real).map_err(Verdict::Failed)?.inode;
            if found == wanted { Ok((real, false)) } else { Err(Verdict::Moved) }
        }
    }
}

/// Makes reads of `fd` direct or buffered; tells which they are. Buffered reads get no read-ahead: it would bring in
/// pages that nobody asked for.
fn set_direct(fd: impl AsFd, direct: bool) -> bool {
    let fd = fd.as_fd();
    let Ok(flags) = rustix::fs::fcntl_getfl(fd) else { return false };
    let mut wanted = flags;
    wanted.set(OFlags::DIRECT, direct);
    // It was for the open; without asynchronous reads a file system would answer EAGAIN for ever.
    wanted.remove(OFlags::NONBLOCK);
    let set = flags == wanted || rustix::fs::fcntl_setfl(fd, wanted).is_ok();
    let direct = if set { direct } else { flags.contains(OFlags::DIRECT) };
    if !direct {
        let _ = rustix::fs::fadvise(fd, 0, None, rustix::fs::Advice::Random);
    }
    direct
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use pagefold_engine::units::{PageCount, PageIndex};

    use super::*;

    fn accepted(path: &std::path::Path) -> JobFile {
        let meta = std::fs::metadata(path).unwrap();
        let job = ReadJob {
            tag: 7,
            path: path.to_owned(),
            inode: InodeId { dev: meta.dev(), ino: meta.ino() },
            size: meta.len(),
            ctime: (meta.ctime(), meta.ctime_nsec() as u32),
            ranges: vec![(PageIndex(0), PageCount(1))],
            resident: true,
        };
        let mode = OpenMode::of(&job);
        let fd = rustix::fs::open(path, mode.flags(), rustix::fs::Mode::empty()).unwrap();
        let file = JobFile::accept(job, fd, mode, 16, &mut Learnt::default());
        file.unwrap_or_else(|(_, verdict)| panic!("{verdict:?}"))
    }

    #[test]
    fn a_change_between_the_first_and_the_last_look_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [1; 100]).unwrap();
        let quiet = accepted(&path);
        let outcome = quiet.finish(&mut Learnt::default());
        assert!(matches!(outcome, ReadOutcome::Hashed { tag: 7, .. }), "{outcome:?}");
        let changed = accepted(&path);
        std::thread::sleep(std::time::Duration::from_millis(20)); // More than a tick of the clock that stamps ctime.
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"2", 0).unwrap();
        let outcome = changed.finish(&mut Learnt::default());
        assert!(matches!(outcome, ReadOutcome::Moved { tag: 7 }), "{outcome:?}");
    }

    #[test]
    fn short_reads_go_on_at_a_page_and_early_ends_are_moves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 40_000]).unwrap();
        let mut file = accepted(&path);
        let chunk = Chunk { first_hash: 0, offset: 0, pages: 1 };
        let mut buffer = vec![0; rustix::param::page_size()];
        let asked = file.ask();
        assert_eq!(file.read_done(&chunk, 0, asked, &mut buffer, Ok(512)), Step::Again(0));
        let interrupted = Err(Errno::INTR.into());
        assert_eq!(file.read_done(&chunk, 0, asked, &mut buffer, interrupted), Step::Again(0));
        assert!(file.verdict.is_none());
        assert_eq!(file.read_done(&chunk, 0, asked, &mut buffer, Ok(0)), Step::Done);
        assert!(matches!(file.verdict, Some(Verdict::Moved)));
        let mut file = accepted(&path);
        let broken = Err(Errno::IO.into());
        assert_eq!(file.read_done(&chunk, 0, asked, &mut buffer, broken), Step::Done);
        let outcome = file.finish(&mut Learnt::default());
        assert!(matches!(outcome, ReadOutcome::Failed { tag: 7, .. }), "{outcome:?}");
    }

    #[test]
    fn interruptions_are_not_endless() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [1; 100]).unwrap();
        let mut file = accepted(&path);
        let chunk = Chunk { first_hash: 0, offset: 0, pages: 1 };
        let asked = file.ask();
        let turns = (0..10_000)
            .take_while(|_| {
                let again = Err(Errno::AGAIN.into());
                file.read_done(&chunk, 0, asked, &mut [], again) == Step::Again(0)
            })
            .count();
        assert_eq!(turns, RETRIES_MAX as usize);
    }
}
