//! The reader without io_uring: one blocking read at a time per thread, by the same rules.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use pagefold_sys::uring::Buffer;
use rustix::fs::Mode;

use super::Shared;
use super::file::{Asked, HOLD, JobFile, Learnt, OpenMode, Step, Verdict, c_path, not_held, open_held};
use crate::source::{FsError, FsOp, ReadJob, ReadOutcome};

/// Reads jobs until there are none, or until cancelled.
pub(super) fn run(shared: &Shared<'_>) {
    let mut jobs = VecDeque::new();
    let mut reader = Reader::new(shared);
    while !shared.cancelled() && shared.grab(1, &mut jobs) {
        jobs.drain(..).for_each(|job| reader.read(job));
    }
}

/// What one thread keeps from job to job.
pub(super) struct Reader<'a, 'b> {
    shared: &'a Shared<'b>,
    buffer: Option<Buffer>,
    learnt: Learnt,
}

impl<'a, 'b> Reader<'a, 'b> {
    pub(super) fn new(shared: &'a Shared<'b>) -> Self {
        Reader { shared, buffer: None, learnt: Learnt::default() }
    }

    /// Reads one job and tells its outcome, unless cancelled.
    pub(super) fn read(&mut self, job: ReadJob) {
        let tag = job.tag;
        match self.try_read(job) {
            Ok(Some(outcome)) => (self.shared.done)(outcome),
            Ok(None) => {}
            Err(verdict) => (self.shared.done)(verdict.outcome(tag)),
        }
    }

    fn try_read(&mut self, job: ReadJob) -> Result<Option<ReadOutcome>, Verdict> {
        let shared = self.shared;
        let (fd, mode) = open(&job)?;
        let mut buffer = match self.buffer.take() {
            Some(buffer) => buffer,
            None => Buffer::new(shared.buffer_bytes())
                .map_err(|e| Verdict::Failed(FsError::new(FsOp::Read, e)))?,
        };
        let pages = shared.buffer_bytes() / rustix::param::page_size();
        let mut file =
            JobFile::accept(job, fd, mode, pages, &mut self.learnt).map_err(|(_, verdict)| verdict)?;
        if !read_all(shared, &mut file, &mut buffer) {
            file.abandon();
            return Ok(None);
        }
        self.buffer = Some(buffer);
        Ok(Some(file.finish(&mut self.learnt)))
    }
}

/// Reads all chunks, or until one fails; false when cancelled.
fn read_all(shared: &Shared<'_>, file: &mut JobFile, buffer: &mut Buffer) -> bool {
    while let Some(chunk) = file.todo.pop() {
        let mut filled = 0;
        loop {
            if shared.cancelled() {
                return false;
            }
            let end = filled + JobFile::bytes_to_ask(&chunk, filled);
            let asked = file.ask();
            let at = chunk.offset + filled as u64;
            let result = read_at(file, asked, &mut buffer.bytes_mut()[filled..end], at);
            match file.read_done(&chunk, filled, asked, buffer.bytes_mut(), result) {
                Step::Again(at) => filled = at,
                Step::Done => break,
            }
        }
        if file.verdict.is_some() {
            break;
        }
    }
    true
}

fn read_at(file: &JobFile, asked: Asked, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(asked.flags());
    match rustix::io::preadv2(&file.fd, &mut parts, offset, flags) {
        // Before 4.6, or forbidden.
        Err(rustix::io::Errno::NOSYS) => Ok(rustix::io::preadv(&file.fd, &mut parts, offset)?),
        other => Ok(other?),
    }
}

fn open(job: &ReadJob) -> Result<(OwnedFd, OpenMode), Verdict> {
    let path = c_path(job)?;
    let (flags, resolve) = HOLD;
    let open = || rustix::fs::openat2(rustix::fs::CWD, &*path, flags, Mode::empty(), resolve);
    open_held(job, rustix::io::retry_on_intr(open).map_err(|e| not_held(e.into()))?)
}
