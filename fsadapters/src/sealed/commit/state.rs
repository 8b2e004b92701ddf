//! What a view shows now: the sealed tree and all that its upper changed, with the place of every file's bytes.
//!
//! The kernel is asked, not imitated: directories that are in the upper are listed through the view itself (mounted detached,
//! read-only, by whoever calls), so whiteouts of every form, opaque directories, escaped attributes and hard links in the
//! index are the kernel's business. Only what a view can't tell is read from the upper: whether a file's data is there
//! (`trusted.overlay.metacopy`) and which sealed name it was renamed from (`trusted.overlay.redirect`). A directory that is not
//! in the upper has not been changed anywhere below, so its part is the sealed tree's and costs no system call.
//!
//! Invariant: an answer that contradicts the sealed tree is an error, never a guess. What it deliberately does not do: look at
//! the raw root.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use rustc_hash::FxHashMap;

use super::bytes::Bytes;
use super::error::{CommitError, at_path, is_fatal};
use crate::scan::Progress;
use crate::sealed::inode::{Below, Held, Look, join, names};
use crate::sealed::tree::{Data, EntryId, InodeIndex, Meta, Node, Tree};

/// A name in a view.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The directory it is in; the root is its own parent.
    pub parent: usize,
    /// Without slash; empty for the root.
    pub name: Box<[u8]>,
    /// Index into [`State::inodes`].
    pub inode: usize,
    /// The upper holds it (whole or its metadata).
    pub in_upper: bool,
}

/// An inode in a view.
#[derive(Clone, Debug)]
pub struct ShownInode {
    /// Owner, permissions and so on.
    pub meta: Meta,
    /// Kind and bytes.
    pub kind: Kind,
    /// Indices into [`State::entries`].
    pub names: Vec<usize>,
    /// The sealed inode, if the view changed nothing of it.
    pub untouched: Option<InodeIndex>,
    /// The upper's inode, as it was when this was read.
    pub above: Option<Look>,
}

/// Kinds of inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where they are.
        bytes: Bytes,
    },
    /// Anything else; never [`Node::File`].
    Other(Node),
}

impl Kind {
    /// A directory.
    pub fn is_dir(&self) -> bool {
        *self == Kind::Other(Node::Dir)
    }

    /// As sealed.
    pub fn sealed(node: &Node) -> Kind {
        match node {
            Node::File { size, data } => {
                let bytes = match data {
                    Data::Empty => Bytes::Empty,
                    Data::Anchor(key) => Bytes::Anchor(*key),
                };
                Kind::File { size: *size, bytes }
            }
            other => Kind::Other(other.clone()),
        }
    }
}

/// A view's present state. Entry 0 is the root; every entry comes after its parent.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Names.
    pub entries: Vec<Shown>,
    /// Inodes.
    pub inodes: Vec<ShownInode>,
    /// Entries that were made immutable or append-only in the view.
    pub locked: Vec<usize>,
    /// Paths of a view in use that changed at every look, and how.
    pub missed: Vec<(Vec<u8>, String)>,
}

impl State {
    /// The inode of an entry.
    pub fn inode(&self, entry: usize) -> &ShownInode {
        &self.inodes[self.entries[entry].inode]
    }

    /// The path of an entry, without a leading slash.
    pub fn path(&self, mut entry: usize) -> Vec<u8> {
        let mut parts = Vec::new();
        while entry != 0 {
            parts.push(&self.entries[entry].name[..]);
            entry = self.entries[entry].parent;
        }
        parts.reverse();
        parts.join(&b'/')
    }
}

/// Children by directory of a sealed tree.
pub struct Children<'a> {
    tree: &'a Tree,
    first: Vec<u32>,
    ids: Vec<EntryId>,
    /// Names of each inode.
    pub links: Vec<u32>,
}

impl<'a> Children<'a> {
    /// Of `tree`.
    pub fn of(tree: &'a Tree) -> Self {
        let mut first = vec![0; tree.entries.len() + 1];
        let mut links = vec![0; tree.inodes.len()];
        for (i, entry) in tree.entries.iter().enumerate() {
            links[entry.inode.0 as usize] += 1;
            if i != 0 {
                first[entry.parent.0 as usize + 1] += 1;
            }
        }
        (1..first.len()).for_each(|i| first[i] += first[i - 1]);
        let mut next: Vec<u32> = first.clone();
        let mut ids = vec![EntryId(0); tree.entries.len().saturating_sub(1)];
        for (i, entry) in tree.entries.iter().enumerate().skip(1) {
            let slot = &mut next[entry.parent.0 as usize];
            ids[*slot as usize] = EntryId(i as u32);
            *slot += 1;
        }
        Children { tree, first, ids, links }
    }

