//! The same products with many tokens, which stand in strips.
//!
//! Codes of weights are taken out of their blocks once for all strips. A register holds four inputs of sixteen tokens; the four codes
//! of a weight meet all of them, and sums of a group are made into numbers once for sixteen tokens.

use bsbr_weights::{Format, Group, Matrix};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{GROUP, LARGEST};

/// Tokens encoded together.
const LANES: usize = 16;

/// Inputs of a token in a word.
const QUAD: usize = 4;

/// Codes of tokens are larger by this: the instruction multiplies unsigned codes with signed ones.
pub(super) const LARGER: i32 = 128;

/// Whether products of strips are made of codes on this processor.
pub(in crate::layer) fn runs(arch: Arch) -> bool {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => is_x86_feature_detected!("avx512vnni"),
        _ => false,
    }
}

/// Tokens of strips in 8 bits, each group of inputs of a token with a scale of its own.
#[derive(Debug)]
pub(in crate::layer) struct StripCodes {
    lanes: usize,
    groups: usize,
    /// `[strips, inputs / 4, lanes]`: four codes, all larger by 128, the first in the lowest byte.
    codes: Vec<u32>,
    /// `[strips, groups, lanes]`.
    scales: Vec<f32>,
    /// The sum of the numbers that the codes of a group mean, `[strips, groups, lanes]`.
    totals: Vec<f32>,
}

/// Tokens of one strip.
#[derive(Debug, Clone, Copy)]
pub(in crate::layer) struct Strip<'a> {
    pub(super) lanes: usize,
    pub(super) codes: &'a [u32],
    pub(super) scales: &'a [f32],
    pub(super) totals: &'a [f32],
}

impl StripCodes {
    /// Of strips `[strips, inputs, lanes]`. Numbers of a group that holds one that is not finite become 0.
    pub(in crate::layer) fn new(arch: Arch, strips: &[f32], inputs: usize, lanes: usize) -> Self {
        let size = (inputs * lanes).max(1);
        assert!(inputs.is_multiple_of(GROUP) && strips.len().is_multiple_of(size), "strips of {inputs} numbers");
        assert!(lanes.is_multiple_of(LANES), "strips of {lanes} tokens");
        let groups = inputs / GROUP;
        let all = strips.len() / size * groups * lanes;
        let mut made =
            Self { lanes, groups, codes: vec![0; strips.len() / QUAD], scales: vec![0.0; all], totals: vec![0.0; all] };
        let part = (groups * lanes).max(1);
        let codes = made.codes.par_chunks_mut(size / QUAD);
        let numbers = made.scales.par_chunks_mut(part).zip(made.totals.par_chunks_mut(part));
        strips.par_chunks(size).zip(codes).zip(numbers).for_each(|((strip, codes), (scales, totals))| {
            arch.dispatch(Encode { strip, lanes, codes, scales, totals });
        });
        made
    }

    pub(in crate::layer) fn strip(&self, at: usize) -> Strip<'_> {
        let (codes, groups) = (self.groups * GROUP / QUAD * self.lanes, self.groups * self.lanes);
        Strip {
            lanes: self.lanes,
            codes: &self.codes[at * codes..(at + 1) * codes],
            scales: &self.scales[at * groups..(at + 1) * groups],
            totals: &self.totals[at * groups..(at + 1) * groups],
        }
    }
}

struct Encode<'a> {
    strip: &'a [f32],
    lanes: usize,
    codes: &'a mut [u32],
    scales: &'a mut [f32],
    totals: &'a mut [f32],
}

impl WithSimd for Encode<'_> {
    type Output = ();
    // Plain loops, which the compiler makes vectors of for each level.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let lanes = self.lanes;
        let groups = self.strip.chunks_exact(GROUP * lanes).zip(self.codes.chunks_exact_mut(GROUP / QUAD * lanes));
        let scales = self.scales.chunks_exact_mut(lanes).zip(self.totals.chunks_exact_mut(lanes));
        for ((numbers, codes), (scales, totals)) in groups.zip(scales) {
            for lane in (0..lanes).step_by(LANES) {
                let (scale, total) = encode(lanes, lane, numbers, codes);
                scales[lane..lane + LANES].copy_from_slice(&scale);
                totals[lane..lane + LANES].copy_from_slice(&total);
            }
        }
    }
}

