//! How far two rows of scores are from each other as distributions.

use pulp::{Arch, Simd, WithSimd};

use super::math;

/// Numbers that each lane sums in f32 before they are added to a sum in f64.
const ADDED: usize = 16;

/// `ln sum_i exp(x_i)`, right to 5e-7: what exponentials, differences and short sums in f32 lose. A score of minus infinity
/// counts as none, and without any score the result is minus infinity. NaN if a score is, or if all are minus infinity.
pub fn log_sum_exp(scores: &[f32]) -> f64 {
    log_sum_exp_at(Arch::new(), scores)
}

/// `sum_i p_i (a_i - b_i)` with `p = softmax(a)`. With the logs of the sums of both rows it makes the Kullback-Leibler
/// divergence of `softmax(b)` from `softmax(a)`: `mean_gap(a, b) - log_sum_exp(a) + log_sum_exp(b)`.
///
/// # Panics
///
/// If the rows differ in length.
pub fn mean_gap(a: &[f32], b: &[f32]) -> f64 {
    mean_gap_at(Arch::new(), a, b)
}

fn log_sum_exp_at(arch: Arch, scores: &[f32]) -> f64 {
    struct Run<'a>(&'a [f32], f32);
    impl WithSimd for Run<'_> {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f64 {
            let stretches = self.0.chunks(ADDED * S::F32_LANES);
            stretches.map(|stretch| f64::from(sums(simd, stretch, None, self.1).0)).sum()
        }
    }
    let highest = highest(scores);
    f64::from(highest) + arch.dispatch(Run(scores, highest)).ln()
}

fn mean_gap_at(arch: Arch, a: &[f32], b: &[f32]) -> f64 {
    struct Run<'a>(&'a [f32], &'a [f32], f32);
    impl WithSimd for Run<'_> {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f64 {
            let (mut weight, mut gap) = (0.0, 0.0);
            let stretch = ADDED * S::F32_LANES;
            for (a, b) in self.0.chunks(stretch).zip(self.1.chunks(stretch)) {
                let found = sums(simd, a, Some(b), self.2);
                weight += f64::from(found.0);
                gap += f64::from(found.1);
            }
            gap / weight
        }
    }
    assert_eq!(a.len(), b.len(), "rows of {} and {} scores", a.len(), b.len());
    arch.dispatch(Run(a, b, highest(a)))
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

    #[test]
    fn rows_of_any_width_are_those_of_f64_at_every_level() {
        let mut numbers = Numbers::new(3);
        for arch in levels() {
            for width in [1, 3, 16, 50, 257, 513, 49_152] {
                for (centre, spread) in [(0.0, 1.0), (-400.0, 8.0), (20.0, 0.01)] {
                    let a = numbers.normal(width, centre, spread);
                    let noise = numbers.normal(width, 0.0, 0.3);
                    let b: Vec<f32> = a.iter().zip(noise).map(|(a, noise)| a + noise).collect();
                    let (log_sum, other) = (exact_log_sum(&a), exact_log_sum(&b));
                    let found = log_sum_exp_at(arch, &a);
                    assert!((found - log_sum).abs() <= 5e-7, "{arch:?} {width}: {found}, expected {log_sum}");
                    let pairs = || a.iter().zip(&b).map(|(&a, &b)| (a as f64, b as f64));
                    let gap: f64 = pairs().map(|(a, b)| (a - log_sum).exp() * (a - b)).sum();
                    let found = mean_gap_at(arch, &a, &b);
                    assert!((found - gap).abs() <= 5e-7, "{arch:?} {width}: {found}, expected {gap}");
                    let kl: f64 = pairs().map(|(a, b)| (a - log_sum).exp() * (a - log_sum - b + other)).sum();
                    let found = found - log_sum_exp_at(arch, &a) + log_sum_exp_at(arch, &b);
                    assert!((found - kl).abs() <= 1e-6, "{arch:?} {width}: divergence {found}, expected {kl}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_diverge_from_itself() {
        let row = Numbers::new(4).normal(1000, 0.0, 5.0);
        assert_eq!(mean_gap(&row, &row), 0.0);
    }

    #[test]
    fn what_is_ruled_out_does_not_count_and_a_nan_is_not_lost() {
        for arch in levels() {
            for at in [0, 20, 35] {
                let mut row = vec![1.0; 36];
                row[at] = f32::NEG_INFINITY;
                assert!((log_sum_exp_at(arch, &row) - (1.0 + 35f64.ln())).abs() < 1e-6);
                assert_eq!(mean_gap_at(arch, &row, &row), 0.0);
                let whole = vec![1.0; 36];
                assert_eq!(mean_gap_at(arch, &whole, &row), f64::INFINITY);
                row[at] = f32::NAN;
                assert!(log_sum_exp_at(arch, &row).is_nan(), "{arch:?} {at}");
                assert!(mean_gap_at(arch, &row, &whole).is_nan() && mean_gap_at(arch, &whole, &row).is_nan());
            }
        }
        assert!(log_sum_exp(&[f32::NEG_INFINITY; 3]).is_nan());
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
    }
}
