//! Hints that have gone stale all at once: a btrfs balance re-writes every address (one invalidated 5,577 of 5,577 keys), clones and their
//! anchors alike, so that they are at one place still and the index knows another.
//!
//! Invariant: a hint that is written here was read from its anchor in this call. What it deliberately does not do: anything on XFS, which
//! moves nothing that is immutable; or more than a look at [`SAMPLE`] anchors when nothing has moved.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use super::{Locator, Room};
use crate::sealed::reading::signature;
use crate::store::{AnchorKey, AnchorRow, Signature, StoreError};

/// Anchors looked at to find out whether something moved. Keys are random, so these are anywhere on the disk.
const SAMPLE: usize = 64;

impl Locator<'_> {
    /// Called for the first file that no hint leads to. Afterwards every anchor of the domain is found by where it is now.
    pub(super) fn refresh(&self) -> Result<(), StoreError> {
        let mut rows = Vec::new();
        self.lookup.anchors(|key, row| {
            if row.domain == self.domain && row.signature.is_some() {
                rows.push((key, row));
            }
            true
        })?;
        let mut room = Room::default();
        let mut moved: Vec<(AnchorKey, AnchorRow, Signature)> = Vec::new();
        for (looked_at, (key, row)) in rows.into_iter().enumerate() {
            if looked_at == SAMPLE && moved.is_empty() || self.progress.is_cancelled() {
                return Ok(());
            }
            if let Some(now) = self.signature_now(key, row.size, &mut room)
                && row.signature != Some(now)
            {
                moved.push((key, row, now));
            }
        }
        tracing::info!(anchors = moved.len(), "anchors have moved since they were made: hints renewed");
        for (key, row, now) in moved {
            let slot = Arc::clone(&*self.places.entry((row.size, now)).or_default());
            slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(key);
            self.made.insert(key, (AnchorRow { signature: Some(now), ..row }, false));
        }
        Ok(())
    }

    fn signature_now(&self, key: AnchorKey, size: u64, room: &mut Room) -> Option<Signature> {
        let anchor = self.protected(key, size)?;
        let (reading, _) = self.readings.read(anchor.file.as_fd(), &anchor.stat, &mut room.extents).ok()?;
        if reading.decides() { signature(&reading.layout) } else { None }
    }
}
