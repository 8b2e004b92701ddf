//! Everything that judges pagefold: a simulated kernel, a reference model, checkers, conformance cases, fixtures.
//!
//! Invariant: nothing outside tests, benches and the `farm` and demo commands depends on this crate, and the engine
//! cannot tell the simulation from a kernel.
#![forbid(unsafe_code)]

pub mod bench;
pub mod check;
pub mod conformance;
pub mod farm;
pub mod fault;
pub mod model;
pub mod rig;
pub mod run;
pub mod sim;
pub mod truth;
