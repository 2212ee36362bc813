//! Exponentials and what is made of them, a register of numbers at a time.
//!
//! Polynomials after Cephes; that of the normal distribution is a fit of our own. A NaN stays a NaN.

use pulp::Simd;

/// Below it `exp` is smaller than the smallest normal number.
const EXP_LOW: f32 = -87.336_54;

/// Adding and subtracting it rounds to an integer, which is then in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// `ln 2` in two parts, the first with few enough bits that its multiples are exact.
const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);

/// `exp(r) = 1 + r + r^2 p(r)` for `|r| <= ln 2 / 2`, the highest power first.
const EXP: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// `tanh(x) = x + x^3 p(x^2)` for `|x| <= 0.625`.
const TANH: [f32; 5] = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1];

/// `Phi(-b) exp(b^2 / 2)` as a polynomial in `(b - 4) / (b + 4)`, `0 <= b <= 13.3`; relative error of the fit 1.2e-8.
const NORMAL: [f32; 10] = [
    -6.775_82e-5,
    -1.722_395_5e-4,
    6.574_396_5e-4,
    5.052_202e-4,
    -8.497_266e-3,
    3.086_495_2e-2,
    -7.170_686e-2,
    1.243_792_4e-1,
    -1.703_977_4e-1,
    9.441_064e-2,
];

#[inline(always)]
fn polynomial<S: Simd>(simd: S, coefficients: &[f32], x: S::f32s) -> S::f32s {
    let mut sum = simd.splat_f32s(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        sum = simd.mul_add_e_f32s(sum, x, simd.splat_f32s(coefficient));
    }
    sum
}

/// `exp(x)` for `x <= 0`; 0 where it would be below the smallest normal number. A NaN goes through the polynomial and stays
/// one.
#[inline(always)]
pub(super) fn exp_nonpositive<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let shifted = simd.add_f32s(simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E)), round);
    let n = simd.sub_f32s(shifted, round);
    let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN2.0), x);
    let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN2.1), r);
    let square = simd.mul_f32s(r, r);
    let exp = simd.mul_add_e_f32s(polynomial(simd, &EXP, r), square, r);
    let exp = simd.add_f32s(exp, simd.splat_f32s(1.0));
    // 2^n: n stands in the lowest bits of `shifted`, everything above is shifted out.
    let bits = simd.add_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(127));
    let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)));
    // Where the result is too small these numbers mean nothing.
    let under = simd.less_than_f32s(x, simd.splat_f32s(EXP_LOW));
    simd.select_f32s(under, simd.splat_f32s(0.0), simd.mul_f32s(exp, power))
}

/// `y` where `x` is a number.
#[inline(always)]
fn keep_nan<S: Simd>(simd: S, x: S::f32s, y: S::f32s) -> S::f32s {
    simd.select_f32s(simd.equal_f32s(x, x), y, x)
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let exp = exp_nonpositive(simd, simd.neg_f32s(simd.abs_f32s(x)));
    let above = simd.select_f32s(simd.less_than_f32s(x, zero), exp, one);
    simd.div_f32s(above, simd.add_f32s(one, exp))
}

/// `tanh(x)`.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let size = simd.abs_f32s(x);
    let square = simd.mul_f32s(x, x);
    let near = simd.mul_add_e_f32s(polynomial(simd, &TANH, square), simd.mul_f32s(square, x), x);
    let exp = exp_nonpositive(simd, simd.mul_f32s(size, simd.splat_f32s(-2.0)));
    let far = simd.div_f32s(simd.sub_f32s(one, exp), simd.add_f32s(one, exp));
    let far = simd.select_f32s(simd.less_than_f32s(x, zero), simd.neg_f32s(far), far);
    simd.select_f32s(simd.less_than_f32s(size, simd.splat_f32s(0.625)), near, far)
}

/// The normal distribution function `(1 + erf(x / sqrt 2)) / 2`.
#[inline(always)]
pub(super) fn normal<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    // Past it the tail is 0 anyway.
    let size = keep_nan(simd, x, simd.min_f32s(simd.abs_f32s(x), simd.splat_f32s(13.3)));
    let four = simd.splat_f32s(4.0);
    let t = simd.div_f32s(simd.sub_f32s(size, four), simd.add_f32s(size, four));
    // The rounding error of the square counts as much as the square is large:
    // exp(-(s + e) / 2) = exp(-s / 2) (1 - e / 2).
    let square = simd.mul_f32s(size, size);
    let error = rounding_of_square(simd, size, square);
    let half = simd.splat_f32s(-0.5);
    let exp = exp_nonpositive(simd, simd.mul_f32s(square, half));
    let exp = simd.mul_add_e_f32s(exp, simd.mul_f32s(error, half), exp);
    let tail = simd.mul_f32s(polynomial(simd, &NORMAL, t), exp);
    simd.select_f32s(simd.less_than_f32s(x, zero), tail, simd.sub_f32s(one, tail))
}

