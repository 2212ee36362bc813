//! Gradients of attention. Scores are computed again tile by tile from the logarithms of their denominators (Dao and others
//! 2022), so that the memory is that of the gradients themselves.
//!
//! With `P` the weights, `o` the output and `g` its gradient: `dV = P^T g`, `dS = P (g V^T - g . o)`, `dQ = scale dS K`,
//! `dK = scale dS^T Q`. Mean keys and mean values are columns like any other, as the index has them; their gradients are spread
//! over their tokens at the end, as if nothing had been rounded. Which keys a token chose is taken as given. A sink counts in the
//! denominator and so in `P`; its own value is 0, and it is no input: it has no gradient here.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BlockInput, BlockOptions, CausalOptions,
    block_tile::{Head, Scratch, TileRead, read_tile},
    mean_gradient::MeanGradients,
    tile::{QueryTile, load_queries},
    tile_gradient::TileGradient,
};
use crate::{heads::Heads, level};

/// Rows of queries in a tile.
const ROWS: usize = 128;

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
/// If the shapes do not fit.
pub fn causal_attention_backward(
    (query, keys, values): (Heads<'_>, Heads<'_>, Heads<'_>),
    forward: &Forward<'_>,
    options: &CausalOptions,
) -> Gradients {
    let (keys, values) = (keys.into(), values.into());
    let input = BlockInput { query, keys, values, first: 0, sinks: None, index: None, near: None };
    backward(&input, forward, None, options)
}

/// Gradients of [`block_attention`](super::block_attention) of whole texts.
///
/// # Panics
///
/// As [`causal_attention_backward`], and if keys or values are not f32.
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
            index: settings.and(input.index).map(|index| index.head(batch, kv_head)),
            near: None,
        };
        let mut of_means = head.index.map(|index| MeanGradients::new(index, tokens));
        let (mut scratch, mut queries, mut gradient, mut outputs) = (Scratch::default(), vec![], vec![], vec![]);
        let (mut tile_query, mut buffer, mut raw) = (vec![], vec![], vec![]);
        let chunk = settings.map_or(usize::MAX, |settings| settings.chunk_size);
        let mut from = 0;
        while from < tokens {
            let to = (from + (ROWS / group).max(1)).min(tokens).min((from / chunk + 1).saturating_mul(chunk));
            load_queries(&input.query, batch, group_heads.clone(), from..to, options.scale, &mut queries);
            load_queries(&forward.gradient, batch, group_heads.clone(), from..to, 1.0, &mut gradient);
            load_queries(&forward.output, batch, group_heads.clone(), from..to, 1.0, &mut outputs);
            let slopes = options.slopes.as_ref().map(|slopes| &slopes[group_heads.clone()]);
            let sink_logits = options.sink_logits.as_ref().map(|sinks| &sinks[group_heads.clone()]);
            let tile = QueryTile { rows: &queries, group, tokens: to - from, start: from, slopes, sink_logits };
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
                softcap: options.softcap,
                scratch: &mut buffer,
                raw: &mut raw,
            };
            match settings {
                None => of_tile.all_keys(simd, &head, options, &log_mass, &mut scratch, (&mut *keys, &mut *values)),
                Some(settings) => {
                    let TileRead { runs, retrieval, .. } =
                        read_tile(simd, &tile, &head, settings, options, &mut scratch, Some(&log_mass));
                    of_tile.runs(simd, &runs, &scratch.exact, (&mut *keys, &mut *values));
                    if let (Some(retrieval), Some(of_means)) = (retrieval, &mut of_means) {
                        if retrieval.settings.far {
                            of_means.add_tile(simd, &mut of_tile, &retrieval, &mut scratch.retrieval);
                        }
                        of_tile.chosen(simd, &head, &scratch.retrieval.chosen, (&mut *keys, &mut *values));
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
        if let (Some(settings), Some(of_means)) = (settings, of_means) {
            of_means.spread(settings.sink_tokens, keys, values);
        }
    }
}
