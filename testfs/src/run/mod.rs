//! One simulated run: a seed in, a verdict out.
//!
//! The driver owns a kernel, an engine over it, and the reference model; it lets them act in an order drawn from the
//! seed, checks after every action, then quiets everything and checks that nothing is left. What it deliberately does
//! not do: read a clock, use a thread, or forgive.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use pagefold_engine::control::WriteVerdict;
use pagefold_engine::domain::{Backend, Registration, Route};
use pagefold_engine::engine::Engine;
use pagefold_engine::host::{MappingKind, NodeId as MemoryNode, ProtectKind};
use pagefold_engine::policy::{Run as RunState, Tick};
use pagefold_engine::units::{DomainId, MappingId, PageCount, PageIndex, Span};

use crate::check;
use crate::model::{Fact, Model};
use crate::sim::bugs::Plant;
use crate::sim::memory::{Event, Held};
use crate::sim::{Kernel, NodeId, Rng, World};

pub mod plan;

use plan::Plan;

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All checks held.
    Fine(Summary),
    /// A check failed: bytes, counters, structure.
    Wrong(String),
    /// Writers waited and were never let go, or something never came to rest.
    Stuck(String),
    /// Something panicked.
    Crashed(String),
}

/// What a run got done, to see that runs are worth something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Pages merged, by any proof, over the whole run.
    pub merged: u64,
    /// Most pages saved at one time.
    pub saved_max: u64,
    /// Operations that had to wait for a break.
    pub held: u64,
    /// Raced outcomes.
    pub raced: u64,
    /// Pages merged by their place on disk.
    pub physical: u64,
}

/// A run's verdict and what led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The verdict.
    pub verdict: Verdict,
    /// Every operation, in words.
    pub trace: Vec<String>,
}

/// Runs a seed, with a bug planted or none.
#[must_use]
pub fn run(seed: u64, plant: Option<Plant>) -> Report {
    let mut driver = Driver::new(seed, plant);
    let result = catch_unwind(AssertUnwindSafe(|| driver.drive()));
    let verdict = match result {
        Ok(Ok(())) => Verdict::Fine(driver.summary),
        Ok(Err(verdict)) => verdict,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Verdict::Crashed(text.unwrap_or_else(|| "a panic without words".to_owned()))
        }
    };
    Report { verdict, trace: std::mem::take(&mut driver.kernel.trace) }
}

/// Steps in which held writers must be let go once nothing disturbs.
const PATIENCE_STEPS: u32 = 300;

/// A held operation and whether its writer has announced itself already.
struct Waiter {
    held: Held,
    /// Spans the engine asked to wait for.
    pending: Vec<Span>,
    announced: bool,
}

struct Driver {
    kernel: Kernel,
    engine: Engine,
    model: Model,
    rng: Rng,
    waiters: Vec<Waiter>,
    immutable: Vec<NodeId>,
    summary: Summary,
    next_mapping: u32,
    now: u64,
}

type Checked = Result<(), Verdict>;

fn wrong(result: Result<(), String>) -> Checked {
    result.map_err(Verdict::Wrong)
}

impl Driver {
    fn new(seed: u64, plant: Option<Plant>) -> Driver {
        let mut rng = Rng::new(seed);
        let mut plan = Plan::draw(&mut rng);
        if matches!(plant, Some(Plant::DirtyUnseen | Plant::StaleMapTrusted)) {
            plan.favour_places();
        }
        let world = World::new(plan.flavour, plan.page, rng.bits());
        let engine = Engine::new(plan.knobs);
        let model = Model::new(plan.page.bytes() as usize);
        let mut kernel = Kernel::new(world, plan, rng.fork());
        kernel.plant = plant;
        kernel.trace.push(format!("{:?}", kernel.plan));
        let (waiters, immutable) = Default::default();
        let mut driver = Driver {
            kernel,
            engine,
            model,
            rng,
            waiters,
            immutable,
            summary: Summary::default(),
            next_mapping: 1,
            now: 0,
        };
        driver.engine.add_listener(Box::new(driver.kernel.translations.clone()));
        driver.set_up();
        driver
    }

