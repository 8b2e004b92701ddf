//! `explain`: why a file is or isn't shared, with whom, and what a write will do.
//!
//! Invariant: the answer comes from what would decide: the mount, the manifest, the upper, the anchor itself; not from names
//! that look alike. What it deliberately does not do: open the file for writing, or read its data.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pagefold_engine::identity::Identity;
use pagefold_sys::cache::cachestat;

use super::raw::open_raw_root;
use super::reading::Readings;
use super::status::mounts::{self, ViewMount};
use super::status::raw_changes::is_as_sealed;
use super::tree::{Data, EntryId, Node, Tree};
use crate::fsid;
use crate::mountinfo;
use crate::store::manifest::{ManifestError, read_manifest};
use crate::store::{AnchorKey, RootRow, SealId, Store, StoreError};

pub mod report;
mod trace;

use trace::{Traced, Upper};

pub use report::{ExplainReport, ExplainedAnchor, ExplainedRoot, Place, Site, Verdict};

/// Why a path could not be explained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExplainError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The path.
    #[error("can't {what} {path:?}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// Neither the view nor the sealed root has it.
    #[error("{path:?} is not there, and was not there when its root was sealed")]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// It is in nothing that the store knows.
    #[error(
        "{path:?} is in no sealed root, no view and no data layer of the store {store:?}: seal its root first (`pagefold seal`), or name \
             another store (--store DIR)"
    )]
    Unknown {
        /// The path.
        path: PathBuf,
        /// The store asked.
        store: PathBuf,
    },
}

/// Explains `path`; a symbolic link at its end is explained itself.
///
/// # Errors
/// [`ExplainError`].
pub fn explain(store: &Store, path: &Path) -> Result<ExplainReport, ExplainError> {
    let path = resolve(path)?;
    let views = mounts::of_store(store)?;
    if let Some((domain, key)) = anchor_of_path(store, &path) {
        return of_anchor(store, path, domain, key, &views);
    }
    let found = in_view(&path, &views)?;
    let (place, row, below) = match found {
        Some((id, below)) => (Place::View, store.root(id)?, below),
        None => {
            let mut roots = store.roots()?;
            roots.sort_by_key(|row| row.path.components().count());
            let inside = |row: &RootRow| path.strip_prefix(&row.path).map(Path::to_owned).ok();
            let best = roots.into_iter().rev().find_map(|row| inside(&row).map(|below| (row, below)));
            match best {
                Some((row, below)) => (Place::Raw, row, below),
                None => return Err(ExplainError::Unknown { path, store: store.dir().to_owned() }),
            }
        }
    };
    of_file(store, path, place, &row, below, &views)
}

/// Absolute, without links but perhaps the last name, which need not exist.
fn resolve(path: &Path) -> Result<PathBuf, ExplainError> {
    let failed = |source| ExplainError::Io { what: "find", path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(failed)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(failed)?.join(name)),
        _ => absolute.canonicalize().map_err(failed),
    }
}

/// `<store>/anchors/<domain>/xx/<62 hex digits>`.
fn anchor_of_path(store: &Store, path: &Path) -> Option<(u32, AnchorKey)> {
    let below = path.strip_prefix(store.dir()).ok()?;
    let names: Vec<&str> = below.iter().map(OsStr::to_str).collect::<Option<_>>()?;
    let ["anchors", domain, first, rest] = names[..] else { return None };
    Some((domain.parse().ok()?, AnchorKey::from_hex(&format!("{first}{rest}"))?))
}

