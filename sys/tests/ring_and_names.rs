//! The ring's ownership of memory, and names of files and file systems.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use pagefold_sys::reflink::{DEDUPE_DESTS_MAX, DedupeDest, dedupe};
use pagefold_sys::uring::{Buffer, Event, ReadRequest, Ring};
use pagefold_sys::{handle, identity, is_unsupported};
use rustix::fs::{OFlags, ResolveFlags};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn wait_for(ring: &mut Ring, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        ring.wait(&mut events).unwrap();
    }
    events
}

#[test]
fn the_ring_opens_reads_and_tells_errors() {
    let dir = dir();
    let path = dir.path().join("f");
    std::fs::write(&path, b"0123456789").unwrap();
    let mut ring = Ring::new(4).expect("this test needs io_uring");
    ring.open(1, CString::new(path.as_os_str().as_bytes()).unwrap(), OFlags::RDONLY, ResolveFlags::empty());
    ring.open(2, CString::new("/nonexistent/f").unwrap(), OFlags::RDONLY, ResolveFlags::empty());
    let mut opened = None;
    for event in wait_for(&mut ring, 2) {
        match event {
            Event::Opened { token: 1, result } => opened = Some(result.unwrap()),
            Event::Opened { token: 2, result } => {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOENT));
            }
            other => panic!("{other:?}"),
        }
    }
    let request = ReadRequest {
        token: 3,
        file: Arc::new(opened.unwrap()),
        offset: 4,
        buffer: Buffer::new(4096).unwrap(),
        buffer_offset: 4090,
        length: usize::MAX,
        flags: 0,
    };
    ring.read(request);
    let Some(Event::Read { token: 3, buffer, result }) = wait_for(&mut ring, 1).pop() else { panic!() };
    // Clamped to the six bytes that the buffer holds from there on.
    assert_eq!(result.unwrap(), 6);
    assert_eq!(&buffer.bytes()[4090..], b"456789");
    assert_eq!(ring.pending(), 0);
}

#[test]
fn a_ring_dropped_with_reads_in_flight_waits_for_them() {
    let dir = dir();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![1; 8 << 20]).unwrap();
    let file = File::open(&path).unwrap();
    file.sync_all().unwrap();
    for _ in 0..20 {
        pagefold_sys::cache::drop_cached(&file, 0, 8 << 20).unwrap();
        let shared = Arc::new(file.try_clone().unwrap().into());
        let mut ring = Ring::new(8).expect("this test needs io_uring");
        for i in 0..8 {
            ring.read(ReadRequest {
                token: i,
                file: Arc::clone(&shared),
                offset: i << 20,
                buffer: Buffer::new(1 << 20).unwrap(),
                buffer_offset: 0,
                length: 1 << 20,
                flags: 0,
            });
        }
        ring.submit().unwrap();
        drop(ring);
        assert_eq!(Arc::strong_count(&shared), 1, "a request still holds the file");
    }
}

#[test]
fn a_handle_names_the_inode_and_not_the_path() {
    let dir = dir();
    let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
    std::fs::write(&a, b"a").unwrap();
    std::fs::hard_link(&a, &b).unwrap();
    std::fs::write(&c, b"a").unwrap();
    let [a, b, c] = [a, b, c].map(|path| {
        let file = File::open(path).unwrap();
        handle::name_to_handle(file.as_fd(), c"").unwrap()
    });
    assert_eq!(a, b);
    assert_ne!(a, c);
    let here = File::open(dir.path()).unwrap();
    assert_eq!(handle::name_to_handle(here.as_fd(), c"c").unwrap(), c);
    let too_long = [0; 129];
    let refused = handle::open_by_handle(here.as_fd(), c.kind, &too_long, OFlags::RDONLY);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn foreign_file_systems_are_told_apart_from_failures() {
    let proc_dir = File::open("/proc").unwrap();
    for error in [
        identity::btrfs_fsid(proc_dir.as_fd()).unwrap_err(),
        identity::xfs_geometry(proc_dir.as_fd()).unwrap_err(),
        identity::is_realtime(proc_dir.as_fd()).unwrap_err(),
    ] {
        assert!(is_unsupported(&error), "{error}");
    }
}

#[test]
fn too_many_destinations_are_refused_before_the_kernel_sees_them() {
    let file = tempfile::tempfile().unwrap();
    for count in [0, DEDUPE_DESTS_MAX + 1] {
        let dests = vec![DedupeDest { fd: file.as_fd(), offset: 0 }; count];
        let error = dedupe(file.as_fd(), 0, 4096, &dests).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
