//! Products of codes in AVX2: codes become integers of 16 bits, whose products are added in pairs.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix};

use super::{
    super::{
        avx2::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Quantised},
        floats::Mxfp4,
    },
    GROUP, TokenCodes,
};

/// As [`super::dots`], whose checks hold.
pub(super) fn dots(_: pulp::x86::V3, weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    // SAFETY: the token says that the processor has these instructions.
    unsafe {
        match weights.format() {
            Format::Q8_0 => dots_codes::<Q8_0>(weights, x, sums),
            Format::Q4_0 => dots_codes::<Q4_0>(weights, x, sums),
            Format::Q4_1 => dots_codes::<Q4_1>(weights, x, sums),
            Format::Q5_0 => dots_codes::<Q5_0>(weights, x, sums),
            Format::Q5_1 => dots_codes::<Q5_1>(weights, x, sums),
            Format::Q4K => dots_codes::<Q4K>(weights, x, sums),
            Format::Q5K => dots_codes::<Q5K>(weights, x, sums),
            Format::Q6K => dots_codes::<Q6K>(weights, x, sums),
            Format::Mxfp4 => dots_codes::<Mxfp4>(weights, x, sums),
            Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4M3 => unreachable!("asked before"),
        }
    }
}

/// Rows of weights at a time, far from each other as in [`super::super::avx512`].
const ROWS: usize = 4;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_codes<Q: Quantised>(weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    let (outputs, row_bytes, groups) = (weights.outputs(), weights.row_bytes(), x.inputs / GROUP);
    let apart = outputs.div_ceil(ROWS);
    for token in 0..x.tokens {
        for first in 0..apart {
            // Past the last row the last again.
            let row: [&[u8]; ROWS] = std::array::from_fn(|r| {
                &weights.bytes()[(first + r * apart).min(outputs - 1) * row_bytes..][..row_bytes]
            });
            let mut total = [_mm256_setzero_ps(); ROWS];
            let mut summed = [0.0; ROWS];
            for group in 0..groups {
                let at = x.scale_at(token, group);
                let (block, own) = (group * GROUP / Q::BLOCK, group % (Q::BLOCK / GROUP));
                // SAFETY: a row has so many blocks, a token so many groups.
                unsafe {
                    let half = |half| _mm_loadu_si128(x.codes.as_ptr().add(x.half_at(token, group, half)).cast());
                    let other = _mm256_set_m128i(half(1), half(0));
                    for (r, row) in row.iter().enumerate() {
                        let data = row.as_ptr().add(block * Q::BYTES);
                        let (codes, (scales, summand)) = (Q::codes(data, own), Q::scales(data, own));
                        let scales = scales.map(|scale| _mm256_set1_ps(scale * x.scales[at]));
                        let [low, high] = products(codes, other);
                        total[r] = _mm256_fmadd_ps(low, scales[0], total[r]);
                        total[r] = _mm256_fmadd_ps(high, scales[1], total[r]);
                        summed[r] += summand * x.totals[at];
                    }
                }
            }
            for (r, output) in (first..outputs).step_by(apart).enumerate() {
                sums[token * outputs + output] = super::super::avx2::sum(total[r]) + summed[r];
            }
        }
    }
}

/// Sums of two products each: those of the first 16 codes, and of the others.
#[inline]
#[target_feature(enable = "avx2")]
fn products(a: __m256i, b: __m256i) -> [__m256; 2] {
    let wide = |codes| _mm256_cvtepi8_epi16(codes);
    let low = _mm256_madd_epi16(wide(_mm256_castsi256_si128(a)), wide(_mm256_castsi256_si128(b)));
    let high = _mm256_madd_epi16(wide(_mm256_extracti128_si256::<1>(a)), wide(_mm256_extracti128_si256::<1>(b)));
    [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
}
