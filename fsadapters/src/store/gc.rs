//! Garbage: uppers of earlier generations that nobody uses, images that no upper needs, anchors that no image names.
//!
//! ```text
//! generations (root, n): kept if current, live, or written to
//!   -> images: kept if a kept generation, a root or a mount names them
//!   -> anchors: kept if a kept image, or the layer of a kept generation, names them
//! ```
//!
//! Invariant: an upper keeps its image and its layer, both keep their anchors, whatever else happens; what goes is given up by a commit before it is
//! unlinked. `&mut Store`: nothing can be built meanwhile, so a hit can't lose its anchor. What it deliberately does not do: find out
//! whether a view is live (the caller does), or touch names that pagefold does not make.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::crash::step;
use super::error::StoreError;
use super::index::{ANCHORS, DOMAINS, GENERATIONS, GRAVES, Generation, Grave, IMAGES, ROOTS, StoredImage};
use super::key::{AnchorKey, ImageDigest, SealId};
use super::open::{Store, anchor_name, domain_name, image_name};
use super::publish::forget_hints;
use super::remove::unlink_immutable;
use super::rows::{AnchorRow, DomainRow, RootRow};
use super::task::Task;
use crate::fsid;

/// Anchors given up by one commit: bounds memory and the time until an interrupt is heard.
const BATCH: usize = 20_000;

/// What [`Store::gc`] did. Sizes in bytes are logical: blocks that an anchor shares with others are not freed with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Uppers of earlier generations removed.
    pub generations: u64,
    /// Earlier generations kept because views use them or have written to them.
    pub generations_kept: u64,
    /// Images removed.
    pub images: u64,
    /// Their sizes.
    pub image_bytes: u64,
    /// Images that no root needs but that are mounted.
    pub images_mounted: u64,
    /// Anchors removed.
    pub anchors: u64,
    /// Their sizes.
    pub anchor_bytes: u64,
    /// Files with an anchor's name that no row named.
    pub orphans: u64,
    /// Anchors and images that stay.
    pub anchors_kept: u64,
    /// Images that stay.
    pub images_kept: u64,
    /// Bytes free on the file system afterwards minus before; others write there too.
    pub freed_on_disk: i64,
    /// Ended before all was done; what was done is done.
    pub interrupted: bool,
}

impl Store {
    /// Removes what nothing needs. `live` says whether a view of this root, or of this earlier generation of it, is mounted anywhere;
    /// when in doubt: true.
    ///
    /// # Errors
    /// As the index and the file system fail; what was given up until then goes at the next open.
    pub fn gc(&mut self, live: &dyn Fn(&RootRow) -> bool, task: &Task) -> Result<GcReport, StoreError> {
        let before = self.free_bytes();
        let mut report = GcReport::default();
        self.drop_generations(live, &mut report)?;
        step("store.gc.marked");
        if !task.is_cancelled() {
            self.drop_images(&mut report)?;
        }
        if !task.is_cancelled() {
            self.drop_anchors(task, &mut report)?;
        }
        self.empty_graves()?;
        if !task.is_cancelled() {
            self.sweep_orphans(task, &mut report)?;
        }
        self.drop_mount_points();
        report.interrupted = task.is_cancelled();
        report.freed_on_disk = self.free_bytes().saturating_sub(before);
        Ok(report)
    }

    fn free_bytes(&self) -> i64 {
        let free = rustix::fs::fstatvfs(&self.fd).map_or(0, |s| s.f_bfree.saturating_mul(s.f_frsize));
        i64::try_from(free).unwrap_or(i64::MAX)
    }

