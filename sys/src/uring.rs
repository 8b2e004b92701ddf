//! io_uring as far as the reader needs it: opens and reads whose memory can't be freed under the kernel.
//!
//! Invariant: everything a request points at (path, descriptor, buffer) is moved into the ring and comes back with its
//! completion; dropping the ring waits for what is in flight. What it deliberately does not do: order, retry or count against
//! a queue depth; the caller does.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use memmap2::MmapMut;
use rustix::fs::{OFlags, ResolveFlags};

/// `RWF_DONTCACHE` (Linux 6.14): a buffered read that drops the pages which it brought in itself, and only those.
pub const RWF_DONTCACHE: u32 = 0x80;

/// Page-aligned memory of a fixed length, zeroed at first.
#[derive(Debug)]
pub struct Buffer(MmapMut);

impl Buffer {
    /// `length` bytes, rounded up to pages by the kernel; untouched pages cost nothing.
    ///
    /// # Errors
    /// `ENOMEM`; `EINVAL` when `length` is 0.
    pub fn new(length: usize) -> io::Result<Buffer> {
        Ok(Buffer(MmapMut::map_anon(length)?))
    }

    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// All of it, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// One read.
#[derive(Debug)]
pub struct ReadRequest {
    /// Given back with the completion.
    pub token: u64,
    /// Kept open until the completion.
    pub file: Arc<OwnedFd>,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// Filled from `buffer_offset` on.
    pub buffer: Buffer,
    /// First byte of the buffer to fill; clamped to its length.
    pub buffer_offset: usize,
    /// Bytes to read; clamped to what the buffer holds behind `buffer_offset`.
    pub length: usize,
    /// `RWF_*`.
    pub flags: u32,
}

/// What became of a request.
#[derive(Debug)]
pub enum Event {
    /// An open ended.
    Opened {
        /// The caller's.
        token: u64,
        /// The descriptor, close-on-exec.
        result: io::Result<OwnedFd>,
    },
    /// A read ended.
    Read {
        /// The caller's.
        token: u64,
        /// The caller's again.
        buffer: Buffer,
        /// Bytes read.
        result: io::Result<usize>,
    },
}

enum InFlight {
    Open { token: u64, path: CString, _how: Box<types::OpenHow> },
    Read { token: u64, buffer: Buffer, _file: Arc<OwnedFd> },
}

/// A ring. For the thread that made it. For regular files: dropping it waits for what is in flight, and a read of an empty pipe
/// would never end.
pub struct Ring {
    ring: IoUring,
    /// By `user_data`.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("pending", &self.pending()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for up to `requests` requests at once (more are refused by assertion in [`Ring::open`] and [`Ring::read`]).
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS` where io_uring is forbidden or missing, `EOPNOTSUPP` where it can't open and read (before 5.6).
    pub fn new(requests: u32) -> io::Result<Ring> {
        let entries = requests.clamp(1, 4096).next_power_of_two();
        // 6.1: completions are handled when we wait, without interrupting the hashing.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::OpenAt2::CODE) || !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let in_flight = (0..entries).map(|_| None).collect();
        Ok(Ring { ring, in_flight, free: (0..entries as usize).rev().collect() })
    }

    /// Requests that have not come back.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.in_flight.len() - self.free.len()
    }

    /// Requests that may be added now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Asks to open `path` by the rules of `resolve` (`openat2`); `O_CLOEXEC` is added.
    ///
    /// # Panics
    /// Without [`Ring::room`].
    pub fn open(&mut self, token: u64, path: CString, flags: OFlags, resolve: ResolveFlags) {
        let id = self.free.pop().expect("the caller asked for room");
        let flags = u64::from((flags | OFlags::CLOEXEC).bits());
        let how = Box::new(types::OpenHow::new().flags(flags).resolve(resolve.bits()));
        let entry = opcode::OpenAt2::new(types::Fd(libc::AT_FDCWD), path.as_ptr(), &raw const *how).build();
        self.in_flight[id] = Some(InFlight::Open { token, path, _how: how });
        self.push(&entry.user_data(id as u64));
    }

    /// Asks for a read.
    ///
    /// # Panics
    /// Without [`Ring::room`].
    pub fn read(&mut self, request: ReadRequest) {
        let id = self.free.pop().expect("the caller asked for room");
        let ReadRequest { token, file, offset, mut buffer, buffer_offset, length, flags } = request;
        let target = buffer.bytes_mut();
        let start = buffer_offset.min(target.len());
        let target = &mut target[start..];
        let length = length.min(target.len()).min(i32::MAX as usize) as u32;
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), target.as_mut_ptr(), length)
            .offset(offset)
            .rw_flags(flags as i32)
            .build();
        self.in_flight[id] = Some(InFlight::Read { token, buffer, _file: file });
        self.push(&entry.user_data(id as u64));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what `entry` points at (heap memory of a path and of how to open it, a mapping) has just been moved into `in_flight`, which
        // neither moves that memory nor lets go of it before the completion (see `take`) or the end of the ring (see `drop`).
        let pushed = unsafe { self.ring.submission().push(entry) };
        // The queue has as many entries as there are slots, and each slot is queued at most once.
        assert!(pushed.is_ok(), "submission queue overflow");
    }

    /// Hands new requests to the kernel without waiting.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`; a full completion queue is no error.
    pub fn submit(&mut self) -> io::Result<()> {
        match self.ring.submit() {
            Err(e) if is_passing(&e) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Hands new requests to the kernel and waits until at least one is done, if any is pending; adds what is done to `events`.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`. A signal only ends the wait.
    pub fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        if self.pending() == 0 {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Err(e) if !is_passing(&e) => return Err(e),
            _ => {}
        }
        let done: Vec<cqueue::Entry> = self.ring.completion().collect();
        events.extend(done.iter().filter_map(|entry| self.take(entry)));
        Ok(())
    }

    fn take(&mut self, entry: &cqueue::Entry) -> Option<Event> {
        let id = usize::try_from(entry.user_data()).ok()?;
        let request = self.in_flight.get_mut(id)?.take()?;
        self.free.push(id);
        let code = entry.result();
        let result = if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(code) };
        Some(match request {
            InFlight::Open { token, path, .. } => {
                drop(path);
                // SAFETY: a completed open returns a new descriptor; its number reaches nobody else.
                let result = result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                Event::Opened { token, result }
            }
            InFlight::Read { token, buffer, .. } => {
                Event::Read { token, buffer, result: result.map(|n| n as usize) }
            }
        })
    }
}

/// `EINTR`: a signal; `EBUSY`, `EAGAIN`: completions must be taken first. All end by trying again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut events = Vec::new();
        while self.pending() > 0 {
            if self.wait(&mut events).is_err() {
                // The kernel may still write: what it writes to must outlive everything.
                std::mem::forget(std::mem::take(&mut self.in_flight));
                return;
            }
            events.clear();
        }
    }
}
