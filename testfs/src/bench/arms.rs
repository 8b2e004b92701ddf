//! The arms: roots that containers are started from, brought up and taken down.
//!
//! Invariant: all arms show the same files; what differs is only how.

use std::path::{Path, PathBuf};

use super::BenchError;
use super::place::{Mounted, Place};
use super::report::Arm;
use super::views::Views;

/// The roots of one arm, ready to be used; taken down when dropped.
#[derive(Debug)]
pub(super) struct Roots<'a> {
    arm: Arm,
    paths: Vec<PathBuf>,
    _overlays: Vec<Mounted>,
    /// Unmounted in `Drop`.
    views: Option<&'a Views>,
}

impl<'a> Roots<'a> {
    /// The first `count` roots of `arm`.
    pub(super) fn up(
        arm: Arm,
        count: usize,
        place: &Place,
        raw: &[PathBuf],
        views: Option<&'a Views>,
    ) -> Result<Roots<'a>, BenchError> {
        let raw = &raw[..count.min(raw.len())];
        let mut roots = Roots { arm, paths: Vec::new(), _overlays: Vec::new(), views: None };
        match (arm, views) {
            (Arm::Raw, _) => roots.paths = raw.to_vec(),
            (Arm::Overlay, _) => {
                let lower = raw.first().ok_or(BenchError::Spec { what: "--containers", why: "0".into() })?;
                for n in 0..raw.len() {
                    let mounted = Mounted::overlay(lower, &place.make(format!("overlay/{n:04}"))?)?;
                    roots.paths.push(mounted.path().to_owned());
                    roots._overlays.push(mounted);
                }
            }
            (Arm::View, Some(views)) => {
                roots.views = Some(views);
                roots.paths = views.mount(raw.len())?;
            }
            (Arm::View, None) => return Err(BenchError::Views("the roots are not sealed".into())),
        }
        Ok(roots)
    }

    pub(super) fn arm(&self) -> Arm {
        self.arm
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    pub(super) fn first(&self) -> &Path {
        &self.paths[0]
    }
}

impl Drop for Roots<'_> {
    fn drop(&mut self) {
        if let Some(views) = self.views {
            views.unmount();
        }
    }
}
