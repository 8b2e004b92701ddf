//! Scenarios around merging: undo, writers, truncation, exit, relocation, pace, errors, listeners. Requirement ids in the names and comments.

mod fake;

use std::sync::{Arc, Mutex};

use fake::*;
use pagefold_engine::control::{UnmergeError, WriteVerdict};
use pagefold_engine::counters::Decision;
use pagefold_engine::domain::{Registration, Route};
use pagefold_engine::host::*;
use pagefold_engine::listener::Listener;
use pagefold_engine::policy::{Action, Knobs, Run, Tick};
use pagefold_engine::units::*;

#[test]
fn run_2_breaks_what_nobody_recorded_and_keeps_mappings_registered_k009_k066() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40, 50], None);
    rig.map(content(2), &[40, 50], None);
    rig.passes(2);
    rig.host.fork(1, 9);
    rig.engine.register(content(9), span(9, 0, 2)).unwrap();
    assert_eq!(rig.engine.set_run(&mut rig.host, Run::Unmerge), Ok(false));
    assert!(rig.gauges().is_zero());
    assert_eq!(rig.engine.counters().full_scans, 0, "K-071");
    assert_eq!((rig.host.merged_sites(), rig.host.shared_count(), rig.host.protected_count()), (0, 0, 0));
    assert_eq!(rig.engine.set_run(&mut rig.host, Run::Unmerge), Ok(false), "K-073");
    assert_eq!(rig.engine.set_run(&mut rig.host, Run::Merge), Ok(true), "K-046: wake");
    rig.passes(2);
    assert_eq!(rig.pages(), (2, 4, 0, 0));
}

#[test]
fn run_2_that_fails_leaves_run_0_and_can_be_repeated_k071_k072_k074_t03() {
    let mut rig = Rig::new(Knobs { pages_to_scan: 3, smart_scan: false, ..Knobs::default() });
    rig.map(content(1), &[40, 50, 60], None);
    rig.map(content(2), &[40, 50, 61], None);
    rig.passes(8);
    assert_eq!(rig.gauges().pages_shared, 2);
    rig.step();
    let scans = rig.engine.counters().full_scans;
    rig.host.memory = 1;
    let error = rig.engine.set_run(&mut rig.host, Run::Unmerge).unwrap_err();
    assert_eq!(error, UnmergeError::NoMemory(site(1, 1)));
    rig.check();
    assert_eq!((rig.engine.run(), rig.engine.counters().full_scans), (Run::Stop, scans));
    // Scanning goes on without an item that is too old (K-081 asserts in every step).
    rig.engine.set_run(&mut rig.host, Run::Merge).unwrap();
    rig.passes(12);
    rig.host.memory = u64::MAX;
    rig.engine.set_run(&mut rig.host, Run::Unmerge).unwrap();
    assert_eq!(rig.host.merged_sites(), 0);
}

#[test]
fn unregistering_keeps_its_mark_until_all_is_broken_k064_k066_k067() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40, 50], None);
    rig.map(content(2), &[40, 50], None);
    rig.passes(2);
    rig.host.interrupt_after = Some(1);
    let error = rig.engine.unregister(&mut rig.host, span(1, 0, 2)).unwrap_err();
    assert_eq!(error, UnmergeError::Interrupted(site(1, 1)));
    rig.check();
    rig.host.memory = 0;
    assert_eq!(rig.engine.unregister(&mut rig.host, span(1, 0, 2)), Err(UnmergeError::NoMemory(site(1, 1))));
    rig.host.memory = 9;
    rig.passes(2);
    assert_eq!(rig.gauges().pages_sharing, 2, "still registered, so it merged again");
    rig.engine.unregister(&mut rig.host, span(1, 0, 2)).unwrap();
    assert_eq!(rig.gauges().sites, 4, "records are left for the scanner (K-052)");
    rig.passes(2);
    assert_eq!(rig.gauges().sites, 2);
    assert_eq!(rig.engine.unregister(&mut rig.host, span(77, 0, 2)), Ok(()), "K-069");
}

