//! What of pagefold is left on this host: `pagefold uninstall --check`.
//!
//! Looked for: views in the mount namespace of any process, stores at the top of any mounted file system, lines of fstab, units of
//! systemd, running processes. Invariant: nothing is changed, and what can't be looked at is told, never passed over: "nothing
//! is left" must be true. What it deliberately does not do: find a store that was given a path of its own (`--store`) and has no
//! view mounted; name it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::assemble::SOURCE;
use crate::mountinfo::{self, Mount};
use crate::regular::Regular;

/// Something that depends on pagefold, or is part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Remain {
    /// What.
    pub kind: RemainKind,
    /// Which.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// Kinds of things that can be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RemainKind {
    /// A mounted view.
    View,
    /// A mounted metadata image.
    Image,
    /// A store.
    Store,
    /// A line of fstab.
    Fstab,
    /// A unit of systemd.
    Unit,
    /// A process.
    Process,
    /// Something that could not be looked at.
    Unknown,
}

/// Looks. `stores` are further directories where stores may be.
#[must_use]
pub fn look(stores: &[PathBuf]) -> Vec<Remain> {
    let mut found = BTreeSet::new();
    let mut candidates: BTreeSet<PathBuf> = stores.iter().cloned().collect();
    let own = mountinfo::read().unwrap_or_default();
    for (pid, mounts) in namespaces(&mut found) {
        for mount in &mounts {
            look_at_mount((mount, &own), pid, &mut found, &mut candidates);
        }
    }
    for dir in candidates.iter().filter(|dir| is_local(dir, &own) && is_store(dir)) {
        found.insert(Remain {
            kind: RemainKind::Store,
            what: dir.display().to_string(),
            remedy: format!("pagefold unseal --all --store {}", dir.display()),
        });
    }
    look_at_fstab(Path::new("/etc/fstab"), &mut found);
    for dir in ["/etc/systemd/system", "/run/systemd/system", "/run/systemd/generator"] {
        look_at_units(Path::new(dir), 0, &mut found);
    }
    look_at_processes(&mut found);
    found.into_iter().collect()
}

fn remain(kind: RemainKind, what: String, remedy: impl Into<String>) -> Remain {
    Remain { kind, what, remedy: remedy.into() }
}

/// Where an overlay with this upper is mounted, in the mount namespace of any process: for the message that it is in use. Not seen: one that
/// only an open file keeps.
pub(super) fn mounts_of(upper: &Path) -> Vec<String> {
    let is_it = |mount: &Mount| {
        mount.kind == "overlay" && layers(&mount.fs_options).iter().any(|layer| layer == upper)
    };
    let mut found = Vec::new();
    for (pid, mounts) in namespaces(&mut BTreeSet::new()) {
        for mount in mounts.iter().filter(|m| is_it(m)) {
            found.push(format!("at {:?}{}", mount.mount_point, in_namespace_of(pid)));
        }
    }
    found
}

/// Where to look for a mount: nothing is said of our own mount namespace.
fn in_namespace_of(pid: u32) -> String {
    if pid == std::process::id() {
        return String::new();
    }
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!(" in the mount namespace of process {pid} ({:?})", name.trim_end())
}

/// The mounts of every mount namespace that some process is in, with one process of it to name: this one for its own.
fn namespaces(found: &mut BTreeSet<Remain>) -> Vec<(u32, Vec<Mount>)> {
    let mut seen: BTreeMap<PathBuf, (u32, Vec<Mount>)> = BTreeMap::new();
    let mut unknown = 0;
    for pid in std::iter::once(std::process::id()).chain(pids()) {
        let Ok(namespace) = std::fs::read_link(format!("/proc/{pid}/ns/mnt")) else {
            // Gone meanwhile, or a zombie; a living one of somebody else is not ours to read.
            unknown += u32::from(
                Path::new(&format!("/proc/{pid}/exe"))
                    .symlink_metadata()
                    .is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied),
            );
            continue;
        };
        if seen.contains_key(&namespace) {
            continue;
        }
        if let Ok(text) = std::fs::read(format!("/proc/{pid}/mountinfo")) {
            seen.insert(namespace, (pid, mountinfo::parse(&text)));
        }
    }
    if unknown > 0 || !rustix::process::geteuid().is_root() {
        let what = "mounts of other users' processes".to_string();
        found.insert(remain(RemainKind::Unknown, what, "run this as root"));
    }
    seen.into_values().collect()
}

