//! Products of many tokens in pairs of numbers that are rounded to 16 bits: twice as many products to an instruction as in f32.
//!
//! Numbers of tokens, and of weights that are no bf16 themselves, lose all but 8 bits of their mantissa. Sums are f32.

#[cfg(target_arch = "x86_64")]
mod avx512;

use bsbr_weights::{Format, Matrix};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::widen;
use crate::layer::scratch::Scratch;

/// Whether this processor multiplies pairs.
pub(in crate::layer) fn runs(arch: Arch) -> bool {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => is_x86_feature_detected!("avx512bf16"),
        _ => false,
    }
}

/// Tokens of strips in pairs of inputs.
#[derive(Debug)]
pub(in crate::layer) struct StripPairs {
    lanes: usize,
    /// Pairs of inputs; behind an odd number a zero.
    count: usize,
    /// `[strips, pairs, lanes]`: the first of a pair in the lower half.
    pairs: Vec<u32>,
}

/// Tokens of one strip.
#[derive(Debug, Clone, Copy)]
pub(in crate::layer) struct Strip<'a> {
    lanes: usize,
    pairs: &'a [u32],
}

impl StripPairs {
    /// Of strips `[strips, inputs, lanes]`.
    pub(in crate::layer) fn new(arch: Arch, strips: &[f32], inputs: usize, lanes: usize) -> Self {
        let size = (inputs * lanes).max(1);
        let count = inputs.div_ceil(2);
        let mut pairs = vec![0; strips.len() / size * count * lanes];
        let each = pairs.par_chunks_mut((count * lanes).max(1));
        strips.par_chunks(size).zip(each).for_each(|(strip, pairs)| arch.dispatch(Pair { strip, lanes, pairs }));
        Self { lanes, count, pairs }
    }

    pub(in crate::layer) fn strip(&self, at: usize) -> Strip<'_> {
        let size = self.count * self.lanes;
        Strip { lanes: self.lanes, pairs: &self.pairs[at * size..(at + 1) * size] }
    }
}

struct Pair<'a> {
    strip: &'a [f32],
    lanes: usize,
    pairs: &'a mut [u32],
}

impl WithSimd for Pair<'_> {
    type Output = ();
    // Plain loops, which the compiler makes vectors of for each level.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (two, pairs) in self.strip.chunks(2 * self.lanes).zip(self.pairs.chunks_exact_mut(self.lanes)) {
            let (first, second) = two.split_at(self.lanes);
            for (pair, &first) in pairs.iter_mut().zip(first) {
                *pair = rounded(first);
            }
            for (pair, &second) in pairs.iter_mut().zip(second) {
                *pair |= rounded(second) << 16;
            }
        }
    }
}

/// The upper 16 bits of a number, rounded half to even.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // What is no number stays none.
    if x.is_nan() { bits >> 16 | 0x40 } else { up }
}

/// Some rows of weights in pairs of inputs.
#[derive(Debug)]
pub(in crate::layer) struct RowPairs {
    rows: usize,
    count: usize,
    /// `[rows, pairs]`.
    pairs: Vec<u32>,
}

impl RowPairs {
    pub(in crate::layer) fn new(arch: Arch, weights: Matrix<'_>) -> Self {
        let (rows, inputs) = (weights.outputs(), weights.inputs());
        let count = inputs.div_ceil(2);
        let mut pairs = vec![0; rows * count];
        if weights.format() == Format::Bf16 && inputs.is_multiple_of(2) {
            // As they are: the first of a pair lies before the second.
            for (pair, bytes) in pairs.iter_mut().zip(weights.bytes().as_chunks().0) {
                *pair = u32::from_le_bytes(*bytes);
            }
        } else {
            let mut wide = Scratch::new(rows * inputs);
            widen(arch, weights, &mut wide);
            arch.dispatch(PairRows { wide: &wide, inputs, pairs: &mut pairs });
        }
        Self { rows, count, pairs }
    }
}

struct PairRows<'a> {
    wide: &'a [f32],
    inputs: usize,
    pairs: &'a mut [u32],
}

