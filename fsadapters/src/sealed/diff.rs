//! The layer of plain files between a root's upper and a shared image: what the root has that the image has not.
//!
//! ```text
//! roots/<id>/g<n>/diff/       directories, stubs, links, devices, whiteouts: a lower layer of overlayfs
//! roots/<id>/g<n>/diff.list   the same as a tree (`store::manifest`); its BLAKE3 stands in the generation's row
//! roots/<id>/g<n>/diff.stamps inode numbers and change times of all of it; may be missing
//! ```
//!
//! Why not an image over the image: an EROFS directory costs a page of page cache at least, and changes of a few files are spread
//! over hundreds of directories. Directories and inodes of the store's own file system don't lie in the page cache (XFS), or densely (btrfs).
//!
//! A regular file is a *stub*: sparse, of the true size, with an empty `trusted.overlay.metacopy` and a `trusted.overlay.redirect` to
//! its anchor. Everything else is itself. Decisions:
//!
//! * Metadata is that of the raw inode, set in the one order that keeps it (`inode::Held::apply`); directories get
//!   theirs when all below them is done. A root's own `trusted.overlay.*` is escaped, as in an upper.
//! * Hard links of the layer are hard links. They are made in a directory beside it and linked from there: no path, however deep, is ever
//!   walked again, and no descriptor is kept for each.
//! * Whiteouts are one inode with many names. A root that holds such a node itself is refused, with a layer as without.
//! * Whatever the file system refuses (an attribute with two more beside it, links, room) ends the layer, not the seal: the root gets an
//!   image of its own ([`write()`]'s caller), and an error only if that fails too.
//! * The generation's row holds the anchors that the layer names (`store::gc`).
//! * Nothing seals the layer as a digest seals an image, so before each mount it must be shown that it is what the list says: by its stamps, that nobody
//!   changed it since it was made (`stamps`); where they don't, by comparing all: names (none missing, none more), kinds, owners, modes, sizes, times, links,
//!   attributes.
//! * An upper belongs to its layer: the kernel remembers the top directory's file handle (`index=on`), we the list's digest.
//! * What is damaged is made again only where a view's upper can't depend on the very inode ([`heal`]).
//!
//! Invariant: nothing outside `diff*` of the directory that is given is written; no link is followed. What it deliberately does not do: choose what
//! goes into the layer (`super::delta`); make it durable (who publishes the root syncs).

mod check;
mod make;
mod stamps;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;

use super::tree::{Data, EntryId, Inode, Meta, Node, Tree};
use super::upper::stored_name;
use super::view_error::ViewError;
use crate::scan::{Phase, Progress};
use crate::store::manifest::{self, BODY_BYTES_MAX, Numbers};
use crate::store::{ContentHash, RootRow, Store};

/// Its directory in a root's directory; absent where nothing differs, or where all of the root is in an image.
pub const DIFF: &str = "diff";
/// What must be in it.
const LIST: &str = "diff.list";
/// When each of its inodes changed last.
const STAMPS: &str = "diff.stamps";
/// Where inodes with several names are made.
const LINKS: &str = "diff.links";

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A layer that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make {path:?} of the layer of differences: {error}; make room on the store's file system")]
pub struct DiffError {
    path: PathBuf,
    error: io::Error,
}

/// A layer that must not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffDamage {
    /// It is not what the list says.
    #[error(
        "{path:?} {what}: with it the view would not show what its root has; seal the root again (`pagefold verify` looks at all)"
    )]
    Wrong {
        /// What.
        path: PathBuf,
        /// How.
        what: &'static str,
    },
    /// The list is not the one that was written.
    #[error("{path:?} is not the list that was written ({why}); seal the root again")]
    List {
        /// The list.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// It could not be read.
    #[error("read {path:?}: {error}")]
    Read {
        /// What.
        path: PathBuf,
        /// The answer.
        error: io::Error,
    },
}

/// Makes the layer `tree` ([`super::delta::delta`]) in `root_dir`, which holds none, and its list. The digest of the list is what
/// [`open`] asks for.
///
/// # Errors
/// [`DiffError`], also where `progress` is cancelled; the caller removes what there is ([`PARTS`]).
pub fn write(
    root_dir: &Path,
    tree: &Tree,
    numbers: Option<&Numbers<'_>>,
    progress: &Progress,
) -> Result<ContentHash, DiffError> {
    progress.set_phase(Phase::Apply);
    progress.expect_steps(tree.entries.len().saturating_sub(1));
    let failed = |path: PathBuf| move |error: io::Error| DiffError { path, error };
    let list =
        manifest::encode(tree, numbers).map_err(io::Error::other).map_err(failed(root_dir.join(LIST)))?;
    std::fs::write(root_dir.join(LIST), &list).map_err(failed(root_dir.join(LIST)))?;
    crate::store::step("seal.diff.listed");
    make::make(root_dir, &Plan::of(tree), progress)?;
    crate::store::step("seal.diff.made");
    Ok(ContentHash(*blake3::hash(&list).as_bytes()))
}

