//! The formats in AVX-512: groups of 32 numbers in two registers.
//!
//! Codes of 4 and 5 bits are not turned into numbers one by one: a register holds the 16 numbers that the codes of a group may
//! mean, and one permutation looks 16 of them up.
#![allow(unsafe_code)]

use std::{arch::x86_64::*, iter::StepBy, ops::Range};

use bsbr_weights::{Format, Matrix};

use super::{
    floats::{F8E4M3, Mxfp4},
    group_scale,
};

/// Numbers made at once.
const GROUP: usize = 32;

/// A format whose numbers are made in registers.
pub(super) trait Codes {
    /// Numbers of a block: a multiple of [`GROUP`].
    const BLOCK: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Numbers `32 group..32 (group + 1)` of a block.
    ///
    /// # Safety
    ///
    /// Needs AVX-512 F, BW, DQ and VL; `block` points to `BYTES` bytes that can be read.
    unsafe fn group(block: *const u8, group: usize) -> [__m512; 2];
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident, $block:expr, $bytes:expr, |$data:ident, $at:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        struct $name;
        impl Codes for $name {
            const BLOCK: usize = $block;
            const BYTES: usize = $bytes;
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
            unsafe fn group($data: *const u8, $at: usize) -> [__m512; 2] {
                // SAFETY: reads at most `BYTES` bytes from `data`, which the caller vouches for.
                unsafe { $body }
            }
        }
    )*};
}

codes! {
    /// Four bytes each.
    F32, GROUP, 128, |data, _at| [_mm512_loadu_ps(data.cast()), _mm512_loadu_ps(data.add(64).cast())];
    /// Two bytes each.
    F16, GROUP, 64, |data, _at| [half16(data), half16(data.add(32))];
    /// Two bytes each: the upper ones of an f32.
    Bf16, GROUP, 64, |data, _at| [upper16(data), upper16(data.add(32))];
    /// A scale, then 32 signed bytes.
    Q8_0, 32, 34, |data, _at| {
        let scale = half_at(data);
        [_mm512_mul_ps(signed16(data.add(2)), scale), _mm512_mul_ps(signed16(data.add(18)), scale)]
    };
    /// A scale, then codes less 8.
    Q4_0, 32, 18, |data, _at| {
        let table = _mm512_mul_ps(steps(-8.0), half_at(data));
        let codes = bytes16(data.add(2));
        [_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table)]
    };
    /// A scale, a smallest number, then codes.
    Q4_1, 32, 20, |data, _at| {
        let table = affine(steps(0.0), half_at(data), half_at(data.add(2)));
        let codes = bytes16(data.add(4));
        [_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table)]
    };
    /// A scale, fifth bits, then codes; less 16.
    Q5_0, 32, 22, |data, _at| {
        let scale = half_at(data);
        let tables = [_mm512_mul_ps(steps(-16.0), scale), _mm512_mul_ps(steps(0.0), scale)];
        five_bits(bytes16(data.add(6)), data.add(2).cast::<u32>().read_unaligned(), tables)
    };
    /// A scale, a smallest number, fifth bits, then codes.
    Q5_1, 32, 24, |data, _at| {
        let (scale, least) = (half_at(data), half_at(data.add(2)));
        let tables = [affine(steps(0.0), scale, least), affine(steps(16.0), scale, least)];
        five_bits(bytes16(data.add(8)), data.add(4).cast::<u32>().read_unaligned(), tables)
    };
    /// Scales of scales and of offsets, packed scales, then codes of two groups in 32 bytes each.
    Q4K, 256, 144, |data, at| {
        let (scale, offset) = k_scale(data, at);
        let table = affine(steps(0.0), scale, offset);
        let codes = data.add(16 + at / 2 * 32);
        let (a, b) = (bytes16(codes), bytes16(codes.add(16)));
        let shift = _mm_cvtsi32_si128(4 * (at as i32 % 2));
        let (a, b) = (_mm512_srl_epi32(a, shift), _mm512_srl_epi32(b, shift));
        [_mm512_permutexvar_ps(a, table), _mm512_permutexvar_ps(b, table)]
    };
    /// As Q4_K with fifth bits: bit `g` of byte `n` belongs to number `n` of group `g`.
    Q5K, 256, 176, |data, at| {
        let (scale, offset) = k_scale(data, at);
        let tables = [affine(steps(0.0), scale, offset), affine(steps(16.0), scale, offset)];
        let high = _mm256_loadu_si256(data.add(16).cast());
        let high = _mm256_test_epi8_mask(high, _mm256_set1_epi8(1_u8.wrapping_shl(at as u32) as i8));
        let codes = data.add(48 + at / 2 * 32);
        let shift = _mm_cvtsi32_si128(4 * (at as i32 % 2));
        let look = |codes, high: u32| {
            let codes = _mm512_srl_epi32(codes, shift);
            let low = _mm512_permutexvar_ps(codes, tables[0]);
            _mm512_mask_permutexvar_ps(low, high as __mmask16, codes, tables[1])
        };
        [look(bytes16(codes), high), look(bytes16(codes.add(16)), high >> 16)]
    };
    /// Low four bits, high two bits, signed scales of 16 numbers each, the scale of these.
    Q6K, 256, 210, |data, at| {
        let (half, part) = (at / 4, at % 4);
        let low = _mm256_loadu_si256(data.add(half * 64 + part % 2 * 32).cast());
        let low = _mm256_srl_epi16(low, _mm_cvtsi32_si128(part as i32 / 2 * 4));
        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
        let high = _mm256_loadu_si256(data.add(128 + half * 32).cast());
        let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * part as i32));
        let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(3)));
        let codes = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
        let whole = half_at(data.add(208));
        let scale = |n: usize| {
            _mm512_mul_ps(whole, _mm512_set1_ps(f32::from(*data.add(192 + 2 * at + n) as i8)))
        };
        let numbers = |codes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
        [
            _mm512_mul_ps(numbers(_mm256_castsi256_si128(codes)), scale(0)),
            _mm512_mul_ps(numbers(_mm256_extracti128_si256::<1>(codes)), scale(1)),
        ]
    };
}