/// Found by the random test: a page that waited for a mate was merged after its range was unregistered.
#[test]
fn nobody_finds_a_mate_in_an_unregistered_range_k128() {
    let mut rig = Rig::new(Knobs { pages_to_scan: 1, ..Knobs::default() });
    rig.map(file(1, 0), &[5], Some(10));
    rig.map(file(2, 0), &[5], Some(10));
    rig.step();
    assert_eq!(rig.pages(), (0, 0, 1, 0));
    rig.engine.unregister(&mut rig.host, span(1, 0, 1)).unwrap();
    rig.check();
    rig.passes(3);
    assert_eq!((rig.host.merged_sites(), rig.gauges().pages_unshared), (0, 1));
}

#[test]
fn records_outside_the_ranges_go_with_the_next_pass_k052_k084() {
    let mut rig = Rig::big();
    rig.map(content(1), &[1, 2, 3, 4, 5, 6], None);
    rig.passes(2);
    rig.engine.unregister(&mut rig.host, span(1, 1, 2)).unwrap();
    rig.engine.unregister(&mut rig.host, span(1, 5, 1)).unwrap();
    assert_eq!(rig.gauges().sites, 6);
    rig.step();
    assert_eq!(rig.gauges().sites, 3);
}

#[test]
fn a_writer_waits_until_its_pages_are_its_own_design_4() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[5, 6, 7], Some(10));
    rig.map(file(2, 0), &[5, 6, 7], Some(10));
    rig.step();
    rig.host.memory = 1;
    let verdict = rig.engine.written(&mut rig.host, span(2, 0, 3));
    assert_eq!(verdict, WriteVerdict::Wait { why: UnmergeError::NoMemory(site(2, 1)) });
    rig.check();
    (0..3).for_each(|o| rig.host.set_busy(site(2, o), true));
    assert_eq!(rig.step().released, []);
    rig.host.memory = 9;
    assert_eq!(rig.step().released, [span(2, 0, 3)]);
    assert!((0..3).all(|o| !rig.host.is_shared(site(2, o))));
}

#[test]
fn truncation_is_success_k063() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[5, 6, 7], Some(10));
    rig.map(file(2, 0), &[5, 6, 7], Some(10));
    rig.step();
    rig.host.truncate(2, 1);
    rig.engine.truncated(&mut rig.host, MappingId(2), PageIndex(1));
    rig.check();
    assert_eq!(rig.gauges().pages_sharing, 1);
    // A truncation the engine was not told of, in the middle of a break.
    rig.host.before.push_back((HostOp::Break, Hook::Truncate(site(1, 1))));
    assert_eq!(rig.engine.written(&mut rig.host, span(1, 0, 3)), WriteVerdict::Go);
    rig.check();
    assert!(rig.decided(Decision::BreakVanished) >= 1);
}

#[test]
fn exit_never_waits_and_leaves_nothing_k090_k095_k096_k102_t05() {
    let mut rig = Rig::big();
    rig.engine.set_run(&mut rig.host, Run::Stop).unwrap();
    rig.map(content(1), &[40], None);
    rig.engine.exit(MappingId(1));
    assert_eq!(rig.step().action, Action::Wait, "fast path: nothing is left (T-05)");
    rig.engine.set_run(&mut rig.host, Run::Merge).unwrap();
    rig.map(content(2), &[40], None);
    rig.map(content(3), &[40], None);
    rig.passes(2);
    rig.engine.set_run(&mut rig.host, Run::Stop).unwrap();
    rig.engine.exit(MappingId(2));
    rig.host.teardown(2);
    rig.step();
    assert_eq!(rig.pages(), (1, 0, 0, 0), "swept while stopped (K-102)");
    // The scanner notices before it is told (K-093).
    rig.host.set_exiting(3);
    rig.engine.set_run(&mut rig.host, Run::Merge).unwrap();
    rig.step();
    assert!(rig.gauges().is_zero());
    rig.engine.exit(MappingId(3));
    rig.host.teardown(3);
    assert_eq!(rig.host.shared_count(), 0);
}

