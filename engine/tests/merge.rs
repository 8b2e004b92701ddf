//! Scenarios of the merge engine over the scripted host. Requirement ids in the names and comments.

mod fake;

use fake::*;
use pagefold_engine::control::WriteVerdict;
use pagefold_engine::counters::Decision;
use pagefold_engine::domain::{Backend, Owner, Registration, Route};
use pagefold_engine::host::*;
use pagefold_engine::policy::{Knobs, Run};
use pagefold_engine::units::*;

#[test]
fn clones_merge_in_one_pass_as_one_run_q34() {
    let mut rig = Rig::big();
    let pages: Vec<u64> = (10..60).collect();
    for id in 1..=3 {
        rig.map(file(id, 0), &pages, Some(500));
    }
    rig.step();
    assert_eq!(rig.pages(), (50, 100, 0, 0));
    assert_eq!(rig.decided(Decision::MergedPhysical), 150);
    assert_eq!(rig.host.calls[&HostOp::MakeShared], 1, "a run is made at once");
    assert_eq!(rig.host.calls[&HostOp::Share], 3, "and shared at once");
    assert!(!rig.host.calls.contains_key(&HostOp::Digest), "no byte is read for what extents prove");
    assert_eq!(rig.engine.profit(PageSize::KIB4).saved_bytes, 100 * 4096);
}

#[test]
fn equal_bytes_merge_only_after_two_equal_checksums_k058_k059() {
    let mut rig = Rig::big();
    rig.map(content(1), &[11], None);
    rig.map(content(2), &[11], None);
    rig.step();
    assert_eq!(rig.pages(), (0, 0, 0, 2), "seen once: volatile");
    rig.step();
    assert_eq!(rig.pages(), (1, 1, 0, 0));
    // A third joins without a checksum filter: the stable index comes first.
    rig.map(content(3), &[11], None);
    rig.step();
    assert_eq!(rig.pages(), (1, 2, 0, 0));
}

#[test]
fn a_page_that_changes_never_enters_the_unstable_index_k059() {
    let mut rig = Rig::big();
    rig.map(content(1), &[11, 12], None);
    rig.step();
    for n in 0..5 {
        rig.host.write(site(1, 0), 200 + n);
        rig.step();
        assert_eq!(rig.pages(), (0, 0, 1, 1));
    }
}

#[test]
fn anonymous_pages_merge_with_file_pages_w003() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { digest_shared: true, ..rig.engine.knobs() });
    rig.map(file(1, 0), &[21, 22, 23], Some(70));
    rig.map(file(2, 0), &[21, 22, 23], Some(70));
    rig.step();
    rig.map(content(3), &[22, 99, 21], None);
    rig.step();
    assert_eq!(rig.pages(), (3, 5, 0, 1));
    let of = |backend| rig.engine.counters().of_backend(backend).gauges;
    assert_eq!((of(Backend::Remap).pages_shared, of(Backend::Remap).pages_sharing), (3, 3));
    assert_eq!((of(Backend::Arena).pages_shared, of(Backend::Arena).pages_sharing), (0, 2));
    assert!(rig.host.is_shared(site(3, 0)) && rig.host.is_shared(site(3, 2)));
}

#[test]
fn the_other_backend_takes_a_shared_page_over_k013() {
    let mut rig = Rig::big();
    let by_content = |id| Registration { route: Route::Content, ..file(id, 0) };
    rig.map(by_content(1), &[31], None);
    rig.map(content(2), &[31], None);
    rig.map(content(3), &[31], None);
    rig.passes(2);
    let of = |rig: &Rig, backend| {
        let g = rig.engine.counters().account(Owner { domain: DomainId(0), backend }).gauges;
        (g.pages_shared, g.pages_sharing)
    };
    assert_eq!((of(&rig, Backend::Remap), of(&rig, Backend::Arena)), ((1, 0), (0, 2)));
    assert_eq!(rig.engine.written(&mut rig.host, span(1, 0, 1)), WriteVerdict::Go);
    assert_eq!((of(&rig, Backend::Remap), of(&rig, Backend::Arena)), ((0, 0), (1, 1)));
    rig.check();
}

#[test]
fn nothing_is_shared_across_domains() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[5, 6], Some(10));
    rig.map(file(2, 1), &[5, 6], Some(10));
    rig.map(anon(3, 0), &[8], None);
    rig.map(anon(4, 1), &[8], None);
    rig.passes(4);
    assert_eq!(rig.pages(), (0, 0, 6, 0));
    assert_eq!(rig.host.merged_sites(), 0);
}