    fn drop_generations(
        &self,
        live: &dyn Fn(&RootRow) -> bool,
        report: &mut GcReport,
    ) -> Result<(), StoreError> {
        let roots = self.roots()?;
        let mut earlier = Vec::new();
        self.index.read(|read| {
            read.each(GENERATIONS, |(id, generation), bytes| {
                let row: Generation = read.decoded(bytes)?;
                let root = roots.iter().find(|r| r.id.0 == id);
                // Without a root there is nobody to ask: kept, and told by `verify`.
                if let Some(root) = root.filter(|r| r.generation != generation) {
                    earlier.push(RootRow { generation, layers: row.layers, ..root.clone() });
                }
                Ok(())
            })
        })?;
        for then in earlier {
            if live(&then) || self.upper_has_writes(then.id, then.generation)? {
                report.generations_kept += 1;
                continue;
            }
            self.index.write(|txn| {
                txn.remove(GENERATIONS, (then.id.0, then.generation))?;
                txn.bury(&[Grave::Root { id: then.id, generation: Some(then.generation) }])
            })?;
            report.generations += 1;
        }
        Ok(())
    }

    fn drop_images(&self, report: &mut GcReport) -> Result<(), StoreError> {
        let mut needed: BTreeSet<ImageDigest> = self.roots()?.into_iter().flat_map(|r| r.layers).collect();
        let mut unneeded: Vec<(ImageDigest, u64)> = Vec::new();
        self.index.read(|read| {
            let generations: Vec<Generation> = read.rows(GENERATIONS)?;
            needed.extend(generations.into_iter().flat_map(|g| g.layers));
            read.each(IMAGES, |digest, bytes| {
                let digest = ImageDigest(*digest);
                let image: StoredImage = read.decoded(bytes)?;
                if needed.contains(&digest) {
                    report.images_kept += 1;
                } else if self.is_image_mounted(&digest) {
                    report.images_mounted += 1;
                } else {
                    unneeded.push((digest, image.bytes));
                }
                Ok(())
            })
        })?;
        if unneeded.is_empty() {
            return Ok(());
        }
        let graves: Vec<Grave> = unneeded.iter().map(|(digest, _)| Grave::Image(*digest)).collect();
        self.index.write(|txn| {
            for (digest, _) in &unneeded {
                txn.remove(IMAGES, &digest.0)?;
            }
            txn.bury(&graves)
        })?;
        step("store.grave.dug");
        report.images = unneeded.len() as u64;
        report.image_bytes = unneeded.iter().map(|(_, bytes)| bytes).sum();
        Ok(())
    }

    fn drop_anchors(&self, task: &Task, report: &mut GcReport) -> Result<(), StoreError> {
        let mut needed: HashSet<u64> = HashSet::new();
        let mut unneeded: Vec<(AnchorKey, AnchorRow)> = Vec::new();
        self.index.read(|read| {
            read.each(IMAGES, |_, bytes| {
                let image: StoredImage = read.decoded(bytes)?;
                let serials = image.serials().ok_or_else(|| StoreError::Damaged {
                    path: self.dir.clone(),
                    detail: "an image row with numbers beyond the last".to_owned(),
                })?;
                needed.extend(serials);
                Ok(())
            })?;
            read.each(GENERATIONS, |_, bytes| {
                let row: Generation = read.decoded(bytes)?;
                let Some(diff) = row.diff else { return Ok(()) };
                let serials = diff.serials().ok_or_else(|| StoreError::Damaged {
                    path: self.dir.clone(),
                    detail: "a generation's row with numbers beyond the last".to_owned(),
                })?;
                needed.extend(serials);
                Ok(())
            })?;
            read.each(ANCHORS, |key, bytes| {
                let row: AnchorRow = read.decoded(bytes)?;
                if needed.contains(&row.serial) {
                    report.anchors_kept += 1;
                } else {
                    unneeded.push((AnchorKey(*key), row));
                }
                Ok(())
            })
        })?;
        task.expect(unneeded.len() as u64);
        for batch in unneeded.chunks(BATCH) {
            if task.is_cancelled() {
                break;
            }
            self.index.write(|txn| {
                for (key, row) in batch {
                    txn.remove(ANCHORS, &key.0)?;
                    forget_hints(txn, key, row)?;
                }
                let graves: Vec<Grave> = batch
                    .iter()
                    .map(|(key, row)| Grave::Anchor {
                        domain: row.domain,
                        key: *key,
                        borrowed: row.borrowed.is_some(),
                    })
                    .collect();
                txn.bury(&graves)
            })?;
            step("store.grave.dug");
            self.empty_graves()?;
            report.anchors += batch.len() as u64;
            report.anchor_bytes += batch.iter().map(|(_, row)| row.size).sum::<u64>();
            task.did(batch.len() as u64);
        }
        Ok(())
    }

