//! Products of codes in AVX-512 with VNNI: one instruction for 64 products.
//!
//! It multiplies unsigned codes, those of weights, with signed ones. Where a format subtracts an offset from its codes, a power of
//! two, the sums start from that multiple of the token's own sums.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{Format, Matrix, TWICE_E2M1, half_e8m0};

use super::{
    super::avx512::{AHEAD, half_at},
    GROUP, QUAD, TokenCodes,
};

/// Four groups of a quantised format.
pub(super) trait Codes {
    /// Quads of a block, or blocks of a quad.
    const QUADS: Layout;
    /// Bytes of a block.
    const BYTES: usize;
    /// The codes are larger by two to this power; `None` where an offset is subtracted from the numbers instead.
    const LESS: Option<u32>;
    /// The unsigned codes of groups `2 pair` and `2 pair + 1`.
    ///
    /// # Safety
    ///
    /// Needs AVX-512 F, BW, DQ, VL and VNNI, and F16C; `data` points to the four blocks of a quad, or to the block whose quad
    /// `part` is meant.
    unsafe fn codes(data: *const u8, part: usize, pair: usize) -> __m512i;
    /// For each pair the scales of its numbers, four numbers to a lane.
    ///
    /// # Safety
    ///
    /// As for `codes`.
    unsafe fn scales(data: *const u8, part: usize) -> [__m512; 2];
    /// The offset of each group.
    ///
    /// # Safety
    ///
    /// As for `codes`.
    unsafe fn offsets(data: *const u8, part: usize) -> __m128;
}

/// How quads and blocks lie.
#[derive(PartialEq)]
pub(super) enum Layout {
    /// Four blocks to a quad.
    Blocks,
    /// Two quads to a block.
    Halves,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident, $layout:ident, $bytes:expr, $less:expr,
        |$data:ident, $part:ident, $pair:ident| $codes:expr, $scales:expr, $offsets:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;
        impl Codes for $name {
            const QUADS: Layout = Layout::$layout;
            const BYTES: usize = $bytes;
            const LESS: Option<u32> = $less;
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn codes($data: *const u8, $part: usize, $pair: usize) -> __m512i {
                let _ = $part;
                // SAFETY: reads within the blocks that the caller vouches for.
                unsafe { $codes }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn scales($data: *const u8, $part: usize) -> [__m512; 2] {
                let _ = $part;
                // SAFETY: as above.
                unsafe { $scales }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn offsets($data: *const u8, $part: usize) -> __m128 {
                let _ = ($data, $part);
                // SAFETY: as above.
                #[allow(unused_unsafe)]
                unsafe { $offsets }
            }
        }
    )*};
}

codes! {
    /// A scale, then 32 signed bytes.
    Q8_0, Blocks, 34, Some(7), |data, part, pair| {
        let data = data.add(68 * pair + 2);
        let (a, b) = (_mm256_loadu_si256(data.cast()), _mm256_loadu_si256(data.add(34).cast()));
        let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
    }, spread::<34>(data), _mm_setzero_ps();
    /// A scale, then codes.
    Q4_0, Blocks, 18, Some(3), |data, part, pair| nibbles(data.add(36 * pair + 2), 18),
    spread::<18>(data), _mm_setzero_ps();
    /// A scale, a smallest number, then codes.
    Q4_1, Blocks, 20, None, |data, part, pair| nibbles(data.add(40 * pair + 4), 20),
    spread::<20>(data), less(halves::<20>(data.add(2)));
    /// A scale, fifth bits, then codes.
    Q5_0, Blocks, 22, Some(4), |data, part, pair| {
        let data = data.add(44 * pair);
        with_fifth(nibbles(data.add(6), 22), data.add(2), 22)
    }, spread::<22>(data), _mm_setzero_ps();
    /// A scale, a smallest number, fifth bits, then codes.
    Q5_1, Blocks, 24, None, |data, part, pair| {
        let data = data.add(48 * pair);
        with_fifth(nibbles(data.add(8), 24), data.add(4), 24)
    }, spread::<24>(data), less(halves::<24>(data.add(2)));
    /// Scales of scales and of offsets, packed scales, then codes of two groups in 32 bytes each.
    Q4K, Halves, 144, None, |data, part, pair| low_bits(data.add(16 + 64 * part + 32 * pair)),
    of_groups(six_bits(data, part, 0)), six_bits(data, part, 1);
    /// As Q4_K with fifth bits.
    Q5K, Halves, 176, None, |data, part, pair| {
        let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(data.add(16).cast()));
        let group = (4 * part + 2 * pair) as i16;
        let high = _mm512_srlv_epi16(high, two_halves(group, group + 1));
        let high = _mm512_slli_epi16::<4>(_mm512_and_si512(high, _mm512_set1_epi8(1)));
        _mm512_or_si512(low_bits(data.add(48 + 64 * part + 32 * pair)), high)
    }, of_groups(six_bits(data, part, 0)), six_bits(data, part, 1);
    /// Low four bits, high two bits, signed scales of 16 numbers each, the scale of these.
    Q6K, Halves, 210, Some(5), |data, part, pair| {
        let low = _mm512_loadu_si512(data.add(64 * part).cast());
        let low = _mm512_srl_epi16(low, _mm_cvtsi32_si128(4 * pair as i32));
        let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(data.add(128 + 32 * part).cast()));
        let high = _mm512_srlv_epi16(high, two_halves(4 * pair as i16, 4 * pair as i16 + 2));
        let high = _mm512_slli_epi16::<4>(_mm512_and_si512(high, _mm512_set1_epi8(3)));
        _mm512_or_si512(low, high)
    }, {
        let scales = _mm_loadl_epi64(data.add(192 + 8 * part).cast());
        let scales = _mm512_castps256_ps512(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales)));
        let scales = _mm512_mul_ps(scales, half_at(data.add(208)));
        let first = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        [
            _mm512_permutexvar_ps(first, scales),
            _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(4)), scales),
        ]
    }, _mm_setzero_ps();
    /// A power of two, then codes of floats: of each twice its number, larger by 16.
    Mxfp4, Blocks, 17, Some(4), |data, part, pair| {
        let table = _mm_add_epi8(_mm_loadu_si128(TWICE_E2M1.as_ptr().cast()), _mm_set1_epi8(16));
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles(data.add(34 * pair + 1), 17))
    }, {
        let at = |block: usize| half_e8m0(*data.add(17 * block));
        of_groups(_mm_setr_ps(at(0), at(1), at(2), at(3)))
    }, _mm_setzero_ps();
}