#[test]
fn a_fork_into_another_domain_is_broken_not_adopted() {
    let mut rig = Rig::big();
    rig.map(content(1), &[8, 8], None);
    rig.passes(2);
    rig.host.fork(1, 9);
    rig.engine.register(anon(9, 1), span(9, 0, 2)).unwrap();
    rig.step();
    assert_eq!(rig.decided(Decision::ForeignDomain), 2);
    assert!(!rig.host.is_shared(site(9, 0)) && !rig.host.is_shared(site(9, 1)));
    assert_eq!(rig.pages(), (1, 1, 0, 2));
}

#[test]
fn dirty_cache_after_protection_is_no_proof_design_5_6() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[5, 6], Some(10));
    rig.map(file(2, 0), &[5, 6], Some(10));
    // An unsynced overwrite: the map still names the shared extent, the bytes differ.
    rig.host.set_dirty(site(2, 0), 77);
    rig.step();
    assert_eq!(rig.decided(Decision::DirtyCache), 1);
    assert_eq!(rig.pages(), (1, 1, 1, 1), "the clean page merges, the dirty one does not");
    assert!(!rig.host.is_shared(site(2, 0)));
}

#[test]
fn a_stale_hint_is_no_proof_design_5_5() {
    let mut rig = Rig::big();
    rig.map(file(1, 0), &[5], Some(10));
    rig.map(file(2, 0), &[5], Some(10));
    // 1 was scanned and waits; then it is rewritten elsewhere, before 2 finds it as its mate.
    rig.host.before.push_back((HostOp::Observe, Hook::Write(site(9, 9), 0)));
    rig.host.before.push_back((HostOp::Observe, Hook::Write(site(1, 0), 6)));
    rig.step();
    assert_eq!(rig.decided(Decision::HintStale), 1);
    assert_eq!((rig.pages(), rig.host.shared_count()), ((0, 0, 0, 2), 0));
}

#[test]
fn a_write_between_protect_and_share_is_raced_p004() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.step();
    rig.host.before.push_back((HostOp::Share, Hook::Write(site(1, 0), 41)));
    rig.step();
    assert_eq!(rig.decided(Decision::Raced), 1);
    assert_eq!((rig.gauges().pages_shared, rig.host.shared_count()), (0, 0), "K-015, K-057");
    assert_eq!(rig.host.protected_count(), 0);
}

#[test]
#[should_panic(expected = "reads bytes nobody wrote")]
fn a_host_that_ignores_the_stamp_is_caught() {
    let mut rig = Rig::big();
    rig.host.planted_share_ignores_stamp = true;
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.step();
    rig.host.before.push_back((HostOp::Share, Hook::Write(site(1, 0), 41)));
    rig.step();
}

#[test]
fn a_failed_second_merge_is_taken_back_k056_k015() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.step();
    // The first Share is the mate's, the race hits the second.
    rig.host.before.push_back((HostOp::Share, Hook::Write(site(9, 9), 0)));
    rig.host.before.push_back((HostOp::Share, Hook::Write(site(2, 0), 41)));
    rig.step();
    assert_eq!(rig.decided(Decision::TakenBack), 1);
    assert_eq!(rig.pages(), (0, 0, 0, 2));
    assert_eq!((rig.host.shared_count(), rig.host.protected_count(), rig.host.merged_sites()), (0, 0, 0));
}

#[test]
fn one_pinned_page_does_not_cost_its_run_p001() {
    let mut rig = Rig::big();
    let pages: Vec<u64> = (10..30).collect();
    rig.map(file(1, 0), &pages, Some(500));
    rig.map(file(2, 0), &pages, Some(500));
    rig.host.pin(site(2, 7), 1);
    rig.step();
    assert_eq!(rig.pages(), (19, 19, 1, 1));
    assert_eq!(rig.decided(Decision::Pinned), 1);
    rig.host.pin(site(2, 7), -1);
    rig.step();
    assert_eq!(rig.pages(), (20, 20, 0, 0));
}

#[test]
fn colliding_digests_differ_in_the_proof_m024() {
    let mut rig = Rig::big();
    rig.map(content(1), &[101], None);
    rig.map(content(2), &[102], None);
    rig.passes(3);
    assert!(rig.decided(Decision::Differs) >= 1);
    assert_eq!((rig.gauges().pages_shared, rig.host.shared_count()), (0, 0));
}

