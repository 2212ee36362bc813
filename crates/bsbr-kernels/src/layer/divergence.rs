//! How far two rows of scores are from each other as distributions, from the scores of one part of the vocabulary after the other.

use pulp::{Arch, Simd, WithSimd};

use super::math;

/// Numbers that each lane sums in f32 before they are added to a sum in f64.
const ADDED: usize = 16;

/// `ln sum_i exp(a_i)` and, beside other scores `b`, `sum_i p_i (a_i - b_i)` with `p = softmax(a)`, of scores that come in parts.
/// Right to 5e-7: what exponentials, differences and short sums in f32 lose. With the log-sums of both rows they make the
/// Kullback-Leibler divergence of `softmax(b)` from `softmax(a)`: `mean_gap - log_sum(a) + log_sum(b)`.
///
/// A score of minus infinity counts as none, NaN stays.
#[derive(Debug, Clone)]
pub struct ScoreSums {
    arch: Arch,
    /// Sums are those of `exp(a_i - highest)`.
    highest: f32,
    weight: f64,
    gaps: Vec<f64>,
}

impl ScoreSums {
    /// Of no scores yet, beside so many rows of others.
    pub fn new(others: usize) -> Self {
        Self::new_at(Arch::new(), others)
    }

    fn new_at(arch: Arch, others: usize) -> Self {
        Self { arch, highest: f32::NEG_INFINITY, weight: 0.0, gaps: vec![0.0; others] }
    }

    /// Takes the next scores in, and those of the same tokens in each of the other rows.
    ///
    /// # Panics
    ///
    /// If there are not as many other rows as there were said to be, or they differ in length.
    pub fn push(&mut self, scores: &[f32], others: &[&[f32]]) {
        assert_eq!(others.len(), self.gaps.len(), "rows to compare with");
        let highest = highest(scores).max(self.highest);
        if highest == f32::NEG_INFINITY && !scores.iter().any(|score| score.is_nan()) {
            return;
        }
        if highest > self.highest {
            // 0 where nothing came before.
            let fade = f64::from(self.highest - highest).exp();
            self.weight *= fade;
            self.gaps.iter_mut().for_each(|gap| *gap *= fade);
            self.highest = highest;
        }
        self.weight += self.arch.dispatch(Run { scores, other: None, highest }).0;
        for (gap, other) in self.gaps.iter_mut().zip(others) {
            assert_eq!(scores.len(), other.len(), "rows of {} and {} scores", scores.len(), other.len());
            *gap += self.arch.dispatch(Run { scores, other: Some(other), highest }).1;
        }
    }

    /// `ln sum_i exp(a_i)`; minus infinity without scores.
    pub fn log_sum(&self) -> f64 {
        f64::from(self.highest) + self.weight.ln()
    }

    /// `sum_i p_i (a_i - b_i)` for one of the other rows.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn mean_gap(&self, other: usize) -> f64 {
        self.gaps[other] / self.weight
    }
}

struct Run<'a> {
    scores: &'a [f32],
    other: Option<&'a [f32]>,
    highest: f32,
}

impl WithSimd for Run<'_> {
    type Output = (f64, f64);
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, f64) {
        let (mut weight, mut gap) = (0.0, 0.0);
        let stretch = ADDED * S::F32_LANES;
        for (at, scores) in self.scores.chunks(stretch).enumerate() {
            let other = self.other.map(|other| &other[at * stretch..][..scores.len()]);
            let found = sums(simd, scores, other, self.highest);
            weight += f64::from(found.0);
            gap += f64::from(found.1);
        }
        (weight, gap)
    }
}