    /// Entries of a directory, ascending by name.
    pub fn in_dir(&self, dir: EntryId) -> &[EntryId] {
        let at = dir.0 as usize;
        &self.ids[self.first[at] as usize..self.first[at + 1] as usize]
    }

    /// An entry of a directory.
    pub fn child(&self, dir: EntryId, name: &[u8]) -> Option<EntryId> {
        let all = self.in_dir(dir);
        let at = all.binary_search_by(|id| (*self.tree.entries[id.0 as usize].name).cmp(name));
        at.ok().map(|i| all[i])
    }

    /// The entry at a path.
    pub fn at(&self, path: &[u8]) -> Option<EntryId> {
        let parts = path.split(|b| *b == b'/').filter(|p| !p.is_empty());
        parts.into_iter().try_fold(EntryId(0), |dir, name| self.child(dir, name))
    }

    fn is_dir(&self, id: EntryId) -> bool {
        self.tree.inode(id).node == Node::Dir
    }
}

/// Reads the state of a view. `view` is its root, `upper` and `index` what it writes into, `sealed` the tree below. Of a view that is in
/// use (`live`) what changes under our eyes is looked at again, and told in [`State::missed`] if it goes on changing.
pub fn read(
    view: &Below,
    upper: &Below,
    index: Option<&Below>,
    sealed: &Children<'_>,
    (live, progress): (bool, &Progress),
) -> Result<State, CommitError> {
    let index_used = match index {
        Some(index) => !names(index.as_fd()).map_err(|e| at_path("list the index of", b"", e))?.is_empty(),
        None => false,
    };
    let index = index.filter(|_| index_used);
    let mut reader =
        Reader { view, upper, index, sealed, live, state: State::default(), seen: FxHashMap::default() };
    let mut dirs = vec![reader.root().map_err(|e| at_path("read", b"", e))?];
    while let Some(dir) = dirs.pop() {
        if progress.is_cancelled() {
            return Err(CommitError::Cancelled);
        }
        match if dir.in_upper { reader.merged(&dir) } else { reader.untouched(&dir) } {
            Ok(mut found) => dirs.append(&mut found),
            Err(e) if live && !is_fatal(&e) => reader.state.missed.push((dir.path, e.to_string())),
            Err(e) => return Err(at_path("read", &dir.path, e)),
        }
    }
    Ok(reader.state)
}

/// A directory still to be read.
struct Todo {
    entry: usize,
    path: Vec<u8>,
    /// The sealed directory it continues.
    sealed: Option<EntryId>,
    in_upper: bool,
}

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Shown(u64, u64),
    Sealed(InodeIndex),
}

struct Reader<'a> {
    view: &'a Below,
    upper: &'a Below,
    index: Option<&'a Below>,
    sealed: &'a Children<'a>,
    live: bool,
    state: State,
    seen: FxHashMap<Key, usize>,
}

