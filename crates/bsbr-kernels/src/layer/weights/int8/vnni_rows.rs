//! Codes of weights taken out of their blocks, 128 at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix};

use super::{
    GROUP, HALF, QUAD, TOGETHER,
    strips::{LARGER, RowCodes},
    vnni_codes::{Codes, Layout, Mxfp4, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0},
};

/// As [`RowCodes::take_out`] from the first group on, where the processor has VNNI.
pub(super) fn take_out(_: pulp::x86::V4, weights: Matrix<'_>, rows: &mut RowCodes) {
    // SAFETY: the caller has asked for VNNI, the token stands for the rest.
    unsafe {
        match weights.format() {
            Format::Q8_0 => of_format::<Q8_0>(weights, rows),
            Format::Q4_0 => of_format::<Q4_0>(weights, rows),
            Format::Q4_1 => of_format::<Q4_1>(weights, rows),
            Format::Q5_0 => of_format::<Q5_0>(weights, rows),
            Format::Q5_1 => of_format::<Q5_1>(weights, rows),
            Format::Q4K => of_format::<Q4K>(weights, rows),
            Format::Q5K => of_format::<Q5K>(weights, rows),
            Format::Q6K => of_format::<Q6K>(weights, rows),
            Format::Mxfp4 => of_format::<Mxfp4>(weights, rows),
            Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4M3 => unreachable!("no codes"),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn of_format<C: Codes>(weights: Matrix<'_>, rows: &mut RowCodes) {
    let groups = rows.inputs / GROUP;
    let quads = groups / QUAD;
    let less = C::LESS.map_or(0, |bits| 1_i32 << bits);
    for row in 0..rows.rows {
        let bytes = &weights.bytes()[row * weights.row_bytes()..(row + 1) * weights.row_bytes()];
        for quad in 0..quads {
            let (block, part) = match C::QUADS {
                Layout::Blocks => (&bytes[quad * QUAD * C::BYTES..][..QUAD * C::BYTES], 0),
                Layout::Halves => (&bytes[quad / 2 * C::BYTES..][..C::BYTES], quad % 2),
            };
            let first = row * groups + quad * QUAD;
            let (mut scales, mut offsets) = ([[0.0_f32; 16]; 2], [0.0_f32; 16]);
            // SAFETY: all blocks of the quad are there; four times the same row.
            let halves = unsafe {
                for (to, of) in scales.iter_mut().zip(C::scales([block.as_ptr(); TOGETHER], part)) {
                    _mm512_storeu_ps(to.as_mut_ptr(), of);
                }
                _mm512_storeu_ps(offsets.as_mut_ptr(), C::offsets([block.as_ptr(); TOGETHER], part));
                C::codes(block.as_ptr(), part)
            };
            let mut sums = [[0_i32; QUAD]; 2];
            for (half, codes) in halves.into_iter().enumerate() {
                let (mut signed, mut eights) = ([[0_i8; HALF]; QUAD], [[0_i64; 2]; QUAD]);
                // SAFETY: 64 bytes each.
                unsafe {
                    let of = _mm512_sub_epi8(codes, _mm512_set1_epi8(less as i8));
                    _mm512_storeu_si512(signed.as_mut_ptr().cast(), of);
                    _mm512_storeu_si512(eights.as_mut_ptr().cast(), _mm512_sad_epu8(codes, _mm512_setzero_si512()));
                }
                for group in 0..QUAD {
                    let to = (first + group) * GROUP + half * HALF;
                    rows.codes[to..to + HALF].copy_from_slice(&signed[group]);
                    sums[half][group] = eights[group].iter().sum::<i64>() as i32 - HALF as i32 * less;
                }
            }
            for group in 0..QUAD {
                let to = (first + group) * rows.parts;
                for part in 0..rows.parts {
                    let own = if rows.parts == 2 { sums[part][group] } else { sums[0][group] + sums[1][group] };
                    rows.starts[to + part] = -LARGER * own;
                    rows.scales[to + part] = scales[part][TOGETHER * group];
                }
                if let Some(offset) = rows.offsets.get_mut(first + group) {
                    *offset = offsets[TOGETHER * group];
                }
            }
        }
    }
    rows.take_out(weights, quads * QUAD);
}
