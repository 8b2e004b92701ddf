//! Hints: which anchor may hold a file's bytes.
//!
//! Invariant: an answer is a reason to look, never a proof (design 5.5); the caller proves against the anchor itself. All answers of one
//! `Lookup` come from one moment: anchors published later are not seen. What it deliberately does not do: cross domains.

use std::path::PathBuf;

use redb::ReadOnlyTable;

use super::error::StoreError;
use super::index::{ANCHORS, BY_CONTENT, BY_EXTENTS, Bytes, Snapshot, content_key, extents_key, of_redb};
use super::key::{AnchorKey, ContentHash, Signature};
use super::open::Store;
use super::rows::AnchorRow;

/// A snapshot of the anchors; may be used from several threads. Holds no lock, but space of the index: don't keep it for hours.
pub struct Lookup {
    extents: Option<ReadOnlyTable<&'static [u8; 28], &'static [u8; 32]>>,
    content: Option<ReadOnlyTable<&'static [u8; 44], &'static [u8; 32]>>,
    anchors: Option<ReadOnlyTable<&'static [u8; 32], Bytes>>,
    snapshot: Snapshot,
    store: PathBuf,
}

impl std::fmt::Debug for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookup").field("store", &self.store).finish_non_exhaustive()
    }
}

/// Threads share one.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Lookup>();
};

impl Lookup {
    pub(super) fn of(store: &Store) -> Result<Lookup, StoreError> {
        let snapshot = store.snapshot()?;
        Ok(Lookup {
            extents: snapshot.table(BY_EXTENTS)?,
            content: snapshot.table(BY_CONTENT)?,
            anchors: snapshot.table(ANCHORS)?,
            snapshot,
            store: store.dir().to_owned(),
        })
    }

    /// An anchor of the domain with this size (bytes) that had these extents when it was made or last proved.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn by_extents(
        &self,
        domain: u32,
        size: u64,
        signature: &Signature,
    ) -> Result<Option<AnchorKey>, StoreError> {
        let Some(table) = &self.extents else { return Ok(None) };
        let found = table.get(&extents_key(domain, size, &signature.0)).map_err(|e| self.error(e))?;
        Ok(found.map(|guard| AnchorKey(*guard.value())))
    }

    /// An anchor of the domain with this size (bytes) that had this content when it was read.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn by_content(
        &self,
        domain: u32,
        size: u64,
        hash: &ContentHash,
    ) -> Result<Option<AnchorKey>, StoreError> {
        let Some(table) = &self.content else { return Ok(None) };
        let found = table.get(&content_key(domain, size, &hash.0)).map_err(|e| self.error(e))?;
        Ok(found.map(|guard| AnchorKey(*guard.value())))
    }

    /// An anchor's row.
    ///
    /// # Errors
    /// The index can't be read, the row is not understood.
    pub fn anchor(&self, key: &AnchorKey) -> Result<Option<AnchorRow>, StoreError> {
        let Some(table) = &self.anchors else { return Ok(None) };
        match table.get(&key.0).map_err(|e| self.error(e))? {
            Some(guard) => self.snapshot.decoded(guard.value()).map(Some),
            None => Ok(None),
        }
    }

    /// Calls `each` with every anchor, in the order of keys, until it says false.
    ///
    /// # Errors
    /// The index can't be read, a row is not understood.
    pub fn anchors(&self, mut each: impl FnMut(AnchorKey, AnchorRow) -> bool) -> Result<(), StoreError> {
        use redb::ReadableTable;
        let Some(table) = &self.anchors else { return Ok(()) };
        for row in table.iter().map_err(|e| self.error(e))? {
            let (key, value) = row.map_err(|e| self.error(e))?;
            if !each(AnchorKey(*key.value()), self.snapshot.decoded(value.value())?) {
                break;
            }
        }
        Ok(())
    }

    fn error(&self, error: redb::StorageError) -> StoreError {
        of_redb(&self.store, error.into())
    }
}
