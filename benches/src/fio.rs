//! fio as the measure of what the disk and the kernel give: the same files, in physical order, `O_DIRECT`, `io_uring`.
//!
//! The reads are given as an I/O log, one per job: so fio opens each file, reads all of it in requests of our own read size (less
//! at the end) and closes it, in exactly our order. With a list of file names it would take one block size for
//! all files, and its length and its `:` are limited. Jobs take 16 files in turn, or as many pieces of a large one, as our threads do.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::measured::Runner;
use crate::tree::TreeFile;

/// As the reader of `fsadapters`.
const READ_BYTES: u64 = 1 << 20;
const PIECES_IN_TURN: usize = 16;
const PIECE_BYTES: u64 = 16 << 20;

/// One run of fio.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FioRun {
    /// Seconds of reading, by fio's own clock: without start, set-up and end of the program.
    pub reading_s: f64,
    /// Seconds from start to end of the program.
    pub wall_s: f64,
    /// Bytes that fio counted in that time. It issues every read, but does not count (nor, it seems, wait for) what is in flight when
    /// its log ends.
    pub counted_bytes: u64,
}

/// A prepared job file.
#[derive(Debug)]
pub struct FioJob {
    program: PathBuf,
    job: PathBuf,
    reads: u64,
}

impl FioJob {
    /// Writes job file and I/O logs to `scratch`.
    ///
    /// # Errors
    /// A path that the log can't hold (white space), or no space.
    pub fn prepare(
        program: &Path,
        scratch: &Path,
        files: &[TreeFile],
        threads: usize,
        queue_depth: u32,
    ) -> anyhow::Result<FioJob> {
        let mut job = format!(
            "[global]\nioengine=io_uring\ndirect=1\nrw=read\niodepth={queue_depth}\nbs={READ_BYTES}\n\
             group_reporting=1\nthread=1\n"
        );
        let pieces = pieces(files);
        for thread in 0..threads {
            let log = scratch.join(format!("fio-{thread}.log"));
            let mine: Vec<_> =
                pieces.chunks(PIECES_IN_TURN).skip(thread).step_by(threads).flatten().copied().collect();
            if mine.is_empty() {
                continue;
            }
            write_log(&log, &mine)?;
            job += &format!("\n[reader-{thread}]\nread_iolog={}\n", log.display());
        }
        let path = scratch.join("job.fio");
        std::fs::write(&path, job)?;
        let reads = files.iter().map(|f| f.size.div_ceil(READ_BYTES)).sum();
        Ok(FioJob { program: program.to_owned(), job: path, reads })
    }

    /// Reads everything once.
    ///
    /// # Errors
    /// fio fails, or did not issue every read.
    pub fn run(&self, runner: &Runner<'_>) -> anyhow::Result<FioRun> {
        let args = ["--readonly", "--output-format=json"].map(OsString::from);
        let args: Vec<_> = args.into_iter().chain([self.job.clone().into()]).collect();
        let finished = runner.run(&self.program, &args, &[0])?;
        // Warnings may stand before the report.
        let start = finished.stdout.iter().position(|b| *b == b'{').unwrap_or(0);
        let report: Report = serde_json::from_slice(&finished.stdout[start..]).context("fio's report")?;
        let Some(read) = report.jobs.first().map(|j| &j.read) else { bail!("fio reported no job") };
        if read.total_ios != self.reads {
            bail!("fio issued {} of {} reads", read.total_ios, self.reads);
        }
        Ok(FioRun {
            reading_s: read.runtime / 1000.0,
            wall_s: finished.cost.wall_s,
            counted_bytes: read.io_bytes,
        })
    }
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    read: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    total_ios: u64,
    /// Milliseconds, of the longest job.
    runtime: f64,
}

/// A part of a file.
#[derive(Clone, Copy)]
struct Piece<'a> {
    file: &'a TreeFile,
    from: u64,
    to: u64,
}

fn pieces(files: &[TreeFile]) -> Vec<Piece<'_>> {
    fn of(file: &TreeFile) -> impl Iterator<Item = Piece<'_>> {
        let starts = (0..file.size).step_by(PIECE_BYTES as usize);
        starts.map(move |from| Piece { file, from, to: file.size.min(from + PIECE_BYTES) })
    }
    files.iter().flat_map(of).collect()
}

/// Consecutive pieces of one file are read through one open.
fn write_log(to: &Path, pieces: &[Piece<'_>]) -> anyhow::Result<()> {
    let mut out = BufWriter::new(File::create(to)?);
    writeln!(out, "fio version 2 iolog")?;
    let same = |a: &Piece<'_>, b: &Piece<'_>| a.file.path == b.file.path;
    let mut added = HashSet::new();
    for piece in pieces {
        let path = piece.file.path.to_str().filter(|p| !p.contains(char::is_whitespace));
        let path =
            path.with_context(|| format!("{}: a path that fio's log can't hold", piece.file.path.display()))?;
        if added.insert(path) {
            writeln!(out, "{path} add")?;
        }
    }
    for run in pieces.chunk_by(same) {
        let path = run[0].file.path.display();
        writeln!(out, "{path} open")?;
        for piece in run {
            for at in (piece.from..piece.to).step_by(READ_BYTES as usize) {
                writeln!(out, "{path} read {at} {}", READ_BYTES.min(piece.to - at))?;
            }
        }
        writeln!(out, "{path} close")?;
    }
    out.flush()?;
    Ok(())
}