    /// Anchors that no row names: nothing is being built (`&mut self`), recovery found none by number, so they are left from a removal
    /// that failed. Their names are 64 hex digits in our own directory; nothing else is touched.
    fn sweep_orphans(&self, task: &Task, report: &mut GcReport) -> Result<(), StoreError> {
        let snapshot = self.snapshot()?;
        let domains: Vec<DomainRow> = snapshot.rows(DOMAINS)?;
        let (anchors, graves) = (snapshot.table(ANCHORS)?, snapshot.table(GRAVES)?);
        debug_assert!(graves.is_none_or(|g| redb::ReadableTableMetadata::is_empty(&g).unwrap_or(false)));
        for domain in domains {
            for first in 0..=u8::MAX {
                if task.is_cancelled() {
                    return Ok(());
                }
                let dir = format!("{}/{first:02x}", domain_name(domain.id));
                for name in self.names_in(&dir)? {
                    let Some(key) = anchor_of(first, &name) else { continue };
                    let named = match &anchors {
                        Some(table) => table
                            .get(&key.0)
                            .map_err(|e| super::index::of_redb(&self.dir, e.into()))?
                            .is_some(),
                        None => false,
                    };
                    if named {
                        continue;
                    }
                    let name = anchor_name(domain.id, &key);
                    match unlink_immutable(&self.fd, &name) {
                        Ok(()) => report.orphans += 1,
                        Err(Errno::NOENT) => {}
                        Err(e) => return Err(StoreError::io("remove", &self.dir.join(name), e)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether something is mounted where the image of that digest would be, or it can't be told.
    fn is_image_mounted(&self, digest: &ImageDigest) -> bool {
        let name = mount_name(digest);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let id = |name: &str| {
            let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
            Ok::<_, Errno>(fsid::mount_id(fd.as_fd()))
        };
        match (id(&name), id("mounts")) {
            (Err(Errno::NOENT), _) => false,
            (Ok(Some(here)), Ok(Some(above))) => here != above,
            _ => true,
        }
    }

    /// Mount points of images that are gone; busy ones stay.
    fn drop_mount_points(&self) {
        for name in self.names_in("mounts").unwrap_or_default() {
            let digest = std::str::from_utf8(&name).ok().and_then(ImageDigest::from_hex);
            let Some(digest) = digest else { continue };
            if !super::place::exists(&self.fd, &image_name(&digest)) {
                let _ = rustix::fs::unlinkat(&self.fd, mount_name(&digest), AtFlags::REMOVEDIR);
            }
        }
    }

    /// Names in a directory of the store, without `.` and `..`; none when it is not there.
    pub(super) fn names_in(&self, dir: &str) -> Result<Vec<Vec<u8>>, StoreError> {
        let io = |e: Errno| StoreError::io("list", &self.dir.join(dir), e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.fd, dir, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Vec::new()),
            Err(e) => return Err(io(e)),
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(fd).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(name.to_vec());
            }
        }
        Ok(names)
    }

    /// Generations that no root row goes with.
    pub(super) fn generations_without_root(&self) -> Result<Vec<(SealId, u64)>, StoreError> {
        let mut found = Vec::new();
        self.index.read(|read| {
            read.each(GENERATIONS, |(id, generation), _| {
                if read.get::<_, RootRow>(ROOTS, id)?.is_none() {
                    found.push((SealId(id), generation));
                }
                Ok(())
            })
        })?;
        Ok(found)
    }
}

fn mount_name(digest: &ImageDigest) -> String {
    format!("mounts/{digest}")
}

/// The key that a file named `name` in the directory `first` would have.
pub(super) fn anchor_of(first: u8, name: &[u8]) -> Option<AnchorKey> {
    AnchorKey::from_hex(&format!("{first:02x}{}", std::str::from_utf8(name).ok()?))
}
