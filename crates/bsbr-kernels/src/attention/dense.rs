//! Attention of every token over all keys it may see.

use std::{mem, ops::Range};

use pulp::{Simd, WithSimd};

use super::{
    CausalOptions,
    tile::{LOWEST_SCORE, QueryTile, load_queries, mask_positions, read, score},
};
use crate::{
    heads::Heads,
    level,
    stored::{Stored, StoredRows},
    team::share_with,
    vector,
};

/// Rows of queries in a tile: enough for the matrix product to run at its full rate.
const ROWS: usize = 128;
/// Keys of a step: the scores of a tile stay in the cache.
const KEYS: usize = 512;
/// Keys of a part, where queries are so few that threads share the keys.
const PART: usize = 256;

/// Full causal attention.
///
/// `query` is `[batch, heads, tokens, head_dim]`, `keys` and `values` `[batch, kv_heads, length, head_dim]`: the queries are
/// the last `tokens` of `length` positions; query head `h` reads the KV head `h / (heads / kv_heads)`. Returns
/// `[batch, heads, tokens, head_dim]`, and for each row the logarithm of the softmax's denominator,
/// `[batch, heads, tokens]`.
///
/// One pass over the keys with a running maximum (Milakov, Gimelshein 2018); tiles above the diagonal or behind the window
/// are not computed. Scores exist for one tile at a time.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn causal_attention<'a>(
    query: Heads<'_>,
    keys: impl Into<Stored<'a>>,
    values: impl Into<Stored<'a>>,
    options: &CausalOptions,
) -> (Vec<f32>, Vec<f32>) {
    let (keys, values) = (keys.into(), values.into());
    let [batch, heads, tokens, width] = query.dims();
    let [_, kv_heads, length, _] = keys.dims();
    assert_eq!(keys.dims(), [batch, kv_heads, length, width]);
    assert_eq!(values.dims(), keys.dims());
    assert!(heads.is_multiple_of(kv_heads) && tokens <= length);
    let group = heads / kv_heads;
    let mut output = vec![0.0; batch * heads * tokens * width];
    let mut log_mass = vec![0.0; batch * heads * tokens];
    let call = Call { query, keys, values, options, group, start: length - tokens };
    if group * tokens <= ROWS {
        call.share_keys(&mut output, &mut log_mass);
        return (output, log_mass);
    }
    let tile = (ROWS / group).max(1);
    let mut tasks = super::tasks::split(&mut output, &mut log_mass, group, tokens, width, |from| from + tile);
    // The longest first, so that no thread is left with one at the end.
    tasks.reverse();
    share_with(tasks, Scratch::default, |scratch, mut task| {
        let (first, end) = (call.start + task.tokens.start, call.start + task.tokens.end);
        call.read(task.pair, task.tokens.clone(), options.first_visible(first)..end, scratch);
        let count = task.tokens.len();
        let Sums { output: read, highest, sum } = &scratch.sums;
        for (g, (output, log_mass)) in task.outputs.iter_mut().enumerate() {
            let rows = g * count..(g + 1) * count;
            let read = &read[rows.start * width..rows.end * width];
            let outputs = output.chunks_exact_mut(width).zip(read.chunks_exact(width)).zip(log_mass.iter_mut());
            for (((output, read), log_mass), row) in outputs.zip(rows) {
                output.iter_mut().zip(read).for_each(|(output, read)| *output = read / sum[row]);
                *log_mass = sum[row].ln() + highest[row];
            }
        }
    });
    (output, log_mass)
}

/// Attention of the last queries of some texts, all of them in one call.
struct Call<'a> {
    query: Heads<'a>,
    keys: Stored<'a>,
    values: Stored<'a>,
    options: &'a CausalOptions,
    /// Query heads that share a KV head.
    group: usize,
    /// Position of the first query.
    start: usize,
}

