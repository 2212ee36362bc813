//! Weights as files store them: their numbers as f32, and their products with few tokens.
//!
//! A number of a block is made in a register, from its code and the scales of the block, exactly as
//! [`bsbr_weights::decode`] defines it; it never reaches memory where few tokens meet it. Where many do, the rows of a
//! task are widened once and all strips of tokens read them from the cache. Other arithmetics than f32 have modules of their own.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod bf16;
#[cfg(target_arch = "x86_64")]
mod floats;
pub(super) mod int8;
mod plain;

use bsbr_weights::Matrix;
use pulp::Arch;

/// The numbers of all rows, row by row.
///
/// # Panics
///
/// If `out` is of another size.
pub(super) fn widen(arch: Arch, weights: Matrix<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), weights.outputs() * weights.inputs(), "{weights:?} widened");
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) => avx512::widen(simd, weights, out),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(simd) => avx2::widen(simd, weights, out),
        _ => weights.widen(0..weights.outputs(), out),
    }
}

/// `sums[t][o] = weights_o . x_t` for tokens that stand as rows `[tokens, inputs]`; `sums` is `[tokens, outputs]`.
///
/// The weights are read from memory once, whatever the number of tokens. What a token gets does not depend, bit for bit, on
/// the others.
///
/// # Panics
///
/// If the sizes do not fit each other.
pub(super) fn dots(arch: Arch, weights: Matrix<'_>, x: &[f32], sums: &mut [f32]) {
    let tokens = sums.len().checked_div(weights.outputs()).unwrap_or(0);
    assert_eq!(x.len(), tokens * weights.inputs(), "{weights:?} with {tokens} tokens");
    assert_eq!(sums.len(), tokens * weights.outputs(), "{weights:?} with {tokens} tokens");
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) => avx512::dots(simd, weights, x, sums),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(simd) => avx2::dots(simd, weights, x, sums),
        _ => plain::dots(arch, weights, x, sums),
    }
}

/// Scales (`which` 0) or offsets (1) of four groups of a block of Q4_K or Q5_K, the first or the second four: six bits each,
/// packed in three words of the block.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn six_bits(words: [u32; 3], second: bool, which: usize) -> u32 {
    if second {
        (words[2] >> (4 * which) & 0x0f0f_0f0f) | (words[which] >> 2 & 0x3030_3030)
    } else {
        words[which] & 0x3f3f_3f3f
    }
}

/// Scale and offset of group `group` of such a block, without those of the block.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn group_scale(words: [u32; 3], group: usize) -> (u8, u8) {
    let of = |which| (six_bits(words, group >= 4, which) >> (8 * (group % 4))) as u8;
    (of(0), of(1))
}

#[cfg(test)]
pub(super) mod tests;
