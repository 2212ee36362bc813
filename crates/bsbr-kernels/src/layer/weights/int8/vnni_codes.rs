//! Four groups of each quantised format in registers: unsigned codes, scales, offsets.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::TWICE_E2M1;

use super::{QUAD, TOGETHER};

/// A quantised format, a quad of groups at a time. Numbers of four rows stand in a register: number `i` of quarter `g` is that of group
/// `g` of row `i`.
pub(super) trait Codes {
    /// Quads of a block, or blocks of a quad.
    const QUADS: Layout;
    /// Bytes of a block.
    const BYTES: usize;
    /// The codes are larger by two to this power; `None` where an offset is subtracted from the numbers instead.
    const LESS: Option<u32>;
    /// Whether halves of a group have scales of their own.
    const HALVES: bool;
    /// The unsigned codes: the first halves of the groups, then the second ones.
    ///
    /// # Safety
    ///
    /// Needs AVX-512 F, BW, DQ, VL and VNNI, and F16C; `data` points to the four blocks of a quad, or to the block whose quad
    /// `part` is meant.
    unsafe fn codes(data: *const u8, part: usize) -> [__m512i; 2];
    /// Scales of groups, or of their first and second halves.
    ///
    /// # Safety
    ///
    /// As for `codes`, of each row.
    unsafe fn scales(data: [*const u8; TOGETHER], part: usize) -> [__m512; 2];
    /// The offset of each group.
    ///
    /// # Safety
    ///
    /// As for `scales`.
    unsafe fn offsets(data: [*const u8; TOGETHER], part: usize) -> __m512;
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
    ($($(#[$doc:meta])* $name:ident, $layout:ident, $bytes:expr, $less:expr, $halves:expr,
        |$data:ident, $part:ident| $codes:expr, |$rows:ident| $scales:expr, $offsets:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;
        impl Codes for $name {
            const QUADS: Layout = Layout::$layout;
            const BYTES: usize = $bytes;
            const LESS: Option<u32> = $less;
            const HALVES: bool = $halves;
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn codes($data: *const u8, $part: usize) -> [__m512i; 2] {
                let _ = $part;
                // SAFETY: reads within the blocks that the caller vouches for.
                unsafe { $codes }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn scales($rows: [*const u8; TOGETHER], $part: usize) -> [__m512; 2] {
                let _ = $part;
                // SAFETY: as above.
                unsafe { $scales }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
            unsafe fn offsets($rows: [*const u8; TOGETHER], $part: usize) -> __m512 {
                let _ = ($rows, $part);
                // SAFETY: as above.
                #[allow(unused_unsafe)]
                unsafe { $offsets }
            }
        }
    )*};
}

codes! {
    /// A scale, then 32 signed bytes.
    Q8_0, Blocks, 34, Some(7), false, |data, _part| {
        let signed = [of_blocks(data.add(2), 34), of_blocks(data.add(18), 34)];
        signed.map(|codes| _mm512_xor_si512(codes, _mm512_set1_epi8(-128)))
    }, |rows| [halves::<34, 0>(rows); 2], _mm512_setzero_ps();
    /// A scale, then codes.
    Q4_0, Blocks, 18, Some(3), false, |data, _part| nibbles(of_blocks(data.add(2), 18)),
    |rows| [halves::<18, 0>(rows); 2], _mm512_setzero_ps();
    /// A scale, a smallest number, then codes.
    Q4_1, Blocks, 20, None, false, |data, _part| nibbles(of_blocks(data.add(4), 20)),
    |rows| [halves::<20, 0>(rows); 2], less(halves::<20, 2>(rows));
    /// A scale, fifth bits, then codes.
    Q5_0, Blocks, 22, Some(4), false, |data, _part| with_fifth(nibbles(of_blocks(data.add(6), 22)), data.add(2), 22),
    |rows| [halves::<22, 0>(rows); 2], _mm512_setzero_ps();
    /// A scale, a smallest number, fifth bits, then codes.
    Q5_1, Blocks, 24, None, false, |data, _part| with_fifth(nibbles(of_blocks(data.add(8), 24)), data.add(4), 24),
    |rows| [halves::<24, 0>(rows); 2], less(halves::<24, 2>(rows));
    /// Scales of scales and of offsets, packed scales, then codes of two groups in 32 bytes each.
    Q4K, Halves, 144, None, false, |data, part| low_bits(data.add(16 + 64 * part)),
    |rows| [six_bits(rows, part, 0); 2], six_bits(rows, part, 1);
    /// As Q4_K with fifth bits.
    Q5K, Halves, 176, None, false, |data, part| {
        let groups = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
        let groups = _mm512_add_epi64(groups, _mm512_set1_epi64(4 * part as i64));
        let low = low_bits(data.add(48 + 64 * part));
        std::array::from_fn(|half| {
            let high = _mm512_broadcast_i32x4(_mm_loadu_si128(data.add(16 + 16 * half).cast()));
            let high = _mm512_and_si512(_mm512_srlv_epi64(high, groups), _mm512_set1_epi8(1));
            _mm512_or_si512(low[half], _mm512_slli_epi16::<4>(high))
        })
    }, |rows| [six_bits(rows, part, 0); 2], six_bits(rows, part, 1);
    /// Low four bits, high two bits, signed scales of 16 numbers each, the scale of these.
    Q6K, Halves, 210, Some(5), true, |data, part| {
        std::array::from_fn(|half| {
            let low = two(data.add(64 * part + 16 * half), data.add(64 * part + 32 + 16 * half), 0xf0f0);
            let low = _mm512_srlv_epi64(low, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
            let high = _mm512_broadcast_i32x4(_mm_loadu_si128(data.add(128 + 32 * part + 16 * half).cast()));
            let high = _mm512_srlv_epi64(high, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
            let high = _mm512_slli_epi16::<4>(_mm512_and_si512(high, _mm512_set1_epi8(3)));
            _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), high)
        })
    }, |rows| {
        let of = |i: usize| rows[i].add(192 + 8 * part).cast::<i64>().read_unaligned();
        let rows_of = _mm256_setr_epi64x(of(0), of(1), of(2), of(3));
        // Of two rows the scales of first halves, group by group, then those of second ones.
        let by_half = _mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15);
        let two = _mm256_shuffle_epi8(rows_of, _mm256_broadcastsi128_si256(by_half));
        let (two, others) = (_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two));
        let scales = [_mm_unpacklo_epi16(two, others), _mm_unpackhi_epi16(two, others)];
        let scales = scales.map(|scales| _mm512_cvtepi8_epi32(scales));
        let whole = of_rows(rows, 208);
        scales.map(|scales| _mm512_mul_ps(_mm512_cvtepi32_ps(scales), whole))
    }, _mm512_setzero_ps();
    /// A power of two, then codes of floats: of each twice its number, larger by 16.
    Mxfp4, Blocks, 17, Some(4), false, |data, _part| {
        let table = _mm_add_epi8(_mm_loadu_si128(TWICE_E2M1.as_ptr().cast()), _mm_set1_epi8(16));
        let table = _mm512_broadcast_i32x4(table);
        nibbles(of_blocks(data.add(1), 17)).map(|codes| _mm512_shuffle_epi8(table, codes))
    }, |rows| {
        let of = |i: usize| {
            let at = |group: usize| u32::from(*rows[i].add(17 * group));
            (at(0) | at(1) << 8 | at(2) << 16 | at(3) << 24) as i32
        };
        let bytes = by_group(_mm_setr_epi32(of(0), of(1), of(2), of(3)));
        [halves_of_powers(_mm512_cvtepu8_epi32(bytes)); 2]
    }, _mm512_setzero_ps();
}

/// 16 bytes of each of four blocks that begin `apart` bytes apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn of_blocks(data: *const u8, apart: usize) -> __m512i {
    // SAFETY: the caller vouches for the blocks.
    let at = |block: usize| unsafe { _mm_loadu_si128(data.add(block * apart).cast()) };
    let first = _mm512_castsi128_si512(at(0));
    let second = _mm512_mask_broadcast_i32x4(first, 0x00f0, at(1));
    let third = _mm512_mask_broadcast_i32x4(second, 0x0f00, at(2));
    _mm512_mask_broadcast_i32x4(third, 0xf000, at(3))
}