fn pids() -> Vec<u32> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// `own`: the mounts of our own namespace, in which all paths are looked up.
fn look_at_mount(
    (mount, own): (&Mount, &[Mount]),
    pid: u32,
    found: &mut BTreeSet<Remain>,
    stores: &mut BTreeSet<PathBuf>,
) {
    let point = mount.mount_point.display();
    let place = format!("{point}{}", in_namespace_of(pid));
    match mount.kind.as_str() {
        "overlay" => {
            let layers = layers(&mount.fs_options);
            let layers = layers.iter().filter(|layer| is_local(layer, own));
            let in_store: Vec<PathBuf> = layers.filter_map(|layer| store_above(layer)).collect();
            if mount.source == SOURCE || !in_store.is_empty() {
                found.insert(remain(RemainKind::View, place, format!("pagefold umount {point}")));
            }
            stores.extend(in_store);
        }
        "erofs" => {
            if let Some(store) =
                Some(&mount.mount_point).filter(|at| is_local(at, own)).and_then(|at| store_above(at))
            {
                found.insert(remain(RemainKind::Image, place, format!("umount {point}")));
                stores.insert(store);
            }
        }
        // What another namespace calls by this path may be something else here; then it is no store.
        "xfs" | "btrfs" | "ext4" | "ext3" | "ext2" | "bcachefs" | "f2fs" => {
            stores.insert(mount.mount_point.join(".pagefold"));
        }
        _ => {}
    }
}

/// Directories in the options of an overlay. Only to find stores: a name with an escaped colon or comma is missed, and found
/// by the mount's own name.
fn layers(options: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for option in options.split(|b| *b == b',') {
        let Some(at) = option.iter().position(|b| *b == b'=') else { continue };
        let (key, value) = (&option[..at], &option[at + 1..]);
        if matches!(key, b"lowerdir" | b"lowerdir+" | b"datadir+" | b"upperdir" | b"workdir") {
            let parts = value.split(|b| *b == b':').filter(|p| p.first() == Some(&b'/'));
            found.extend(parts.map(|p| PathBuf::from(mountinfo::unescape(p))));
        }
    }
    found
}

/// The store that a path lies in.
fn store_above(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|dir| is_store(dir)).map(Path::to_path_buf)
}

/// Where anybody mounts a layer of an overlay, in whatever namespace, we look for a store: it may be a place of theirs, with a pipe or
/// an endless device for `FORMAT`. Symbolic links are in the path of no store.
fn is_store(dir: &Path) -> bool {
    let held = |name: &str, flags: OFlags| {
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(CWD, dir.join(name), OFlags::PATH | flags, Mode::empty(), resolve)
    };
    let format = held("FORMAT", OFlags::CLOEXEC).ok().and_then(|fd| Regular::held(fd).ok()?);
    let says_so =
        format.and_then(|file| file.open(OFlags::RDONLY | OFlags::NONBLOCK).ok()).is_some_and(|file| {
            let mut text = [0; MAGIC.len()];
            rustix::io::pread(&file, &mut text, 0).is_ok_and(|read| text[..read] == *MAGIC)
        });
    says_so
        || held("index.redb", OFlags::CLOEXEC).is_ok()
            && held("anchors", OFlags::CLOEXEC | OFlags::DIRECTORY).is_ok()
}

/// What `FORMAT` begins with.
const MAGIC: &[u8] = b"pagefold store";

/// Whether a path lies on a file system that answers by itself: no store can be elsewhere, and somebody's server may answer never.
fn is_local(path: &Path, mounts: &[Mount]) -> bool {
    let above = mounts.iter().enumerate().filter(|(_, m)| path.starts_with(&m.mount_point));
    let holder = above.max_by_key(|(index, m)| (m.mount_point.components().count(), *index));
    holder.is_none_or(|(_, mount)| {
        let kind = mount.kind.as_str();
        !kind.starts_with("fuse")
            && !kind.starts_with("nfs")
            && !["autofs", "cifs", "smb3", "9p", "ceph"].contains(&kind)
    })
}

fn look_at_fstab(path: &Path, found: &mut BTreeSet<Remain>) {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
        Err(e) => {
            let what = format!("{}: {e}", path.display());
            found.insert(remain(RemainKind::Unknown, what, "run this as root"));
            return;
        }
    };
    for (number, line) in text.split(|b| *b == b'\n').enumerate() {
        let fields: Vec<&[u8]> = line.split(|b| b.is_ascii_whitespace()).filter(|f| !f.is_empty()).collect();
        let is_comment = fields.first().is_none_or(|f| f.starts_with(b"#"));
        let ours = fields.get(2).is_some_and(|kind| *kind == b"pagefold" || *kind == b"fuse.pagefold")
            || fields.iter().any(|f| contains(f, b"/.pagefold"));
        if !is_comment && ours {
            let what = format!("{}:{}", path.display(), number + 1);
            found.insert(remain(RemainKind::Fstab, what, "remove the line"));
        }
    }
}

