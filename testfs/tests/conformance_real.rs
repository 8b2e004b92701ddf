//! The conformance cases on the running kernel: the same table as for the simulation.
//!
//! Tests named `privileged_` need root and loop devices and fail, saying so, without them.

use pagefold_testfs::conformance::{KernelFs, KernelRig, run_all};
use pagefold_testfs::rig::{LoopRig, RigFs};

/// Bytes of each loop file system; the backing file is sparse.
const SIZE: u64 = 1 << 30;

fn run(loop_fs: RigFs, fs: KernelFs, wanted: &[&str]) {
    let rig = match LoopRig::with_size(loop_fs, SIZE) {
        Ok(rig) => rig,
        Err(error) => panic!("this test needs root and loop devices (run it as `sudo cargo test`): {error}"),
    };
    let ran = run_all(&mut KernelRig::new(fs, rig.path()));
    for case in wanted {
        assert!(ran.contains(case), "`{case}` did not run on {fs:?}, only {ran:?}");
    }
}

#[test]
fn privileged_xfs() {
    run(
        RigFs::Xfs,
        KernelFs::Xfs,
        &["dirty_clone_is_undecided_never_equal", "equal_identity_means_equal_bytes"],
    );
}

#[test]
fn privileged_xfs_small_blocks() {
    run(RigFs::XfsSmallBlocks, KernelFs::XfsSmallBlocks, &["dirty_clone_is_undecided_never_equal"]);
}

#[test]
fn privileged_btrfs() {
    let wanted =
        ["dirty_clone_is_undecided_never_equal", "snapshot_is_equal", "relocation", "inline_is_undecided"];
    run(RigFs::Btrfs, KernelFs::Btrfs, &wanted);
}

#[test]
fn privileged_btrfs_zstd() {
    run(
        RigFs::BtrfsZstd,
        KernelFs::BtrfsZstd,
        &["compressed_is_undecided", "equal_identity_means_equal_bytes"],
    );
}

#[test]
fn privileged_ext4() {
    run(RigFs::Ext4, KernelFs::Ext4, &["holes_are_zero", "equal_bytes_are_not_equal_extents"]);
}

/// tmpfs needs no mount of ours: Linux has one for shared memory.
#[test]
fn tmpfs() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm, as glibc requires one");
    let ran = run_all(&mut KernelRig::new(KernelFs::Tmpfs, dir.path()));
    assert!(ran.contains(&"without_extents_nothing_is_decided"), "{ran:?}");
}
