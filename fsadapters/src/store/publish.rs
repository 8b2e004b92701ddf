//! Publication: check, sync (while the rows are made), one commit, and the marks of the unpublished go.
//!
//! Invariant: the commit names only what is complete on disk and consistent in itself: anchors of this store and domain, images whose
//! anchors are all known, roots whose images are all known. What it deliberately does not do: look at bytes.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use redb::ReadableTable;
use rustix::fs::AtFlags;

use super::build::{Build, NewDiff, Publication, UNPUBLISHED, locked};
use super::codec::encode;
use super::crash::step;
use super::error::StoreError;
use super::index::{
    ANCHORS, BUILDING, BY_CONTENT, BY_EXTENTS, Bytes, GENERATIONS, GRAVES, Generation, Grave, IMAGES, ROOTS,
    StoredDiff, StoredImage, Txn, content_key, extents_key,
};
use super::key::{AnchorKey, ImageDigest};
use super::open::root_name;
use super::rows::{AnchorRow, ImageRow, RootRow};

pub(super) fn publish(build: &Build<'_>, publication: &Publication) -> Result<(), StoreError> {
    let store = build.store;
    check(build, publication)?;
    // Held over the commit: nobody takes a number from a reservation that this commit ends.
    let mut reservation = locked(&store.reservation);
    let settled = store.builds.load(Ordering::SeqCst) == 1 && build.open.load(Ordering::SeqCst) == 0 && {
        let finished = locked(&build.finished);
        let published = publication.anchors.iter().filter(|(key, _)| finished.contains_key(key)).count();
        published == finished.len()
    };
    let ended = if settled { std::mem::take(&mut *reservation).rows } else { Vec::new() };
    let result = std::thread::scope(|scope| {
        // All that is named is complete. The rows are made meanwhile, for they are nothing before their commit, which waits for this.
        let sync = std::thread::Builder::new().spawn_scoped(scope, || store.sync());
        store.index.write(|txn| {
            let rows = put_rows(build, txn, publication, &ended);
            // Told first: a row that is refused can be mended, what is lost can't.
            match sync {
                Ok(sync) => sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
                // No thread is to be had: one after the other.
                Err(_) => store.sync()?,
            }
            rows?;
            step("store.publish.synced");
            build.tried.store(true, Ordering::SeqCst);
            Ok(())
        })
    });
    drop(reservation);
    result?;
    build.tried.store(false, Ordering::SeqCst);
    step("store.publish.committed");
    let mut finished = locked(&build.finished);
    for (key, _) in &publication.anchors {
        finished.remove(key);
    }
    drop(finished);
    let mut roots = locked(&build.roots);
    for root in &publication.roots {
        roots.remove(&(root.id, root.generation));
        let mark = format!("{}/{UNPUBLISHED}", root_name(root.id, root.generation));
        // Left behind it is no harm: the index says that the directory is published.
        let _ = rustix::fs::unlinkat(&store.fd, &mark, AtFlags::empty());
    }
    step("store.publish.done");
    Ok(())
}

fn put_rows(
    build: &Build<'_>,
    txn: &Txn<'_>,
    publication: &Publication,
    ended: &[u64],
) -> Result<(), StoreError> {
    put_anchors(build, txn, publication)?;
    put_images(build, txn, publication)?;
    put_roots(build, txn, publication)?;
    for first in ended {
        txn.remove(BUILDING, first)?;
    }
    Ok(())
}

/// What can be told without the index.
fn check(build: &Build<'_>, publication: &Publication) -> Result<(), StoreError> {
    let domain = build.domain.id;
    let wrong = |what: String| Err(StoreError::Inconsistent(what));
    for (key, row) in &publication.anchors {
        if *key != AnchorKey::of(build.store.id(), row.serial) {
            return wrong(format!("anchor {key} is not number {}", row.serial));
        }
        if row.domain != domain {
            return wrong(format!("anchor {key} is of domain {}, not {domain}", row.domain));
        }
    }
    for (digest, row) in &publication.images {
        if row.domain != domain {
            return wrong(format!("image {digest} is of domain {}, not {domain}", row.domain));
        }
        if row.anchors.windows(2).any(|w| w[0] >= w[1]) {
            return wrong(format!("the anchors of image {digest} are not ascending"));
        }
    }
    for diff in &publication.diffs {
        let of = |root: &RootRow| (root.id, root.generation) == (diff.root, diff.generation);
        if !publication.roots.iter().any(of) {
            return wrong(format!("a layer for root {}, which is not published with it", diff.root));
        }
        if diff.row.anchors.windows(2).any(|w| w[0] >= w[1]) {
            return wrong(format!("the anchors of a layer of root {} are not ascending", diff.root));
        }
    }
    for root in &publication.roots {
        if root.domain != domain {
            return wrong(format!("root {} is of domain {}, not {domain}", root.id, root.domain));
        }
        build.store.check_root_path(&root.path)?;
        // Commands make directories of these names (`mount --all --at`, `unseal --all --export`).
        if matches!(&*root.name, "" | "." | "..") || root.name.contains(['/', '\0']) {
            let why = "it is no name of a directory";
            return Err(StoreError::BadName { what: "root", name: root.name.clone(), why });
        }
    }
    Ok(())
}

