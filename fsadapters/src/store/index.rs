//! The index: redb tables, one write transaction at a time, and the checks before any of it is believed.
//!
//! Invariants: a row is decoded or told to be damaged, never skipped; every commit is durable when it returns and has a number
//! ([`Identity::generation`]'s companion `commits`), which is also written to the file `commits`, so that an index that went back in time is
//! seen; until all checks have passed nothing is written to the file ([`super::backend`]).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use redb::{
    Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase, ReadableTable, StorageError,
    Table, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::backend::{Backend, Gate};
use super::codec::{Row, decode, encode};
use super::crash::step;
use super::error::StoreError;
use super::key::{AnchorKey, ContentHash, ImageDigest, SealId, StoreId};

/// Layout of the store that this code writes, and the only one that it reads. 1: differences were images over images; never released.
pub(super) const FORMAT: u32 = 2;

/// Bytes of pages that the database keeps in memory.
const CACHE_BYTES: usize = 64 << 20;
/// An index up to this size is checked whole at every open (about 1 ms for each 2 MiB: 256 MiB are more than a million anchors).
const CHECK_BYTES_MAX: u64 = 256 << 20;

pub(super) type Bytes = &'static [u8];
pub(super) const META: TableDefinition<'static, &str, Bytes> = TableDefinition::new("meta");
pub(super) const DOMAINS: TableDefinition<'static, u32, Bytes> = TableDefinition::new("domains");
pub(super) const ANCHORS: TableDefinition<'static, &[u8; 32], Bytes> = TableDefinition::new("anchors");
/// Hints: domain, size and signature, all big-endian, to an anchor.
pub(super) const BY_EXTENTS: TableDefinition<'static, &[u8; 28], &[u8; 32]> =
    TableDefinition::new("by_extents");
/// Hints: domain, size and BLAKE3 to an anchor.
pub(super) const BY_CONTENT: TableDefinition<'static, &[u8; 44], &[u8; 32]> =
    TableDefinition::new("by_content");
pub(super) const IMAGES: TableDefinition<'static, &[u8; 32], Bytes> = TableDefinition::new("images");
pub(super) const ROOTS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("roots");
/// (root, generation): the images that this generation's upper belongs to. A row lives as long as the upper.
pub(super) const GENERATIONS: TableDefinition<'static, (u64, u64), Bytes> =
    TableDefinition::new("generations");
pub(super) const VIEWS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("views");
/// Reserved anchor numbers, first to end: files with these numbers that no row names are orphans.
pub(super) const BUILDING: TableDefinition<'static, u64, u64> = TableDefinition::new("building");
/// Removed from the index, to be removed from disk.
pub(super) const GRAVES: TableDefinition<'static, Bytes, ()> = TableDefinition::new("graves");

const IDENTITY: &str = "identity";
const COMMITS: &str = "commits";
pub(super) const NEXT_SERIAL: &str = "next anchor";
pub(super) const NEXT_SEAL: &str = "next root";
pub(super) const NEXT_DOMAIN: &str = "next domain";

/// Which store this is, and by what a copy of it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub format: u32,
    pub id: StoreId,
    /// As `fsid` tells it. `None`: the file system has no UUID; then only the directory's handle is compared.
    pub fs_uuid: Option<[u8; 16]>,
    /// On btrfs; a snapshot has another.
    pub subvolume: Option<[u8; 16]>,
    /// Inode of the store's directory: a copy has another (and another generation of it, where handles are known).
    pub ino: u64,
    /// File handle of the directory, where the file system has them.
    pub handle: Option<(i32, Vec<u8>)>,
    /// Seconds since 1970.
    pub made_at: i64,
}

/// [`super::rows::ImageRow`] with anchors as differences of their numbers: a byte or two each, not 32.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredImage {
    pub domain: u32,
    pub bytes: u64,
    pub entries: u64,
    pub serial_steps: Vec<u64>,
}

/// What an upper belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Generation {
    pub domain: u32,
    pub layers: Vec<ImageDigest>,
    /// Over the image, in the generation's own directory.
    pub diff: Option<StoredDiff>,
}

