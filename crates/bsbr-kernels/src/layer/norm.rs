//! Normalisation of rows.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::level::TASK;

/// What is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// The standard deviation, after the mean was subtracted.
    Layer,
    /// The root mean square.
    Rms,
}

/// The normalisation of a row.
///
/// Sums run over 4 registers of partial sums, so that their error does not grow with the width as a single sum's does:
/// against exact arithmetic the result is right to 1e-6 of the largest number of the row's result, for rows of up to
/// 16,384.
#[derive(Debug, Clone, Copy)]
pub struct RowNorm<'a> {
    /// Kind.
    pub kind: NormKind,
    /// Added to the variance or mean square.
    pub epsilon: f32,
    /// Factor on each number of the row, as many as the row has.
    pub weight: Option<&'a [f32]>,
    /// The factors are `1 + weight`.
    pub plus_one: bool,
    /// Added to each number at the end.
    pub bias: Option<&'a [f32]>,
}

/// Sum of `f(x)` over a row.
macro_rules! row_sum {
    ($simd:ident, $row:expr, |$x:ident| $f:expr) => {{
        let (body, tail) = S::as_simd_f32s($row);
        let zero = $simd.splat_f32s(0.0);
        let mut sums = [zero; 4];
        let (fours, rest) = body.as_chunks::<4>();
        for four in fours {
            for (sum, &$x) in sums.iter_mut().zip(four) {
                *sum = $simd.add_f32s(*sum, $f);
            }
        }
        for (sum, &$x) in sums.iter_mut().zip(rest) {
            *sum = $simd.add_f32s(*sum, $f);
        }
        let both = $simd.add_f32s($simd.add_f32s(sums[0], sums[1]), $simd.add_f32s(sums[2], sums[3]));
        let mut total = $simd.reduce_sum_f32s(both);
        for &x in tail {
            let $x = $simd.splat_f32s(x);
            let mut first = [0.0];
            $simd.partial_store_f32s(&mut first, $f);
            total += first[0];
        }
        total
    }};
}

impl RowNorm<'_> {
    /// Mean to subtract and factor to multiply by.
    #[inline(always)]
    fn statistics<S: Simd>(&self, simd: S, row: &[f32]) -> (f32, f32) {
        let width = row.len() as f32;
        let mean = match self.kind {
            NormKind::Layer => row_sum!(simd, row, |x| x) / width,
            NormKind::Rms => 0.0,
        };
        let centre = simd.splat_f32s(mean);
        let squares = row_sum!(simd, row, |x| {
            let x = simd.sub_f32s(x, centre);
            simd.mul_f32s(x, x)
        });
        (mean, (squares / width + self.epsilon).sqrt().recip())
    }

    #[inline(always)]
    pub(super) fn apply<S: Simd>(&self, simd: S, row: &mut [f32]) {
        let (mean, factor) = self.statistics(simd, row);
        let (mean, factor) = (simd.splat_f32s(mean), simd.splat_f32s(factor));
        let one = simd.splat_f32s(if self.plus_one { 1.0 } else { 0.0 });
        let (body, tail) = S::as_mut_simd_f32s(row);
        for x in body.iter_mut() {
            *x = simd.mul_f32s(simd.sub_f32s(*x, mean), factor);
        }
        let last = simd.mul_f32s(simd.sub_f32s(simd.partial_load_f32s(tail), mean), factor);
        simd.partial_store_f32s(tail, last);
        if let Some(weight) = self.weight {
            let (weights, weights_tail) = S::as_simd_f32s(weight);
            for (x, &weight) in body.iter_mut().zip(weights) {
                *x = simd.mul_f32s(*x, simd.add_f32s(weight, one));
            }
            let weight = simd.add_f32s(simd.partial_load_f32s(weights_tail), one);
            let last = simd.mul_f32s(simd.partial_load_f32s(tail), weight);
            simd.partial_store_f32s(tail, last);
        }
        if let Some(bias) = self.bias {
            let (biases, biases_tail) = S::as_simd_f32s(bias);
            for (x, &bias) in body.iter_mut().zip(biases) {
                *x = simd.add_f32s(*x, bias);
            }
            let last = simd.add_f32s(simd.partial_load_f32s(tail), simd.partial_load_f32s(biases_tail));
            simd.partial_store_f32s(tail, last);
        }
    }

    /// Whether weight and bias are as wide as the rows.
    pub(super) fn check(&self, width: usize) {
        for parameters in [self.weight, self.bias].into_iter().flatten() {
            assert_eq!(
                parameters.len(),
                width,
                "a norm of rows of {width} numbers has {} of its own",
                parameters.len()
            );
        }
    }
}

