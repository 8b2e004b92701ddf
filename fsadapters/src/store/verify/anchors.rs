//! Anchors: there, closed, as large as they should be; and the hints that lead to them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::IFlags;

use super::cached::compare_cached;
use super::{ProblemKind, VerifyReport};
use crate::fsid;
use crate::sealed::reading::{Readings, signature};
use crate::store::error::StoreError;
use crate::store::index::{ANCHORS, BY_CONTENT, BY_EXTENTS, DOMAINS, content_key, extents_key};
use crate::store::key::AnchorKey;
use crate::store::open::{Store, anchor_name};
use crate::store::place;
use crate::store::rows::{AnchorRow, AnchorStamp, DomainRow};
use crate::store::task::Task;

pub(super) fn anchors(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    let mut rows: Vec<(AnchorKey, AnchorRow)> = Vec::new();
    let snapshot = store.snapshot()?;
    snapshot.each(ANCHORS, |key, bytes| {
        rows.push((AnchorKey(*key), snapshot.decoded(bytes)?));
        Ok(())
    })?;
    let domains: Vec<DomainRow> = snapshot.rows(DOMAINS)?;
    task.expect(rows.len() as u64);
    for (key, row) in rows {
        if task.is_cancelled() {
            return Ok(());
        }
        let path = store.anchor_path(row.domain, &key);
        if key != AnchorKey::of(store.id(), row.serial) {
            report.problem(path.clone(), ProblemKind::Index, format!("it is not number {}", row.serial));
        }
        if !domains.iter().any(|d| d.id == row.domain) {
            report.problem(path, ProblemKind::Index, format!("there is no domain {}", row.domain));
        } else {
            anchor(store, &key, &row, task, report);
        }
        report.anchors += 1;
        task.did(1);
    }
    Ok(())
}

fn anchor(store: &Store, key: &AnchorKey, row: &AnchorRow, task: &Task, report: &mut VerifyReport) {
    let path = store.anchor_path(row.domain, key);
    let file = match store.open_anchor(row.domain, key) {
        Ok(file) => file,
        Err(_) if !place::exists(&store.fd, &anchor_name(row.domain, key)) => {
            let detail = "views that use it can't read the file; seal the roots again";
            return report.problem(path, ProblemKind::Missing, detail);
        }
        Err(e) => return report.problem(path, ProblemKind::Unreadable, e.to_string()),
    };
    match file.metadata() {
        Ok(meta) if meta.len() != row.size => {
            let detail = format!("{} bytes, the index says {}", meta.len(), row.size);
            report.problem(path.clone(), ProblemKind::Damaged, detail);
        }
        Ok(meta) if row.borrowed.is_none() => {
            if let Some(detail) = changed(&file, row) {
                report.problem(path.clone(), ProblemKind::Open, detail);
            }
            for detail in openings(&file, &meta) {
                report.problem(path.clone(), ProblemKind::Open, detail);
            }
        }
        Ok(_) => match borrowed_changed(&file, row, task) {
            Ok(false) => {}
            Ok(true) => {
                let detail =
                    "a borrowed file was written by its owner: views that use it show other bytes now";
                report.problem(
                    row.borrowed.clone().unwrap_or_else(|| path.clone()),
                    ProblemKind::Damaged,
                    detail,
                );
            }
            Err(e) => return report.problem(path, ProblemKind::Unreadable, e.to_string()),
        },
        Err(e) => return report.problem(path, ProblemKind::Unreadable, e.to_string()),
    }
    if let Err(e) = compare_cached(&file, &path, task, report) {
        report.problem(path, ProblemKind::Unreadable, format!("its cached pages: {e}"));
    }
}

/// An anchor whose change time moved: nothing of ours does that, and nothing that leaves its bytes alone and itself closed.
fn changed(file: &File, row: &AnchorRow) -> Option<String> {
    let (made, now) = (row.stamp?, AnchorStamp::of(file).ok()?);
    (now != made).then(|| {
        "it was changed after it was made (written, or its mode or flags were): views that use it may show wrong bytes. Unseal the roots that use it (`explain` names them) and seal them again"
            .to_owned()
    })
}

