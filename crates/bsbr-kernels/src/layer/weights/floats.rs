//! Codes that are floats themselves, in AVX2 and AVX-512: MXFP4 and E4M3.
//!
//! The 16 numbers of E2M1 are looked up. Those of E4M3 become half-precision floats by a shift: these have one bit more of exponent,
//! and so stand for a 256th; what is below the least normal number of one is so of the other.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bsbr_weights::{TWICE_E2M1, half_e8m0};

use super::{avx2, avx512};

/// Numbers made at once.
const GROUP: usize = 32;
/// What half-precision floats are too small by.
const TOO_SMALL: f32 = 256.0;

/// A power of two, then codes: the low halves of 16 bytes first, then the high ones.
pub(super) struct Mxfp4;
/// A scale, then 128 codes.
pub(super) struct F8E4M3;

/// Twice the numbers of the codes.
static TWICE: [f32; 16] = {
    let mut twice = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        twice[code] = TWICE_E2M1[code] as f32;
        code += 1;
    }
    twice
};

impl avx2::Quantised for Mxfp4 {
    const BLOCK: usize = 32;
    const BYTES: usize = 17;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn codes(block: *const u8, _: usize) -> __m256i {
        // SAFETY: the table has 16 bytes, and the caller vouches for those of the block.
        let (table, codes) = unsafe { (_mm_loadu_si128(TWICE_E2M1.as_ptr().cast()), avx2::nibbles(block.add(1))) };
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(block: *const u8, _: usize) -> ([f32; 2], f32) {
        // SAFETY: as above.
        ([half_e8m0(unsafe { *block }); 2], 0.0)
    }
}

impl avx512::Codes for Mxfp4 {
    const BLOCK: usize = 32;
    const BYTES: usize = 17;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    unsafe fn group(block: *const u8, _: usize) -> [__m512; 2] {
        // SAFETY: reads the 17 bytes that the caller vouches for, and the 16 numbers of the table.
        let (scale, codes, table) =
            unsafe { (half_e8m0(*block), avx512::bytes16(block.add(1)), _mm512_loadu_ps(TWICE.as_ptr())) };
        let table = _mm512_mul_ps(table, _mm512_set1_ps(scale));
        [_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table)]
    }
}

impl avx2::Codes for F8E4M3 {
    const BLOCK: usize = 128;
    const BYTES: usize = 132;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group(block: *const u8, group: usize) -> [__m256; 4] {
        // SAFETY: reads the scale and the 32 codes of a group of the block that the caller vouches for.
        unsafe {
            let scale = _mm256_set1_ps(block.cast::<f32>().read_unaligned());
            let codes = block.add(4 + GROUP * group);
            std::array::from_fn(|n| {
                let halves = halves8(_mm_loadl_epi64(codes.add(8 * n).cast()));
                _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(TOO_SMALL)), scale)
            })
        }
    }
}

impl avx512::Codes for F8E4M3 {
    const BLOCK: usize = 128;
    const BYTES: usize = 132;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    unsafe fn group(block: *const u8, group: usize) -> [__m512; 2] {
        // SAFETY: reads the scale and the 32 codes of a group of the block that the caller vouches for.
        let (scale, codes) =
            unsafe { (block.cast::<f32>().read_unaligned(), _mm256_loadu_si256(block.add(4 + GROUP * group).cast())) };
        let scale = _mm512_set1_ps(scale);
        let number = |codes| {
            let halves = halves16(codes);
            _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(TOO_SMALL)), scale)
        };
        [number(_mm256_castsi256_si128(codes)), number(_mm256_extracti128_si256::<1>(codes))]
    }
}

/// Sign and rest of eight bytes where half-precision floats have them.
#[inline]
#[target_feature(enable = "avx2")]
fn halves8(codes: __m128i) -> __m128i {
    // A byte in the upper half of 16 bits and the lower half empty.
    let high = _mm_unpacklo_epi8(_mm_setzero_si128(), codes);
    let sign = _mm_and_si128(high, _mm_set1_epi16(i16::MIN));
    _mm_or_si128(sign, _mm_srli_epi16::<1>(_mm_andnot_si128(_mm_set1_epi16(i16::MIN), high)))
}

/// The same of 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn halves16(codes: __m128i) -> __m256i {
    let high = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes));
    let sign = _mm256_and_si256(high, _mm256_set1_epi16(i16::MIN));
    _mm256_or_si256(sign, _mm256_srli_epi16::<1>(_mm256_andnot_si256(_mm256_set1_epi16(i16::MIN), high)))
}
