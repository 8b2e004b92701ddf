//! Views are mounted and unmounted.
//!
//! ```text
//! raw root opened -> who uses it? -> images verified, mounted once -> overlay assembled (detached)     all views of one call
//! rows published by one commit -> each overlay moved to its target
//! ```
//!
//! Everything that can fail comes before the commit, but the last move; a crash between leaves a row without a mount, which
//! `mount --all` and the next boot bring back. Invariants: a view has the mount flags of its root's own mount (a view of a nosuid
//! root would otherwise run its setuid files); an upper is mounted once; a damaged image never reaches the kernel. What it
//! deliberately does not do: judge whether the raw root changed as a whole (`status` does); remount.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, move_mount};

use super::assemble::{Handover, Layers, SOURCE, overlay, overlay_with};
use super::commit::{self, Past};
use super::diff::{self, Layer};
use super::idmap::{IdMaps, Mapped};
use super::live::{ProbeError, UpperState, probe};
use super::opened::journal_of;
use super::raw::open_named_root;
use super::unmount::{holders, settled_state, unmount_at};
use super::upper::{self, Discarded, UPPER, WORK};
use super::users::{self, Watched};
use super::view_error::{Busy, ViewError, failed};
use super::{image_mount, tree::EntryId};
use crate::fsid;
use crate::mountinfo::{self, Mount};
use crate::store::manifest::read_manifest;
use crate::store::step;
use crate::store::{ImageDigest, RootRow, SealId, Store, ViewRow};

/// Where images are mounted, below the store.
const MOUNTS: &str = "mounts";

/// How views are mounted.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// Read-only.
    pub read_only: bool,
    /// Owners are shown through this map.
    pub id_map: Option<IdMaps>,
    /// Although processes use the raw root.
    pub force: bool,
    /// Only this way of handing layers to the kernel; for tests.
    pub handover: Option<Handover>,
}

/// A view that was mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Its root.
    pub root: SealId,
    /// The root's name.
    pub name: String,
    /// Where.
    pub target: PathBuf,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A view that was unmounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmounted {
    /// Its root; `None` for a view that the index doesn't know.
    pub root: Option<SealId>,
    /// Where it was.
    pub target: PathBuf,
    /// Whether anything was mounted there; without, only the row was removed.
    pub was_mounted: bool,
    /// Whether somebody still holds the view: then nothing may be committed or discarded.
    pub state: Option<UpperState>,
    /// Who, as far as it could be found out.
    pub holders: Vec<String>,
}

/// Mounts the view of `row` at `target`.
///
/// # Errors
/// [`ViewError`].
pub fn mount_view(
    store: &Store,
    row: &RootRow,
    target: &Path,
    options: &MountOptions,
) -> Result<Mounted, ViewError> {
    let request = [(row.clone(), target.to_path_buf())];
    let mut results = mount_views(store, &request, options);
    results.pop().unwrap_or(Err(ViewError::NotADirectory(target.into())))
}

/// Mounts many views: one look at the mounts, one pass over the processes, one commit. One result a request, in order.
pub fn mount_views(
    store: &Store,
    requests: &[(RootRow, PathBuf)],
    options: &MountOptions,
) -> Vec<Result<Mounted, ViewError>> {
    let mut all = Requests::new(store, requests, options);
    all.each(Requests::open);
    all.refuse_twice();
    all.refuse_used();
    all.open_layers();
    all.each(Requests::assemble);
    step("mount.assembled");
    all.publish();
    step("mount.published");
    all.each(Requests::attach);
    all.forget_failed();
    all.finish()
}

/// One view on its way.
struct Request<'a> {
    row: &'a RootRow,
    target: PathBuf,
    target_dir: Option<OwnedFd>,
    raw: Option<OwnedFd>,
    layer: Option<Layer>,
    overlay: Option<OwnedFd>,
    published: bool,
    warnings: Vec<String>,
    error: Option<ViewError>,
}

struct Requests<'a> {
    store: &'a Store,
    options: &'a MountOptions,
    mounts: Vec<Mount>,
    list: Vec<Request<'a>>,
}

