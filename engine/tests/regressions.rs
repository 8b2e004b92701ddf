//! Bugs of the merge engine that the simulation found once, as short scripts over the scripted host.
//!
//! Each test names what went wrong and fails without its fix. The seeds that found them stay in `testfs`
//! (`sim_merge`); here is the least that shows them.

mod fake;

use fake::*;
use pagefold_engine::control::WriteVerdict;
use pagefold_engine::counters::Decision;
use pagefold_engine::host::{HostOp, NodeId, SharedPage, SharedSpan};
use pagefold_engine::units::*;

/// Two clones, merged; then the second is stored to, and the first can't be broken for want of memory.
fn with_a_last_sharer_that_cannot_be_broken() -> Rig {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41], Some(90));
    rig.map(file(2, 0), &[41], Some(90));
    rig.step();
    assert!(rig.host.is_shared(site(1, 0)));
    rig.host.write(site(2, 0), 42);
    rig.host.memory = 0;
    rig.step();
    assert!(rig.decided(Decision::BreakNoMemory) > 0, "the break must have failed");
    assert!(rig.host.is_shared(site(1, 0)) && rig.host.is_protected(site(1, 0)));
    rig
}

/// A child of a fork in another domain, which shows a page it may not share and can't be broken.
fn with_a_stray_of_another_domain() -> Rig {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41], Some(90));
    rig.map(file(2, 0), &[41], Some(90));
    rig.step();
    rig.host.fork(1, 3);
    rig.engine.register(file(3, 1), span(3, 0, 1)).unwrap();
    rig.host.memory = 0;
    rig.step();
    assert!(rig.decided(Decision::ForeignDomain) > 0 && rig.decided(Decision::BreakNoMemory) > 0);
    assert!(rig.host.is_shared(site(3, 0)) && rig.host.is_protected(site(3, 0)));
    rig
}

/// The record said "volatile" while the page was still protected: when the kernel then copied for a store, nobody knew
/// that there was a protection to lift, and the writer of the file waited for ever (K-065).
#[test]
fn a_page_copied_after_its_break_failed_loses_its_protection() {
    for (mut rig, at) in [
        (with_a_last_sharer_that_cannot_be_broken(), site(1, 0)),
        (with_a_stray_of_another_domain(), site(3, 0)),
    ] {
        rig.host.copy_under_lease(at, 77);
        rig.check();
        let copied = rig.decided(Decision::CowBroken);
        let verdict = rig.engine.written(&mut rig.host, span(at.mapping.0, 0, 1));
        assert_eq!(verdict, WriteVerdict::Go);
        assert!(rig.host.is_plain(at), "{at:?} may be written, the engine says, and is still protected");
        assert_eq!(rig.decided(Decision::CowBroken), copied + 1);
        rig.check();
    }
}

/// The same, with no writer that asks: the next pass sees that the page is the mapping's own, and lifts.
#[test]
fn the_next_pass_lifts_what_a_failed_break_left() {
    for (mut rig, at) in [
        (with_a_last_sharer_that_cannot_be_broken(), site(1, 0)),
        (with_a_stray_of_another_domain(), site(3, 0)),
    ] {
        rig.host.copy_under_lease(at, 77);
        rig.step();
        assert!(rig.host.is_plain(at), "{at:?} is its own and still protected after a pass");
    }
}

/// `O_TRUNC` is told after the fact (K-063). By then the file had grown and merged again, and the notice took the record
/// and the protection of a page that shows a shared one: its readers missed the next write.
#[test]
fn a_late_notice_of_a_truncation_spares_what_merged_again() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41, 42], Some(90));
    rig.map(file(2, 0), &[41, 42], Some(90));
    rig.step();
    // Truncated to nothing, then cloned anew; only the second page is not there any more.
    rig.host.truncate(2, 0);
    rig.host.map(2, 0, &[41], Some(90));
    rig.passes(2);
    assert!(rig.host.is_shared(site(2, 0)), "it has merged again");
    let before = rig.engine.total().gauges;

    rig.engine.truncated(&mut rig.host, MappingId(2), PageIndex(0));
    rig.check();
    assert!(rig.host.is_shared(site(2, 0)) && rig.host.is_protected(site(2, 0)));
    assert_eq!(rig.engine.total().gauges, before, "a late notice changes no figure");

    // The writer that comes next is still waited for.
    let breaks = rig.decided(Decision::Broken);
    assert_eq!(rig.engine.written(&mut rig.host, span(2, 0, 1)), WriteVerdict::Go);
    assert_eq!(rig.decided(Decision::Broken), breaks + 1);
    assert!(rig.host.is_plain(site(2, 0)));
    rig.check();
}

/// A notice in time: what is gone goes, what lies before the cut stays.
#[test]
fn a_notice_in_time_drops_what_is_gone_and_nothing_else() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41, 42, 43], Some(90));
    rig.map(file(2, 0), &[41, 42, 43], Some(90));
    rig.step();
    rig.host.truncate(2, 1);
    rig.engine.truncated(&mut rig.host, MappingId(2), PageIndex(1));
    rig.check();
    assert_eq!(rig.decided(Decision::Dropped), 2);
    assert!(rig.host.is_shared(site(2, 0)) && rig.host.is_protected(site(2, 0)));
}

/// A notice that can't be checked drops nothing: the error is counted, the next pass looks again.
#[test]
fn a_notice_that_cannot_be_checked_keeps_every_record() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41, 42], Some(90));
    rig.map(file(2, 0), &[41, 42], Some(90));
    rig.step();
    let before = rig.engine.total().gauges;
    rig.host.truncate(2, 1);
    rig.host.before.push_back((HostOp::Observe, Hook::Error(5)));
    rig.engine.truncated(&mut rig.host, MappingId(2), PageIndex(1));
    assert_eq!(rig.engine.total().gauges, before);
    assert!(rig.decided(Decision::HostError) > 0);
    rig.passes(2);
    assert_eq!(rig.decided(Decision::Dropped), 1, "the next pass saw it");
    assert!(rig.host.is_shared(site(2, 0)));
}

/// Pages that nobody shows any more and whose release failed were released later under their old number, though one of
/// them had been relocated meanwhile.
#[test]
fn a_release_still_owed_follows_a_relocation() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[41, 42, 43], Some(90));
    rig.map(file(2, 0), &[41, 42, 43], Some(90));
    rig.step();
    let first = rig.host.any_shared().expect("three pages are merged");
    for mapping in [1, 2] {
        if mapping == 2 {
            rig.host.before.push_back((HostOp::Release, Hook::Error(5)));
        }
        assert_eq!(rig.engine.written(&mut rig.host, span(mapping, 0, 3)), WriteVerdict::Go);
        // Else they would merge again.
        (0..3).for_each(|page| rig.host.write(site(mapping, page), 60 + u64::from(mapping) * 10 + page));
    }
    assert_eq!(rig.host.shared_count(), 3, "the release failed");
    let to = rig.host.relocate(first + 1, None);
    let one = |n| SharedSpan { start: SharedPage(n), pages: PageCount(1) };
    rig.engine.relocated(one(first + 1), one(to), NodeId(0), None);
    rig.step();
    assert_eq!(rig.host.shared_count(), 0, "each page is released where it is now");
}
