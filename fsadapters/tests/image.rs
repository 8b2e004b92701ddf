//! No tree makes the image writer panic: what it can't hold is refused before; what it holds is the same bytes each time.
//!
//! The trees are as hostile as a walk or a damaged manifest could make them: names of any length, attributes around all limits,
//! devices, links, and entries that break the tree's own invariant.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pagefold_fsadapters::sealed::image::{Why, build, check, uuid_of};
use pagefold_fsadapters::sealed::tree::{
    Data, Entry, EntryId, Inode, InodeIndex, Meta, Node, RawFacts, Tree, Xattr,
};
use pagefold_fsadapters::store::key::AnchorKey;
use proptest::collection::vec;
use proptest::prelude::*;

fn node() -> impl Strategy<Value = Node> {
    let sizes = prop_oneof![0..5000u64, (0..63u32).prop_map(|b| 1 << b), Just(u64::MAX), Just(1 << 52)];
    prop_oneof![
        4 => Just(Node::Dir),
        4 => (sizes, any::<u8>()).prop_map(|(size, key)| {
            Node::File { size, data: Data::Anchor(AnchorKey([key; 32])) }
        }),
        1 => (0..2u64).prop_map(|size| Node::File { size, data: Data::Empty }),
        1 => prop_oneof![0..100usize, 3900..4200usize]
            .prop_map(|n| Node::Symlink(vec![b'l'; n].into())),
        1 => Just(Node::Fifo),
        1 => Just(Node::Socket),
        1 => prop_oneof![0..3u64, Just(0xffff_ffff), Just(0x1_0000_0000)].prop_map(Node::CharDevice),
        1 => prop_oneof![0..3u64, Just(u64::MAX)].prop_map(Node::BlockDevice),
    ]
}

fn xattr() -> impl Strategy<Value = Xattr> {
    let prefix = prop_oneof![
        4 => Just("user."),
        2 => Just("security."),
        2 => Just("trusted."),
        2 => Just("trusted.overlay."),
        1 => Just("system.posix_acl_access"),
        1 => Just("system.posix_acl_default"),
        1 => Just("lustre."),
        1 => Just("system.nfs4_acl"),
        1 => Just(""),
    ];
    let rest = prop_oneof![6 => 0..20usize, 1 => 220..260usize];
    let value = prop_oneof![8 => 0..40usize, 2 => 0..5000usize, 1 => 65_530..65_540usize];
    (prefix, rest, value, any::<u8>()).prop_map(|(prefix, rest, value, byte)| {
        let name = [prefix.as_bytes(), &vec![b'a' + byte % 26; rest]].concat();
        (name.into(), vec![byte; value].into())
    })
}

fn inode() -> impl Strategy<Value = Inode> {
    let xattrs = prop_oneof![6 => vec(xattr(), 0..3), 1 => vec(xattr(), 0..300)];
    let mode = prop_oneof![9 => 0..0o10000u32, 1 => any::<u32>()];
    let nanos = prop_oneof![9 => 0..1_000_000_000u32, 1 => any::<u32>()];
    (node(), xattrs, mode, any::<(u32, u32)>(), any::<i64>(), nanos).prop_map(
        |(node, mut xattrs, mode, (uid, gid), seconds, nanos)| {
            xattrs.sort();
            xattrs.dedup_by(|a, b| a.0 == b.0);
            let meta = Meta { mode, uid, gid, mtime: (seconds, nanos), xattrs };
            Inode { meta, raw: RawFacts::default(), node }
        },
    )
}

/// Mostly well-formed: parents are picked among the directories before, names are the entry's number with a tail.
fn tree() -> impl Strategy<Value = Tree> {
    let entry = (any::<prop::sample::Index>(), prop_oneof![12 => 0..30usize, 1 => 200..300usize], 0..20u8);
    vec((inode(), entry), 1..60).prop_map(|all| {
        let mut tree = Tree::default();
        let mut dirs = vec![0u32];
        for (index, (mut inode, (at, length, twist))) in all.into_iter().enumerate() {
            let number = index as u32;
            if index == 0 {
                inode.node = Node::Dir;
            }
            let mut entry = Entry {
                parent: EntryId(*at.get(&dirs)),
                name: [format!("{index:02x}").as_bytes(), &vec![b'n'; length]].concat().into(),
                inode: InodeIndex(number),
            };
            if index == 0 {
                entry = Entry { parent: EntryId(0), name: Box::default(), inode: InodeIndex(0) };
            } else if inode.node == Node::Dir {
                dirs.push(number);
            }
            match (twist, index) {
                // Another name of an inode before: a hard link, or a malformed tree.
                (0 | 1, 1..) => entry.inode = InodeIndex(number.saturating_sub(1)),
                (2, 1..) if length == 7 => entry.parent = EntryId(number),
                (3, 1..) if length == 7 => entry.name = b"..".as_slice().into(),
                (4, 1..) if length == 7 => entry.inode = InodeIndex(u32::MAX),
                (5, 1..) => entry.name = tree.entries[index - 1].name.clone(),
                _ => {}
            }
            tree.inodes.push(inode);
            tree.entries.push(entry);
        }
        tree
    })
}

