//! Extents of every kind on real XFS, btrfs and ext4: what may be called equal, what is zero, what stays undecided.
//!
//! Each figure is stated by hand from how the files were made; `--content` must then decide all of it by bytes.
//! XFS real-time files are not here: see `privileged_this_kernel_mounts_no_xfs_with_a_realtime_device`.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mounted, PAGE, dir, noise, overwrite_page, reflink, rig, run, scan, sync, write, write_at};
use pagefold_testfs::rig::{LoopRig, RigFs};
use rustix::fs::FallocateFlags;

const ALL: [RigFs; 5] = [RigFs::Xfs, RigFs::XfsSmallBlocks, RigFs::Btrfs, RigFs::BtrfsZstd, RigFs::Ext4];

fn truncate(path: &Path, size: u64) {
    File::options().write(true).open(path).and_then(|f| f.set_len(size)).expect("truncated");
}

fn fallocate(path: &Path, flags: FallocateFlags, offset: u64, bytes: u64) {
    let file = File::options().write(true).create(true).truncate(false).open(path).expect("writable");
    rustix::fs::fallocate(&file, flags, offset, bytes).expect("allocated");
}

#[test]
fn privileged_holes_and_unwritten_extents_are_zero_pages() {
    for fs in ALL {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        // 10 data pages between holes of 16 and 8 pages.
        write_at(&root.join("holes"), 16 * PAGE, 1, 10 * PAGE as usize);
        truncate(&root.join("holes"), 34 * PAGE);
        fallocate(&root.join("unwritten"), FallocateFlags::empty(), 0, 20 * PAGE);
        // Allocated beyond EOF: no page of the file.
        write(&root.join("beyond"), 2, 100);
        fallocate(&root.join("beyond"), FallocateFlags::KEEP_SIZE, 0, 50 * PAGE);
        File::create(root.join("empty")).expect("created");
        sync(rig.path());
        // 100 bytes: inline on btrfs, anywhere in a page with small blocks.
        let may_be_undecided = !matches!(fs, RigFs::Xfs | RigFs::Ext4);
        let found = scan(&[&root], &[]);
        found.expect_clean();
        found.expect(&[
            ("files", 4),
            ("logical_bytes", 54 * PAGE + 100),
            ("cache_bytes", 11 * PAGE),
            ("zero_bytes", 44 * PAGE),
            ("mergeable_page_bytes", 0),
        ]);
        let undecided = found.total("undecided_bytes");
        assert!(undecided == 0 || may_be_undecided && undecided == PAGE, "{fs:?} {:#}", found.json);
        let content = scan(&[&root], &["--content"]);
        content.expect_clean();
        content.expect(&[("cache_bytes", 11 * PAGE), ("zero_bytes", 44 * PAGE), ("undecided_bytes", 0)]);
    }
}

#[test]
fn privileged_a_write_into_unwritten_space_and_zeros_written_are_content() {
    for fs in ALL {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        fallocate(&root.join("f"), FallocateFlags::empty(), 0, 20 * PAGE);
        // Zeros that were written are ordinary content, and equal.
        fs::write(root.join("zeros"), vec![0; 8 * PAGE as usize]).expect("written");
        sync(rig.path());
        write_at(&root.join("f"), 5 * PAGE, 1, PAGE as usize);
        // Not synced: no page may be called zero that might hold the write.
        let dirty = scan(&[&root], &[]);
        dirty.expect_clean();
        assert!(dirty.total("zero_bytes") <= 19 * PAGE, "{fs:?} {:#}", dirty.json);
        assert!(dirty.total("undecided_bytes") >= PAGE, "{fs:?} {:#}", dirty.json);
        sync(rig.path());
        let found = scan(&[&root], &["--content"]);
        found.expect_clean();
        found.expect(&[
            ("zero_bytes", 19 * PAGE),
            ("cache_bytes", 9 * PAGE),
            ("mergeable_page_bytes", 7 * PAGE),
            ("mergeable_file_bytes", 0),
        ]);
    }
}

