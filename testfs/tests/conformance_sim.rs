//! Every conformance case on every flavour of the simulation.

use std::collections::BTreeSet;

use pagefold_testfs::conformance::{SimRig, cases, run_all};
use pagefold_testfs::sim::Flavour;

#[test]
fn every_case_holds_on_every_flavour_that_has_what_it_needs() {
    let mut ran = BTreeSet::new();
    for flavour in Flavour::ALL {
        for seed in 0..4 {
            ran.extend(run_all(&mut SimRig::new(flavour, seed)));
        }
    }
    let all: BTreeSet<&str> = cases::<SimRig>().iter().map(|c| c.name).collect();
    assert_eq!(ran, all, "a case that no flavour can be asked is no case");
}
