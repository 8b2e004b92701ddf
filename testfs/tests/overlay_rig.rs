//! Real inodes behind real overlay mounts on real XFS, btrfs and ext4.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_fsadapters::fsid;
use pagefold_fsadapters::overlay::{NoLayers, OverlayFs, RealFile};
use pagefold_fsadapters::source::InodeId;
use pagefold_sys::cache;
use pagefold_testfs::rig::{LoopRig, RigFs};

/// An overlay mount that goes with the value.
struct Overlay(PathBuf);

impl Overlay {
    /// Mounts in directory `name` of `home`, the layers given relative to `home`. With `relative` the kernel shows relative
    /// paths, as it does for container runtimes.
    fn mount(home: &Path, name: &str, lower: &str, relative: bool, extra: &str) -> Overlay {
        let [at, up, wk] = ["at", "up", "wk"].map(|kind| format!("{name}-{kind}"));
        for dir in [&at, &up, &wk] {
            fs::create_dir_all(home.join(dir)).unwrap();
        }
        let prefix = if relative { String::new() } else { format!("{}/", home.display()) };
        let lower: Vec<String> = lower.split(':').map(|l| format!("{prefix}{l}")).collect();
        let options =
            format!("lowerdir={},upperdir={prefix}{up},workdir={prefix}{wk}{extra}", lower.join(":"));
        let mut mount = Command::new("mount");
        mount.current_dir(home).args(["-t", "overlay", "overlay", "-o", &options]).arg(home.join(&at));
        assert!(mount.status().expect("this test needs root and mount(8)").success(), "{options}");
        Overlay(home.join(at))
    }

    fn open(&self, file: &str) -> File {
        File::open(self.0.join(file)).unwrap()
    }

    fn fs(&self) -> OverlayFs {
        fsid::describe(File::open(&self.0).unwrap().as_fd()).unwrap().overlay.expect("is an overlay")
    }

    fn real(&self, file: &str) -> RealFile {
        self.fs().real_file(self.open(file).as_fd()).unwrap()
    }

