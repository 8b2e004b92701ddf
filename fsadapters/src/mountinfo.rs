//! `/proc/self/mountinfo`: which file system is mounted where, and with which options.
//!
//! Invariant: hostile text can't make it fail: a line that can't be understood is no mount. What it deliberately does not do:
//! guess. A mount of another mount namespace is not found.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Id, as `STATX_MNT_ID` tells it.
    pub id: u64,
    /// `st_dev` of the file system as (major, minor).
    pub device: (u32, u32),
    /// Directory of the file system that is its root.
    pub root: PathBuf,
    /// Where it is.
    pub mount_point: PathBuf,
    /// Options of this mount (`ro`, `nosuid`, ...).
    pub mount_options: OsString,
    /// Type of the file system.
    pub kind: String,
    /// What was mounted, as the file system shows it.
    pub source: OsString,
    /// Options of the file system, escapes as in the file (option values may hold escaped commas).
    pub fs_options: Vec<u8>,
}

/// All mounts of this process's namespace.
///
/// # Errors
/// As reading the file fails.
pub fn read() -> std::io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Understands the text of a mountinfo file.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let _parent = fields.next()?;
    let device = fields.next()?;
    let colon = device.iter().position(|b| *b == b':')?;
    let device = (number(&device[..colon])? as u32, number(&device[colon + 1..])? as u32);
    let root = unescape(fields.next()?).into();
    let mount_point = unescape(fields.next()?).into();
    let mount_options = unescape(fields.next()?);
    // Any number of optional fields, ended by a lone dash.
    fields.by_ref().find(|f| *f == b"-")?;
    let kind = String::from_utf8_lossy(unescape(fields.next()?).as_encoded_bytes()).into_owned();
    let source = unescape(fields.next()?);
    let fs_options = fields.next().unwrap_or_default().to_vec();
    Some(Mount { id, device, root, mount_point, mount_options, kind, source, fs_options })
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Undoes the octal escapes of `/proc` (`\040` is a space).
#[must_use]
pub fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        rest = match (first, octal) {
            (b'\\', Some(digits)) => {
                let value = digits.iter().fold(0u32, |v, d| v * 8 + u32::from(d - b'0'));
                out.push(value as u8);
                &tail[3..]
            }
            _ => {
                out.push(first);
                tail
            }
        };
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_escapes_and_optional_fields() {
        let text = b"36 35 98:0 /sub /mnt/a\\040b rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n";
        let [mount] = &parse(text)[..] else { panic!("one mount") };
        assert_eq!((mount.id, mount.device), (36, (98, 0)));
        assert_eq!(mount.mount_point, PathBuf::from("/mnt/a b"));
        assert_eq!(mount.kind, "ext3");
        assert_eq!(mount.fs_options, b"rw,errors=continue");
    }

    #[test]
    fn garbage_is_no_mount() {
        for text in
            [&b""[..], b"\n\n", b"x", b"1 2 3 4", b"1 2 a:b / / rw - x y z", b"1 2 0:1 / / rw no dash"]
        {
            assert_eq!(parse(text), []);
        }
        assert_eq!(unescape(b"\\04"), "\\04");
        assert_eq!(unescape(b"\\"), "\\");
    }

    #[test]
    fn the_real_file_has_a_root() {
        assert!(read().unwrap().iter().any(|m| m.mount_point.as_os_str() == "/"));
    }
}
