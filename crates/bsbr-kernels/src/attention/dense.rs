//! Attention of every token over all keys it may see.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    CausalOptions,
    tile::{LOWEST_SCORE, QueryTile, load_queries, mask_positions, read, score},
};
use crate::{
    heads::Heads,
    level,
    stored::{Stored, StoredRows},
    vector,
};

/// Rows of queries in a tile: enough for the matrix product to run at its full rate.
const ROWS: usize = 128;
/// Keys of a step: the scores of a tile stay in the cache.
const KEYS: usize = 512;

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
    let tile = (ROWS / group).max(1);
    let mut tasks = super::tasks::split(&mut output, &mut log_mass, group, tokens, width, |from| from + tile);
    // The longest first, so that no thread is left with one at the end.
    tasks.reverse();
    tasks.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |scratch, mut task| {
        let (batch, kv_head) = (task.pair / kv_heads, task.pair % kv_heads);
        let group_heads = kv_head * group..(kv_head + 1) * group;
        let start = length - tokens + task.tokens.start;
        load_queries(&query, batch, group_heads.clone(), task.tokens.clone(), options.scale, &mut scratch.query);
        let queries = std::mem::take(&mut scratch.query);
        let tile = QueryTile {
            rows: &queries,
            group,
            tokens: task.tokens.len(),
            start,
            slopes: options.slopes.as_ref().map(|slopes| &slopes[group_heads.clone()]),
            sink_logits: options.sink_logits.as_ref().map(|sinks| &sinks[group_heads]),
        };
        let (keys, values) = (keys.head(batch, kv_head), values.head(batch, kv_head));
        level::arch().dispatch(DenseTile { tile: &tile, keys, values, options, scratch });
        for (g, (output, log_mass)) in task.outputs.iter_mut().enumerate() {
            let rows = g * tile.tokens..(g + 1) * tile.tokens;
            output.copy_from_slice(&scratch.output[rows.start * width..rows.end * width]);
            log_mass.copy_from_slice(&scratch.sum[rows]);
        }
        scratch.query = queries;
    });
    (output, log_mass)
}

#[derive(Default)]
struct Scratch {
    query: Vec<f32>,
    scores: Vec<f32>,
    /// Keys or values of a step that were stored in fewer bytes.
    widened: Vec<f32>,
    output: Vec<f32>,
    highest: Vec<f32>,
    sum: Vec<f32>,
}

struct DenseTile<'a> {
    tile: &'a QueryTile<'a>,
    keys: StoredRows<'a>,
    values: StoredRows<'a>,
    options: &'a CausalOptions,
    scratch: &'a mut Scratch,
}

impl WithSimd for DenseTile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, keys, values, options, scratch } = self;
        let (rows, width) = (tile.count(), keys.width());
        let Scratch { scores, widened, output, highest, sum, .. } = scratch;
        output.clear();
        output.resize(rows * width, 0.0);
        tile.begin(highest, sum);
        let end = tile.start + tile.tokens;
        let mut from = options.first_visible(tile.start);
        while from < end {
            let to = (from + KEYS).min(end);
            let columns = to - from;
            scores.resize(rows * columns, 0.0);
            score(simd, tile, keys.range(from..to).widened(widened), scores, columns, 0, options.softcap);
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
            read(simd, scores, columns, 0, rows, values.range(from..to).widened(widened), output);
            from = to;
        }
        for row in 0..rows {
            vector::scale(simd, &mut output[row * width..(row + 1) * width], 1.0 / sum[row]);
            sum[row] = sum[row].ln() + highest[row];
        }
    }
}
