//! Suites that nobody here wrote: `pjdfstest` passes in a view as it does on a plain overlay of the same file system, and `fsx`
//! finds nothing.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use common::view::{ViewRig, done, must, tool};
use pagefold_testfs::rig::RigFs;

/// The failed cases of a run in `dir`; panics when hardly any ran.
fn pjdfstest(rig: &ViewRig, dir: &Path) -> BTreeSet<String> {
    let config = rig.path("pjdfstest.toml");
    let text = "[features]\nposix_fallocate = {}\n[settings]\nnaptime = 0.02\nallow_remount = false\n\
                [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n";
    std::fs::write(&config, text).expect("room on the rig");
    // Sockets' paths are limited to 108 bytes, so the directory gets a short name, in a mount namespace of its own.
    let script = "mount --make-rprivate / && mount --bind \"$1\" /mnt && exec \"$2\" -c \"$3\" -p /mnt";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(dir).arg(tool("pjdfstest")).arg(&config);
    let output = command.env("RUST_BACKTRACE", "0").output().expect("pjdfstest starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let ended = |how: &str| -> BTreeSet<String> {
        let lines = text.lines().filter(|l| l.trim_end().ends_with(how));
        lines.filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect()
    };
    let passed = ended(" ok");
    assert!(passed.len() > 300, "{} cases passed: {}", passed.len(), common::view::told(&output));
    ended(" FAILED")
}

fn pjdfstest_differs_nowhere(fs: RigFs) {
    let rig = ViewRig::new(fs);
    let root = rig.make_dir("root");
    std::fs::write(root.join("file"), vec![7; 100_000]).expect("room on the rig");
    let [lower, upper, work, plain] =
        ["plain/lower", "plain/upper", "plain/work", "plain/view"].map(|n| rig.make_dir(n));
    let options = format!(
        "lowerdir={},upperdir={},workdir={},metacopy=on,redirect_dir=on,index=on,xino=on,nosuid,nodev",
        lower.display(),
        upper.display(),
        work.display()
    );
    must(Command::new("mount").args(["-t", "overlay", "-o", &options, "plain"]).arg(&plain));
    let expected = pjdfstest(&rig, &plain);
    let view = rig.views(&["root"]).remove(0);
    let found = pjdfstest(&rig, &view);
    let only_here: Vec<_> = found.difference(&expected).collect();
    let only_there: Vec<_> = expected.difference(&found).collect();
    assert!(
        only_here.is_empty() && only_there.is_empty(),
        "fail only in a view: {only_here:?}; fail only on plain overlayfs: {only_there:?}"
    );
}

#[test]
fn privileged_pjdfstest_passes_as_on_plain_overlayfs_on_xfs() {
    pjdfstest_differs_nowhere(RigFs::Xfs);
}

#[test]
fn privileged_pjdfstest_passes_as_on_plain_overlayfs_on_btrfs() {
    pjdfstest_differs_nowhere(RigFs::Btrfs);
}

/// Operations of each `fsx`; `PAGEFOLD_FSX_OPERATIONS` asks for a long run.
fn operations() -> String {
    std::env::var("PAGEFOLD_FSX_OPERATIONS").unwrap_or_else(|_| "3000".into())
}

/// Several views of clones at once, each with its own `fsx`.
fn fsx_finds_nothing(fs: RigFs) {
    let rig = ViewRig::new(fs);
    let first = rig.make_dir("root-0");
    std::fs::write(first.join("bystander"), vec![9; 1 << 20]).expect("room on the rig");
    for clone in ["root-1", "root-2"] {
        must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&first).arg(rig.path(clone)));
    }
    let views = rig.views(&["root-0", "root-1", "root-2"]);
    let runs: Vec<_> = views
        .iter()
        .zip(["11", "12", "13"])
        .map(|(view, seed)| {
            let mut command = Command::new(tool("fsx"));
            command.args(["-q", "-N", &operations(), "-S", seed, "-P"]).arg(rig.rig.path());
            command.arg(view.join("exercised")).stdout(std::process::Stdio::piped());
            command.stderr(std::process::Stdio::piped()).spawn().expect("fsx starts")
        })
        .collect();
    for run in runs {
        let output = run.wait_with_output().expect("fsx ends");
        assert!(output.status.success(), "{}", common::view::told(&output));
    }
    for view in &views {
        assert_eq!(std::fs::read(view.join("bystander")).expect("readable"), vec![9; 1 << 20]);
        done(&["umount".as_ref(), view.as_os_str()]);
    }
}

#[test]
fn privileged_fsx_finds_nothing_on_xfs() {
    fsx_finds_nothing(RigFs::Xfs);
}

#[test]
fn privileged_fsx_finds_nothing_on_btrfs() {
    fsx_finds_nothing(RigFs::Btrfs);
}
