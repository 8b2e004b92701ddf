//! What is in the page cache: by `/proc/meminfo` for the machine, by `cachestat` for a tree.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use pagefold_sys::cache::cachestat;

/// A line of `/proc/meminfo`, in KiB.
#[must_use]
pub fn meminfo_kib(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Cached bytes of all regular files at `paths`.
///
/// # Errors
/// A file can't be opened or asked.
pub fn of_files<'a>(paths: impl IntoIterator<Item = &'a Path>) -> std::io::Result<u64> {
    let page = rustix::param::page_size() as u64;
    let mut pages = 0;
    for path in paths {
        pages += cachestat(File::open(path)?.as_fd(), 0, 0)?.nr_cache;
    }
    Ok(pages * page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_has_what_is_asked_for() {
        assert!(meminfo_kib("MemTotal").is_some_and(|kib| kib > 1024));
        assert_eq!(meminfo_kib("Mem"), None);
    }

    #[test]
    fn a_file_just_written_is_cached() {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        std::fs::write(file.path(), [7u8; 10_000]).expect("write");
        let page = rustix::param::page_size() as u64;
        let cached = of_files([file.path()]).expect("cachestat");
        assert_eq!(cached, 10_000u64.next_multiple_of(page));
    }
}
