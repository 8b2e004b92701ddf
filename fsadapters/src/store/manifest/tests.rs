//! Trees go there and back; damaged bytes are told, never believed.

use super::*;
use crate::sealed::tree::{Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts};

const STORE: StoreId = StoreId([9; 16]);

fn inode(number: u64, node: Node) -> Inode {
    let xattrs = if number.is_multiple_of(3) {
        vec![(b"user.a"[..].into(), b"1"[..].into()), (b"user.b"[..].into(), b""[..].into())]
    } else {
        Vec::new()
    };
    let meta = Meta { mode: 0o4755, uid: 7, gid: number as u32 % 3, mtime: (-5, 999_999_999), xattrs };
    let size = if matches!(node, Node::File { .. }) { number * 100 } else { 0 };
    let raw =
        RawFacts { ino: 1 << 40 | number, ctime: (1 << 33, number as u32), size, links: 1, signature: None };
    Inode { meta, raw, node }
}

fn entry(parent: u32, name: &str, inode: u32) -> Entry {
    Entry { parent: EntryId(parent), name: name.as_bytes().into(), inode: InodeIndex(inode) }
}

/// A root with every kind of thing and `files` files.
fn sample(files: u64) -> Tree {
    let mut tree = Tree { entries: vec![entry(0, "", 0)], inodes: vec![inode(0, Node::Dir)] };
    let nodes = [
        ("a", Node::Dir),
        ("b", Node::Symlink(b"to/there"[..].into())),
        ("c", Node::Fifo),
        ("d", Node::Socket),
        ("e", Node::CharDevice(0x0103)),
        ("f", Node::BlockDevice(u64::MAX)),
        ("g", Node::File { size: 600, data: Data::Anchor(AnchorKey([0x5a; 32])) }),
        ("h", Node::File { size: 0, data: Data::Empty }),
    ];
    for (number, (name, node)) in nodes.into_iter().enumerate() {
        tree.inodes.push(inode(number as u64, node));
        tree.entries.push(entry(0, name, number as u32 + 1));
    }
    for number in 0..files {
        let data = Data::Anchor(AnchorKey::of(STORE, number * 2));
        tree.entries.push(entry(1, &format!("file {number:07}"), tree.inodes.len() as u32));
        tree.inodes.push(inode(number, Node::File { size: number * 100, data }));
    }
    // A hard link.
    tree.entries.push(entry(1, "z", tree.inodes.len() as u32 - 1));
    tree
}

fn serial(key: &AnchorKey) -> Option<u64> {
    (0..40_000).find(|n| AnchorKey::of(STORE, *n) == *key)
}

#[test]
fn trees_go_there_and_back_with_and_without_numbers() {
    let tree = sample(50);
    assert_eq!(decode(&encode(&tree, None).unwrap()).unwrap(), tree);
    let numbers = Numbers { store: STORE, of: &serial };
    let short = encode(&tree, Some(&numbers)).unwrap();
    assert_eq!(decode(&short).unwrap(), tree);
    // A number that leads to another key is not believed.
    let wrong = Numbers { store: STORE, of: &|key| serial(key).map(|n| n + 1) };
    assert_eq!(decode(&encode(&tree, Some(&wrong)).unwrap()).unwrap(), tree);
}

#[test]
fn ten_thousand_files_take_little() {
    let tree = sample(10_000);
    let known: std::collections::HashMap<_, _> = (0..20_000).map(|n| (AnchorKey::of(STORE, n), n)).collect();
    let numbers = Numbers { store: STORE, of: &|key| known.get(key).copied() };
    let bytes = encode(&tree, Some(&numbers)).unwrap();
    assert!(bytes.len() < 100_000, "{} bytes", bytes.len());
    assert_eq!(decode(&bytes).unwrap(), tree);
}

#[test]
fn a_file_is_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let tree = sample(3);
    let size = write_manifest(dir.path(), &tree, None).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join(MANIFEST_FILE)).unwrap().len(), size);
    assert_eq!(read_manifest(dir.path()).unwrap(), tree);
    assert!(!dir.path().join("manifest.new").exists());
    let error = read_manifest(&dir.path().join("none")).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
}

#[test]
fn every_flipped_bit_is_seen_and_every_prefix_is_short() {
    let bytes = encode(&sample(2), None).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(decode(&damaged).is_err(), "byte {at}");
        assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
    }
}

/// The bytes of a manifest around a body that somebody chose.
fn sealed_by_hand(body: &[u8]) -> Vec<u8> {
    let mut rest = (body.len() as u64).to_le_bytes().to_vec();
    rest.extend(zstd::bulk::compress(body, 1).unwrap());
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(blake3::hash(&rest).as_bytes());
    bytes.extend(rest);
    bytes
}

#[test]
fn bodies_with_a_right_checksum_and_wrong_contents_never_panic_nor_break_an_invariant() {
    let body = encode::body(&sample(20), None);
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    for _ in 0..20_000 {
        let mut damaged = body.clone();
        for _ in 0..1 + next() % 4 {
            let at = next() % damaged.len();
            damaged[at] = [0, 1, 0x7f, 0x80, 0xff, next() as u8][next() % 6];
        }
        if let Ok(tree) = decode(&sealed_by_hand(&damaged)) {
            assert_tree(&tree);
        }
    }
    for length in 0..body.len().min(400) {
        assert!(decode(&sealed_by_hand(&body[..length])).is_err());
    }
}

/// The invariants of `sealed::tree`, said otherwise than in the decoder.
fn assert_tree(tree: &Tree) {
    assert_eq!(tree.inode(EntryId(0)).node, Node::Dir);
    let mut names = std::collections::HashSet::new();
    for (number, entry) in tree.entries.iter().enumerate().skip(1) {
        assert!((entry.parent.0 as usize) < number);
        assert_eq!(tree.inode(entry.parent).node, Node::Dir);
        assert!(names.insert((entry.parent, entry.name.clone())));
        assert!(!entry.name.is_empty() && !entry.name.iter().any(|b| matches!(b, 0 | b'/')));
    }
}

#[test]
fn a_bomb_is_not_unpacked() {
    let body = vec![0u8; 64 << 20];
    let packed = zstd::bulk::compress(&body, 19).unwrap();
    assert!(packed.len() < 100_000);
    assert_eq!(unpack(&packed, 1000), Err(Damage::Short));
    assert_eq!(unpack(&packed, u64::MAX), Err(Damage::Short));
}
