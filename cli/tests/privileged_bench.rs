//! `farm bench` cleans up after itself. In a test binary of its own: it empties the host's page cache, which tests of residency
//! that run at the same time would not survive.

mod common;

use std::fs;
use std::process::Stdio;

use common::pagefold;
use pagefold_fsadapters::memcg::Hierarchy;

#[test]
fn privileged_bench_that_fails_leaves_nothing() {
    let mut command = pagefold();
    command.args([
        "farm",
        "bench",
        "--image",
        "synthetic:files=20,max=8192",
        "--containers",
        "2",
        "--arms",
        "view,overlay",
    ]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let id = child.id();
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("python3 in "), "the program that did not start is named: {said}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(&format!("pagefold-bench-{id}/")), "{mounts}");
    let hierarchy = Hierarchy::open(&std::env::temp_dir()).expect("this test needs memory groups");
    let left = hierarchy.groups(&format!("pagefold-bench-{id}-")).expect("groups");
    assert!(left.is_empty(), "{left:?}");
}
