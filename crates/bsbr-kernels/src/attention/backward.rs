//! Gradients of attention. Scores are computed again tile by tile from the logarithms of their denominators (Dao and others
//! 2022), so that the memory is that of the gradients themselves.
//!
//! With `P` the weights, `o` the output and `g` its gradient: `dV = P^T g`, `dS = P (g V^T - g . o)`, `dQ = scale dS K`,
//! `dK = scale dS^T Q`. Means of blocks are columns like any other; their gradients are spread over their tokens at the end.
//! Which blocks a token chose is taken as given.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BlockInput, BlockOptions, CausalOptions,
    block_tile::{Head, Run, Scratch, read_tile},
    blocks::head_of,
    candidates::{Means, Retrieval},
    readers::Readers,
    tile::{QueryTile, load_queries, mask_positions, score},
};
use crate::{
    heads::{Heads, Rows},
    level, product, vector,
};

/// Rows of queries in a tile.
const ROWS: usize = 128;
/// Keys of a step of full attention.
const KEYS: usize = 512;

/// Gradients of the three inputs, each in the order of `[batch, heads, tokens, head_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// Of the queries.
    pub query: Vec<f32>,
    /// Of the keys.
    pub keys: Vec<f32>,
    /// Of the values.
    pub values: Vec<f32>,
}

/// What a forward call returned, and the gradient of its output, `[batch, heads, tokens, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// The output.
    pub output: Heads<'a>,
    /// Logarithm of the denominator of each row, `[batch, heads, tokens]`.
    pub log_mass: &'a [f32],
    /// Gradient of the output.
    pub gradient: Heads<'a>,
}

/// Gradients of [`causal_attention`](super::causal_attention) of whole texts (as many queries as keys).
///
/// # Panics
///
/// If the shapes do not fit, or if a softcap is set, which has no backward pass here.
pub fn causal_attention_backward(
    (query, keys, values): (Heads<'_>, Heads<'_>, Heads<'_>),
    forward: &Forward<'_>,
    options: &CausalOptions,
) -> Gradients {
    let input = BlockInput {
        query,
        keys,
        values,
        first: 0,
        sinks: None,
        means: None,
        chunk_means: None,
        radii: None,
        chunk_radii: None,
        near: None,
    };
    backward(&input, forward, None, options)
}

/// Gradients of [`block_attention`](super::block_attention) of whole texts.
///
/// # Panics
///
/// As [`causal_attention_backward`].
pub fn block_attention_backward(
    input: &BlockInput<'_>,
    forward: &Forward<'_>,
    settings: &BlockOptions,
    options: &CausalOptions,
) -> Gradients {
    backward(input, forward, Some(settings), options)
}

fn backward(
    input: &BlockInput<'_>,
    forward: &Forward<'_>,
    settings: Option<&BlockOptions>,
    options: &CausalOptions,
) -> Gradients {
    let [batch, heads, tokens, width] = input.query.dims();
    let [_, kv_heads, length, _] = input.keys.dims();
    assert_eq!(tokens, length, "gradients are of whole texts");
    assert!(input.near.is_none(), "queries and keys of their own for the local region have no backward pass here");
    assert_eq!(forward.gradient.dims(), input.query.dims());
    assert!(options.softcap.is_none(), "a softcap has no backward pass here");
    let group = heads / kv_heads;
    let mut gradients = Gradients {
        query: vec![0.0; batch * heads * tokens * width],
        keys: vec![0.0; batch * kv_heads * tokens * width],
        values: vec![0.0; batch * kv_heads * tokens * width],
    };
    if gradients.query.is_empty() {
        return gradients;
    }
    let rows = tokens * width;
    let per_pair = gradients.query.par_chunks_mut(group * rows).zip(gradients.keys.par_chunks_mut(rows));
    per_pair.zip(gradients.values.par_chunks_mut(rows)).enumerate().for_each(|(pair, ((query, keys), values))| {
        let pair = Pair { input, forward, settings, options, batch: pair / kv_heads, kv_head: pair % kv_heads };
        level::arch().dispatch(PairBackward { pair, query, keys, values });
    });
    gradients
}

/// One KV head with the query heads that read it.
struct Pair<'a> {
    input: &'a BlockInput<'a>,
    forward: &'a Forward<'a>,
    settings: Option<&'a BlockOptions>,
    options: &'a CausalOptions,
    batch: usize,
    kv_head: usize,
}

