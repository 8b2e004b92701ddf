//! A proved root becomes an image, a manifest and an upper; nothing is visible before the commit.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Walked;
use super::base::{Base, Difference};
use super::root::{OpenRoot, RootError};
use crate::scan::Skipped;
use crate::sealed::diff;
use crate::sealed::image::{self, BuiltImage};
use crate::sealed::locate::{Located, Locator};
use crate::sealed::prove::Shown;
use crate::sealed::report::{Counts, Outcome, RootSeal};
use crate::sealed::tree::{EntryId, Node, Tree};
use crate::sealed::upper;
use crate::sealed::walk::{Sketch, WalkError};
use crate::store::manifest::{Numbers, write_manifest};
use crate::store::{DiffRow, DomainRow, ImageDigest, ImageRow, NewDiff, RootRow, SealId, Store};

/// A root that is ready to be published.
pub(super) struct Written {
    /// Taken by the publication; `None` for a root that has no image of its own, or has not changed.
    pub image: Option<(ImageDigest, ImageRow)>,
    /// Taken by the publication: what lies over an image that is published already.
    pub diff: Option<NewDiff>,
    /// `None` where the row that is there says it all.
    pub row: Option<RootRow>,
    pub report: RootSeal,
    pub unsettled: Vec<Skipped>,
}

/// Where everything goes.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub store: &'a Store,
    pub domain: &'a DomainRow,
    pub locator: &'a Locator<'a>,
    /// What roots may be told by their differences from.
    pub base: Option<&'a Base>,
    /// Image and manifest of one root at the same time.
    pub split: bool,
}