impl Call<'_> {
    /// What the queries `tokens` of a group read of the keys at `positions`, left in the scratch.
    fn read(&self, pair: usize, tokens: Range<usize>, positions: Range<usize>, scratch: &mut Scratch) {
        let [_, kv_heads, ..] = self.keys.dims();
        let (batch, kv_head) = (pair / kv_heads, pair % kv_heads);
        let heads = kv_head * self.group..(kv_head + 1) * self.group;
        let begins = positions.start == self.options.first_visible(self.start + tokens.start);
        let mut queries = mem::take(&mut scratch.query);
        load_queries(&self.query, batch, heads.clone(), tokens.clone(), self.options.scale, &mut queries);
        let tile = QueryTile {
            rows: &queries,
            group: self.group,
            tokens: tokens.len(),
            start: self.start + tokens.start,
            slopes: self.options.slopes.as_ref().map(|slopes| &slopes[heads.clone()]),
            // Counted once, whatever the keys are cut into.
            sink_logits: self.options.sink_logits.as_ref().filter(|_| begins).map(|sinks| &sinks[heads]),
        };
        let (keys, values) = (self.keys.head(batch, kv_head), self.values.head(batch, kv_head));
        level::arch().dispatch(DenseTile { tile: &tile, positions, keys, values, options: self.options, scratch });
        scratch.query = queries;
    }

    /// Few queries: each thread reads some of the keys for all of them. The parts are the same whatever the number of threads,
    /// and so is the result.
    fn share_keys(&self, output: &mut [f32], log_mass: &mut [f32]) {
        let [batch, kv_heads, _, width] = self.keys.dims();
        let tokens = self.query.dims()[2];
        let end = self.start + tokens;
        let parts: Vec<Range<usize>> = (self.options.first_visible(self.start)..end)
            .step_by(PART)
            .map(|from| from..end.min(from + PART))
            .collect();
        let jobs = (0..batch * kv_heads).flat_map(|pair| parts.iter().map(move |part| (pair, part.clone())));
        let mut read: Vec<Sums> = Vec::new();
        read.resize_with(batch * kv_heads * parts.len(), Sums::default);
        share_with(jobs.zip(&mut read).collect(), Scratch::default, |scratch, ((pair, positions), read)| {
            self.read(pair, 0..tokens, positions, scratch);
            *read = mem::take(&mut scratch.sums);
        });
        let rows = self.group * tokens;
        let pairs = output.chunks_exact_mut((rows * width).max(1)).zip(log_mass.chunks_exact_mut(rows.max(1)));
        for ((output, log_mass), parts) in pairs.zip(read.chunks_exact(parts.len().max(1))) {
            for (row, (output, log_mass)) in output.chunks_exact_mut(width).zip(log_mass).enumerate() {
                let highest = parts.iter().map(|part| part.highest[row]).fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for part in parts {
                    let fade = (part.highest[row] - highest).exp();
                    sum += fade * part.sum[row];
                    let read = &part.output[row * width..(row + 1) * width];
                    output.iter_mut().zip(read).for_each(|(output, read)| *output += fade * read);
                }
                output.iter_mut().for_each(|output| *output /= sum);
                *log_mass = sum.ln() + highest;
            }
        }
    }
}

/// The softmax of each row so far.
#[derive(Default)]
struct Sums {
    /// Weighted sums of values, `[rows, width]`.
    output: Vec<f32>,
    highest: Vec<f32>,
    /// Of weights relative to the highest score.
    sum: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    query: Vec<f32>,
    scores: Vec<f32>,
    /// Keys or values of a step that were stored in fewer bytes.
    widened: Vec<f32>,
    sums: Sums,
}

struct DenseTile<'a> {
    tile: &'a QueryTile<'a>,
    /// Of the keys.
    positions: Range<usize>,
    keys: StoredRows<'a>,
    values: StoredRows<'a>,
    options: &'a CausalOptions,
    scratch: &'a mut Scratch,
}

impl WithSimd for DenseTile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, positions, keys, values, options, scratch } = self;
        let (rows, width) = (tile.count(), keys.width());
        let Scratch { scores, widened, sums: Sums { output, highest, sum }, .. } = scratch;
        output.clear();
        output.resize(rows * width, 0.0);
        tile.begin(highest, sum);
        let mut from = positions.start;
        while from < positions.end {
            let to = (from + KEYS).min(positions.end);
            let columns = to - from;
            scores.resize(rows * columns, 0.0);
            score(simd, tile, (keys.range(from..to), &mut *widened), scores, columns, 0, options.softcap);
            let cut = to > tile.start + 1 || options.window.is_some() || tile.slopes.is_some();
            if cut {
                mask_positions(tile, options, from..to, scores, columns, 0);
            }
            for row in 0..rows {
                let scores = &mut scores[row * columns..(row + 1) * columns];
                let shift = highest[row].max(vector::max(simd, scores));
                if shift <= LOWEST_SCORE {
                    // Nothing visible yet.
                    scores.fill(0.0);
                    continue;
                }
                let fade = (highest[row] - shift).exp();
                if fade != 1.0 && highest[row] != f32::NEG_INFINITY {
                    vector::scale(simd, &mut output[row * width..(row + 1) * width], fade);
                }
                sum[row] = sum[row] * fade + vector::exp_sum(simd, scores, shift);
                highest[row] = shift;
            }
            read(simd, scores, columns, 0, rows, (values.range(from..to), &mut *widened), output);
            from = to;
        }
    }
}
