//! One reader thread over one ring.
//!
//! Invariant: at most `depth` reads are in flight; opens run ahead so that there is always a file to read from; free buffers
//! are handed to the kernel before finished ones are hashed, so that the disk works meanwhile.

use std::collections::VecDeque;
use std::io;

use pagefold_sys::uring::{Buffer, Event, ReadRequest, Ring};

use super::file::{Asked, HOLD, JobFile, Learnt, Step, Verdict, c_path, not_held, open_held};
use super::plan::Chunk;
use super::{JOBS_PER_GRAB, Shared, plain};
use crate::source::{FsError, FsOp, ReadJob};

/// Requests a ring must hold: `depth` reads, as many that are asked again (short or interrupted), and the opens.
pub(super) const fn requests(depth: u32) -> u32 {
    2 * depth + opens_ahead(depth)
}

/// Bytes hashed before the ring is looked after again.
const HASHED_BETWEEN_SUBMITS: usize = 128 << 10;

/// Files that are being opened or wait, opened, to be read.
const fn opens_ahead(depth: u32) -> u32 {
    if depth < 8 { 8 } else { depth }
}

/// Reads jobs until there are none, or until cancelled.
pub(super) fn run(shared: &Shared<'_>) {
    let ring = Ring::new(requests(shared.depth));
    let buffers: io::Result<Vec<Buffer>> =
        (0..2 * shared.depth).map(|_| Buffer::new(shared.buffer_bytes())).collect();
    match (ring, buffers) {
        (Ok(ring), Ok(buffers)) => Worker::new(shared, ring, buffers).run(),
        // The probe succeeded, this thread's ring did not (a limit): its jobs are read all the same.
        _ => plain::run(shared),
    }
}

enum Slot {
    Opening(ReadJob),
    Reading(JobFile),
}

struct Read {
    file: usize,
    chunk: Chunk,
    filled: usize,
    asked: Asked,
}

/// A read that came back, not hashed yet.
struct Finished {
    read: Read,
    buffer: Buffer,
    result: io::Result<usize>,
}

struct Worker<'a, 'b> {
    shared: &'a Shared<'b>,
    ring: Ring,
    buffers: Vec<Buffer>,
    backlog: VecDeque<ReadJob>,
    exhausted: bool,
    files: Slab<Slot>,
    reads: Slab<Read>,
    /// Files with reads to ask for.
    ready: VecDeque<usize>,
    opening: usize,
    learnt: Learnt,
}

impl<'a, 'b> Worker<'a, 'b> {
    fn new(shared: &'a Shared<'b>, ring: Ring, buffers: Vec<Buffer>) -> Self {
        Worker {
            shared,
            ring,
            buffers,
            backlog: VecDeque::new(),
            exhausted: false,
            files: Slab::default(),
            reads: Slab::default(),
            ready: VecDeque::new(),
            opening: 0,
            learnt: Learnt::default(),
        }
    }

    fn run(mut self) {
        let mut events = Vec::new();
        while !self.shared.cancelled() {
            self.top_up();
            if self.ring.pending() == 0 {
                if self.exhausted && self.backlog.is_empty() {
                    return;
                }
                continue;
            }
            if let Err(error) = self.ring.wait(&mut events) {
                return self.fail_all(&error);
            }
            self.accept_opens(&mut events);
            // Out of the count of reads in flight before they are hashed: others take their places meanwhile.
            let finished: Vec<Finished> = events.drain(..).filter_map(|e| self.finished(e)).collect();
            self.top_up();
            // Errors come back from the next wait.
            let _ = self.ring.submit();
            let mut hashed = 0;
            for read in finished {
                hashed += read.result.as_ref().copied().unwrap_or(0);
                self.read_done(read);
                // Hashing this much takes longer than a read: keep the disk busy in between. Not after each small file: a
                // system call each costs more than it gains.
                if hashed >= HASHED_BETWEEN_SUBMITS {
                    hashed = 0;
                    if self.top_up() {
                        let _ = self.ring.submit();
                    }
                }
            }
        }
        self.drain();
    }

    /// Asks for as many opens and reads as are allowed; whether it asked for any.
    fn top_up(&mut self) -> bool {
        let before = self.ring.pending();
        let ahead = opens_ahead(self.shared.depth) as usize;
        while self.opening + self.ready.len() < ahead && self.opening < ahead {
            if self.backlog.is_empty() && !self.exhausted {
                self.exhausted = !self.shared.grab(JOBS_PER_GRAB, &mut self.backlog);
            }
            let Some(job) = self.backlog.pop_front() else { break };
            self.open(job);
        }
        while self.reads.len() < self.shared.depth as usize && !self.buffers.is_empty() {
            let Some(&id) = self.ready.front() else { break };
            let Slot::Reading(file) = self.files.get(id) else { unreachable!("only open files are ready") };
            let chunk = file.todo.pop();
            if file.todo.is_empty() {
                self.ready.pop_front();
            }
            let Some(chunk) = chunk else { continue };
            file.in_flight += 1;
            let buffer = self.buffers.pop().expect("looked at above");
            let asked = file.ask();
            self.read(Read { file: id, chunk, filled: 0, asked }, buffer);
        }
        self.ring.pending() > before
    }