fn put_anchors(build: &Build<'_>, txn: &Txn<'_>, publication: &Publication) -> Result<(), StoreError> {
    let mut anchors = txn.table(ANCHORS)?;
    for (key, row) in &publication.anchors {
        let made = locked(&build.finished).get(key).copied().flatten();
        let stamped = AnchorRow { stamp: made.or(row.stamp), ..row.clone() };
        let old = anchors.insert(&key.0, &encode(&stamped)[..]).map_err(|e| txn.error(e))?;
        let old: Option<AnchorRow> = old.map(|guard| txn.decoded(guard.value())).transpose()?;
        if let Some(stamp) = old.as_ref().and_then(|old| old.stamp).filter(|_| stamped.stamp.is_none()) {
            // New hints of an anchor that was published before: it is the same file.
            let stamped = AnchorRow { stamp: Some(stamp), ..stamped };
            anchors.insert(&key.0, &encode(&stamped)[..]).map_err(|e| txn.error(e))?;
        }
        if let Some(old) = old.filter(|old| (old.signature, old.content) != (row.signature, row.content)) {
            forget_hints(txn, key, &old)?;
        }
    }
    let mut by_extents = txn.table(BY_EXTENTS)?;
    let mut by_content = txn.table(BY_CONTENT)?;
    for (key, row) in &publication.anchors {
        if let Some(signature) = &row.signature {
            let hint = extents_key(row.domain, row.size, &signature.0);
            let first = by_extents.get(&hint).map_err(|e| txn.error(e))?.map(|g| AnchorKey(*g.value()));
            let keep = |row: &AnchorRow| row.signature.as_ref() == Some(signature);
            if !still_good(txn, &anchors, first, key, keep)? {
                by_extents.insert(&hint, &key.0).map_err(|e| txn.error(e))?;
            }
        }
        if let Some(content) = &row.content {
            let hint = content_key(row.domain, row.size, &content.0);
            let first = by_content.get(&hint).map_err(|e| txn.error(e))?.map(|g| AnchorKey(*g.value()));
            let keep = |row: &AnchorRow| row.content.as_ref() == Some(content);
            if !still_good(txn, &anchors, first, key, keep)? {
                by_content.insert(&hint, &key.0).map_err(|e| txn.error(e))?;
            }
        }
    }
    Ok(())
}

/// Of two anchors with one hint the older keeps it, if it still says the same of itself: it has more sharers.
fn still_good(
    txn: &Txn<'_>,
    anchors: &impl ReadableTable<&'static [u8; 32], Bytes>,
    first: Option<AnchorKey>,
    new: &AnchorKey,
    keep: impl Fn(&AnchorRow) -> bool,
) -> Result<bool, StoreError> {
    let Some(first) = first.filter(|first| first != new) else { return Ok(false) };
    match anchors.get(&first.0).map_err(|e| txn.error(e))? {
        Some(guard) => Ok(keep(&txn.decoded(guard.value())?)),
        None => Ok(false),
    }
}

/// Takes back the hints that lead to `key`.
pub(super) fn forget_hints(txn: &Txn<'_>, key: &AnchorKey, row: &AnchorRow) -> Result<(), StoreError> {
    if let Some(signature) = &row.signature {
        let mut table = txn.table(BY_EXTENTS)?;
        let hint = extents_key(row.domain, row.size, &signature.0);
        let leads_here = table.get(&hint).map_err(|e| txn.error(e))?.is_some_and(|g| *g.value() == key.0);
        if leads_here {
            table.remove(&hint).map_err(|e| txn.error(e))?;
        }
    }
    if let Some(content) = &row.content {
        let mut table = txn.table(BY_CONTENT)?;
        let hint = content_key(row.domain, row.size, &content.0);
        let leads_here = table.get(&hint).map_err(|e| txn.error(e))?.is_some_and(|g| *g.value() == key.0);
        if leads_here {
            table.remove(&hint).map_err(|e| txn.error(e))?;
        }
    }
    Ok(())
}

