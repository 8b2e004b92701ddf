//! What an operator does by hand in the first hour, and met an obstacle at: names given without a directory, roots that moved, files
//! that were renamed in a view, snapshots of roots that had subvolumes in them. Each is told as it is, and has a way out.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use common::view::{ViewRig, done, fails, must, told};
use common::{noise, pagefold, reflink, sync};
use pagefold_testfs::rig::RigFs;
use serde_json::Value;

/// Two roots with `file`, `dir/a`, `dir/b`, the second a clone of the first.
fn two_roots(fs: RigFs) -> ViewRig {
    let rig = ViewRig::new(fs);
    for root in ["one", "two"] {
        rig.make_dir(&format!("{root}/dir"));
    }
    for (seed, name) in ["file", "dir/a", "dir/b"].into_iter().enumerate() {
        fs::write(rig.path("one").join(name), noise(seed as u64, 20_000)).expect("room on the rig");
        reflink(&rig.path("one").join(name), &rig.path("two").join(name));
    }
    sync(&rig.path("one"));
    rig
}

/// Runs pagefold in a directory.
fn at(dir: &Path, args: &str) -> Output {
    pagefold().current_dir(dir).args(args.split(' ')).output().expect("pagefold starts")
}

fn done_at(dir: &Path, args: &str) -> String {
    let output = at(dir, args);
    assert!(output.status.success(), "pagefold {args}: {}", told(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn fails_at(dir: &Path, code: i32, args: &str) -> String {
    let output = at(dir, args);
    assert_eq!(output.status.code(), Some(code), "pagefold {args}: {}", told(&output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn privileged_a_commit_of_what_came_to_nothing_ends() {
    let rig = two_roots(RigFs::Xfs);
    let view = rig.views(&["one"]).remove(0);
    // Copied up, and as it was.
    let mode = fs::metadata(view.join("dir")).expect("there").permissions();
    fs::set_permissions(view.join("dir"), mode).expect("set");
    done(&["umount".as_ref(), view.as_os_str()]);
    let told = fails_at(rig.rig.path(), 2, "seal one");
    assert!(told.contains("its view has changes"), "nothing was copied up, the test shows nothing: {told}");
    done_at(rig.rig.path(), "commit one");
    assert!(done_at(rig.rig.path(), "commit one").contains("has written nothing"));
    assert!(done_at(rig.rig.path(), "seal one").contains("1 of 1 roots sealed"));
    done_at(rig.rig.path(), "unseal one");
}

#[test]
fn privileged_a_discard_counts_what_the_view_wrote() {
    let rig = two_roots(RigFs::Xfs);
    let view = rig.views(&["one"]).remove(0);
    assert!(done_at(rig.rig.path(), "umount view-one --discard").contains("nothing had been written"));
    done_at(rig.rig.path(), "mount one view-one");
    fs::write(view.join("new"), b"x").expect("written");
    assert!(done_at(rig.rig.path(), "umount view-one --discard").contains("1 written entries"));
}

#[test]
fn privileged_explain_follows_what_was_renamed_linked_and_removed() {
    let rig = two_roots(RigFs::Btrfs);
    let views = rig.views(&["one", "two"]);
    let view = |name: &str| views[0].join(name);
    fs::hard_link(view("file"), view("link")).expect("linked");
    fs::rename(view("dir/b"), view("b2")).expect("renamed");
    must(Command::new("mv").arg(view("dir")).arg(view("moved")));
    fs::create_dir(view("dir")).expect("made");
    fs::write(view("dir/a"), b"another").expect("written");
    fs::create_dir(view("new")).expect("made");
    std::os::unix::fs::symlink("x", view("new/link")).expect("made");
    fs::remove_file(views[1].join("file")).expect("removed");
    fs::rename(views[1].join("dir"), views[1].join("gone")).expect("renamed");
    fs::remove_dir_all(views[1].join("gone")).expect("removed");
    let explain = |path: &Path| -> Value {
        let told = done(&["explain".as_ref(), path.as_os_str(), "--format=json".as_ref()]);
        serde_json::from_str(&told).expect("JSON")
    };
    for (path, want, sealed_as) in [
        (view("file"), "shared", ""),
        (view("link"), "shared", "\"file\""),
        (view("b2"), "shared", "\"dir/b\""),
        (view("moved/a"), "shared", "\"dir/a\""),
        (view("dir/a"), "not_sealed", ""),
        (view("new"), "not_a_file", ""),
        (view("new/link"), "not_a_file", ""),
        (view("moved"), "not_a_file", ""),
        (views[1].join("file"), "removed", ""),
        (view("moved/b"), "removed", ""),
    ] {
        let told = explain(&path);
        assert_eq!(told["verdict"], want, "{path:?}: {told}");
        let renamed = told["why"]
            .as_array()
            .expect("a list")
            .iter()
            .find_map(|why| why.as_str().filter(|why| why.contains("sealed as")));
        assert_eq!(renamed.is_some(), !sealed_as.is_empty(), "{path:?}: {told}");
        assert!(renamed.unwrap_or_default().contains(sealed_as), "{path:?}: {told}");
    }
    let missing = fails(2, &["explain".as_ref(), view("nothing").as_os_str()]);
    assert!(missing.contains("is not there, and was not there"), "{missing}");
    let missing = fails(2, &["explain".as_ref(), rig.path("one/nothing").as_os_str()]);
    assert!(missing.contains("is not there, and was not there"), "{missing}");
    fs::remove_file(rig.path("one/file")).expect("removed");
    assert_eq!(explain(&rig.path("one/file"))["verdict"], "removed");
    fs::write(rig.path("one/later"), b"x").expect("written");
    assert_eq!(explain(&rig.path("one/later"))["verdict"], "not_sealed");
}

#[test]
fn privileged_names_without_a_directory_are_in_the_current_one() {
    let rig = two_roots(RigFs::Xfs);
    let home = rig.rig.path();
    // What is missing takes nothing with it, first or last.
    let told = fails_at(home, 1, "seal nothing one two");
    assert!(told.contains("nothing") && !told.contains("one"), "{told}");
    done_at(home, "export one copy");
    assert_eq!(fs::read(rig.path("copy/file")).expect("there"), noise(0, 20_000));
    // By name, onto another file system.
    let elsewhere = tempfile::tempdir().expect("temp dir");
    let target = elsewhere.path().to_str().expect("text");
    done_at(home, &format!("mount two {target}"));
    fs::write(elsewhere.path().join("new"), b"x").expect("written");
    done_at(home, &format!("umount {target}"));
    done_at(home, "unseal --all --export out/of");
    assert!(rig.path("out/of/two/new").exists());
}

#[test]
fn privileged_a_root_that_moved_has_a_way_out() {
    let rig = two_roots(RigFs::Xfs);
    let home = rig.rig.path();
    let view = rig.views(&["one"]).remove(0);
    fs::write(view.join("new"), b"x").expect("written");
    done_at(home, "umount view-one");
    fs::rename(rig.path("one"), rig.path("elsewhere")).expect("renamed");
    for (code, args) in [(2, "mount one view-one"), (2, "commit one"), (2, "unseal one --commit")] {
        let told = fails_at(home, code, args);
        assert!(told.contains("put it back where it was") && told.contains("--export"), "{args}: {told}");
    }
    let told = done_at(home, "unseal one --export copy");
    assert!(told.contains("is not there") && rig.path("copy/new").exists(), "{told}");
}

#[test]
fn privileged_mount_a_again_is_no_error() {
    let rig = two_roots(RigFs::Xfs);
    let home = rig.rig.path();
    let helper = rig.path("mount.pagefold");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pagefold"), &helper).expect("linked");
    done_at(home, "seal one two");
    rig.make_dir("at");
    let mount = |root: &str| {
        Command::new(&helper)
            .arg(rig.path(root))
            .arg(rig.path("at"))
            .args(["-o", "rw"])
            .output()
            .expect("runs")
    };
    for _ in 0..2 {
        let output = mount("one");
        assert!(output.status.success(), "{}", told(&output));
    }
    let output = mount("two");
    assert!(!output.status.success() && told(&output).contains("mounted at"), "{}", told(&output));
    done_at(home, "umount at");
}

#[test]
fn privileged_a_conflict_and_a_read_only_root_name_the_way_out() {
    let rig = two_roots(RigFs::Btrfs);
    let home = rig.rig.path();
    let views = rig.views(&["one"]);
    fs::write(views[0].join("file"), b"view").expect("written");
    fs::write(rig.path("one/file"), b"raw").expect("written");
    let told = fails_at(home, 1, "umount view-one --commit");
    assert!(told.contains("--ours") && told.contains("pagefold export one DIR"), "{told}");
    must(Command::new("btrfs").args(["subvolume", "create"]).arg(rig.path("ro")));
    must(Command::new("btrfs").args(["property", "set"]).arg(rig.path("ro")).args(["ro", "true"]));
    done_at(home, "seal ro");
    rig.make_dir("at");
    done_at(home, "mount ro at");
    fs::write(rig.path("at/new"), b"x").expect("written");
    let told = fails_at(home, 1, "umount at --commit");
    assert!(told.contains("btrfs property set"), "{told}");
    must(Command::new("btrfs").args(["property", "set"]).arg(rig.path("ro")).args(["ro", "false"]));
    done_at(home, "commit ro");
    assert!(rig.path("ro/new").exists());
}

#[test]
fn privileged_a_snapshot_has_an_empty_directory_for_each_subvolume() {
    let rig = ViewRig::new(RigFs::Btrfs);
    let home = rig.rig.path();
    let origin = rig.path("origin");
    must(Command::new("btrfs").args(["subvolume", "create"]).arg(&origin));
    fs::create_dir(origin.join("var")).expect("made");
    must(Command::new("btrfs").args(["subvolume", "create"]).arg(origin.join("var/machines")));
    fs::write(origin.join("var/file"), noise(1, 10_000)).expect("written");
    let snapshot = || {
        must(Command::new("btrfs").args(["subvolume", "snapshot"]).arg(&origin).arg(rig.path("snapshot")));
    };
    snapshot();
    sync(home);
    let told = fails_at(home, 2, "seal origin");
    assert!(told.contains("nested btrfs subvolume") && told.contains("seal a snapshot"), "{told}");
    done_at(home, "seal snapshot");
    // Btrfs makes the directory up anew.
    fs::write("/proc/sys/vm/drop_caches", "2").expect("as root");
    std::thread::sleep(std::time::Duration::from_millis(20));
    let status: Value = serde_json::from_str(&done_at(home, "status . --format json")).expect("JSON");
    assert_eq!(status["roots"][0]["raw_changes"]["changed"], 0, "{status}");
    assert!(done_at(home, "seal snapshot").contains("unchanged"));
    rig.make_dir("at");
    done_at(home, "mount snapshot at");
    let machines = fs::metadata(rig.path("at/var/machines")).expect("shown");
    assert!(machines.is_dir() && machines.permissions().mode() & 0o777 == 0o755);
    assert_eq!(fs::read_dir(rig.path("at/var/machines")).expect("readable").count(), 0);
    fs::write(rig.path("at/var/file"), b"written").expect("written");
    done_at(home, "umount at --commit");
    assert_eq!(fs::read(rig.path("snapshot/var/file")).expect("there"), b"written");
}

/// An umask that takes from the owner, too, is no reason to make what nobody may read.
#[test]
fn privileged_an_umask_spoils_no_store() {
    let rig = two_roots(RigFs::Xfs);
    let sealed = Command::new("sh")
        .args(["-c", "umask 0777; exec \"$0\" seal one two", env!("CARGO_BIN_EXE_pagefold")])
        .current_dir(rig.rig.path())
        .output()
        .expect("sh starts");
    assert!(sealed.status.success(), "{}", told(&sealed));
    done_at(rig.rig.path(), "verify");
}
