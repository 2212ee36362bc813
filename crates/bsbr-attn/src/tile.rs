//! One tile of queries: decides what is read how, and hands it to the kernels.
//!
//! Fused kernels compute the same of whole pieces of text, without going through here.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use crate::{
    AttentionOptions, BlockAttentionConfig, Far, Retrieval,
    buffer::RowBuffer,
    index::{Chosen, PlainIndex, read_by_index},
    kept::KeptTokens,
    plain::{
        Part, Tile, choose_per_chunk, chosen_part, combine, contiguous_part, far_logits, far_part,
        masked_candidates_part, meta_scores, mixed_state, read_mixed_state, read_states, retrieved_state,
    },
    seen::{Columns, Watch},
    statistics::{Statistics, StatisticsView},
};

/// From how many times the blocks it chooses a chunk gathers those instead of scoring every candidate with most of them masked. A
/// bound, so that the work for a token does not grow with the text.
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
    /// Tokens kept behind the local region.
    pub(crate) kept: Option<&'a KeptTokens>,
    /// The index of everything before the local region.
    pub(crate) index: Option<&'a PlainIndex>,
    /// Blocks that end before the local region.
    pub(crate) statistics: Option<&'a Statistics>,
    /// Meta query or first query of the chunk, `[batch, heads, 1, head_dim]`.
    pub(crate) chunk_query: Option<&'a Tensor<4>>,
    /// Gates of the query heads, `[heads]`.
    pub(crate) gates: Option<&'a Tensor<1>>,
    /// What reads the local region where it stands at other positions than the rest.
    pub(crate) near: Option<NearInput<'a>>,
}

/// Queries and keys of the local region; those of the [`TileInput`] are for the rest then.
pub(crate) struct NearInput<'a> {
    /// `[batch, heads, tokens, head_dim]`.
    pub(crate) query: Tensor<4>,
    /// Keys from position `first` up to the last query.
    pub(crate) keys: &'a RowBuffer,
    pub(crate) first: usize,
}

impl TileInput<'_> {
    /// Exact keys at `positions`.
    fn rows_part(&self, tile: &Tile, positions: Range<usize>, options: &AttentionOptions) -> Part {
        let of = |rows: &RowBuffer| rows.range(positions.start - self.rows_start, positions.end - self.rows_start);
        contiguous_part(tile, of(self.keys), of(self.values), positions.clone(), options)
    }

    /// Exact keys at `positions` of the local region.
    fn near_part(
        &self,
        near: &NearInput<'_>,
        tile: &Tile,
        positions: Range<usize>,
        options: &AttentionOptions,
    ) -> Part {
        let near_tile = Tile::new(near.query.clone(), tile.query.dims()[1], tile.start);
        let keys = near.keys.range(positions.start - near.first, positions.end - near.first);
        let values = self.values.range(positions.start - self.rows_start, positions.end - self.rows_start);
        contiguous_part(&near_tile, keys, values, positions, options)
    }
}

/// What each query reads, `[batch, heads, tokens, head_dim]`, and what was chosen where keys are.
pub(crate) fn attend_tile(
    input: TileInput<'_>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
    watch: Option<&mut Watch>,
) -> (Tensor<4>, Option<Chosen>) {
    let shape = input.query.dims();
    let [_, _, tokens, _] = shape;
    let kv_heads = input.keys.heads();
    let tile = Tile::new(input.query.clone(), kv_heads, input.start);
    let chunk = input.start / attention.chunk_size;
    let local_start = attention.local_start(chunk);
    let end = input.start + tokens;

    if attention.uses_index() {
        let Some((index, candidates)) = input.index.zip(attention.candidates(chunk, options)) else {
            return (read_everything(&input, &tile, end, (attention, options), watch).reshape(shape), None);
        };
        let parts = exact_parts(&input, &tile, local_start..end, attention, options);
        let rows = (input.keys, input.values);
        let (output, chosen) = read_by_index(&tile, parts, (index, &candidates), rows, (attention, options), watch);
        return (output.reshape(shape), Some(chosen));
    }
    let candidates = attention.blocks_before(chunk, options);
    if attention.retrieval == Retrieval::Blocks
        && (candidates.len() <= attention.meta_blocks || attention.reads_everything(chunk, options))
    {
        return (read_everything(&input, &tile, end, (attention, options), watch).reshape(shape), None);
    }
    let parts = || exact_parts(&input, &tile, local_start..end, attention, options);
    let output = match (attention.retrieval, input.statistics) {
        (Retrieval::None, _) | (_, None) => combine(parts(), None, options, (input.start, watch)).0,
        (Retrieval::Blocks, Some(statistics)) => {
            let view = statistics.view(candidates.clone());
            read_blocks(&input, &tile, parts(), (view, candidates), (attention, options), watch)
        }
        (Retrieval::State | Retrieval::Additive, Some(statistics)) => {
            // One mixture serves the whole chunk: it holds the blocks that even its last token sees whole.
            let last = (chunk + 1) * attention.chunk_size - 1;
            let bound = options.first_visible(last).max(attention.sink_tokens);
            let visible = statistics.first_from(bound)..statistics.len();
            if let Some(kept) = input.kept {
                let parts = parts().into_iter().chain(kept.part(&tile, options)).collect();
                if statistics.len() == 0 {
                    combine(parts, None, options, (input.start, watch)).0
                } else {
                    read_state(&input, &tile, parts, statistics.view_of_tokens(bound), (attention, options), watch)
                }
            } else if visible.is_empty() {
                combine(parts(), None, options, (input.start, watch)).0
            } else if attention.retrieval == Retrieval::State {
                read_state(&input, &tile, parts(), statistics.view(visible), (attention, options), watch)
            } else {
                let view = statistics.view(visible);
                let (query, keys) = meta_pair(&input, &view);
                let far = retrieved_state(&tile, &view, query, keys, options.scale);
                let far = match input.gates {
                    Some(gates) => far * by_head(gates, &tile),
                    None => far * attention.additive_gate,
                };
                combine(parts(), None, options, (input.start, watch)).0 + far
            }
        }
    };
    (output.reshape(shape), None)
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
    let seen = positions.start.max(visible)..positions.end;
    let Some(near) = &input.near else {
        parts.push(input.rows_part(tile, seen, options));
        return parts;
    };
    let local_start = attention.local_start(tile.start / attention.chunk_size);
    if seen.start < local_start {
        parts.push(input.rows_part(tile, seen.start..local_start, options));
    }
    parts.push(input.near_part(near, tile, seen.start.max(local_start)..seen.end, options));
    parts
}

