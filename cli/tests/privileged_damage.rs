//! Anchors that somebody removed or wrote by hand.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::view::{ViewRig, done, must, run, told};
use pagefold_testfs::rig::RigFs;

/// Both kinds of damage by hand: a view never shows other bytes in silence after `verify` and another `seal`.
#[test]
fn privileged_anchors_removed_or_written_by_hand_are_found_and_replaced() {
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.make_dir("root");
    for name in ["removed", "written", "left"] {
        std::fs::write(root.join(name), name.repeat(5000)).expect("room on the rig");
    }
    let view = rig.views(&["root"]).remove(0);
    let anchor = |name: &str| -> PathBuf {
        let told = done(&["explain".as_ref(), view.join(name).as_os_str(), "--format=json".as_ref()]);
        let json: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        json["anchor"]["path"].as_str().expect("a path").into()
    };
    let (removed, written) = (anchor("removed"), anchor("written"));
    done(&["umount".as_ref(), view.as_os_str()]);
    for path in [&removed, &written] {
        must(Command::new("chattr").arg("-i").arg(path));
    }
    std::fs::remove_file(&removed).expect("ours");
    let mut bytes = std::fs::read(&written).expect("readable");
    bytes[100] ^= 1;
    let file = std::fs::OpenOptions::new().write(true).open(&written).expect("root may");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).expect("room on the rig");
    drop(file);
    must(Command::new("chattr").arg("+i").arg(&written));
    let store = rig.path(".pagefold");
    let verify = || run(&["verify".as_ref(), "--store".as_ref(), store.as_os_str()]);
    let found = told(&verify());
    for path in [&removed, &written] {
        assert!(found.contains(path.to_str().expect("text")), "{found}");
    }
    done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
    assert!(std::fs::read(view.join("removed")).is_err(), "what is gone reads as something");
    done(&["umount".as_ref(), view.as_os_str()]);
    done(&["unseal".as_ref(), root.as_os_str()]);
    done(&["seal".as_ref(), root.as_os_str()]);
    done(&["mount".as_ref(), root.as_os_str(), view.as_os_str()]);
    for name in ["removed", "written", "left"] {
        assert!(std::fs::read(view.join(name)).expect("readable") == name.repeat(5000).as_bytes(), "{name}");
    }
}
