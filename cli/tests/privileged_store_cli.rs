//! `pagefold gc` and `pagefold verify` on a store that `seal` made.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{dir, pagefold, reflink, rig, write};
use pagefold_testfs::rig::{LoopRig, RigFs};
use serde_json::Value;

const FILE_SYSTEMS: [RigFs; 2] = [RigFs::Xfs, RigFs::Btrfs];

fn run(args: &[&str], store: &Path) -> Output {
    pagefold().args(args).arg("--store").arg(store).output().expect("the binary runs")
}

/// Runs a command that must end with `code`; its JSON.
fn json(args: &[&str], store: &Path, code: i32) -> Value {
    let output = run(&[args, &["--format", "json"]].concat(), store);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}{stdout}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {stdout}"))
}

/// Two roots that share eight files; `b` has one of its own. Sealed.
fn sealed(rig: &LoopRig) -> (PathBuf, PathBuf, PathBuf) {
    let (a, b) = (dir(rig.path(), "a"), dir(rig.path(), "b"));
    for n in 0..8 {
        write(&a.join(format!("f{n}")), n, 20_000);
        reflink(&a.join(format!("f{n}")), &b.join(format!("f{n}")));
    }
    write(&b.join("own"), 99, 50_000);
    common::sync(rig.path());
    let store = rig.path().join(".pagefold");
    json(&["seal", a.to_str().unwrap(), b.to_str().unwrap()], &store, 0);
    (a, b, store)
}

fn thaw(path: &Path) {
    assert!(Command::new("chattr").arg("-i").arg(path).status().unwrap().success());
}

fn images(store: &Path) -> Vec<PathBuf> {
    fs::read_dir(store.join("images")).unwrap().map(|e| e.unwrap().path()).collect()
}

#[test]
fn privileged_a_damaged_image_is_found_and_sealing_again_makes_it_whole() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs);
        let (a, b, store) = sealed(&rig);
        let whole = json(&["verify"], &store, 0);
        assert_eq!(whole["schema"], "pagefold.verify/1");
        assert_eq!((whole["anchors"].as_u64(), whole["roots"].as_u64()), (Some(9), Some(2)), "{whole}");
        for image in images(&store) {
            thaw(&image);
            fs::File::options().write(true).open(&image).unwrap().write_all_at(b"!", 1500).unwrap();
        }
        let found = json(&["verify"], &store, 1);
        assert_eq!(found["problem_count"].as_u64(), Some(images(&store).len() as u64), "{found}");
        assert_eq!(found["problems"][0]["kind"], "damaged");
        let table = run(&["verify"], &store);
        assert!(String::from_utf8_lossy(&table.stdout).contains("damaged: "), "{table:?}");
        json(&["seal", a.to_str().unwrap(), b.to_str().unwrap()], &store, 0);
        json(&["verify"], &store, 0);
    }
}

#[test]
fn privileged_gc_removes_what_an_unsealed_root_left_and_nothing_else() {
    for fs in FILE_SYSTEMS {
        let rig = rig(fs);
        let (a, b, store) = sealed(&rig);
        let nothing = json(&["gc"], &store, 0);
        assert_eq!(nothing["schema"], "pagefold.gc/1");
        assert_eq!(
            (nothing["anchors"].as_u64(), nothing["images"].as_u64()),
            (Some(0), Some(0)),
            "{nothing}"
        );
        let unsealed = run(&["unseal", b.to_str().unwrap()], &store);
        assert!(unsealed.status.success(), "{unsealed:?}");
        let left = json(&["gc"], &store, 0);
        assert_eq!((left["anchors"].as_u64(), left["anchors_kept"].as_u64()), (Some(1), Some(8)), "{left}");
        assert_eq!(left["anchor_logical_bytes"].as_u64(), Some(50_000));
        json(&["verify"], &store, 0);
        // What is left works: a view of `a` shows its files.
        let view = dir(rig.path(), "view");
        let mounted = run(&["mount", a.to_str().unwrap(), view.to_str().unwrap()], &store);
        assert!(mounted.status.success(), "{mounted:?}");
        let kept = json(&["gc"], &store, 0);
        let same = (0..8).all(|n| {
            fs::read(view.join(format!("f{n}"))).unwrap() == fs::read(a.join(format!("f{n}"))).unwrap()
        });
        let verified = run(&["verify"], &store);
        let unmounted = run(&["umount", view.to_str().unwrap()], &store);
        assert!(unmounted.status.success(), "{unmounted:?}");
        assert!(same && verified.status.success(), "{kept}");
        assert_eq!(kept["anchors"].as_u64(), Some(0));
    }
}

#[test]
fn privileged_without_a_store_the_message_says_how_to_get_one() {
    let rig = rig(RigFs::Xfs);
    for command in ["gc", "verify"] {
        let output = run(&[command], &rig.path().join("none"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2));
        assert!(text.contains("there is no store") && text.contains("pagefold seal"), "{text}");
        assert!(!rig.path().join("none").exists());
    }
}
