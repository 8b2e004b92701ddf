//! Clones and kernel-verified deduplication on real XFS and btrfs.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pagefold_fsadapters::reflink::{DedupeDest, Deduped, ReflinkError, clone_file, clone_range, dedupe};
use pagefold_sys::fiemap::{Sync, read_extents};
use pagefold_testfs::rig::{LoopRig, RigFs};

const MIB: u64 = 1 << 20;

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 1 << 30).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn file(dir: &Path, name: &str, bytes: &[u8]) -> File {
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(dir.join(name)).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn bytes(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at / 4096 * 7 + at % 253) as u8).collect()
}

/// (logical, physical) of each 4 KiB block.
fn blocks(file: &File) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let size = file.metadata().unwrap().len();
    read_extents(file.as_fd(), size, Sync::Yes, |e| {
        for at in (0..e.length).step_by(4096).filter(|at| e.logical + at < size) {
            out.push((e.logical + at, e.physical + at));
        }
    })
    .unwrap();
    out
}

fn content(file: &File) -> Vec<u8> {
    let mut out = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut out, 0).unwrap();
    out
}

#[test]
fn privileged_clones_share_blocks() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let src = file(rig.path(), "src", &bytes(MIB + 5));
        let whole = file(rig.path(), "whole", b"");
        clone_file(&src, &whole).unwrap();
        assert_eq!(blocks(&src), blocks(&whole), "{fs:?}");
        assert_eq!(content(&src), content(&whole));
        let part = file(rig.path(), "part", &vec![0; MIB as usize]);
        clone_range(&src, 8192, 4096, &part, 65536).unwrap();
        let physical = |file: &File, at| blocks(file).iter().find(|(l, _)| *l == at).unwrap().1;
        assert_eq!(physical(&part, 65536), physical(&src, 8192), "{fs:?}");
        assert!(matches!(clone_range(&src, 1, 4096, &part, 0), Err(ReflinkError::Refused)));
    }
    let rig = rig(RigFs::Ext4);
    let (src, dest) = (file(rig.path(), "src", b"x"), file(rig.path(), "dest", b""));
    assert!(matches!(clone_file(&src, &dest), Err(ReflinkError::Unsupported)));
}

#[test]
fn privileged_dedupe_tells_each_destination_apart_and_changes_no_byte() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        // More than two chunks, and a tail that is no whole block.
        let length = 36 * MIB + 77;
        let good = bytes(length);
        let mut late = good.clone();
        late[33 * MIB as usize] ^= 1;
        let src = file(rig.path(), "src", &good);
        let same = file(rig.path(), "same", &good);
        let differs = file(rig.path(), "differs", &late);
        let short = file(rig.path(), "short", &good[..MIB as usize]);
        let dests = [&same, &differs, &short].map(|f| DedupeDest { fd: f.as_fd(), offset: 0 });
        let outcomes = dedupe(&src, 0, length, &dests).unwrap();
        assert!(matches!(outcomes[0], Deduped::Same), "{fs:?} {outcomes:?}");
        let Deduped::Differs { shared } = outcomes[1] else { panic!("{fs:?} {outcomes:?}") };
        assert_eq!(shared, 32 * MIB, "{fs:?}: two chunks were equal");
        assert!(matches!(outcomes[2], Deduped::Failed { .. }), "{fs:?} {outcomes:?}");
        assert_eq!(blocks(&same), blocks(&src), "{fs:?}");
        assert!(
            content(&same) == good && content(&differs) == late && content(&short) == good[..MIB as usize]
        );
        let equal = blocks(&differs).iter().zip(blocks(&src)).filter(|(a, b)| **a == *b).count() as u64;
        assert!(equal >= 32 * MIB / 4096, "{fs:?}: {equal} blocks shared");
    }
}

#[test]
fn privileged_more_destinations_than_one_call_takes() {
    let rig = rig(RigFs::Xfs);
    let good = bytes(65536);
    let src = file(rig.path(), "src", &good);
    let files: Vec<File> = (0..150).map(|i| file(rig.path(), &format!("d{i}"), &good)).collect();
    let dests: Vec<_> = files.iter().map(|f| DedupeDest { fd: f.as_fd(), offset: 0 }).collect();
    let outcomes = dedupe(&src, 0, 65536, &dests).unwrap();
    assert_eq!(outcomes.len(), 150);
    assert!(outcomes.iter().all(|o| matches!(o, Deduped::Same)));
    assert!(files.iter().all(|f| blocks(f) == blocks(&src)));
}