/// All that [`write()`] makes in a root's directory.
pub const PARTS: [&str; 4] = [DIFF, LINKS, LIST, STAMPS];

/// Takes the stamps of the layer in `root_dir`, which is complete and not published: a mount then need not compare all. Without them, for
/// whatever reason, it does.
pub fn stamp(root_dir: &Path, digest: ContentHash) {
    let Ok(tree) = read(root_dir, digest) else { return };
    let Some(taken) = stamps::settled(root_dir, &Plan::of(&tree)) else { return };
    if let Err(error) = stamps::write(root_dir, digest, &taken) {
        tracing::debug!("{}: no stamps: {error}", root_dir.display());
    }
}

/// The tree that the layer in `root_dir` must be.
///
/// # Errors
/// [`DiffDamage::List`], [`DiffDamage::Read`].
pub fn read(root_dir: &Path, digest: ContentHash) -> Result<Tree, DiffDamage> {
    let path = root_dir.join(LIST);
    let read = || -> io::Result<Vec<u8>> {
        let file = std::fs::File::open(&path)?;
        let mut bytes = Vec::new();
        (&file).take(BODY_BYTES_MAX).read_to_end(&mut bytes)?;
        // Read once a mount: no reason to keep it.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) => return Err(DiffDamage::Read { path, error }),
    };
    if blake3::hash(&bytes).as_bytes() != &digest.0 {
        return Err(DiffDamage::List { path, why: "its digest is another".into() });
    }
    manifest::decode(&bytes).map_err(|e| DiffDamage::List { path, why: e.to_string() })
}

/// The layer of `root_dir`, open, after it was shown to be what the list of that digest says: by its stamps, or as by [`open_as`].
///
/// # Errors
/// [`DiffDamage`].
pub fn open(root_dir: &Path, digest: ContentHash) -> Result<OwnedFd, DiffDamage> {
    let tree = read(root_dir, digest)?;
    let plan = Plan::of(&tree);
    if let Some(stamps) = stamps::read(root_dir, digest, &plan)
        && let Ok(dir) = rustix::fs::open(root_dir.join(DIFF), DIR_FLAGS, Mode::empty())
        && stamps::take(dir.as_fd(), &plan).is_ok_and(|now| now == stamps)
    {
        return Ok(dir);
    }
    open_as(root_dir, &tree)
}

/// The layer of `root_dir`, open, after all of it was compared with `tree`, its list.
///
/// # Errors
/// [`DiffDamage`].
pub fn open_as(root_dir: &Path, tree: &Tree) -> Result<OwnedFd, DiffDamage> {
    let top = root_dir.join(DIFF);
    let unread = |error: io::Error| DiffDamage::Read { path: top.clone(), error };
    let dir = match rustix::fs::open(&top, DIR_FLAGS, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
            return Err(DiffDamage::Wrong { path: top, what: "is missing" });
        }
        Err(e) => return Err(unread(e.into())),
    };
    match check::check(dir.as_fd(), &Plan::of(tree)).map_err(unread)? {
        None => Ok(dir),
        Some((path, what)) => Err(DiffDamage::Wrong { path: top.join(path), what }),
    }
}

/// The layer over a root's image: the digest of what it must be, and its directory after it was compared with that.
pub(super) type Layer = (ContentHash, OwnedFd);

/// The layer of `row`'s generation, if it has one.
pub(super) fn of_root(store: &Store, row: &RootRow) -> Result<Option<Layer>, ViewError> {
    let Some(diff) = store.diff(row.id, row.generation)? else { return Ok(None) };
    let root_dir = store.root_dir(row.id, row.generation);
    Ok(Some((diff.digest, open(&root_dir, diff.digest)?)))
}

