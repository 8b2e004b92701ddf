//! Trees made to be counted wrongly: many names of one inode, roots upon roots, names, kinds and permissions.

mod common;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use common::{Mounted, PAGE, Scan, dir, public_binary, reflink, rig, run, scan, scan_as, sync, write};
use pagefold_testfs::rig::RigFs;
use rustix::fs::{FileType, Mode};

const NOBODY: u32 = 65_534;

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn privileged_hard_links_and_bind_mounts_count_once() {
    for fs in [RigFs::Xfs, RigFs::Btrfs] {
        let rig = rig(fs);
        let (a, b) = (dir(rig.path(), "a"), dir(rig.path(), "b"));
        write(&a.join("f"), 1, 10 * PAGE as usize);
        fs::hard_link(a.join("f"), a.join("g")).expect("linked");
        fs::hard_link(a.join("f"), b.join("h")).expect("linked");
        fs::hard_link(a.join("f"), rig.path().join("outside")).expect("linked");
        write(&b.join("own"), 2, PAGE as usize);
        sync(rig.path());
        let bound = Mounted::new(&["--bind", a.to_str().expect("UTF-8")], &dir(&b, "bound"));
        let found = scan(&[&a, &b], &[]);
        // The directory that is bound is a root itself: left out by name.
        found.expect(&[
            ("files", 2),
            ("hard_links", 2),
            ("cache_bytes", 11 * PAGE),
            ("logical_bytes", 11 * PAGE),
            ("mergeable_page_bytes", 0),
            ("resident_bytes", 11 * PAGE),
            ("resident_duplicate_bytes", 0),
        ]);
        assert_eq!(found.skipped().len(), 1, "{:?}", found.skipped());
        assert_eq!(found.skipped()[0].0, text(&bound.0));
        // Seen through the bind mount alone, and beside a subdirectory's bind mount.
        scan(&[&b], &[]).expect(&[("files", 2), ("hard_links", 2), ("cache_bytes", 11 * PAGE)]);
        let roots = [bound.0.as_path(), a.as_path()];
        let twice = scan(&roots, &[]);
        twice.expect(&[("files", 1), ("hard_links", 1), ("cache_bytes", 10 * PAGE)]);
        assert_eq!(twice.json["roots"].as_array().map(Vec::len), Some(1), "one directory under two names");
        let content = scan(&[&a, &b], &["--content"]);
        content.expect(&[("files", 2), ("hard_links", 2), ("mergeable_page_bytes", 0)]);
    }
}

#[test]
fn privileged_btrfs_snapshots_are_other_inodes_on_the_same_file_system() {
    let rig = rig(RigFs::Btrfs);
    let base = rig.path().join("base");
    let snapshot = rig.path().join("base/inner");
    run(
        "btrfs",
        &["subvolume", "create"].map(OsStr::new).into_iter().chain([base.as_os_str()]).collect::<Vec<_>>(),
    );
    write(&base.join("f"), 1, 10 * PAGE as usize);
    sync(rig.path());
    run(
        "btrfs",
        &["subvolume", "snapshot"]
            .map(OsStr::new)
            .into_iter()
            .chain([base.as_os_str(), snapshot.as_os_str()])
            .collect::<Vec<_>>(),
    );
    sync(rig.path());
    // The same inode number, another subvolume; --one-file-system does not stop there.
    let found = scan(&[&base], &[]);
    found.expect_clean();
    found.expect(&[("files", 2), ("hard_links", 0), ("mergeable_file_bytes", 10 * PAGE)]);
}