#[test]
fn an_exit_in_the_middle_of_a_merge_backs_out_k094() {
    for op in [HostOp::Protect, HostOp::Compare, HostOp::MakeShared, HostOp::Share, HostOp::Digest] {
        for id in [1, 2] {
            let mut rig = Rig::big();
            rig.map(content(1), &[40, 41], None);
            rig.map(content(2), &[40, 41], None);
            rig.step();
            rig.host.before.push_back((op, Hook::Exit(MappingId(id))));
            rig.step();
            rig.engine.exit(MappingId(id));
            rig.host.teardown(id);
            rig.passes(2);
            assert_eq!((rig.host.shared_count(), rig.host.protected_count()), (0, 0), "{op} {id}");
        }
    }
}

#[test]
fn relocation_keeps_every_site_m001_m011() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.passes(2);
    let from = rig.host.any_shared().unwrap();
    let to = rig.host.relocate(from, None);
    let one = |n| SharedSpan { start: SharedPage(n), pages: PageCount(1) };
    rig.engine.relocated(one(from), one(to), NodeId(0), None);
    rig.check();
    assert_eq!(rig.engine.shared_at(site(2, 0)), Some(SharedPage(to)));
    rig.map(content(3), &[40], None);
    rig.step();
    assert_eq!(rig.pages(), (1, 2, 0, 0), "found under its key still");
}

#[test]
fn nodes_merge_apart_and_a_moved_page_is_filed_anew_m017_m018_m019() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { merge_across_nodes: false, ..rig.engine.knobs() });
    for id in 1..=4 {
        rig.map(content(id), &[40], None);
        rig.host.set_node(id, u16::from(id > 2));
    }
    rig.passes(2);
    assert_eq!(rig.pages(), (2, 2, 0, 0), "one shared page a node");
    // The page of node 0 moves to node 1, which has an equal one already: both stay, nothing is mixed up.
    let from = rig.host.any_shared().unwrap();
    let to = rig.host.relocate(from, None);
    let one = |n| SharedSpan { start: SharedPage(n), pages: PageCount(1) };
    rig.engine.relocated(one(from), one(to), NodeId(1), None);
    rig.check();
    rig.map(content(5), &[40], None);
    rig.step();
    assert!(!rig.host.is_shared(site(5, 0)), "node 0 has no shared page any more (M-019)");
    rig.map(content(6), &[40], None);
    rig.host.set_node(6, 1);
    rig.step();
    assert_eq!(rig.engine.shared_at(site(6, 0)), Some(SharedPage(to)));
    rig.engine.set_run(&mut rig.host, Run::Unmerge).unwrap();
    assert_eq!(rig.host.shared_count(), 0);
}

/// W-034: `ContentDedupe` asks the kernel first and falls back to bytes.
#[test]
fn a_kernel_proof_falls_back_to_bytes() {
    let mut rig = Rig::big();
    let dedupe = |id| Registration { route: Route::ContentDedupe, ..file(id, 0) };
    rig.map(dedupe(1), &[40], None);
    rig.map(dedupe(2), &[40], None);
    rig.passes(2);
    assert_eq!((rig.decided(Decision::MergedBytes), rig.decided(Decision::MergedKernel)), (2, 0));
}

#[test]
fn idle_is_silent_k040_k041_k042_t06() {
    let mut rig = Rig::big();
    assert_eq!((rig.step().action, rig.engine.counters().full_scans), (Action::Wait, 0));
    rig.host.map(1, 0, &[1], None);
    assert_eq!(rig.engine.register(content(1), span(1, 0, 1)), Ok(true), "wake (K-044)");
    assert_eq!(rig.engine.register(content(1), span(1, 0, 1)), Ok(false));
    assert_eq!(rig.step().action, Action::SleepUntil(Tick(20)), "K-125");
    rig.engine.set_run(&mut rig.host, Run::Stop).unwrap();
    let before = rig.engine.total();
    assert_eq!(rig.step().action, Action::Wait);
    assert_eq!(rig.engine.total(), before);
}

#[test]
fn batches_are_as_big_as_pages_to_scan_and_absent_pages_cost_nothing_k034() {
    let mut rig = Rig::new(Knobs { pages_to_scan: 4, ..Knobs::default() });
    rig.host.map(1, 1_000_000, &[1, 2, 3, 4, 5, 6], None);
    rig.engine.register(content(1), span(1, 0, 2_000_000)).unwrap();
    assert_eq!(rig.step().scanned, PageCount(4));
    assert_eq!(rig.step().scanned, PageCount(2));
    rig.step();
    assert_eq!(rig.engine.counters().full_scans, 1);
}