impl Reader<'_> {
    fn root(&mut self) -> io::Result<Todo> {
        let held = Held::open(self.view.as_fd(), b".")?.ok_or(io::ErrorKind::NotFound)?;
        let inode = ShownInode {
            meta: held.meta()?,
            kind: Kind::Other(Node::Dir),
            names: vec![0],
            untouched: None,
            above: None,
        };
        self.state.inodes.push(inode);
        self.state.entries.push(Shown { parent: 0, name: Box::default(), inode: 0, in_upper: true });
        Ok(Todo { entry: 0, path: Vec::new(), sealed: Some(EntryId(0)), in_upper: true })
    }

    /// A directory that the upper does not have: as sealed.
    fn untouched(&mut self, dir: &Todo) -> io::Result<Vec<Todo>> {
        let mut dirs = Vec::new();
        let sealed = dir.sealed.ok_or_else(|| contradiction("a directory of neither layer"))?;
        for &id in self.sealed.in_dir(sealed) {
            self.add_sealed(dir, id, None, &mut dirs)?;
        }
        Ok(dirs)
    }

    /// A directory that the upper has.
    fn merged(&mut self, dir: &Todo) -> io::Result<Vec<Todo>> {
        let (view, upper) = (self.view.dir(&dir.path)?, self.upper.dir(&dir.path)?);
        let mut dirs = Vec::new();
        for name in names(view.as_fd())? {
            let mut looks = 1;
            while let Err(e) = self.name(dir, (view.as_fd(), upper.as_fd()), &name, &mut dirs) {
                if !self.live || is_fatal(&e) {
                    return Err(e);
                }
                if looks == LOOKS {
                    self.state.missed.push((join(&dir.path, &name), e.to_string()));
                    break;
                }
                looks += 1;
            }
        }
        Ok(dirs)
    }

    /// A name in a directory that the upper has. After an error nothing was added.
    fn name(
        &mut self,
        dir: &Todo,
        (view, upper): (BorrowedFd<'_>, BorrowedFd<'_>),
        name: &[u8],
        dirs: &mut Vec<Todo>,
    ) -> io::Result<()> {
        let sealed = dir.sealed.and_then(|d| self.sealed.child(d, name));
        let above = Held::open(upper, name)?;
        let above = match above {
            // Removed since it was listed.
            Some(above) if self.live && above.special()? == Some(Node::CharDevice(0)) => return Ok(()),
            None if self.live && Held::open(view, name)?.is_none() => return Ok(()),
            None => {
                let id = sealed.ok_or_else(|| contradiction("a name of neither layer"))?;
                return self.add_sealed(dir, id, Some(view), dirs);
            }
            Some(above) => above,
        };
        let shown = match Held::open(view, name)? {
            None if self.live => return Ok(()),
            shown => shown.ok_or_else(|| contradiction("a name that went while it was read"))?,
        };
        if self.live && !is_shown_by(&above.look, &shown.look) {
            return Err(contradiction("another file at every look"));
        }
        self.add_upper(dir, name.into(), &shown, &above, sealed, dirs)
    }

    /// A name that the upper does not have.
    fn add_sealed(
        &mut self,
        dir: &Todo,
        id: EntryId,
        view: Option<BorrowedFd<'_>>,
        dirs: &mut Vec<Todo>,
    ) -> io::Result<()> {
        let tree = self.sealed.tree;
        let name = tree.entries[id.0 as usize].name.clone();
        let index = tree.entries[id.0 as usize].inode;
        let sealed = &tree.inodes[index.0 as usize];
        let is_dir = sealed.node == Node::Dir;
        // Another name of it may have been written through: then the index has the inode.
        if let (false, 2.., Some(store)) = (is_dir, self.sealed.links[index.0 as usize], self.index) {
            let own;
            let at = match view {
                Some(at) => at,
                None => {
                    own = self.view.dir(&dir.path)?;
                    own.as_fd()
                }
            };
            if let Some((indexed, above)) = find_indexed(at, &name, store)? {
                let shown =
                    Held::open(at, &name)?.ok_or_else(|| contradiction("a sealed name that is not there"))?;
                let kind = self.kind(&shown, &above, Some(id), Bytes::Index(indexed))?;
                return self.add(dir, name, (&shown, &above), kind);
            }
        }
        let entry = self.state.entries.len();
        let new = self.state.inodes.len();
        let slot = *self.seen.entry(Key::Sealed(index)).or_insert(new);
        if slot == new {
            self.state.inodes.push(ShownInode {
                meta: sealed.meta.clone(),
                kind: Kind::sealed(&sealed.node),
                names: Vec::new(),
                // A renamed directory may show one sealed directory at another place: no inode of it is the same then,
                // but that is told by paths, not here.
                untouched: Some(index),
                above: None,
            });
        }
        self.state.inodes[slot].names.push(entry);
        if is_dir {
            let path = join(&dir.path, &name);
            dirs.push(Todo { entry, path, sealed: Some(id), in_upper: false });
        }
        self.state.entries.push(Shown { parent: dir.entry, name, inode: slot, in_upper: false });
        Ok(())
    }

    /// A name that the upper has.
    fn add_upper(
        &mut self,
        dir: &Todo,
        name: Box<[u8]>,
        shown: &Held,
        above: &Held,
        sealed: Option<EntryId>,
        dirs: &mut Vec<Todo>,
    ) -> io::Result<()> {
        if shown.look.is_dir() != above.look.is_dir() {
            return Err(contradiction("another kind of file than the upper holds"));
        }
        let redirect = above.xattr(b"trusted.overlay.redirect")?;
        let from = match redirect.as_deref() {
            Some(path @ [b'/', ..]) => self.sealed.at(path),
            Some(other) => dir.sealed.and_then(|d| self.sealed.child(d, other)),
            None => sealed,
        };
        let path = join(&dir.path, &name);
        let (entry, locked) = (self.state.entries.len(), above.xattr(b"trusted.overlay.protattr")?.is_some());
        if !shown.look.is_dir() {
            let kind = self.kind(shown, above, from, Bytes::Upper(path))?;
            self.add(dir, name, (shown, above), kind)?;
            self.state.locked.extend(locked.then_some(entry));
            return Ok(());
        }
        let opaque = above.xattr(b"trusted.overlay.opaque")?.is_some_and(|v| &*v == b"y");
        let from = from.filter(|id| !opaque && self.sealed.is_dir(*id));
        if redirect.is_some() && !opaque && from.is_none() {
            return Err(contradiction("a renamed directory whose origin is not in the sealed tree"));
        }
        self.add(dir, name, (shown, above), Kind::Other(Node::Dir))?;
        self.state.locked.extend(locked.then_some(entry));
        dirs.push(Todo { entry, path, sealed: from, in_upper: true });
        Ok(())
    }

    /// Kind and bytes of an inode that the upper or the index has as `above`.
    fn kind(&self, shown: &Held, above: &Held, from: Option<EntryId>, own: Bytes) -> io::Result<Kind> {
        if let Some(node) = shown.special()? {
            return Ok(Kind::Other(node));
        }
        let size = shown.look.size;
        if above.xattr(b"trusted.overlay.metacopy")?.is_none() {
            if !above.look.is_file() || above.look.size != size {
                return Err(contradiction("a file that is not what the upper holds"));
            }
            return Ok(Kind::File { size, bytes: if size == 0 { Bytes::Empty } else { own } });
        }
        match from.map(|id| Kind::sealed(&self.sealed.tree.inode(id).node)) {
            Some(kind @ Kind::File { size: sealed, .. }) if sealed == size => Ok(kind),
            _ => Err(contradiction("a file whose data is not where the sealed tree has it")),
        }
    }

    fn add(
        &mut self,
        dir: &Todo,
        name: Box<[u8]>,
        (shown, above): (&Held, &Held),
        kind: Kind,
    ) -> io::Result<()> {
        let entry = self.state.entries.len();
        let new = self.state.inodes.len();
        let key = Key::Shown(shown.look.dev, shown.look.ino);
        let slot = match kind.is_dir() {
            true => new,
            false => self.seen.get(&key).copied().unwrap_or(new),
        };
        if slot == new {
            let meta = shown.meta()?;
            if !kind.is_dir() {
                self.seen.insert(key, new);
            }
            let above = Some(above.look);
            self.state.inodes.push(ShownInode { meta, kind, names: Vec::new(), untouched: None, above });
        }
        self.state.inodes[slot].names.push(entry);
        self.state.entries.push(Shown { parent: dir.entry, name, inode: slot, in_upper: true });
        Ok(())
    }
}

