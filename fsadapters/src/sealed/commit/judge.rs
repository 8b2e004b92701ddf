//! What is at a path of the raw root: as sealed, as the view wants it, left by an earlier try of ours, or somebody's change.
//!
//! Invariant: what is not proved to be the first three is the fourth, and is never written. Equality is by everything a
//! reader can see: kind, owner, permissions, modification time, attributes, bytes. The sealed inode number, change time and size
//! spare that where they are all unchanged and the change time is old enough to tell.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::OFlags;

use super::bytes::{Sources, equal};
use super::journal::Journal;
use super::state::Kind;
use crate::sealed::inode::{Held, Look};
use crate::sealed::prove::{UNDER_WAY_S, is_telling};
use crate::sealed::tree::{Inode, Meta, Node};

/// What was found; the look is of that moment and must still hold when the name is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is there.
    Absent,
    /// As the view wants it already.
    Wanted(Look),
    /// As it was sealed.
    Sealed(Look),
    /// Put there by an earlier try of ours.
    Ours(Look),
    /// None of these.
    Foreign(Look),
}

/// Compares what is in the raw root.
pub struct Judge<'a> {
    /// Where bytes to compare with are.
    pub sources: &'a Sources<'a>,
    /// Earlier tries.
    pub journal: &'a Journal,
    /// When sealing began, seconds since 1970.
    pub sealed_at: i64,
}

impl Judge<'_> {
    /// What `held`, found at `path`, is.
    pub fn judge(
        &self,
        path: &[u8],
        held: Option<&Held>,
        sealed: Option<&Inode>,
        wanted: Option<(&Meta, &Kind)>,
    ) -> io::Result<Verdict> {
        let Some(held) = held else { return Ok(Verdict::Absent) };
        let look = held.look;
        if let Some((meta, kind)) = wanted
            && self.is_same(held, meta, kind)?
        {
            return Ok(Verdict::Wanted(look));
        }
        if let Some(sealed) = sealed
            && (is_untouched(&look, sealed, self.sealed_at)
                || self.is_same(held, &sealed.meta, &Kind::sealed(&sealed.node))?)
        {
            return Ok(Verdict::Sealed(look));
        }
        // A directory's size and times are those of its entries: ours by its number alone, what is in it is judged by itself.
        let is_ours =
            |built: &Look| built.is_still(&look) || built.is_dir() && look.is_dir() && built.ino == look.ino;
        let ours = self.journal.built.get(path).is_some_and(|all| all.iter().any(is_ours));
        Ok(if ours { Verdict::Ours(look) } else { Verdict::Foreign(look) })
    }

    fn is_same(&self, held: &Held, meta: &Meta, kind: &Kind) -> io::Result<bool> {
        let look = &held.look;
        let own = (look.mode & 0o7777, look.uid, look.gid, look.mtime);
        if own != (meta.mode, meta.uid, meta.gid, meta.mtime) {
            return Ok(false);
        }
        match (kind, held.special()?) {
            (Kind::Other(node), Some(found)) if *node == found => {}
            (Kind::File { size, .. }, None) if look.is_file() && look.size == *size => {}
            _ => return Ok(false),
        }
        if held.xattrs()? != meta.xattrs {
            return Ok(false);
        }
        let Kind::File { size, bytes } = kind else { return Ok(true) };
        match self.sources.open(bytes, *size)? {
            None => Ok(true),
            Some(source) => {
                let file = held.open_file(OFlags::RDONLY)?;
                // Who writes meanwhile moves the change time, which is looked at again before the name is changed.
                equal(source.as_fd(), file.as_fd(), *size)
            }
        }
    }
}

/// Whether inode number, change time and size are those of sealing time, and a change time so old tells that nobody has changed
/// anything since.
fn is_untouched(look: &Look, sealed: &Inode, sealed_at: i64) -> bool {
    let kind = match sealed.node {
        Node::Dir => return false,
        Node::File { .. } => look.is_file() && is_telling(look.ctime.0, sealed_at, UNDER_WAY_S),
        _ => !look.is_file() && !look.is_dir(),
    };
    let raw = &sealed.raw;
    kind && (look.ino, look.ctime, look.size) == (raw.ino, raw.ctime, raw.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::tree::Data;
    use crate::sealed::walk::{meta, raw_facts};

    #[test]
    fn a_file_that_a_write_under_way_may_have_changed_is_not_untouched() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let node = Node::File { size: 1, data: Data::Empty };
        let sealed = Inode { meta: meta(&stat, Vec::new()), raw: raw_facts(&stat), node };
        let look = Look::of(&file).unwrap();
        assert!(is_untouched(&look, &sealed, stat.st_ctime + UNDER_WAY_S + 1));
        for early in [0, 2, UNDER_WAY_S] {
            assert!(!is_untouched(&look, &sealed, stat.st_ctime + early), "{early} s");
        }
    }
}
