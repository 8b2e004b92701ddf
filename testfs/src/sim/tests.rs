//! Unit tests of the simulated file systems: what each operation does to map, cache and bytes.

use std::path::Path;

use pagefold_engine::layout::{ExtentFlags, RawExtent};

use super::*;

fn host(flavour: Flavour) -> World {
    World::new(flavour, PageSize::KIB4, 1)
}

fn written(w: &mut World, path: &str, len: usize) -> NodeId {
    let id = w.create(Path::new(path), false).unwrap();
    let data: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8 | 1).collect();
    w.write_at(id, 0, &data).unwrap();
    id
}

fn map(w: &World, id: NodeId) -> Vec<RawExtent> {
    let mut out = Vec::new();
    w.extent_map(id, &mut out).unwrap();
    out
}

fn flags(w: &World, id: NodeId) -> ExtentFlags {
    map(w, id).iter().fold(ExtentFlags::empty(), |a, e| a | e.flags)
}

#[test]
fn the_map_after_a_reflink_and_an_unsynced_overwrite_is_the_old_one_without_a_flag() {
    for flavour in [Flavour::Xfs, Flavour::Btrfs] {
        let mut w = host(flavour);
        let a = written(&mut w, "/a", 16 * 4096);
        let b = w.create(Path::new("/b"), false).unwrap();
        w.reflink(a, b).unwrap();
        let before = map(&w, b);
        w.write_at(b, 4096, &[9; 4096]).unwrap();
        assert_eq!(map(&w, b), before, "{flavour:?}");
        assert!(!flags(&w, b).contains(ExtentFlags::DELALLOC));
        assert!(flags(&w, b).contains(ExtentFlags::SHARED));
        w.begin_writeback(b).unwrap();
        assert_eq!((w.cache_counts(b).unwrap().dirty, w.cache_counts(b).unwrap().writeback), (0, 1));
        assert_eq!(map(&w, b), before, "{flavour:?}: in writeback the map is still the old one");
        w.finish_writeback(b).unwrap();
        assert_ne!(map(&w, b), before, "{flavour:?}");
        assert_eq!(w.peek_page(b, 1).unwrap(), [9; 4096]);
        assert_ne!(w.peek_page(a, 1).unwrap(), [9; 4096]);
    }
}

#[test]
fn xfs_overwrites_unshared_blocks_in_place_and_btrfs_never_does() {
    for (flavour, in_place) in [(Flavour::Xfs, true), (Flavour::Btrfs, false)] {
        let mut w = host(flavour);
        let a = written(&mut w, "/a", 4 * 4096);
        w.sync(a).unwrap();
        let before = map(&w, a);
        w.write_at(a, 0, &[1; 4 * 4096]).unwrap();
        w.sync(a).unwrap();
        assert_eq!(map(&w, a) == before, in_place, "{flavour:?}");
    }
}

#[test]
fn delayed_allocation_inline_and_compression_show_as_their_flavour_shows_them() {
    let mut w = host(Flavour::Xfs);
    let a = written(&mut w, "/a", 100);
    assert!(flags(&w, a).contains(ExtentFlags::DELALLOC));
    w.sync(a).unwrap();
    assert!(!flags(&w, a).intersects(ExtentFlags::DELALLOC | ExtentFlags::DATA_INLINE));

    let mut w = host(Flavour::BtrfsZstd);
    let small = written(&mut w, "/s", 100);
    w.sync(small).unwrap();
    assert!(flags(&w, small).contains(ExtentFlags::DATA_INLINE));
    w.write_at(small, 90, &[5; 4000]).unwrap();
    w.sync(small).unwrap();
    assert!(!flags(&w, small).contains(ExtentFlags::DATA_INLINE), "grew out of its inline place");
    assert_eq!(&w.peek_all(small).unwrap()[90..], [5; 4000]);

    let big = w.create(Path::new("/big"), false).unwrap();
    w.write_at(big, 0, &vec![3; 64 * 4096]).unwrap();
    w.sync(big).unwrap();
    let extents = map(&w, big);
    assert!(extents.iter().all(|e| e.flags.contains(ExtentFlags::ENCODED)));
    assert_eq!(w.peek_all(big).unwrap(), vec![3; 64 * 4096]);
    let mut addresses: Vec<u64> = extents.iter().map(|e| e.physical).collect();
    addresses.dedup();
    assert!(addresses.len() < extents.len() || extents.len() <= 2, "slices of one extent repeat its address");
}

