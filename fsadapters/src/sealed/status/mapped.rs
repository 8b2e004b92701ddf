//! Which page frames of which inodes of which mounts processes have mapped right now, frame by frame.
//!
//! `/proc/PID/maps` names device and inode of each mapping, `/proc/PID/pagemap` tells the pages that are present and still
//! the file's own (a page that was copied on write is not), with the frame of memory that holds each. So a page counts
//! once for a view however many of its processes map it, which sums of `Rss` can't tell; and two views share a page if and
//! only if they map one frame, whatever became of the file's name, number or layer since.
//!
//! Invariant: only what was present at the moment of reading is counted; a process that ends meanwhile counts as far as it
//! was read; a page that the kernel moves meanwhile counts as two, so that less sharing is seen and never more. What it
//! deliberately does not do: stop anybody.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Frames of memory, as disjoint ascending runs `first .. end` (large folios make long ones).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSet(BTreeMap<u64, u64>);

impl FrameSet {
    /// Adds frames `first .. end`.
    pub fn add(&mut self, first: u64, end: u64) {
        let (mut first, mut end) = (first, end);
        if first >= end {
            return;
        }
        // All runs that overlap or touch become one.
        while let Some((&start, &stop)) = self.0.range(..=end).next_back() {
            if stop < first {
                break;
            }
            first = first.min(start);
            end = end.max(stop);
            self.0.remove(&start);
        }
        self.0.insert(first, end);
    }

    /// Adds all of `other`.
    pub fn add_all(&mut self, other: &FrameSet) {
        other.0.iter().for_each(|(first, end)| self.add(*first, *end));
    }

    /// Number of frames.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|(first, end)| end - first).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Device as in `/proc/PID/maps`: major, minor.
pub type Device = (u32, u32);

/// What processes have mapped of the files on some devices.
#[derive(Debug, Default)]
pub struct Mapped {
    /// Frames by device and inode number.
    pub frames: HashMap<(Device, u64), FrameSet>,
    /// Processes that have any, by device.
    pub processes: HashMap<Device, Vec<u32>>,
    /// Processes whose tables could not be read.
    pub unreadable: Vec<u32>,
}

/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst); the frame is 0 for readers who may not know it.
const PRESENT: u64 = 1 << 63;
const FILE_PAGE: u64 = 1 << 61;
const FRAME: u64 = (1 << 55) - 1;
/// Entries read at once.
const ENTRIES: usize = 8192;

/// Reads the tables of all processes for mappings of files on `devices`.
#[must_use]
pub fn read(devices: &[Device], cancel: &AtomicBool) -> Mapped {
    let mut mapped = Mapped::default();
    if devices.is_empty() {
        return mapped;
    }
    let Ok(list) = std::fs::read_dir("/proc") else { return mapped };
    let processes = list.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    for process in processes {
        if cancel.load(Ordering::Relaxed) {
            break;
        }
        if read_process(process, devices, cancel, &mut mapped).is_err() {
            mapped.unreadable.push(process);
        }
    }
    mapped
}

/// A process that is gone is no error.
fn read_process(
    process: u32,
    devices: &[Device],
    cancel: &AtomicBool,
    mapped: &mut Mapped,
) -> std::io::Result<()> {
    let gone = |e: &std::io::Error| {
        e.kind() == std::io::ErrorKind::NotFound
            || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
    };
    let mut text = Vec::new();
    match File::open(format!("/proc/{process}/maps")).and_then(|mut f| f.read_to_end(&mut text)) {
        Err(e) if gone(&e) => return Ok(()),
        other => other?,
    };
    let mut areas =
        text.split(|b| *b == b'\n').filter_map(parse_area).filter(|a| devices.contains(&a.device));
    let Some(first) = areas.next() else { return Ok(()) };
    let pagemap = match File::open(format!("/proc/{process}/pagemap")) {
        Err(e) if gone(&e) => return Ok(()),
        other => other?,
    };
    for area in std::iter::once(first).chain(areas) {
        let frames = mapped.frames.entry((area.device, area.inode)).or_default();
        match present_pages(&pagemap, &area, cancel, frames) {
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(e),
            // Gone.
            Err(_) => return Ok(()),
            Ok(()) => {}
        }
        let users = mapped.processes.entry(area.device).or_default();
        if users.last() != Some(&process) {
            users.push(process);
        }
    }
    Ok(())
}

/// `EPERM` when frames are hidden from us. A mapping may be as large as the address space.
fn present_pages(
    pagemap: &File,
    area: &Area,
    cancel: &AtomicBool,
    frames: &mut FrameSet,
) -> std::io::Result<()> {
    let page = rustix::param::page_size() as u64;
    let (mut at, end) = (area.start / page, area.end / page);
    let mut buffer = vec![0; ENTRIES * 8];
    while at < end && !cancel.load(Ordering::Relaxed) {
        let count = (end - at).min(ENTRIES as u64);
        let part = &mut buffer[..count as usize * 8];
        pagemap.read_exact_at(part, at * 8)?;
        for word in part.as_chunks::<8>().0 {
            let entry = u64::from_ne_bytes(*word);
            if entry & (PRESENT | FILE_PAGE) == PRESENT | FILE_PAGE {
                let frame = entry & FRAME;
                if frame == 0 {
                    return Err(rustix::io::Errno::PERM.into());
                }
                frames.add(frame, frame + 1);
            }
        }
        at += count;
    }
    Ok(())
}

/// A mapping of a file.
#[derive(Debug, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    device: Device,
    inode: u64,
}

/// A line `start-end perms offset major:minor inode path`.
fn parse_area(line: &[u8]) -> Option<Area> {
    let mut fields = line.split(|b| *b == b' ').map(|f| std::str::from_utf8(f).ok());
    let (start, end) = fields.next()??.split_once('-')?;
    let (major, minor) = fields.nth(2)??.split_once(':')?;
    let inode: u64 = fields.next()??.parse().ok()?;
    let hex = |t: &str| u64::from_str_radix(t, 16).ok();
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let (start, end) = (hex(start)?, hex(end)?);
    (inode != 0 && start < end).then_some(Area { start, end, device, inode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_whatever_the_order() {
        let mut set = FrameSet::default();
        for page in [5, 3, 4, 9, 1, 4] {
            set.add(page, page + 1);
        }
        assert_eq!(set, FrameSet([(1, 2), (3, 6), (9, 10)].into()));
        set.add(0, 20);
        assert_eq!((set.len(), set), (20, FrameSet([(0, 20)].into())));
        let mut all = FrameSet::default();
        all.add(7, 7);
        assert!(all.is_empty());
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let line = b"7f00-8f00 r--p 00001000 fe:0a 1234                       /usr/lib/a b";
        let want = Area { start: 0x7f00, end: 0x8f00, device: (0xfe, 0x0a), inode: 1234 };
        assert_eq!(parse_area(line), Some(want));
        for bad in [&b""[..], b"x", b"1-2 r 0 0:0 0", b"2-1 r 0 0:1 1", b"1-2 r 0 zz:1 1"] {
            assert_eq!(parse_area(bad), None);
        }
    }

    #[test]
    fn our_own_program_is_mapped() {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata("/proc/self/exe").expect("our program");
        let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        let mapped = read(&[device], &AtomicBool::new(false));
        if mapped.unreadable.contains(&std::process::id()) {
            assert!(!rustix::process::geteuid().is_root(), "root may know the frames");
            return;
        }
        assert!(mapped.frames.get(&(device, meta.ino())).is_some_and(|p| !p.is_empty()));
        assert!(mapped.processes[&device].contains(&std::process::id()));
    }
}
