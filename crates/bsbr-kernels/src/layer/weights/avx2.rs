//! The formats in AVX2: groups of 32 numbers in four registers.
//!
//! The codes of a group are 32 signed bytes in one register before they become numbers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix};

use super::{
    floats::{F8E4M3, Mxfp4},
    group_scale,
};

/// Numbers made at once.
const GROUP: usize = 32;

/// Registers of a group.
type Numbers = [__m256; 4];

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
    /// Needs AVX2, FMA and F16C; `block` points to `BYTES` bytes that can be read.
    unsafe fn group(block: *const u8, group: usize) -> Numbers;
}

macro_rules! plain_codes {
    ($($(#[$doc:meta])* $name:ident, $bytes:expr, |$data:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        struct $name;
        impl Codes for $name {
            const BLOCK: usize = GROUP;
            const BYTES: usize = $bytes;
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn group($data: *const u8, _group: usize) -> Numbers {
                // SAFETY: reads at most `BYTES` bytes from `data`, which the caller vouches for.
                unsafe { $body }
            }
        }
    )*};
}

plain_codes! {
    /// Four bytes each.
    F32, 128, |data| std::array::from_fn(|n| _mm256_loadu_ps(data.add(32 * n).cast()));
    /// Two bytes each.
    F16, 64, |data| std::array::from_fn(|n| _mm256_cvtph_ps(_mm_loadu_si128(data.add(16 * n).cast())));
    /// Two bytes each: the upper ones of an f32.
    Bf16, 64, |data| std::array::from_fn(|n| {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(data.add(16 * n).cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    });
}

/// A format whose numbers are codes: `scale code + summand`.
pub(super) trait Quantised {
    /// Numbers of a block.
    const BLOCK: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// The signed codes of a group.
    ///
    /// # Safety
    ///
    /// Needs AVX2 and F16C; `block` points to `BYTES` bytes that can be read.
    unsafe fn codes(block: *const u8, group: usize) -> __m256i;
    /// The scales of the first and of the last 16 numbers of a group, and what is added to all.
    ///
    /// # Safety
    ///
    /// As for `codes`.
    unsafe fn scales(block: *const u8, group: usize) -> ([f32; 2], f32);
}

impl<Q: Quantised> Codes for Q {
    const BLOCK: usize = Q::BLOCK;
    const BYTES: usize = Q::BYTES;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(block: *const u8, group: usize) -> Numbers {
        // SAFETY: the same instructions and bytes.
        let (codes, (scales, summand)) = unsafe { (Q::codes(block, group), Q::scales(block, group)) };
        affine(codes, scales, summand)
    }
}

macro_rules! quantised {
    ($($(#[$doc:meta])* $name:ident, $block:expr, $bytes:expr, |$data:ident, $at:ident| $codes:expr, $scales:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;
        impl Quantised for $name {
            const BLOCK: usize = $block;
            const BYTES: usize = $bytes;
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn codes($data: *const u8, $at: usize) -> __m256i {
                let _ = $at;
                // SAFETY: reads at most `BYTES` bytes from `data`, which the caller vouches for.
                unsafe { $codes }
            }
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn scales($data: *const u8, $at: usize) -> ([f32; 2], f32) {
                let _ = $at;
                // SAFETY: as above.
                unsafe { $scales }
            }
        }
    )*};
}

quantised! {
    /// A scale, then 32 signed bytes.
    Q8_0, 32, 34, |data, at| _mm256_loadu_si256(data.add(2).cast()), ([f16_at(data); 2], 0.0);
    /// A scale, then codes less 8.
    Q4_0, 32, 18, |data, at| less(nibbles(data.add(2)), 8), ([f16_at(data); 2], 0.0);
    /// A scale, a smallest number, then codes.
    Q4_1, 32, 20, |data, at| nibbles(data.add(4)), ([f16_at(data); 2], f16_at(data.add(2)));
    /// A scale, fifth bits, then codes; less 16.
    Q5_0, 32, 22, |data, at| {
        let codes = _mm256_or_si256(nibbles(data.add(6)), fifth_bits(data.add(2).cast::<u32>().read_unaligned()));
        less(codes, 16)
    }, ([f16_at(data); 2], 0.0);
    /// A scale, a smallest number, fifth bits, then codes.
    Q5_1, 32, 24, |data, at|
        _mm256_or_si256(nibbles(data.add(8)), fifth_bits(data.add(4).cast::<u32>().read_unaligned())),
    ([f16_at(data); 2], f16_at(data.add(2)));
    /// Scales of scales and of offsets, packed scales, then codes of two groups in 32 bytes each.
    Q4K, 256, 144, |data, at| half_bytes(data.add(16 + at / 2 * 32), at % 2), k_scale(data, at);
    /// As Q4_K with fifth bits: bit `g` of byte `n` belongs to number `n` of group `g`.
    Q5K, 256, 176, |data, at| {
        let high = _mm256_srl_epi16(_mm256_loadu_si256(data.add(16).cast()), _mm_cvtsi32_si128(at as i32));
        let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(1)));
        _mm256_or_si256(half_bytes(data.add(48 + at / 2 * 32), at % 2), high)
    }, k_scale(data, at);
    /// Low four bits, high two bits, signed scales of 16 numbers each, the scale of these.
    Q6K, 256, 210, |data, at| {
        let (half, part) = (at / 4, at % 4);
        let low = half_bytes(data.add(half * 64 + part % 2 * 32), part / 2);
        let high = _mm256_loadu_si256(data.add(128 + half * 32).cast());
        let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * part as i32));
        let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(3)));
        less(_mm256_or_si256(low, high), 32)
    }, {
        let whole = f16_at(data.add(208));
        let scale = |n: usize| whole * f32::from(*data.add(192 + 2 * at + n) as i8);
        ([scale(0), scale(1)], 0.0)
    };
}