/// Everything up to `end` that the window of the chunk's first token reaches, as one run of positions.
fn read_everything(
    input: &TileInput<'_>,
    tile: &Tile,
    end: usize,
    (attention, options): (&BlockAttentionConfig, &AttentionOptions),
    watch: Option<&mut Watch>,
) -> Tensor<5> {
    let chunk = tile.start / attention.chunk_size;
    let first = options.first_visible(chunk * attention.chunk_size).min(attention.local_start(chunk));
    // Sinks that touch the run are part of it, so that a short text takes the very operations of full attention.
    let first = if attention.sink_tokens >= first { 0 } else { first };
    combine(exact_parts(input, tile, first..end, attention, options), None, options, (tile.start, watch)).0
}

/// `selector = meta`: the blocks that the chunk chose exactly, the others as the far term says.
fn read_blocks(
    input: &TileInput<'_>,
    tile: &Tile,
    mut parts: Vec<Part>,
    (view, candidates): (StatisticsView, Range<usize>),
    (attention, options): (&BlockAttentionConfig, &AttentionOptions),
    watch: Option<&mut Watch>,
) -> Tensor<5> {
    let weight = if attention.far == Far::State { attention.covariance_weight } else { 0.0 };
    let mass = far_logits(tile, &view, weight, options);
    let (query, keys) = meta_pair(input, &view);
    let scores = meta_scores(query, keys, view.mean_key.dims()[1]);
    let choice = choose_per_chunk(scores, options.scale, attention.meta_blocks);
    parts.push(read_chosen(input, tile, choice.clone(), candidates, attention, options));
    if attention.far == Far::None {
        return combine(parts, None, options, (tile.start, watch)).0;
    }
    parts.push(far_part(tile, mass, &view, Some(choice), attention.far_shift, options));
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far), options, (tile.start, watch));
    match (&view.state, weights) {
        (Some(state), Some(weights)) => output + read_states(tile, weights, state, options),
        _ => output,
    }
}

/// The tokens of the chosen blocks, which are numbered from the first candidate.
fn read_chosen(
    input: &TileInput<'_>,
    tile: &Tile,
    choice: Tensor<4, Int>,
    candidates: Range<usize>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Part {
    let block = attention.block_size;
    if candidates.len() <= attention.meta_blocks.saturating_mul(GATHER_FROM) {
        let positions = (candidates.start * block).max(attention.sink_tokens)..candidates.end * block;
        let of = |rows: &RowBuffer| rows.range(positions.start, positions.end);
        let (keys, values) = (of(input.keys), of(input.values));
        masked_candidates_part(tile, keys, values, choice, block, positions, options)
    } else {
        let numbered = choice + candidates.start as i32;
        chosen_part(tile, (input.keys, input.values), numbered, block, attention.sink_tokens, options)
    }
}

/// `retrieval = state`: every block through its statistics, the centred states as one mixture for the chunk.
fn read_state(
    input: &TileInput<'_>,
    tile: &Tile,
    mut parts: Vec<Part>,
    view: StatisticsView,
    (attention, options): (&BlockAttentionConfig, &AttentionOptions),
    watch: Option<&mut Watch>,
) -> Tensor<5> {
    let logits = far_logits(tile, &view, attention.covariance_weight, options);
    let logits = match input.gates {
        Some(gates) => logits + by_head(gates, tile),
        None => logits,
    };
    let mut far = far_part(tile, logits, &view, None, attention.far_shift, options);
    if input.kept.is_some() {
        // Blocks of tokens that stand anywhere have no positions of their own.
        let local = attention.local_start(tile.start / attention.chunk_size);
        far.columns = Columns::Rest(attention.sink_tokens.min(local)..local);
    }
    parts.push(far);
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far), options, (tile.start, watch));
    let (query, keys) = meta_pair(input, &view);
    match (view.state, weights) {
        (Some(state), Some(weights)) => {
            let mixture = mixed_state(query, keys, state, (&view.blocks, view.hidden.as_ref()), options.scale);
            output + read_mixed_state(tile, mixture, weights.sum_dim(4), options.scale)
        }
        _ => output,
    }
}

/// One number for each query head, `[1, kv_heads, group, 1, 1]`.
fn by_head(numbers: &Tensor<1>, tile: &Tile) -> Tensor<5> {
    let [_, kv_heads, group, ..] = tile.query.dims();
    numbers.clone().reshape([1, kv_heads, group, 1, 1])
}

/// The query and keys that choose or mix blocks for a whole chunk: the meta projections, or without them the chunk's first
/// query and the mean keys.
fn meta_pair(input: &TileInput<'_>, view: &StatisticsView) -> (Tensor<4>, Tensor<4>) {
    let query = input.chunk_query.unwrap_or_else(|| unreachable!("set when the chunk was entered"));
    (query.clone(), view.meta_key.clone().unwrap_or_else(|| view.mean_key.clone()))
}
