//! Random numbers: streams that depend on what they are for and on nothing else.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::Task;

pub(super) type Rng = StdRng;

/// What numbers are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Training,
    Evaluation,
}

/// The numbers of one sequence.
pub(super) fn generator(stream: Stream, task: Task, seed: u64, index: u64) -> Rng {
    let parts = [stream as u64, task as u64, seed, index];
    StdRng::seed_from_u64(parts.into_iter().fold(0, |mixed, part| mix(mixed ^ part)))
}

/// One step of SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number below `bound`, which is not 0.
pub(super) fn below(rng: &mut Rng, bound: usize) -> usize {
    rng.random_range(0..bound as u64) as usize
}

/// `count` different numbers below `bound`, in random order.
pub(super) fn different(rng: &mut Rng, count: usize, bound: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..bound).collect();
    for at in 0..count {
        let other = at + below(rng, bound - at);
        numbers.swap(at, other);
    }
    numbers.truncate(count);
    numbers
}