#[test]
fn privileged_delayed_allocation_is_undecided_until_written_back() {
    for fs in ALL {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        for i in 0..4 {
            write(&root.join(i.to_string()), 7, 10 * PAGE as usize);
        }
        let dirty = scan(&[&root], &[]);
        dirty.expect_clean();
        dirty.expect(&[
            ("cache_bytes", 40 * PAGE),
            ("undecided_bytes", 40 * PAGE),
            ("mergeable_page_bytes", 0),
            ("zero_bytes", 0),
            ("resident_bytes", 40 * PAGE),
            ("resident_duplicate_bytes", 0),
        ]);
        let content = scan(&[&root], &["--content"]);
        content.expect_clean();
        content.expect(&[
            ("mergeable_file_bytes", 30 * PAGE),
            ("undecided_bytes", 0),
            ("resident_duplicate_bytes", 30 * PAGE),
        ]);
    }
}

#[test]
fn privileged_inline_files_are_undecided_and_read() {
    let rig = rig(RigFs::Btrfs);
    let root = dir(rig.path(), "root");
    for i in 0..6 {
        write(&root.join(i.to_string()), i / 2, 700);
    }
    sync(rig.path());
    let found = scan(&[&root], &[]);
    found.expect_clean();
    found.expect(&[("cache_bytes", 6 * PAGE), ("undecided_bytes", 6 * PAGE), ("mergeable_page_bytes", 0)]);
    let content = scan(&[&root], &["--content"]);
    content.expect_clean();
    content.expect(&[("mergeable_file_bytes", 3 * PAGE), ("undecided_bytes", 0)]);
}

#[test]
fn privileged_compressed_extents_repeat_an_address_and_decide_nothing() {
    let rig = rig(RigFs::BtrfsZstd);
    let root = dir(rig.path(), "root");
    // Compressible, yet no two pages alike.
    let page = |n: u64| {
        let mut page = vec![b'.'; PAGE as usize];
        page[..8].copy_from_slice(&n.to_le_bytes());
        page
    };
    let text: Vec<u8> = (0..64).flat_map(page).collect();
    fs::write(root.join("a"), &text).expect("written");
    sync(rig.path());
    reflink(&root.join("a"), &root.join("b"));
    sync(rig.path());
    let found = scan(&[&root], &[]);
    found.expect_clean();
    found.expect(&[("undecided_bytes", 128 * PAGE), ("mergeable_page_bytes", 0)]);
    let content = scan(&[&root], &["--content"]);
    content.expect_clean();
    content.expect(&[("undecided_bytes", 0), ("mergeable_file_bytes", 64 * PAGE)]);
    // Within one compressed extent every page has the same address: still no page of one file equals another.
    fs::remove_file(root.join("b")).expect("removed");
    scan(&[&root], &["--content"]).expect(&[("undecided_bytes", 0), ("mergeable_page_bytes", 0)]);
}

#[test]
fn privileged_partly_shared_files_share_what_they_share() {
    for fs in [RigFs::Xfs, RigFs::XfsSmallBlocks, RigFs::Btrfs] {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        write(&root.join("a"), 1, 100 * PAGE as usize);
        sync(rig.path());
        reflink(&root.join("a"), &root.join("overwritten"));
        overwrite_page(&root.join("overwritten"), 50, 2);
        reflink(&root.join("a"), &root.join("shorter"));
        truncate(&root.join("shorter"), 30 * PAGE);
        reflink(&root.join("a"), &root.join("punched"));
        fallocate(
            &root.join("punched"),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            10 * PAGE,
        );
        // The same pages at other offsets, and some of them twice in one file.
        let moved = File::create(root.join("moved")).expect("created");
        let a = File::open(root.join("a")).expect("opens");
        for (from, to) in [(20, 0), (20, 5), (99, 7)] {
            pagefold_sys::reflink::clone_range(a.as_fd(), from * PAGE, PAGE, moved.as_fd(), to * PAGE)
                .expect("cloned");
        }
        sync(rig.path());
        let found = scan(&[&root], &[]);
        found.expect_clean();
        found.expect(&[
            ("undecided_bytes", 0),
            ("cache_bytes", (100 + 100 + 30 + 90 + 3) * PAGE),
            ("zero_bytes", (10 + 5) * PAGE),
            ("mergeable_file_bytes", 0),
            // Distinct: the 100 pages of `a` and the one overwritten.
            ("mergeable_page_bytes", (99 + 30 + 90 + 3) * PAGE),
        ]);
        let content = scan(&[&root], &["--content"]);
        content.expect(&[("mergeable_page_bytes", (99 + 30 + 90 + 3) * PAGE), ("mergeable_file_bytes", 0)]);
    }
}