#[test]
fn the_limit_refuses_new_pages_and_never_a_join_k005_k007() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { max_kernel_pages: 1, ..rig.engine.knobs() });
    rig.map(content(1), &[40, 50], None);
    rig.map(content(2), &[40, 50], None);
    rig.passes(3);
    assert_eq!((rig.gauges().pages_shared, rig.gauges().pages_sharing), (1, 1));
    assert!(rig.decided(Decision::LimitReached) >= 1);
    rig.map(content(3), &[40], None);
    rig.step();
    assert_eq!(rig.gauges().pages_sharing, 2);
    rig.engine.set_knobs(Knobs { max_kernel_pages: 0, ..rig.engine.knobs() });
    rig.passes(2);
    assert_eq!(rig.gauges().pages_shared, 2, "0 is no limit (K-006); the refused stayed candidates");
}

#[test]
fn max_page_sharing_makes_another_copy() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { max_page_sharing: 3, ..rig.engine.knobs() });
    for id in 1..=7 {
        rig.map(content(id), &[40], None);
    }
    rig.passes(4);
    assert_eq!((rig.gauges().pages_shared, rig.gauges().pages_sharing), (2, 4));
    assert!(rig.decided(Decision::ChainFull) >= 1);
    rig.engine.set_run(&mut rig.host, Run::Unmerge).unwrap();
    assert_eq!(rig.host.shared_count(), 0);
}

#[test]
fn zero_pages_use_no_shared_page_and_are_undone_k120() {
    let mut rig = Rig::big();
    rig.engine.set_knobs(Knobs { use_zero_pages: true, ..rig.engine.knobs() });
    rig.map(content(1), &[0, 0, 0, 9], None);
    rig.passes(2);
    assert_eq!((rig.gauges().zero_pages, rig.gauges().pages_shared), (3, 0));
    assert_eq!(rig.host.calls[&HostOp::Share], 1, "neighbours go at once");
    rig.engine.set_run(&mut rig.host, Run::Unmerge).unwrap();
    assert_eq!((rig.host.merged_sites(), rig.host.protected_count()), (0, 0));
}

#[test]
fn the_last_sharer_gets_its_page_back_k030_k031() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.passes(2);
    rig.host.write(site(1, 0), 41);
    rig.step();
    assert_eq!(rig.decided(Decision::CowBroken), 1);
    assert_eq!(rig.decided(Decision::LastSharer), 1);
    assert_eq!((rig.host.shared_count(), rig.host.merged_sites()), (0, 0));
    assert_eq!(rig.gauges().pages_unshared, 0, "not in the same pass (K-031)");
    rig.step();
    assert_eq!(rig.gauges().pages_unshared, 2, "its checksum was taken at once (K-031); 41 held still");
}

#[test]
fn a_last_sharer_that_cannot_be_broken_leaves_the_tree_and_is_tried_again_k035_k065() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.passes(2);
    rig.host.write(site(1, 0), 41);
    rig.host.memory = 0;
    rig.step();
    assert_eq!((rig.gauges().pages_shared, rig.host.merged_sites()), (0, 1));
    rig.passes(2);
    assert!(rig.decided(Decision::BreakNoMemory) >= 3, "every pass tries (K-065)");
    rig.host.memory = 10;
    rig.step();
    assert_eq!((rig.host.merged_sites(), rig.host.protected_count(), rig.host.shared_count()), (0, 0, 0));
}

#[test]
fn a_forked_copy_is_appended_without_a_merge_k016_k053() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.passes(2);
    let shares = rig.host.calls[&HostOp::Share];
    rig.host.fork(1, 9);
    rig.engine.register(content(9), span(9, 0, 1)).unwrap();
    rig.step();
    assert_eq!((rig.pages(), rig.host.calls[&HostOp::Share]), ((1, 2, 0, 0), shares));
    assert_eq!(rig.decided(Decision::Forked), 1);
    let page = rig.engine.shared_at(site(9, 0)).unwrap();
    assert_eq!(rig.engine.sites_of(page, MappingId(9)), [(PageIndex(0), Private(7))], "W-011, W-012");
}

#[test]
fn a_fork_whose_shared_page_left_the_index_is_broken_k076() {
    let mut rig = Rig::big();
    rig.map(content(1), &[40], None);
    rig.map(content(2), &[40], None);
    rig.passes(2);
    rig.host.fork(1, 9);
    for id in [1, 2] {
        rig.engine.unregister(&mut rig.host, span(id, 0, 1)).unwrap();
    }
    rig.engine.register(content(9), span(9, 0, 1)).unwrap();
    rig.step();
    assert_eq!(
        (rig.decided(Decision::StrayBroken), rig.host.merged_sites(), rig.host.protected_count()),
        (1, 0, 0)
    );
}