/// The numbers in half precision at the start of four blocks.
#[inline]
#[target_feature(enable = "f16c")]
unsafe fn halves<const BYTES: usize>(data: *const u8) -> __m128 {
    // SAFETY: the caller vouches for four blocks.
    let at = |block: usize| u64::from(unsafe { data.add(block * BYTES).cast::<u16>().read_unaligned() });
    let bits = at(0) | at(1) << 16 | at(2) << 32 | at(3) << 48;
    _mm_cvtph_ps(_mm_cvtsi64_si128(bits as i64))
}

/// The same, eight lanes each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn spread<const BYTES: usize>(data: *const u8) -> [__m512; 2] {
    let second = (BYTES / 2) as i16;
    let pair = |data: *const u8| {
        // Words up to that of the second block; what a mask leaves out is not read.
        let words = 1_u32.wrapping_shl(second as u32 + 1) - 1;
        // SAFETY: the caller vouches for both blocks.
        let words = unsafe { _mm512_maskz_loadu_epi16(words, data.cast()) };
        let place = _mm512_castsi128_si512(_mm_setzero_si128());
        let place = _mm512_inserti32x4::<1>(place, _mm_set1_epi16(second));
        _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(place, words)))
    };
    [pair(data), pair(data.wrapping_add(2 * BYTES))]
}

/// `-x`.
#[inline]
#[target_feature(enable = "sse2")]
fn less(x: __m128) -> __m128 {
    _mm_sub_ps(_mm_setzero_ps(), x)
}

/// One number to each group, eight lanes each.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_groups(numbers: __m128) -> [__m512; 2] {
    let numbers = _mm512_castps128_ps512(numbers);
    let first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let second = _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    [_mm512_permutexvar_ps(first, numbers), _mm512_permutexvar_ps(second, numbers)]
}

/// An integer of 16 bits in the lower half and one in the upper half.
#[inline]
#[target_feature(enable = "avx512f")]
fn two_halves(low: i16, high: i16) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set1_epi16(low)), _mm256_set1_epi16(high))
}

/// Codes of four bits of two blocks that begin `apart` bytes apart: of each the low halves of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn nibbles(data: *const u8, apart: usize) -> __m512i {
    // SAFETY: the caller vouches for both blocks.
    let (a, b) = unsafe { (_mm_loadu_si128(data.cast()), _mm_loadu_si128(data.add(apart).cast())) };
    let both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(a), 0xff00, b);
    let shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
}

/// Codes of four bits: the low halves of 32 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn low_bits(data: *const u8) -> __m512i {
    // SAFETY: the caller vouches for 32 bytes.
    let both = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(data.cast()) });
    let shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
}

/// Adds the fifth bits of two blocks that begin `apart` bytes apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn with_fifth(codes: __m512i, bits: *const u8, apart: usize) -> __m512i {
    // SAFETY: the caller vouches for both blocks.
    let at = |from: usize| u64::from(unsafe { bits.add(from).cast::<u32>().read_unaligned() });
    _mm512_mask_add_epi8(codes, at(0) | at(apart) << 32, codes, _mm512_set1_epi8(16))
}

