//! A view is a root file system for chroot, systemd-nspawn, runc and podman: each starts a container in it, which reads what was
//! sealed and writes; the raw root and the other view don't see the write.

mod common;

use std::path::Path;
use std::process::Command;

use common::view::{ViewRig, done, install_busybox, must, with_cgroups};
use pagefold_testfs::rig::RigFs;

/// What every container does.
const WORK: &str =
    "read word < /etc/sealed && echo got $word && echo changed > /etc/sealed && echo made > /root/new";

/// Two views of two clones; `start` runs [`WORK`] in the first.
fn in_a_view_of(fs: RigFs, start: impl Fn(&ViewRig, &Path)) {
    let rig = ViewRig::new(fs);
    let root = rig.make_dir("one");
    install_busybox(&root);
    std::fs::write(root.join("etc/sealed"), "sealed\n".repeat(1000)).expect("room on the rig");
    must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&root).arg(rig.path("two")));
    let views = rig.views(&["one", "two"]);
    start(&rig, &views[0]);
    let read = |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    assert_eq!(read(&views[0], "etc/sealed"), "changed\n");
    assert_eq!(read(&views[0], "root/new"), "made\n");
    for untouched in [rig.path("one"), rig.path("two"), views[1].clone()] {
        assert_eq!(read(&untouched, "etc/sealed"), "sealed\n".repeat(1000), "{}", untouched.display());
        assert!(!untouched.join("root/new").exists(), "{}", untouched.display());
    }
    for view in &views {
        done(&["umount".as_ref(), view.as_os_str()]);
    }
}

#[test]
fn privileged_chroot_lives_in_a_view() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        in_a_view_of(fs, |_, view| {
            let told = must(Command::new("chroot").arg(view).args(["/bin/sh", "-c", WORK]));
            assert_eq!(told, "got sealed\n");
        });
    }
}

#[test]
fn privileged_nspawn_lives_in_a_view() {
    in_a_view_of(RigFs::Xfs, |_, view| {
        let told = with_cgroups(&format!(
            "systemd-nspawn --quiet --register=no --keep-unit -D {} /bin/sh -c '{WORK}'",
            view.display()
        ));
        assert!(told.contains("got sealed"), "{told}");
    });
}

#[test]
fn privileged_podman_lives_in_a_view() {
    in_a_view_of(RigFs::Xfs, |rig, view| {
        let graph = rig.make_dir("podman/graph");
        // podman wants a path of at most 50 characters.
        let run = tempfile::Builder::new().prefix("pagefold-").tempdir_in("/run").expect("a system has /run");
        let told = with_cgroups(&format!(
            "podman --root {} --runroot {} --storage-driver vfs run --rm --cgroups=disabled --network=none \
             --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 --rootfs {} /bin/sh -c '{WORK}'",
            graph.display(),
            run.path().display(),
            view.display()
        ));
        assert!(told.contains("got sealed"), "{told}");
    });
}

#[test]
fn privileged_runc_lives_in_a_view() {
    in_a_view_of(RigFs::Xfs, |rig, view| {
        let (bundle, state) = (rig.make_dir("bundle"), rig.make_dir("runc-state"));
        let namespaces = ["pid", "mount", "ipc", "uts"].map(|kind| serde_json::json!({ "type": kind }));
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["/bin/sh", "-c", WORK],
                         "env": ["PATH=/bin"] },
            "root": { "path": view, "readonly": false },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" },
                       { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] }],
            "linux": { "namespaces": namespaces },
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("room on the rig");
        let told = with_cgroups(&format!(
            "runc --root {} run --bundle {} pagefold-test-{}",
            state.display(),
            bundle.display(),
            std::process::id()
        ));
        assert!(told.contains("got sealed"), "{told}");
    });
}