/// The tree without what is refused, until nothing is.
fn tamed(mut tree: Tree) -> Tree {
    for inode in &mut tree.inodes {
        inode.meta.mode &= 0o7777;
        inode.meta.mtime.1 %= 1_000_000_000;
        inode.meta.xattrs.retain(|(name, value)| {
            let known = [&b"user."[..], b"security.", b"trusted."];
            known.iter().any(|p| name.starts_with(p) && name.len() > p.len())
                && name.len() < 240
                && value.len() < 65_536
        });
        inode.meta.xattrs.truncate(3);
        match &mut inode.node {
            Node::File { size, data: Data::Anchor(_) } => *size = (*size).min(1 << 52),
            Node::File { size, data: Data::Empty } => *size = 0,
            Node::Symlink(target) if target.is_empty() || target.len() > 4095 => {
                *target = b"t".as_slice().into();
            }
            Node::CharDevice(rdev) | Node::BlockDevice(rdev) if *rdev == 0 || *rdev > 0xffff_ffff => {
                *rdev = 5;
            }
            _ => {}
        }
    }
    for entry in &mut tree.entries {
        if entry.name.len() > 255 {
            entry.name = entry.name[..255].into();
        }
    }
    tree
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_tree_panics_the_writer(tree in tree()) {
        let built = catch_unwind(AssertUnwindSafe(|| build(&tree)));
        let built = built.expect("the writer panicked");
        prop_assert_eq!(built.is_ok(), check(&tree, 1).is_empty() && built.is_ok());
        if let Ok(image) = built {
            prop_assert_eq!(&image.bytes[1072..1088], &uuid_of(image.digest)[..]);
            prop_assert_eq!(build(&tree).unwrap().bytes, image.bytes);
        }
    }

    /// Otherwise the first test could pass by refusing everything.
    #[test]
    fn what_is_within_all_limits_is_built(tree in tree()) {
        let tree = tamed(tree);
        match catch_unwind(AssertUnwindSafe(|| build(&tree))).expect("the writer panicked") {
            Ok(_) => prop_assert!(check(&tree, 1).is_empty()),
            Err(refusal) => prop_assert!(matches!(refusal.why, Why::Malformed(_)), "{}", refusal),
        }
    }
}

#[test]
fn each_limit_is_refused_by_name() {
    let with = |node: Node, xattrs: Vec<(&str, usize)>, name: usize| {
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let xattrs = xattrs.iter().map(|(n, v)| (n.as_bytes().into(), vec![0; *v].into())).collect();
        let root = Inode { meta: meta.clone(), raw: RawFacts::default(), node: Node::Dir };
        let inode = Inode { meta: Meta { xattrs, ..meta }, raw: RawFacts::default(), node };
        let entry =
            |name: Vec<u8>, inode| Entry { parent: EntryId(0), name: name.into(), inode: InodeIndex(inode) };
        Tree { entries: vec![entry(vec![], 0), entry(vec![b'n'; name], 1)], inodes: vec![root, inode] }
    };
    let why = |tree: &Tree| build(tree).err().map(|r| r.why);
    assert_eq!(why(&with(Node::Fifo, vec![], 255)), None);
    assert_eq!(why(&with(Node::Fifo, vec![], 256)), Some(Why::NameLength(256)));
    assert_eq!(why(&with(Node::CharDevice(0), vec![], 1)), Some(Why::Whiteout));
    assert_eq!(why(&with(Node::Symlink(vec![b'x'; 4095].into()), vec![], 1)), None);
    assert_eq!(why(&with(Node::Symlink(vec![b'x'; 4096].into()), vec![], 1)), Some(Why::SymlinkLength(4096)));
    assert_eq!(why(&with(Node::Fifo, vec![("user.a", 65_535)], 1)), None);
    assert!(matches!(why(&with(Node::Fifo, vec![("user.a", 65_536)], 1)), Some(Why::XattrValue { .. })));
    let five: Vec<(&str, usize)> = ["user.a", "user.b", "user.c", "user.d"].map(|n| (n, 65_535)).to_vec();
    assert!(matches!(why(&with(Node::Fifo, five, 1)), Some(Why::XattrTotal { count: 4, .. })));
    assert!(matches!(why(&with(Node::Fifo, vec![("lustre.a", 1)], 1)), Some(Why::XattrName(_))));
    let long = "trusted.overlay.".to_string() + &"x".repeat(232);
    assert!(matches!(why(&with(Node::Fifo, vec![(&long, 1)], 1)), Some(Why::XattrName(_))));
    let long = "trusted.overlay.".to_string() + &"x".repeat(231);
    assert_eq!(why(&with(Node::Fifo, vec![(&long, 1)], 1)), None);
}
