//! Under `--content`: anchors that were made without it, which no content hash leads to. Those of a size are read when a file of that
//! size has the bytes of no anchor that is known by them.
//!
//! Invariant: a hash that is written here was read from its anchor in this call, and is a hint like all others. What it
//! deliberately does not do: read an anchor twice in one call, or one of a size that no file needs.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::{Locator, Map};
use crate::sealed::walk::WalkError;
use crate::store::{AnchorKey, AnchorRow, ContentHash, StoreError};

/// Anchors of one size; emptied by whoever reads them, while others wait.
type OfSize = Arc<Mutex<Vec<AnchorKey>>>;

/// Anchors without a content hash, by size in bytes. Found when first asked for.
#[derive(Debug, Default)]
pub(super) struct Unread(OnceLock<Map<u64, OfSize>>);

impl Locator<'_> {
    /// Reads the anchors of this size that have no hash yet; whether one of them has `hash`.
    pub(super) fn learn(&self, size: u64, hash: &ContentHash) -> Result<bool, WalkError> {
        if !self.content || self.borrow.is_some() {
            return Ok(false);
        }
        let unread = match self.unread.0.get() {
            Some(unread) => unread,
            None => {
                let found = self.without_hash()?;
                self.unread.0.get_or_init(|| found)
            }
        };
        let Some(of_size) = unread.get(&size).map(|of_size| Arc::clone(&*of_size)) else { return Ok(false) };
        let mut keys = of_size.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        while let Some(key) = keys.pop() {
            let Some(row) = self.lookup.anchor(&key)? else { continue };
            let Some(anchor) = self.protected(key, size) else { continue };
            match self.reads.hash(anchor.file.as_fd(), size, &mut bytes, self.progress.cancel_flag()) {
                Ok(found) => self.know(key, row, found),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return Err(WalkError::Cancelled),
                Err(error) => {
                    tracing::warn!(%key, %error, "anchor can't be read: `pagefold verify` tells more");
                }
            }
        }
        drop(keys);
        Ok(self.slot(&self.contents, &(size, *hash)).is_some())
    }

    fn know(&self, key: AnchorKey, row: AnchorRow, hash: ContentHash) {
        let slot = Arc::clone(&*self.contents.entry((row.size, hash)).or_default());
        slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(key);
        // A row that was renewed for another reason keeps what that was.
        let renewed = self.made.get(&key).map(|made| made.0.clone());
        self.made.insert(key, (AnchorRow { content: Some(hash), ..renewed.unwrap_or(row) }, false));
    }

    fn without_hash(&self) -> Result<Map<u64, OfSize>, StoreError> {
        let mut found: HashMap<u64, Vec<AnchorKey>> = HashMap::new();
        self.lookup.anchors(|key, row| {
            if row.domain == self.domain && row.content.is_none() && row.borrowed.is_none() {
                found.entry(row.size).or_default().push(key);
            }
            !self.progress.is_cancelled()
        })?;
        Ok(found.into_iter().map(|(size, keys)| (size, Arc::new(Mutex::new(keys)))).collect())
    }
}