/// The view whose mount holds `path`, and the path below it.
fn in_view(
    path: &Path,
    views: &HashMap<SealId, Vec<ViewMount>>,
) -> Result<Option<(SealId, PathBuf)>, ExplainError> {
    let failed = |source| ExplainError::Io { what: "read", path: "/proc/self/mountinfo".into(), source };
    let all = mountinfo::read().map_err(failed)?;
    // The deepest mount above the path; of several at one place the last is on top.
    let above = all.iter().enumerate().filter(|(_, mount)| path.starts_with(&mount.mount_point));
    let top = above.max_by_key(|(index, mount)| (mount.mount_point.components().count(), *index));
    let Some((_, top)) = top else { return Ok(None) };
    let view = views.iter().find(|(_, mounts)| mounts.iter().any(|view| view.device == top.device));
    Ok(view.and_then(|(id, _)| {
        let below = path.strip_prefix(&top.mount_point).ok()?;
        // Only part of the view may be mounted there (a bind mount).
        let part = top.root.strip_prefix("/").unwrap_or(&top.root);
        Some((*id, part.join(below)))
    }))
}

fn of_anchor(
    store: &Store,
    path: PathBuf,
    domain: u32,
    key: AnchorKey,
    views: &HashMap<SealId, Vec<ViewMount>>,
) -> Result<ExplainReport, ExplainError> {
    let anchor = look_at_anchor(store, domain, &key)?;
    let (sites, site_list) = sites(store, domain, &key, views)?;
    let verdict = if sites > 1 { Verdict::Shared } else { Verdict::Alone };
    let mut why = vec![match sites {
        0 => "no sealed root names this anchor: `pagefold gc` removes it unless something written in a view needs it".to_owned(),
        n => format!("it is the one copy of {n} files of sealed roots"),
    }];
    why.extend(about(&anchor));
    Ok(ExplainReport {
        schema: report::SCHEMA,
        path,
        place: Place::Anchor,
        verdict,
        why,
        on_write: "it can't be written: mode 0400 and immutable".to_owned(),
        root: None,
        anchor: Some(anchor),
        sites,
        site_list,
        raw_changed: None,
    })
}

fn of_file(
    store: &Store,
    path: PathBuf,
    place: Place,
    row: &RootRow,
    below: PathBuf,
    views: &HashMap<SealId, Vec<ViewMount>>,
) -> Result<ExplainReport, ExplainError> {
    let dir = store.root_dir(row.id, row.generation);
    let tree = read_manifest(&dir)?;
    let upper = match place {
        Place::View => trace::follow(&dir.join("upper"), &below)
            .map_err(|(path, source)| ExplainError::Io { what: "look at", path, source })?,
        _ => Traced { upper: Upper::Untouched, sealed_at: Some(below.clone()) },
    };
    let upper = if place == Place::View { linked(&dir.join("upper"), &tree, upper)? } else { upper };
    let sealed = upper.sealed_at.as_ref().and_then(|at| find(&tree, at));
    let here = here(&path, upper.upper, sealed.is_some())?;
    let key = sealed.filter(|_| here != Here::Other).and_then(|id| match &tree.inode(id).node {
        Node::File { data: Data::Anchor(key), .. } => Some(*key),
        _ => None,
    });
    let anchor = key.map(|key| look_at_anchor(store, row.domain, &key)).transpose()?;
    let (count, site_list) = match &key {
        Some(key) => sites(store, row.domain, key, views)?,
        None => (0, Vec::new()),
    };
    let sealed_path = upper.sealed_at.as_deref().unwrap_or(&below);
    let raw_changed = sealed.and_then(|id| {
        let raw = open_raw_root(row).ok()?;
        Some(!is_as_sealed(raw.as_fd(), sealed_path.as_os_str().as_bytes(), tree.inode(id)))
    });
    let (verdict, mut why) = judge(place, here, sealed.map(|id| &tree.inode(id).node), upper.upper, count);
    if matches!(verdict, Verdict::Shared | Verdict::Alone) && sealed_path != below {
        why.push(format!("it was sealed as {sealed_path:?} and got this name in the view"));
    }
    why.extend(anchor.as_ref().into_iter().flat_map(about));
    if raw_changed == Some(true) {
        why.push("the raw root's file changed after it was sealed: the view shows it as it was".to_owned());
    }
    Ok(ExplainReport {
        schema: report::SCHEMA,
        path,
        place,
        verdict,
        why,
        on_write: on_write(place, verdict, upper.upper, anchor.as_ref(), !views.contains_key(&row.id)),
        root: Some(ExplainedRoot { id: row.id.0, name: row.name.clone(), path: row.path.clone(), below }),
        anchor,
        sites: count,
        site_list,
        raw_changed,
    })
}