#[test]
fn privileged_a_root_given_twice_or_inside_another_counts_once() {
    let rig = rig(RigFs::Xfs);
    let outer = dir(rig.path(), "outer");
    let inner = dir(&outer, "x/inner");
    write(&outer.join("f"), 1, 4 * PAGE as usize);
    write(&inner.join("g"), 2, 8 * PAGE as usize);
    symlink(&outer, rig.path().join("link")).expect("linked");
    sync(rig.path());
    let link = rig.path().join("link");
    let dotted = outer.join("x/..");
    let found = scan(&[&outer, &link, &dotted, &outer], &[]);
    found.expect_clean();
    found.expect(&[("files", 2), ("hard_links", 0), ("cache_bytes", 12 * PAGE), ("mergeable_page_bytes", 0)]);
    assert_eq!(found.json["roots"].as_array().map(Vec::len), Some(1));
    assert_eq!(found.skipped().len(), 3, "{:?}", found.skipped());
    for roots in [[&outer, &inner], [&inner, &outer]] {
        let found = scan(&[roots[0], roots[1]], &[]);
        found.expect_clean();
        found.expect(&[("files", 2), ("cache_bytes", 12 * PAGE), ("hard_links", 0)]);
        assert_eq!(found.skipped().len(), 1);
        assert_eq!(found.skipped()[0].0, text(&inner));
        let of_inner = usize::from(roots[0] == &outer);
        assert_eq!(found.root(of_inner, "cache_bytes"), 8 * PAGE);
        assert_eq!(found.root(1 - of_inner, "cache_bytes"), 4 * PAGE);
    }
    // A root that is a symbolic link is followed: the user named it.
    let found = scan(&[&link], &[]);
    found.expect_clean();
    found.expect(&[("files", 2)]);
    assert_eq!(found.json["roots"][0]["path"], text(&link));
}

#[test]
fn privileged_symbolic_links_are_never_followed() {
    let rig = rig(RigFs::Xfs);
    let (root, elsewhere) = (dir(rig.path(), "root"), dir(rig.path(), "elsewhere"));
    write(&root.join("f"), 1, PAGE as usize);
    write(&elsewhere.join("secret"), 2, PAGE as usize);
    symlink(".", root.join("self")).expect("linked");
    symlink("..", dir(&root, "sub").join("up")).expect("linked");
    symlink("b", root.join("a")).expect("linked");
    symlink("a", root.join("b")).expect("linked");
    symlink("nowhere", root.join("dangling")).expect("linked");
    symlink(&elsewhere, root.join("out")).expect("linked");
    symlink("f", root.join("to-file")).expect("linked");
    sync(rig.path());
    for content in [&[][..], &["--content"]] {
        let found = scan(&[&root], content);
        found.expect_clean();
        found.expect(&[("files", 1), ("hard_links", 0), ("logical_bytes", PAGE)]);
    }
    // A root that is a loop of links can't be opened, and says so.
    let found = scan(&[&root.join("a")], &[]);
    assert_eq!(found.code, 2);
    assert!(found.errors()[0].1.contains("symbolic links"), "{:?}", found.errors());
}

#[test]
fn privileged_special_files_are_named_and_never_opened() {
    let rig = rig(RigFs::Xfs);
    let root = dir(rig.path(), "root");
    let node = |name: &str, kind, dev| {
        rustix::fs::mknodat(rustix::fs::CWD, root.join(name), kind, Mode::from_raw_mode(0o644), dev)
            .expect("a node");
    };
    node("fifo", FileType::Fifo, 0);
    // Opening these has effects: the watchdog, a tape, a disk, the memory.
    node("watchdog", FileType::CharacterDevice, rustix::fs::makedev(10, 130));
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("whiteout", FileType::CharacterDevice, 0);
    node("disk", FileType::BlockDevice, rustix::fs::makedev(7, 200));
    let _socket = UnixListener::bind(root.join("socket")).expect("bound");
    write(&root.join("f"), 1, PAGE as usize);
    sync(rig.path());
    for content in [&[][..], &["--content"]] {
        let found = scan(&[&root], content);
        found.expect_clean();
        found.expect(&[("files", 1), ("cache_bytes", PAGE)]);
        let named: Vec<String> = found.skipped().into_iter().map(|(path, _)| path).collect();
        let want = ["disk", "fifo", "null", "socket", "watchdog", "whiteout"].map(|n| text(&root.join(n)));
        assert_eq!(named, want);
    }
}

