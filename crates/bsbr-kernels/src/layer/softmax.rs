//! Rows of scores to rows of weights.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{level::TASK, math};

/// Replaces each row of `width` scores by its softmax, right to a relative error of 1e-6 for weights above 1e-35. A row
/// of nothing but negative infinities becomes NaN, as it has no softmax.
///
/// # Panics
///
/// If `x` is not whole rows.
pub fn softmax(x: &mut [f32], width: usize) {
    softmax_at(Arch::new(), x, width);
}

fn softmax_at(arch: Arch, x: &mut [f32], width: usize) {
    struct Run<'a>(&'a mut [f32], usize);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for row in self.0.chunks_exact_mut(self.1) {
                softmax_row(simd, row);
            }
        }
    }
    assert!(x.len().is_multiple_of(width), "{} numbers are not rows of {width}", x.len());
    let rows = (TASK / width).max(1);
    x.par_chunks_mut(rows * width).for_each(|rows| arch.dispatch(Run(rows, width)));
}

#[inline(always)]
fn softmax_row<S: Simd>(simd: S, row: &mut [f32]) {
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let (body, tail) = S::as_mut_simd_f32s(row);
    let highest = body.iter().fold(lowest, |highest, &x| simd.max_f32s(highest, x));
    let highest = tail.iter().fold(simd.reduce_max_f32s(highest), |highest, &x| highest.max(x));
    let highest = simd.splat_f32s(highest);
    let mut sums = [simd.splat_f32s(0.0); 2];
    for (at, x) in body.iter_mut().enumerate() {
        *x = math::exp_nonpositive(simd, simd.sub_f32s(*x, highest));
        sums[at % 2] = simd.add_f32s(sums[at % 2], *x);
    }
    let last = math::exp_nonpositive(simd, simd.sub_f32s(simd.partial_load_f32s(tail), highest));
    simd.partial_store_f32s(tail, last);
    let sum = simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1])) + tail.iter().sum::<f32>();
    let share = simd.splat_f32s(sum.recip());
    for x in body {
        *x = simd.mul_f32s(*x, share);
    }
    let last = simd.mul_f32s(simd.partial_load_f32s(tail), share);
    simd.partial_store_f32s(tail, last);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{level::levels, testing::Numbers};

    #[test]
    fn rows_of_any_width_are_those_of_f64_at_every_level() {
        let mut numbers = Numbers::new(8);
        for arch in levels() {
            for width in [1, 3, 16, 50, 257, 4096] {
                // Scores a softmax has to be careful with: large, far apart, and some that may not be seen.
                let mut x = numbers.normal(4 * width, 500.0, 20.0);
                x.iter_mut().skip(1).step_by(width.max(7)).for_each(|x| *x = -1e30);
                let mut found = x.clone();
                softmax_at(arch, &mut found, width);
                for (row, found) in x.chunks(width).zip(found.chunks(width)) {
                    let highest = row.iter().fold(f64::NEG_INFINITY, |highest, &x| highest.max(x as f64));
                    let exps: Vec<f64> = row.iter().map(|&x| (x as f64 - highest).exp()).collect();
                    let sum = exps.iter().sum::<f64>();
                    for (found, exp) in found.iter().zip(exps) {
                        let error = (*found as f64 - exp / sum).abs();
                        assert!(error <= 1e-6 * exp / sum + 1e-37, "{arch:?} {width}: {found}, expected {}", exp / sum);
                    }
                }
            }
        }
    }

    #[test]
    fn a_nan_is_not_lost() {
        for arch in levels() {
            for at in [0, 20, 35] {
                let mut x = vec![1.0; 36];
                x[at] = f32::NAN;
                softmax_at(arch, &mut x, 36);
                assert!(x.iter().all(|x| x.is_nan()), "{arch:?} {at}");
            }
        }
    }
}