    fn set_up(&mut self) {
        let page = self.kernel.page_bytes() as u64;
        for i in 0..2 + self.rng.below(2) {
            let path = format!("/f{i}");
            let realtime = self.rng.percent(40);
            let file = self.kernel.world.create(Path::new(&path), realtime).expect("a fresh name");
            self.kernel.files.push(file);
            let len = 1 + self.rng.below(9 * page);
            let mut at = 0;
            while at < len {
                let bytes = self.kernel.some_bytes();
                let n = (bytes.len() as u64).min(len - at) as usize;
                self.kernel.write_file(file, at, &bytes[..n]);
                at += page;
            }
            self.kernel.world.sync(file).expect("a file");
            for c in 0..1 + self.rng.below(3) {
                let path = format!("/f{i}c{c}");
                let copy = self.kernel.world.create(Path::new(&path), realtime).expect("a fresh name");
                if self.kernel.world.reflink(file, copy).is_ok() {
                    self.kernel.facts.push(Fact::Cloned { from: file, to: copy });
                }
                match c == 2 {
                    true => self.immutable.push(copy),
                    false => self.kernel.files.push(copy),
                }
            }
        }
        for _ in 0..3 + self.rng.below(4) {
            self.spawn();
        }
    }

    /// A new mapping, registered.
    fn spawn(&mut self) {
        let mapping = MappingId(self.next_mapping);
        self.next_mapping += 1;
        let domain = DomainId(self.rng.below(u64::from(self.kernel.plan.domains)) as u16);
        let pages = 2 + self.rng.below(9);
        let anonymous = self.rng.percent(self.kernel.plan.anonymous);
        let by_bytes = [Route::Content, Route::ContentDedupe];
        let (reg, file) = if anonymous {
            let protect = if self.rng.percent(50) { ProtectKind::Wp } else { ProtectKind::KernelCow };
            let kind = MappingKind::Anonymous;
            let (backend, route) = (Backend::Arena, Route::Content);
            (Registration { mapping, kind, protect, domain, backend, route }, None)
        } else {
            let immutable = !self.immutable.is_empty() && self.rng.percent(20);
            let list = if immutable { &self.immutable } else { &self.kernel.files };
            let file = *self.rng.pick(list).expect("there are files");
            let protect = if immutable { ProtectKind::Immutable } else { ProtectKind::Lease };
            let (kind, backend) = (MappingKind::File, Backend::Remap);
            let by_place = self.rng.percent(self.kernel.plan.by_place);
            let bytes = *self.rng.pick(&by_bytes).expect("not empty");
            let route = if by_place { Route::Physical } else { bytes };
            (Registration { mapping, kind, protect, domain, backend, route }, Some(file))
        };
        self.kernel.trace.push(format!("spawn {reg:?} of {file:?}, {pages} pages"));
        self.kernel.map(reg, file, pages);
        for page in 0..pages {
            if self.rng.percent(70) {
                self.kernel.touch(pagefold_engine::units::Site { mapping, offset: PageIndex(page) });
            }
        }
        self.register(mapping);
    }

    fn register(&mut self, mapping: MappingId) {
        let Some((reg, span)) = self.kernel.registration(mapping) else { return };
        self.engine.register(reg, span).expect("a mapping that lives can be registered");
    }

    // ---- the run ----

    fn drive(&mut self) -> Checked {
        self.check()?;
        for _ in 0..self.kernel.plan.actions {
            self.action();
            self.after_action()?;
        }
        self.quiet_down()?;
        self.tear_down()
    }

    fn action(&mut self) {
        match self.rng.below(100) {
            0..=39 => self.step(),
            40..=84 => {
                let op = self.kernel.plan.some_op(&mut self.rng);
                op.into_iter().for_each(|op| self.kernel.user_op(op));
            }
            85..=87 => self.spawn_or_fork(),
            88..=90 => self.look_up_translation(),
            91 | 92 => self.relocate_shared(),
            93 => self.register_again(),
            94 => self.set_run(),
            95 => {
                let knobs = Plan::knobs(&mut self.rng);
                self.kernel.trace.push(format!("{knobs:?}"));
                self.engine.set_knobs(knobs);
            }
            96 if self.kernel.plan.crashes => self.crash(),
            _ => self.step(),
        }
    }

    /// Tells the engine what it is due, lets writers go, takes facts, checks.
    fn after_action(&mut self) -> Checked {
        self.deliver(60);
        self.serve_writers();
        self.check()
    }

    fn check(&mut self) -> Checked {
        std::mem::take(&mut self.kernel.facts).into_iter().for_each(|f| self.model.take(f));
        wrong(check::bytes(&self.kernel, &self.model))?;
        wrong(check::structure(&self.kernel))?;
        wrong(check::counters(&self.engine))?;
        self.engine.audit();
        let total = self.engine.total();
        self.summary.saved_max = self.summary.saved_max.max(total.gauges.saved_pages().0);
        Ok(())
    }