/// A hard link that was written is written under all its names, though the upper may hold only one.
fn linked(upper: &Path, tree: &Tree, traced: Traced) -> Result<Traced, ExplainError> {
    let as_sealed = matches!(traced.upper, Upper::Untouched | Upper::MetadataOnly);
    let Some(id) = traced.sealed_at.as_ref().filter(|_| as_sealed).and_then(|at| find(tree, at)) else {
        return Ok(traced);
    };
    let inode = tree.entries[id.0 as usize].inode;
    let names = tree.entries.iter().enumerate().filter(|(_, entry)| entry.inode == inode);
    for other in names.map(|(index, _)| EntryId(index as u32)).filter(|other| *other != id) {
        let path = tree.path(other);
        let there = trace::follow(upper, Path::new(OsStr::from_bytes(&path)))
            .map_err(|(path, source)| ExplainError::Io { what: "look at", path, source })?;
        if there.upper == Upper::Data {
            return Ok(Traced { upper: Upper::Data, ..traced });
        }
    }
    Ok(traced)
}

/// What is at a path now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Here {
    File,
    Other,
    Removed,
}

/// Asks `path` itself. What is not there was removed, or never was: then there is nothing to explain.
fn here(path: &Path, upper: Upper, sealed: bool) -> Result<Here, ExplainError> {
    // A directory on the way may be something else since it was found.
    let is_gone = |e: &io::Error| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Here::File),
        Ok(_) => Ok(Here::Other),
        Err(e) if is_gone(&e) && (sealed || upper == Upper::Removed) => Ok(Here::Removed),
        Err(e) if is_gone(&e) => Err(ExplainError::Missing { path: path.to_owned() }),
        Err(source) => Err(ExplainError::Io { what: "look at", path: path.to_owned(), source }),
    }
}

fn judge(
    place: Place,
    here: Here,
    sealed: Option<&Node>,
    upper: Upper,
    sites: u64,
) -> (Verdict, Vec<String>) {
    let say = |verdict, text: &str| (verdict, vec![text.to_owned()]);
    let data = match (here, sealed) {
        (Here::Removed, _) if place == Place::Raw => {
            return say(
                Verdict::Removed,
                "the raw root has lost it since it was sealed: its view shows it still; `pagefold seal` again takes that over",
            );
        }
        (Here::Removed, _) => {
            return say(
                Verdict::Removed,
                "it was sealed and is removed in the view (or has another name there): other views and the raw root have it still; \
                 `pagefold commit` removes it there too",
            );
        }
        (Here::Other, _) => {
            return say(Verdict::NotAFile, "it is no regular file: only these have pages to share");
        }
        (Here::File, Some(Node::File { data, .. })) => data,
        (Here::File, _) if place == Place::Raw => {
            return say(
                Verdict::NotSealed,
                "it was not there, or was no file, when the root was sealed: its view does not show it; `pagefold seal` again \
                 makes it part of the sealed state",
            );
        }
        (Here::File, _) => {
            return say(
                Verdict::NotSealed,
                "it was not there when the root was sealed: its pages are its own; `pagefold commit` makes it part of the \
                 sealed state",
            );
        }
    };
    match data {
        _ if upper == Upper::Data => say(
            Verdict::Broken,
            "it was written through the view: its pages are its own until it is committed and the root is sealed again",
        ),
        Data::Empty => say(Verdict::Empty, "it is empty: there are no pages"),
        _ if place == Place::Raw => say(
            Verdict::RawCopy,
            "this is the raw root's own file: who reads it here fills a page cache of its own; who reads it through the view \
             uses the anchor's pages",
        ),
        _ if sites > 1 => (
            Verdict::Shared,
            vec![format!(
                "its pages are the anchor's, and {} other files of sealed roots show the same anchor",
                sites - 1
            )],
        ),
        _ => say(
            Verdict::Alone,
            "it has an anchor, and no other file of a sealed root shows it: none has the same extents, and where content was \
             compared, the same content",
        ),
    }
}