/// Looks at a name of a view in use: each finds it changed since the one before.
const LOOKS: u32 = 16;

/// Whether the view shows, as `shown`, the upper's inode `above`: what overlayfs passes on of it. The numbers of an inode are of two file
/// systems.
pub fn is_shown_by(above: &Look, shown: &Look) -> bool {
    let of = |l: &Look| (l.mode, l.uid, l.gid, l.ctime, l.mtime, l.rdev);
    of(above) == of(shown) && (above.is_dir() || above.size == shown.size)
}

/// What the index has of a sealed hard link, if it was ever copied up: the entry's name is the handle of its origin, and
/// that is how overlayfs names the file itself (`struct ovl_fh` behind three bytes of padding).
fn find_indexed(dir: BorrowedFd<'_>, name: &[u8], index: &Below) -> io::Result<Option<(Vec<u8>, Held)>> {
    const OVL_FILEID_V1: i32 = 0xf8;
    let c_name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let handle = pagefold_sys::handle::name_to_handle(dir, &c_name)?;
    let fh = handle.bytes.get(3..).unwrap_or_default();
    let fh = fh.get(..usize::from(fh.get(2).copied().unwrap_or_default()));
    let Some(fh) = fh.filter(|f| !f.is_empty() && handle.kind & 0xff == OVL_FILEID_V1) else {
        return Err(contradiction("a handle that is not overlayfs's"));
    };
    let text: String = fh.iter().map(|b| format!("{b:02x}")).collect();
    let found = Held::open(index.as_fd(), text.as_bytes())?;
    Ok(found.map(|held| (text.into_bytes(), held)))
}

fn contradiction(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the view shows {what}"))
}

/// A path of bytes as the report shows it.
pub fn shown_path(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(path))
}