/// Writes all of a group, several at a time.
pub(super) fn write_all(
    group: Vec<Walked>,
    place: Place<'_>,
    threads: usize,
) -> Vec<(OpenRoot, Result<Written, RootError>)> {
    let new = group.iter().filter(|walked| walked.root.row.is_none()).count() as u64;
    let mut ids = match place.store.new_seal_ids(new) {
        Ok(ids) => ids.into_iter(),
        Err(error) => {
            // One index: what fails for one fails for all. The first gets the error, the others its text.
            let text = error.to_string();
            let other =
                || RootError::Io { op: "number the root", source: std::io::Error::other(text.clone()) };
            return group.into_iter().map(|walked| (walked.root, Err(other()))).collect();
        }
    };
    let tasks: Vec<Mutex<Option<(Walked, SealId)>>> = group
        .into_iter()
        .map(|walked| {
            let known = walked.root.row.as_ref().map(|row| row.id);
            let id = known.or_else(|| ids.next()).expect("one number for each new root");
            Mutex::new(Some((walked, id)))
        })
        .collect();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(tasks.len()) {
            scope.spawn(|| {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let taken = task.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
                    let Some((Walked { root, sketch }, id)) = taken else { continue };
                    let result = match place.locator.progress.is_cancelled() {
                        true => Err(WalkError::Cancelled.into()),
                        false => write(&root, sketch, id, place),
                    };
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    done.push((root, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    stamp_all(&done, place.store, threads);
    done.sort_by_key(|(root, _)| root.index);
    done
}

/// When all are written: stamps are taken some milliseconds after the last change, and so only the last layers have to wait.
fn stamp_all(done: &[(OpenRoot, Result<Written, RootError>)], store: &Store, threads: usize) {
    let layers: Vec<&NewDiff> =
        done.iter().filter_map(|(_, written)| written.as_ref().ok()?.diff.as_ref()).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(layers.len()) {
            scope.spawn(|| {
                while let Some(new) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                    diff::stamp(&store.root_dir(new.root, new.generation), new.row.digest);
                }
            });
        }
    });
}

fn write(
    root: &OpenRoot,
    sketch: Sketch<Located>,
    id: SealId,
    place: Place<'_>,
) -> Result<Written, RootError> {
    let counts = count(&sketch);
    let unsettled = unsettled(root, &sketch);
    let tree = fill(sketch)?;
    check_xattrs(&tree)?;
    let generation = root.row.as_ref().map_or(0, |row| row.generation + 1);
    let unchanged = !root.anew && root.previous.as_ref().is_some_and(|previous| *previous.tree() == tree);
    if unchanged
        && let Some(row) = &root.row
        && row.path == root.path
        && row.name == root.name
    {
        let report = report(root, row, counts, (Outcome::Unchanged, 0, 0));
        // Files too young then were looked at again: from now on their times tell.
        let looked_at = counts.unchanged < counts.files - counts.empty;
        let later = root.began_at.saturating_sub(row.sealed_at) > place.locator.under_way_s;
        let renewed = (looked_at && later).then(|| RootRow { sealed_at: root.began_at, ..row.clone() });
        return Ok(Written { image: None, diff: None, row: renewed, report, unsettled });
    }
    let build = place.locator.build;
    let dir = build.make_root_dir(id, generation)?;
    let serial = |key: &_| place.locator.serial(key);
    let numbers = Numbers { store: place.store.id(), of: &serial };
    let image = || metadata(&tree, (id, generation), &dir, place);
    let rest = || -> Result<u64, RootError> {
        upper::prepare(&dir, &tree, root.fd())?;
        Ok(write_manifest(&dir, &tree, Some(&numbers))?)
    };
    let (image, rest) = if place.split {
        std::thread::scope(|scope| {
            let image = scope.spawn(image);
            let rest = rest();
            (image.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), rest)
        })
    } else {
        (image(), rest())
    };
    let (shown, manifest_bytes) = (image?, rest?);
    let row = row(root, id, generation, place.domain.id, counts, vec![shown.digest()]);
    let bytes = if let Metadata::Image(image) = &shown { image.bytes.len() as u64 } else { 0 };
    let mut report = report(root, &row, counts, (Outcome::Sealed, bytes, manifest_bytes));
    let image_row = |image: BuiltImage| {
        let row = ImageRow { domain: place.domain.id, bytes, entries: image.entries, anchors: image.anchors };
        (image.digest, row)
    };
    let (image, diff) = match shown {
        Metadata::Image(image) => (Some(image_row(image)), None),
        Metadata::Base(_) => (None, None),
        Metadata::Over(_, row) => {
            report.diff_entries = row.entries;
            (None, Some(NewDiff { root: id, generation, row }))
        }
    };
    Ok(Written { image, diff, row: Some(row), report, unsettled })
}

/// What a root's view is made of.
enum Metadata {
    /// An image of all of it.
    Image(BuiltImage),
    /// One that is published already.
    Base(ImageDigest),
    /// One that is published already, and a layer of differences over it.
    Over(ImageDigest, DiffRow),
}

impl Metadata {
    fn digest(&self) -> ImageDigest {
        match self {
            Metadata::Image(image) => image.digest,
            Metadata::Base(digest) | Metadata::Over(digest, _) => *digest,
        }
    }
}

/// Writes what shows `tree`: nothing, a layer in the generation's directory `dir`, or an image.
fn metadata(
    tree: &Tree,
    (id, generation): (SealId, u64),
    dir: &Path,
    place: Place<'_>,
) -> Result<Metadata, RootError> {
    let build = place.locator.build;
    let difference = place.base.and_then(|base| Some((base.digest, base.difference(tree)?)));
    if difference.is_some()
        && let Some(refusal) = image::check(tree, 1).pop()
    {
        return Err(refusal.into());
    }
    match difference {
        Some((base, Difference::None)) => return Ok(Metadata::Base(base)),
        Some((base, Difference::Some(layer))) => {
            let serial = |key: &_| place.locator.serial(key);
            let numbers = Numbers { store: place.store.id(), of: &serial };
            match diff::write(dir, &layer, Some(&numbers), place.locator.progress) {
                Ok(digest) => {
                    let (entries, anchors) = (layer.entries.len() as u64, layer.anchors());
                    return Ok(Metadata::Over(base, DiffRow { digest, entries, anchors }));
                }
                Err(_) if place.locator.progress.is_cancelled() => return Err(WalkError::Cancelled.into()),
                // An image may hold what this file system can't, and needs less room.
                Err(error) => {
                    tracing::warn!("{}: {error}; the root gets an image of its own", dir.display());
                    for part in diff::PARTS {
                        build.remove_from_root_dir(id, generation, part)?;
                    }
                }
            }
        }
        None => {}
    }
    let built = image::build(tree)?;
    build.write_image(&built.digest, &built.bytes)?;
    Ok(Metadata::Image(built))
}

fn row(
    root: &OpenRoot,
    id: SealId,
    generation: u64,
    domain: u32,
    counts: Counts,
    layers: Vec<ImageDigest>,
) -> RootRow {
    RootRow {
        id,
        path: root.path.clone(),
        name: root.name.clone(),
        domain,
        dev: root.inode.0,
        ino: root.inode.1,
        layers,
        generation,
        sealed_at: root.began_at,
        files: counts.files,
        entries: counts.entries,
        bytes: counts.bytes,
        hits: counts.hits,
        made: counts.made,
        unsettled: counts.unsettled,
    }
}

fn report(
    root: &OpenRoot,
    row: &RootRow,
    counts: Counts,
    (outcome, image_bytes, manifest_bytes): (Outcome, u64, u64),
) -> RootSeal {
    RootSeal {
        path: root.path.clone().into(),
        name: row.name.clone(),
        id: Some(row.id.0),
        generation: row.generation,
        outcome,
        counts,
        layers: row.layers.iter().map(ToString::to_string).collect(),
        image_bytes,
        manifest_bytes,
        diff_entries: 0,
    }
}

fn count(sketch: &Sketch<Located>) -> Counts {
    let mut counts = Counts { entries: sketch.tree.entries.len() as u64, ..Counts::default() };
    for (inode, located) in sketch.tree.inodes.iter().zip(&sketch.found) {
        let (Node::File { size, .. }, Some(located)) = (&inode.node, located) else { continue };
        counts.files += 1;
        counts.bytes += size;
        counts.unsettled += u64::from(located.unsettled);
        counts.by_content += u64::from(located.read);
        match located.shown {
            Shown::Empty => counts.empty += 1,
            _ if located.made => counts.made += 1,
            Shown::Unchanged(_) => {
                counts.hits += 1;
                counts.unchanged += 1;
            }
            _ => counts.hits += 1,
        }
    }
    counts
}

/// What to tell of things that were being written all the while; paths with the root's.
fn unsettled(root: &OpenRoot, sketch: &Sketch<Located>) -> Vec<Skipped> {
    let directory = "the directory changed while it was sealed, twice: the view shows what was found";
    let file = "the file was being written all the while: the view shows the bytes of one moment";
    let mut all: Vec<Skipped> = sketch
        .unsettled
        .iter()
        .map(|path| Skipped { path: root.path.join(path).into(), reason: directory.into() })
        .collect();
    let unsettled = |index: u32| {
        let located = sketch.found.get(index as usize);
        matches!(located, Some(Some(Located { unsettled: true, .. })))
    };
    for (number, entry) in (0u32..).zip(&sketch.tree.entries) {
        if unsettled(entry.inode.0) {
            use std::os::unix::ffi::OsStringExt;
            let path = PathBuf::from(std::ffi::OsString::from_vec(sketch.tree.path(EntryId(number))));
            all.push(Skipped { path: root.path.join(path).into(), reason: file.into() });
        }
    }
    all
}

/// The tree with every file's place filled in. Nothing but what was shown gets there.
fn fill(sketch: Sketch<Located>) -> Result<Tree, WalkError> {
    let Sketch { mut tree, found, .. } = sketch;
    for (inode, located) in tree.inodes.iter_mut().zip(found) {
        let (Node::File { data, .. }, Some(located)) = (&mut inode.node, located) else { continue };
        // Open proofs are left only when the walk was stopped.
        *data = located.shown.data().ok_or(WalkError::Cancelled)?;
    }
    Ok(tree)
}

/// Overlayfs gives a raw root's own `trusted.overlay.*` back only from Linux 6.7 on; before, they would be obeyed.
fn check_xattrs(tree: &Tree) -> Result<(), RootError> {
    const OVERLAY: &[u8] = b"trusted.overlay.";
    let has =
        |number: &u32| tree.inode(EntryId(*number)).meta.xattrs.iter().any(|x| x.0.starts_with(OVERLAY));
    let Some(number) = (0..tree.entries.len() as u32).find(has) else { return Ok(()) };
    if kernel_version() >= (6, 7) {
        return Ok(());
    }
    use std::os::unix::ffi::OsStringExt;
    let path = PathBuf::from(std::ffi::OsString::from_vec(tree.path(EntryId(number))));
    let xattrs = &tree.inode(EntryId(number)).meta.xattrs;
    let name = xattrs.iter().find(|x| x.0.starts_with(OVERLAY)).map(|x| String::from_utf8_lossy(&x.0));
    Err(RootError::OverlayXattr { path, name: name.unwrap_or_default().into_owned() })
}

fn kernel_version() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