impl<'a> Requests<'a> {
    fn new(store: &'a Store, requests: &'a [(RootRow, PathBuf)], options: &'a MountOptions) -> Self {
        let request = |(row, target): &'a (RootRow, PathBuf)| Request {
            row,
            target: target.clone(),
            target_dir: None,
            raw: None,
            layer: None,
            overlay: None,
            published: false,
            warnings: Vec::new(),
            error: None,
        };
        let list = requests.iter().map(request).collect();
        Requests { store, options, mounts: mountinfo::read().unwrap_or_default(), list }
    }

    /// Takes one step with every request that has not failed.
    fn each(&mut self, step: impl Fn(&Self, &mut Request<'a>) -> Result<(), ViewError>) {
        let mut list = std::mem::take(&mut self.list);
        for request in list.iter_mut().filter(|r| r.error.is_none()) {
            request.error = step(self, request).err();
        }
        self.list = list;
    }

    /// The target and the raw root.
    fn open(&self, request: &mut Request<'a>) -> Result<(), ViewError> {
        let (dir, target) = open_target(&request.target)?;
        request.target = target;
        if request.target.starts_with(self.store.dir()) {
            return Err(ViewError::InsideStore(request.target.clone()));
        }
        if self.store.dir().starts_with(&request.target) {
            return Err(ViewError::HidesStore(request.target.clone()));
        }
        if fsid::is_overlay(dir.as_fd()) == Some(true) && view_at(&self.mounts, &request.target).is_some() {
            return Err(ViewError::AlreadyView(request.target.clone()));
        }
        if let Some(view) = self.store.view(request.row.id)?
            && view_at(&self.mounts, &view.target).is_some()
        {
            return Err(ViewError::AlreadyMounted { name: request.row.name.clone(), target: view.target });
        }
        let raw = open_named_root(request.row, &self.mounts)?;
        request.warnings.extend(self.check_file_system(request.row, raw.as_fd())?);
        let stat = rustix::fs::fstat(&raw).map_err(failed("look at", &request.row.path))?;
        if stat.st_ctime > request.row.sealed_at {
            request.warnings.push(format!(
                "{:?} has changed since it was sealed; its view shows it as it was then (`pagefold status` tells what changed)",
                request.row.path
            ));
        }
        request.target_dir = Some(dir);
        request.raw = Some(raw);
        Ok(())
    }

    fn check_file_system(&self, row: &RootRow, raw: BorrowedFd<'_>) -> Result<Option<String>, ViewError> {
        let facts = |fd| fsid::describe(fd).map(|facts| facts.description).ok();
        let (root, store) = (facts(raw), facts(self.store.dirfd()));
        if root.as_ref().map(|f| f.uuid) != store.map(|f| f.uuid) {
            return Err(ViewError::OtherFileSystem(row.path.clone()));
        }
        Ok(root.filter(|f| f.kind == "btrfs" && has_btrfs_quota(f.uuid)).map(|_| {
            format!(
                "btrfs counts what the view of {:?} writes to the store's subvolume, not to the root's quota group",
                row.name
            )
        }))
    }

    /// Within one call nothing is mounted yet that could be seen.
    fn refuse_twice(&mut self) {
        let (mut targets, mut roots) = (HashSet::new(), HashSet::new());
        for request in self.list.iter_mut().filter(|r| r.error.is_none()) {
            if !targets.insert(request.target.clone()) {
                request.error = Some(ViewError::AlreadyView(request.target.clone()));
            } else if !roots.insert(request.row.id) {
                let (name, target) = (request.row.name.clone(), request.target.clone());
                request.error = Some(ViewError::AlreadyMounted { name, target });
            }
        }
    }

    /// One truth at a time: who writes the raw root would not be seen by the view.
    fn refuse_used(&mut self) {
        if self.options.force {
            return;
        }
        let mut trees = Vec::new();
        let mut whose = Vec::new();
        for (index, request) in self.list.iter().enumerate() {
            let Some(raw) = request.raw.as_ref().filter(|_| request.error.is_none()) else { continue };
            let Ok(stat) = rustix::fs::fstat(raw) else { continue };
            let path = request.row.path.clone();
            trees.push(Watched { path, dev: stat.st_dev, ino: stat.st_ino, whole_device: false });
            whose.push(index);
        }
        let found = {
            let inodes = |tree: usize| self.sealed_inodes(self.list[whose[tree]].row);
            users::find(&trees, &inodes)
        };
        match found {
            Ok(found) => {
                for user in found {
                    let request = &mut self.list[whose[user.tree]];
                    request.error.get_or_insert_with(|| ViewError::InUse {
                        path: request.row.path.clone(),
                        users: Vec::new(),
                    });
                    if let Some(ViewError::InUse { users, .. }) = &mut request.error {
                        users.push(user);
                    }
                }
            }
            Err(error) => {
                for index in whose {
                    self.list[index].error = Some(ViewError::NoProcesses(error.to_string()));
                }
            }
        }
    }

    fn sealed_inodes(&self, row: &RootRow) -> Option<HashSet<u64>> {
        let tree = read_manifest(&self.store.root_dir(row.id, row.generation)).ok()?;
        Some(tree.inodes.iter().map(|i| i.raw.ino).collect())
    }

    /// Comparing layers with what they must be takes some milliseconds each: all processors share it.
    fn open_layers(&mut self) {
        let store = self.store;
        let open = |request: &mut Request<'a>| match diff::of_root(store, request.row) {
            Ok(layer) => request.layer = layer,
            Err(error) => request.error = Some(error),
        };
        let mut wanted: Vec<_> = self.list.iter_mut().filter(|r| r.error.is_none()).collect();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if wanted.len() < 2 || threads < 2 {
            return wanted.into_iter().for_each(open);
        }
        let each = wanted.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for part in wanted.chunks_mut(each) {
                scope.spawn(|| part.iter_mut().for_each(|request| open(request)));
            }
        });
    }

    fn assemble(&self, request: &mut Request<'a>) -> Result<(), ViewError> {
        let Some(raw) = request.raw.as_ref() else { return Ok(()) };
        let mut attributes = inherited(raw.as_fd(), &request.row.path)?;
        if self.options.read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let layer = request.layer.take();
        request.overlay = Some(assemble(self.store, request.row, layer, attributes, self.options)?);
        Ok(())
    }

    /// One commit: 64 of them would cost more than 64 mounts.
    fn publish(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let id_map = self.options.id_map.as_ref().map(ToString::to_string).unwrap_or_default();
        let mut rows = Vec::new();
        for request in self.list.iter_mut().filter(|r| r.error.is_none()) {
            request.published = true;
            rows.push(ViewRow {
                root: request.row.id,
                target: request.target.clone(),
                read_only: self.options.read_only,
                idmap: id_map.clone(),
                mounted_at: now,
            });
        }
        if let Err(error) = self.store.put_views(&rows) {
            let text = error.to_string();
            for request in self.list.iter_mut().filter(|r| r.published) {
                request.published = false;
                request.error = Some(ViewError::Index(text.clone()));
            }
        }
    }

    fn attach(&self, request: &mut Request<'a>) -> Result<(), ViewError> {
        let (Some(overlay), Some(dir)) = (request.overlay.take(), request.target_dir.take()) else {
            return Ok(());
        };
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&overlay, c"", &dir, c"", flags).map_err(failed("mount the view at", &request.target))?;
        step("mount.attached");
        Ok(())
    }

    fn forget_failed(&mut self) {
        let failed = self.list.iter().filter(|r| r.published && r.error.is_some());
        for request in failed {
            // Should this fail too: a row without a mount, which `mount --all` takes up.
            let _ = self.store.remove_view(request.row.id);
        }
    }

    fn finish(self) -> Vec<Result<Mounted, ViewError>> {
        let done = |r: Request<'_>| match r.error {
            Some(error) => Err(error),
            None => Ok(Mounted {
                root: r.row.id,
                name: r.row.name.clone(),
                target: r.target,
                warnings: r.warnings,
            }),
        };
        self.list.into_iter().map(done).collect()
    }
}

