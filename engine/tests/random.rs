//! Random operations against the scripted host (T-13): after every single one the reference contents hold, every counter
//! is re-counted, ages never pass 1 (asserted inside), and in the end every gauge is back at zero.

mod fake;

use std::collections::BTreeSet;

use fake::*;
use pagefold_engine::control::WriteVerdict;
use pagefold_engine::domain::{Registration, Route};
use pagefold_engine::engine::Engine;
use pagefold_engine::host::*;
use pagefold_engine::policy::{Action, Knobs, Run, Tick};
use pagefold_engine::units::*;
use proptest::prelude::*;

const PAGES: u64 = 12;

#[derive(Clone, Copy, Debug)]
enum Op {
    Step(u8),
    Write(u32, u64, u64),
    LeaseWrite(u32, u64, u64),
    Pin(u32, u64, bool),
    Busy(u32, u64, bool),
    Dirty(u32, u64),
    Truncate(u32, u64),
    Exit(u32, bool),
    Fork(u32),
    Register(u32, u64, u64),
    Unregister(u32, u64, u64),
    Run(u8),
    Memory(u8, u8),
    Interrupt(u64),
    Relocate,
    Hook(usize, u8, u32, u64),
    Fill(u32, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let m = 1..6u32;
    let o = 0..PAGES;
    prop_oneof![
        12 => (1..4u8).prop_map(Op::Step),
        3 => (m.clone(), o.clone(), 1..6u64).prop_map(|(m, o, c)| Op::Write(m, o, c)),
        2 => (m.clone(), o.clone(), 1..6u64).prop_map(|(m, o, c)| Op::LeaseWrite(m, o, c)),
        1 => (m.clone(), o.clone(), any::<bool>()).prop_map(|(m, o, on)| Op::Pin(m, o, on)),
        1 => (m.clone(), o.clone(), any::<bool>()).prop_map(|(m, o, on)| Op::Busy(m, o, on)),
        1 => (m.clone(), o.clone()).prop_map(|(m, o)| Op::Dirty(m, o)),
        1 => (m.clone(), o.clone()).prop_map(|(m, o)| Op::Truncate(m, o)),
        1 => (m.clone(), any::<bool>()).prop_map(|(m, told)| Op::Exit(m, told)),
        1 => m.clone().prop_map(Op::Fork),
        2 => (m.clone(), o.clone(), 1..PAGES).prop_map(|(m, o, n)| Op::Register(m, o, n)),
        1 => (m.clone(), o.clone(), 1..PAGES).prop_map(|(m, o, n)| Op::Unregister(m, o, n)),
        2 => (0..3u8).prop_map(Op::Run),
        1 => (0..12u8, 0..12u8).prop_map(|(a, b)| Op::Memory(a, b)),
        1 => (0..4u64).prop_map(Op::Interrupt),
        1 => Just(Op::Relocate),
        3 => (0..9usize, 0..5u8, m.clone(), o.clone()).prop_map(|(a, b, m, o)| Op::Hook(a, b, m, o)),
        2 => (m, 0..3u64).prop_map(|(m, kind)| Op::Fill(m, kind)),
    ]
}

/// Mappings 1 and 2 are files, 3 anonymous, 4 a file judged by content, 5 anonymous in another domain; 11.. are forks.
fn registration(mapping: u32) -> Registration {
    match mapping {
        1 | 2 => file(mapping, 0),
        4 => Registration { route: Route::Content, ..file(mapping, 0) },
        5 => anon(mapping, 1),
        _ => anon(mapping, 0),
    }
}

struct World {
    engine: Engine,
    host: FakeHost,
    /// Mappings that exist; an exit is followed by the teardown at once.
    alive: BTreeSet<u32>,
}

impl World {
    fn fill(&mut self, mapping: u32, kind: u64) {
        if !self.alive.insert(mapping) {
            return;
        }
        let place = (mapping < 3).then_some(100);
        let contents: Vec<u64> =
            (0..PAGES).map(|n| if kind == 2 { n % 3 } else { 1 + n / 2 + kind }).collect();
        // Same place, same bytes: what extents say is true as long as nothing is dirty.
        let contents = if place.is_some() { (0..PAGES).map(|n| 50 + n).collect() } else { contents };
        self.host.map(mapping, 0, &contents, place);
        // A mapping that is still waiting to be swept refuses, as it must.
        if self.engine.register(registration(mapping), span(mapping, 0, PAGES)).is_err() {
            self.engine.step(&mut self.host, Tick(0));
            self.engine.register(registration(mapping), span(mapping, 0, PAGES)).unwrap();
        }
    }

    fn exit(&mut self, mapping: u32, told: bool) {
        if !self.alive.remove(&mapping) {
            return;
        }
        self.host.set_exiting(mapping);
        if !told {
            self.engine.step(&mut self.host, Tick(0));
        }
        self.engine.exit(MappingId(mapping));
        self.host.teardown(mapping);
    }

