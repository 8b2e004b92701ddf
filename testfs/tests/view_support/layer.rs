//! Roots with a layer of differences, for tests of such layers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use pagefold_fsadapters::sealed::diff::DIFF;
use pagefold_fsadapters::store::{RootRow, Store};
use rustix::fs::{AtFlags, Timespec, Timestamps};

use super::{Home, bytes, clone_tree, settle};

/// Many files of no matter: what a clone differs in is little beside them.
pub fn filler(at: &Path) {
    for n in 0..40u32 {
        let dir = at.join(format!("filler/d{n}"));
        fs::create_dir_all(&dir).unwrap();
        for k in 0..10u32 {
            fs::write(dir.join(format!("f{k}")), bytes(u64::from(n * 10 + k), 100 + n as usize)).unwrap();
        }
    }
    settle(at);
}

pub fn entries(store: &Store, row: &RootRow) -> Option<u64> {
    store.diff(row.id, row.generation).unwrap().map(|diff| diff.entries)
}

pub fn layer(store: &Store, row: &RootRow) -> PathBuf {
    store.root_dir(row.id, row.generation).join(DIFF)
}

pub fn set_mtime(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 12_345 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Two roots with a layer for the second, and what is in it: a stub, one of two names, a whiteout, a directory.
pub fn two(home: &Home) -> (Store, Vec<RootRow>) {
    filler(&home.at("a"));
    clone_tree(&home.at("a"), &home.at("b"));
    let b = home.at("b");
    fs::write(b.join("filler/d1/f1"), bytes(777, 9000)).unwrap();
    fs::write(b.join("filler/d1/two"), bytes(778, 9000)).unwrap();
    fs::hard_link(b.join("filler/d1/two"), b.join("filler/names")).unwrap();
    fs::remove_file(b.join("filler/d2/f2")).unwrap();
    symlink("f1", b.join("filler/d1/link")).unwrap();
    settle(&b);
    let store = home.store();
    let rows = home.seal(&store, &["a", "b"]);
    assert!(entries(&store, &rows[1]).is_some());
    (store, rows)
}