/// Whether quotas are on (Linux 5.9 shows their groups in sysfs).
fn has_btrfs_quota(uuid: [u8; 16]) -> bool {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Path::new("/sys/fs/btrfs").join(parts.join("-")).join("qgroups").exists()
}

/// The target as a directory, without a view that is mounted there already.
fn open_target(target: &Path) -> Result<(OwnedFd, PathBuf), ViewError> {
    let path = target.canonicalize().map_err(|e| match e.raw_os_error() {
        Some(code) if Errno::from_raw_os_error(code) == Errno::NOENT => {
            ViewError::NotADirectory(target.into())
        }
        Some(code) => failed("find", target)(Errno::from_raw_os_error(code)),
        None => ViewError::NotADirectory(target.into()),
    })?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(_path_only) => {}
        Err(Errno::NOTDIR) => return Err(ViewError::NotADirectory(path)),
        Err(e) => return Err(failed("open", &path)(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("open", &path))?;
    Ok((dir, path))
}

/// The view mounted at `target`, if the topmost mount there is one.
#[must_use]
pub fn view_at<'m>(mounts: &'m [Mount], target: &Path) -> Option<&'m Mount> {
    let top = mounts.iter().rev().find(|m| m.mount_point == target)?;
    (top.kind == "overlay" && top.source == SOURCE).then_some(top)
}

