//! Which pages are cached, by `mincore`: page-exact, without bringing anything in.

use std::os::fd::AsFd;

use super::bytes::open_quietly;
use super::{Truth, TruthError};

/// Fills `resident` of every file.
pub(super) fn look(truth: &mut Truth) -> Result<(), TruthError> {
    for root in &mut truth.roots {
        for file in &mut root.files {
            let path = root.path.join(&file.names[0]);
            let mut runs: Vec<(u64, u64)> = Vec::new();
            let looked = open_quietly(&path).and_then(|open| {
                pagefold_sys::cache::mincore(open.as_fd(), file.size, |first, pages| match runs.last_mut() {
                    Some((start, length)) if *start + *length == first => *length += pages,
                    _ => runs.push((first, pages)),
                })
            });
            looked.map_err(|source| TruthError::Io { path, source })?;
            file.resident = runs;
        }
    }
    Ok(())
}