struct PairBackward<'a> {
    pair: Pair<'a>,
    /// `[group, tokens, width]`.
    query: &'a mut [f32],
    /// `[tokens, width]`.
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

/// Gradients of some rows of keys and of values.
struct RowGradients {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl RowGradients {
    fn of(rows: Option<(Rows<'_>, Rows<'_>)>) -> Self {
        let count = rows.map_or(0, |(keys, _)| keys.len() * keys.width());
        Self { keys: vec![0.0; count], values: vec![0.0; count] }
    }
}

/// What is the same for every part that a tile reads.
struct TileGradient<'a> {
    tile: &'a QueryTile<'a>,
    /// Gradient of the output, `[rows, width]`.
    gradient: &'a [f32],
    /// `g . o` of each row.
    delta: &'a [f32],
    /// Gradient of the scaled queries, `[rows, width]`.
    query: &'a mut [f32],
    scratch: &'a mut Vec<f32>,
}

impl WithSimd for PairBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { pair, query, keys, values } = self;
        let Pair { input, forward, settings, options, batch, kv_head } = pair;
        let [_, heads, tokens, width] = input.query.dims();
        let group = heads / input.keys.dims()[1];
        let group_heads = kv_head * group..(kv_head + 1) * group;
        let head = Head {
            keys: input.keys.head(batch, kv_head),
            values: input.values.head(batch, kv_head),
            first: 0,
            sinks: None,
            means: input.means.map(|blocks| Means {
                blocks: head_of(blocks, batch, kv_head),
                chunks: input.chunk_means.map(|chunks| head_of(chunks, batch, kv_head)),
            }),
            radii: input.radii.map(|radii| radii.head(batch, kv_head)),
            chunk_radii: input.chunk_radii.map(|radii| radii.head(batch, kv_head)),
            near: None,
        };
        let mut of_blocks = RowGradients::of(head.means.map(|means| means.blocks));
        let mut of_chunks = RowGradients::of(head.means.and_then(|means| means.chunks));
        let (mut scratch, mut queries, mut gradient, mut outputs) = (Scratch::default(), vec![], vec![], vec![]);
        let (mut tile_query, mut buffer) = (vec![], vec![]);
        let chunk = settings.map_or(usize::MAX, |settings| settings.chunk_size);
        let mut from = 0;
        while from < tokens {
            let to = (from + (ROWS / group).max(1)).min(tokens).min((from / chunk + 1).saturating_mul(chunk));
            load_queries(&input.query, batch, group_heads.clone(), from..to, options.scale, &mut queries);
            load_queries(&forward.gradient, batch, group_heads.clone(), from..to, 1.0, &mut gradient);
            load_queries(&forward.output, batch, group_heads.clone(), from..to, 1.0, &mut outputs);
            let slopes = options.slopes.as_ref().map(|slopes| &slopes[group_heads.clone()]);
            let tile = QueryTile { rows: &queries, group, tokens: to - from, start: from, slopes };
            let pairs = gradient.chunks_exact(width).zip(outputs.chunks_exact(width));
            let delta: Vec<f32> = pairs.map(|(g, o)| g.iter().zip(o).map(|(g, o)| g * o).sum()).collect();
            let log_mass: Vec<f32> = (group_heads.clone())
                .flat_map(|h| &forward.log_mass[(batch * heads + h) * tokens..][from..to])
                .copied()
                .collect();
            tile_query.clear();
            tile_query.resize(tile.count() * width, 0.0);
            let mut of_tile = TileGradient {
                tile: &tile,
                gradient: &gradient,
                delta: &delta,
                query: &mut tile_query,
                scratch: &mut buffer,
            };
            match settings {
                None => of_tile.all_keys(simd, &head, options, &log_mass, &mut scratch, (&mut *keys, &mut *values)),
                Some(settings) => {
                    let (runs, retrieval) =
                        read_tile(simd, &tile, &head, settings, options, &mut scratch, Some(&log_mass));
                    of_tile.runs(simd, &runs, &scratch.exact, (&mut *keys, &mut *values));
                    if let (Some(retrieval), Some(means)) = (retrieval, &head.means) {
                        of_tile.means(simd, &retrieval, means, &mut scratch, (&mut of_blocks, &mut of_chunks));
                        of_tile.chosen(simd, &retrieval, &head, &mut scratch, (&mut *keys, &mut *values));
                    }
                }
            }
            for (g, rows) in query.chunks_exact_mut(tokens * width).enumerate() {
                let tile_rows = &tile_query[g * tile.tokens * width..(g + 1) * tile.tokens * width];
                for (out, gradient) in rows[from * width..to * width].iter_mut().zip(tile_rows) {
                    *out = gradient * options.scale;
                }
            }
            from = to;
        }
        if let Some(settings) = settings {
            let sinks = settings.sink_tokens;
            let size = settings.blocks.as_ref().map_or(1, |blocks| blocks.size);
            for (gradients, size) in [(&of_blocks, size), (&of_chunks, settings.chunk_size)] {
                spread(&gradients.keys, size, sinks, width, keys);
                spread(&gradients.values, size, sinks, width, values);
            }
        }
    }
}