/// 16 bytes in each quarter, others in the quarters whose bits are set.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn two(data: *const u8, other: *const u8, quarters: u16) -> __m512i {
    // SAFETY: the caller vouches for 16 bytes of each.
    let (data, other) = unsafe { (_mm_loadu_si128(data.cast()), _mm_loadu_si128(other.cast())) };
    _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(data), quarters, other)
}

/// The low halves of bytes, and the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    [bytes, _mm512_srli_epi16::<4>(bytes)].map(|codes| _mm512_and_si512(codes, _mm512_set1_epi8(15)))
}

/// Codes of four bits: of each 32 bytes the low halves are a group and the high ones the next.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn low_bits(data: *const u8) -> [__m512i; 2] {
    std::array::from_fn(|half| {
        // SAFETY: the caller vouches for 64 bytes.
        let bytes = unsafe { two(data.add(16 * half), data.add(32 + 16 * half), 0xff00) };
        let bytes = _mm512_srlv_epi64(bytes, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
        _mm512_and_si512(bytes, _mm512_set1_epi8(15))
    })
}

/// Adds the fifth bits of four blocks that begin `apart` bytes apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn with_fifth(codes: [__m512i; 2], bits: *const u8, apart: usize) -> [__m512i; 2] {
    let set: [u64; 2] = std::array::from_fn(|half| {
        // SAFETY: the caller vouches for the blocks.
        let of = |block: usize| u64::from(unsafe { bits.add(block * apart + 2 * half).cast::<u16>().read_unaligned() });
        of(0) | of(1) << 16 | of(2) << 32 | of(3) << 48
    });
    std::array::from_fn(|half| _mm512_mask_add_epi8(codes[half], set[half], codes[half], _mm512_set1_epi8(16)))
}