/// Whether a borrowed anchor has other bytes than those it was taken for.
fn borrowed_changed(file: &File, row: &AnchorRow, task: &Task) -> std::io::Result<bool> {
    let Some(wanted) = row.content else { return Ok(false) };
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    while !task.is_cancelled() {
        match std::os::unix::fs::FileExt::read_at(file, &mut buffer, at)? {
            0 => return Ok(hasher.finalize().as_bytes() != &wanted.0),
            length => {
                hasher.update(&buffer[..length]);
                at += length as u64;
            }
        }
    }
    Ok(false)
}

/// Whether anchors are where they were made. Where no balance moves blocks, an immutable file stays there: elsewhere means
/// written.
pub(super) fn places(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    let readings = fsid::describe(store.dirfd()).ok().map(|facts| Readings::new(&facts));
    let Some(readings) = readings.filter(|readings| !readings.relocates()) else { return Ok(()) };
    let snapshot = store.snapshot()?;
    snapshot.each(ANCHORS, |key, bytes| {
        let (key, row): (AnchorKey, AnchorRow) = (AnchorKey(*key), snapshot.decoded(bytes)?);
        if !task.is_cancelled()
            && let Some(detail) = elsewhere(store, &key, &row, &readings)
        {
            report.problem(store.anchor_path(row.domain, &key), ProblemKind::Damaged, detail);
        }
        Ok(())
    })
}

/// An anchor that is not at the place where it was made: somebody wrote it (and made it immutable again). `None` also where
/// its place can't tell.
fn elsewhere(store: &Store, key: &AnchorKey, row: &AnchorRow, readings: &Readings) -> Option<String> {
    let wanted = row.signature.filter(|_| row.borrowed.is_none())?;
    let file = store.open_anchor(row.domain, key).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let (reading, _) = readings.read(file.as_fd(), &stat, &mut Vec::new()).ok()?;
    let found = signature(&reading.layout);
    (found != Some(wanted)).then(|| {
        "its extents are not those it was made with: it was written; views that use it may show wrong bytes. Unseal the roots that use it (`explain` names them) and seal them again"
            .to_owned()
    })
}

/// By what an anchor could be changed, or say more than bytes.
fn openings(file: &File, meta: &std::fs::Metadata) -> Vec<String> {
    let mut found = Vec::new();
    if meta.mode() & 0o7777 != 0o400 {
        found.push(format!("mode {:04o}, not 0400", meta.mode() & 0o7777));
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        found.push(format!("it belongs to user {}", meta.uid()));
    }
    if meta.nlink() != 1 {
        found.push(format!("it has {} names", meta.nlink()));
    }
    match rustix::fs::ioctl_getflags(file) {
        Ok(flags) if flags.contains(IFlags::IMMUTABLE) => {}
        Ok(_) => found.push("it is not immutable (chattr +i)".to_owned()),
        Err(e) => found.push(format!("whether it is immutable can't be told: {e}")),
    }
    let mut names = [0; 4096];
    let length = rustix::fs::flistxattr(file, &mut names).unwrap_or(0);
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        // A label that the security module insists on.
        if !name.starts_with(b"security.") {
            found.push(format!("it has the attribute {:?}", String::from_utf8_lossy(name)));
        }
    }
    found
}

/// A hint that leads nowhere is no danger (hits are proved), but tells of a defect.
pub(super) fn hints(store: &Store, task: &Task, report: &mut VerifyReport) -> Result<(), StoreError> {
    if task.is_cancelled() {
        return Ok(());
    }
    let snapshot = store.snapshot()?;
    let mut wrong: Vec<AnchorKey> = Vec::new();
    snapshot.each(BY_EXTENTS, |hint, key| {
        let row: Option<AnchorRow> = snapshot.get(ANCHORS, key)?;
        let right = row.is_some_and(|row| {
            row.signature.is_some_and(|s| extents_key(row.domain, row.size, &s.0) == *hint)
        });
        if !right {
            wrong.push(AnchorKey(*key));
        }
        Ok(())
    })?;
    snapshot.each(BY_CONTENT, |hint, key| {
        let row: Option<AnchorRow> = snapshot.get(ANCHORS, key)?;
        let right = row
            .is_some_and(|row| row.content.is_some_and(|c| content_key(row.domain, row.size, &c.0) == *hint));
        if !right {
            wrong.push(AnchorKey(*key));
        }
        Ok(())
    })?;
    for key in wrong {
        let detail = format!("a hint leads to anchor {key}, which does not say so");
        report.problem(store.dir.join("index.redb"), ProblemKind::Index, detail);
    }
    Ok(())
}