fn about(anchor: &ExplainedAnchor) -> Vec<String> {
    let mut about = Vec::new();
    if let Some(reason) = anchor.undecided {
        about.push(format!(
            "extents can't tell which files equal it ({reason}): it was joined with others by content, or not at all"
        ));
    }
    if anchor.borrowed {
        about.push("the anchor is an immutable file of somebody else (--borrow)".to_owned());
    }
    about
}

fn on_write(
    place: Place,
    verdict: Verdict,
    upper: Upper,
    anchor: Option<&ExplainedAnchor>,
    no_view: bool,
) -> String {
    match (place, verdict) {
        (Place::Raw, _) if no_view => {
            "the raw root changes; its sealed state does not: seal it again before you mount its view"
                .to_owned()
        }
        (Place::Raw, _) => {
            "don't: its view is mounted and won't see it; two truths that `commit` can't join".to_owned()
        }
        (_, Verdict::Shared | Verdict::Alone) => {
            let extents = anchor
                .and_then(|a| a.extents)
                .map_or(String::new(), |n| format!(" of {n} extent{}", if n == 1 { "" } else { "s" }));
            let how = match anchor.is_some_and(|a| a.borrowed) {
                true => "all data is copied".to_owned(),
                false => format!("a reflink{extents}, no data is copied"),
            };
            let meta = if upper == Upper::MetadataOnly { " (its metadata is copied already)" } else { "" };
            format!(
                "the first open for writing copies the file up into the view's own layer{meta}: {how}; all its pages are the view's own \
                 from then on, other views keep the anchor; programs that had it mapped go on seeing the old bytes there"
            )
        }
        (_, Verdict::Broken | Verdict::NotSealed) => "nothing special: it is the view's own file".to_owned(),
        (_, Verdict::Removed) => "a new file of this name is the view's own".to_owned(),
        (_, Verdict::NotAFile) if upper != Upper::Untouched => {
            "nothing special: it is the view's own".to_owned()
        }
        _ => "it is copied up into the view's own layer; there are no pages to lose".to_owned(),
    }
}

fn look_at_anchor(store: &Store, domain: u32, key: &AnchorKey) -> Result<ExplainedAnchor, ExplainError> {
    let path = store.anchor_path(domain, key);
    let file = store.open_anchor(domain, key)?;
    let failed = |what| {
        let path = path.clone();
        move |source: io::Error| ExplainError::Io { what, path, source }
    };
    let stat = rustix::fs::fstat(&file).map_err(|e| failed("stat")(e.into()))?;
    let size = stat.st_size.cast_unsigned();
    let resident = cachestat(file.as_fd(), 0, 0).map_err(failed("ask the cache of"))?.nr_cache;
    let mut extents = Vec::new();
    let facts = fsid::describe(store.dirfd()).ok();
    let reading = facts.and_then(|facts| Readings::new(&facts).read(file.as_fd(), &stat, &mut extents).ok());
    let undecided = reading.as_ref().and_then(|(reading, _)| {
        reading.layout.runs.iter().find_map(|run| match run.identity {
            Identity::Undecided(why) => Some(why.reason()),
            _ => None,
        })
    });
    Ok(ExplainedAnchor {
        key: key.to_string(),
        size,
        pages: size.div_ceil(rustix::param::page_size() as u64),
        resident_pages: resident,
        extents: reading.is_some().then_some(extents.len() as u64),
        undecided,
        borrowed: store.lookup()?.anchor(key)?.is_some_and(|row| row.borrowed.is_some()),
        path,
    })
}

