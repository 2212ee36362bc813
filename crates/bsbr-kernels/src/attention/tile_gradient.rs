//! Gradients of everything one tile of queries reads.
//!
//! With a softcap `c`, a score is `c tanh(x / c)` of a raw one, and the gradient of that is `1 - tanh(x / c)^2` of the score's:
//! raw scores are computed again.

use pulp::Simd;

use super::{
    CausalOptions,
    block_tile::{Head, Run, Scratch},
    chosen::ChosenKeys,
    tile::{QueryTile, mask_positions, score},
};
use crate::{heads::Rows, product, vector};

/// Keys of a step of full attention.
const KEYS: usize = 512;

/// What is the same for every part that a tile reads.
pub(super) struct TileGradient<'a> {
    pub(super) tile: &'a QueryTile<'a>,
    /// Gradient of the output, `[rows, width]`.
    pub(super) gradient: &'a [f32],
    /// `g . o` of each row.
    pub(super) delta: &'a [f32],
    /// Gradient of the scaled queries, `[rows, width]`.
    pub(super) query: &'a mut [f32],
    pub(super) softcap: Option<f32>,
    pub(super) scratch: &'a mut Vec<f32>,
    /// Scores before the softcap.
    pub(super) raw: &'a mut Vec<f32>,
}

impl TileGradient<'_> {
    /// A run of keys whose weights begin at `column` of rows that are `stride` apart.
    #[inline(always)]
    fn columns<S: Simd>(
        &mut self,
        simd: S,
        (keys, values): (Rows<'_>, Rows<'_>),
        (weights, stride, column): (&[f32], usize, usize),
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let (rows, columns, width) = (self.tile.count(), keys.len(), keys.width());
        if columns == 0 {
            return;
        }
        let gradient = Rows::contiguous(self.gradient, rows, width);
        product::add_weighted_transposed(&weights[column..], stride, columns, gradient, of_values);
        self.scratch.resize(rows * columns, 0.0);
        let scores = &mut self.scratch[..rows * columns];
        product::scores(self.gradient, rows, values, scores, columns);
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            let weights = &weights[row * stride + column..][..columns];
            vector::score_gradient(simd, weights, self.delta[row], scores);
        }
        if let Some(cap) = self.softcap {
            self.raw.resize(rows * columns, 0.0);
            let raw = &mut self.raw[..rows * columns];
            product::scores(self.tile.rows, rows, keys, raw, columns);
            vector::softcap_gradient(simd, raw, cap, scores);
        }
        product::add_weighted(scores, columns, rows, keys, self.query);
        let query = Rows::contiguous(self.tile.rows, rows, width);
        product::add_weighted_transposed(scores, columns, columns, query, of_keys);
    }

    /// Full attention.
    #[inline(always)]
    pub(super) fn all_keys<S: Simd>(
        &mut self,
        simd: S,
        head: &Head<'_>,
        options: &CausalOptions,
        log_mass: &[f32],
        scratch: &mut Scratch,
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let (keys, values) = (head.keys.whole(), head.values.whole());
        let (rows, width, end) = (self.tile.count(), keys.width(), self.tile.start + self.tile.tokens);
        let mut from = options.first_visible(self.tile.start);
        while from < end {
            let to = (from + KEYS).min(end);
            let columns = to - from;
            let weights = &mut scratch.exact;
            weights.resize(rows * columns, 0.0);
            let step = head.keys.range(from..to);
            score(simd, self.tile, (step, &mut Vec::new()), weights, columns, 0, options.softcap);
            mask_positions(self.tile, options, from..to, weights, columns, 0);
            for (row, weights) in weights.chunks_exact_mut(columns).take(rows).enumerate() {
                vector::exp_sum(simd, weights, log_mass[row]);
            }
            let rows = (keys.range(from..to), values.range(from..to));
            let gradients = (&mut of_keys[from * width..to * width], &mut of_values[from * width..to * width]);
            self.columns(simd, rows, (weights, columns, 0), gradients);
            from = to;
        }
    }

    /// Sinks and the local region.
    #[inline(always)]
    pub(super) fn runs<S: Simd>(
        &mut self,
        simd: S,
        runs: &[Run<'_>],
        weights: &[f32],
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let stride: usize = runs.iter().map(|run| run.positions.len()).sum();
        let mut column = 0;
        for run in runs {
            let width = run.keys.width();
            let numbers = run.positions.start * width..run.positions.end * width;
            let gradients = (&mut of_keys[numbers.clone()], &mut of_values[numbers]);
            self.columns(simd, (run.keys.whole(), run.values.whole()), (weights, stride, column), gradients);
            column += run.positions.len();
        }
    }

    /// The keys each token chose.
    #[inline(always)]
    pub(super) fn chosen<S: Simd>(
        &mut self,
        simd: S,
        head: &Head<'_>,
        chosen: &ChosenKeys,
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let (keys, values) = (head.keys.whole(), head.values.whole());
        for token in 0..self.tile.tokens {
            for g in 0..self.tile.group {
                let row = g * self.tile.tokens + token;
                for (&position, &weight) in chosen.of(token).iter().zip(chosen.weights(token, g)) {
                    self.one_key(
                        simd,
                        row,
                        (keys, values),
                        position as usize,
                        weight,
                        (&mut *of_keys, &mut *of_values),
                    );
                }
            }
        }
    }

    /// One query and a key that it alone reads with `weight`.
    #[inline(always)]
    fn one_key<S: Simd>(
        &mut self,
        simd: S,
        row: usize,
        (keys, values): (Rows<'_>, Rows<'_>),
        index: usize,
        weight: f32,
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let width = keys.width();
        let own = row * width..(row + 1) * width;
        let gradient = &self.gradient[own.clone()];
        let numbers = index * width..(index + 1) * width;
        let mut score = weight * (vector::dot(simd, gradient, values.row(index)) - self.delta[row]);
        if let Some(cap) = self.softcap {
            let raw = vector::dot(simd, &self.tile.rows[own.clone()], keys.row(index));
            score *= 1.0 - (raw / cap).tanh().powi(2);
        }
        vector::add(simd, weight, gradient, &mut of_values[numbers.clone()]);
        vector::add(simd, score, keys.row(index), &mut self.query[own.clone()]);
        vector::add(simd, score, &self.tile.rows[own], &mut of_keys[numbers]);
    }
}