/// Makes what is damaged in the layer of `root_dir` again, as far as a view's upper can't tell: hard links of several names stay as they are
/// (the upper's index knows them by their inodes), and so does a layer whose directory or list is gone.
///
/// # Errors
/// [`DiffDamage`]: what is left.
pub fn heal(root_dir: &Path, digest: ContentHash) -> Result<(), DiffDamage> {
    let tree = read(root_dir, digest)?;
    let plan = Plan::of(&tree);
    let unforgotten = |error| DiffDamage::Read { path: root_dir.join(STAMPS), error };
    let mut taken = stamps::settled(root_dir, &plan);
    match open_as(root_dir, &tree) {
        Ok(_whole) => {}
        Err(DiffDamage::Wrong { .. }) => {
            stamps::forget(root_dir).map_err(unforgotten)?;
            // Whether it went well is what the next look says.
            let _ = make::heal(root_dir, &plan);
            taken = stamps::settled(root_dir, &plan);
            open_as(root_dir, &tree)?;
        }
        Err(_) => return Ok(()),
    }
    if let Some(Err(error)) = taken.map(|taken| stamps::keep(root_dir, digest, &plan, &taken)) {
        tracing::debug!("{}: no stamps: {error}", root_dir.display());
    }
    Ok(())
}

/// A layer's tree with what making and comparing ask of it.
struct Plan<'a> {
    tree: &'a Tree,
    /// Of each directory, ascending by name.
    children: Vec<Vec<EntryId>>,
    /// Of each inode.
    names: Vec<u32>,
}

impl<'a> Plan<'a> {
    fn of(tree: &'a Tree) -> Plan<'a> {
        let mut children = vec![Vec::new(); tree.entries.len()];
        let mut names = vec![0; tree.inodes.len()];
        for (number, entry) in (0u32..).zip(&tree.entries) {
            names[entry.inode.0 as usize] += 1;
            if number > 0 {
                children[entry.parent.0 as usize].push(EntryId(number));
            }
        }
        Plan { tree, children, names }
    }

    fn children(&self, dir: EntryId) -> &[EntryId] {
        &self.children[dir.0 as usize]
    }

    fn name(&self, entry: EntryId) -> &[u8] {
        &self.tree.entries[entry.0 as usize].name
    }

    fn is_dir(&self, entry: EntryId) -> bool {
        self.tree.inode(entry).node == Node::Dir
    }

    /// How many names of the layer its inode has.
    fn names(&self, entry: EntryId) -> u32 {
        self.names[self.tree.entries[entry.0 as usize].inode.0 as usize]
    }
}

/// What is done with each directory of a layer.
trait Visit {
    /// It is open; directories in it come next.
    fn inside(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()>;
    /// All below it is done.
    fn leave(&mut self, at: BorrowedFd<'_>, dir: EntryId) -> io::Result<()>;
}

/// Goes through the directories of a layer, depth first, with one of them open at a time: `..` leads back, and nobody else has this tree.
fn walk(top: BorrowedFd<'_>, plan: &Plan<'_>, visit: &mut dyn Visit) -> io::Result<()> {
    let root = EntryId(0);
    let mut at = rustix::fs::openat(top, c".", DIR_FLAGS, Mode::empty())?;
    visit.inside(at.as_fd(), root)?;
    let mut way = vec![(root, 0)];
    while let Some((dir, next)) = way.last_mut() {
        let children = &plan.children(*dir)[*next..];
        match children.iter().position(|child| plan.is_dir(*child)) {
            Some(number) => {
                let child = children[number];
                *next += number + 1;
                at = rustix::fs::openat(&at, plan.name(child), DIR_FLAGS, Mode::empty())?;
                visit.inside(at.as_fd(), child)?;
                way.push((child, 0));
            }
            None => {
                visit.leave(at.as_fd(), *dir)?;
                way.pop();
                if !way.is_empty() {
                    at = rustix::fs::openat(&at, c"..", DIR_FLAGS, Mode::empty())?;
                }
            }
        }
    }
    Ok(())
}

/// The metadata that an inode of the layer has on disk.
fn stored(inode: &Inode) -> Meta {
    let escaped = |(name, value): &(Box<[u8]>, Box<[u8]>)| (stored_name(name).into(), value.clone());
    let mut xattrs: Vec<_> = inode.meta.xattrs.iter().map(escaped).collect();
    if let Node::File { data: Data::Anchor(key), .. } = &inode.node {
        xattrs.push((b"trusted.overlay.metacopy".as_slice().into(), Box::default()));
        let place = format!("/{}", key.path()).into_bytes();
        xattrs.push((b"trusted.overlay.redirect".as_slice().into(), place.into()));
    }
    xattrs.sort_unstable();
    Meta { xattrs, ..inode.meta }
}