#[test]
fn smart_scan_passes_over_what_never_merges() {
    let mut rig = Rig::new(Knobs { pages_to_scan: 1000, ..Knobs::default() });
    rig.map(content(1), &[40, 50], None);
    rig.passes(40);
    assert!(rig.decided(Decision::SkippedSmart) > 40);
    rig.map(content(2), &[40], None);
    rig.passes(12);
    assert_eq!(rig.gauges().pages_shared, 1, "but still looks now and then");
}

#[test]
fn errors_are_reported_and_leave_everything_consistent() {
    let ops = [
        HostOp::Observe,
        HostOp::Digest,
        HostOp::Protect,
        HostOp::Unprotect,
        HostOp::Compare,
        HostOp::MakeShared,
        HostOp::Share,
        HostOp::Release,
        HostOp::Break,
    ];
    for op in ops {
        let mut rig = Rig::big();
        rig.map(content(1), &[40, 41, 42], None);
        rig.map(content(2), &[40, 41, 43], None);
        rig.passes(2);
        rig.host.before.push_back((op, Hook::Error(5)));
        rig.host.write(site(1, 0), 44);
        rig.host.write(site(1, 2), 43);
        rig.passes(6);
        assert_eq!(rig.host.before.len(), 0, "{op} was never called");
        assert!(rig.engine.set_run(&mut rig.host, Run::Unmerge).is_ok());
        rig.step();
        assert_eq!((rig.host.merged_sites(), rig.host.protected_count(), rig.host.shared_count()), (0, 0, 0));
    }
}

#[test]
fn out_of_memory_for_shared_pages_is_not_merged_and_nothing_else() {
    let mut rig = Rig::big();
    rig.host.shared_memory = 0;
    rig.map(file(1, 0), &[5, 6], Some(10));
    rig.map(file(2, 0), &[5, 6], Some(10));
    rig.passes(2);
    assert!(rig.decided(Decision::NoMemory) >= 2);
    assert_eq!((rig.gauges().pages_shared, rig.host.protected_count()), (0, 0));
}

#[test]
fn short_runs_are_left_alone_by_choice_design_7() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { min_run_pages: 4, ..rig.engine.knobs() });
    rig.map(file(1, 0), &[5, 6], Some(10));
    rig.map(file(2, 0), &[5, 6], Some(10));
    rig.step();
    assert_eq!((rig.decided(Decision::ShortRun), rig.gauges().pages_shared), (4, 0));
}

struct Log(Arc<Mutex<Vec<(char, Span)>>>);
impl Listener for Log {
    fn start(&mut self, span: Span) {
        self.0.lock().unwrap().push(('s', span));
    }
    fn invalidate(&mut self, span: Span) {
        self.0.lock().unwrap().push(('i', span));
    }
    fn end(&mut self, span: Span) {
        self.0.lock().unwrap().push(('e', span));
    }
}

#[test]
fn listeners_hear_of_every_change_in_order_and_widened_h021_h022_h031() {
    let mut rig = Rig::big();
    rig.host.unit = 4;
    let log = Arc::new(Mutex::new(Vec::new()));
    rig.engine.add_listener(Box::new(Log(log.clone())));
    rig.map(file(1, 0), &[5; 8], Some(10));
    rig.map(file(2, 0), &[5; 8], Some(10));
    rig.host.set_busy(site(2, 0), true);
    rig.step();
    let heard = log.lock().unwrap().clone();
    let wide = [span(1, 0, 8), span(2, 0, 8)];
    assert!(heard.iter().all(|(_, s)| wide.contains(s)), "{heard:?}");
    let mut depth = 0;
    for (kind, _) in &heard {
        match kind {
            's' => depth += 1,
            'e' => depth -= 1,
            _ => assert_eq!(depth, 1, "invalidate outside its bracket"),
        }
    }
    assert_eq!(depth, 0, "H-023");
    assert_eq!(heard.iter().filter(|(k, _)| *k == 'i').count(), 2);
}
