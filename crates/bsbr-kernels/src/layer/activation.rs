//! The non-linearity of an MLP.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{level::TASK, math, panels::Panels};

/// A non-linearity.
///
/// Against exact arithmetic: `Silu` is right to a relative error of 4e-7 where `|x| <= 87`, `GeluErf` to 6e-7 where
/// `|x| <= 13`, `GeluTanh` to `4e-7 + 3e-7 |u|` with `u = sqrt(2/pi) (x + 0.044715 x^3)` where `|u| <= 43`; for smaller
/// `x` all go to 0 and are never further than 1e-35 from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`.
    GeluErf,
    /// `x sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
}

#[inline(always)]
pub(super) fn activated<S: Simd>(simd: S, activation: Activation, x: S::f32s) -> S::f32s {
    match activation {
        Activation::GeluTanh => {
            // 1 + tanh u = 2 sigmoid(2 u), which does not lose the digits of a small result.
            let square = simd.mul_f32s(x, x);
            let twice = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            let cubic = simd.splat_f32s((twice * 0.044715) as f32);
            let factor = simd.mul_add_e_f32s(square, cubic, simd.splat_f32s(twice as f32));
            simd.mul_f32s(x, math::sigmoid(simd, simd.mul_f32s(factor, x)))
        }
        Activation::GeluErf => simd.mul_f32s(x, math::normal(simd, x)),
        Activation::Silu => simd.mul_f32s(x, math::sigmoid(simd, x)),
        Activation::Relu => {
            let zero = simd.splat_f32s(0.0);
            simd.select_f32s(simd.less_than_f32s(x, zero), zero, x)
        }
        Activation::Relu2 => {
            let zero = simd.splat_f32s(0.0);
            let above = simd.select_f32s(simd.less_than_f32s(x, zero), zero, x);
            simd.mul_f32s(above, above)
        }
    }
}

/// Applies it to every number.
pub fn activate(activation: Activation, x: &mut [f32]) {
    activate_at(Arch::new(), activation, x);
}

pub(super) fn activate_at(arch: Arch, activation: Activation, x: &mut [f32]) {
    struct Run<'a>(Activation, &'a mut [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (body, tail) = S::as_mut_simd_f32s(self.1);
            for x in body {
                *x = activated(simd, self.0, *x);
            }
            let last = activated(simd, self.0, simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, last);
        }
    }
    x.par_chunks_mut(TASK).for_each(|x| arch.dispatch(Run(activation, x)));
}

/// `activation(gate) * up`, or `activation(up)` without a gate, in place of `up`.
///
/// # Panics
///
/// If the two are of different sizes.
pub fn activate_gated(activation: Activation, up: &mut Panels, gate: Option<&Panels>) {
    struct Run<'a>(Activation, &'a mut [f32], &'a [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for (up, gate) in self.1.chunks_mut(S::F32_LANES).zip(self.2.chunks(S::F32_LANES)) {
                let gate = activated(simd, self.0, simd.partial_load_f32s(gate));
                let product = simd.mul_f32s(gate, simd.partial_load_f32s(up));
                simd.partial_store_f32s(up, product);
            }
        }
    }
    let arch = up.arch;
    let Some(gate) = gate else { return activate_at(arch, activation, up.numbers_mut()) };
    assert_eq!(
        (up.tokens(), up.width(), up.lanes()),
        (gate.tokens(), gate.width(), gate.lanes()),
        "gate and up differ"
    );
    let chunks = up.numbers_mut().par_chunks_mut(TASK).zip(gate.data.par_chunks(TASK));
    chunks.for_each(|(up, gate)| arch.dispatch(Run(activation, up, gate)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{level::levels, math::tests::erfc};

    fn exact(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                x / (1.0 + (-2.0 * u).exp())
            }
            Activation::GeluErf => 0.5 * x * erfc(-x / 2f64.sqrt()),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
            Activation::Relu2 => x.max(0.0).powi(2),
        }
    }

    /// Numbers of both signs and all sizes, one more than fills the registers.
    fn numbers(limit: f64) -> Vec<f32> {
        let small = (0..4001).map(|n| (n as f64 - 2000.0) / 2000.0 * limit);
        let tiny = (0..400).map(|n| 10f64.powf(-(n as f64) / 12.0) * if n % 2 == 0 { 1.0 } else { -1.0 });
        small.chain(tiny).map(|x| x as f32).collect()
    }

    #[test]
    fn every_activation_is_as_close_to_its_formula_as_stated_at_every_level() {
        for arch in levels() {
            let cases = [
                (Activation::GeluTanh, 6.0),
                (Activation::GeluErf, 13.0),
                (Activation::Silu, 87.0),
                (Activation::Relu, 100.0),
                (Activation::Relu2, 100.0),
            ];
            for (activation, limit) in cases {
                let x = numbers(limit);
                let mut found = x.clone();
                activate_at(arch, activation, &mut found);
                for (&x, &found) in x.iter().zip(&found) {
                    let expected = exact(activation, x as f64);
                    let u = 0.8 * (x + 0.0447 * x.powi(3)).abs() as f64;
                    let bound = match activation {
                        Activation::GeluTanh => 4e-7 + 3e-7 * u,
                        Activation::GeluErf => 6e-7,
                        Activation::Silu => 4e-7,
                        Activation::Relu => 0.0,
                        Activation::Relu2 => 6e-8,
                    };
                    let error = (found as f64 - expected).abs();
                    assert!(
                        error <= bound * expected.abs() + 1e-36,
                        "{arch:?} {activation:?} of {x}: {found}, expected {expected}, relative error {:e}",
                        error / expected.abs()
                    );
                }
            }
        }
    }

    #[test]
    fn far_out_every_activation_is_the_identity_or_nothing_and_nan_stays() {
        for arch in levels() {
            for activation in [Activation::GeluTanh, Activation::GeluErf, Activation::Silu, Activation::Relu] {
                let mut x = [1e4, 1e30, -1e4, -1e8, f32::NAN, 0.0];
                activate_at(arch, activation, &mut x);
                assert_eq!(x[..2], [1e4, 1e30], "{arch:?} {activation:?}");
                assert!(x[2].abs() < 1e-35 && x[3].abs() < 1e-35, "{arch:?} {activation:?}: {x:?}");
                assert!(x[4].is_nan(), "{arch:?} {activation:?}");
                assert_eq!(x[5], 0.0);
            }
        }
    }
}
