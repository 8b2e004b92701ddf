//! File systems and devices met during a walk, each asked about once.

use std::sync::{Arc, Mutex};

use pagefold_engine::units::FsId;
use rustc_hash::FxHashMap;

use crate::source::{FileSource, FsDescription, FsError};

/// A file system and its number within this scan.
#[derive(Debug)]
pub(crate) struct KnownFs {
    pub id: FsId,
    pub description: FsDescription,
}

#[derive(Debug, Default)]
struct Tables {
    by_dev: FxHashMap<u64, Arc<KnownFs>>,
    ids: FxHashMap<([u8; 16], u64), FsId>,
    devs: FxHashMap<u64, u32>,
}

/// Shared by the workers of a walk.
#[derive(Debug, Default)]
pub(crate) struct Filesystems {
    tables: Mutex<Tables>,
}

impl Filesystems {
    /// The file system that `dir`, found on `dev`, is on.
    pub fn of<S: FileSource>(&self, source: &S, dev: u64, dir: &S::Dir) -> Result<Arc<KnownFs>, FsError> {
        if let Some(known) = self.lock().by_dev.get(&dev) {
            return Ok(Arc::clone(known));
        }
        // Asked without the lock: two workers may ask at once and get the same answer.
        let description = source.describe(dir)?;
        let mut tables = self.lock();
        let next = FsId(u16::try_from(tables.ids.len()).unwrap_or(u16::MAX));
        let id = *tables.ids.entry((description.uuid, description.instance)).or_insert(next);
        let mut description = description;
        if id.0 == u16::MAX {
            description.physical_identity = false;
            description.why_not = Some("more than 65,535 file systems in one scan".to_owned());
        }
        let known = Arc::new(KnownFs { id, description });
        tables.by_dev.insert(dev, Arc::clone(&known));
        Ok(known)
    }

    /// A small number for `dev`.
    pub fn dev_number(&self, dev: u64) -> u32 {
        let mut tables = self.lock();
        let next = tables.devs.len() as u32;
        *tables.devs.entry(dev).or_insert(next)
    }

    /// The devices by number.
    pub fn into_devs(self) -> Vec<u64> {
        let tables = self.tables.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut devs = vec![0; tables.devs.len()];
        for (dev, number) in tables.devs {
            devs[number as usize] = dev;
        }
        devs
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
