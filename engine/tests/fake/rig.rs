//! An engine over the scripted host, checked after every step.

use pagefold_engine::counters::{Decision, Gauges};
use pagefold_engine::domain::Registration;
use pagefold_engine::engine::Engine;
use pagefold_engine::policy::{Knobs, Tick};
use pagefold_engine::scanner::Step;

use super::{FakeHost, anon, span};

/// An engine and its host; every step is followed by all checks.
pub struct Rig {
    pub engine: Engine,
    pub host: FakeHost,
}

impl Rig {
    pub fn new(knobs: Knobs) -> Rig {
        Rig { engine: Engine::new(knobs), host: FakeHost::new() }
    }

    pub fn big() -> Rig {
        Rig::new(Knobs { pages_to_scan: 1_000_000, smart_scan: false, ..Knobs::default() })
    }

    pub fn step(&mut self) -> Step {
        let step = self.engine.step(&mut self.host, Tick(0));
        self.check();
        step
    }

    pub fn check(&self) {
        self.host.check();
        self.engine.audit();
    }

    pub fn passes(&mut self, n: usize) {
        (0..n).for_each(|_| drop(self.step()));
    }

    pub fn map(&mut self, reg: Registration, contents: &[u64], place: Option<u64>) {
        let id = reg.mapping.0;
        self.host.map(id, 0, contents, place);
        self.engine.register(reg, span(id, 0, contents.len().max(1) as u64)).unwrap();
    }

    pub fn gauges(&self) -> Gauges {
        self.engine.total().gauges
    }

    /// (shared, sharing, unshared, volatile)
    pub fn pages(&self) -> (u64, u64, u64, u64) {
        let g = self.gauges();
        (g.pages_shared, g.pages_sharing, g.pages_unshared, g.pages_volatile())
    }

    pub fn decided(&self, decision: Decision) -> u64 {
        self.engine.total().decisions.get(decision)
    }
}

/// Anonymous memory in domain 0: equal by content only.
pub fn content(mapping: u32) -> Registration {
    anon(mapping, 0)
}
