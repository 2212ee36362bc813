//! Products of codes in AVX-512 with VNNI: one instruction for 64 products.
//!
//! It multiplies unsigned codes, those of weights, with signed ones. Where a format subtracts an offset from its codes, a power of
//! two, that multiple of the token's own sums is taken off. What groups of four rows (or tokens, or of both) sum to is brought
//! together in one register, a number each, before it meets scales: these take one operation for 16 groups.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix};

use super::{
    super::avx512::AHEAD,
    GROUP, QUAD, TOGETHER, TokenCodes,
    vnni_codes::{Codes, Layout, Mxfp4, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0},
};

/// As [`super::dots`], whose checks hold, where the processor has VNNI.
pub(super) fn dots(_: pulp::x86::V4, weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    // SAFETY: the caller has asked for VNNI, the token stands for the rest.
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn dots_codes<C: Codes>(weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    // SAFETY: the same instructions; the caller has compared the sizes.
    unsafe {
        let mut first = 0;
        while first < x.tokens {
            let count = x.tokens - first;
            first += match count {
                1 => tile::<C, 1, 1, 1>(weights, x, first, sums),
                2 => tile::<C, 2, 2, 1>(weights, x, first, sums),
                3 | 4 => tile::<C, 4, 3, 1>(weights, x, first, sums),
                _ => tile::<C, 4, 2, 2>(weights, x, first, sums),
            };
        }
    }
}

/// `4 / T` rows of weights with `T` tokens fill a register with sums; so many registers for other rows, `R`, and for other tokens, `M`.
/// The tokens are those from `start` on; returns how many they were. Rows that are read at a time lie far from each other, as in
/// [`super::super::avx512`]. Every sum is made in the same order, whatever `T`, `R` and `M`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn tile<C: Codes, const T: usize, const R: usize, const M: usize>(
    weights: Matrix<'_>,
    x: &TokenCodes,
    start: usize,
    sums: &mut [f32],
) -> usize {
    let rows = R * TOGETHER / T;
    let (outputs, row_bytes, quads) = (weights.outputs(), weights.row_bytes(), x.quads());
    let tokens = (x.tokens - start).min(T * M);
    let (data, end) = (weights.bytes().as_ptr(), weights.bytes().len());
    // What a quad takes, and whether the last of a row is whole.
    let (quad_bytes, whole) = match C::QUADS {
        Layout::Blocks => (QUAD * C::BYTES, x.inputs.is_multiple_of(QUAD * GROUP)),
        Layout::Halves => (C::BYTES, true),
    };
    // Past the last row and token the last again.
    let token = |at: usize| start + at.min(tokens - 1);
    let apart = outputs.div_ceil(rows);
    // Where the scales of the tokens of a register are among those that stand together.
    let places = match T {
        1 => _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12),
        2 => _mm512_setr_epi32(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13),
        _ => _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    };
    let mut padded = [[0_u8; QUAD * 34]; 6];
    for first in 0..apart {
        let mut row = [data; 6];
        // Where the last quad is.
        let mut last = [data; 6];
        for r in 0..rows {
            let from = (first + r * apart).min(outputs - 1) * row_bytes;
            row[r] = data.wrapping_add(from);
            let from = from + quads.saturating_sub(1) * quad_bytes;
            last[r] = data.wrapping_add(from);
            // One that is not whole reads on into the next row, whose blocks meet zeros; of the last row it is copied.
            if !whole && from + quad_bytes > end {
                padded[r][..end - from].copy_from_slice(&weights.bytes()[from..]);
                last[r] = padded[r].as_ptr();
            }
        }
        let mut total = [[_mm512_setzero_ps(); M]; R];
        let mut offset = [[_mm512_setzero_ps(); M]; R];
        for quad in 0..quads {
            let (at, part) = match C::QUADS {
                Layout::Blocks => (quad * quad_bytes, 0),
                Layout::Halves => (quad / 2 * quad_bytes, quad % 2),
            };
            let partial = !whole && quad + 1 == quads;
            for r in 0..R {
                let of_register = |i: usize| r * TOGETHER / T + i / T;
                for row in &row[of_register(0)..=of_register(TOGETHER - 1)] {
                    for line in (0..quad_bytes / if C::QUADS == Layout::Halves { 2 } else { 1 }).step_by(64) {
                        // Nothing is read, so that any address will do.
                        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(at + AHEAD + line).cast());
                    }
                }
                let blocks: [*const u8; TOGETHER] = std::array::from_fn(|i| {
                    let row_at = of_register(i);
                    if partial { last[row_at] } else { row[row_at].wrapping_add(at) }
                });
                // SAFETY: the quads lie within the weights, or are the copies; every token has as many quads.
                unsafe {
                    let scales = C::scales(blocks, part);
                    let mut codes = [[_mm512_setzero_si512(); 2]; TOGETHER];
                    for i in (0..TOGETHER).step_by(T) {
                        codes[i] = C::codes(blocks[i], part);
                    }
                    for m in 0..M {
                        let mut products = [[_mm512_setzero_si512(); TOGETHER]; 2];
                        for i in 0..TOGETHER {
                            let own = codes[i / T * T];
                            let other = x.codes.as_ptr().add(x.quad_at(quad, token(m * T + i % T)));
                            let half = |half: usize| _mm512_loadu_si512(other.add(half * QUAD * GROUP / 2).cast());
                            products[0][i] = _mm512_dpbusd_epi32(products[0][i], own[0], half(0));
                            let to = usize::from(C::HALVES);
                            products[to][i] = _mm512_dpbusd_epi32(products[to][i], own[1], half(1));
                        }
                        let together = quad * x.tokens.div_ceil(TOGETHER) + (start + m * T) / TOGETHER;
                        let place = |numbers| _mm512_permutexvar_ps(places, _mm512_loadu_ps(numbers));
                        let factors = place(x.scales.as_ptr().add(16 * together));
                        let less = |half: usize| {
                            let less = x.less.as_ptr().add(16 * (2 * together + half));
                            _mm512_permutexvar_epi32(places, _mm512_loadu_si512(less.cast()))
                        };
                        let halves = usize::from(C::HALVES) + 1;
                        for half in 0..halves {
                            let mut sum = brought_together(products[half]);
                            if let Some(bits) = C::LESS {
                                let less = if C::HALVES { less(half) } else { _mm512_add_epi32(less(0), less(1)) };
                                sum = _mm512_add_epi32(sum, _mm512_sll_epi32(less, _mm_cvtsi32_si128(bits as i32)));
                            }
                            let scale = _mm512_mul_ps(scales[half], factors);
                            total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r][m]);
                        }
                        if C::LESS.is_none() {
                            let totals = place(x.totals.as_ptr().add(16 * together));
                            offset[r][m] = _mm512_fmadd_ps(C::offsets(blocks, part), totals, offset[r][m]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            for m in 0..M {
                let sum = _mm512_sub_ps(total[r][m], offset[r][m]);
                let halves = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
                let sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
                let mut made = [0.0; TOGETHER];
                // SAFETY: four numbers.
                unsafe { _mm_storeu_ps(made.as_mut_ptr(), sum) };
                for (i, sum) in made.into_iter().enumerate() {
                    let (output, at) = (first + (r * TOGETHER / T + i / T) * apart, m * T + i % T);
                    if output < outputs && at < tokens {
                        sums[(start + at) * outputs + output] = sum;
                    }
                }
            }
        }
    }
    tokens
}

/// The sums of the four numbers in each quarter of four registers: number `i` of quarter `g` is that of quarter `g` of register `i`.
#[inline]
#[target_feature(enable = "avx512f")]
fn brought_together(of: [__m512i; TOGETHER]) -> __m512i {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (first, second) = (two(of[0], of[1]), two(of[2], of[3]));
    _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second))
}
