//! Mapped files: placed as asked for, read whole, and no signal when they become shorter.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use pagefold_sys::mapping::{FileMapping, HUGE_BYTES, Place};

fn numbered(bytes: usize) -> (File, Vec<u8>) {
    let text: Vec<u8> = (0..bytes as u32 / 4).flat_map(u32::to_le_bytes).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&text).unwrap();
    (file, text)
}

#[test]
fn what_is_mapped_is_what_the_file_holds() {
    let (file, text) = numbered(3 * HUGE_BYTES + 4096);
    for place in [Place::Default, Place::Aligned] {
        let mapping = FileMapping::new(file.as_fd(), text.len(), place).unwrap();
        assert!(place == Place::Default || mapping.is_aligned());
        let mut copy = tempfile::tempfile().unwrap();
        assert_eq!(mapping.write_to(copy.as_fd(), 4096, text.len() - 4096).unwrap(), text.len() - 4096);
        let mut read = Vec::new();
        copy.seek(SeekFrom::Start(0)).unwrap();
        copy.read_to_end(&mut read).unwrap();
        assert!(read == text[4096..], "{place:?}");
    }
}

#[test]
fn bytes_that_are_not_there_are_errors() {
    let (file, text) = numbered(4 * 4096);
    let to = tempfile::tempfile().unwrap();
    for place in [Place::Default, Place::Aligned] {
        assert_eq!(FileMapping::new(file.as_fd(), 0, place).unwrap_err().raw_os_error(), Some(22));
        let mapping = FileMapping::new(file.as_fd(), text.len(), place).unwrap();
        for (from, length) in [(text.len(), 1), (0, text.len() + 1), (usize::MAX, 2)] {
            mapping.write_to(to.as_fd(), from, length).unwrap_err();
        }
        file.set_len(4096).unwrap();
        assert_eq!(mapping.write_to(to.as_fd(), 8192, 10).unwrap_err().raw_os_error(), Some(14));
        file.set_len(text.len() as u64).unwrap();
        assert_eq!(mapping.write_to(to.as_fd(), 8192, 10).unwrap(), 10);
    }
    FileMapping::new(file.as_fd(), usize::MAX - 4096, Place::Aligned).unwrap_err();
}

#[test]
fn dropping_gives_all_address_space_back() {
    let (file, _) = numbered(4096);
    let lines = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    // Other tests of this program map too: many mappings here, so that theirs don't matter.
    let before = lines();
    let mapped: Vec<_> =
        (0..100).map(|_| FileMapping::new(file.as_fd(), 4096, Place::Aligned).unwrap()).collect();
    assert!(lines() >= before + 90);
    drop(mapped);
    assert!(lines() < before + 50);
}