/// Codes of a group of sixteen tokens, rounded half to even; their scales, and the sums of what they mean.
#[inline(always)]
fn encode(lanes: usize, lane: usize, numbers: &[f32], codes: &mut [u32]) -> ([f32; LANES], [f32; LANES]) {
    let row = |input: usize| -> &[f32; LANES] {
        numbers[input * lanes + lane..].first_chunk().unwrap_or_else(|| unreachable!("a group of a strip"))
    };
    // What is not finite times 0 is no number, and stays that.
    let (mut largest, mut zeros) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for input in 0..GROUP {
        for (token, x) in row(input).iter().enumerate() {
            let size = x.abs();
            largest[token] = if size > largest[token] { size } else { largest[token] };
            zeros[token] += size * 0.0;
        }
    }
    let (mut scales, mut factors, mut sums) = ([0.0; LANES], [0.0; LANES], [0_i32; LANES]);
    for token in 0..LANES {
        let scale = largest[token] / LARGEST;
        // No number at all, none but zeros, or something too large: a scale that cannot be divided by.
        let usable = zeros[token] == 0.0 && scale.is_normal();
        scales[token] = if usable { scale } else { 0.0 };
        factors[token] = if usable { 1.0 / scale } else { 0.0 };
    }
    for quad in 0..GROUP / QUAD {
        let mut words = [0_u32; LANES];
        for part in 0..QUAD {
            let row = row(QUAD * quad + part);
            for token in 0..LANES {
                let x = (row[token] * factors[token]).round_ties_even();
                let x = if x.abs() <= LARGEST { x } else { 0.0 };
                let code = whole(x);
                sums[token] += code;
                words[token] |= ((code + LARGER) as u32) << (8 * part);
            }
        }
        codes[quad * lanes + lane..][..LANES].copy_from_slice(&words);
    }
    (scales, std::array::from_fn(|token| scales[token] * sums[token] as f32))
}

/// A whole number between -127 and 127 as an integer.
#[inline(always)]
fn whole(x: f32) -> i32 {
    crate::index::integer::floor(x)
}

/// Codes of some rows of weights.
#[derive(Debug)]
pub(in crate::layer) struct RowCodes {
    pub(super) inputs: usize,
    pub(super) rows: usize,
    /// Scales of a group: two where its halves have scales of their own.
    pub(super) parts: usize,
    /// `[rows, inputs]`.
    pub(super) codes: Vec<i8>,
    /// `[rows, groups, parts]`.
    pub(super) scales: Vec<f32>,
    /// What sums start from: what codes of tokens that are too large by 128 make too much, `[rows, groups, parts]`.
    pub(super) starts: Vec<i32>,
    /// Subtracted from all numbers of a group, `[rows, groups]`; empty where nothing is.
    pub(super) offsets: Vec<f32>,
}

impl RowCodes {
    /// Of a format whose codes are integers.
    pub(in crate::layer) fn new(arch: Arch, weights: Matrix<'_>) -> Self {
        let format = weights.format();
        let (rows, inputs) = (weights.outputs(), weights.inputs());
        let parts = if format == Format::Q6K { 2 } else { 1 };
        let has_offset = matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K);
        let groups = rows * inputs / GROUP;
        let mut made = Self {
            inputs,
            rows,
            parts,
            codes: vec![0; rows * inputs],
            scales: vec![0.0; groups * parts],
            starts: vec![0; groups * parts],
            offsets: vec![0.0; if has_offset { groups } else { 0 }],
        };
        match arch {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(simd) if runs(arch) => super::vnni_rows::take_out(simd, weights, &mut made),
            _ => made.take_out(weights, 0),
        }
        made
    }

    /// The groups of each row from `first` on, by the definition.
    pub(super) fn take_out(&mut self, weights: Matrix<'_>, first: usize) {
        let (format, groups, parts) = (weights.format(), self.inputs / GROUP, self.parts);
        let (bytes, of_block) = (format.block_bytes(), format.block() / GROUP);
        for row in 0..self.rows {
            for at in (row * groups..(row + 1) * groups).skip(first) {
                let group = Group::of(format, &weights.bytes()[at / of_block * bytes..][..bytes], at % of_block);
                self.codes[at * GROUP..(at + 1) * GROUP].copy_from_slice(&group.codes);
                for (part, codes) in group.codes.chunks_exact(GROUP / parts).enumerate() {
                    let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
                    self.scales[at * parts + part] = group.scales[part];
                    self.starts[at * parts + part] = -LARGER * sum;
                }
                if let Some(offset) = self.offsets.get_mut(at) {
                    *offset = group.offset;
                }
            }
        }
    }
}

/// `out[o][t] = weights_o . x_t`, `[rows, lanes]`.
///
/// # Panics
///
/// If the sizes do not fit each other.
pub(in crate::layer) fn dots(arch: Arch, weights: &RowCodes, x: Strip<'_>, out: &mut [f32]) {
    assert_eq!(x.codes.len(), weights.inputs / QUAD * x.lanes, "tokens of another number of inputs");
    assert_eq!(out.len(), weights.rows * x.lanes, "sums of {} rows with {} tokens", weights.rows, x.lanes);
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) if runs(arch) => super::vnni_strips::dots(simd, weights, x, out),
        _ => plain(weights, x, out),
    }
}

