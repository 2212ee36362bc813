//! Loops over one row, for any width of vector registers: exponentials, dot products, weighted sums.

use pulp::Simd;

/// Below this the exponential of an f32 is 0 here. (The smallest normal number is at -87.34.)
const LOWEST: f32 = -87.3;

/// What rounds a number added to it to an integer, which is in the low bits then, 127 more than it is: those of an exponent.
const ROUND: f32 = 12_582_912.0 + 127.0;

/// `exp(x)` to 2 ulp for `x <= 88`: `2^n p(r)` with `n = round(x / ln 2)` and `p` a polynomial for `|r| <= ln 2 / 2`
/// (Cephes' `expf`). Exactly 0 below -87.3. A NaN stays one: it goes through the polynomial, and no maximum, which would
/// drop it, is taken.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let under = simd.less_than_f32s(x, splat(LOWEST));
    let shifted = simd.mul_add_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    let r = simd.negate_mul_add_f32s(n, splat(0.693_359_4), x);
    let r = simd.negate_mul_add_f32s(n, splat(-2.121_944_4e-4), r);
    let mut p = splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = simd.mul_add_f32s(p, r, splat(c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.select_f32s(under, splat(0.0), simd.mul_f32s(p, simd.transmute_f32s_u32s(power)))
}

/// The largest number of a row; minus infinity of none.
#[inline(always)]
pub(crate) fn max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(row);
    let mut highest = simd.splat_f32s(f32::NEG_INFINITY);
    for &vector in vectors {
        highest = simd.max_f32s(highest, vector);
    }
    rest.iter().copied().fold(simd.reduce_max_f32s(highest), f32::max)
}

/// Replaces `x` by `exp(x - shift)` and returns the sum.
#[inline(always)]
pub(crate) fn exp_sum<S: Simd>(simd: S, row: &mut [f32], shift: f32) -> f32 {
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let shifts = simd.splat_f32s(shift);
    let mut sum = simd.splat_f32s(0.0);
    for vector in vectors {
        *vector = exp(simd, simd.sub_f32s(*vector, shifts));
        sum = simd.add_f32s(sum, *vector);
    }
    if !rest.is_empty() {
        let x = simd.sub_f32s(simd.partial_load_f32s(rest), shifts);
        let mut lanes = exp(simd, x);
        simd.partial_store_f32s(rest, lanes);
        // Lanes beyond the row hold exp(-shift): only those stored count.
        lanes = simd.partial_load_f32s(rest);
        sum = simd.add_f32s(sum, lanes);
    }
    simd.reduce_sum_f32s(sum)
}

/// The sum of a row.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(row);
    let mut sum = simd.splat_f32s(0.0);
    for &vector in vectors {
        sum = simd.add_f32s(sum, vector);
    }
    simd.reduce_sum_f32s(sum) + rest.iter().sum::<f32>()
}

/// Multiplies a row by a number.
#[inline(always)]
pub(crate) fn scale<S: Simd>(simd: S, row: &mut [f32], factor: f32) {
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let factors = simd.splat_f32s(factor);
    for vector in vectors {
        *vector = simd.mul_f32s(*vector, factors);
    }
    for value in rest {
        *value *= factor;
    }
}

/// `cap tanh(x / cap)` on each number of a row.
#[inline(always)]
pub(crate) fn softcap<S: Simd>(simd: S, row: &mut [f32], cap: f32) {
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let (cap, inverse) = (simd.splat_f32s(cap), simd.splat_f32s(1.0 / cap));
    for vector in vectors {
        *vector = simd.mul_f32s(tanh(simd, simd.mul_f32s(*vector, inverse)), cap);
    }
    if !rest.is_empty() {
        let x = simd.mul_f32s(simd.partial_load_f32s(rest), inverse);
        simd.partial_store_f32s(rest, simd.mul_f32s(tanh(simd, x), cap));
    }
}

/// `tanh x`: `1 - 2 / (exp(2x) + 1)`, and for small arguments, where that would cancel, the odd series. Which is also what
/// a NaN goes through and stays one.
#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let size = simd.abs_f32s(x);
    let within = simd.min_f32s(size, splat(20.0));
    let power = exp(simd, simd.add_f32s(within, within));
    let large = simd.sub_f32s(splat(1.0), simd.div_f32s(splat(2.0), simd.add_f32s(power, splat(1.0))));
    let large = simd.select_f32s(simd.less_than_f32s(x, splat(0.0)), simd.neg_f32s(large), large);
    let square = simd.mul_f32s(x, x);
    let mut p = splat(62.0 / 2835.0);
    for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
        p = simd.mul_add_f32s(p, square, splat(c));
    }
    simd.select_f32s(simd.greater_than_or_equal_f32s(size, splat(0.2)), large, simd.mul_f32s(p, x))
}

/// `x . y`.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    let mut sum = simd.splat_f32s(0.0);
    for (&x, &y) in x.iter().zip(y) {
        sum = simd.mul_add_e_f32s(x, y, sum);
    }
    simd.reduce_sum_f32s(sum) + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// `y += factor x`.
