//! Images, roots' directories, and files that nothing names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{ProblemKind, VerifyReport};
use crate::sealed::diff::{self, DiffDamage};
use crate::sealed::image;
use crate::sealed::tree::{EntryId, Node, Tree};
use crate::store::error::StoreError;
use crate::store::gc::anchor_of;
use crate::store::index::{ANCHORS, DOMAINS, GENERATIONS, Generation, IMAGES, StoredDiff, StoredImage};
use crate::store::key::{AnchorKey, ContentHash, ImageDigest, SealId};
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
    let mut layer = None;
    if let Some(diff) = &row.diff {
        of_images.extend(diff_anchors(store, (id, generation), row.domain, diff, report)?);
        layer = diff_layer(&dir, diff.digest, report);
    }
    match read_manifest(&dir) {
        Ok(tree) => {
            if let Some(path) = layer.and_then(|layer| first_difference(&layer, &tree)) {
                let detail = "the root's manifest says something else of it";
                report.problem(dir.join(diff::DIFF).join(path), ProblemKind::Damaged, detail);
            }
            if let Some(key) = tree.anchors().iter().find(|key| !of_images.contains(*key)) {
                let detail =
                    format!("it names anchor {key}, which neither the root's image nor its layer has");
                report.problem(dir.join("manifest"), ProblemKind::Damaged, detail);
            }
        }
        Err(e) => report.problem(dir.join("manifest"), ProblemKind::Damaged, e.to_string()),
    }
    Ok(())
}

/// The anchors that a layer names.
fn diff_anchors(
    store: &Store,
    (id, generation): (SealId, u64),
    domain: u32,
    diff: &StoredDiff,
    report: &mut VerifyReport,
) -> Result<Vec<AnchorKey>, StoreError> {
    let snapshot = store.snapshot()?;
    let keys = diff.keys(store.id()).unwrap_or_default();
    for (key, serial) in &keys {
        let anchor: Option<AnchorRow> = snapshot.get(ANCHORS, &key.0)?;
        if anchor.is_none_or(|a| a.serial != *serial || a.domain != domain) {
            let detail = format!("it names anchor {key}, which its domain does not have");
            report.problem(store.root_dir(id, generation).join(diff::DIFF), ProblemKind::Index, detail);
        }
    }
    Ok(keys.into_keys().collect())
}

/// What the layer in `dir` must be, after it was compared with that.
fn diff_layer(dir: &Path, digest: ContentHash, report: &mut VerifyReport) -> Option<Tree> {
    let tell = |damage: DiffDamage, report: &mut VerifyReport| {
        let kind = match &damage {
            DiffDamage::Wrong { what: "is missing", .. } => ProblemKind::Missing,
            DiffDamage::Read { .. } => ProblemKind::Unreadable,
            _ => ProblemKind::Damaged,
        };
        let detail = damage.to_string();
        let (DiffDamage::Wrong { path, .. } | DiffDamage::List { path, .. } | DiffDamage::Read { path, .. }) =
            damage;
        report.problem(path, kind, detail);
    };
    let tree = diff::read(dir, digest).map_err(|damage| tell(damage, report)).ok()?;
    if let Err(damage) = diff::open_as(dir, &tree) {
        tell(damage, report);
    }
    Some(tree)
}

/// The first entry of the layer that the root `tree` has not, or has otherwise.
fn first_difference(layer: &Tree, tree: &Tree) -> Option<PathBuf> {
    let all = 0..u32::try_from(tree.entries.len()).unwrap_or(u32::MAX);
    let names: HashMap<Vec<u8>, EntryId> = all.map(|n| (tree.path(EntryId(n)), EntryId(n))).collect();
    let differs = |entry: &EntryId| {
        let (of_layer, there) = (layer.inode(*entry), names.get(&layer.path(*entry)));
        match (&of_layer.node, there) {
            (Node::CharDevice(0), there) => there.is_some(),
            (_, None) => true,
            (_, Some(there)) => {
                let there = tree.inode(*there);
                // No layer tells the top directory's own metadata.
                there.node != of_layer.node || (entry.0 != 0 && there.meta != of_layer.meta)
            }
        }
    };
    let wrong = (0..u32::try_from(layer.entries.len()).ok()?).map(EntryId).find(differs)?;
    Some(Path::new(std::ffi::OsStr::from_bytes(&layer.path(wrong))).to_owned())
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
