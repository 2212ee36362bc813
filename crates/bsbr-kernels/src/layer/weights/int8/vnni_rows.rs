//! Codes of weights taken out of their blocks, 64 at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix};

use super::{
    GROUP, QUAD,
    strips::{LARGER, RowCodes},
    vnni::{Codes, Layout, Mxfp4, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0},
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
            // SAFETY: all blocks of the quad are there.
            let (scales, offsets) = unsafe { (C::scales(block.as_ptr(), part), C::offsets(block.as_ptr(), part)) };
            if let Some(to) = rows.offsets.get_mut(first..first + QUAD) {
                // SAFETY: four numbers.
                unsafe { _mm_storeu_ps(to.as_mut_ptr(), offsets) };
            }
            for (pair, scales) in scales.into_iter().enumerate() {
                // SAFETY: as above.
                let codes = unsafe { C::codes(block.as_ptr(), part, pair) };
                let at = first + 2 * pair;
                let to = &mut rows.codes[at * GROUP..(at + 2) * GROUP];
                let signed = _mm512_sub_epi8(codes, _mm512_set1_epi8(less as i8));
                let (mut sums, mut numbers) = ([0_i64; 8], [0.0_f32; 16]);
                // SAFETY: 64 bytes each.
                unsafe {
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), signed);
                    _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_sad_epu8(codes, _mm512_setzero_si512()));
                    _mm512_storeu_ps(numbers.as_mut_ptr(), scales);
                }
                // Sums of eight codes each, scales of four.
                let size = 4 / rows.parts;
                for (part, sums) in sums.chunks_exact(size).enumerate() {
                    let to = at * rows.parts + part;
                    let sum = sums.iter().sum::<i64>() as i32 - 8 * size as i32 * less;
                    rows.starts[to] = -LARGER * sum;
                    rows.scales[to] = numbers[2 * size * part];
                }
            }
        }
    }
    rows.take_out(weights, quads * QUAD);
}
