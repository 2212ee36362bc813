//! A softmax in progress.

use pulp::Simd;

use crate::vector;

/// For each row the highest score so far, the sum of the weights relative to it, and their weighted sum of values.
pub(super) struct Sums<'a> {
    pub(super) highest: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    /// `[rows, width]`.
    pub(super) output: &'a mut [f32],
    /// Whether `highest` is the logarithm of the whole denominator: then the weights come out as shares of it.
    pub(super) final_mass: bool,
}

impl Sums<'_> {
    /// Turns more scores of a row into weights.
    #[inline(always)]
    pub(super) fn add<S: Simd>(&mut self, simd: S, row: usize, scores: &mut [f32]) {
        self.rise(simd, row, vector::max(simd, scores));
        self.weigh(simd, row, scores);
    }

    /// Before scores of up to `highest` are weighed: what the row has read so far fades if one of them is higher. Weights that
    /// have not been read yet do not.
    #[inline(always)]
    pub(super) fn rise<S: Simd>(&mut self, simd: S, row: usize, highest: f32) {
        let before = self.highest[row];
        if self.final_mass || highest <= before {
            return;
        }
        let fade = if before == f32::NEG_INFINITY { 0.0 } else { (before - highest).exp() };
        let width = self.output.len() / self.sum.len();
        vector::scale(simd, &mut self.output[row * width..(row + 1) * width], fade);
        self.sum[row] *= fade;
        self.highest[row] = highest;
    }

    /// Turns scores into weights relative to the highest.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&mut self, simd: S, row: usize, scores: &mut [f32]) {
        self.sum[row] += vector::exp_sum(simd, scores, self.highest[row]);
    }
}
