//! `--store DIR`, and where the store is without it.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clap::Args;
use pagefold_fsadapters::fsid;
use pagefold_fsadapters::sealed::mount;
use pagefold_fsadapters::store::{OpenMode, Store};

/// Which store.
#[derive(Clone, Debug, Args)]
pub struct StoreArg {
    /// The store [default: `.pagefold` at the mount point of the root's file system, or of the current directory's]
    #[arg(long = "store", value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl StoreArg {
    /// Its directory; `near` is a path on its file system.
    pub fn dir(&self, near: Option<&Path>) -> anyhow::Result<PathBuf> {
        match &self.dir {
            Some(dir) => Ok(dir.clone()),
            None => default_dir(near.unwrap_or(Path::new("."))),
        }
    }

    /// Whether the user named none.
    pub fn is_default(&self) -> bool {
        self.dir.is_none()
    }

    /// Opens it; `command` is what another process waiting for the store reads.
    pub fn open(&self, near: Option<&Path>, mode: OpenMode, command: &str) -> anyhow::Result<Store> {
        Ok(Store::open(&self.dir(near)?, mode, command)?)
    }

    /// Opens it; without the option the one at `found`.
    pub fn open_at(&self, found: &Path, mode: OpenMode, command: &str) -> anyhow::Result<Store> {
        Ok(Store::open(self.dir.as_deref().unwrap_or(found), mode, command)?)
    }
}

/// Where the store is for the file system of `near`.
pub fn default_dir(near: &Path) -> anyhow::Result<PathBuf> {
    match of_view(near) {
        Some(dir) => Ok(dir),
        None => Ok(Store::default_dir(near)?),
    }
}

/// The store of the view that `near` lies in. A root with its view in place is seen as that: a store must not be looked for in
/// there, and least of all made.
fn of_view(near: &Path) -> Option<PathBuf> {
    let near = near.canonicalize().ok()?;
    let file = std::fs::File::open(&near).ok()?;
    if fsid::is_overlay(file.as_fd()) != Some(true) {
        return None;
    }
    near.ancestors().find_map(mount::store_of)
}