#[inline]
#[target_feature(enable = "f16c")]
unsafe fn f16_at(data: *const u8) -> f32 {
    // SAFETY: the caller vouches for two bytes.
    let bits = unsafe { data.cast::<u16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// 32 signed codes times the scale of each 16, plus a summand. A code times its scale has few enough bits to be exact where
/// something is added, so that fusing changes nothing.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn affine(codes: __m256i, scales: [f32; 2], summand: f32) -> Numbers {
    let (scales, summand) = (scales.map(|scale| _mm256_set1_ps(scale)), _mm256_set1_ps(summand));
    let (low, high) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
    let eight = |codes, scale| _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale, summand);
    [
        eight(low, scales[0]),
        eight(_mm_srli_si128::<8>(low), scales[0]),
        eight(high, scales[1]),
        eight(_mm_srli_si128::<8>(high), scales[1]),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn less(codes: __m256i, offset: i8) -> __m256i {
    _mm256_sub_epi8(codes, _mm256_set1_epi8(offset))
}

/// The four-bit codes of 32 numbers in 16 bytes: the low halves first, then the high ones.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles(data: *const u8) -> __m256i {
    // SAFETY: the caller vouches for 16 bytes.
    let bytes = unsafe { _mm_loadu_si128(data.cast()) };
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(bytes), _mm_srli_epi16::<4>(bytes));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// The low or the high halves of 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_bytes(data: *const u8, high: usize) -> __m256i {
    // SAFETY: the caller vouches for 32 bytes.
    let bytes = unsafe { _mm256_loadu_si256(data.cast()) };
    _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(4 * high as i32)), _mm256_set1_epi8(15))
}

/// 16 in each byte whose bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(bits: u32) -> __m256i {
    let byte_of_each = _mm256_setr_epi8(
        0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
    );
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), byte_of_each);
    let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// Scales and summand of a group of Q4_K or Q5_K.
#[inline]
#[target_feature(enable = "f16c")]
unsafe fn k_scale(data: *const u8, group: usize) -> ([f32; 2], f32) {
    // SAFETY: the caller vouches for the 16 bytes that either format begins with.
    unsafe {
        let (scale, offset) = group_scale(data.add(4).cast::<[u32; 3]>().read_unaligned(), group);
        ([f16_at(data) * f32::from(scale); 2], -(f16_at(data.add(2)) * f32::from(offset)))
    }
}

