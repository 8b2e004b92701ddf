//! `--store DIR`, and where the store is without it.

use std::path::{Path, PathBuf};

use clap::Args;
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
            None => Ok(Store::default_dir(near.unwrap_or(Path::new(".")))?),
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