fn highest(scores: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = scores.as_chunks::<16>();
    for stretch in whole {
        for (lane, &score) in lanes.iter_mut().zip(stretch) {
            *lane = lane.max(score);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Sums of `w = exp(a - highest)` and of `w (a - b)`; where `w` is 0 the gap does not count, whatever it is.
#[inline(always)]
fn sums<S: Simd>(simd: S, a: &[f32], b: Option<&[f32]>, highest: f32) -> (f32, f32) {
    let (zero, shift) = (simd.splat_f32s(0.0), simd.splat_f32s(highest));
    let (body, tail) = S::as_simd_f32s(a);
    let weigh = |a: S::f32s| math::exp_nonpositive(simd, simd.sub_f32s(a, shift));
    let gap = |weight: S::f32s, a: S::f32s, b: S::f32s| {
        let gap = simd.mul_f32s(weight, simd.sub_f32s(a, b));
        simd.select_f32s(simd.equal_f32s(weight, zero), zero, gap)
    };
    let (mut weights, mut gaps) = (zero, zero);
    let others = b.map(|b| S::as_simd_f32s(b));
    for (at, &a) in body.iter().enumerate() {
        let weight = weigh(a);
        weights = simd.add_f32s(weights, weight);
        if let Some((b, _)) = others {
            gaps = simd.add_f32s(gaps, gap(weight, a, b[at]));
        }
    }
    let (mut weight_sum, mut gap_sum) = (simd.reduce_sum_f32s(weights), simd.reduce_sum_f32s(gaps));
    for (at, &a) in tail.iter().enumerate() {
        let a = simd.splat_f32s(a);
        let weight = weigh(a);
        weight_sum += first(simd, weight);
        if let Some((_, b)) = others {
            gap_sum += first(simd, gap(weight, a, simd.splat_f32s(b[at])));
        }
    }
    (weight_sum, gap_sum)
}

/// The first lane.
#[inline(always)]
fn first<S: Simd>(simd: S, x: S::f32s) -> f32 {
    let mut first = [0.0];
    simd.partial_store_f32s(&mut first, x);
    first[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{level::levels, testing::Numbers};

    fn exact_log_sum(row: &[f32]) -> f64 {
        let highest = row.iter().fold(f64::NEG_INFINITY, |highest, &x| highest.max(x as f64));
        highest + row.iter().map(|&x| (x as f64 - highest).exp()).sum::<f64>().ln()
    }

    /// Of rows that come in parts of this length.
    fn sums(arch: Arch, scores: &[f32], other: &[f32], part: usize) -> ScoreSums {
        let mut sums = ScoreSums::new_at(arch, 1);
        scores.chunks(part).zip(other.chunks(part)).for_each(|(scores, other)| sums.push(scores, &[other]));
        sums
    }

    #[test]
    fn rows_of_any_width_in_any_parts_are_those_of_f64_at_every_level() {
        let mut numbers = Numbers::new(3);
        for arch in levels() {
            for (width, part) in [(1, 1), (3, 2), (16, 16), (50, 7), (257, 300), (513, 128), (49_152, 4096)] {
                for (centre, spread) in [(0.0, 1.0), (-400.0, 8.0), (20.0, 0.01)] {
                    let a = numbers.normal(width, centre, spread);
                    let noise = numbers.normal(width, 0.0, 0.3);
                    let b: Vec<f32> = a.iter().zip(noise).map(|(a, noise)| a + noise).collect();
                    let (log_sum, other) = (exact_log_sum(&a), exact_log_sum(&b));
                    let found = sums(arch, &a, &b, part);
                    let error = (found.log_sum() - log_sum).abs();
                    assert!(error <= 5e-7, "{arch:?} {width}: {}, expected {log_sum}", found.log_sum());
                    let pairs = || a.iter().zip(&b).map(|(&a, &b)| (a as f64, b as f64));
                    let gap: f64 = pairs().map(|(a, b)| (a - log_sum).exp() * (a - b)).sum();
                    let error = (found.mean_gap(0) - gap).abs();
                    assert!(error <= 5e-7, "{arch:?} {width}: {}, expected {gap}", found.mean_gap(0));
                    let kl: f64 = pairs().map(|(a, b)| (a - log_sum).exp() * (a - log_sum - b + other)).sum();
                    let found = found.mean_gap(0) - found.log_sum() + sums(arch, &b, &a, part).log_sum();
                    assert!((found - kl).abs() <= 1e-6, "{arch:?} {width}: divergence {found}, expected {kl}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_diverge_from_itself() {
        let row = Numbers::new(4).normal(1000, 0.0, 5.0);
        assert_eq!(sums(Arch::new(), &row, &row, 64).mean_gap(0), 0.0);
    }

    #[test]
    fn what_is_ruled_out_does_not_count_and_a_nan_is_not_lost() {
        for arch in levels() {
            for (at, part) in [(0, 36), (20, 36), (35, 36), (0, 1), (20, 3), (35, 20)] {
                let mut row = vec![1.0; 36];
                row[at] = f32::NEG_INFINITY;
                let of = |a: &[f32], b: &[f32]| sums(arch, a, b, part);
                assert!((of(&row, &row).log_sum() - (1.0 + 35f64.ln())).abs() < 1e-6);
                assert_eq!(of(&row, &row).mean_gap(0), 0.0);
                let whole = vec![1.0; 36];
                assert_eq!(of(&whole, &row).mean_gap(0), f64::INFINITY);
                row[at] = f32::NAN;
                assert!(of(&row, &row).log_sum().is_nan(), "{arch:?} {at}");
                assert!(of(&row, &whole).mean_gap(0).is_nan() && of(&whole, &row).mean_gap(0).is_nan());
            }
        }
        let none = [f32::NEG_INFINITY; 3];
        assert_eq!(sums(Arch::new(), &none, &none, 2).log_sum(), f64::NEG_INFINITY);
        assert_eq!(ScoreSums::new(0).log_sum(), f64::NEG_INFINITY);
    }
}