/// A number of half precision in every lane. All of them are asked for at once: to fill one lane the compiler would keep whatever
/// the register held before, and wait for it.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn half_at(data: *const u8) -> __m512 {
    // SAFETY: the caller vouches for two bytes.
    let bits = unsafe { data.cast::<i16>().read_unaligned() };
    _mm512_cvtph_ps(_mm256_set1_epi16(bits))
}

/// `first, first + 1, ..`: 16 of them.
#[inline]
#[target_feature(enable = "avx512f")]
fn steps(first: f32) -> __m512 {
    let steps = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
    _mm512_add_ps(steps, _mm512_set1_ps(first))
}

/// `x factor + summand`. A code times its scale has few enough bits to be exact, so that fusing changes nothing.
#[inline]
#[target_feature(enable = "avx512f")]
fn affine(x: __m512, factor: __m512, summand: __m512) -> __m512 {
    _mm512_fmadd_ps(x, factor, summand)
}

/// 16 bytes, each as an integer of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn bytes16(data: *const u8) -> __m512i {
    // SAFETY: the caller vouches for 16 bytes.
    unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(data.cast())) }
}

/// 16 signed bytes as numbers.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn signed16(data: *const u8) -> __m512 {
    // SAFETY: the caller vouches for 16 bytes.
    unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(data.cast()))) }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn half16(data: *const u8) -> __m512 {
    // SAFETY: the caller vouches for 32 bytes.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(data.cast())) }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn upper16(data: *const u8) -> __m512 {
    // SAFETY: the caller vouches for 32 bytes.
    let bits = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(data.cast())) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
}

/// Codes of four bits and bits of another 32: the second table where the fifth bit is set.
#[inline]
#[target_feature(enable = "avx512f")]
fn five_bits(codes: __m512i, high: u32, tables: [__m512; 2]) -> [__m512; 2] {
    let look = |codes, high: u32| {
        let low = _mm512_permutexvar_ps(codes, tables[0]);
        _mm512_mask_permutexvar_ps(low, high as __mmask16, codes, tables[1])
    };
    [look(codes, high), look(_mm512_srli_epi32::<4>(codes), high >> 16)]
}

/// Scale of a group of Q4_K or Q5_K, and less its offset, in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn k_scale(data: *const u8, group: usize) -> (__m512, __m512) {
    // SAFETY: the caller vouches for the 16 bytes that either format begins with.
    unsafe {
        let (scale, offset) = group_scale(data.add(4).cast::<[u32; 3]>().read_unaligned(), group);
        let (scale, offset) = (_mm512_set1_ps(f32::from(scale)), _mm512_set1_ps(-f32::from(offset)));
        (_mm512_mul_ps(half_at(data), scale), _mm512_mul_ps(half_at(data.add(2)), offset))
    }
}

