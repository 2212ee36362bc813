//! Products of strips in AVX-512 with VNNI.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    GROUP,
    strips::{RowCodes, Strip},
};

/// Tokens of a register.
const LANES: usize = 16;

/// As [`super::strips::dots`], whose checks hold, where the processor has VNNI.
pub(super) fn dots(_: pulp::x86::V4, weights: &RowCodes, x: Strip<'_>, out: &mut [f32]) {
    // SAFETY: the caller has asked for VNNI and compared the sizes, the token stands for the rest.
    unsafe {
        match (weights.parts, weights.offsets.is_empty()) {
            (1, true) => of_width::<1, false>(weights, x, out),
            (1, false) => of_width::<1, true>(weights, x, out),
            _ => of_width::<2, false>(weights, x, out),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn of_width<const PARTS: usize, const OFFSET: bool>(weights: &RowCodes, x: Strip<'_>, out: &mut [f32]) {
    let mut lane = 0;
    while lane < x.lanes {
        // SAFETY: the same instructions, and lanes that are there.
        unsafe {
            if x.lanes - lane >= 2 * LANES {
                for first in (0..weights.rows).step_by(6) {
                    tile::<6, 2, PARTS, OFFSET>(weights, first, x, lane, out);
                }
                lane += 2 * LANES;
            } else {
                for first in (0..weights.rows).step_by(12) {
                    tile::<12, 1, PARTS, OFFSET>(weights, first, x, lane, out);
                }
                lane += LANES;
            }
        }
    }
}

/// Rows `first..first + R` with `16 V` tokens from `lane` on. Past the last row the last again, which is not written.
///
/// # Safety
///
/// Needs AVX-512 F, BW, DQ, VL and VNNI; the tokens have as many inputs as the rows, there are so many lanes from `lane` on, and
/// `out` is `[rows, lanes]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<const R: usize, const V: usize, const PARTS: usize, const OFFSET: bool>(
    weights: &RowCodes,
    first: usize,
    x: Strip<'_>,
    lane: usize,
    out: &mut [f32],
) {
    let groups = weights.inputs / GROUP;
    let row: [usize; R] = std::array::from_fn(|r| (first + r).min(weights.rows - 1) * groups);
    let mut totals = [[_mm512_setzero_ps(); V]; R];
    for group in 0..groups {
        // SAFETY: every address is of a group of a row or of the strip.
        unsafe {
            let own = group * x.lanes + lane;
            let scales: [__m512; V] =
                std::array::from_fn(|v| _mm512_loadu_ps(x.scales.as_ptr().add(own).add(v * LANES)));
            for part in 0..PARTS {
                let mut sums: [[__m512i; V]; R] = std::array::from_fn(|r| {
                    [_mm512_set1_epi32(*weights.starts.as_ptr().add((row[r] + group) * PARTS + part)); V]
                });
                let quads = GROUP / 4 / PARTS;
                for quad in part * quads..(part + 1) * quads {
                    let from = x.codes.as_ptr().add((group * GROUP / 4 + quad) * x.lanes + lane);
                    let tokens: [__m512i; V] = std::array::from_fn(|v| _mm512_loadu_si512(from.add(v * LANES).cast()));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let codes = weights.codes.as_ptr().add((row[r] + group) * GROUP + 4 * quad);
                        let codes = _mm512_set1_epi32(codes.cast::<i32>().read_unaligned());
                        for (sum, &tokens) in sums.iter_mut().zip(&tokens) {
                            *sum = _mm512_dpbusd_epi32(*sum, tokens, codes);
                        }
                    }
                }
                for (r, (totals, sums)) in totals.iter_mut().zip(&sums).enumerate() {
                    let scale = _mm512_set1_ps(*weights.scales.as_ptr().add((row[r] + group) * PARTS + part));
                    for ((total, &sum), &own) in totals.iter_mut().zip(sums).zip(&scales) {
                        *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, own), *total);
                    }
                }
            }
            if OFFSET {
                let own: [__m512; V] =
                    std::array::from_fn(|v| _mm512_loadu_ps(x.totals.as_ptr().add(own).add(v * LANES)));
                for (r, totals) in totals.iter_mut().enumerate() {
                    let offset = _mm512_set1_ps(*weights.offsets.as_ptr().add(row[r] + group));
                    for (total, &own) in totals.iter_mut().zip(&own) {
                        *total = _mm512_fnmadd_ps(offset, own, *total);
                    }
                }
            }
        }
    }
    for (r, totals) in totals.iter().take(weights.rows - first).enumerate() {
        for (v, &total) in totals.iter().enumerate() {
            // SAFETY: a row and lanes that are there.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add((first + r) * x.lanes + lane + v * LANES), total) };
        }
    }
}