/// Units that are of pagefold, or mount or run it, in a directory and its `*.wants`, `*.requires` and `*.d`.
fn look_at_units(dir: &Path, depth: u32, found: &mut BTreeSet<Remain>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if depth == 0 {
                look_at_units(&path, 1, found);
            }
            continue;
        }
        let named = contains(entry.file_name().as_bytes(), b"pagefold");
        let text = std::fs::metadata(&path)
            .ok()
            .filter(|m| m.is_file() && m.len() < 1 << 20)
            .and_then(|_| std::fs::read(&path).ok())
            .unwrap_or_default();
        let runs = text.split(|b| *b == b'\n').any(|line| {
            let line = line.trim_ascii();
            line == b"Type=pagefold" || line.starts_with(b"Exec") && contains(line, b"pagefold")
        });
        if named || runs {
            let unit = entry.file_name().to_string_lossy().into_owned();
            found.insert(remain(
                RemainKind::Unit,
                path.display().to_string(),
                format!("systemctl disable {unit}"),
            ));
        }
    }
}

fn look_at_processes(found: &mut BTreeSet<Remain>) {
    for pid in pids().into_iter().filter(|pid| *pid != std::process::id()) {
        let Ok(exe) = std::fs::read_link(format!("/proc/{pid}/exe")) else { continue };
        let name = exe.file_name().unwrap_or(OsStr::new("")).as_bytes();
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        if name == b"pagefold" || name == b"mount.pagefold" {
            found.insert(remain(RemainKind::Process, format!("{pid}"), "wait for it to end"));
        }
    }
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|part| part == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fstab_and_units_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let fstab = dir.path().join("fstab");
        let text = "# /a /b pagefold\n/dev/x / ext4 defaults 0 1\n/srv/a  /var/a\tpagefold nofail 0 0\n\
                    none /x overlay lowerdir=/srv/.pagefold/anchors 0 0\n";
        std::fs::write(&fstab, text).unwrap();
        let mut found = BTreeSet::new();
        look_at_fstab(&fstab, &mut found);
        let lines: Vec<&str> = found.iter().map(|r| r.what.rsplit(':').next().unwrap()).collect();
        assert_eq!(lines, ["3", "4"]);

        let units = dir.path().join("units");
        std::fs::create_dir_all(units.join("multi-user.target.wants")).unwrap();
        for (name, text) in [
            ("a.service", "[Service]\nExecStart=/usr/bin/true\n"),
            ("b.service", "[Service]\nExecStartPre=/usr/bin/pagefold mount --all\n"),
            ("var-a.mount", "[Mount]\n Type=pagefold \n"),
            ("multi-user.target.wants/pagefold@x.service", ""),
        ] {
            std::fs::write(units.join(name), text).unwrap();
        }
        let mut found = BTreeSet::new();
        look_at_units(&units, 0, &mut found);
        assert_eq!(found.len(), 3, "{found:?}");
    }

    /// Anybody may mount an overlay in a namespace of their own, with a layer that looks like the start of a store.
    #[test]
    fn what_stands_in_for_a_store_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        for name in ["pipe", "endless", "link"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(CWD, dir.join("pipe/FORMAT"), fifo, Mode::RUSR, 0).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.join("endless/FORMAT")).unwrap();
        std::fs::write(dir.join("text"), "pagefold store\n").unwrap();
        std::os::unix::fs::symlink(dir.join("text"), dir.join("link/FORMAT")).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let at = dir.clone();
        std::thread::spawn(move || {
            let _ = tell.send(["pipe", "endless", "link"].map(|name| is_store(&at.join(name))));
        });
        let told = told.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(told.expect("it hangs"), [false; 3]);
    }

    #[test]
    fn nothing_is_looked_for_where_a_server_may_not_answer() {
        let text = b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
            2 1 0:50 / /home/u/f rw - fuse.x x rw\n\
            3 1 0:51 / /net rw - autofs x rw\n";
        let mounts = mountinfo::parse(text);
        let local = |path: &str| is_local(Path::new(path), &mounts);
        assert!(local("/home/u/fine") && !local("/home/u/f/.pagefold") && !local("/net/a"));
    }

    #[test]
    fn a_view_is_known_by_its_source_and_by_its_layers() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().canonicalize().unwrap().join("elsewhere");
        std::fs::create_dir_all(store.join("anchors/1")).unwrap();
        std::fs::write(store.join("FORMAT"), "pagefold store\nformat 1\n").unwrap();
        let layer = store.join("anchors/1");
        let text = format!(
            "1 0 0:50 / /a rw - overlay pagefold rw\n\
             2 0 0:51 / /b rw - overlay overlay rw,lowerdir=/x::{}\n\
             3 0 0:52 / /c rw - overlay overlay rw,lowerdir=/x:/y\n",
            layer.display()
        );
        let (mut found, mut stores) = (BTreeSet::new(), BTreeSet::new());
        for mount in mountinfo::parse(text.as_bytes()) {
            look_at_mount((&mount, &[]), 1, &mut found, &mut stores);
        }
        let views: Vec<&str> = found.iter().map(|r| r.what.split(' ').next().unwrap()).collect();
        assert_eq!(views, ["/a", "/b"]);
        assert_eq!(stores, BTreeSet::from([store]));
    }
}