    fn open(&mut self, job: ReadJob) {
        match c_path(&job) {
            Err(verdict) => (self.shared.done)(verdict.outcome(job.tag)),
            Ok(path) => {
                self.opening += 1;
                let id = self.files.insert(Slot::Opening(job));
                self.ring.open(id as u64, path, HOLD.0, HOLD.1);
            }
        }
    }

    fn read(&mut self, read: Read, buffer: Buffer) {
        let Slot::Reading(file) = self.files.get(read.file) else { unreachable!("reads are of open files") };
        let request = ReadRequest {
            token: 0,
            file: file.fd.clone(),
            offset: read.chunk.offset + read.filled as u64,
            buffer,
            buffer_offset: read.filled,
            length: JobFile::bytes_to_ask(&read.chunk, read.filled),
            flags: read.asked.flags(),
        };
        let id = self.reads.insert(read);
        self.ring.read(ReadRequest { token: id as u64, ..request });
    }

    /// Takes the opened files out of `events`, so that reads of them can be asked for before anything is hashed.
    fn accept_opens(&mut self, events: &mut Vec<Event>) {
        for event in std::mem::take(events) {
            let Event::Opened { token, result } = event else {
                events.push(event);
                continue;
            };
            self.opening -= 1;
            let Slot::Opening(job) = self.files.remove(token as usize) else {
                unreachable!("an open's token is that of a file being opened")
            };
            // Its inode is in memory now: to open it takes no waiting.
            let opened = match result {
                Ok(held) => open_held(&job, held),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.open(job);
                    continue;
                }
                Err(error) => Err(not_held(error)),
            };
            let (fd, mode) = match opened {
                Ok(opened) => opened,
                Err(verdict) => {
                    (self.shared.done)(verdict.outcome(job.tag));
                    continue;
                }
            };
            let pages = self.shared.buffer_bytes() / rustix::param::page_size();
            match JobFile::accept(job, fd, mode, pages, &mut self.learnt) {
                Err((job, verdict)) => (self.shared.done)(verdict.outcome(job.tag)),
                Ok(file) if file.todo.is_empty() => (self.shared.done)(file.finish(&mut self.learnt)),
                Ok(file) => {
                    let id = self.files.insert(Slot::Reading(file));
                    self.ready.push_back(id);
                }
            }
        }
    }

    fn finished(&mut self, event: Event) -> Option<Finished> {
        let Event::Read { token, buffer, result } = event else { return None };
        Some(Finished { read: self.reads.remove(token as usize), buffer, result })
    }

    fn read_done(&mut self, finished: Finished) {
        let Finished { read, mut buffer, result } = finished;
        let Slot::Reading(file) = self.files.get(read.file) else { unreachable!("reads are of open files") };
        match file.read_done(&read.chunk, read.filled, read.asked, buffer.bytes_mut(), result) {
            Step::Again(filled) => {
                let asked = file.ask();
                return self.read(Read { filled, asked, ..read }, buffer);
            }
            Step::Done => self.buffers.push(buffer),
        }
        file.in_flight -= 1;
        if file.verdict.is_some() && !file.todo.is_empty() {
            file.todo.clear();
            self.ready.retain(|id| *id != read.file);
        }
        if file.in_flight == 0 && file.todo.is_empty() {
            let Slot::Reading(file) = self.files.remove(read.file) else { unreachable!("matched above") };
            (self.shared.done)(file.finish(&mut self.learnt));
        }
    }

    /// Waits for what is in flight and tells nothing of it.
    fn drain(mut self) {
        let mut events = Vec::new();
        while self.ring.pending() > 0 && self.ring.wait(&mut events).is_ok() {
            events.clear();
        }
        for slot in self.files.drain() {
            if let Slot::Reading(file) = slot {
                file.abandon();
            }
        }
    }

    /// The ring itself failed: every job at hand has failed; others are left to the other threads.
    fn fail_all(mut self, error: &io::Error) {
        for slot in self.files.drain() {
            let job = match slot {
                Slot::Opening(job) => job,
                Slot::Reading(file) => file.job,
            };
            let error =
                error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
            let verdict = Verdict::Failed(FsError::new(FsOp::Read, error));
            (self.shared.done)(verdict.outcome(job.tag));
        }
        let mut reader = plain::Reader::new(self.shared);
        self.backlog.into_iter().for_each(|job| reader.read(job));
        plain::run(self.shared);
    }
}

/// Values by small number; numbers are used again.
struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn insert(&mut self, value: T) -> usize {
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[id] = Some(value);
        id
    }

    fn get(&mut self, id: usize) -> &mut T {
        self.slots[id].as_mut().expect("the number of a value that was removed")
    }

    fn remove(&mut self, id: usize) -> T {
        let value = self.slots[id].take().expect("the number of a value that was removed");
        self.free.push(id);
        value
    }

    fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.free.clear();
        std::mem::take(&mut self.slots).into_iter().flatten()
    }
}
