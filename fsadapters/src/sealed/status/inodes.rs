//! From an inode number that a view shows to the anchor behind it.
//!
//! With `xino=on` overlayfs composes its numbers of the layer (upper bits) and the layer's own number, and keeps them when a
//! file is copied up. The layer's own number is an image's or that of a file in the layer of differences, and there the extended attribute
//! that overlayfs follows names the anchor. So one walk of each mounted image serves all its views.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};

use pagefold_sys::handle::name_to_handle;

use crate::store::{AnchorKey, ImageDigest};

/// A file of a layer.
#[derive(Debug)]
pub(super) struct LayerFile {
    /// The anchor behind it.
    pub anchor: AnchorKey,
    /// Where it is.
    at: PathBuf,
}

impl LayerFile {
    /// Whether a file that was copied from this one is among `origins`; if that can't be known, too.
    pub(super) fn is_origin(&self, origins: &HashSet<(i32, Vec<u8>)>) -> bool {
        !origins.is_empty()
            && CString::new(self.at.as_os_str().as_bytes())
                .ok()
                .and_then(|at| name_to_handle(rustix::fs::CWD, &at).ok())
                .is_none_or(|handle| origins.contains(&(handle.kind & 0xff, handle.bytes)))
    }
}

/// Files by inode number of one image, or of one layer of differences.
#[derive(Debug, Default)]
pub(super) struct ImageInodes(HashMap<u64, LayerFile>);

impl ImageInodes {
    /// Walks the image mounted at `at`, or the layer there.
    pub(super) fn read(at: &Path) -> std::io::Result<ImageInodes> {
        let mut files = HashMap::new();
        let mut stack = vec![at.to_owned()];
        while let Some(dir) = stack.pop() {
            for entry in std::fs::read_dir(&dir)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    stack.push(entry.path());
                } else if kind.is_file()
                    && let Some(anchor) = anchor_of(&entry.path())
                {
                    files.insert(entry.ino(), LayerFile { anchor, at: entry.path() });
                }
            }
        }
        Ok(ImageInodes(files))
    }
}

fn anchor_of(path: &Path) -> Option<AnchorKey> {
    let mut value = [0u8; 128];
    let length = rustix::fs::lgetxattr(path, "trusted.overlay.redirect", &mut value[..]).ok()?;
    let text = std::str::from_utf8(&value[..length]).ok()?;
    AnchorKey::from_hex(&text.replace('/', ""))
}

/// Inode numbers of a view.
#[derive(Debug)]
pub(super) struct ViewInodes<'a> {
    /// On the upper's file system.
    diff: Option<ImageInodes>,
    images: Vec<&'a ImageInodes>,
}

impl<'a> ViewInodes<'a> {
    /// `None` when one of the images is not mounted. `diff` is the layer over them.
    pub(super) fn new(
        diff: Option<ImageInodes>,
        digests: &[ImageDigest],
        images: &'a HashMap<ImageDigest, ImageInodes>,
    ) -> Option<ViewInodes<'a>> {
        Some(ViewInodes { diff, images: digests.iter().map(|d| images.get(d)).collect::<Option<_>>()? })
    }

    /// The layer's file that a number shown by the view means.
    pub(super) fn file(&self, shown: u64) -> Option<&LayerFile> {
        let (file_system, own) = split(shown, self.images.len() as u64)?;
        let layer = match file_system.checked_sub(1) {
            // What is new in the upper has no number of the layer: they lie on one file system.
            None => self.diff.as_ref()?,
            Some(image) => self.images.get(image)?,
        };
        layer.0.get(&own)
    }
}

/// File system and the layer's own number. File systems are numbered with the upper's as 0 (anchors and differences lie there too); the
/// kernel takes as many top bits as they need, and one more (`ovl_map_dev_ino`, `ovl_fill_super`).
fn split(shown: u64, images: u64) -> Option<(usize, u64)> {
    let bits = images.checked_ilog2()? + 2;
    let shift = 64 - bits;
    let file_system = shown >> (shift + 1);
    let own = shown & ((1 << shift) - 1);
    Some((usize::try_from(file_system).ok()?, own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_apart() {
        assert_eq!(split(1 << 63 | 36, 1), Some((1, 36)));
        assert_eq!(split(36, 1), Some((0, 36)), "a file of the upper");
        assert_eq!(split(2 << 62 | 36, 2), Some((2, 36)));
        assert_eq!(split(36, 0), None);
    }
}
