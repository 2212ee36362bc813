//! One tile of queries: decides what is read how, and hands it to the kernels.
//!
//! This is the seam for faster kernels: a fused one takes the same [`TileInput`] and returns the same output.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::{
    AttentionOptions, BlockAttentionConfig, Far, Retrieval,
    buffer::RowBuffer,
    plain::{
        Part, Tile, choose_per_chunk, choose_per_token, chosen_part, combine, contiguous_part, far_logits, far_part,
        hide_left_blocks, masked_candidates_part, meta_scores, mixed_state, read_mixed_state, read_states,
        retrieved_state,
    },
    statistics::{Statistics, StatisticsView},
};

/// From how many times `top_k` candidates on the chosen blocks are gathered for each token. Up to there one product with
/// the keys of all candidates, most of them masked, is the faster way to the same numbers. A bound, so that the work for a
/// token does not grow with the text.
const GATHER_FROM: usize = 8;

/// Queries of one chunk and everything they may read.
pub(crate) struct TileInput<'a> {
    /// `[batch, heads, tokens, head_dim]`, all of the same chunk.
    pub(crate) query: Tensor<4>,
    /// Position of the first query.
    pub(crate) start: usize,
    /// Keys and values from position `rows_start` up to the last query.
    pub(crate) keys: &'a RowBuffer,
    pub(crate) values: &'a RowBuffer,
    pub(crate) rows_start: usize,
    /// Keys and values of the sinks where the rows do not reach back to them.
    pub(crate) sinks: Option<&'a (Tensor<4>, Tensor<4>)>,
    /// Blocks that end before the local region.
    pub(crate) statistics: Option<&'a Statistics>,
    /// Meta query or first query of the chunk, `[batch, heads, 1, head_dim]`.
    pub(crate) chunk_query: Option<&'a Tensor<4>>,
}

impl TileInput<'_> {
    /// Exact keys at `positions`.
    fn rows_part(&self, tile: &Tile, positions: Range<usize>, options: &AttentionOptions) -> Part {
        let of = |rows: &RowBuffer| rows.range(positions.start - self.rows_start, positions.end - self.rows_start);
        contiguous_part(tile, of(self.keys), of(self.values), positions.clone(), options)
    }
}

/// What each query reads, `[batch, heads, tokens, head_dim]`.
pub(crate) fn attend_tile(
    input: TileInput<'_>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<4> {
    let shape = input.query.dims();
    let [_, _, tokens, _] = shape;
    let kv_heads = input.keys.all().dims()[1];
    let tile = Tile::new(input.query.clone(), kv_heads, input.start);
    let chunk = input.start / attention.chunk_size;
    let local_start = attention.local_start(chunk);
    let end = input.start + tokens;

    // Candidates for retrieval: complete blocks before the local region that hold a token other than a sink and are
    // not wholly behind the window of the chunk's first token. (Not of the first query here: how a text is cut into
    // pieces must not matter.)
    let block = attention.statistics_block();
    let first_block = attention.sink_tokens.max(options.first_visible(chunk * attention.chunk_size)) / block;
    let candidates = first_block..(local_start / block).max(first_block);
    if attention.retrieval == Retrieval::Blocks && candidates.len() <= attention.top_k {
        // Every block would be chosen: the exact set is one run of positions.
        let first = (candidates.start * block).min(local_start);
        return exact_only(&input, &tile, first..end, attention, options).reshape(shape);
    }
    let parts = || exact_parts(&input, &tile, local_start..end, attention, options);
    let output = match (attention.retrieval, input.statistics) {
        (Retrieval::None, _) | (_, None) => combine(parts(), None).0,
        (Retrieval::Blocks, Some(statistics)) => {
            read_blocks(&input, &tile, parts(), statistics.view(candidates.clone()), candidates, attention, options)
        }
        (Retrieval::State | Retrieval::Additive, Some(statistics)) => {
            // One mixture serves the whole chunk: it holds the blocks that even its last token sees whole.
            let last = (chunk + 1) * attention.chunk_size - 1;
            let bound = options.first_visible(last).max(attention.sink_tokens);
            let visible = statistics.first_from(bound)..statistics.len();
            if visible.is_empty() {
                combine(parts(), None).0
            } else if attention.retrieval == Retrieval::State {
                read_state(&input, &tile, parts(), statistics.view(visible), attention, options)
            } else {
                let view = statistics.view(visible);
                let (query, keys) = meta_pair(&input, &view);
                let far = retrieved_state(&tile, &view, query, keys, options.scale);
                combine(parts(), None).0 + far * attention.additive_gate
            }
        }
    };
    output.reshape(shape)
}