/// The store of the view mounted at `target`: from the path of its upper (`<store>/roots/<id>/g<n>/upper`), or, where the kernel
/// doesn't tell that (id-mapped layers, kernels before 6.13), the default one of the file system below the view.
#[must_use]
pub fn store_of(target: &Path) -> Option<PathBuf> {
    let target = target.canonicalize().ok()?;
    let mounts = mountinfo::read().ok()?;
    let options = &view_at(&mounts, &target)?.fs_options;
    let upper = options.split(|b| *b == b',').find_map(|o| o.strip_prefix(b"upperdir="))?;
    let upper = PathBuf::from(mountinfo::unescape(upper));
    let told = upper.ancestors().nth(4).filter(|s| s.join("roots").is_dir() && !s.starts_with("/proc"));
    told.map(Path::to_path_buf).or_else(|| Store::default_dir(target.parent()?).ok())
}

/// What the mount of the raw root forbids, its view forbids.
fn inherited(raw: BorrowedFd<'_>, path: &Path) -> Result<MountAttrFlags, ViewError> {
    /// `ST_NOSYMFOLLOW` (Linux 5.10), which `statvfs` has no name for.
    const NOSYMFOLLOW: u64 = 0x2000;
    let found = rustix::fs::fstatvfs(raw).map_err(failed("look at the mount of", path))?.f_flag;
    let pairs = [
        (StatVfsMountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (StatVfsMountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (StatVfsMountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (StatVfsMountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (StatVfsMountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (StatVfsMountFlags::from_bits_retain(NOSYMFOLLOW), MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    Ok(pairs
        .into_iter()
        .filter(|(seen, _)| found.contains(*seen))
        .fold(MountAttrFlags::empty(), |all, (_, set)| all | set))
}

/// The overlay of a root, not attached. `layer` is what [`diff::of_root`] gave.
fn assemble(
    store: &Store,
    row: &RootRow,
    layer: Option<Layer>,
    attributes: MountAttrFlags,
    options: &MountOptions,
) -> Result<OwnedFd, ViewError> {
    let mounts = store.dir().join(MOUNTS);
    let root_dir = store.root_dir(row.id, row.generation);
    finish_discard(store, row)?;
    let open = |path: &Path| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))
    };
    let mut images = Vec::new();
    let diff = layer.as_ref().map(|(digest, _)| *digest);
    images.extend(layer.map(|(_, dir)| dir));
    for digest in &row.layers {
        images.push(image_mount::mounted(&mounts, &store.image_path(digest), *digest)?);
    }
    let data = store.data_layer(row.domain)?;
    let upper = open(&root_dir.join(UPPER))?;
    if !upper::belongs_to(upper.as_fd(), &row.layers, diff).map_err(failed("read the mark of", &root_dir))? {
        return Err(ViewError::ForeignUpper { name: row.name.clone(), upper: root_dir.join(UPPER) });
    }
    let make = |layers: &Layers| match options.handover {
        Some(handover) => overlay_with(layers, attributes, handover),
        None => overlay(layers, attributes),
    };
    let result = match &options.id_map {
        None => {
            let work = open(&root_dir.join(WORK))?;
            make(&Layers { upper, work, images, data: Some(data), mounts: Vec::new() })
        }
        Some(maps) => {
            let layers = Mapped::new(maps)?.layers(&open(&root_dir)?, &images, &data)?;
            maps.as_their_root(|| make(&layers))?
        }
    };
    result.map_err(|refused| match refused.errno {
        Errno::BUSY => ViewError::Live { name: row.name.clone() },
        Errno::STALE => ViewError::ForeignUpper { name: row.name.clone(), upper: root_dir.join(UPPER) },
        _ => ViewError::Refused { name: row.name.clone(), source: refused },
    })
}

/// Unmounts the view at `target` and forgets it; what it wrote stays in its upper. Of the views of one image the last one takes
/// the image's mount along.
///
/// # Errors
/// [`ViewError::Busy`] says who holds it; [`ViewError::NotAView`].
pub fn umount_view(store: &Store, target: &Path) -> Result<Unmounted, ViewError> {
    let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
    let rows = store.views()?;
    let row = rows.iter().find(|v| v.target == target);
    let mounts = mountinfo::read().map_err(|e| ViewError::NoProcesses(e.to_string()))?;
    let mounted = view_at(&mounts, &target).is_some();
    let is_covered = |m: &Mount| m.mount_point == target && m.kind == "overlay" && m.source == SOURCE;
    if !mounted && mounts.iter().any(is_covered) {
        let mounts = vec![target.clone()];
        return Err(ViewError::Busy(Busy { target, users: Vec::new(), mounts }));
    }
    if !mounted && row.is_none() {
        return Err(ViewError::NotAView(target));
    }
    let device = if mounted { Some(unmount_at(&target, &mounts)?) } else { None };
    step("umount.unmounted");
    let mut done = Unmounted { root: None, target, was_mounted: mounted, state: None, holders: Vec::new() };
    if let Some(row) = row {
        store.remove_view(row.root)?;
        step("umount.forgotten");
        done.root = Some(row.root);
        let root = store.root(row.root)?;
        let state = settled_state(store, &root)?;
        if let (UpperState::Live, Some(device)) = (state, device) {
            done.holders = holders(&device);
        }
        done.state = Some(state);
        release_images(store)?;
    }
    Ok(done)
}

/// The view of `row`, read-only and attached nowhere: what commit and export read. While the descriptor is held nobody can mount the
/// view. [`release_images`] comes after it.
///
/// # Errors
/// [`ViewError::Live`] when it is mounted anywhere; else as mounting fails.
pub(super) fn detached_view(store: &Store, row: &RootRow) -> Result<OwnedFd, ViewError> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    assemble(store, row, diff::of_root(store, row)?, attributes, &MountOptions::default())
}

/// Unmounts the images that no view in the index uses: those of the view that has just gone, and what a crash left.
pub(super) fn release_images(store: &Store) -> Result<(), ViewError> {
    let mut used: BTreeSet<ImageDigest> = BTreeSet::new();
    for view in store.views()? {
        used.extend(store.root(view.root)?.layers);
    }
    let mounts = store.dir().join(MOUNTS);
    let names = std::fs::read_dir(&mounts).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let digests = names.filter_map(|name| ImageDigest::from_hex(name.to_str()?));
    for digest in digests.filter(|digest| !used.contains(digest)) {
        image_mount::unmounted(&mounts, digest)?;
    }
    Ok(())
}

/// Whether a view of `row` is live anywhere: here, in another mount namespace, held by an open file.
///
/// # Errors
/// [`ProbeError`]; then it must be taken for live.
pub fn probe_upper(store: &Store, row: &RootRow) -> Result<UpperState, ProbeError> {
    probe(&store.root_dir(row.id, row.generation), &store.dir().join(MOUNTS))
}

/// Throws away what the view of `row` wrote.
///
/// # Errors
/// [`ViewError::Live`] when the upper is in use; else as removing fails.
pub fn discard_writes(store: &Store, row: &RootRow) -> Result<Discarded, ViewError> {
    if probe_upper(store, row)? == UpperState::Live {
        return Err(ViewError::Live { name: row.name.clone() });
    }
    let root_dir = store.root_dir(row.id, row.generation);
    let tree = read_manifest(&root_dir).map_err(|e| ViewError::Index(e.to_string()))?;
    let done = upper::discard(&root_dir, &tree.inode(EntryId(0)).meta)?;
    let past = commit::past(&journal_of(store, row, row.generation));
    Ok(Discarded { half_committed: !matches!(past, Ok(Past::None | Past::Done)), ..done })
}

/// Ends a discard that was interrupted. Until then nobody can have mounted the upper.
pub(super) fn finish_discard(store: &Store, row: &RootRow) -> Result<(), ViewError> {
    if upper::is_half_discarded(&store.root_dir(row.id, row.generation)) {
        discard_writes(store, row)?;
    }
    Ok(())
}
