//! What every kind of attention does with a tile of queries: rows of scores, masked and capped, and what is read of them.

use std::ops::Range;

use pulp::Simd;

use super::CausalOptions;
use crate::{
    gather::{self, Gathered},
    heads::Heads,
    product,
    stored::StoredRows,
    vector,
};

/// Below this a score counts as hidden; [`HIDDEN`] is what hides one.
pub(crate) const LOWEST_SCORE: f32 = -1e29;
/// Score of what a token may not see. Its exponential is exactly 0.
pub(crate) const HIDDEN: f32 = -1e30;

/// Queries below which a product with keys is faster as dot products than by packing the keys for a matrix product.
const FEW_QUERIES: usize = 8;

/// Keys or values that few queries read together: they stay in the nearest cache while one query after the other passes.
const STEP: usize = 64;

/// The rows of a step, one after the other.
const IN_ORDER: [u32; STEP] = {
    let mut order = [0; STEP];
    let mut at = 0;
    while at < STEP {
        order[at] = at as u32;
        at += 1;
    }
    order
};

/// Queries of the heads that share a KV head: row `g * tokens + t` belongs to the head `g` of the group.
#[derive(Clone, Copy)]
pub(crate) struct QueryTile<'a> {
    /// Scaled queries, `[group * tokens, head_dim]`.
    pub(crate) rows: &'a [f32],
    pub(crate) group: usize,
    pub(crate) tokens: usize,
    /// Position of the first query.
    pub(crate) start: usize,
    /// ALiBi slope of each head of the group.
    pub(crate) slopes: Option<&'a [f32]>,
    /// Score of each head of the group that stands beside those of the keys.
    pub(crate) sink_logits: Option<&'a [f32]>,
}

impl QueryTile<'_> {
    pub(crate) fn count(&self) -> usize {
        self.group * self.tokens
    }

    /// Position of the query in row `row`.
    #[inline(always)]
    pub(crate) fn position(&self, row: usize) -> usize {
        self.start + row % self.tokens
    }

    /// The beginning of the softmax of each row: its highest score and the sum of the weights relative to that. A sink is the first
    /// column, of which nothing is read.
    pub(crate) fn begin(&self, highest: &mut Vec<f32>, sum: &mut Vec<f32>) {
        highest.clear();
        sum.clear();
        match self.sink_logits {
            Some(sinks) => {
                sinks.iter().for_each(|&sink| highest.resize(highest.len() + self.tokens, sink));
                sum.resize(self.count(), 1.0);
            }
            None => {
                highest.resize(self.count(), f32::NEG_INFINITY);
                sum.resize(self.count(), 0.0);
            }
        }
    }

    /// The same where the logarithm of the whole denominator of each row is known: weights are shares of it.
    pub(crate) fn begin_again(&self, log_mass: &[f32], highest: &mut Vec<f32>, sum: &mut Vec<f32>) {
        highest.clear();
        highest.extend_from_slice(log_mass);
        sum.clear();
        match self.sink_logits {
            Some(sinks) => {
                let rows = log_mass.iter().enumerate();
                sum.extend(rows.map(|(row, mass)| (sinks[row / self.tokens] - mass).exp()));
            }
            None => sum.resize(self.count(), 0.0),
        }
    }
}

/// Copies the queries at `tokens` of the heads of one group, scaled.
pub(crate) fn load_queries(
    query: &Heads<'_>,
    batch: usize,
    heads: Range<usize>,
    tokens: Range<usize>,
    scale: f32,
    rows: &mut Vec<f32>,
) {
    rows.clear();
    for head in heads {
        let head = query.head(batch, head);
        for token in tokens.clone() {
            rows.extend(head.row(token).iter().map(|value| value * scale));
        }
    }
}

/// Scores of a tile against `keys`, into columns of `scores` that begin at `column`; rows of scores are `stride` apart. Keys that
/// are stored in fewer bytes are widened in `room`.
#[inline(always)]
pub(crate) fn score<S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    (keys, room): (StoredRows<'_>, &mut Vec<f32>),
    scores: &mut [f32],
    stride: usize,
    column: usize,
    softcap: Option<f32>,
) {
    let (count, width, columns) = (tile.count(), keys.width(), keys.len());
    if columns == 0 {
        return;
    }
    if count < FEW_QUERIES {
        for from in (0..columns).step_by(STEP) {
            let to = columns.min(from + STEP);
            let keys = Gathered::new(keys.range(from..to).widened(simd, room), &IN_ORDER[..to - from]);
            for row in 0..count {
                let query = &tile.rows[row * width..(row + 1) * width];
                let at = row * stride + column;
                gather::dots(simd, query, keys, &mut scores[at + from..at + to]);
            }
        }
    } else {
        product::scores(tile.rows, count, keys.widened(simd, room), &mut scores[column..], stride);
    }
    if let Some(cap) = softcap {
        for row in 0..count {
            vector::softcap(simd, &mut scores[row * stride + column..][..columns], cap);
        }
    }
}

/// Hides what a token may not see of the keys at `positions` (in the columns from `column` on) and adds ALiBi.
pub(crate) fn mask_positions(
    tile: &QueryTile<'_>,
    options: &CausalOptions,
    positions: Range<usize>,
    scores: &mut [f32],
    stride: usize,
    column: usize,
) {
    for row in 0..tile.count() {
        let token = tile.position(row);
        let scores = &mut scores[row * stride + column..][..positions.len()];
        if let Some(slopes) = tile.slopes {
            let slope = slopes[row / tile.tokens];
            for (score, position) in scores.iter_mut().zip(positions.clone()) {
                *score -= slope * (token - position.min(token)) as f32;
            }
        }
        let first = options.first_visible(token).clamp(positions.start, positions.end) - positions.start;
        let end = (token + 1).clamp(positions.start, positions.end) - positions.start;
        scores[..first].fill(HIDDEN);
        scores[end.max(first)..].fill(HIDDEN);
    }
}

/// `output += weights values` for all rows of a tile; the weights begin at `column`. Values that are stored in fewer bytes are
/// widened in `room`.
#[inline(always)]
pub(crate) fn read<S: Simd>(
    simd: S,
    weights: &[f32],
    stride: usize,
    column: usize,
    rows: usize,
    (values, room): (StoredRows<'_>, &mut Vec<f32>),
    output: &mut [f32],
) {
    let (width, columns) = (values.width(), values.len());
    if columns == 0 {
        return;
    }
    if rows < FEW_QUERIES {
        for from in (0..columns).step_by(STEP) {
            let to = columns.min(from + STEP);
            let values = Gathered::new(values.range(from..to).widened(simd, room), &IN_ORDER[..to - from]);
            for row in 0..rows {
                let at = row * stride + column;
                gather::add(simd, &weights[at + from..at + to], values, &mut output[row * width..(row + 1) * width]);
            }
        }
    } else {
        product::add_weighted(&weights[column..], stride, rows, values.widened(simd, room), output);
    }
}