/// Writes a group.
#[inline]
#[target_feature(enable = "avx2")]
fn store(numbers: Numbers, out: &mut [f32; GROUP]) {
    for (out, numbers) in out.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        // SAFETY: there is room for eight numbers.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), numbers) };
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
pub(super) fn widen(_: pulp::x86::V3, weights: Matrix<'_>, out: &mut [f32]) {
    with_codes!(weights.format(), widen_codes(weights, out));
}

#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn part_of_group<C: Codes>(data: &[u8]) -> Numbers {
    let mut padded = [0; 4 * GROUP];
    padded[..data.len()].copy_from_slice(data);
    // SAFETY: such a format reads no more than the padded bytes.
    unsafe { C::group(padded.as_ptr(), 0) }
}

/// As [`super::dots`], whose checks hold.
pub(super) fn dots(_: pulp::x86::V3, weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    with_codes!(weights.format(), dots_codes(weights, x, sums));
}

/// Most tokens for which weights are made once.
const TOKENS: usize = 4;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_codes<C: Codes>(weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    let (inputs, outputs) = (weights.inputs(), weights.outputs());
    if inputs == 0 || outputs == 0 {
        return sums.fill(0.0);
    }
    for (x, sums) in x.chunks(TOKENS * inputs).zip(sums.chunks_mut(TOKENS * outputs)) {
        // SAFETY: the same instructions; the caller has compared the sizes.
        unsafe {
            match x.len() / inputs {
                1 => tile::<C, 8, 1>(weights, x, sums),
                2 => tile::<C, 4, 2>(weights, x, sums),
                _ => tile::<C, 2, TOKENS>(weights, x, sums),
            }
        }
    }
}

/// `R` rows of weights with up to `T` tokens at a time: so many sums that additions need not wait for each other, and so many
/// rows that tokens are read from the nearest cache seldom. The rows lie far from each other, as in [`super::avx512`]. Every sum is
/// made in the same order, whatever `R` and `T`.
#[target_feature(enable = "avx2,fma,f16c")]
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
        let mut total = [[_mm256_setzero_ps(); T]; R];
        for block in 0..blocks {
            for group in 0..C::BLOCK / GROUP {
                let at = (block * C::BLOCK + group * GROUP) * T;
                for (row, total) in row.iter().zip(&mut total) {
                    // SAFETY: a row has `blocks` blocks.
                    let numbers = unsafe { C::group(row.as_ptr().add(block * C::BYTES), group) };
                    for (t, total) in total.iter_mut().enumerate() {
                        // SAFETY: there are `blocks` times `BLOCK` numbers of each token.
                        unsafe { multiply(&numbers, groups.as_ptr().add(at + t * GROUP), total) };
                    }
                }
            }
        }
        let done = blocks * C::BLOCK;
        if done < inputs {
            for (row, total) in row.iter().zip(&mut total) {
                // SAFETY: the same instructions.
                let numbers = unsafe { part_of_group::<C>(&row[blocks * C::BYTES..]) };
                for (t, total) in total.iter_mut().enumerate() {
                    let mut padded = [0.0; GROUP];
                    padded[..inputs - done].copy_from_slice(&x[t.min(tokens - 1) * inputs..][done..inputs]);
                    // SAFETY: 32 numbers.
                    unsafe { multiply(&numbers, padded.as_ptr(), total) };
                }
            }
        }
        for (output, total) in (first..outputs).step_by(apart).zip(&total) {
            for (t, total) in total.iter().enumerate().take(tokens) {
                sums[t * outputs + output] = sum(*total);
            }
        }
    }
}

/// Adds the products of a group with the 32 numbers at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply(numbers: &Numbers, x: *const f32, total: &mut __m256) {
    for (n, &numbers) in numbers.iter().enumerate() {
        // SAFETY: the caller vouches for 32 numbers.
        let x = unsafe { _mm256_loadu_ps(x.add(8 * n)) };
        *total = _mm256_fmadd_ps(numbers, x, *total);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(all: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
    let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
}
