//! What a crash left behind goes at the next open.
//!
//! Invariant: only what is known never to have been published, or to have been given up by a commit, is removed: by reserved number, by
//! mark, by grave. What resists is left for the next time: it is garbage, the store is whole. What can't be told is left alone and named by `verify`. A crash in here is fine: the next open starts over. What it
//! deliberately does not do: run before the index has been believed.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::build::{UNPUBLISHED, is_unpublished, remove_unpublished};
use super::crash::step;
use super::error::StoreError;
use super::index::{ANCHORS, BUILDING, DOMAINS, GENERATIONS, IMAGES};
use super::key::{AnchorKey, ImageDigest, SealId};
use super::open::{Store, anchor_name, domain_name, root_name};
use super::remove::{remove_tree, unlink_immutable};
use super::rows::DomainRow;

pub(super) fn recover(store: &Store) -> Result<(), StoreError> {
    store.empty_graves()?;
    step("store.recover.graves");
    drop_orphaned_anchors(store)?;
    drop_unnamed_domains(store)?;
    step("store.recover.anchors");
    empty_tmp(store)?;
    drop_orphaned_images(store)?;
    step("store.recover.images");
    drop_unpublished_roots(store)?;
    step("store.recover.roots");
    Ok(())
}

/// Files with reserved numbers that no row names.
fn drop_orphaned_anchors(store: &Store) -> Result<(), StoreError> {
    let snapshot = store.snapshot()?;
    let mut ranges = Vec::new();
    snapshot.each(BUILDING, |first, end| {
        ranges.push((first, end));
        Ok(())
    })?;
    if ranges.is_empty() {
        return Ok(());
    }
    let domains: Vec<DomainRow> = snapshot.rows(DOMAINS)?;
    let anchors = snapshot.table(ANCHORS)?;
    let damaged = |detail: String| StoreError::Damaged { path: store.dir.clone(), detail };
    let mut resisted = false;
    for (first, end) in &ranges {
        if end.checked_sub(*first).is_none_or(|n| n > 1 << 24) {
            return Err(damaged(format!("a reservation from {first} to {end}")));
        }
        for serial in *first..*end {
            let key = AnchorKey::of(store.id(), serial);
            let named = match &anchors {
                Some(table) => table.get(&key.0).map_err(|e| damaged(e.to_string()))?.is_some(),
                None => false,
            };
            if named {
                continue;
            }
            for domain in &domains {
                let name = anchor_name(domain.id, &key);
                match unlink_immutable(&store.fd, &name) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(e) => {
                        tracing::warn!("{name} is left for the next time: {e}");
                        resisted = true;
                    }
                }
            }
        }
    }
    drop(snapshot);
    if resisted {
        return Ok(());
    }
    store.sync()?;
    store.index.write(|txn| {
        for (first, _) in &ranges {
            txn.remove(BUILDING, first)?;
        }
        Ok(())
    })
}

/// What can't be removed now keeps nobody from using the store.
fn log(result: Result<(), StoreError>) {
    if let Err(e) = result {
        tracing::warn!("left for the next time: {e}");
    }
}

/// Directories of a domain that was never committed. `rmdir` only: a file in them keeps them.
fn drop_unnamed_domains(store: &Store) -> Result<(), StoreError> {
    let domains: Vec<DomainRow> = store.snapshot()?.rows(DOMAINS)?;
    for name in store.names_in("anchors")? {
        let number = std::str::from_utf8(&name).ok().and_then(|name| name.parse::<u32>().ok());
        let Some(number) = number.filter(|n| !domains.iter().any(|d| d.id == *n)) else { continue };
        let dir = domain_name(number);
        for first in 0..=u8::MAX {
            let _ = rustix::fs::unlinkat(&store.fd, format!("{dir}/{first:02x}"), AtFlags::REMOVEDIR);
        }
        let _ = rustix::fs::unlinkat(&store.fd, &dir, AtFlags::REMOVEDIR);
    }
    Ok(())
}

fn empty_tmp(store: &Store) -> Result<(), StoreError> {
    for name in store.names_in("tmp")? {
        let Ok(name) = String::from_utf8(name) else { continue };
        let name = format!("tmp/{name}");
        match unlink_immutable(&store.fd, &name) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => log(remove_tree(store, &name)),
            Err(e) => tracing::warn!("{name} is left for the next time: {e}"),
        }
    }
    Ok(())
}

/// Files in `images/` that are named like images and not in the index. Anything else there is left to `verify`.
fn drop_orphaned_images(store: &Store) -> Result<(), StoreError> {
    let names = store.names_in("images")?;
    if names.is_empty() {
        return Ok(());
    }
    let mut known = BTreeSet::new();
    store.snapshot()?.each(IMAGES, |digest, _| {
        known.insert(ImageDigest(*digest));
        Ok(())
    })?;
    for name in names {
        let digest = std::str::from_utf8(&name)
            .ok()
            .and_then(|name| ImageDigest::from_hex(name.strip_suffix(".erofs")?));
        let Some(digest) = digest.filter(|digest| !known.contains(digest)) else { continue };
        let path = super::open::image_name(&digest);
        match unlink_immutable(&store.fd, &path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => tracing::warn!("{path} is left for the next time: {e}"),
        }
    }
    Ok(())
}

fn drop_unpublished_roots(store: &Store) -> Result<(), StoreError> {
    let ids = store.names_in("roots")?;
    if ids.is_empty() {
        return Ok(());
    }
    let mut published = BTreeSet::new();
    store.snapshot()?.each(GENERATIONS, |key, _| {
        published.insert(key);
        Ok(())
    })?;
    for id in ids.iter().filter_map(|name| numbered(name, "")) {
        for generation in store.names_in(&format!("roots/{}", SealId(id)))? {
            let Some(generation) = numbered(&generation, "g") else { continue };
            let name = root_name(SealId(id), generation);
            if published.contains(&(id, generation)) {
                // Left by a crash right after the commit.
                let _ = rustix::fs::unlinkat(&store.fd, format!("{name}/{UNPUBLISHED}"), AtFlags::empty());
            } else if is_unpublished(store, &name) {
                log(remove_unpublished(store, SealId(id), generation));
            }
        }
        // Fails while a generation is in it, as it should.
        let _ = rustix::fs::unlinkat(&store.fd, format!("roots/{}", SealId(id)), AtFlags::REMOVEDIR);
    }
    Ok(())
}

/// `<prefix><number>`, written as we write it.
fn numbered(name: &[u8], prefix: &str) -> Option<u64> {
    let text = std::ffi::OsStr::from_bytes(name).to_str()?.strip_prefix(prefix)?;
    let number: u64 = text.parse().ok()?;
    let as_written = if prefix.is_empty() { SealId(number).to_string() } else { number.to_string() };
    (as_written == text).then_some(number)
}
