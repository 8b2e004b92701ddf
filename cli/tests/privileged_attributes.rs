//! Attributes that the kernel itself does not give, and inode flags: sealed, shown, committed, or refused by name.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::view::{ViewRig, done, fails, must};
use common::{noise, start_written, sync};
use pagefold_testfs::rig::RigFs;
use rustix::fs::{IFlags, XattrFlags};
use rustix::io::Errno;

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{path:?} {name}: {e}"));
}

/// What reading the capabilities of a program says.
fn capability(path: &Path) -> Result<usize, Errno> {
    rustix::fs::getxattr(path, "security.capability", &mut [0; 64][..])
}

/// `setcap ""` by hand: the attribute is there and holds nothing, reading it is an error, and so is starting the program.
#[test]
fn privileged_empty_capabilities_are_sealed_shown_committed_and_exported() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = ViewRig::new(fs);
        let root = rig.make_dir("root");
        fs::copy("/bin/true", root.join("program")).expect("a program");
        fs::write(root.join("other"), noise(1, 9000)).expect("room on the rig");
        set(&root.join("program"), "security.capability", b"");
        sync(&root);
        assert_eq!(capability(&root.join("program")), Err(Errno::INVAL), "the test shows nothing");
        let view = rig.views(&["root"]).remove(0);
        assert_eq!(capability(&view.join("program")), Err(Errno::INVAL), "{fs:?}");
        assert_eq!(
            fs::read(view.join("program")).expect("readable"),
            fs::read("/bin/true").expect("readable")
        );
        let status = |at: &Path| start_written(|| Command::new(at.join("program")).status());
        let started = |at: &Path| status(at).map_err(|e| e.raw_os_error());
        assert_eq!(started(&view).is_ok(), started(&root).is_ok(), "{fs:?}");
        fs::write(view.join("other"), "written").expect("room on the rig");
        fs::rename(view.join("other"), view.join("moved")).expect("one view");
        fs::write(view.join("new"), "new").expect("room on the rig");
        set(&view.join("new"), "security.capability", b"");
        done(&["umount".as_ref(), view.as_os_str()]);
        done(&["export".as_ref(), root.as_os_str(), rig.path("copy").as_os_str()]);
        done(&["commit".as_ref(), root.as_os_str()]);
        for at in [&root, &rig.path("copy")] {
            assert_eq!(capability(&at.join("program")), Err(Errno::INVAL), "{fs:?}: {at:?}");
            assert_eq!(capability(&at.join("new")), Err(Errno::INVAL), "{fs:?}: {at:?}");
            assert_eq!(fs::read(at.join("moved")).expect("readable"), b"written");
        }
    }
}

/// ACLs as no kernel writes them, by the name that XFS has for them on disk.
#[test]
fn privileged_an_acl_that_can_not_be_read_is_named_and_an_empty_one_is_none() {
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.make_dir("root");
    rig.make_dir("root/dir");
    fs::write(root.join("file"), noise(1, 9000)).expect("room on the rig");
    set(&rig.path("root/dir"), "trusted.SGI_ACL_DEFAULT", &[0; 4]);
    // Not even the raw directory takes a file.
    assert!(fs::write(root.join("dir/made"), "made").is_err(), "the test shows nothing");
    let view = rig.views(&["root"]).remove(0);
    fs::write(view.join("made"), "made").expect("room on the rig");
    fs::set_permissions(view.join("dir"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("ours");
    done(&["umount".as_ref(), "--commit".as_ref(), view.as_os_str()]);
    assert_eq!(fs::read(root.join("made")).expect("committed"), b"made");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(root.join("dir")).expect("there").permissions(),
    );
    assert_eq!(mode & 0o7777, 0o700);

    set(&root.join("file"), "trusted.SGI_ACL_FILE", &[0]);
    let told = fails(2, &["seal".as_ref(), root.as_os_str()]);
    for word in ["\"file\"", "system.posix_acl_access", "setfattr -x"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    rustix::fs::removexattr(root.join("file"), "trusted.SGI_ACL_FILE").expect("it is there");
    done(&["seal".as_ref(), root.as_os_str()]);
}

fn flags(path: &Path) -> IFlags {
    rustix::fs::ioctl_getflags(fs::File::open(path).expect("opens")).expect("flags")
}

#[test]
fn privileged_inode_flags_of_files_that_a_commit_replaces_stay() {
    for (fs, files) in [
        (RigFs::Xfs, &[("dump", "+dA"), ("plain", "+")][..]),
        (RigFs::Btrfs, &[("dump", "+dA"), ("plain", "+"), ("nocow", "+C"), ("packed", "+c")]),
    ] {
        let rig = ViewRig::new(fs);
        let root = rig.make_dir("root");
        for (seed, (name, change)) in files.iter().enumerate() {
            let path = root.join(name);
            fs::write(&path, "").expect("room on the rig");
            if change.len() > 1 {
                must(Command::new("chattr").arg(change).arg(&path));
            }
            fs::write(&path, noise(seed as u64, 300_000)).expect("room on the rig");
            fs::copy(&path, root.join(format!("{name} mode"))).expect("room on the rig");
            if change.len() > 1 {
                must(
                    Command::new("chattr")
                        .arg(change.replace('C', "d"))
                        .arg(root.join(format!("{name} mode"))),
                );
            }
        }
        sync(&root);
        let before: Vec<IFlags> = files.iter().map(|(name, _)| flags(&root.join(name))).collect();
        let modes: Vec<IFlags> =
            files.iter().map(|(name, _)| flags(&root.join(format!("{name} mode")))).collect();
        let view = rig.views(&["root"]).remove(0);
        for (name, _) in files {
            common::overwrite_page(&view.join(name), 3, 77);
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(view.join(format!("{name} mode")), mode).expect("ours");
        }
        let wanted: Vec<Vec<u8>> =
            files.iter().map(|(n, _)| fs::read(view.join(n)).expect("readable")).collect();
        done(&["umount".as_ref(), "--commit".as_ref(), view.as_os_str()]);
        for (((name, _), bytes), (file, mode)) in files.iter().zip(wanted).zip(before.iter().zip(&modes)) {
            assert_eq!(flags(&root.join(name)), *file, "{fs:?} {name}");
            assert_eq!(flags(&root.join(format!("{name} mode"))), *mode, "{fs:?} {name}, its mode only");
            assert!(fs::read(root.join(name)).expect("readable") == bytes, "{fs:?} {name}");
        }
        // And it can be sealed and mounted again.
        done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
        done(&["umount".as_ref(), view.as_os_str()]);
    }
}
