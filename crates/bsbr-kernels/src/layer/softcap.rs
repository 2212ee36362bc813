//! Limits on scores.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{level::TASK, math};

/// `cap tanh(x / cap)` of every number, right to a relative error of 4e-7.
pub fn softcap(x: &mut [f32], cap: f32) {
    softcap_at(Arch::new(), x, cap);
}

fn softcap_at(arch: Arch, x: &mut [f32], cap: f32) {
    struct Run<'a>(&'a mut [f32], f32);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let cap = simd.splat_f32s(self.1);
            let capped = |x| simd.mul_f32s(cap, math::tanh(simd, simd.div_f32s(x, cap)));
            let (body, tail) = S::as_mut_simd_f32s(self.0);
            for x in body {
                *x = capped(*x);
            }
            let last = capped(simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, last);
        }
    }
    x.par_chunks_mut(TASK).for_each(|x| arch.dispatch(Run(x, cap)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::level::levels;

    #[test]
    fn capped_scores_are_those_of_f64_at_every_level() {
        for arch in levels() {
            let x: Vec<f32> = (0..2001).map(|n| (n as f32 - 1000.0) * 0.3).collect();
            let mut found = x.clone();
            softcap_at(arch, &mut found, 30.0);
            for (x, found) in x.iter().zip(found) {
                let expected = 30.0 * (*x as f64 / 30.0).tanh();
                assert!((found as f64 - expected).abs() <= 4e-7 * expected.abs(), "{arch:?}: {x} to {found}");
            }
        }
    }
}