#[inline(always)]
pub(crate) fn add<S: Simd>(simd: S, factor: f32, x: &[f32], y: &mut [f32]) {
    let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(x), S::as_mut_simd_f32s(y));
    let factors = simd.splat_f32s(factor);
    for (&x, y) in x.iter().zip(y) {
        *y = simd.mul_add_e_f32s(factors, x, *y);
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        *y += factor * x;
    }
}

/// `(1 - tanh(raw / cap)^2) gradient`: what the gradient of a capped score means for the raw one. Leaves what it likes in `raw`.
#[inline(always)]
pub(crate) fn softcap_gradient<S: Simd>(simd: S, raw: &mut [f32], cap: f32, gradient: &mut [f32]) {
    softcap(simd, raw, cap);
    let ((capped, capped_rest), (gradient, rest)) = (S::as_simd_f32s(raw), S::as_mut_simd_f32s(gradient));
    let (inverse, one) = (simd.splat_f32s(1.0 / cap), simd.splat_f32s(1.0));
    for (&capped, gradient) in capped.iter().zip(gradient) {
        let share = simd.mul_f32s(capped, inverse);
        let slope = simd.sub_f32s(one, simd.mul_f32s(share, share));
        *gradient = simd.mul_f32s(slope, *gradient);
    }
    for (capped, gradient) in capped_rest.iter().zip(rest) {
        *gradient *= 1.0 - (capped / cap).powi(2);
    }
}

/// `weight (gradient - delta)`: what the gradient of a weight means for its score.
#[inline(always)]
pub(crate) fn score_gradient<S: Simd>(simd: S, weights: &[f32], delta: f32, gradient: &mut [f32]) {
    let ((weights, weights_rest), (gradient, rest)) = (S::as_simd_f32s(weights), S::as_mut_simd_f32s(gradient));
    let deltas = simd.splat_f32s(delta);
    for (&weight, gradient) in weights.iter().zip(gradient) {
        *gradient = simd.mul_f32s(weight, simd.sub_f32s(*gradient, deltas));
    }
    for (weight, gradient) in weights_rest.iter().zip(rest) {
        *gradient = weight * (*gradient - delta);
    }
}

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::layer::levels;

    /// A NaN as arithmetic makes it, and those whose other bits would reach the exponent when shifted.
    const NANS: [u32; 4] = [0x7fc0_0000, 0xffc0_0001, 0x7f80_0001, 0x7fff_ffff];

    enum Row<'a> {
        ExpSum(&'a mut [f32], f32),
        Softcap(&'a mut [f32], f32),
        Gradient(&'a mut [f32], f32, &'a mut [f32]),
    }

    impl WithSimd for Row<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            match self {
                Self::ExpSum(row, shift) => return exp_sum(simd, row, shift),
                Self::Softcap(row, cap) => softcap(simd, row, cap),
                Self::Gradient(row, cap, gradient) => softcap_gradient(simd, row, cap, gradient),
            }
            0.0
        }
    }

    #[test]
    fn a_nan_is_not_lost_at_any_level() {
        for arch in levels() {
            // In a whole register, in the last of them, in what is left.
            for at in [0, 31, 32, 35] {
                for nan in NANS.map(f32::from_bits) {
                    let mut row = vec![-1.0; 36];
                    row[at] = nan;
                    let plain = row.clone();
                    let sum = arch.dispatch(Row::ExpSum(&mut row, 0.5));
                    assert!(sum.is_nan() && row[at].is_nan(), "{arch:?} {at}: exp of {nan:?} is {}", row[at]);
                    assert_eq!(row.iter().filter(|x| x.is_nan()).count(), 1);
                    let (mut row, mut gradient) = (plain.clone(), vec![1.0; 36]);
                    arch.dispatch(Row::Softcap(&mut row, 30.0));
                    assert!(row[at].is_nan(), "{arch:?} {at}: softcap is {}", row[at]);
                    assert_eq!(row.iter().filter(|x| x.is_nan()).count(), 1);
                    arch.dispatch(Row::Gradient(&mut plain.clone(), 30.0, &mut gradient));
                    assert!(gradient[at].is_nan(), "{arch:?} {at}: its gradient is {}", gradient[at]);
                }
                // A shift that is none, as the highest of a row with a NaN may be.
                assert!(arch.dispatch(Row::ExpSum(&mut [0.0; 36], f32::NAN)).is_nan());
            }
        }
    }

    #[test]
    fn exponentials_are_those_of_f64_and_exactly_nothing_far_down_at_every_level() {
        for arch in levels() {
            let steps: Vec<f32> = (0..=20_000).map(|n| -87.29 + n as f32 * (175.2 / 20_000.0)).collect();
            let mut found = steps.clone();
            arch.dispatch(Row::ExpSum(&mut found, 0.0));
            for (&x, &found) in steps.iter().zip(&found) {
                let error = (f64::from(found) / f64::from(x).exp() - 1.0).abs();
                assert!(error <= 2.4e-7, "{arch:?}: exp({x}) is {found:e}, off by {error:e}");
            }
            let mut far = [-87.4, -88.0, -104.0, -1e4, -1e30, f32::MIN, f32::NEG_INFINITY].repeat(5);
            assert_eq!(arch.dispatch(Row::ExpSum(&mut far, 0.0)), 0.0, "{arch:?}");
            assert!(far.iter().all(|&x| x == 0.0), "{arch:?}: {far:?}");
        }
    }
}
