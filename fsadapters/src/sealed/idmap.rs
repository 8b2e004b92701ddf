//! Views whose owners are mapped: a container in a user namespace sees its root's files as its own.
//!
//! Overlayfs can't be mapped itself, so its layers are: clones of their mounts with `MOUNT_ATTR_IDMAP`. On disk nothing changes:
//! what the container's root writes is stored in the upper as uid 0. The overlay is assembled under the container root's ids,
//! because overlayfs makes its own files as whoever mounts it, and id 0 has no place in the map.
//!
//! What it deliberately does not do: choose a map.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

use pagefold_sys::{mount, userns};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::assemble::Layers;
use super::upper::{UPPER, WORK};

/// Why layers could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdMapError {
    /// Not understood.
    #[error(
        "--idmap {0:?}: {1}; give INSIDE:OUTSIDE:COUNT[,...], or one map for users and one for groups with a slash between them"
    )]
    Spec(String, &'static str),
    /// No user namespace.
    #[error("the user namespace for the id map could not be made: {0}")]
    Namespace(std::io::Error),
    /// A layer's file system or this kernel can't.
    #[error("the {layer} can't be id-mapped: {error} (Linux 5.19)")]
    Layer {
        /// Which.
        layer: &'static str,
        /// The answer.
        error: std::io::Error,
    },
    /// The ids could not be taken.
    #[error("the ids of the container's root could not be taken: {0}")]
    Ids(std::io::Error),
}

impl IdMapError {
    pub(super) fn is_host_s(&self) -> bool {
        !matches!(self, IdMapError::Spec(..))
    }
}

/// A run of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    inside: u32,
    outside: u32,
    count: u32,
}

/// Maps of users and groups: ids on disk (inside) to ids that the view shows (outside).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    users: Vec<Run>,
    groups: Vec<Run>,
}

/// The kernel takes 340 lines.
const RUNS_MAX: usize = 340;

impl FromStr for IdMaps {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<IdMaps, IdMapError> {
        let wrong = |why| IdMapError::Spec(text.into(), why);
        let (users, groups) = text.split_once('/').unwrap_or((text, text));
        Ok(IdMaps { users: parse(users).map_err(wrong)?, groups: parse(groups).map_err(wrong)? })
    }
}

fn parse(text: &str) -> Result<Vec<Run>, &'static str> {
    let mut runs = Vec::new();
    for part in text.split(',') {
        let numbers: Vec<u32> =
            part.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| "not a number")?;
        let [inside, outside, count] = numbers[..] else { return Err("three numbers are needed") };
        let fits = |start: u32| start.checked_add(count).is_some();
        if count == 0 || !fits(inside) || !fits(outside) {
            return Err("a run is empty or beyond the last id");
        }
        runs.push(Run { inside, outside, count });
    }
    if runs.len() > RUNS_MAX {
        return Err("more than 340 runs");
    }
    Ok(runs)
}

impl fmt::Display for IdMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |runs: &[Run]| {
            let parts: Vec<String> =
                runs.iter().map(|r| format!("{}:{}:{}", r.inside, r.outside, r.count)).collect();
            parts.join(",")
        };
        let users = show(&self.users);
        if self.users == self.groups {
            f.write_str(&users)
        } else {
            write!(f, "{users}/{}", show(&self.groups))
        }
    }
}

fn lines(runs: &[Run]) -> String {
    runs.iter().map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count)).collect()
}

/// What the container's id 0 is outside.
fn root_of(runs: &[Run]) -> Option<u32> {
    runs.iter().find(|r| r.inside == 0).map(|r| r.outside)
}

impl IdMaps {
    /// Runs `work` under the ids that the container's root has here.
    ///
    /// # Errors
    /// The map has no id 0, or the ids can't be taken.
    pub fn as_their_root<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, IdMapError> {
        let (Some(uid), Some(gid)) = (root_of(&self.users), root_of(&self.groups)) else {
            return Err(IdMapError::Spec(self.to_string(), "id 0 must be in the map"));
        };
        userns::with_file_ids(uid, gid, work).map_err(IdMapError::Ids)
    }
}

/// A map in the form the kernel takes.
#[derive(Debug)]
pub struct Mapped {
    namespace: OwnedFd,
}

impl Mapped {
    /// A user namespace with these maps.
    ///
    /// # Errors
    /// [`IdMapError::Namespace`].
    pub fn new(maps: &IdMaps) -> Result<Mapped, IdMapError> {
        let namespace = userns::user_namespace(&lines(&maps.users), &lines(&maps.groups));
        Ok(Mapped { namespace: namespace.map_err(IdMapError::Namespace)? })
    }

    /// The layers, each through a mapped clone of its mount. Upper and work through one: overlayfs wants them on one mount.
    ///
    /// # Errors
    /// [`IdMapError::Layer`].
    pub fn layers(
        &self,
        root_dir: &OwnedFd,
        images: &[OwnedFd],
        data: &OwnedFd,
    ) -> Result<Layers, IdMapError> {
        let failed = |layer| move |error| IdMapError::Layer { layer, error };
        let own = self.clone_of(root_dir.as_fd()).map_err(failed(WRITABLE))?;
        let upper = open_in(&own, UPPER).map_err(failed(WRITABLE))?;
        let work = open_in(&own, WORK).map_err(failed(WRITABLE))?;
        let data_mount = self.clone_of(data.as_fd()).map_err(failed(DATA))?;
        let data = open_in(&data_mount, ".").map_err(failed(DATA))?;
        let mut layers =
            Layers { upper, work, images: Vec::new(), data: Some(data), mounts: vec![own, data_mount] };
        for image in images {
            let mount = self.clone_of(image.as_fd()).map_err(failed(IMAGE))?;
            layers.images.push(open_in(&mount, ".").map_err(failed(IMAGE))?);
            layers.mounts.push(mount);
        }
        Ok(layers)
    }

    /// A detached, mapped clone of the mount that `dir` was opened through, with `dir` as its root.
    fn clone_of(&self, dir: BorrowedFd<'_>) -> std::io::Result<OwnedFd> {
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(dir, c"", flags)?;
        mount::set_id_map(tree.as_fd(), self.namespace.as_fd())?;
        Ok(tree)
    }
}

const WRITABLE: &str = "writable layer";
const DATA: &str = "data layer";
const IMAGE: &str = "image";

fn open_in(dir: &OwnedFd, name: &str) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_understood_and_written_as_they_were() {
        for good in ["0:100000:65536", "0:1000:1,1:100000:65535", "0:5:1/0:6:2"] {
            assert_eq!(good.parse::<IdMaps>().unwrap().to_string(), good);
        }
        assert_eq!("0:5:1/0:5:1".parse::<IdMaps>().unwrap().to_string(), "0:5:1");
        for bad in
            ["", "0", "0:1", "0:1:0", "a:b:c", "0:1:2:3", "0:4294967295:1", "0:-1:1", "0:1:1/", "/0:1:1"]
        {
            assert!(bad.parse::<IdMaps>().is_err(), "{bad}");
        }
        let no_root: IdMaps = "1:100000:10".parse().unwrap();
        assert!(no_root.as_their_root(|| ()).is_err());
    }
}