#[test]
fn privileged_names_of_any_bytes_are_counted_and_named() {
    let rig = rig(RigFs::Xfs);
    let root = dir(rig.path(), "root");
    let names: [&[u8]; 7] =
        [b"\xff\xfe", b"a\nb", b"\"quoted\\", b"\xc3\xa4", b"\xed\xa0\x80", b" ", &[b'n'; 255]];
    for (at, name) in names.iter().enumerate() {
        let dir = dir(&root, &at.to_string()).join(OsString::from_vec(name.to_vec()));
        fs::create_dir(&dir).expect("created");
        let file = dir.join(OsString::from_vec(name.to_vec()));
        write(&file, 1, 3 * PAGE as usize);
        rustix::fs::mknodat(rustix::fs::CWD, dir.join("p"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .expect("a FIFO");
    }
    sync(rig.path());
    for top in ["0", "20"] {
        let found = scan(&[&root], &["--content", "--top", top]);
        found.expect_clean();
        found.expect(&[("files", 7), ("mergeable_file_bytes", 18 * PAGE)]);
        assert!(found.skipped()[0].0.ends_with("/0/\\xff\\xfe/p"), "{:?}", found.skipped());
    }
    // The root itself may have such a name.
    let odd = root.join("0").join(OsString::from_vec(names[0].to_vec()));
    scan(&[&odd], &[]).expect(&[("files", 1)]);
}

#[test]
fn privileged_an_unprivileged_user_is_told_what_it_could_not_see() {
    let rig = rig(RigFs::Xfs);
    let binary = public_binary(rig.path());
    fs::set_permissions(rig.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    let root = dir(rig.path(), "root");
    for (name, mode) in [("closed", 0o700), ("no-list", 0o711), ("no-enter", 0o744)] {
        write(&dir(&root, name).join("f"), 1, PAGE as usize);
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).expect("mode");
    }
    write(&root.join("private"), 2, PAGE as usize);
    fs::set_permissions(root.join("private"), fs::Permissions::from_mode(0o600)).expect("mode");
    write(&root.join("public"), 3, 5 * PAGE as usize);
    reflink(&root.join("public"), &root.join("copy"));
    let own = root.join("own");
    write(&own, 4, 5 * PAGE as usize);
    std::os::unix::fs::chown(&own, Some(NOBODY), Some(NOBODY)).expect("given away");
    sync(rig.path());
    let found = scan_as(NOBODY, &binary, &[&root], &[]);
    assert_eq!(found.code, 1);
    let named: Vec<String> = found.errors().into_iter().map(|(path, _)| path).collect();
    for missing in ["closed", "no-list", "no-enter/f", "private"] {
        assert!(named.contains(&text(&root.join(missing))), "{missing}: {named:?}");
    }
    found.expect(&[
        ("files", 3),
        ("cache_bytes", 15 * PAGE),
        // Whether root's files are dirty is not for this user to know: nothing is called equal.
        ("undecided_bytes", 10 * PAGE),
        ("mergeable_page_bytes", 0),
    ]);
    // Cached pages of the two are not in the figure, and the report must say so.
    assert_eq!(found.total("resident_bytes"), 5 * PAGE);
    let says = |scan: &Scan| scan.errors().iter().any(|(_, e)| e.contains("cached"));
    assert!(says(&found), "resident_bytes lacks files and nothing says so: {:?}", found.errors());
    let content = scan_as(NOBODY, &binary, &[&root], &["--content"]);
    content.expect(&[("files", 3), ("undecided_bytes", 0), ("mergeable_file_bytes", 5 * PAGE)]);
    // A root that may not be listed: nothing could be done.
    let closed = scan_as(NOBODY, &binary, &[&root.join("closed")], &[]);
    assert_eq!(closed.code, 2);
    assert!(closed.errors()[0].1.contains("Permission denied"), "{:?}", closed.errors());
    // What root sees of the same tree.
    let all = scan(&[&root], &[]);
    all.expect_clean();
    all.expect(&[("files", 7), ("mergeable_file_bytes", 5 * PAGE), ("undecided_bytes", 0)]);
}

#[test]
fn privileged_other_file_systems_below_a_root_are_entered_only_on_request() {
    let rig = rig(RigFs::Xfs);
    let root = dir(rig.path(), "root");
    write(&root.join("f"), 1, PAGE as usize);
    let other = Mounted::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], &root.join("other"));
    write(&other.0.join("g"), 2, PAGE as usize);
    sync(rig.path());
    let found = scan(&[&root], &[]);
    found.expect_clean();
    found.expect(&[("files", 1)]);
    assert_eq!(found.skipped()[0].0, text(&other.0));
    let found = scan(&[&root], &["--no-one-file-system"]);
    assert_eq!(found.code, 1, "the tmpfs is undecided");
    found.expect(&[("files", 2), ("cache_bytes", 2 * PAGE), ("undecided_bytes", PAGE)]);
    scan(&[&root], &["--no-one-file-system", "--content"]).expect_clean();
}