/// [`super::rows::DiffRow`] with anchors as in [`StoredImage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredDiff {
    pub digest: ContentHash,
    pub entries: u64,
    pub serial_steps: Vec<u64>,
}

/// Something that is to be unlinked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Grave {
    Anchor {
        domain: u32,
        key: AnchorKey,
        borrowed: bool,
    },
    Image(ImageDigest),
    /// One generation of a root, or all of it.
    Root {
        id: SealId,
        generation: Option<u64>,
    },
}

/// The open index.
pub(super) struct Index {
    db: Database,
    store: PathBuf,
    /// The number of the last commit, for [`Index::open`] to compare.
    commits: File,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("store", &self.store).finish_non_exhaustive()
    }
}

/// A write transaction.
pub(super) struct Txn<'a> {
    txn: WriteTransaction,
    store: &'a Path,
}

impl Index {
    /// Makes an index in the empty `file` with `identity` in it, on disk. It is made in memory: of what the database would sync nine times,
    /// nobody knows before it has its name.
    pub(super) fn create(
        file: File,
        commits: File,
        store: &Path,
        identity: &Identity,
    ) -> Result<(), StoreError> {
        let gate = Gate::closed(file).map_err(|e| StoreError::io("use the index of", store, e))?;
        let db = open_database(&gate, store)?;
        let index = Index { db, store: store.to_owned(), commits };
        index.write(|txn| txn.put(META, IDENTITY, identity))?;
        // Closing it writes too.
        drop(index);
        gate.open().map_err(|e| StoreError::io("write the index of", store, e))
    }

    /// Opens the index in `file` if all of it can be believed; `judge` looks at the identity. Nothing is written otherwise.
    pub(super) fn open(
        file: File,
        commits: File,
        store: &Path,
        judge: impl FnOnce(&Identity) -> Result<(), StoreError>,
    ) -> Result<(Index, Identity), StoreError> {
        let damaged =
            |detail: &str| StoreError::Damaged { path: store.to_owned(), detail: detail.to_owned() };
        let length = file.metadata().map_err(|e| StoreError::io("look at the index of", store, e))?.len();
        if length == 0 {
            return Err(damaged("the file is empty"));
        }
        let gate = Gate::closed(file).map_err(|e| StoreError::io("use the index of", store, e))?;
        // redb checks every page's checksum when asked to; what it meets before may still surprise it.
        let checked = quietly(|| {
            let mut db = open_database(&gate, store)?;
            let whole =
                length > CHECK_BYTES_MAX || db.check_integrity().map_err(|e| of_database(store, e))?;
            Ok::<_, StoreError>((db, whole))
        });
        let (db, whole) = checked.ok_or_else(|| damaged("the database gave up on it"))??;
        if !whole {
            return Err(damaged("pages don't have their checksums; an older state would have to be taken"));
        }
        let index = Index { db, store: store.to_owned(), commits };
        let identity = index.read(|read| read.get::<_, Identity>(META, IDENTITY))?;
        let identity = identity.ok_or_else(|| damaged("it does not say which store it belongs to"))?;
        judge(&identity)?;
        index.check_commits()?;
        gate.open().map_err(|e| StoreError::io("write the index of", store, e))?;
        Ok((index, identity))
    }