    fn hook(which: usize, kind: u8, mapping: u32, offset: u64) -> (HostOp, Hook) {
        let ops = [
            HostOp::Observe,
            HostOp::Digest,
            HostOp::Protect,
            HostOp::RereadMap,
            HostOp::Compare,
            HostOp::MakeShared,
            HostOp::Share,
            HostOp::Break,
            HostOp::Unprotect,
        ];
        let at = site(mapping, offset);
        let hook = match kind {
            0 | 1 => Hook::Write(at, 1 + offset % 5),
            2 => Hook::Pin(at),
            3 => Hook::Truncate(at),
            _ => Hook::Error(5),
        };
        (ops[which], hook)
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Step(n) => {
                for _ in 0..n {
                    self.engine.step(&mut self.host, Tick(0));
                }
            }
            Op::Write(m, o, c) => self.host.write(site(m, o), c),
            Op::LeaseWrite(m, o, c) => {
                if self.engine.written(&mut self.host, span(m, o, 1)) == WriteVerdict::Go {
                    self.host.write(site(m, o), c);
                }
            }
            Op::Pin(m, o, on) => self.host.pin(site(m, o), if on { 1 } else { -1 }),
            Op::Busy(m, o, on) => self.host.set_busy(site(m, o), on),
            Op::Dirty(m, o) => {
                // A dirty page of a protected or merged site can't be: the writer would have been seen.
                if self.host.exists(site(m, o)) && self.host.is_plain(site(m, o)) {
                    self.host.set_dirty(site(m, o), 90);
                }
            }
            Op::Truncate(m, o) => {
                self.host.truncate(m, o);
                self.engine.truncated(&mut self.host, MappingId(m), PageIndex(o));
            }
            Op::Exit(m, told) => self.exit(m, told),
            Op::Fork(m) => {
                if self.alive.contains(&m) && m != 5 && self.alive.insert(m + 10) {
                    self.host.fork(m, m + 10);
                    let reg = Registration { mapping: MappingId(m + 10), ..registration(m) };
                    self.engine.step(&mut self.host, Tick(0));
                    self.engine.register(reg, span(m + 10, 0, PAGES)).unwrap();
                }
            }
            Op::Register(m, o, n) => {
                if self.alive.contains(&m) {
                    self.engine.register(registration(m), span(m, o, n)).ok();
                }
            }
            Op::Unregister(m, o, n) => drop(self.engine.unregister(&mut self.host, span(m, o, n))),
            Op::Run(n) => drop(self.engine.set_run(&mut self.host, Run::try_from(n).unwrap())),
            Op::Memory(private, shared) => {
                // The highest values stand for plenty.
                let plenty = |n: u8| if n > 5 { u64::MAX } else { u64::from(n) };
                (self.host.memory, self.host.shared_memory) = (plenty(private), plenty(shared));
            }
            Op::Interrupt(n) => self.host.interrupt_after = Some(n),
            Op::Relocate => {
                if let Some(from) = self.host.any_shared() {
                    let to = self.host.relocate(from, None);
                    let one = |n| SharedSpan { start: SharedPage(n), pages: PageCount(1) };
                    self.engine.relocated(one(from), one(to), NodeId(0), None);
                }
            }
            Op::Hook(which, kind, m, o) => self.host.before.push_back(Self::hook(which, kind, m, o)),
            Op::Fill(m, kind) => self.fill(m, kind),
        }
    }

    fn check(&self) {
        self.host.check();
        self.engine.audit();
    }

    /// All undone, all gone: every gauge is zero, on both sides.
    fn finish(mut self) {
        self.host.before.clear();
        (self.host.memory, self.host.interrupt_after) = (u64::MAX, None);
        self.engine.set_run(&mut self.host, Run::Merge).unwrap();
        self.engine.set_run(&mut self.host, Run::Unmerge).unwrap();
        self.engine.step(&mut self.host, Tick(0));
        self.check();
        assert!(self.engine.total().gauges.is_zero());
        assert_eq!(
            (self.host.shared_count(), self.host.protected_count(), self.host.merged_sites()),
            (0, 0, 0)
        );
        for mapping in std::mem::take(&mut self.alive) {
            self.alive.insert(mapping);
            self.exit(mapping, true);
        }
        self.engine.step(&mut self.host, Tick(0));
        assert_eq!(self.engine.total().gauges.sites, 0);
        assert_eq!(self.engine.step(&mut self.host, Tick(0)).action, Action::Wait, "nobody is left");
    }
}

fn run(knobs: Knobs, ops: &[Op]) {
    let mut world = World { engine: Engine::new(knobs), host: FakeHost::new(), alive: BTreeSet::new() };
    (1..4).for_each(|m| world.fill(m, 0));
    for op in ops {
        world.apply(*op);
        world.check();
    }
    world.finish();
}

fn knobs() -> impl Strategy<Value = Knobs> {
    let scan = prop_oneof![Just(3u64), Just(7), Just(1000)];
    (scan, 0..4u64, 2..5u32, any::<(bool, bool, bool)>()).prop_map(
        |(pages_to_scan, limit, sharing, flags)| Knobs {
            pages_to_scan,
            max_kernel_pages: if limit == 0 { 0 } else { limit * 3 },
            max_page_sharing: if sharing == 4 { 256 } else { sharing },
            use_zero_pages: flags.0,
            smart_scan: flags.1,
            digest_shared: flags.2,
            ..Knobs::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn no_reader_sees_foreign_bytes_and_all_counters_add_up_t13(
        knobs in knobs(),
        ops in proptest::collection::vec(op(), 1..90),
    ) {
        run(knobs, &ops);
    }
}
