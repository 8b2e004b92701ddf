//! Where views are mounted, in every mount namespace that a process is in.
//!
//! A successful umount is no proof that a view is gone (design 6): a container's namespace may hold it. This looks at the
//! mountinfo of one process of each namespace. Not found: a mount that is in no namespace any more (lazily unmounted, still
//! used); the probe of the upper finds that.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::mountinfo::{self, Mount, unescape};
use crate::sealed::assemble::SOURCE;
use crate::sealed::mount::view_at;
use crate::store::{SealId, Store, StoreError};

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

/// All mounts of the store's views, by root: known by their upper, which mountinfo names; id-mapped ones, whose upper it can't
/// name, by the target that the index remembers and from there by device. An id-mapped view that was unmounted at its
/// target and lives on in another namespace is not found.
///
/// # Errors
/// The index can't be read.
pub fn of_store(store: &Store) -> Result<HashMap<SealId, Vec<ViewMount>>, StoreError> {
    let roots = store.dir().join("roots");
    let views = store.views()?;
    let all = namespaces();
    let mut by_device: HashMap<(u32, u32), SealId> = HashMap::new();
    for mount in all.iter().flat_map(|(_, mounts)| mounts).filter(|m| is_view(m)) {
        by_device.extend(root_of(mount, &roots).map(|root| (mount.device, root)));
    }
    if let Some((None, own)) = all.first() {
        for view in &views {
            let at_target =
                view_at(own, &view.target).filter(|m| upper_of(m).is_none_or(|u| !names_a_store(&u)));
            if let Some(mount) = at_target {
                by_device.entry(mount.device).or_insert(view.root);
            }
        }
    }
    let mut found: HashMap<SealId, Vec<ViewMount>> = HashMap::new();
    for (process, mounts) in all {
        for mount in mounts.into_iter().filter(is_view) {
            if let Some(root) = by_device.get(&mount.device) {
                let view = ViewMount { device: mount.device, at: mount.mount_point, process };
                found.entry(*root).or_default().push(view);
            }
        }
    }
    Ok(found)
}

fn is_view(mount: &Mount) -> bool {
    mount.kind == "overlay" && mount.source == SOURCE
}

/// Whether the path is one of an upper in some store: `.../roots/<id>/g<generation>/upper`.
fn names_a_store(upper: &Path) -> bool {
    upper.ancestors().nth(3).is_some_and(|at| at.ends_with("roots"))
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

/// The overlay's option `upperdir`.
fn upper_of(mount: &Mount) -> Option<PathBuf> {
    let option = mount.fs_options.split(|b| *b == b',').find_map(|o| o.strip_prefix(b"upperdir="))?;
    Some(PathBuf::from(unescape(option)))
}

/// From an upper `<store>/roots/<id>/g<generation>/upper`.
fn root_of(mount: &Mount, roots: &Path) -> Option<SealId> {
    let upper = upper_of(mount).filter(|_| is_view(mount))?;
    let id = upper.strip_prefix(roots).ok()?.components().next()?;
    id.as_os_str().to_str()?.parse().ok().map(SealId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_known_by_its_upper() {
        let text = b"40 1 0:77 / /srv/a rw - overlay pagefold rw,lowerdir+=/x,upperdir=/m/.pagefold/roots/000007/g1/upper\n\
            41 1 0:78 / /srv/b rw - overlay pagefold rw,upperdir=/elsewhere/roots/000007/g1/upper\n\
            42 1 0:79 / /srv/c rw - overlay overlay rw,upperdir=/m/.pagefold/roots/x/g1/upper\n\
            43 1 0:80 / /srv/d rw - ext4 x rw,upperdir=/m/.pagefold/roots/000008/g1/upper\n";
        let roots = Path::new("/m/.pagefold/roots");
        let found: Vec<_> = mountinfo::parse(text).iter().map(|m| root_of(m, roots)).collect();
        assert_eq!(found, [Some(SealId(7)), None, None, None]);
    }

    #[test]
    fn an_upper_without_its_store_is_known_as_such() {
        assert!(names_a_store(Path::new("/m/.pagefold/roots/000007/g1/upper")));
        assert!(!names_a_store(Path::new("/upper")));
    }

    #[test]
    fn our_own_namespace_is_looked_at() {
        let all = namespaces();
        assert!(all[0].0.is_none() && !all[0].1.is_empty());
    }
}