/// By the definition.
fn plain(weights: &RowCodes, x: Strip<'_>, out: &mut [f32]) {
    let (groups, parts) = (weights.inputs / GROUP, weights.parts);
    for (at, sum) in out.iter_mut().enumerate() {
        let (row, token) = (at / x.lanes, at % x.lanes);
        *sum = 0.0;
        for group in 0..groups {
            let own = row * groups + group;
            let codes = &weights.codes[own * GROUP..(own + 1) * GROUP];
            let mut product = 0.0;
            for (part, codes) in codes.chunks_exact(GROUP / parts).enumerate() {
                let first = group * GROUP + part * GROUP / parts;
                let code = |n: usize| (x.codes[(first + n) / QUAD * x.lanes + token] >> (8 * (n % QUAD))) as u8;
                let products = codes.iter().enumerate().map(|(n, &own)| i32::from(own) * i32::from(code(n)));
                let whole = products.sum::<i32>() + weights.starts[own * parts + part];
                product += weights.scales[own * parts + part] * whole as f32;
            }
            let scaled = group * x.lanes + token;
            let offset = weights.offsets.get(own).copied().unwrap_or_default();
            *sum += product * x.scales[scaled] - offset * x.totals[scaled];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{
        level::levels,
        testing::Numbers,
        weights::{
            int8::{HALF, TokenCodes},
            tests::bytes,
        },
    };

    /// `[strips, inputs, lanes]` of rows `[tokens, inputs]`.
    fn strips(x: &[f32], inputs: usize, lanes: usize) -> Vec<f32> {
        let tokens = x.len() / inputs;
        let mut out = vec![0.0; tokens.next_multiple_of(lanes) * inputs];
        for (at, x) in x.iter().enumerate() {
            let (token, input) = (at / inputs, at % inputs);
            out[(token / lanes * inputs + input) * lanes + token % lanes] = *x;
        }
        out
    }

    #[test]
    fn tokens_in_strips_have_the_codes_of_rows() {
        let mut numbers = Numbers::new(31);
        for arch in levels() {
            for lanes in [16, 32, 64] {
                let (inputs, tokens) = (96, 70);
                let mut x = numbers.normal(tokens * inputs, 0.0, 2.0);
                x[40] = 1e-30;
                x[96..128].fill(0.0);
                (x[130], x[300], x[301]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
                let found = StripCodes::new(arch, &strips(&x, inputs, lanes), inputs, lanes);
                for (token, row) in x.chunks(inputs).enumerate() {
                    let expected = TokenCodes::new(arch, row, inputs);
                    let (strip, lane) = (found.strip(token / lanes), token % lanes);
                    for group in 0..inputs / GROUP {
                        let at = expected.scale_at(0, group);
                        assert_eq!(strip.scales[group * lanes + lane], expected.scales[at]);
                        assert_eq!(strip.totals[group * lanes + lane], expected.totals[at]);
                    }
                    for input in 0..inputs {
                        let code = (strip.codes[input / QUAD * lanes + lane] >> (8 * (input % QUAD))) as u8;
                        let at = expected.half_at(0, input / GROUP, input % GROUP / HALF) + input % HALF;
                        assert_eq!(i32::from(code) - LARGER, i32::from(expected.codes[at]), "{token} {input}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_codes_in_f64_at_every_level() {
        let mut numbers = Numbers::new(32);
        for format in Format::ALL.into_iter().filter(|format| format.has_groups()) {
            for (outputs, blocks) in [(1, 1), (5, 2), (13, 3), (48, 5)] {
                let inputs = blocks * format.block();
                let bytes = bytes(&mut numbers, format, outputs, inputs);
                let matrix = Matrix::new(format, [outputs, inputs], &bytes).unwrap();
                for lanes in [16, 32, 64] {
                    let x = numbers.normal(lanes * inputs, 0.0, 1.0);
                    for arch in levels() {
                        let codes = StripCodes::new(arch, &strips(&x, inputs, lanes), inputs, lanes);
                        let rows = RowCodes::new(arch, matrix);
                        let mut found = vec![f32::NAN; outputs * lanes];
                        dots(arch, &rows, codes.strip(0), &mut found);
                        for (token, x) in x.chunks(inputs).enumerate() {
                            let row = TokenCodes::new(arch, x, inputs);
                            for output in 0..outputs {
                                let (expected, size) =
                                    super::super::tests::exact(matrix.rows(output..output + 1), &row);
                                let error = (f64::from(found[output * lanes + token]) - expected).abs();
                                assert!(error <= 16.0 * size * f64::from(f32::EPSILON), "{format} {arch:?} {error}");
                            }
                        }
                    }
                }
            }
        }
    }
}
