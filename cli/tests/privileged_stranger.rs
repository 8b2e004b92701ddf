//! What somebody meets who never saw pagefold: wrong arguments, odd names, reports for programs. Each message names the thing and the
//! way out, nothing is left behind, and whoever asks for JSON gets one JSON object, whatever became of the command.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Output;

use common::{noise, pagefold, rig, sync};
use pagefold_testfs::rig::RigFs;
use serde_json::Value;

fn run(at: &Path, args: &[&OsStr]) -> Output {
    pagefold().args(args).current_dir(at).output().expect("the binary runs")
}

/// The exit code and the one object on standard output.
fn json(at: &Path, args: &[&OsStr]) -> (i32, Value) {
    let output = run(at, &[args, &["--format".as_ref(), "json".as_ref()]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        panic!("{args:?}: {e}: {out}{err}")
    });
    assert!(report["schema"].as_str().is_some_and(|s| s.starts_with("pagefold.")), "{args:?}: {report}");
    (output.status.code().expect("no signal"), report)
}

fn words(text: &str) -> Vec<&OsStr> {
    text.split(' ').map(OsStr::new).collect()
}

#[test]
fn wrong_usage_is_told_once_and_in_the_form_that_was_asked_for() {
    let at = tempfile::tempdir().unwrap();
    for (args, schema) in [
        ("seal", "pagefold.seal/1"),
        ("mount a b --idmap x", "pagefold.mount/1"),
        ("prefault extra", "pagefold.prefault/1"),
        ("farm bench --containers x", "pagefold.farm-bench/1"),
        ("commit --all --store nope/store", "pagefold.commit/1"),
        ("seal nope", "pagefold.seal/1"),
        ("explain nope", "pagefold.explain/1"),
        ("status nope", "pagefold.status/1"),
    ] {
        let (code, report) = json(at.path(), &words(args));
        assert_eq!((code, &report["schema"]), (2, &Value::from(schema)), "{args}");
        let error = report["error"].as_str().unwrap_or_else(|| panic!("{args}: {report}"));
        assert!(error.matches("os error").count() <= 1, "{args}: {error}");
        let told = String::from_utf8(run(at.path(), &words(args)).stderr).unwrap();
        assert!(told.contains(error), "{args}: {told}");
    }
}

#[test]
fn a_report_that_can_not_be_written_is_an_error() {
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for args in ["doctor", "doctor --format json", "man", "completions bash"] {
        let output = pagefold().args(words(args)).stdout(full()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args}");
        assert!(told.contains("standard output"), "{args}: {told}");
    }
}

#[test]
fn privileged_a_seal_that_fails_leaves_no_store() {
    let rig = rig(RigFs::Xfs);
    let at = rig.path();
    fs::create_dir_all(at.join("root/sub")).unwrap();
    fs::write(at.join("root/file"), noise(1, 10_000)).unwrap();
    sync(at);
    for (args, why) in [
        ("seal root/file", "a root is a directory"),
        ("seal root --store root/sub/store", "lie within each other"),
        ("seal .", "lie within each other"),
    ] {
        let output = run(at, &words(args));
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args}: {told}");
        assert!(told.contains(why), "{args}: {told}");
        assert!(!at.join(".pagefold").exists() && !at.join("root/sub/store").exists(), "{args}");
    }
    // Nobody is told to change the mode of a directory of their own.
    let output = run(at, &words("seal root --store root"));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("is not a pagefold store") && !told.contains("chmod"), "{told}");
    // A store that was there stays, though the next seal fails.
    assert_eq!(run(at, &words("seal root")).status.code(), Some(0));
    assert_eq!(run(at, &words("seal root/file")).status.code(), Some(2));
    assert_eq!(json(at, &words("status .")).1["roots"].as_array().unwrap().len(), 1);
    // A path that is gone is looked for where it was.
    let told = String::from_utf8(run(Path::new("/"), &["commit".as_ref(), at.join("gone").as_ref()]).stderr)
        .unwrap();
    assert!(told.contains("the store has no root"), "{told}");
}

#[test]
fn privileged_names_of_any_bytes_are_in_every_report() {
    let rig = rig(RigFs::Xfs);
    let at = rig.path();
    let (root, view) = (at.join(OsStr::from_bytes(b"ro\xff\not")), at.join(OsStr::from_bytes(b"vi\xfe\new")));
    fs::create_dir_all(&root).unwrap();
    fs::create_dir_all(&view).unwrap();
    let name = OsStr::from_bytes(b"fi\xfd\nle");
    fs::write(root.join(name), noise(1, 10_000)).unwrap();
    sync(at);
    let (root, view) = (root.as_os_str(), view.as_os_str());
    let file = Path::new(view).join(name);
    let ok = |args: &[&OsStr], has: &str| {
        let (code, report) = json(at, args);
        assert_eq!(code, 0, "{args:?}: {report}");
        assert!(report.to_string().contains(has), "{args:?}: {report}");
        report
    };
    ok(&["seal".as_ref(), root], r"ro\\xff\not");
    ok(&["mount".as_ref(), root, view], r"vi\\xfe\new");
    ok(&["status".as_ref(), ".".as_ref()], r"vi\\xfe\new");
    ok(&["explain".as_ref(), file.as_ref()], r"fi\\xfd\nle");
    fs::write(&file, b"written").unwrap();
    fs::write(Path::new(root).join(name), b"outside").unwrap();
    ok(&["status".as_ref(), ".".as_ref()], r"fi\\xfd\nle");
    ok(&["export".as_ref(), view, "out".as_ref()], "out");
    ok(&["umount".as_ref(), view], r"vi\\xfe\new");
    let (code, report) = json(at, &["commit".as_ref(), root]);
    assert_eq!(code, 1, "{report}");
    assert!(report.to_string().contains(r"fi\\xfd\nle"), "{report}");
    ok(&["unseal".as_ref(), root, "--discard".as_ref()], r"ro\\xff\not");
}