fn put_images(build: &Build<'_>, txn: &Txn<'_>, publication: &Publication) -> Result<(), StoreError> {
    let anchors = txn.table(ANCHORS)?;
    let mut images = txn.table(IMAGES)?;
    let mut graves = txn.table(GRAVES)?;
    let new: BTreeMap<AnchorKey, u64> = publication.anchors.iter().map(|(k, r)| (*k, r.serial)).collect();
    for (digest, row) in &publication.images {
        // It may have been on its way out.
        let grave = encode(&Grave::Image(*digest));
        graves.remove(&grave[..]).map_err(|e| txn.error(e))?;
        if images.get(&digest.0).map_err(|e| txn.error(e))?.is_some() {
            continue;
        }
        let stored = stored_image(build, txn, &anchors, &new, digest, row)?;
        images.insert(&digest.0, &encode(&stored)[..]).map_err(|e| txn.error(e))?;
    }
    Ok(())
}

fn stored_image(
    build: &Build<'_>,
    txn: &Txn<'_>,
    anchors: &impl ReadableTable<&'static [u8; 32], Bytes>,
    new: &BTreeMap<AnchorKey, u64>,
    digest: &ImageDigest,
    row: &ImageRow,
) -> Result<StoredImage, StoreError> {
    let serials = serials(build, txn, anchors, new, &row.anchors, &|| format!("image {digest}"))?;
    Ok(StoredImage::new(row.domain, row.bytes, row.entries, serials))
}

/// The numbers of `keys`, all of which the build's domain has.
fn serials(
    build: &Build<'_>,
    txn: &Txn<'_>,
    anchors: &impl ReadableTable<&'static [u8; 32], Bytes>,
    new: &BTreeMap<AnchorKey, u64>,
    keys: &[AnchorKey],
    who: &dyn Fn() -> String,
) -> Result<Vec<u64>, StoreError> {
    let mut serials = Vec::with_capacity(keys.len());
    for key in keys {
        if let Some(serial) = new.get(key) {
            serials.push(*serial);
            continue;
        }
        let found = anchors.get(&key.0).map_err(|e| txn.error(e))?;
        let known: Option<AnchorRow> = found.map(|guard| txn.decoded(guard.value())).transpose()?;
        match known {
            Some(anchor) if anchor.domain == build.domain.id => serials.push(anchor.serial),
            Some(anchor) => {
                let what = format!("{} names anchor {key} of domain {}", who(), anchor.domain);
                return Err(StoreError::Inconsistent(what));
            }
            None => {
                let what = format!("{} names the unknown anchor {key}", who());
                return Err(StoreError::Inconsistent(what));
            }
        }
    }
    Ok(serials)
}

/// The layers of `publication`, by root and generation.
fn stored_diffs(
    build: &Build<'_>,
    txn: &Txn<'_>,
    publication: &Publication,
) -> Result<BTreeMap<(u64, u64), StoredDiff>, StoreError> {
    let anchors = txn.table(ANCHORS)?;
    let new: BTreeMap<AnchorKey, u64> = publication.anchors.iter().map(|(k, r)| (*k, r.serial)).collect();
    let stored = |diff: &NewDiff| {
        let who = || format!("the layer of root {}", diff.root);
        let serials = serials(build, txn, &anchors, &new, &diff.row.anchors, &who)?;
        let stored = StoredDiff::new(diff.row.digest, diff.row.entries, serials);
        Ok(((diff.root.0, diff.generation), stored))
    };
    publication.diffs.iter().map(stored).collect()
}

fn put_roots(build: &Build<'_>, txn: &Txn<'_>, publication: &Publication) -> Result<(), StoreError> {
    if publication.roots.is_empty() {
        return Ok(());
    }
    let mut diffs = stored_diffs(build, txn, publication)?;
    let mut names: BTreeMap<String, _> =
        txn.rows::<_, RootRow>(ROOTS)?.into_iter().map(|root| (root.name, root.id)).collect();
    for root in &publication.roots {
        {
            let images = txn.table(IMAGES)?;
            for layer in &root.layers {
                let found = images.get(&layer.0).map_err(|e| txn.error(e))?;
                let image: Option<StoredImage> = found.map(|g| txn.decoded(g.value())).transpose()?;
                // Without anchors there is nothing to keep apart: equal trees of two domains have one image then, as it was made first.
                if image.is_none_or(|image| image.domain != root.domain && !image.serial_steps.is_empty()) {
                    let what = format!("root {} names the image {layer}, unknown in its domain", root.id);
                    return Err(StoreError::Inconsistent(what));
                }
            }
        }
        names.retain(|_, id| *id != root.id);
        if names.insert(root.name.clone(), root.id).is_some() {
            let why = "another root of the store has it";
            return Err(StoreError::BadName { what: "root", name: root.name.clone(), why });
        }
        txn.put(ROOTS, root.id.0, root)?;
        let key = (root.id.0, root.generation);
        let diff = match txn.get::<_, Generation>(GENERATIONS, key)? {
            // A row that is renewed: on disk nothing has changed.
            Some(there) => there.diff,
            None => diffs.remove(&key),
        };
        let generation = Generation { domain: root.domain, layers: root.layers.clone(), diff };
        txn.put(GENERATIONS, key, &generation)?;
    }
    Ok(())
}