/// Writes a group.
#[inline]
#[target_feature(enable = "avx512f")]
fn store([a, b]: [__m512; 2], out: &mut [f32; GROUP]) {
    // SAFETY: there is room for 32 numbers.
    unsafe {
        _mm512_storeu_ps(out.as_mut_ptr(), a);
        _mm512_storeu_ps(out.as_mut_ptr().add(16), b);
    }
}

/// Calls a function with the codes of a format.
macro_rules! with_codes {
    ($format:expr, $call:ident($($argument:expr),*)) => {
        // SAFETY: the token of the caller says that the processor has these instructions.
        unsafe { match $format {
            Format::F32 => $call::<F32>($($argument),*),
            Format::F16 => $call::<F16>($($argument),*),
            Format::Bf16 => $call::<Bf16>($($argument),*),
            Format::Q8_0 => $call::<Q8_0>($($argument),*),
            Format::Q4_0 => $call::<Q4_0>($($argument),*),
            Format::Q4_1 => $call::<Q4_1>($($argument),*),
            Format::Q5_0 => $call::<Q5_0>($($argument),*),
            Format::Q5_1 => $call::<Q5_1>($($argument),*),
            Format::Q4K => $call::<Q4K>($($argument),*),
            Format::Q5K => $call::<Q5K>($($argument),*),
            Format::Q6K => $call::<Q6K>($($argument),*),
            Format::Mxfp4 => $call::<Mxfp4>($($argument),*),
            Format::F8E4M3 => $call::<F8E4M3>($($argument),*),
        } }
    };
}

/// As [`super::widen`], whose checks hold.
pub(super) fn widen(_: pulp::x86::V4, weights: Matrix<'_>, out: &mut [f32]) {
    with_codes!(weights.format(), widen_codes(weights, out));
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn widen_codes<C: Codes>(weights: Matrix<'_>, out: &mut [f32]) {
    // Blocks follow each other across rows, and so do numbers.
    let whole = out.len() / C::BLOCK;
    let data = weights.bytes();
    let (blocks, rest) = out.split_at_mut(whole * C::BLOCK);
    for (out, data) in blocks.chunks_exact_mut(C::BLOCK).zip(data.chunks_exact(C::BYTES)) {
        for (group, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            // SAFETY: the block has `BYTES` bytes.
            store(unsafe { C::group(data.as_ptr(), group) }, out);
        }
    }
    if !rest.is_empty() {
        let mut numbers = [0.0; GROUP];
        // SAFETY: the same instructions.
        store(unsafe { part_of_group::<C>(&data[whole * C::BYTES..]) }, &mut numbers);
        rest.copy_from_slice(&numbers[..rest.len()]);
    }
}

/// Fewer numbers than a group has, of a format without blocks; zeros after them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn part_of_group<C: Codes>(data: &[u8]) -> [__m512; 2] {
    let mut padded = [0; 4 * GROUP];
    padded[..data.len()].copy_from_slice(data);
    // SAFETY: such a format reads no more than the padded bytes.
    unsafe { C::group(padded.as_ptr(), 0) }
}

/// As [`super::dots`], whose checks hold.
pub(super) fn dots(_: pulp::x86::V4, weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    with_codes!(weights.format(), dots_codes(weights, x, sums));
}

/// Most tokens for which weights are made once.
const TOKENS: usize = 8;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn dots_codes<C: Codes>(weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    let (inputs, outputs) = (weights.inputs(), weights.outputs());
    if inputs == 0 || outputs == 0 {
        return sums.fill(0.0);
    }
    for (x, sums) in x.chunks(TOKENS * inputs).zip(sums.chunks_mut(TOKENS * outputs)) {
        // SAFETY: the same instructions; the caller has compared the sizes.
        unsafe {
            match x.len() / inputs {
                1 => tile::<C, 4, 1>(weights, x, sums),
                2 => tile::<C, 4, 2>(weights, x, sums),
                3 | 4 => tile::<C, 4, 4>(weights, x, sums),
                _ => tile::<C, 3, TOKENS>(weights, x, sums),
            }
        }
    }
}

/// How far ahead of where a row is read its bytes are asked for.
pub(super) const AHEAD: usize = 1024;

