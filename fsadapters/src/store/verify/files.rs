//! Images, roots' directories, and files that nothing names.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use super::{ProblemKind, VerifyReport};
use crate::sealed::gone;
use crate::sealed::image;
use crate::store::error::StoreError;
use crate::store::gc::anchor_of;
use crate::store::index::{ANCHORS, DOMAINS, GENERATIONS, Generation, IMAGES, StoredImage};
use crate::store::key::{AnchorKey, ImageDigest, SealId};
use crate::store::manifest::read_manifest;
use crate::store::open::{Store, domain_name, image_name, root_name};
use crate::store::place;
use crate::store::rows::{AnchorRow, DomainRow};
use crate::store::task::Task;

pub(super) fn images(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    let mut rows: Vec<(ImageDigest, StoredImage)> = Vec::new();
    let snapshot = store.snapshot()?;
    snapshot.each(IMAGES, |digest, bytes| {
        rows.push((ImageDigest(*digest), snapshot.decoded(bytes)?));
        Ok(())
    })?;
    task.expect(rows.len() as u64);
    for (digest, row) in rows {
        if task.is_cancelled() {
            return Ok(());
        }
        image_file(store, &digest, &row, report);
        for (key, serial) in row.keys(store.id()).unwrap_or_default() {
            let anchor: Option<AnchorRow> = snapshot.get(ANCHORS, &key.0)?;
            if anchor.is_none_or(|a| a.serial != serial || a.domain != row.domain) {
                let detail = format!("it names anchor {key}, which its domain does not have");
                report.problem(store.image_path(&digest), ProblemKind::Index, detail);
            }
        }
        report.images += 1;
        task.did(1);
    }
    Ok(())
}

fn image_file(store: &Store, digest: &ImageDigest, row: &StoredImage, report: &mut VerifyReport) {
    let path = store.image_path(digest);
    let file = match store.open_image(digest) {
        Ok(file) => file,
        Err(_) if !place::exists(&store.fd, &image_name(digest)) => {
            let detail = "the index names it; seal its roots again";
            return report.problem(path, ProblemKind::Missing, detail);
        }
        Err(e) => return report.problem(path, ProblemKind::Unreadable, e.to_string()),
    };
    match file.metadata() {
        Ok(meta) if meta.len() != row.bytes => {
            let detail = format!("{} bytes, the index says {}", meta.len(), row.bytes);
            report.problem(path.clone(), ProblemKind::Damaged, detail);
        }
        Ok(meta) if meta.mode() & 0o7777 != 0o400 || meta.uid() != rustix::process::geteuid().as_raw() => {
            let detail = format!("mode {:04o}, owner {}", meta.mode() & 0o7777, meta.uid());
            report.problem(path.clone(), ProblemKind::Open, detail);
        }
        Ok(_) => {}
        Err(e) => report.problem(path.clone(), ProblemKind::Unreadable, e.to_string()),
    }
    if let Err(damage) = image::verify(&file, *digest) {
        report.problem(path, ProblemKind::Damaged, damage.to_string());
    }
}

pub(super) fn roots(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    let mut rows: Vec<(SealId, u64, Generation)> = Vec::new();
    let snapshot = store.snapshot()?;
    snapshot.each(GENERATIONS, |(id, generation), bytes| {
        rows.push((SealId(id), generation, snapshot.decoded(bytes)?));
        Ok(())
    })?;
    for (id, generation) in store.generations_without_root()? {
        let detail = "an upper that belongs to no root of the index";
        report.problem(store.root_dir(id, generation), ProblemKind::Index, detail);
    }
    for root in store.roots()? {
        if !rows.iter().any(|(id, generation, _)| (*id, *generation) == (root.id, root.generation)) {
            let detail = "the root's current generation has no row";
            report.problem(store.root_dir(root.id, root.generation), ProblemKind::Index, detail);
        }
    }
    task.expect(rows.len() as u64);
    for (id, generation, row) in rows {
        if task.is_cancelled() {
            return Ok(());
        }
        root_dir(store, id, generation, &row, report)?;
        report.roots += 1;
        task.did(1);
    }
    Ok(())
}

