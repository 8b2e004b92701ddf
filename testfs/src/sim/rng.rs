//! The one source of chance of the simulation: a seed in, always the same numbers out.
//!
//! Invariant: no clock, no entropy, no address of anything takes part; a run is its seed. It is not fit for
//! cryptography, and does not try to be.

/// A small seeded generator (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The generator of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Rng {
        Rng { state: seed }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `bound`; 0 when `bound` is 0. The small bias of the remainder does not matter here.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.bits() % bound }
    }

    /// True in about `of_hundred` of 100 cases.
    pub fn percent(&mut self, of_hundred: u64) -> bool {
        self.below(100) < of_hundred
    }

    /// One of `items`; `None` when there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let n = self.below(items.len() as u64) as usize;
        items.get(n)
    }

    /// A generator of its own for a part of the run, so that its draws do not shift everybody else's.
    #[must_use]
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.bits())
    }

    /// `len` bytes. One draw in two gives few distinct values, so that a compressing file system finds something.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mask = if self.percent(50) { 0x03 } else { 0xff };
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend(self.bits().to_le_bytes().iter().map(|b| b & mask));
        }
        out.truncate(len);
        out
    }
}

/// Mixes 64 bits (the finalizer of splitmix64); for decisions that hang on *what* is asked and not on *when*.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_stream_and_two_seeds_give_two() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            (0..32).map(|_| rng.bits()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
