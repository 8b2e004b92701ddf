//! What earlier tries of a commit did to the raw root, so that our own half-done work is not taken for somebody's change.
//!
//! An append-only file beside the upper. A run first writes all paths that it may touch; before a batch of names is changed,
//! what will stand there is written and synced. So: a temporary that no record names was never put in place, and a name
//! that differs from what was sealed without a record is somebody else's doing.
//!
//! Invariant: synced before the change it tells of. A torn tail is dropped: nothing it tells of was begun. What it deliberately does not do:
//! hold data; undo.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Deserialize, Serialize};

use crate::sealed::inode::Look;
use crate::sealed::tree::Meta;

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A try begins.
    Run {
        /// Its number, in the names of its temporaries.
        run: u64,
        /// Directories of the raw root where temporaries may be.
        dirs: Vec<Vec<u8>>,
        /// Paths that it may make, replace or remove.
        paths: Vec<Vec<u8>>,
        /// Metadata that it gives to directories, as [`meta_digest`].
        metas: Vec<(Vec<u8>, [u8; 16])>,
    },
    /// The raw root shows all that the view showed, on disk. The last record, or it means nothing any more.
    Done,
    /// A name is about to be changed.
    Op {
        /// The try.
        run: u64,
        /// Number of the temporary.
        temp: u64,
        /// The path.
        path: Vec<u8>,
        /// What will be there; `None`: nothing.
        built: Option<Look>,
    },
}

/// The journal, open for appending, and what it held.
#[derive(Debug)]
pub struct Journal {
    file: File,
    /// All tries: number, directories.
    pub runs: Vec<(u64, Vec<Vec<u8>>)>,
    /// All paths that any try may have touched.
    pub touched: FxHashSet<Vec<u8>>,
    /// What we put at a path.
    pub built: FxHashMap<Vec<u8>, Vec<Look>>,
    /// What each temporary was for.
    pub temps: FxHashMap<(u64, u64), (Vec<u8>, Option<Look>)>,
    /// Whether the last try ended well and none was begun since.
    pub is_done: bool,
    /// Metadata that we gave to directories.
    metas: FxHashSet<(Vec<u8>, [u8; 16])>,
}

const MAGIC: &[u8; 16] = b"pagefold-commit1";
const RECORD_BYTES_MAX: usize = u32::MAX as usize;

impl Journal {
    /// Opens or makes the journal at `path`, readable by root only.
    pub fn open(path: &Path) -> io::Result<Journal> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let mut journal = Journal {
            file,
            runs: Vec::new(),
            touched: FxHashSet::default(),
            built: FxHashMap::default(),
            temps: FxHashMap::default(),
            is_done: false,
            metas: FxHashSet::default(),
        };
        if text.len() < MAGIC.len() {
            // Made by a try that ended before its first record.
            journal.file.set_len(0)?;
            journal.file.write_all(MAGIC)?;
            return Ok(journal);
        }
        let Some(mut rest) = text.strip_prefix(MAGIC) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a journal of a commit"));
        };
        while let Some((record, after)) = take(rest) {
            journal.learn(record);
            rest = after;
        }
        journal.file.set_len((text.len() - rest.len()) as u64)?;
        Ok(journal)
    }

    /// Whether no try was ever begun.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether we gave `meta` to the directory at `path`.
    pub fn gave(&self, path: &[u8], meta: &Meta) -> bool {
        self.metas.contains(&(path.to_vec(), meta_digest(meta)))
    }

    /// Writes records and syncs.
    pub fn append(&mut self, records: Vec<Record>) -> io::Result<()> {
        let mut text = Vec::new();
        for record in records {
            let body = postcard::to_stdvec(&record).map_err(io::Error::other)?;
            if body.len() > RECORD_BYTES_MAX {
                // It would be read as a torn tail, and what follows it with it.
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    "more changed paths than a journal holds",
                ));
            }
            text.extend((body.len() as u32).to_le_bytes());
            text.extend(check(&body));
            text.extend(body);
            self.learn(record);
        }
        self.file.write_all(&text)?;
        self.file.sync_all()
    }

    fn learn(&mut self, record: Record) {
        self.is_done = record == Record::Done;
        match record {
            Record::Done => {}
            Record::Run { run, dirs, paths, metas } => {
                self.runs.push((run, dirs));
                self.touched.extend(paths);
                self.metas.extend(metas);
            }
            Record::Op { run, temp, path, built } => {
                if let Some(look) = built {
                    self.built.entry(path.clone()).or_default().push(look);
                }
                self.temps.insert((run, temp), (path, built));
            }
        }
    }
}

fn check(body: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(body).as_bytes()[..8]);
    sum
}

/// The first whole record, and what follows.
fn take(text: &[u8]) -> Option<(Record, &[u8])> {
    let (length, rest) = text.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let body = rest.get(..length).filter(|_| length <= RECORD_BYTES_MAX)?;
    let record = (check(body) == *sum).then(|| postcard::from_bytes(body).ok()).flatten()?;
    Some((record, &rest[length..]))
}

/// A name for all of a directory's metadata but its times.
pub fn meta_digest(meta: &Meta) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for number in [meta.mode, meta.uid, meta.gid] {
        hasher.update(&number.to_le_bytes());
    }
    for part in meta.xattrs.iter().flat_map(|(name, value)| [name, value]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut digest = [0; 16];
    hasher.finalize_xof().fill(&mut digest);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(temp: u64) -> Record {
        Record::Op { run: 7, temp, path: b"a/b".to_vec(), built: None }
    }

    #[test]
    fn a_torn_tail_is_dropped_and_what_follows_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let run = Record::Run {
            run: 7,
            dirs: vec![b"a".to_vec()],
            paths: vec![b"a/b".to_vec()],
            metas: vec![(b"a".to_vec(), [1; 16])],
        };
        Journal::open(&path).unwrap().append(vec![run, op(1), op(2)]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(Journal::open(&path).unwrap().temps.len(), 2);
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::open(&path).unwrap();
            let before = journal.temps.len();
            assert!(before < 2, "cut at {cut}");
            journal.append(vec![op(9)]).unwrap();
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.temps.len(), before + 1, "cut at {cut}");
            assert!(journal.temps.contains_key(&(7, 9)));
        }
        for at in 16..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x5a;
            std::fs::write(&path, &bad).unwrap();
            assert!(Journal::open(&path).unwrap().temps.len() < 2, "byte {at}");
        }
    }
}
