//! Killed at every step of mount, umount and discard: what a view has written is there, and doing it again does it.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pagefold_fsadapters::sealed::mount::{MountOptions, discard_writes, mount_view, umount_view};
use pagefold_fsadapters::sealed::view_error::ViewError;
use pagefold_fsadapters::store::{OpenMode, STEPS, Store};
use pagefold_testfs::rig::RigFs;

mod view_support;
use view_support::snapshot::{differences, take};
use view_support::{Home, patiently, plain_root};

const CHILD: &str = "PAGEFOLD_TEST_VIEW_CHILD";

/// Not a test of its own: the process that is killed. Writes through the view, or discards.
#[test]
fn privileged_child() {
    let Ok(home) = std::env::var(CHILD) else { return };
    let home = PathBuf::from(home);
    let store = Store::open(&home.join(".pagefold"), OpenMode::Existing, "a test's child").unwrap();
    let row = store.find_root(home.join("a")).unwrap();
    mount_view(&store, &row, &home.join("view"), &MountOptions::default()).unwrap();
    fs::write(home.join("view/written by the child"), b"x").unwrap();
    umount_view(&store, &home.join("view")).unwrap();
    discard_writes(&store, &row).unwrap();
}

fn killed_at(home: &Path, step: &str) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "privileged_child", "--test-threads=1"]).env(CHILD, home);
    child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = child.env("PAGEFOLD_CRASH_AT", step).status().unwrap();
    assert_eq!(status.signal(), Some(9), "{step} was not passed: {status}");
}

#[test]
fn privileged_killed_at_any_step_and_done_again() {
    let mut home = Home::new(RigFs::Xfs);
    plain_root(&home.at("a"));
    let sealed = take(&home.at("a"));
    let row = home.seal(&home.store(), &["a"]).remove(0);
    fs::create_dir(home.at("view")).unwrap();
    let ours = |s: &&&str| ["mount.", "umount.", "discard."].iter().any(|p| s.starts_with(p));
    let steps: Vec<&str> = STEPS.iter().filter(ours).copied().collect();
    assert!(steps.len() >= 7);
    for step in steps {
        // Something that was written before and must be there after, unless it was being thrown away.
        let store = home.store();
        let view = home.mount(&store, &row, "view");
        fs::write(view.join("before"), step).unwrap();
        fs::write(view.join("dir/h"), step).unwrap();
        home.umount(&store, &view);
        drop(store);

        killed_at(home.rig.path(), step);

        let store = home.store();
        assert_eq!(
            differences(&sealed, &take(&home.at("a")), true),
            [""; 0],
            "{step}: the raw root has changed"
        );
        let mounted = home.try_mount(&store, &row, "view", &MountOptions::default());
        let was_attached = matches!(mounted, Err(ViewError::AlreadyView(_)));
        assert_eq!(was_attached, step == "mount.attached", "{step}: {mounted:?}");
        assert!(was_attached || mounted.is_ok(), "{step}: {mounted:?}");
        if step.starts_with("discard.") {
            // Begun: some of it may be gone, the rest is whole.
            let left = fs::read(view.join("before"));
            assert!(left.is_err() || left.unwrap() == step.as_bytes());
        } else {
            assert_eq!(fs::read(view.join("before")).unwrap(), step.as_bytes());
            assert_eq!(fs::read(view.join("dir/h")).unwrap(), step.as_bytes());
        }
        home.umount(&store, &view);
        patiently(|| discard_writes(&store, &row), |r| matches!(r, Err(ViewError::Live { .. }))).unwrap();
        let view = home.mount(&store, &row, "view");
        assert_eq!(differences(&sealed, &take(&view), true), [""; 0], "{step}");
        home.umount(&store, &view);
        assert_eq!(
            fs::read_dir(store.dir().join("mounts")).unwrap().count(),
            0,
            "{step}: an image was left mounted"
        );
    }
}
