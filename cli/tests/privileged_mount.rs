//! `pagefold mount` and `pagefold umount` as they are typed: reports, exit codes, where the store is found.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::pagefold;
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::mount::UnmountFlags;
use serde_json::Value;

/// A rig with two sealed roots; whatever is mounted on it goes with it.
struct Place(LoopRig);

impl Place {
    fn new() -> Place {
        let rig = LoopRig::with_size(RigFs::Xfs, 512 << 20)
            .unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"));
        for name in ["a", "b"] {
            fs::create_dir_all(rig.path().join(name).join("etc")).unwrap();
            fs::write(rig.path().join(name).join("etc/hosts"), b"localhost").unwrap();
        }
        fs::create_dir(rig.path().join("view")).unwrap();
        let place = Place(rig);
        let roots = [place.at("a"), place.at("b")].map(|p| p.display().to_string());
        place.run(0, &["seal", &roots[0], &roots[1]]);
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs in the rig's root directory and gives stdout; the exit code must be `code`.
    fn run(&self, code: i32, args: &[&str]) -> String {
        // Other tests' children hold descriptors for a moment: a view may be busy or live so long.
        let started = std::time::Instant::now();
        while started.elapsed().as_secs() < 30 {
            let output = pagefold().args(args).current_dir(self.0.path()).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.code() != Some(code) && stderr.contains("in use") {
                std::thread::sleep(std::time::Duration::from_millis(20));
                continue;
            }
            assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
            // A container that somebody else is starting has a copy of our mounts for a moment, which is told.
            let silent = stderr.is_empty() || stderr.contains("another mount namespace");
            assert!(code != 0 || silent, "{args:?}: {stderr}");
            return String::from_utf8(output.stdout).unwrap();
        }
        panic!("{args:?}: still in use");
    }

    fn json(&self, code: i32, args: &[&str]) -> Value {
        let text = self.run(code, &[args, &["--format", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
    }

    fn is_mounted(&self, name: &str) -> bool {
        let at = format!(" {} ", self.at(name).display());
        fs::read_to_string("/proc/self/mountinfo").unwrap().lines().any(|l| l.contains(&at))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for name in ["view", "views/a", "views/b", "a"] {
            let _ = rustix::mount::unmount(self.at(name), UnmountFlags::DETACH);
        }
        for entry in fs::read_dir(self.at(".pagefold/mounts")).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path(), UnmountFlags::DETACH);
        }
        let _ = rustix::mount::unmount(self.at(".pagefold/mounts"), UnmountFlags::DETACH);
    }
}

fn hosts(dir: &Path) -> String {
    fs::read_to_string(dir.join("etc/hosts")).unwrap()
}

#[test]
fn privileged_writes_are_kept_discarded_or_committed() {
    let place = Place::new();
    let view = place.at("view");
    let report = place.json(0, &["mount", "a", "view"]);
    assert_eq!(report["schema"], "pagefold.mount/1");
    assert_eq!(report["views"][0]["target"], view.display().to_string());
    fs::write(view.join("etc/hosts"), "kept").unwrap();
    let report = place.json(0, &["umount", "view"]);
    assert_eq!(report["schema"], "pagefold.umount/1");
    assert_eq!(
        (&report["views"][0]["was_mounted"], &report["views"][0]["live"]),
        (&true.into(), &false.into())
    );

    place.run(0, &["mount", "a", "view"]);
    assert_eq!(hosts(&view), "kept");
    place.run(0, &["umount", "view", "--discard"]);
    place.run(0, &["mount", "a", "view"]);
    assert_eq!(hosts(&view), "localhost");
    fs::write(view.join("etc/hosts"), "committed").unwrap();
    place.run(0, &["umount", "view", "--commit"]);
    assert_eq!(hosts(&place.at("a")), "committed");
    // The committed root is sealed again: its view shows it, without a warning.
    place.run(0, &["mount", "a", "view"]);
    assert_eq!(hosts(&view), "committed");
    assert_eq!(hosts(&place.at("b")), "localhost");
    place.run(0, &["umount", "view"]);
    assert!(!place.is_mounted(".pagefold/mounts"), "something is left mounted");
}

#[test]
fn privileged_all_views_come_and_come_back() {
    let place = Place::new();
    let text = place.run(0, &["mount", "--all", "--at", "views"]);
    assert!(text.contains("a is at") && text.contains("b is at"), "{text}");
    assert!(place.is_mounted("views/a") && place.is_mounted("views/b"));
    // A reboot takes the mounts and leaves the index.
    for name in ["views/a", "views/b"] {
        rustix::mount::unmount(place.at(name), UnmountFlags::DETACH).unwrap();
    }
    place.run(0, &["mount", "--restore"]);
    assert!(place.is_mounted("views/a") && place.is_mounted("views/b"));
    assert_eq!(place.run(0, &["mount", "--restore"]), "nothing to mount\n");
    // One of two can't be: partial.
    place.run(0, &["umount", "views/a"]);
    let report = place.json(1, &["mount", "--all", "--at", "views"]);
    assert_eq!(report["views"].as_array().unwrap().len(), 1);
    assert!(report["errors"][0]["error"].as_str().unwrap().contains("already"), "{report}");
    place.run(0, &["umount", "views/a", "views/b"]);
    assert!(!place.is_mounted("views/a") && !place.is_mounted("views/b"));
}

#[test]
fn privileged_what_is_refused_says_so_and_leaves_nothing() {
    let place = Place::new();
    place.run(2, &["mount", "unknown", "view"]);
    place.run(2, &["mount", "a", "nowhere"]);
    place.run(2, &["mount", "a"]);
    place.run(2, &["mount", "a", "view", "--idmap", "nonsense"]);
    place.run(2, &["mount", "a", "view", "--store", "view"]);
    place.run(2, &["umount", "view"]);
    let mut child = Command::new("sleep").arg("60").current_dir(place.at("a/etc")).spawn().unwrap();
    let output = pagefold().args(["mount", "a", "view"]).current_dir(place.0.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let forced = place.run(0, &["mount", "a", "view", "--force", "--ro"]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains(&child.id().to_string()) && stderr.contains("sleep"), "{stderr}");
    assert!(forced.contains("a is at"), "{forced}");
    assert!(fs::write(place.at("view/x"), "").is_err());
    place.run(0, &["umount", "view"]);
}

#[test]
fn privileged_mount_all_goes_on_where_one_directory_can_not_be_made() {
    let place = Place::new();
    fs::create_dir(place.at("views")).unwrap();
    fs::write(place.at("views/a"), b"in the way").unwrap();
    let output = pagefold().args(["mount", "--all", "--at", "views"]).current_dir(place.0.path()).output();
    let output = output.unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("a: can't make the directory") && told.contains("views/a"), "{told}");
    assert!(place.is_mounted("views/b") && !place.is_mounted("views/a"));
    place.run(0, &["umount", "views/b"]);
    let report = place.json(1, &["mount", "--all", "--at", "views"]);
    assert_eq!((&report["errors"][0]["name"], &report["views"][0]["name"]), (&"a".into(), &"b".into()));
    place.run(0, &["umount", "views/b"]);
    fs::write(place.at("nowhere"), b"").unwrap();
    let none = place.json(2, &["mount", "--all", "--at", "nowhere"]);
    assert_eq!(none["errors"].as_array().map(Vec::len), Some(2), "{none}");
}
