//! Products of pairs in AVX-512.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{RowPairs, Strip};

/// Tokens of a register.
const LANES: usize = 16;

/// As [`super::dots`], whose checks hold, where the processor multiplies pairs.
pub(super) fn dots(_: pulp::x86::V4, weights: &RowPairs, x: Strip<'_>, out: &mut [f32]) {
    let mut lane = 0;
    while lane < x.lanes {
        // SAFETY: the caller has asked for BF16 and compared the sizes, the token stands for the rest; so many lanes are there.
        unsafe {
            lane += match (x.lanes - lane) / LANES {
                1 => of_width::<12, 1>(weights, x, lane, out),
                2 | 3 => of_width::<10, 2>(weights, x, lane, out),
                _ => of_width::<6, 4>(weights, x, lane, out),
            };
        }
    }
}

/// All rows with `16 V` tokens from `lane` on, `R` rows at a time; past the last row the last again, which is not written.
/// Returns how many tokens that were.
///
/// # Safety
///
/// Needs AVX-512 F and BF16; the tokens have as many inputs as the rows, there are so many lanes from `lane` on, and `out` is
/// `[rows, lanes]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn of_width<const R: usize, const V: usize>(
    weights: &RowPairs,
    x: Strip<'_>,
    lane: usize,
    out: &mut [f32],
) -> usize {
    for first in (0..weights.rows).step_by(R) {
        let row: [*const u32; R] =
            std::array::from_fn(|r| weights.pairs[(first + r).min(weights.rows - 1) * weights.count..].as_ptr());
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for at in 0..weights.count {
            // SAFETY: pairs of the strip and of the rows.
            unsafe {
                let from = x.pairs.as_ptr().add(at * x.lanes + lane);
                let tokens: [__m512bh; V] =
                    std::array::from_fn(|v| std::mem::transmute(_mm512_loadu_si512(from.add(v * LANES).cast())));
                for (row, sums) in row.iter().zip(&mut sums) {
                    let pair = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*row.add(at) as i32));
                    for (sum, &tokens) in sums.iter_mut().zip(&tokens) {
                        *sum = _mm512_dpbf16_ps(*sum, tokens, pair);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().take(weights.rows - first).enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                // SAFETY: a row and lanes that are there.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr().add((first + r) * x.lanes + lane + v * LANES), sum) };
            }
        }
    }
    LANES * V
}