    fn real_inode(&self, file: &str) -> InodeId {
        match self.real(file) {
            RealFile::Open(fd) => inode(&File::from(fd)),
            RealFile::Named(_) => panic!("{file}: no real inode found"),
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn inode(file: &File) -> InodeId {
    let meta = file.metadata().unwrap();
    InodeId { dev: meta.dev(), ino: meta.ino() }
}

fn raw_inode(path: PathBuf) -> InodeId {
    inode(&File::open(path).unwrap())
}

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 512 << 20).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn layer(home: &Path, name: &str) {
    fs::create_dir_all(home.join(name).join("dir")).unwrap();
    for file in ["f", "g", "dir/h"] {
        fs::write(home.join(name).join(file), vec![b'x'; 100_000]).unwrap();
    }
}

#[test]
fn privileged_two_overlays_over_one_lower_are_one_inode_and_a_copy_up_is_another() {
    for fs in [RigFs::Xfs, RigFs::Btrfs, RigFs::Ext4] {
        for relative in [false, true] {
            let rig = rig(fs);
            let home = rig.path();
            layer(home, "low");
            let one = Overlay::mount(home, "one", "low", relative, "");
            let two = Overlay::mount(home, "two", "low", false, "");
            for file in ["f", "g", "dir/h"] {
                let raw = raw_inode(home.join("low").join(file));
                assert_eq!(one.real_inode(file), raw, "{fs:?} {file}");
                assert_eq!(two.real_inode(file), raw, "{fs:?} {file}");
            }
            // Both copied up within one clock tick, most likely: still two inodes, neither the lower one.
            for overlay in [&one, &two] {
                for file in ["f", "dir/h"] {
                    File::options().append(true).open(overlay.0.join(file)).unwrap().write_all(b"y").unwrap();
                }
                fs::write(overlay.0.join("born"), b"new").unwrap();
                // Same size and content as before: only the inode is another.
                fs::set_permissions(
                    overlay.0.join("g"),
                    fs::metadata(overlay.0.join("g")).unwrap().permissions(),
                )
                .unwrap();
            }
            // Until it is written out a file's blocks may change between two looks at it, and then nothing is claimed.
            rustix::fs::syncfs(File::open(home).unwrap()).unwrap();
            for file in ["f", "dir/h", "g", "born"] {
                assert_eq!(two.real_inode(file), raw_inode(home.join("two-up").join(file)), "{fs:?} {file}");
                // A relative upper can't be opened: then a born file has a handle, a copied-up one only a name.
                match (relative && file != "born", one.real(file)) {
                    (false, RealFile::Open(fd)) => {
                        assert_eq!(
                            inode(&fd.into()),
                            raw_inode(home.join("one-up").join(file)),
                            "{fs:?} {file}"
                        );
                    }
                    (true, RealFile::Named(name)) => {
                        assert_ne!(name, two.real_inode(file), "{fs:?} {file}");
                    }
                    (_, other) => panic!("{fs:?} {file} relative={relative}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn privileged_cache_is_seen_on_the_real_inode_only() {
    let rig = rig(RigFs::Xfs);
    layer(rig.path(), "low");
    let overlay = Overlay::mount(rig.path(), "one", "low", false, "");
    fs::read(overlay.0.join("f")).unwrap();
    let seen = overlay.open("f");
    assert_eq!(cache::cachestat(seen.as_fd(), 0, 0).unwrap().nr_cache, 0, "the kernel's own lie has changed");
    let RealFile::Open(real) = overlay.real("f") else { panic!("no real inode") };
    assert_eq!(cache::cachestat(real.as_fd(), 0, 0).unwrap().nr_cache, 25);
    // mincore looks through.
    let mut runs = Vec::new();
    cache::mincore(seen.as_fd(), 100_000, |first, pages| runs.push((first, pages))).unwrap();
    assert_eq!(runs, [(0, 25)]);
}

#[test]
fn privileged_layers_on_two_file_systems_have_no_physical_identity() {
    let (first, second) = (rig(RigFs::Xfs), rig(RigFs::Xfs));
    layer(first.path(), "low");
    fs::create_dir(first.path().join("mnt")).unwrap();
    layer(second.path(), "low");
    let options = format!("lowerdir={}/low:{}/low", first.path().display(), second.path().display());
    let at = first.path().join("mnt");
    let mount = Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&at).status();
    assert!(mount.unwrap().success());
    let overlay = Overlay(at);
    let facts = fsid::describe(File::open(&overlay.0).unwrap().as_fd()).unwrap();
    assert!(!facts.description.physical_identity);
    assert_eq!(facts.overlay.unwrap().layers().unwrap_err(), NoLayers::SeveralFs);
    assert!(matches!(overlay.real("f"), RealFile::Named(_)));
}

#[test]
fn privileged_metacopy_is_not_believed() {
    let rig = rig(RigFs::Xfs);
    layer(rig.path(), "low");
    let overlay = Overlay::mount(rig.path(), "one", "low", false, ",metacopy=on");
    let facts = fsid::describe(File::open(&overlay.0).unwrap().as_fd()).unwrap();
    assert!(!facts.description.physical_identity);
    assert_eq!(facts.overlay.unwrap().layers().unwrap_err(), NoLayers::Metacopy);
}

#[test]
fn privileged_physical_identity_is_that_of_the_layers() {
    let rig = rig(RigFs::Btrfs);
    layer(rig.path(), "low");
    let overlay = Overlay::mount(rig.path(), "one", "low", false, "");
    let raw = fsid::describe(File::open(rig.path()).unwrap().as_fd()).unwrap().description;
    let seen = fsid::describe(File::open(&overlay.0).unwrap().as_fd()).unwrap().description;
    assert_eq!((raw.uuid, raw.instance), (seen.uuid, seen.instance));
    assert!(raw.physical_identity && seen.physical_identity);
    assert_eq!((raw.kind.as_str(), seen.kind.as_str()), ("btrfs", "overlay"));
}