/// Scales (`which` 0) or offsets (1) of four groups of Q4_K or Q5_K.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,f16c")]
unsafe fn six_bits(data: *const u8, part: usize, which: usize) -> __m128 {
    // SAFETY: the caller vouches for the block, which begins with 16 bytes of scales.
    let words = unsafe { data.add(4).cast::<[u32; 3]>().read_unaligned() };
    let packed = super::super::six_bits(words, part == 1, which);
    let codes = _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(packed as i32)));
    // SAFETY: as above.
    let whole = unsafe { half_at(data.add(2 * which)) };
    _mm_mul_ps(codes, _mm512_castps512_ps128(whole))
}

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
                1 => tile::<C, 4, 1>(weights, x, first, sums),
                2 => tile::<C, 4, 2>(weights, x, first, sums),
                3 | 4 => tile::<C, 3, 4>(weights, x, first, sums),
                _ => tile::<C, 2, 8>(weights, x, first, sums),
            };
        }
    }
}

/// `R` rows of weights, far from each other as in [`super::super::avx512`], with up to `T` tokens from `start` on at a time; returns
/// how many tokens that were. Every sum is made in the same order, whatever `R` and `T`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn tile<C: Codes, const R: usize, const T: usize>(
    weights: Matrix<'_>,
    x: &TokenCodes,
    start: usize,
    sums: &mut [f32],
) -> usize {
    let (outputs, row_bytes, quads) = (weights.outputs(), weights.row_bytes(), x.quads());
    let tokens = (x.tokens - start).min(T);
    let (data, end) = (weights.bytes().as_ptr(), weights.bytes().len());
    // What a quad takes, and whether the last of a row is whole.
    let (quad_bytes, whole) = match C::QUADS {
        Layout::Blocks => (QUAD * C::BYTES, x.inputs.is_multiple_of(QUAD * GROUP)),
        Layout::Halves => (C::BYTES, true),
    };
    // Past the last row and token the last again.
    let token: [usize; T] = std::array::from_fn(|t| start + t.min(tokens - 1));
    let apart = outputs.div_ceil(R);
    let mut padded = [[0_u8; QUAD * 34]; R];
    for first in 0..apart {
        let mut row = [data; R];
        // Where the last quad is.
        let mut last = [data; R];
        for r in 0..R {
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
        let mut total = [[_mm512_setzero_ps(); T]; R];
        let mut offset = [[_mm_setzero_ps(); T]; R];
        for quad in 0..quads {
            let (at, part) = match C::QUADS {
                Layout::Blocks => (quad * quad_bytes, 0),
                Layout::Halves => (quad / 2 * quad_bytes, quad % 2),
            };
            let partial = !whole && quad + 1 == quads;
            for (r, (total, offset)) in total.iter_mut().zip(&mut offset).enumerate() {
                let block = if partial { last[r] } else { row[r].wrapping_add(at) };
                for line in (0..quad_bytes / if C::QUADS == Layout::Halves { 2 } else { 1 }).step_by(64) {
                    // Nothing is read, so that any address will do.
                    _mm_prefetch::<_MM_HINT_T0>(row[r].wrapping_add(at + AHEAD + line).cast());
                }
                // SAFETY: the quad lies within the weights, or is the copy.
                unsafe {
                    let codes = [C::codes(block, part, 0), C::codes(block, part, 1)];
                    let scales = C::scales(block, part);
                    let own = if C::LESS.is_none() { C::offsets(block, part) } else { _mm_setzero_ps() };
                    for t in 0..T {
                        // SAFETY: every token has as many quads.
                        let group = (quad * x.tokens + token[t]) * QUAD;
                        let factors = _mm_loadu_ps(x.scales.as_ptr().add(group));
                        let factors = of_groups(factors);
                        for pair in 0..2 {
                            let other = x.codes.as_ptr().add((group + 2 * pair) * GROUP);
                            let other = _mm512_loadu_si512(other.cast());
                            let from = match C::LESS {
                                Some(bits) => {
                                    let less = x.less.as_ptr().add((group + 2 * pair) * GROUP / 4);
                                    _mm512_sll_epi32(_mm512_loadu_si512(less.cast()), _mm_cvtsi32_si128(bits as i32))
                                }
                                None => _mm512_setzero_si512(),
                            };
                            let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(from, codes[pair], other));
                            total[t] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales[pair], factors[pair]), total[t]);
                        }
                        if C::LESS.is_none() {
                            let totals = _mm_loadu_ps(x.totals.as_ptr().add(group));
                            offset[t] = _mm_fmadd_ps(own, totals, offset[t]);
                        }
                    }
                }
            }
        }
        for (r, output) in (first..outputs).step_by(apart).enumerate() {
            for t in 0..tokens {
                let mut sum = _mm512_reduce_add_ps(total[r][t]);
                if C::LESS.is_none() {
                    let pair = _mm_add_ps(offset[r][t], _mm_movehl_ps(offset[r][t], offset[r][t]));
                    sum -= _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)));
                }
                sums[(start + t) * outputs + output] = sum;
            }
        }
    }
    tokens
}