/// Only blocks smaller than a page let two files of different sizes share the block their last page begins with.
#[test]
fn privileged_tails_of_different_sizes_are_not_equal() {
    let rig = rig(RigFs::XfsSmallBlocks);
    let root = dir(rig.path(), "root");
    // Long, so that it begins at a page boundary of the disk.
    write(&root.join("whole"), 1, 100 * PAGE as usize);
    sync(rig.path());
    for (name, size) in [("cut-1", PAGE + 1024), ("cut-2", PAGE + 1024), ("cut-3", PAGE + 2048)] {
        reflink(&root.join("whole"), &root.join(name));
        truncate(&root.join(name), size);
    }
    sync(rig.path());
    let found = scan(&[&root], &[]);
    found.expect_clean();
    found.expect(&[
        ("undecided_bytes", 0),
        ("cache_bytes", 106 * PAGE),
        ("mergeable_file_bytes", 2 * PAGE),
        // First pages: 3 of 4; tails: only those of one length.
        ("mergeable_page_bytes", 4 * PAGE),
    ]);
    let content = scan(&[&root], &["--content"]);
    content.expect(&[("mergeable_page_bytes", 4 * PAGE), ("mergeable_file_bytes", 2 * PAGE)]);
}

#[test]
fn privileged_reflinked_tails_of_one_size_are_equal_and_others_not() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let root = dir(rig.path(), "root");
        write(&root.join("a"), 1, 10_000);
        sync(rig.path());
        reflink(&root.join("a"), &root.join("same"));
        reflink(&root.join("a"), &root.join("appended"));
        common::append(&root.join("appended"), b"x");
        sync(rig.path());
        let found = scan(&[&root], &[]);
        found.expect_clean();
        found.expect(&[("mergeable_file_bytes", 3 * PAGE), ("mergeable_page_bytes", 5 * PAGE)]);
    }
}

/// Two file systems from one image: every address is equal, and so is the UUID.
fn twins(fs: RigFs, check: impl Fn(&Path, &Path)) {
    let home = rig(RigFs::Xfs);
    let image = home.path().join("one.img");
    pagefold_testfs::rig::make_image(fs, &image, 600 << 20).unwrap_or_else(|e| panic!("{e}"));
    let mount = |image: &Path, at: &str| {
        let image = image.to_str().expect("UTF-8");
        let options = if fs.kind() == "xfs" { "loop,nouuid" } else { "loop" };
        Mounted::new(&["-t", fs.kind(), "-o", options, image], &home.path().join(at))
    };
    {
        let first = mount(&image, "one");
        let root = dir(&first.0, "root");
        write(&root.join("a"), 1, 20 * PAGE as usize);
        write(&root.join("b"), 2, 20 * PAGE as usize);
        sync(&first.0);
    }
    let copy = home.path().join("two.img");
    fs::copy(&image, &copy).expect("copied");
    let (one, two) = (mount(&image, "one"), mount(&copy, "two"));
    // Same addresses, other bytes: overwritten in place, for nothing is shared within one of them.
    let file = File::options().write(true).open(two.0.join("root/b")).expect("writable");
    file.write_all_at(&noise(3, 20 * PAGE as usize), 0).expect("written");
    sync(&two.0);
    check(&one.0.join("root"), &two.0.join("root"));
}

