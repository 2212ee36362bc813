//! Queries, keys and values to measure on: the same on every machine and in every run. Those of a model are made in
//! [`super::glued`], random ones here.
//!
//! In a model, neighbouring tokens have similar queries and keys: they choose much the same blocks, and a block's mean
//! says something about its keys. Independent random rows have neither property. [`Data::Walk`] imitates it with a
//! stationary walk, `x[t] = r x[t-1] + sqrt(1 - r^2) e[t]` with normal `e`, so that every number is standard normal
//! whatever the correlation `r` of neighbours.
//!
//! With `r = 0.9`, tokens 1536 to 1663 share 73 % of their 32 blocks of 8 with the token before; in SmolLM2-135M the mean
//! over the layers is 74 % (independent rows: 19 %). Further apart the walk forgets sooner than the model: 8 tokens apart
//! 36 % against 62 %, and the 128 tokens together choose 5.5 times 32 blocks against 4.2. It is the harder case for
//! whoever reads blocks for several tokens at once.

use std::thread;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// Correlation of a number with the one of the token before, under [`Data::Walk`].
pub(crate) const CORRELATION: f32 = 0.9;

/// How rows of neighbouring tokens relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Data {
    /// Random rows, each like the one before it, so that neighbours choose alike as they do in a model
    Walk,
    /// Random rows that are independent of each other
    Iid,
    /// Those of the model as it reads the text, repeated for length, the keys of each repetition times 0.9 to 1
    Model,
}

/// Random `[batch, heads, tokens, head_dim]`, a function of the arguments alone; heads differ.
pub(crate) fn random(shape: [usize; 4], data: Data, seed: u64, device: &Device, dtype: DType) -> Tensor<4> {
    let [batch, heads, tokens, width] = shape;
    let mut numbers = vec![0.0_f32; batch * heads * tokens * width];
    let size = (tokens * width).max(1);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = (batch * heads).div_ceil(threads).max(1);
    thread::scope(|scope| {
        for (part, numbers) in numbers.chunks_mut(share * size).enumerate() {
            scope.spawn(move || {
                for (head, rows) in numbers.chunks_mut(size).enumerate() {
                    fill(rows, width, data, seed.wrapping_add((part * share + head) as u64));
                }
            });
        }
    });
    Tensor::from_data(TensorData::new(numbers, shape), (device, dtype))
}

/// The rows of one head.
fn fill(rows: &mut [f32], width: usize, data: Data, seed: u64) {
    let mut normal = Normal::new(seed);
    let news = (1.0 - CORRELATION * CORRELATION).sqrt();
    for at in 0..rows.len() {
        let new = normal.next();
        rows[at] = match data {
            Data::Walk if at >= width => CORRELATION * rows[at - width] + news * new,
            Data::Walk | Data::Iid | Data::Model => new,
        };
    }
}

/// A number from 0 to 1 that belongs to a seed.
pub(crate) fn uniform(seed: u64) -> f64 {
    (Normal::new(seed).bits() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Standard normal numbers: SplitMix64 and the transform of Box and Muller.
struct Normal {
    state: u64,
    spare: Option<f32>,
}

impl Normal {
    fn new(seed: u64) -> Self {
        let mut start = Self { state: seed, spare: None };
        // Seeds that follow each other must not give shifted copies of one sequence.
        let state = start.bits().rotate_left(32) ^ start.bits();
        Self { state, spare: None }
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn next(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let bits = self.bits();
        // In (0, 1], so that the logarithm is finite, and in [0, 1).
        let radius = ((bits >> 40) as f32 + 1.0) / (1 << 24) as f32;
        let angle = ((bits & 0xff_ffff) as f32) / (1 << 24) as f32 * std::f32::consts::TAU;
        let length = (-2.0 * radius.ln()).sqrt();
        self.spare = Some(length * angle.sin());
        length * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(data: Data, seed: u64) -> Vec<f32> {
        let mut rows = vec![0.0; 40_000 * 4];
        fill(&mut rows, 4, data, seed);
        rows
    }

    /// Mean, variance, and correlation of a number with that of the next token, in f64.
    fn moments(rows: &[f32], width: usize) -> (f64, f64, f64) {
        let mean = |values: &mut dyn Iterator<Item = f64>, count: usize| values.sum::<f64>() / count as f64;
        let first = mean(&mut rows.iter().map(|&x| f64::from(x)), rows.len());
        let variance = mean(&mut rows.iter().map(|&x| (f64::from(x) - first).powi(2)), rows.len());
        let pairs = rows.iter().zip(&rows[width..]);
        let product = pairs.map(|(&a, &b)| (f64::from(a) - first) * (f64::from(b) - first));
        (first, variance, mean(&mut { product }, rows.len() - width) / variance)
    }

    #[test]
    fn both_kinds_are_standard_normal_and_only_a_walk_is_correlated() {
        for (data, expected, error_of_mean) in [(Data::Walk, 0.9, 0.05), (Data::Iid, 0.0, 0.015)] {
            let (mean, variance, correlation) = moments(&rows(data, 5), 4);
            assert!(mean.abs() < error_of_mean && (variance - 1.0).abs() < 0.05, "{data:?}: {mean} {variance}");
            assert!((correlation - expected).abs() < 0.02, "{data:?}: {correlation}");
        }
    }

    #[test]
    fn numbers_have_the_tails_of_a_normal_distribution() {
        let rows = rows(Data::Iid, 9);
        for (bound, share) in [(1.0, 0.3173), (2.0, 0.0455), (3.0, 0.0027)] {
            let found = rows.iter().filter(|x| x.abs() > bound).count() as f64 / rows.len() as f64;
            assert!((found - share).abs() < 0.1 * share + 0.0005, "beyond {bound}: {found}");
        }
    }

    #[test]
    fn seeds_give_unrelated_numbers_and_one_seed_the_same() {
        let [a, b, again] = [1, 2, 1].map(|seed| rows(Data::Iid, seed));
        assert_eq!(a, again);
        let product: f64 = a.iter().zip(&b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        assert!((product / a.len() as f64).abs() < 0.015, "{product}");
    }
}
