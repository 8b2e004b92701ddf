//! Whether a raw file still is what it was sealed as: by its place, against its anchor.
//!
//! A stored signature could not say it: a balance changes the addresses of file and anchor alike. Invariant: [`Compared::Same`] is the
//! engine's proof (anchor, file, anchor), nothing less. What it deliberately does not do: read bytes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use pagefold_engine::whole::{Opened, Unproven};

use super::prove::Protected;
use super::reading::Readings;
use crate::fsid;
use crate::store::{AnchorKey, Store};

/// How a raw file compares with an anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// It has the anchor's bytes.
    Same,
    /// Its blocks are elsewhere: it was written since, or was never reflinked. Its bytes may be equal all the same.
    Elsewhere,
    /// Extents can't decide: inline, compressed, dirty, just being written, or the anchor is gone.
    Undecided,
}

/// Compares the open regular file `raw` with an anchor of `domain`. Writes the file's dirty pages back.
///
/// # Errors
/// As the kernel says of `raw`.
pub fn with_anchor(store: &Store, domain: u32, key: AnchorKey, raw: BorrowedFd<'_>) -> io::Result<Compared> {
    let stat = rustix::fs::fstat(raw)?;
    let facts = fsid::describe(raw).map_err(|e| e.source)?;
    let readings = Readings::new(&facts);
    let mut room = Vec::new();
    let size = stat.st_size.cast_unsigned();
    let Some(Ok(Some(anchor))) =
        store.open_anchor(domain, &key).ok().map(|file| Protected::new(file, key, size))
    else {
        // Another size is another file, an anchor that is missing says nothing.
        let known = store.lookup().ok().and_then(|l| l.anchor(&key).ok().flatten());
        return Ok(match known {
            Some(row) if row.size != size => Compared::Elsewhere,
            _ => Compared::Undecided,
        });
    };
    let mut anchor_reading = || readings.read(anchor.file.as_fd(), &anchor.stat, &mut room).map(|r| r.0);
    let Ok(opened) = Opened::new(key, anchor_reading()?) else { return Ok(Compared::Undecided) };
    let mut extents = Vec::new();
    let mut file = readings.read(raw, &stat, &mut extents)?;
    if !file.0.is_settled() {
        // The first one wrote it back.
        let stat = rustix::fs::fstat(raw)?;
        file = readings.read(raw, &stat, &mut extents)?;
    }
    match opened.enclose(&file.0) {
        Ok(enclosed) => {
            let closed = opened.close(&anchor_reading()?);
            let proved = closed.and_then(|closed| closed.prove(&enclosed));
            Ok(if proved.is_ok() { Compared::Same } else { Compared::Undecided })
        }
        Err(Unproven::Elsewhere) => Ok(Compared::Elsewhere),
        Err(_) => Ok(Compared::Undecided),
    }
}