    /// Went the index back in time? The file may lag behind (it is not synced), the index never.
    fn check_commits(&self) -> Result<(), StoreError> {
        let mut bytes = [0; 8];
        let seen = match self.commits.read_exact_at(&mut bytes, 0) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => 0,
            Err(e) => return Err(StoreError::io("read the number of commits of", &self.store, e)),
        };
        let commits = self.read(|read| read.number(COMMITS))?;
        if commits < seen {
            let why = format!("its index is at commit {commits}, but commit {seen} was made here");
            return Err(StoreError::Foreign { path: self.store.clone(), why });
        }
        Ok(())
    }

    /// Runs `change` in a transaction and commits it durably. On an error nothing has changed, unless the error came from the
    /// commit itself: then the next open tells.
    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&Txn<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let txn = self.db.begin_write().map_err(|e| self.error(e))?;
        let txn = Txn { txn, store: &self.store };
        let result = change(&txn)?;
        let commits = txn.bump(COMMITS, 1)? + 1;
        let mut txn = txn.txn;
        txn.set_durability(Durability::Immediate).map_err(|e| self.error(e))?;
        step("store.commit.before");
        txn.commit().map_err(|e| self.error(e))?;
        step("store.commit.after");
        // After the commit and without a sync: it may lag, it must not lead.
        if let Err(e) = self.commits.write_all_at(&commits.to_le_bytes(), 0) {
            tracing::warn!("the number of commits was not written: {e}");
        }
        Ok(result)
    }

    /// A snapshot of the index as it is now.
    pub(super) fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let txn = self.db.begin_read().map_err(|e| self.error(e))?;
        Ok(Snapshot { txn, store: self.store.clone() })
    }

    /// [`Self::snapshot`], for one question.
    pub(super) fn read<T>(
        &self,
        ask: impl FnOnce(&Snapshot) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        ask(&self.snapshot()?)
    }

    fn error(&self, error: impl Into<redb::Error>) -> StoreError {
        of_redb(&self.store, error.into())
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives, or `None` when it panicked. redb does on some damaged pages (10 of 600 damaged files), before its checksums are asked;
/// that is a finding and not a defect of ours, so nothing is printed.
fn quietly<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if QUIET.get() {
                tracing::debug!("while the index was opened: {info}");
            } else {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    // Nothing of what `work` touched is used again after a panic: the writes were held back, the database is dropped.
    let result = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    result.ok()
}

fn open_database(gate: &Arc<Gate>, store: &Path) -> Result<Database, StoreError> {
    Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create_with_backend(Backend(Arc::clone(gate)))
        .map_err(|e| of_database(store, e))
}

fn of_database(store: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::Storage(StorageError::Io(e))
            if matches!(e.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
        {
            StoreError::Damaged { path: store.to_owned(), detail: e.to_string() }
        }
        DatabaseError::UpgradeRequired(version) => StoreError::Damaged {
            path: store.to_owned(),
            detail: format!("a database of version {version}, which no pagefold has written"),
        },
        DatabaseError::RepairAborted => {
            StoreError::Damaged { path: store.to_owned(), detail: "it could not be repaired".to_owned() }
        }
        other => of_redb(store, other.into()),
    }
}

pub(super) fn of_redb(store: &Path, error: redb::Error) -> StoreError {
    match error {
        redb::Error::Corrupted(detail) => StoreError::Damaged { path: store.to_owned(), detail },
        other => StoreError::Index { path: store.to_owned(), source: Box::new(other) },
    }
}

/// A read transaction.
pub(super) struct Snapshot {
    pub txn: ReadTransaction,
    store: PathBuf,
}

impl Snapshot {
    /// Opens a table; `None` while nothing was ever put into it.
    pub(super) fn table<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        definition: TableDefinition<'static, K, V>,
    ) -> Result<Option<redb::ReadOnlyTable<K, V>>, StoreError> {
        match self.txn.open_table(definition) {
            Ok(table) => Ok(Some(table)),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(e) => Err(of_redb(&self.store, e.into())),
        }
    }

    /// The row of `key`.
    pub(super) fn get<'k, K: redb::Key + 'static, R: Row>(
        &self,
        definition: TableDefinition<'static, K, Bytes>,
        key: impl std::borrow::Borrow<K::SelfType<'k>>,
    ) -> Result<Option<R>, StoreError> {
        let Some(table) = self.table(definition)? else { return Ok(None) };
        match table.get(key).map_err(|e| of_redb(&self.store, e.into()))? {
            Some(guard) => self.decoded(guard.value()).map(Some),
            None => Ok(None),
        }
    }

    /// A counter; 0 before its first use.
    pub(super) fn number(&self, name: &str) -> Result<u64, StoreError> {
        let Some(table) = self.table(META)? else { return Ok(0) };
        let found = table.get(name).map_err(|e| of_redb(&self.store, e.into()))?;
        found.map_or(Ok(0), |guard| number_of(self.store.as_path(), name, guard.value()))
    }

    /// Calls `each` with every row, ascending by key.
    pub(super) fn each<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        definition: TableDefinition<'static, K, V>,
        mut each: impl FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Some(table) = self.table(definition)? else { return Ok(()) };
        for row in table.iter().map_err(|e| of_redb(&self.store, e.into()))? {
            let (key, value) = row.map_err(|e| of_redb(&self.store, e.into()))?;
            each(key.value(), value.value())?;
        }
        Ok(())
    }

    /// All rows, ascending by key.
    pub(super) fn rows<K: redb::Key + 'static, R: Row>(
        &self,
        definition: TableDefinition<'static, K, Bytes>,
    ) -> Result<Vec<R>, StoreError> {
        let mut rows = Vec::new();
        self.each(definition, |_, bytes| {
            rows.push(self.decoded(bytes)?);
            Ok(())
        })?;
        Ok(rows)
    }

    pub(super) fn decoded<R: Row>(&self, bytes: &[u8]) -> Result<R, StoreError> {
        decode(bytes).map_err(|detail| StoreError::Damaged { path: self.store.clone(), detail })
    }
}

