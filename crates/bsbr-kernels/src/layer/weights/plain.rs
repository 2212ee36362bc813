//! Products in loops that any processor runs: a row is widened, then multiplied.

use bsbr_weights::Matrix;
use pulp::{Arch, Simd, WithSimd};

/// As [`super::dots`].
pub(super) fn dots(arch: Arch, weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    struct Run<'a> {
        weights: Matrix<'a>,
        x: &'a [f32],
        sums: &'a mut [f32],
    }
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self { weights, x, sums } = self;
            let inputs = weights.inputs();
            let mut widened = vec![0.0; if weights.as_f32().is_some() { 0 } else { inputs }];
            for output in 0..weights.outputs() {
                let row = match weights.as_f32() {
                    Some(numbers) => &numbers[output * inputs..(output + 1) * inputs],
                    None => {
                        weights.widen(output..output + 1, &mut widened);
                        &widened[..]
                    }
                };
                for (token, sums) in sums.chunks_exact_mut(weights.outputs()).enumerate() {
                    sums[output] = dot(simd, row, &x[token * inputs..(token + 1) * inputs]);
                }
            }
        }
    }
    arch.dispatch(Run { weights, x, sums });
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let ((a_pairs, a_last), (b_pairs, b_last)) = (a.as_chunks::<2>(), b.as_chunks::<2>());
    let mut sums = [simd.splat_f32s(0.0); 2];
    for (a, b) in a_pairs.iter().zip(b_pairs) {
        sums[0] = simd.mul_add_e_f32s(a[0], b[0], sums[0]);
        sums[1] = simd.mul_add_e_f32s(a[1], b[1], sums[1]);
    }
    let mut sum = simd.add_f32s(sums[0], sums[1]);
    for (&a, &b) in a_last.iter().zip(b_last) {
        sum = simd.mul_add_e_f32s(a, b, sum);
    }
    sum = simd.mul_add_e_f32s(simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail), sum);
    simd.reduce_sum_f32s(sum)
}