    fn step(&mut self) {
        self.now += 20;
        let step = self.engine.step(&mut self.kernel, Tick(self.now));
        let (scanned, released) = (step.scanned, step.released);
        self.kernel.trace.push(format!("step: {scanned} pages, released {released:?}, {:?}", step.action));
        for waiter in &mut self.waiters {
            waiter.pending.retain(|s| !released.contains(s));
        }
    }

    fn deliver(&mut self, of_hundred: u64) {
        for event in std::mem::take(&mut self.kernel.events) {
            if !self.rng.percent(of_hundred) {
                self.kernel.events.push(event);
                continue;
            }
            self.kernel.trace.push(format!("tell the engine: {event:?}"));
            match event {
                Event::Truncated(mapping, from) => self.engine.truncated(&mut self.kernel, mapping, from),
                Event::Exit(mapping) => self.engine.exit(mapping),
            }
        }
    }

    // ---- writers that have to wait ----

    fn serve_writers(&mut self) {
        let fresh = std::mem::take(&mut self.kernel.held);
        self.summary.held += fresh.len() as u64;
        let fresh = fresh.into_iter().map(|held| Waiter { held, pending: Vec::new(), announced: false });
        self.waiters.extend(fresh);
        for mut waiter in std::mem::take(&mut self.waiters) {
            if !waiter.announced {
                waiter.pending = self.announce(&waiter.held);
                waiter.announced = true;
            }
            // The pages of a mapping that is gone went with it; the engine has nothing to release there.
            waiter.pending.retain(|span| self.kernel.registration(span.mapping).is_some());
            if self.is_pointless(&waiter.held) {
                continue;
            }
            if !waiter.pending.is_empty() {
                self.waiters.push(waiter);
                continue;
            }
            let words = format!("let go: {}", words(&waiter.held));
            let did = self.kernel.retry(waiter.held);
            self.kernel.trace.push(format!("{words}: {did:?}"));
        }
        // What was held once more announces itself again next time.
    }

    /// The site went with its mapping.
    fn is_pointless(&self, held: &Held) -> bool {
        matches!(held, Held::Store { site, .. } if self.kernel.registration(site.mapping).is_none())
    }

    /// Tells the engine of a writer; gives the spans it must wait for.
    fn announce(&mut self, held: &Held) -> Vec<Span> {
        let spans: Vec<Span> = match held {
            Held::Store { site, .. } => {
                vec![Span { mapping: site.mapping, start: site.offset, pages: PageCount(1) }]
            }
            Held::Write { file, .. } | Held::Cut { file, .. } => {
                let mappings = self.kernel.mappings_of(*file);
                mappings.into_iter().filter_map(|m| self.kernel.registration(m).map(|r| r.1)).collect()
            }
        };
        let mut pending = Vec::new();
        for span in spans {
            let verdict = self.engine.written(&mut self.kernel, span);
            self.kernel.trace.push(format!("writer of {span:?}: {verdict:?}"));
            if matches!(verdict, WriteVerdict::Wait { .. }) {
                pending.push(span);
            }
        }
        pending
    }

    // ---- rarer actions ----

    fn spawn_or_fork(&mut self) {
        let live = self.kernel.live();
        let parent = self.rng.pick(&live).copied().filter(|_| self.rng.percent(60));
        if live.len() > 10 {
            return;
        }
        let Some(parent) = parent else { return self.spawn() };
        let child = MappingId(self.next_mapping);
        self.next_mapping += 1;
        self.kernel.trace.push(format!("fork {parent} to {child}"));
        self.kernel.fork(parent, child);
        self.register(child);
    }

    fn look_up_translation(&mut self) {
        if let Some(site) = self.kernel.some_site(None)
            && let Some(entry) = self.kernel.entry(site)
        {
            self.kernel.trace.push(format!("a secondary user keeps {entry:?} for {site:?}"));
            self.kernel.translations.keep(site, entry);
        }
    }

    fn relocate_shared(&mut self) {
        let node = MemoryNode(self.rng.below(self.kernel.plan.nodes) as u16);
        if let Some((from, to)) = self.kernel.relocate_shared(&mut self.rng) {
            self.kernel.trace.push(format!("{from:?} moves to {to:?}"));
            self.engine.relocated(from, to, node, None);
        }
    }