#[test]
fn privileged_one_address_on_two_devices_with_one_uuid_is_not_equal() {
    for fs in [RigFs::Xfs, RigFs::Ext4, RigFs::Btrfs] {
        twins(fs, |one, two| {
            let found = scan(&[one, two], &["--matrix"]);
            found.expect(&[("files", 4), ("mergeable_page_bytes", 0), ("undecided_bytes", 0)]);
            found.expect_clean();
            assert_eq!(found.json["matrix"][0][1], 0);
            // The bytes of one file are equal after all.
            let content = scan(&[one, two], &["--content"]);
            content.expect_clean();
            content.expect(&[("mergeable_file_bytes", 20 * PAGE), ("mergeable_page_bytes", 20 * PAGE)]);
        });
    }
}

/// As container runtimes mount `/etc/hosts`: a file of another file system among files of this one.
#[test]
fn privileged_a_file_mounted_from_a_twin_is_not_equal() {
    twins(RigFs::Xfs, |one, two| {
        write(&one.join("x"), 4, PAGE as usize);
        sync(one);
        let of_two = two.join("b");
        let mounted = Mounted::file(&of_two, &one.join("x"));
        // `b` has the address of its namesake on the twin, and other bytes.
        let found = scan(&[one], &[]);
        found.expect_clean();
        found.expect(&[("files", 2), ("mergeable_page_bytes", 0), ("undecided_bytes", 0)]);
        let named = found.skipped();
        assert_eq!(named.len(), 1, "{named:?}");
        assert!(named[0].0.ends_with("/x") && named[0].1.contains("another file system"), "{named:?}");
        for extra in [&["--no-one-file-system"][..], &["--no-one-file-system", "--content"]] {
            let found = scan(&[one], extra);
            found.expect(&[("files", 3), ("cache_bytes", 60 * PAGE), ("mergeable_page_bytes", 0)]);
        }
        // A file of the same file system, mounted over another, is one more name of it.
        drop(mounted);
        let _mounted = Mounted::file(&one.join("a"), &one.join("x"));
        let found = scan(&[one], &[]);
        found.expect_clean();
        found.expect(&[("files", 2), ("hard_links", 1), ("cache_bytes", 40 * PAGE)]);
    });
}

#[test]
fn privileged_one_address_on_two_file_systems_is_not_equal() {
    let rigs: Vec<LoopRig> = [RigFs::Xfs, RigFs::Xfs].map(rig).into();
    let roots: Vec<_> = rigs.iter().map(|r| dir(r.path(), "root")).collect();
    for (at, root) in roots.iter().enumerate() {
        write(&root.join("f"), at as u64 + 1, 50 * PAGE as usize);
        sync(root);
    }
    let found = scan(&[&roots[0], &roots[1]], &["--matrix"]);
    found.expect_clean();
    found.expect(&[("undecided_bytes", 0), ("mergeable_page_bytes", 0)]);
    assert_eq!(found.root(0, "shared_with_others_bytes"), 0);
}

/// What can't be tested on this kernel stands in `docs/untested.md`. Should this fail, that has become testable.
#[test]
fn privileged_this_kernel_mounts_no_xfs_with_a_realtime_device() {
    let home = rig(RigFs::Ext4);
    let (data, realtime) = (home.path().join("data.img"), home.path().join("rt.img"));
    for image in [&data, &realtime] {
        File::create(image).and_then(|f| f.set_len(320 << 20)).expect("sized");
    }
    let option = format!("rtdev={}", realtime.display());
    run(
        "mkfs.xfs",
        &["-q", "-f", "-r", &option]
            .map(OsStr::new)
            .into_iter()
            .chain([data.as_os_str()])
            .collect::<Vec<_>>(),
    );
    let attach = || {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&realtime)
            .output()
            .expect("this test needs losetup");
        String::from_utf8(output.stdout).expect("a path").trim().to_owned()
    };
    let device = attach();
    let at = dir(home.path(), "at");
    let options = format!("loop,rtdev={device}");
    let status = std::process::Command::new("mount")
        .args(["-t", "xfs", "-o", &options])
        .args([&data, &at])
        .output()
        .expect("this test needs mount");
    if status.status.success() {
        drop(Mounted(at));
    }
    run("losetup", &["-d", &device].map(OsStr::new));
    assert!(
        !status.status.success(),
        "this kernel has XFS real-time files: test them, and change docs/untested.md"
    );
}
