//! A gated MLP of which neither factor grows without end.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{level::TASK, math, panels::Panels};

/// `(u + 1) g sigmoid(alpha g)` with `g = min(gate, limit)` and `u` = `up` held between `-limit` and `limit`, in place of `up`.
///
/// A NaN in either stays one.
///
/// # Panics
///
/// If the two are of different sizes.
pub fn clamp_gated(limit: f32, alpha: f32, up: &mut Panels, gate: &Panels) {
    struct Run<'a>([f32; 2], &'a mut [f32], &'a [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self([limit, alpha], up, gate) = self;
            for (up, gate) in up.chunks_mut(S::F32_LANES).zip(gate.chunks(S::F32_LANES)) {
                let (u, g) = (simd.partial_load_f32s(up), simd.partial_load_f32s(gate));
                simd.partial_store_f32s(up, clamped(simd, [limit, alpha], u, g));
            }
        }
    }
    assert_eq!(
        (up.tokens(), up.width(), up.lanes()),
        (gate.tokens(), gate.width(), gate.lanes()),
        "gate and up differ"
    );
    let arch = up.arch;
    let chunks = up.numbers_mut().par_chunks_mut(TASK).zip(gate.data.par_chunks(TASK));
    chunks.for_each(|(up, gate)| arch.dispatch(Run([limit, alpha], up, gate)));
}

#[inline(always)]
fn clamped<S: Simd>(simd: S, [limit, alpha]: [f32; 2], up: S::f32s, gate: S::f32s) -> S::f32s {
    let (highest, lowest) = (simd.splat_f32s(limit), simd.splat_f32s(-limit));
    // Selected, as minima differ in what they make of a NaN.
    let below = |x| simd.select_f32s(simd.less_than_f32s(highest, x), highest, x);
    let (gate, up) = (below(gate), below(up));
    let up = simd.select_f32s(simd.less_than_f32s(up, lowest), lowest, up);
    let open = math::sigmoid(simd, simd.mul_f32s(gate, simd.splat_f32s(alpha)));
    simd.mul_f32s(simd.add_f32s(up, simd.splat_f32s(1.0)), simd.mul_f32s(gate, open))
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;
    use crate::layer::{Rows, level::levels};

    const WIDTH: usize = 37;

    fn exact(up: f32, gate: f32, limit: f32, alpha: f32) -> f64 {
        let gate = f64::from(gate.min(limit));
        (f64::from(up.clamp(-limit, limit)) + 1.0) * gate / (1.0 + (-f64::from(alpha) * gate).exp())
    }

    /// Numbers of both signs, within the bound and beyond, more than fill the registers.
    fn numbers(rows: usize, step: f32) -> Vec<f32> {
        (0..rows * WIDTH).map(|at| ((at as f32 * step).sin() * 6.0 - 0.5) * 1.7).collect()
    }

    /// What becomes of rows.
    fn made(arch: Arch, [limit, alpha]: [f32; 2], ups: &[f32], gates: &[f32]) -> Vec<f32> {
        let [mut up, gate] = [ups, gates].map(|rows| Panels::pack_at(arch, Rows::new(rows, WIDTH), None));
        clamp_gated(limit, alpha, &mut up, &gate);
        let mut found = vec![0.0; ups.len()];
        up.write(&mut found);
        found
    }

    #[test]
    fn both_factors_are_bounded_and_multiplied_as_the_formula_says_at_every_level() {
        for arch in levels() {
            for (rows, limit, alpha) in [(1, 7.0, 1.702), (3, 1.5, 1.702), (40, 2.0, 0.5)] {
                let (ups, gates) = (numbers(rows, 0.37), numbers(rows, 0.11));
                assert!(ups.iter().chain(&gates).any(|x| *x > limit) && ups.iter().any(|x| *x < -limit));
                for ((found, up), gate) in made(arch, [limit, alpha], &ups, &gates).iter().zip(&ups).zip(&gates) {
                    let expected = exact(*up, *gate, limit, alpha);
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error <= 1e-6 * (1.0 + expected.abs()), "{up}, {gate}: {found}, expected {expected}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for arch in levels() {
            let (mut ups, mut gates) = (numbers(1, 0.3), numbers(1, 0.2));
            (ups[3], gates[5]) = (f32::NAN, f32::NAN);
            let found = made(arch, [7.0, 1.702], &ups, &gates);
            let nans: Vec<usize> = (0..WIDTH).filter(|&at| found[at].is_nan()).collect();
            assert_eq!(nans, [3, 5]);
        }
    }
}
