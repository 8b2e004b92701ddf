//! Everything that a reader can see of a tree, by plain calls and independent of what it judges.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    pub size: u64,
    pub mtime: (i64, i64),
    pub rdev: u64,
    pub target: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub hash: Option<blake3::Hash>,
    /// The first path (in order of names) of the same inode, and how many links it says to have.
    pub links: (Vec<u8>, u64),
}

pub type Snapshot = BTreeMap<Vec<u8>, Seen>;

/// Looks at all of a tree.
pub fn take(root: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    let mut first = HashMap::new();
    walk(root, Vec::new(), &mut found, &mut first);
    let names: Vec<(Vec<u8>, (u64, u64))> = first.into_iter().collect();
    let mut least: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    for (path, inode) in &names {
        let known = least.entry(*inode).or_insert_with(|| path.clone());
        if path < known {
            *known = path.clone();
        }
    }
    for (path, inode) in names {
        found.get_mut(&path).unwrap().links.0 = least[&inode].clone();
    }
    found
}

fn walk(root: &Path, path: Vec<u8>, found: &mut Snapshot, inodes: &mut HashMap<Vec<u8>, (u64, u64)>) {
    let full = root.join(std::ffi::OsStr::from_bytes(&path));
    let meta = std::fs::symlink_metadata(&full).unwrap();
    let kind = meta.file_type();
    let target = match kind.is_symlink() {
        true => std::fs::read_link(&full).unwrap().into_os_string().into_vec(),
        false => Vec::new(),
    };
    let hash = kind.is_file().then(|| blake3::hash(&std::fs::read(&full).unwrap()));
    let seen = Seen {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        size: if kind.is_dir() { 0 } else { meta.size() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        rdev: meta.rdev(),
        target,
        xattrs: xattrs(&full),
        hash,
        links: (path.clone(), if kind.is_dir() { 0 } else { meta.nlink() }),
    };
    found.insert(path.clone(), seen);
    if !kind.is_dir() {
        inodes.insert(path, (meta.dev(), meta.ino()));
        return;
    }
    for entry in std::fs::read_dir(&full).unwrap() {
        let name = entry.unwrap().file_name().into_vec();
        let below = if path.is_empty() { name } else { [&path[..], &name[..]].join(&b'/') };
        walk(root, below, found, inodes);
    }
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut all = Vec::new();
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])
            .unwrap_or_else(|e| panic!("{path:?} {:?}: {e}", String::from_utf8_lossy(name)));
        value.truncate(length);
        all.push((name.to_vec(), value));
    }
    all.sort();
    all
}

/// What differs, one line a path; `times`: modification times count.
pub fn differences(want: &Snapshot, got: &Snapshot, times: bool) -> Vec<String> {
    let text = |p: &[u8]| String::from_utf8_lossy(p).into_owned();
    let mut lines = Vec::new();
    for (path, seen) in want {
        let Some(other) = got.get(path) else {
            lines.push(format!("{}: missing", text(path)));
            continue;
        };
        let mut other = other.clone();
        if !times {
            other.mtime = seen.mtime;
        }
        if other != *seen {
            lines.push(format!("{}: want {seen:?}, got {other:?}", text(path)));
        }
    }
    lines.extend(got.keys().filter(|p| !want.contains_key(*p)).map(|p| format!("{}: too much", text(p))));
    lines
}