fn root_dir(
    store: &Store,
    id: SealId,
    generation: u64,
    row: &Generation,
    report: &mut VerifyReport,
) -> Result<(), StoreError> {
    let (name, dir) = (root_name(id, generation), store.root_dir(id, generation));
    for part in ["upper", "work"] {
        if !place::is_dir(&store.fd, &format!("{name}/{part}")) {
            report.problem(dir.join(part), ProblemKind::Missing, "no such directory");
        }
    }
    match gone::missing(&dir) {
        Ok(None) => {}
        Ok(Some(path)) => {
            let detail = "a whiteout: the view can't be mounted without it; seal the root again";
            report.problem(path, ProblemKind::Missing, detail);
        }
        Err(e) => report.problem(dir.clone(), ProblemKind::Damaged, e.to_string()),
    }
    let mut of_images: BTreeSet<AnchorKey> = BTreeSet::new();
    for digest in &row.layers {
        match store.image(digest)? {
            Some(image) => of_images.extend(image.anchors),
            None => {
                let detail =
                    format!("root {id} generation {generation} needs it and the index does not have it");
                report.problem(store.image_path(digest), ProblemKind::Missing, detail);
            }
        }
    }
    match read_manifest(&dir) {
        Ok(tree) => {
            if let Some(key) = tree.anchors().iter().find(|key| !of_images.contains(*key)) {
                let detail = format!("it names anchor {key}, which none of the root's images has");
                report.problem(dir.join("manifest"), ProblemKind::Damaged, detail);
            }
        }
        Err(e) => report.problem(dir.join("manifest"), ProblemKind::Damaged, e.to_string()),
    }
    Ok(())
}

/// Names that pagefold does not make, or that no row goes with.
pub(super) fn unexpected(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    const TOP: [&str; 9] =
        ["FORMAT", "lock", "commits", "index.redb", "anchors", "images", "roots", "mounts", "tmp"];
    let snapshot = store.snapshot()?;
    let mut known: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    known.insert(".".into(), TOP.iter().map(ToString::to_string).collect());
    let domains: Vec<DomainRow> = snapshot.rows(DOMAINS)?;
    known.insert("anchors".into(), domains.iter().map(|d| d.id.to_string()).collect());
    let mut images = BTreeSet::new();
    snapshot.each(IMAGES, |digest, _| {
        images.insert(format!("{}.erofs", ImageDigest(*digest)));
        Ok(())
    })?;
    known.insert("images".into(), images);
    known.insert("roots".into(), BTreeSet::new());
    snapshot.each(GENERATIONS, |(id, generation), _| {
        let id = SealId(id).to_string();
        known.entry("roots".into()).or_default().insert(id.clone());
        known.entry(format!("roots/{id}")).or_default().insert(format!("g{generation}"));
        Ok(())
    })?;
    for (dir, names) in &known {
        for name in store.names_in(dir)? {
            if !std::str::from_utf8(&name).is_ok_and(|name| names.contains(name)) {
                tell(store, dir, &name, report);
            }
        }
    }
    let rows = snapshot.table(ANCHORS)?;
    for domain in domains {
        for first in 0..=u8::MAX {
            if task.is_cancelled() {
                return Ok(());
            }
            let dir = format!("{}/{first:02x}", domain_name(domain.id));
            for name in store.names_in(&dir)? {
                let named = match (anchor_of(first, &name), &rows) {
                    (Some(key), Some(rows)) => rows
                        .get(&key.0)
                        .map_err(|e| crate::store::index::of_redb(&store.dir, e.into()))?
                        .is_some(),
                    _ => false,
                };
                if !named {
                    tell(store, &dir, &name, report);
                }
            }
        }
    }
    Ok(())
}

fn tell(store: &Store, dir: &str, name: &[u8], report: &mut VerifyReport) {
    let path = if dir == "." { store.dir.clone() } else { store.dir.join(dir) };
    let path = path.join(std::ffi::OsStr::from_bytes(name));
    report.problem(
        path,
        ProblemKind::Unexpected,
        "the index does not know it; `pagefold gc` removes orphans",
    );
}
