//! Products of codes with tokens that are codes too: 32 numbers of a token share a scale, and sums of 32 products are integers.
//!
//! A token loses what 8 bits cannot hold of it; weights lose nothing. With `w_n = s c_n - o` and `x_n = t d_n` over a group of 32
//! numbers, `sum w_n x_n = s t sum c_n d_n - o t sum d_n`: two sums of integers, which no form rounds.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod plain;
pub(in crate::layer) mod strips;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod vnni_codes;
#[cfg(target_arch = "x86_64")]
mod vnni_rows;
#[cfg(target_arch = "x86_64")]
mod vnni_strips;

use bsbr_weights::Matrix;
use pulp::{Arch, Simd, WithSimd};

/// Numbers that share a scale.
const GROUP: usize = 32;

/// Groups that stand together, those of one token before those of the next: a row of weights passes them once for all tokens.
const QUAD: usize = 4;

/// The largest code.
const LARGEST: f32 = 127.0;

/// Codes of a half of a group.
const HALF: usize = GROUP / 2;

/// Tokens whose scales stand together.
const TOGETHER: usize = 4;

/// Tokens in 8 bits, the last quad and the last tokens that stand together filled up with zeros.
#[derive(Debug)]
pub(in crate::layer) struct TokenCodes {
    tokens: usize,
    inputs: usize,
    /// `[quads, tokens, 2, QUAD, HALF]`: first halves of the groups of a quad before the second ones.
    codes: Vec<i8>,
    /// Less the sum of each half of a group, `[quads, tokens / TOGETHER, 2, QUAD, TOGETHER]`: what an offset of unsigned codes of
    /// weights adds too much.
    less: Vec<i32>,
    /// `[quads, tokens / TOGETHER, QUAD, TOGETHER]`.
    scales: Vec<f32>,
    /// The sum of the numbers that the codes of a group mean, like the scales.
    totals: Vec<f32>,
}

impl TokenCodes {
    /// Of rows `[tokens, inputs]`, whole groups. Numbers of a group that holds one that is not finite become 0.
    pub(in crate::layer) fn new(arch: Arch, rows: &[f32], inputs: usize) -> Self {
        let tokens = rows.len().checked_div(inputs).unwrap_or(0);
        assert!(inputs.is_multiple_of(GROUP) && rows.len() == tokens * inputs, "rows of {inputs} numbers");
        let quads = (inputs / GROUP).div_ceil(QUAD);
        let groups = quads * QUAD * tokens.next_multiple_of(TOGETHER);
        let mut codes = Self {
            tokens,
            inputs,
            codes: vec![0; quads * QUAD * tokens * GROUP],
            less: vec![0; 2 * groups],
            scales: vec![0.0; groups],
            totals: vec![0.0; groups],
        };
        arch.dispatch(Encode { rows, codes: &mut codes });
        codes
    }

    fn quads(&self) -> usize {
        (self.inputs / GROUP).div_ceil(QUAD)
    }

    /// Where the first half of the first group of a quad is.
    #[inline(always)]
    fn quad_at(&self, quad: usize, token: usize) -> usize {
        (quad * self.tokens + token) * QUAD * GROUP
    }

    /// Where the codes of half a group are.
    #[inline(always)]
    fn half_at(&self, token: usize, group: usize, half: usize) -> usize {
        self.quad_at(group / QUAD, token) + (half * QUAD + group % QUAD) * HALF
    }

    /// Where the scale and the total of a group are.
    #[inline(always)]
    fn scale_at(&self, token: usize, group: usize) -> usize {
        let together = group / QUAD * self.tokens.div_ceil(TOGETHER) + token / TOGETHER;
        (together * QUAD + group % QUAD) * TOGETHER + token % TOGETHER
    }
}

struct Encode<'a> {
    rows: &'a [f32],
    codes: &'a mut TokenCodes,
}

impl WithSimd for Encode<'_> {
    type Output = ();
    // Plain loops, which the compiler makes vectors of for each level.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, codes: to } = self;
        for (token, row) in rows.chunks_exact(to.inputs.max(1)).enumerate() {
            for (group, numbers) in row.as_chunks::<GROUP>().0.iter().enumerate() {
                let mut codes = [0; GROUP];
                let scale = encode(numbers, &mut codes);
                let at = to.scale_at(token, group);
                let mut total = 0;
                for (half, codes) in codes.as_chunks::<HALF>().0.iter().enumerate() {
                    let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
                    let quad = at / (QUAD * TOGETHER);
                    to.less[(2 * quad + half) * QUAD * TOGETHER + at % (QUAD * TOGETHER)] = -sum;
                    total += sum;
                    let from = to.half_at(token, group, half);
                    to.codes[from..from + HALF].copy_from_slice(codes);
                }
                to.scales[at] = scale;
                to.totals[at] = scale * total as f32;
            }
        }
    }
}

/// Codes of a group, rounded half to even, and their scale.
#[inline(always)]
fn encode(numbers: &[f32; GROUP], codes: &mut [i8]) -> f32 {
    let largest = numbers.iter().fold(0.0_f32, |largest, x| if x.abs() > largest { x.abs() } else { largest });
    let scale = largest / LARGEST;
    // No number at all, none but zeros, or something too large: a scale that cannot be divided by.
    let factor = if scale.is_normal() && numbers.iter().all(|x| x.is_finite()) { 1.0 / scale } else { 0.0 };
    crate::index::integer::encode(numbers, factor, codes);
    if factor == 0.0 { 0.0 } else { scale }
}

/// `sums[t][o] = weights_o . x_t`, `[tokens, outputs]`, for weights of a format whose codes are integers.
///
/// What a token gets does not depend, bit for bit, on the others.
///
/// # Panics
///
/// If the sizes do not fit each other or the format has no such codes.
pub(in crate::layer) fn dots(arch: Arch, weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    assert!(weights.format().has_groups(), "{} has no integer codes", weights.format());
    assert_eq!(x.inputs, weights.inputs(), "{weights:?} with tokens of {} numbers", x.inputs);
    assert_eq!(sums.len(), x.tokens * weights.outputs(), "{weights:?} with {} tokens", x.tokens);
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) if is_x86_feature_detected!("avx512vnni") => vnni::dots(simd, weights, x, sums),
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) | Arch::V3(_) => match pulp::x86::V3::try_new() {
            Some(simd) => avx2::dots(simd, weights, x, sums),
            None => plain::dots(weights, x, sums),
        },
        _ => plain::dots(weights, x, sums),
    }
}

#[cfg(test)]
mod tests;