#[test]
fn unwritten_extents_read_zeros_and_under_dirty_pages_differ_by_flavour() {
    for (flavour, delalloc) in [(Flavour::Xfs, false), (Flavour::Btrfs, true)] {
        let mut w = host(flavour);
        let a = w.create(Path::new("/a"), false).unwrap();
        w.fallocate(a, 0, 8 * 4096, false).unwrap();
        assert!(flags(&w, a).contains(ExtentFlags::UNWRITTEN));
        assert_eq!(w.peek_all(a).unwrap(), vec![0; 8 * 4096]);
        w.write_at(a, 0, &[7; 4096]).unwrap();
        assert_eq!(flags(&w, a).contains(ExtentFlags::DELALLOC), delalloc, "{flavour:?}");
        w.sync(a).unwrap();
        w.evict(a).unwrap();
        assert_eq!(w.peek_page(a, 0).unwrap(), [7; 4096]);
        assert_eq!(w.peek_page(a, 1).unwrap(), [0; 4096]);
    }
}

#[test]
fn relocation_changes_every_address_and_no_byte() {
    let mut w = host(Flavour::Btrfs);
    let a = written(&mut w, "/a", 40 * 4096);
    let b = w.create(Path::new("/b"), false).unwrap();
    w.reflink(a, b).unwrap();
    let (before, bytes) = (map(&w, a), w.peek_all(a).unwrap());
    w.relocate(FsIx(0));
    w.evict(a).unwrap();
    assert_eq!(w.peek_all(a).unwrap(), bytes);
    assert_eq!(map(&w, a), map(&w, b), "still shared");
    assert_ne!(map(&w, a)[0].physical, before[0].physical);
}

#[test]
fn snapshots_keep_inode_numbers_and_change_the_device() {
    let mut w = host(Flavour::Btrfs);
    w.mkdir(Path::new("/root")).unwrap();
    let a = written(&mut w, "/root/a", 8192);
    w.link(Path::new("/root/a"), Path::new("/root/b")).unwrap();
    w.snapshot(Path::new("/root"), Path::new("/snap")).unwrap();
    let copy = w.resolve(Path::new("/snap/a"), false).unwrap().node;
    assert_eq!(w.resolve(Path::new("/snap/b"), false).unwrap().node, copy, "a hard link stays one inode");
    let (x, y) = (w.stat(a).unwrap().inode, w.stat(copy).unwrap().inode);
    assert!(x.ino == y.ino && x.dev != y.dev);
    assert_eq!(map(&w, a), map(&w, copy));
}

#[test]
fn space_runs_out_with_enospc_and_nothing_is_written() {
    let mut w = host(Flavour::Xfs);
    w.fses[0].data.capacity_blocks = Some(4);
    let a = w.create(Path::new("/a"), false).unwrap();
    w.write_at(a, 0, &[1; 4096]).unwrap();
    w.sync(a).unwrap();
    let full = w.write_at(a, 0, &[2; 8 * 4096]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(28));
    assert_eq!(w.peek_all(a).unwrap(), [1; 4096]);
}

#[test]
fn mounts_and_symlinks_lead_where_they_should() {
    let mut w = host(Flavour::Xfs);
    for dir in ["/m", "/bound", "/d"] {
        w.mkdir(Path::new(dir)).unwrap();
    }
    w.mount_new(Path::new("/m"), Flavour::Tmpfs).unwrap();
    let inside = written(&mut w, "/m/x", 10);
    w.bind(Path::new("/d"), Path::new("/bound")).unwrap();
    let y = written(&mut w, "/d/y", 10);
    assert_eq!(w.resolve(Path::new("/bound/y"), false).unwrap().node, y);
    assert_ne!(w.resolve(Path::new("/bound"), false).unwrap().mount, 0);
    assert_ne!(w.stat(inside).unwrap().inode.dev, w.stat(y).unwrap().inode.dev);
    w.symlink(Path::new("/loop"), Path::new("/loop")).unwrap();
    assert_eq!(w.resolve(Path::new("/loop"), true).unwrap_err().raw_os_error(), Some(40));
    w.symlink(Path::new("d"), Path::new("/to_d")).unwrap();
    assert_eq!(w.resolve(Path::new("/to_d/y"), false).unwrap().node, y);
}

#[test]
fn two_seeds_differ_and_one_does_not() {
    let run = |seed| {
        let mut w = World::new(Flavour::Btrfs, PageSize::KIB4, seed);
        let a = written(&mut w, "/a", 30 * 4096);
        w.sync(a).unwrap();
        w.relocate(FsIx(0));
        map(&w, a)
    };
    assert_eq!(run(5), run(5));
    assert!((0..20).any(|s| run(s) != run(5)));
}