/// Sinks and one run of positions.
fn exact_parts(
    input: &TileInput<'_>,
    tile: &Tile,
    positions: Range<usize>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Vec<Part> {
    let mut parts = Vec::with_capacity(4);
    let sinks = 0..attention.sink_tokens.min(positions.start);
    let visible = options.first_visible(tile.start);
    if sinks.end > visible {
        parts.push(match input.sinks {
            Some((keys, values)) => {
                let of = |rows: &Tensor<4>| rows.clone().narrow(2, 0, sinks.len());
                contiguous_part(tile, of(keys), of(values), sinks, options)
            }
            None => input.rows_part(tile, sinks, options),
        });
    }
    // Positions no query of the tile can see are not read at all.
    parts.push(input.rows_part(tile, positions.start.max(visible)..positions.end, options));
    parts
}

fn exact_only(
    input: &TileInput<'_>,
    tile: &Tile,
    positions: Range<usize>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    // Sinks that touch the run are part of it, so that a short text takes the very operations of full attention.
    let joined = if attention.sink_tokens >= positions.start { 0..positions.end } else { positions };
    combine(exact_parts(input, tile, joined, attention, options), None).0
}

/// `retrieval = blocks`: the chosen blocks exactly, the others as the far term says.
fn read_blocks(
    input: &TileInput<'_>,
    tile: &Tile,
    mut parts: Vec<Part>,
    view: StatisticsView,
    candidates: Range<usize>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    let weight = if attention.far == Far::State { attention.covariance_weight } else { 0.0 };
    let mass = far_logits(tile, &view, weight, options);
    let choice = if attention.needs_meta() {
        let (query, keys) = meta_pair(input, &view);
        choose_per_chunk(meta_scores(query, keys, view.mean_key.dims()[1]), attention.top_k)
    } else {
        let visible = hide_left_blocks(tile, mass.clone(), &view.blocks, options);
        choose_per_token(visible, &parts, attention.top_k)
    };
    let block = attention.block_size;
    parts.push(if candidates.len() <= attention.top_k.saturating_mul(GATHER_FROM) {
        let positions = (candidates.start * block).max(attention.sink_tokens)..candidates.end * block;
        let of = |rows: &RowBuffer| rows.range(positions.start, positions.end);
        let (keys, values) = (of(input.keys), of(input.values));
        masked_candidates_part(tile, keys, values, choice.clone(), block, positions, options)
    } else {
        let numbered = choice.clone() + candidates.start as i32;
        chosen_part(tile, (input.keys, input.values), numbered, block, attention.sink_tokens, options)
    });
    if attention.far == Far::None {
        return combine(parts, None).0;
    }
    parts.push(far_part(tile, mass, &view, Some(choice), options));
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far));
    match (&view.state, weights) {
        (Some(state), Some(weights)) => output + read_states(tile, weights, state, options),
        _ => output,
    }
}

/// `retrieval = state`: every block through its statistics, the centred states as one mixture for the chunk.
fn read_state(
    input: &TileInput<'_>,
    tile: &Tile,
    mut parts: Vec<Part>,
    view: StatisticsView,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    let logits = far_logits(tile, &view, attention.covariance_weight, options);
    parts.push(far_part(tile, logits, &view, None, options));
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far));
    let (query, keys) = meta_pair(input, &view);
    match (view.state, weights) {
        (Some(state), Some(weights)) => {
            let mixture = mixed_state(query, keys, state, &view.blocks, options.scale);
            output + read_mixed_state(tile, mixture, weights.sum_dim(4), options.scale)
        }
        _ => output,
    }
}

/// The query and keys that choose or mix blocks for a whole chunk: the meta projections, or with the `mean-key` selector
/// the chunk's first query and the mean keys.
fn meta_pair(input: &TileInput<'_>, view: &StatisticsView) -> (Tensor<4>, Tensor<4>) {
    let query = input.chunk_query.unwrap_or_else(|| unreachable!("set when the chunk was entered"));
    (query.clone(), view.meta_key.clone().unwrap_or_else(|| view.mean_key.clone()))
}