/// The gradient of a mean goes to its rows in equal parts.
fn spread(means: &[f32], size: usize, sinks: usize, width: usize, rows: &mut [f32]) {
    for (index, mean) in means.chunks_exact(width).enumerate() {
        let positions = (index * size).max(sinks)..(index + 1) * size;
        let share = 1.0 / positions.len() as f32;
        for position in positions {
            for (row, mean) in rows[position * width..(position + 1) * width].iter_mut().zip(mean) {
                *row += mean * share;
            }
        }
    }
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
        product::add_weighted(scores, columns, rows, keys, self.query);
        let query = Rows::contiguous(self.tile.rows, rows, width);
        product::add_weighted_transposed(scores, columns, columns, query, of_keys);
    }

    /// Full attention.
    #[inline(always)]
    fn all_keys<S: Simd>(
        &mut self,
        simd: S,
        head: &Head<'_>,
        options: &CausalOptions,
        log_mass: &[f32],
        scratch: &mut Scratch,
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let (rows, width, end) = (self.tile.count(), head.keys.width(), self.tile.start + self.tile.tokens);
        let mut from = options.first_visible(self.tile.start);
        while from < end {
            let to = (from + KEYS).min(end);
            let columns = to - from;
            let weights = &mut scratch.exact;
            weights.resize(rows * columns, 0.0);
            score(simd, self.tile, head.keys.range(from..to), weights, columns, 0, None);
            mask_positions(self.tile, options, from..to, weights, columns, 0);
            for (row, weights) in weights.chunks_exact_mut(columns).take(rows).enumerate() {
                vector::exp_sum(simd, weights, log_mass[row]);
            }
            let rows = (head.keys.range(from..to), head.values.range(from..to));
            let gradients = (&mut of_keys[from * width..to * width], &mut of_values[from * width..to * width]);
            self.columns(simd, rows, (weights, columns, 0), gradients);
            from = to;
        }
    }

    /// Sinks and the local region.
    #[inline(always)]
    fn runs<S: Simd>(
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
            self.columns(simd, (run.keys, run.values), (weights, stride, column), gradients);
            column += run.positions.len();
        }
    }

    /// Blocks and chunks that count by their means.
    #[inline(always)]
    fn means<S: Simd>(
        &mut self,
        simd: S,
        retrieval: &Retrieval<'_>,
        means: &Means<'_>,
        scratch: &mut Scratch,
        (of_blocks, of_chunks): (&mut RowGradients, &mut RowGradients),
    ) {
        if !retrieval.blocks.far {
            return;
        }
        let candidates = &scratch.candidates;
        let (fine, distant) = (retrieval.candidates.fine.clone(), retrieval.candidates.distant.clone());
        let width = means.blocks.0.width();
        let stride = candidates.blocks.len() / self.tile.count();
        let rows = (means.blocks.0.range(fine.clone()), means.blocks.1.range(fine.clone()));
        let numbers = fine.start * width..fine.end * width;
        let gradients = (&mut of_blocks.keys[numbers.clone()], &mut of_blocks.values[numbers]);
        self.columns(simd, rows, (&candidates.blocks, stride, 0), gradients);
        if let (Some((keys, values)), false) = (means.chunks, distant.is_empty()) {
            let numbers = distant.start * width..distant.end * width;
            let gradients = (&mut of_chunks.keys[numbers.clone()], &mut of_chunks.values[numbers]);
            let rows = (keys.range(distant.clone()), values.range(distant.clone()));
            self.columns(simd, rows, (&candidates.distant, distant.len(), 0), gradients);
            let per_chunk = retrieval.per_chunk();
            for token in 0..self.tile.tokens {
                for (slot, &chunk) in candidates.opened.of(token).iter().enumerate() {
                    let first = (distant.start + chunk as usize) * per_chunk;
                    for g in 0..self.tile.group {
                        let row = g * self.tile.tokens + token;
                        let weights = &candidates.blocks[row * stride + fine.len() + slot * per_chunk..][..per_chunk];
                        let gradients = (&mut of_blocks.keys[..], &mut of_blocks.values[..]);
                        self.one_row(simd, row, means.blocks, first, weights, gradients);
                    }
                }
            }
        }
    }

    /// The blocks each token chose.
    #[inline(always)]
    fn chosen<S: Simd>(
        &mut self,
        simd: S,
        retrieval: &Retrieval<'_>,
        head: &Head<'_>,
        scratch: &mut Scratch,
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let size = retrieval.blocks.size;
        let chosen: &Readers = &scratch.candidates.chosen;
        for token in 0..self.tile.tokens {
            let places = chosen.places(token);
            for g in 0..self.tile.group {
                let row = g * self.tile.tokens + token;
                let start = (places.start * self.tile.group + g * places.len()) * size;
                for (at, &block) in chosen.of(token).iter().enumerate() {
                    let weights = &scratch.chosen_scores[start + at * size..][..size];
                    let (first, rows) = (block as usize * size, (head.keys, head.values));
                    self.one_row(simd, row, rows, first, weights, (&mut *of_keys, &mut *of_values));
                }
            }
        }
    }

    /// One query and the rows from `first` on that it alone reads with `weights`.
    #[inline(always)]
    fn one_row<S: Simd>(
        &mut self,
        simd: S,
        row: usize,
        (keys, values): (Rows<'_>, Rows<'_>),
        first: usize,
        weights: &[f32],
        (of_keys, of_values): (&mut [f32], &mut [f32]),
    ) {
        let width = keys.width();
        let own = row * width..(row + 1) * width;
        let gradient = &self.gradient[own.clone()];
        for (at, &weight) in weights.iter().enumerate() {
            let index = first + at;
            let numbers = index * width..(index + 1) * width;
            let score = weight * (vector::dot(simd, gradient, values.row(index)) - self.delta[row]);
            vector::add(simd, weight, gradient, &mut of_values[numbers.clone()]);
            vector::add(simd, score, keys.row(index), &mut self.query[own.clone()]);
            vector::add(simd, score, &self.tile.rows[own.clone()], &mut of_keys[numbers]);
        }
    }
}