/// The numbers in half precision `AT` bytes behind the start of each block, of four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn halves<const BYTES: usize, const AT: usize>(rows: [*const u8; TOGETHER]) -> __m512 {
    // Words of a row: which are in its first 64 bytes, and where in those or in the next they are.
    let word = |group: usize| (group * BYTES + AT) / 2;
    let near = (0..QUAD).filter(|&group| word(group) < 32).count();
    let places: [u16; 32] = std::array::from_fn(|at| (word(at / TOGETHER % QUAD) % 32) as u16);
    let up_to = |last: usize| u32::MAX >> (31 - last % 32);
    let of_near: u32 = (1 << (near * TOGETHER)) - 1;
    let mut words = _mm512_setzero_si512();
    // SAFETY: of each row nothing but words up to the last that is wanted is read; the caller vouches for the blocks.
    unsafe {
        let places = _mm512_loadu_si512(places.as_ptr().cast());
        for (i, row) in rows.into_iter().enumerate() {
            let own = 0x1111_u32 << i;
            let first = _mm512_maskz_loadu_epi16(up_to(word(near - 1)), row.cast());
            words = _mm512_mask_permutexvar_epi16(words, own & of_near, places, first);
            if near < QUAD {
                let second = _mm512_maskz_loadu_epi16(up_to(word(QUAD - 1)), row.add(64).cast());
                words = _mm512_mask_permutexvar_epi16(words, own & !of_near, places, second);
            }
        }
    }
    _mm512_cvtph_ps(_mm512_castsi512_si256(words))
}

/// The number in half precision `at` bytes behind the start of each row, the same for all groups.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,f16c")]
unsafe fn of_rows(rows: [*const u8; TOGETHER], at: usize) -> __m512 {
    // SAFETY: the caller vouches for the blocks.
    let of = |i: usize| u64::from(unsafe { rows[i].add(at).cast::<u16>().read_unaligned() });
    let words = of(0) | of(1) << 16 | of(2) << 32 | of(3) << 48;
    _mm512_broadcast_f32x4(_mm_cvtph_ps(_mm_cvtsi64_si128(words as i64)))
}

/// Scales (`which` 0) or offsets (1) of four groups of Q4_K or Q5_K, of four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,f16c")]
unsafe fn six_bits(rows: [*const u8; TOGETHER], part: usize, which: usize) -> __m512 {
    let packed: [u32; TOGETHER] = std::array::from_fn(|i| {
        // SAFETY: the caller vouches for the blocks, which begin with 16 bytes of scales.
        let words = unsafe { rows[i].add(4).cast::<[u32; 3]>().read_unaligned() };
        super::super::six_bits(words, part == 1, which)
    });
    // SAFETY: 16 bytes.
    let packed = unsafe { _mm_loadu_si128(packed.as_ptr().cast()) };
    let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(by_group(packed)));
    // SAFETY: as above.
    _mm512_mul_ps(codes, unsafe { of_rows(rows, 2 * which) })
}

/// A byte for each group of four rows, group by group instead of row by row.
#[inline]
#[target_feature(enable = "ssse3")]
fn by_group(rows: __m128i) -> __m128i {
    _mm_shuffle_epi8(rows, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15))
}

/// As [`bsbr_weights::half_e8m0`].
#[inline]
#[target_feature(enable = "avx512f")]
fn halves_of_powers(bytes: __m512i) -> __m512 {
    let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(bytes, _mm512_set1_epi32(1)));
    let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), bytes);
    let numbers = _mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(bytes, _mm512_set1_epi32(2)), small);
    let none = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
    _mm512_castsi512_ps(_mm512_mask_mov_epi32(numbers, none, _mm512_set1_epi32(0x7fc0_0000)))
}

/// `-x`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn less(x: __m512) -> __m512 {
    _mm512_xor_ps(x, _mm512_set1_ps(-0.0))
}
