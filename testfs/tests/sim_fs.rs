//! The checks that watch the simulated file systems see what they should: planted bugs, writers between two steps.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pagefold_engine::identity::{DeviceClass, Identity};
use pagefold_testfs::conformance::{Rig, SimRig, look, random};
use pagefold_testfs::sim::bugs::Bugs;
use pagefold_testfs::sim::{Flavour, FsIx, Rng, World};

/// Steps of one run and the most seeds a planted bug may need.
const STEPS: u32 = 60;
const SEEDS_MAX: u64 = 60;

fn one_run(flavour: Flavour, bugs: Bugs, seed: u64) -> Result<(), Box<random::Wrong>> {
    let mut rig = SimRig::new(flavour, seed);
    rig.enter("run").unwrap();
    rig.sim().world().bugs = bugs;
    random::run(&mut rig, Path::new(""), seed, STEPS)
}

/// A seed nobody has seen; the message says which.
fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64
}

#[test]
fn fresh_seeds_find_nothing_wrong_with_the_rules() {
    let base = fresh_seed();
    println!("base seed {base}");
    for i in 0..30 {
        for flavour in Flavour::ALL {
            let seed = base.wrapping_add(i);
            if let Err(wrong) = one_run(flavour, Bugs::default(), seed) {
                panic!("{flavour:?} seed {seed}: {wrong}");
            }
        }
    }
}

#[test]
fn each_planted_bug_is_found() {
    let plants = [
        (Flavour::Xfs, Bugs { cache_looks_clean: true, ..Bugs::default() }),
        (Flavour::Btrfs, Bugs { cache_looks_clean: true, ..Bugs::default() }),
        (Flavour::XfsRealtime, Bugs { realtime_looks_data: true, ..Bugs::default() }),
        (Flavour::BtrfsZstd, Bugs { encoded_looks_plain: true, ..Bugs::default() }),
    ];
    for (flavour, bugs) in plants {
        let found = (0..SEEDS_MAX).find(|seed| one_run(flavour, bugs, *seed).is_err());
        assert!(found.is_some(), "{flavour:?} with {bugs:?}: nothing noticed in {SEEDS_MAX} seeds");
    }
}

/// Somebody writes, syncs and clones between the steps of a look. A look that says it did not move, of a clean file,
/// tells the truth of the moment it ended.
fn truth_of_looks(flavour: Flavour, bugs: Bugs, seed: u64) -> Result<u64, String> {
    let mut rig = SimRig::new(flavour, seed);
    rig.enter("run").unwrap();
    rig.create(Path::new("f")).unwrap();
    rig.create(Path::new("g")).unwrap();
    let mut rng = Rng::new(seed ^ 0xabcd);
    rig.write(Path::new("f"), 0, &rng.bytes(40_000)).unwrap();
    rig.write(Path::new("g"), 0, &rng.bytes(40_000)).unwrap();
    rig.sim().world().bugs = bugs;
    let node = rig.sim().world().resolve(Path::new("/run/f"), false).unwrap().node();
    let other = rig.sim().world().resolve(Path::new("/run/g"), false).unwrap().node();
    let mut decided = 0;
    for round in 0..60 {
        let mut draw = Rng::new(seed ^ (round << 20));
        rig.sim().set_interloper(Some(Box::new(move |w: &mut World, id, _| {
            let offset = draw.below(8) * 4096;
            let data = draw.bytes(5000);
            match draw.below(12) {
                0 => w.write_at(id, offset, &data).unwrap(),
                1 | 2 => w.sync(id).unwrap(),
                3 => drop(w.clone_range(other, 4096, 8192, id, offset)),
                4 => w.write_at(other, offset, &data).unwrap(),
                5 => w.truncate(id, offset + 100).unwrap(),
                6 => w.begin_writeback(id).unwrap(),
                _ => {}
            }
        })));
        let look = look(rig.source(), &rig.root(), Path::new("f")).map_err(|e| e.to_string())?;
        rig.sim().set_interloper(None);
        let world = rig.sim().world();
        for page in 0..look.pages() {
            let address = match look.page(page) {
                Identity::Physical { page, space } | Identity::Tail { page, space, .. } => {
                    (page * 4096, space.class)
                }
                _ => continue,
            };
            decided += 1;
            let valid = (look.found.size - page * 4096).min(4096) as usize;
            let realtime = address.1 == DeviceClass::Realtime;
            let disk = world.physical_bytes(FsIx(0), realtime, address.0, valid);
            let seen = world.peek_page(node, page).unwrap();
            if disk.is_none_or(|d| d != seen[..valid]) {
                return Err(format!("page {page} of round {round} is not what lies at {address:?}"));
            }
        }
    }
    Ok(decided)
}

#[test]
fn a_look_that_did_not_move_tells_the_truth() {
    for flavour in [Flavour::Xfs, Flavour::Btrfs, Flavour::XfsSmallBlocks] {
        let decided: u64 = (0..20).map(|seed| truth_of_looks(flavour, Bugs::default(), seed).unwrap()).sum();
        assert!(
            flavour == Flavour::XfsSmallBlocks || decided > 500,
            "{flavour:?}: only {decided} pages decided"
        );
    }
    let blind = Bugs { moved_unseen: true, ..Bugs::default() };
    for flavour in [Flavour::Xfs, Flavour::Btrfs] {
        let found = (0..20).any(|seed| truth_of_looks(flavour, blind, seed).is_err());
        assert!(found, "{flavour:?}: a source that does not notice movement goes unseen");
    }
}