    fn register_again(&mut self) {
        let live = self.kernel.live();
        let Some(mapping) = self.rng.pick(&live).copied() else { return };
        let Some((_, span)) = self.kernel.registration(mapping) else { return };
        let result = self.engine.unregister(&mut self.kernel, span);
        self.kernel.trace.push(format!("unregister mapping {mapping}: {result:?}"));
        // An exit that is not told yet makes registering an error, and pointless.
        if self.kernel.registration(mapping).is_some() {
            self.register(mapping);
        }
    }

    fn set_run(&mut self) {
        let states = [RunState::Stop, RunState::Merge, RunState::Unmerge];
        let state = *self.rng.pick(&states).expect("not empty");
        let result = self.engine.set_run(&mut self.kernel, state);
        self.kernel.trace.push(format!("run = {state:?}: {result:?}"));
        if self.rng.percent(70) {
            let result = self.engine.set_run(&mut self.kernel, RunState::Merge);
            self.kernel.trace.push(format!("run = Merge: {result:?}"));
        }
    }

    /// The engine dies and comes again, knowing nothing. Shared pages stay where they are shown; it meets them as strays.
    fn crash(&mut self) {
        self.kernel.trace.push("the engine crashes".to_owned());
        self.kernel.engine_died();
        self.engine = Engine::new(self.kernel.plan.knobs);
        self.engine.add_listener(Box::new(self.kernel.translations.clone()));
        self.kernel.events.clear();
        self.waiters.iter_mut().for_each(|w| w.announced = false);
        self.kernel.live().into_iter().for_each(|m| self.register(m));
    }

    // ---- the end ----

    /// Nothing disturbs any more: waiters must get their turn, and figures must become those of the kernel.
    fn quiet_down(&mut self) -> Checked {
        self.kernel.rough = false;
        self.kernel.trace.push("quiet".to_owned());
        while self.kernel.finish_dma(&[7]) == crate::sim::user::Did::Done {}
        let _ = self.engine.set_run(&mut self.kernel, RunState::Merge);
        for _ in 0..PATIENCE_STEPS {
            self.deliver(100);
            self.step();
            self.serve_writers();
            if self.waiters.is_empty() && self.kernel.held.is_empty() && self.kernel.events.is_empty() {
                break;
            }
        }
        self.check()?;
        if let Some(waiter) = self.waiters.first() {
            return Err(Verdict::Stuck(format!(
                "after {PATIENCE_STEPS} quiet steps still waits: {}",
                words(&waiter.held)
            )));
        }
        let passes = self.engine.counters().full_scans + 3;
        let mut steps = 0;
        while self.engine.counters().full_scans < passes && !self.kernel.live().is_empty() {
            self.step();
            steps += 1;
            if steps > 20_000 {
                return Err(Verdict::Stuck("three quiet passes did not end in 20000 steps".to_owned()));
            }
        }
        self.check()?;
        wrong(check::figures(&self.kernel, &self.engine))
    }

    /// Everything is undone, then everybody leaves: every gauge is at zero (design 12).
    fn tear_down(&mut self) -> Checked {
        self.count_decisions();
        if self.rng.percent(50) {
            let result = self.engine.set_run(&mut self.kernel, RunState::Unmerge);
            if let Err(error) = result {
                return Err(Verdict::Stuck(format!("run = 2 fails though nothing disturbs: {error}")));
            }
            self.check()?;
            wrong(check::nothing_left(&self.kernel, &self.engine))?;
        }
        for mapping in self.kernel.live() {
            self.kernel.exit(mapping);
        }
        self.deliver(100);
        self.step();
        self.step();
        self.check()?;
        wrong(check::nothing_left(&self.kernel, &self.engine))
    }

    fn count_decisions(&mut self) {
        use pagefold_engine::counters::Decision;
        let decisions = self.engine.total().decisions;
        let merges =
            [Decision::MergedPhysical, Decision::MergedBytes, Decision::MergedKernel, Decision::MergedZero];
        self.summary.merged = merges.iter().map(|d| decisions.get(*d)).sum();
        self.summary.raced = decisions.get(Decision::Raced);
        self.summary.physical = decisions.get(Decision::MergedPhysical);
    }
}

fn words(held: &Held) -> String {
    match held {
        Held::Store { site, .. } => format!("store at {site:?}"),
        Held::Write { file, offset, .. } => format!("write to {file:?} at {offset}"),
        Held::Cut { file, size } => format!("truncation of {file:?} to {size}"),
    }
}
