//! The command line of `pagefold scan` as a user meets it: usage, messages, exit codes, formats. Needs no privileges.
//!
//! What it deliberately does not test: figures that depend on the file system of the temporary directory.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};

use common::{Scan, dir, pagefold};
use serde_json::Value;

fn run(args: &[&str], paths: &[&Path]) -> Output {
    pagefold().args(args).args(paths).output().expect("the binary runs")
}

#[track_caller]
fn expect_usage(args: &[&str], says: &str) {
    let output = run(args, &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(stderr.contains(says), "{args:?} should say {says:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}: messages belong to stderr");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A root with three files of known sizes.
fn tree() -> tempfile::TempDir {
    let home = tempfile::tempdir().expect("a temporary directory");
    let root = dir(home.path(), "root");
    fs::write(root.join("a.txt"), vec![1; 5000]).expect("written");
    fs::write(root.join("b.pyc"), vec![2; 100]).expect("written");
    fs::write(dir(&root, "sub/cache").join("c.txt"), b"").expect("written");
    home
}

/// The report, wherever the temporary directory is: on some file systems it lists an error.
fn json(args: &[&str], paths: &[&Path]) -> Scan {
    let mut all = vec!["scan", "--format", "json"];
    all.extend(args);
    Scan::of(&run(&all, paths))
}

#[test]
fn usage_errors_exit_with_2_and_say_what_is_wrong() {
    expect_usage(&[], "Usage");
    expect_usage(&["scan"], "ROOT");
    expect_usage(&["scna"], "scna");
    for threads in ["0", "-1", "1025", "x", "", "99999999999999999999"] {
        expect_usage(&["scan", &format!("--threads={threads}"), "/"], "threads");
    }
    expect_usage(&["scan", "--format", "xml", "/"], "xml");
    expect_usage(&["scan", "--top=-1", "/"], "top");
    expect_usage(&["scan", "--exclude", "a[", "/"], "a[");
    for nothing in ["", "/"] {
        expect_usage(&["scan", "--exclude", nothing, "/"], "empty pattern");
    }
    expect_usage(&["scan", "--domain", "=", "/"], "domain");
    expect_usage(&["scan", "--domain", "=/tmp", "/"], "domain");
    expect_usage(&["scan", "--domain", "a=", "/"], "a=");
    expect_usage(&["scan", "--domain", "a"], "root");
    expect_usage(&["scan", "--domain", "a=/x", "--domain", "b=/x/"], "both a and b");
    expect_usage(&["scan", ""], "ROOT");
}

#[test]
fn help_and_version_go_to_stdout_and_are_no_error() {
    for args in [&["--help"][..], &["scan", "--help"], &["--version"], &["scan", "-h"], &["help", "scan"]] {
        let output = run(args, &[]);
        assert!(output.status.success(), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    let help = String::from_utf8(run(&["scan", "--help"], &[]).stdout).expect("text");
    for option in [
        "--content",
        "--matrix",
        "--format",
        "--threads",
        "--exclude",
        "--one-file-system",
        "--domain",
        "--top",
    ] {
        assert!(help.contains(option), "--help does not tell of {option}");
    }
    assert!(help.contains("Exit status"), "{help}");
}

#[test]
fn roots_that_are_none_are_named_and_exit_with_2() {
    let home = tree();
    let file = home.path().join("root/a.txt");
    let missing = home.path().join("missing");
    for (path, why) in [(&file, "Not a directory"), (&missing, "No such file")] {
        for format in ["json", "table"] {
            let output = run(&["scan", "--format", format], &[path]);
            assert_eq!(output.status.code(), Some(2), "{path:?} {format}");
            let all = [output.stdout, output.stderr].concat();
            let all = String::from_utf8_lossy(&all);
            assert!(all.contains(why) && all.contains(path.to_str().expect("UTF-8")), "{format}: {all}");
        }
    }
    // One good root beside them: partial, and what is missing is named.
    let root = home.path().join("root");
    let scan = json(&[], &[&missing, &root, &file]);
    assert_eq!(scan.code, 1);
    assert_eq!(scan.json["roots"].as_array().map(Vec::len), Some(1));
    assert_eq!(scan.total("files"), 3);
    let named: Vec<_> = scan.errors().into_iter().map(|(path, _)| path).collect();
    for path in [&missing, &file] {
        assert!(named.contains(&path.to_str().expect("UTF-8").to_owned()), "{named:?}");
    }
}

#[test]
fn json_has_every_field_and_no_other() {
    let home = tree();
    let root = home.path().join("root");
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<_> = value.as_object().expect("an object").keys().cloned().collect();
        keys.sort();
        keys
    };
    let report = [
        "content",
        "domains",
        "elapsed_s",
        "errors",
        "page_size",
        "partial",
        "roots",
        "schema",
        "skipped",
        "top_files",
        "totals",
    ];
    let sizes = [
        "cache_bytes",
        "files",
        "hard_links",
        "logical_bytes",
        "mergeable_file_bytes",
        "mergeable_page_bytes",
        "resident_bytes",
        "resident_duplicate_bytes",
        "undecided_bytes",
        "zero_bytes",
    ];
    let scan = json(&[], &[&root]);
    assert_eq!(keys(&scan.json), report);
    assert_eq!(keys(&scan.json["totals"]), sizes);
    let mut of_root = sizes.to_vec();
    of_root.extend(["domain", "path", "shared_with_others_bytes"]);
    of_root.sort_unstable();
    assert_eq!(keys(&scan.json["roots"][0]), of_root);
    assert_eq!(scan.json["domains"], serde_json::json!(["default"]));
    assert_eq!(scan.json["page_size"], rustix::param::page_size());
    assert_eq!((scan.total("files"), scan.total("logical_bytes")), (3, 5100));
    assert_eq!(scan.total("cache_bytes") + scan.total("zero_bytes"), 3 * rustix::param::page_size() as u64);
    let with = json(&["--matrix", "--content"], &[&root]);
    assert_eq!(with.json["matrix"].as_array().map(Vec::len), Some(1));
    assert_eq!(with.json["content"], true);
}

#[test]
fn excludes_leave_out_names_and_paths() {
    let home = tree();
    let root = home.path().join("root");
    let files = |globs: &[&str]| {
        let args: Vec<String> = globs.iter().map(|g| format!("--exclude={g}")).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        json(&args, &[&root]).total("files")
    };
    for (globs, left) in [
        (&["*.pyc"][..], 2),
        (&["cache"], 2),
        (&["sub/cache"], 2),
        (&["/cache"], 3),
        (&["/sub"], 2),
        (&["*"], 0),
        (&["**"], 0),
        (&["*.txt", "*.pyc"], 0),
        (&["root"], 3),
        (&["sub/"], 2),
    ] {
        assert_eq!(files(globs), left, "{globs:?}");
    }
}

#[test]
fn domains_by_name_by_root_and_both() {
    let home = tree();
    let (one, two) = (home.path().join("root"), dir(home.path(), "two"));
    fs::write(two.join("f"), b"x").expect("written");
    let of_two = format!("tenant={}/", two.display());
    let scan = json(&["--domain", "mine", "--domain", &of_two], &[&one, &two]);
    assert_eq!(scan.json["domains"], serde_json::json!(["mine", "tenant"]));
    assert_eq!(scan.json["roots"][1]["domain"], "tenant");
    // A root that only --domain names is scanned, too.
    let only = json(&["--domain", &of_two], &[]);
    assert_eq!((only.json["roots"].as_array().map(Vec::len), only.total("files")), (Some(1), 1));
    // An '=' in a path is the path's own.
    let odd = dir(home.path(), "a=b");
    let scan = json(&["--domain", &format!("x={}", odd.display())], &[]);
    assert_eq!(scan.json["roots"][0]["path"], odd.to_str().expect("UTF-8"));
}

#[test]
fn any_top_is_fine() {
    let home = tree();
    let root = home.path().join("root");
    for top in ["0", "1", "18446744073709551615"] {
        for format in ["json", "table"] {
            let output = run(&["scan", "--content", "--top", top, "--format", format], &[&root]);
            assert!(output.status.code().is_some_and(|c| c < 2), "{top}: {output:?}");
            assert!(output.stderr.is_empty());
        }
        let scan = json(&["--top", top, "--content"], &[&root]);
        assert!(top != "0" || scan.json["top_files"] == serde_json::json!([]));
    }
}

#[test]
fn a_table_piped_is_silent_and_plain() {
    let home = tree();
    let output = run(&["scan", "--matrix"], &[&home.path().join("root"), home.path()]);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!output.stdout.contains(&0x1b), "no escape sequences into a pipe");
    String::from_utf8(output.stdout).expect("text");
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let home = tree();
    for format in ["json", "table"] {
        let mut child = pagefold()
            .args(["scan", "--format", format])
            .arg(home.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        // Closed before anything is written.
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code().is_some(), "{:?}", output.status);
        assert!(stderr.is_empty(), "{stderr}");
    }
}

#[test]
fn a_full_disk_under_the_report_is_an_error() {
    let home = tree();
    let full = fs::File::options().write(true).open("/dev/full").expect("every Linux has /dev/full");
    let output = pagefold().arg("scan").arg(home.path()).stdout(full).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"));
}

#[test]
fn relative_roots_and_dots_are_reported_as_given() {
    let home = tree();
    for given in [".", "root", "./root/../root/", "root/sub/.."] {
        let output = pagefold()
            .current_dir(home.path())
            .args(["scan", "--format", "json", given])
            .output()
            .expect("runs");
        let scan = Scan::of(&output);
        assert_eq!(scan.json["roots"][0]["path"], given);
        assert_eq!(scan.total("files"), 3, "{given}");
    }
    // A root whose name begins with a dash needs the usual `--`.
    fs::rename(home.path().join("root"), home.path().join("--content")).expect("renamed");
    let output = pagefold()
        .current_dir(home.path())
        .args(["scan", "--format", "json", "--", "--content"])
        .output()
        .expect("runs");
    let scan = Scan::of(&output);
    assert_eq!((scan.total("files"), &scan.json["content"]), (3, &Value::Bool(false)));
}