/// Normalises each row of `width` numbers of `x` in place.
///
/// # Panics
///
/// If `x` is not whole rows or the parameters of the norm are not `width` numbers.
pub fn normalise(x: &mut [f32], width: usize, norm: &RowNorm<'_>) {
    normalise_at(Arch::new(), x, width, norm);
}

pub(super) fn normalise_at(arch: Arch, x: &mut [f32], width: usize, norm: &RowNorm<'_>) {
    struct Run<'a>(&'a RowNorm<'a>, &'a mut [f32], usize);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for row in self.1.chunks_exact_mut(self.2) {
                self.0.apply(simd, row);
            }
        }
    }
    assert!(x.len().is_multiple_of(width), "{} numbers are not rows of {width}", x.len());
    norm.check(width);
    let rows = (TASK / width).max(1);
    x.par_chunks_mut(rows * width).for_each(|rows| arch.dispatch(Run(norm, rows, width)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{level::levels, testing::Numbers};

    /// The same in f64.
    fn exact(norm: &RowNorm<'_>, row: &[f32]) -> Vec<f64> {
        let row: Vec<f64> = row.iter().map(|&x| x as f64).collect();
        let width = row.len() as f64;
        let mean = if norm.kind == NormKind::Layer { row.iter().sum::<f64>() / width } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width;
        let factor = (variance + norm.epsilon as f64).sqrt().recip();
        let weight =
            |at: usize| norm.weight.map_or(1.0, |weight| weight[at] as f64 + if norm.plus_one { 1.0 } else { 0.0 });
        let bias = |at: usize| norm.bias.map_or(0.0, |bias| bias[at] as f64);
        row.iter().enumerate().map(|(at, x)| (x - mean) * factor * weight(at) + bias(at)).collect()
    }

    #[test]
    fn rows_of_any_width_are_normalised_as_in_f64_at_every_level() {
        let mut numbers = Numbers::new(3);
        for arch in levels() {
            for width in [1, 2, 7, 16, 33, 64, 100, 576, 4099, 16_384] {
                let weight = numbers.normal(width, 0.0, 1.0);
                let bias = numbers.normal(width, 0.0, 1.0);
                for (kind, weight, plus_one, bias) in [
                    (NormKind::Rms, None, false, None),
                    (NormKind::Rms, Some(&weight), false, None),
                    (NormKind::Rms, Some(&weight), true, None),
                    (NormKind::Layer, None, false, None),
                    (NormKind::Layer, Some(&weight), false, None),
                    (NormKind::Layer, Some(&weight), false, Some(&bias)),
                ] {
                    let (weight, bias) = (weight.map(Vec::as_slice), bias.map(Vec::as_slice));
                    let norm = RowNorm { kind, epsilon: 1e-5, weight, plus_one, bias };
                    // A mean as large as the spread, as residual streams have it.
                    let x = numbers.normal(3 * width, 1.0, 1.0);
                    let mut found = x.clone();
                    normalise_at(arch, &mut found, width, &norm);
                    for (row, found) in x.chunks(width).zip(found.chunks(width)) {
                        let expected = exact(&norm, row);
                        // The mean of one number is the number: what is left is rounding times 1 / sqrt(epsilon).
                        let largest = expected.iter().fold(1f64, |largest, x| largest.max(x.abs()));
                        for (found, expected) in found.iter().zip(expected) {
                            let error = (*found as f64 - expected).abs();
                            assert!(
                                error <= 1e-6 * largest,
                                "{arch:?} {norm:?} of {width}: {found}, expected {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