/// All files of sealed roots of the domain that show an anchor: how many, and some of them.
fn sites(
    store: &Store,
    domain: u32,
    key: &AnchorKey,
    views: &HashMap<SealId, Vec<ViewMount>>,
) -> Result<(u64, Vec<Site>), ExplainError> {
    let (mut count, mut list) = (0, Vec::new());
    for row in store.roots()?.into_iter().filter(|row| row.domain == domain) {
        let tree = read_manifest(&store.root_dir(row.id, row.generation))?;
        let mut seen = vec![false; tree.inodes.len()];
        for (index, entry) in tree.entries.iter().enumerate() {
            let inode = entry.inode.0 as usize;
            let shows =
                matches!(&tree.inodes[inode].node, Node::File { data: Data::Anchor(k), .. } if k == key);
            if !shows || std::mem::replace(&mut seen[inode], true) {
                continue;
            }
            count += 1;
            if list.len() < report::SITES_LISTED {
                let path = tree.path(EntryId(index as u32));
                let view = views.get(&row.id).and_then(|at| at.first()).map(|view| view.at.clone());
                let path = PathBuf::from(OsStr::from_bytes(&path));
                list.push(Site { root: row.name.clone(), path, view });
            }
        }
    }
    Ok((count, list))
}

/// The entry of a path below the root.
fn find(tree: &Tree, below: &Path) -> Option<EntryId> {
    let mut at = EntryId(0);
    for name in below.iter() {
        let child = |entry: &super::tree::Entry| entry.parent == at && *entry.name == *name.as_bytes();
        // Entry 0 is its own parent, with an empty name that no path has.
        at = EntryId(tree.entries.iter().position(child)? as u32);
    }
    (!tree.entries.is_empty()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::tree::Data;

    #[test]
    fn every_case_has_its_verdict() {
        let file = Node::File { size: 1, data: Data::Anchor(AnchorKey([0; 32])) };
        let empty = Node::File { size: 0, data: Data::Empty };
        let cases = [
            (Place::View, Here::File, Some(&file), Upper::Untouched, 3, Verdict::Shared),
            (Place::View, Here::File, Some(&file), Upper::MetadataOnly, 3, Verdict::Shared),
            (Place::View, Here::File, Some(&file), Upper::Untouched, 1, Verdict::Alone),
            (Place::View, Here::File, Some(&file), Upper::Data, 3, Verdict::Broken),
            (Place::View, Here::File, Some(&empty), Upper::Data, 0, Verdict::Broken),
            (Place::View, Here::File, Some(&Node::Dir), Upper::Data, 0, Verdict::NotSealed),
            (Place::View, Here::Removed, Some(&file), Upper::Removed, 3, Verdict::Removed),
            (Place::Raw, Here::File, Some(&file), Upper::Untouched, 3, Verdict::RawCopy),
            (Place::Raw, Here::File, None, Upper::Untouched, 0, Verdict::NotSealed),
            (Place::Raw, Here::Removed, Some(&file), Upper::Untouched, 3, Verdict::Removed),
            (Place::View, Here::File, Some(&empty), Upper::Untouched, 0, Verdict::Empty),
            (Place::View, Here::Other, Some(&Node::Dir), Upper::Untouched, 0, Verdict::NotAFile),
            (Place::View, Here::Other, None, Upper::Data, 0, Verdict::NotAFile),
            (Place::View, Here::File, None, Upper::Data, 0, Verdict::NotSealed),
        ];
        for (place, here, sealed, upper, sites, want) in cases {
            assert_eq!(
                judge(place, here, sealed, upper, sites).0,
                want,
                "{place:?} {here:?} {upper:?} {sites}"
            );
        }
    }
}