fn number_of(store: &Path, name: &str, bytes: &[u8]) -> Result<u64, StoreError> {
    let bytes: [u8; 8] = bytes.try_into().map_err(|_| StoreError::Damaged {
        path: store.to_owned(),
        detail: format!("the counter {name:?} is no number"),
    })?;
    Ok(u64::from_le_bytes(bytes))
}

impl Txn<'_> {
    /// Opens a table for writing. One at a time per table.
    pub(super) fn table<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        definition: TableDefinition<'static, K, V>,
    ) -> Result<Table<'_, K, V>, StoreError> {
        self.txn.open_table(definition).map_err(|e| self.error(e))
    }

    pub(super) fn put<'k, K: redb::Key + 'static, R: Row>(
        &self,
        definition: TableDefinition<'static, K, Bytes>,
        key: impl std::borrow::Borrow<K::SelfType<'k>>,
        row: &R,
    ) -> Result<(), StoreError> {
        self.table(definition)?.insert(key, &encode(row)[..]).map_err(|e| self.error(e))?;
        Ok(())
    }

    pub(super) fn get<'k, K: redb::Key + 'static, R: Row>(
        &self,
        definition: TableDefinition<'static, K, Bytes>,
        key: impl std::borrow::Borrow<K::SelfType<'k>>,
    ) -> Result<Option<R>, StoreError> {
        let table = self.table(definition)?;
        let found = table.get(key).map_err(|e| self.error(e))?;
        found.map(|guard| self.decoded(guard.value())).transpose()
    }

    /// All rows, ascending by key.
    pub(super) fn rows<K: redb::Key + 'static, R: Row>(
        &self,
        definition: TableDefinition<'static, K, Bytes>,
    ) -> Result<Vec<R>, StoreError> {
        let table = self.table(definition)?;
        let mut rows = Vec::new();
        for row in table.iter().map_err(|e| self.error(e))? {
            let (_, value) = row.map_err(|e| self.error(e))?;
            rows.push(self.decoded(value.value())?);
        }
        Ok(rows)
    }

    pub(super) fn remove<'k, K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        definition: TableDefinition<'static, K, V>,
        key: impl std::borrow::Borrow<K::SelfType<'k>>,
    ) -> Result<bool, StoreError> {
        let mut table = self.table(definition)?;
        let removed = table.remove(key).map_err(|e| self.error(e))?.is_some();
        Ok(removed)
    }

    /// Adds `by` to a counter; what it was before.
    pub(super) fn bump(&self, name: &str, by: u64) -> Result<u64, StoreError> {
        let mut table = self.table(META)?;
        let before = match table.get(name).map_err(|e| self.error(e))? {
            Some(guard) => number_of(self.store, name, guard.value())?,
            None => 0,
        };
        let after = before.checked_add(by).ok_or_else(|| StoreError::Damaged {
            path: self.store.to_owned(),
            detail: format!("the counter {name:?} is at its end"),
        })?;
        table.insert(name, &after.to_le_bytes()[..]).map_err(|e| self.error(e))?;
        Ok(before)
    }

    /// Marks for removal from disk.
    pub(super) fn bury(&self, graves: &[Grave]) -> Result<(), StoreError> {
        let mut table = self.table(GRAVES)?;
        for grave in graves {
            table.insert(&encode(grave)[..], ()).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    pub(super) fn decoded<R: Row>(&self, bytes: &[u8]) -> Result<R, StoreError> {
        decode(bytes).map_err(|detail| StoreError::Damaged { path: self.store.to_owned(), detail })
    }

    pub(super) fn error(&self, error: impl Into<redb::Error>) -> StoreError {
        of_redb(self.store, error.into())
    }
}

/// Key of [`BY_EXTENTS`].
pub(super) fn extents_key(domain: u32, size: u64, signature: &[u8; 16]) -> [u8; 28] {
    let mut key = [0; 28];
    key[..4].copy_from_slice(&domain.to_be_bytes());
    key[4..12].copy_from_slice(&size.to_be_bytes());
    key[12..].copy_from_slice(signature);
    key
}

/// Key of [`BY_CONTENT`].
pub(super) fn content_key(domain: u32, size: u64, hash: &[u8; 32]) -> [u8; 44] {
    let mut key = [0; 44];
    key[..4].copy_from_slice(&domain.to_be_bytes());
    key[4..12].copy_from_slice(&size.to_be_bytes());
    key[12..].copy_from_slice(hash);
    key
}

impl StoredImage {
    /// `serials` by key must be complete: every anchor of the image has a number.
    pub(super) fn new(domain: u32, bytes: u64, entries: u64, serials: Vec<u64>) -> StoredImage {
        StoredImage { domain, bytes, entries, serial_steps: steps_of(serials) }
    }

    /// The anchors' numbers, ascending; `None` when they make no sense.
    pub(super) fn serials(&self) -> Option<Vec<u64>> {
        serials_of(&self.serial_steps)
    }

    /// Keys by number, for one store.
    pub(super) fn keys(&self, store: StoreId) -> Option<BTreeMap<AnchorKey, u64>> {
        Some(keys_of(store, self.serials()?))
    }
}

impl StoredDiff {
    /// As [`StoredImage::new`].
    pub(super) fn new(digest: ContentHash, entries: u64, serials: Vec<u64>) -> StoredDiff {
        StoredDiff { digest, entries, serial_steps: steps_of(serials) }
    }

    /// As [`StoredImage::serials`].
    pub(super) fn serials(&self) -> Option<Vec<u64>> {
        serials_of(&self.serial_steps)
    }

    /// As [`StoredImage::keys`].
    pub(super) fn keys(&self, store: StoreId) -> Option<BTreeMap<AnchorKey, u64>> {
        Some(keys_of(store, self.serials()?))
    }
}

/// Differences of ascending numbers.
fn steps_of(mut serials: Vec<u64>) -> Vec<u64> {
    serials.sort_unstable();
    serials.dedup();
    let mut last = 0;
    serials.iter().map(|s| s - std::mem::replace(&mut last, *s)).collect()
}

fn serials_of(steps: &[u64]) -> Option<Vec<u64>> {
    let mut at: u64 = 0;
    let mut next = |step: &u64| {
        at = at.checked_add(*step)?;
        Some(at)
    };
    steps.iter().map(&mut next).collect()
}

fn keys_of(store: StoreId, serials: Vec<u64>) -> BTreeMap<AnchorKey, u64> {
    serials.into_iter().map(|serial| (AnchorKey::of(store, serial), serial)).collect()
}