/// `R` rows of weights with up to `T` tokens at a time: so many sums that additions need not wait for each other, and so many
/// rows that tokens are read from the nearest cache seldom. The rows lie far from each other: each of them begins a run that is
/// read to its end, which the processor sees coming; in rows side by side it sees only jumps, and memory then gives half as much.
/// Every sum is made in the same order, whatever `R` and `T`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn tile<C: Codes, const R: usize, const T: usize>(weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    let (inputs, outputs, row_bytes) = (weights.inputs(), weights.outputs(), weights.row_bytes());
    let tokens = x.len() / inputs;
    let blocks = inputs / C::BLOCK;
    // Tokens side by side, group by group: rows a power of two apart would share the same few lines of the cache.
    let mut beside = Vec::with_capacity(if T == 1 { 0 } else { blocks * C::BLOCK * T });
    for at in 0..if T == 1 { 0 } else { blocks * C::BLOCK / GROUP } {
        for t in 0..T {
            beside.extend_from_slice(&x[t.min(tokens - 1) * inputs + at * GROUP..][..GROUP]);
        }
    }
    let groups: &[f32] = if T == 1 { x } else { &beside };
    let apart = outputs.div_ceil(R);
    for first in 0..apart {
        // Past the last row the last again.
        let row: [&[u8]; R] =
            std::array::from_fn(|r| &weights.bytes()[(first + r * apart).min(outputs - 1) * row_bytes..][..row_bytes]);
        let mut total = [[_mm512_setzero_ps(); T]; R];
        for block in 0..blocks {
            for group in 0..C::BLOCK / GROUP {
                let at = (block * C::BLOCK + group * GROUP) * T;
                let mut numbers = [[_mm512_setzero_ps(); 2]; R];
                for (row, numbers) in row.iter().zip(&mut numbers) {
                    let ahead = AHEAD + block * C::BYTES + group * C::BYTES / (C::BLOCK / GROUP);
                    for line in (0..C::BYTES * GROUP / C::BLOCK).step_by(64) {
                        // Nothing is read, so that any address will do.
                        _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(ahead + line).cast());
                    }
                    // SAFETY: a row has `blocks` blocks.
                    *numbers = unsafe { C::group(row.as_ptr().add(block * C::BYTES), group) };
                }
                // A token is read once for all rows: tokens do not always fit the nearest cache.
                for t in 0..T {
                    for half in 0..2 {
                        // SAFETY: there are `blocks` times `BLOCK` numbers of each token.
                        let x = unsafe { _mm512_loadu_ps(groups.as_ptr().add(at + t * GROUP + 16 * half)) };
                        for (total, numbers) in total.iter_mut().zip(&numbers) {
                            total[t] = _mm512_fmadd_ps(numbers[half], x, total[t]);
                        }
                    }
                }
            }
        }
        // A copy: what others are shown is kept in memory.
        let made = total;
        // SAFETY: the same instructions; the rows are those of the sums.
        unsafe { finish::<C, R, T>(&made, &row, (x, inputs), sums, (first..outputs).step_by(apart)) };
    }
}

/// Adds the products of numbers that are no whole group, and writes the sums of the rows `outputs`.
///
/// A function of its own: loops that are not unrolled would have the sums of the caller kept in memory.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn finish<C: Codes, const R: usize, const T: usize>(
    total: &[[__m512; T]; R],
    rows: &[&[u8]; R],
    (x, inputs): (&[f32], usize),
    sums: &mut [f32],
    outputs: StepBy<Range<usize>>,
) {
    let all = sums.len() / (x.len() / inputs);
    let blocks = inputs / C::BLOCK;
    let done = blocks * C::BLOCK;
    // Past the last row and token there is no place.
    for (output, (row, total)) in outputs.zip(rows.iter().zip(total)) {
        let rest = if done < inputs {
            // SAFETY: the same instructions.
            unsafe { part_of_group::<C>(&row[blocks * C::BYTES..]) }
        } else {
            [_mm512_setzero_ps(); 2]
        };
        for (t, (&total, x)) in total.iter().zip(x.chunks_exact(inputs)).enumerate() {
            let mut total = total;
            if done < inputs {
                let mut padded = [0.0; GROUP];
                padded[..inputs - done].copy_from_slice(&x[done..]);
                // SAFETY: 32 numbers.
                unsafe { multiply(&rest, padded.as_ptr(), &mut total) };
            }
            sums[t * all + output] = _mm512_reduce_add_ps(total);
        }
    }
}

/// Adds the products of a group with the 32 numbers at `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn multiply(numbers: &[__m512; 2], x: *const f32, total: &mut __m512) {
    for (n, &numbers) in numbers.iter().enumerate() {
        // SAFETY: the caller vouches for 32 numbers.
        let x = unsafe { _mm512_loadu_ps(x.add(16 * n)) };
        *total = _mm512_fmadd_ps(numbers, x, *total);
    }
}