/// `x^2 - square`, where `square` is `x^2` rounded. By halves of `x`, so that no fused operation is needed.
#[inline(always)]
fn rounding_of_square<S: Simd>(simd: S, x: S::f32s, square: S::f32s) -> S::f32s {
    let high = simd.transmute_f32s_u32s(simd.and_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(0xffff_f000)));
    let low = simd.sub_f32s(x, high);
    let rest = simd.sub_f32s(simd.mul_f32s(high, high), square);
    let rest = simd.mul_add_e_f32s(simd.add_f32s(high, high), low, rest);
    simd.mul_add_e_f32s(low, low, rest)
}

#[cfg(test)]
pub(super) mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;
    use crate::layer::level::levels;

    /// The complementary error function: the series of erf near 0, the continued fraction further out.
    pub(in crate::layer) fn erfc(x: f64) -> f64 {
        let a = x.abs();
        let tail = if a < 2.5 {
            let (mut term, mut sum) = (a, a);
            for n in 1..100 {
                term *= -a * a / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum
        } else {
            let fraction = (1..=200).rev().fold(a, |below, n| a + n as f64 / 2.0 / below);
            (-a * a).exp() / std::f64::consts::PI.sqrt() / fraction
        };
        if x < 0.0 { 2.0 - tail } else { tail }
    }

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Sigmoid,
        Tanh,
        Normal,
    }

    fn apply(arch: Arch, function: Function, x: f32) -> f32 {
        struct Run(Function, f32);
        impl WithSimd for Run {
            type Output = f32;
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) -> f32 {
                let x = simd.splat_f32s(self.1);
                let y = match self.0 {
                    Function::Exp => exp_nonpositive(simd, x),
                    Function::Sigmoid => sigmoid(simd, x),
                    Function::Tanh => tanh(simd, x),
                    Function::Normal => normal(simd, x),
                };
                let mut first = [0.0];
                simd.partial_store_f32s(&mut first, y);
                first[0]
            }
        }
        arch.dispatch(Run(function, x))
    }

    type Exact = fn(f64) -> f64;

    fn worst(arch: Arch, function: Function, exact: Exact, from: f64, to: f64) -> (f64, f64) {
        let mut worst = (0.0, 0.0);
        for n in 0..=20_000 {
            let x = (from + (to - from) * n as f64 / 20_000.0) as f32;
            let expected = exact(x as f64);
            let error = (apply(arch, function, x) as f64 / expected - 1.0).abs();
            if expected != 0.0 && (error > worst.0 || error.is_nan()) {
                worst = (error, x as f64);
            }
        }
        worst
    }

    #[test]
    fn each_function_is_right_to_a_few_units_in_the_last_place() {
        for arch in levels() {
            let cases: [(&str, Function, Exact, f64, f64, f64); 6] = [
                ("exp", Function::Exp, f64::exp, -87.3, 0.0, 1.5e-7),
                ("sigmoid", Function::Sigmoid, |x| 1.0 / (1.0 + (-x).exp()), -87.3, 90.0, 3e-7),
                ("tanh", Function::Tanh, f64::tanh, -12.0, 12.0, 3e-7),
                ("tanh", Function::Tanh, f64::tanh, 1e-30, 0.7, 3e-7),
                ("normal", Function::Normal, |x| 0.5 * erfc(-x / 2f64.sqrt()), -13.0, 0.0, 6e-7),
                ("normal", Function::Normal, |x| 0.5 * erfc(-x / 2f64.sqrt()), 0.0, 20.0, 4e-7),
            ];
            for (name, function, exact, from, to, bound) in cases {
                let (error, at) = worst(arch, function, exact, from, to);
                assert!(error <= bound, "{arch:?} {name} at {at}: relative error {error:e}");
            }
        }
    }

    #[test]
    fn the_ends_are_exact_and_nan_stays() {
        for arch in levels() {
            assert_eq!(apply(arch, Function::Exp, 0.0), 1.0);
            assert_eq!(apply(arch, Function::Exp, -1e30), 0.0);
            assert_eq!(apply(arch, Function::Exp, f32::NEG_INFINITY), 0.0);
            assert_eq!(apply(arch, Function::Tanh, 40.0), 1.0);
            assert_eq!(apply(arch, Function::Tanh, f32::NEG_INFINITY), -1.0);
            assert_eq!(apply(arch, Function::Normal, f32::INFINITY), 1.0);
            assert_eq!(apply(arch, Function::Normal, -40.0), 0.0);
            for function in [Function::Exp, Function::Sigmoid, Function::Tanh, Function::Normal] {
                for nan in [0x7fc0_0000, 0xffc0_0001, 0x7f80_0001, 0x7fff_ffff].map(f32::from_bits) {
                    assert!(apply(arch, function, nan).is_nan());
                }
            }
        }
    }
}