impl WithSimd for PairRows<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let count = self.inputs.div_ceil(2).max(1);
        for (row, pairs) in self.wide.chunks_exact(self.inputs.max(1)).zip(self.pairs.chunks_exact_mut(count)) {
            let (whole, last) = row.as_chunks::<2>();
            for (pair, &[first, second]) in pairs.iter_mut().zip(whole) {
                *pair = rounded(first) | rounded(second) << 16;
            }
            if let (&[x], Some(pair)) = (last, pairs.last_mut()) {
                *pair = rounded(x);
            }
        }
    }
}

/// `out[o][t] = weights_o . x_t`, `[rows, lanes]`.
///
/// # Panics
///
/// If the sizes do not fit each other.
pub(in crate::layer) fn dots(arch: Arch, weights: &RowPairs, x: Strip<'_>, out: &mut [f32]) {
    assert_eq!(x.pairs.len(), weights.count * x.lanes, "tokens of another number of inputs");
    assert_eq!(out.len(), weights.rows * x.lanes, "sums of {} rows with {} tokens", weights.rows, x.lanes);
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) if runs(arch) => avx512::dots(simd, weights, x, out),
        _ => plain(weights, x, out),
    }
}

/// By the definition.
fn plain(weights: &RowPairs, x: Strip<'_>, out: &mut [f32]) {
    let halves = |pair: u32| [pair << 16, pair & 0xffff_0000].map(f32::from_bits);
    for (at, sum) in out.iter_mut().enumerate() {
        let (row, token) = (at / x.lanes, at % x.lanes);
        let own = &weights.pairs[row * weights.count..(row + 1) * weights.count];
        let products = own.iter().enumerate().map(|(at, &pair)| {
            let (own, x) = (halves(pair), halves(x.pairs[at * x.lanes + token]));
            own[0] * x[0] + own[1] * x[1]
        });
        *sum = products.sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{level::levels, testing::Numbers, weights::tests::bytes};

    #[test]
    fn numbers_are_rounded_half_to_even() {
        for (x, expected) in [
            (1.0_f32, 0x3f80),
            (f32::from_bits(0x3f80_8000), 0x3f80),
            (f32::from_bits(0x3f81_8000), 0x3f82),
            (f32::from_bits(0x3f80_8001), 0x3f81),
            (f32::MAX, 0x7f80),
            (-0.0, 0x8000),
            (f32::NEG_INFINITY, 0xff80),
        ] {
            assert_eq!(rounded(x), expected, "{x}");
            assert_eq!(rounded(x), u32::from(half::bf16::from_f32(x).to_bits()));
        }
        let least = f32::from_bits(0x7f80_0001);
        assert!(f32::from_bits(rounded(least) << 16).is_nan());
    }

    #[test]
    fn products_are_those_of_the_rounded_numbers_in_f64_at_every_level() {
        let mut numbers = Numbers::new(41);
        for format in Format::ALL {
            for (outputs, inputs) in [(1, 1), (5, 31), (7, 32), (13, 66), (48, 101)] {
                let (outputs, inputs) = (outputs, inputs * if format.block() == 1 { 1 } else { format.block() });
                if inputs > 13_000 {
                    continue;
                }
                let bytes = bytes(&mut numbers, format, outputs, inputs);
                let matrix = Matrix::new(format, [outputs, inputs], &bytes).unwrap();
                let mut wide = vec![0.0; outputs * inputs];
                matrix.widen(0..outputs, &mut wide);
                for lanes in [16, 32, 64] {
                    let x = numbers.normal(inputs * lanes, 0.0, 1.0);
                    for arch in levels() {
                        let mut found = vec![f32::NAN; outputs * lanes];
                        let pairs = StripPairs::new(arch, &x, inputs, lanes);
                        dots(arch, &RowPairs::new(arch, matrix), pairs.strip(0), &mut found);
                        for (at, &found) in found.iter().enumerate() {
                            let (row, token) = (at / lanes, at % lanes);
                            let short = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
                            let products = (0..inputs)
                                .map(|input| short(wide[row * inputs + input]) * short(x[input * lanes + token]));
                            let size: f64 = products.clone().map(f64::abs).sum();
                            let error = (f64::from(found) - products.sum::<f64>()).abs();
                            let bound = size * (inputs + 2) as f64 * f64::from(f32::EPSILON);
                            assert!(error <= bound, "{format} {outputs} x {inputs} {arch:?}: {error}");
                        }
                    }
                }
            }
        }
    }
}
