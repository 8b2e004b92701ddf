//! Where views are mounted, in every mount namespace that a process is in.
//!
//! A successful umount is no proof that a view is gone (design 6): a container's namespace may hold it. This looks at the
//! mountinfo of one process of each namespace. Not found: a mount that is in no namespace any more (lazily unmounted, still
//! used); the probe of the upper finds that.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::mountinfo::{self, Mount, unescape};
use crate::store::SealId;

/// A mount of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewMount {
    /// `st_dev` of the overlay: major, minor. The same for all mounts of the view.
    pub device: (u32, u32),
    /// Where, as its namespace shows it.
    pub at: PathBuf,
    /// A process of that namespace; `None`: our own.
    pub process: Option<u32>,
}

/// All mounts of views whose uppers are in the store `dir`, by root.
#[must_use]
pub fn of_store(dir: &Path) -> HashMap<SealId, Vec<ViewMount>> {
    let mut found: HashMap<SealId, Vec<ViewMount>> = HashMap::new();
    let roots = dir.join("roots");
    for (process, mounts) in namespaces() {
        for mount in mounts {
            if let Some(root) = root_of(&mount, &roots) {
                let view = ViewMount { device: mount.device, at: mount.mount_point, process };
                found.entry(root).or_default().push(view);
            }
        }
    }
    found
}

/// The mounts of each namespace, our own first.
fn namespaces() -> Vec<(Option<u32>, Vec<Mount>)> {
    let own = std::fs::read_link("/proc/self/ns/mnt").ok();
    let mut seen: HashSet<PathBuf> = own.into_iter().collect();
    let mut all = vec![(None, mountinfo::read().unwrap_or_default())];
    let list = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in list.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()) {
        let Ok(namespace) = std::fs::read_link(format!("/proc/{process}/ns/mnt")) else { continue };
        if seen.insert(namespace)
            && let Ok(text) = std::fs::read(format!("/proc/{process}/mountinfo"))
        {
            all.push((Some(process), mountinfo::parse(&text)));
        }
    }
    all
}

/// From the overlay's option `upperdir=<store>/roots/<id>/g<generation>/upper`.
fn root_of(mount: &Mount, roots: &Path) -> Option<SealId> {
    if mount.kind != "overlay" {
        return None;
    }
    let upper = mount.fs_options.split(|b| *b == b',').find_map(|o| o.strip_prefix(b"upperdir="))?;
    let upper = PathBuf::from(unescape(upper));
    let id = upper.strip_prefix(roots).ok()?.components().next()?;
    id.as_os_str().to_str()?.parse().ok().map(SealId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_known_by_its_upper() {
        let text = b"40 1 0:77 / /srv/a rw - overlay pagefold rw,lowerdir+=/x,upperdir=/m/.pagefold/roots/000007/g1/upper\n\
            41 1 0:78 / /srv/b rw - overlay overlay rw,upperdir=/elsewhere/roots/000007/g1/upper\n\
            42 1 0:79 / /srv/c rw - overlay overlay rw,upperdir=/m/.pagefold/roots/x/g1/upper\n\
            43 1 0:80 / /srv/d rw - ext4 x rw,upperdir=/m/.pagefold/roots/000008/g1/upper\n";
        let roots = Path::new("/m/.pagefold/roots");
        let found: Vec<_> = mountinfo::parse(text).iter().map(|m| root_of(m, roots)).collect();
        assert_eq!(found, [Some(SealId(7)), None, None, None]);
    }

    #[test]
    fn our_own_namespace_is_looked_at() {
        let all = namespaces();
        assert!(all[0].0.is_none() && !all[0].1.is_empty());
    }
}
