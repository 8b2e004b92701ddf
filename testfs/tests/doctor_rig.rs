//! `doctor` on real file systems: what it says is so, and nothing is left behind.

use pagefold_fsadapters::doctor::{Report, State, examine};
use pagefold_testfs::rig::{LoopRig, RigFs};

fn state(report: &Report, path: usize, name: &str) -> State {
    let found = report.paths[path].checks.iter().find(|c| c.capability.name == name);
    found.unwrap_or_else(|| panic!("no check {name}")).state
}

fn mounts() -> usize {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|l| l.contains("fuse") || l.contains("erofs"))
        .count()
}

#[test]
fn privileged_what_is_said_of_real_file_systems_is_so() {
    let rigs = [RigFs::Xfs, RigFs::Btrfs, RigFs::Ext4].map(|fs| {
        LoopRig::with_size(fs, 512 << 20)
            .unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
    });
    let entries = |rig: &LoopRig| std::fs::read_dir(rig.path()).unwrap().count();
    let (before, mounted): (Vec<usize>, usize) = (rigs.iter().map(entries).collect(), mounts());
    let report = examine(&rigs.each_ref().map(|rig| rig.path()));
    assert_eq!(before, rigs.iter().map(entries).collect::<Vec<_>>(), "entries left behind");
    assert_eq!(mounted, mounts(), "mounts left behind");
    assert!(report.can_scan, "{report:#?}");
    for path in 0..3 {
        assert_eq!(state(&report, path, "fiemap"), State::Yes);
        assert_eq!(state(&report, path, "physical-identity"), State::Yes);
    }
    assert_eq!([0, 1, 2].map(|p| state(&report, p, "reflink")), [State::Yes, State::Yes, State::No]);
    let kinds: Vec<&str> = report.paths.iter().map(|p| p.file_system.as_str()).collect();
    assert_eq!(kinds, ["xfs", "btrfs", "ext4"]);
}

#[test]
fn privileged_a_place_that_can_not_be_written_is_judged_by_what_is_there() {
    let mut rig = LoopRig::with_size(RigFs::Xfs, 512 << 20)
        .unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"));
    std::fs::write(rig.path().join("f"), vec![1; 10_000]).unwrap();
    rig.remount().unwrap();
    rustix::mount::mount_remount(
        rig.path(),
        rustix::mount::MountFlags::RDONLY | rustix::mount::MountFlags::BIND,
        c"",
    )
    .unwrap();
    let report = examine(&[rig.path()]);
    assert_eq!(state(&report, 0, "fiemap"), State::Yes);
    assert_eq!(state(&report, 0, "reflink"), State::NotTried);
    assert!(report.can_scan);
}
