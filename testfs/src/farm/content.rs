//! Seeded numbers and seeded bytes.
//!
//! Invariant: the bytes of a file are a function of its [`Content`] and the offset alone, so two files with the same
//! content are equal byte for byte however they were made, and a farm can be made again from its seed.
//!
//! The classes exist because btrfs compression decides by looking at the bytes: `random` never compresses, `text`
//! always does. Nothing in between, or the ground truth could not be derived without asking the file system.

use serde::{Deserialize, Serialize};

/// Page size that fixtures think in (the figures of a farm are defined for pages of 4 KiB).
pub const PAGE: u64 = 4096;

/// SplitMix64: small, seedable, the same on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// A stream of its own for every pair (`seed`, `stream`).
    pub(crate) fn new(seed: u64, stream: u64) -> Rng {
        Rng(mix(seed ^ mix(stream.wrapping_add(0x9e37_79b9_7f4a_7c15))))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// True `percent` times of 100.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// From `low` to `high`, each doubling as likely as the next: how file sizes are distributed.
    pub(crate) fn log_within(&mut self, low: u64, high: u64) -> u64 {
        let (l, h) = ((low.max(1) as f64).ln(), (high.max(1) as f64).ln());
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        ((l + (h - l) * unit).exp() as u64).clamp(low, high)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What kind of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Incompressible.
    Random,
    /// Incompressible, every fourth page equal to the one three before it: duplicates inside one file.
    Repeat,
    /// Lines of text: always compresses.
    Text,
    /// Zeros that are written: allocated, ordinary content, no hole. Always compresses.
    Zeros,
    /// From outside (a tar file, a directory): nothing is known but the hash.
    Foreign,
}

impl Class {
    /// Whether btrfs's compression shrinks it; `None` when that is not known.
    #[must_use]
    pub const fn compresses(self) -> Option<bool> {
        match self {
            Class::Random | Class::Repeat => Some(false),
            Class::Text | Class::Zeros => Some(true),
            Class::Foreign => None,
        }
    }
}

/// The bytes of a file, or of what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Content {
    /// Kind of bytes.
    pub class: Class,
    /// Tells contents of one class apart.
    pub key: u64,
}

impl Content {
    /// Content that came from outside.
    pub const FOREIGN: Content = Content { class: Class::Foreign, key: 0 };

    /// Writes the bytes from `offset` on into `buffer`.
    pub fn fill(self, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        let mut page = [0u8; PAGE as usize];
        while !rest.is_empty() {
            let within = (at % PAGE) as usize;
            let length = rest.len().min(page.len() - within);
            self.page(at / PAGE, &mut page);
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&page[within..within + length]);
            at += length as u64;
            rest = later;
        }
    }

    fn page(self, index: u64, page: &mut [u8; PAGE as usize]) {
        match self.class {
            Class::Zeros | Class::Foreign => page.fill(0),
            Class::Random => random_page(self.key, index, page),
            Class::Repeat => random_page(self.key, if index % 4 == 3 { index - 3 } else { index }, page),
            Class::Text => {
                let line = format!("{:016x} {index:08x} page after page the same words\n", self.key);
                for (to, from) in page.iter_mut().zip(line.bytes().cycle()) {
                    *to = from;
                }
            }
        }
    }
}

fn random_page(key: u64, index: u64, page: &mut [u8; PAGE as usize]) {
    let mut rng = Rng::new(key, index);
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&rng.next().to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_depend_on_the_offset_not_on_how_they_are_asked_for() {
        for class in [Class::Random, Class::Repeat, Class::Text, Class::Zeros] {
            let content = Content { class, key: 7 };
            let mut whole = vec![0; 40_000];
            content.fill(0, &mut whole);
            let mut part = vec![0; 9_000];
            content.fill(12_345, &mut part);
            assert_eq!(part, whole[12_345..21_345], "{class:?}");
        }
    }

    #[test]
    fn repeat_has_equal_pages_and_random_has_none() {
        let page = |class, index: usize| {
            let mut bytes = vec![0; 32 * 4096];
            Content { class, key: 1 }.fill(0, &mut bytes);
            bytes[index * 4096..(index + 1) * 4096].to_vec()
        };
        assert_eq!(page(Class::Repeat, 3), page(Class::Repeat, 0));
        assert_ne!(page(Class::Repeat, 4), page(Class::Repeat, 0));
        assert_ne!(page(Class::Random, 3), page(Class::Random, 0));
    }

    #[test]
    fn sizes_stay_within_their_bounds() {
        let mut rng = Rng::new(1, 2);
        for _ in 0..10_000 {
            assert!((4096..=65_536).contains(&rng.log_within(4096, 65_536)));
            assert!((3..=9).contains(&rng.within(3, 9)));
        }
        assert_eq!(rng.below(0), 0);
    }
}
