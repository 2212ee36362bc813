//! One tile of queries: decides what is read how, and hands it to the kernels.
//!
//! Fused kernels compute the same of whole pieces of text, without going through here.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use crate::{
    AttentionOptions, BlockAttentionConfig, Far, Retrieval,
    buffer::RowBuffer,
    kept::KeptTokens,
    levels::Level,
    plain::{
        Part, Tile, choose_per_chunk, choose_per_token, chosen_part, combine, contiguous_part, far_logits, far_part,
        hide_left_blocks, log_mass, masked_candidates_part, meta_scores, mixed_state, reach, read_mixed_state,
        read_states, retrieved_state, unchosen_mask,
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
    /// Tokens kept behind the local region.
    pub(crate) kept: Option<&'a KeptTokens>,
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

/// What each query reads, `[batch, heads, tokens, head_dim]`.
pub(crate) fn attend_tile(
    input: TileInput<'_>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<4> {
    let shape = input.query.dims();
    let [_, _, tokens, _] = shape;
    let kv_heads = input.keys.heads();
    let tile = Tile::new(input.query.clone(), kv_heads, input.start);
    let chunk = input.start / attention.chunk_size;
    let local_start = attention.local_start(chunk);
    let end = input.start + tokens;

    // Candidates for retrieval: complete blocks before the local region that hold a token other than a sink and are
    // not wholly behind the window of the chunk's first token. (Not of the first query here: how a text is cut into
    // pieces must not matter.)
    let block = attention.statistics_block();
    let first = attention.sink_tokens.max(options.first_visible(chunk * attention.chunk_size));
    let candidates = first / block..(local_start / block).max(first / block);
    let few = candidates.len() <= attention.top_k || (chunk + 1) * attention.chunk_size <= attention.exact_tokens;
    if attention.retrieval == Retrieval::Blocks && few {
        // Every block is read: the exact set is one run of positions.
        let first = (candidates.start * block).min(local_start);
        return exact_only(&input, &tile, first..end, attention, options).reshape(shape);
    }
    let parts = || exact_parts(&input, &tile, local_start..end, attention, options);
    let output = match (attention.retrieval, input.statistics) {
        (Retrieval::None, _) | (_, None) => combine(parts(), None).0,
        (Retrieval::Blocks, Some(statistics)) => {
            let levels = attention.levels(first, local_start);
            if levels.len() > 1 {
                read_levels(&input, &tile, parts(), statistics, (levels, first), attention, options)
            } else {
                read_blocks(&input, &tile, parts(), statistics.view(candidates.clone()), candidates, attention, options)
            }
        }
        (Retrieval::State | Retrieval::Additive, Some(statistics)) => {
            // One mixture serves the whole chunk: it holds the blocks that even its last token sees whole.
            let last = (chunk + 1) * attention.chunk_size - 1;
            let bound = options.first_visible(last).max(attention.sink_tokens);
            let visible = statistics.first_from(bound)..statistics.len();
            if let Some(kept) = input.kept {
                let parts = parts().into_iter().chain(kept.part(&tile, options)).collect();
                if statistics.len() == 0 {
                    combine(parts, None).0
                } else {
                    read_state(&input, &tile, parts, statistics.view_of_tokens(bound), attention, options)
                }
            } else if visible.is_empty() {
                combine(parts(), None).0
            } else if attention.retrieval == Retrieval::State {
                read_state(&input, &tile, parts(), statistics.view(visible), attention, options)
            } else {
                let view = statistics.view(visible);
                let (query, keys) = meta_pair(&input, &view);
                let far = retrieved_state(&tile, &view, query, keys, options.scale);
                let far = match input.gates {
                    Some(gates) => far * by_head(gates, &tile),
                    None => far * attention.additive_gate,
                };
                combine(parts(), None).0 + far
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
        choose_per_chunk(meta_scores(query, keys, view.mean_key.dims()[1]), options.scale, attention.top_k)
    } else {
        let scores = block_scores(tile, mass.clone(), &view, attention, options);
        choose_per_token(scores, log_mass(&parts), attention.top_k)
    };
    parts.push(read_chosen(input, tile, choice.clone(), candidates, attention, options));
    if attention.far == Far::None {
        return combine(parts, None).0;
    }
    parts.push(far_part(tile, mass, &view, Some(choice), attention.far_shift, options));
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far));
    match (&view.state, weights) {
        (Some(state), Some(weights)) => output + read_states(tile, weights, state, options),
        _ => output,
    }
}

/// What a token chooses blocks by: their log-masses and what their radii add, hidden where its window leaves a block behind.
fn block_scores(
    tile: &Tile,
    mass: Tensor<5>,
    view: &StatisticsView,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    let scores = match &view.radius {
        Some(radius) => mass + reach(tile, radius.clone(), attention.reach * options.scale),
        None => mass,
    };
    hide_left_blocks(tile, scores, &view.blocks, options)
}

/// [`read_blocks`] where longer runs stand for the blocks further back: each token opens the best of them, and only what lies in
/// those are candidates of the shorter ones. Nothing before `first` is read.
fn read_levels(
    input: &TileInput<'_>,
    tile: &Tile,
    mut parts: Vec<Part>,
    statistics: &Statistics,
    (levels, first): (Vec<Level>, usize),
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    let exact = log_mass(&parts);
    // Added to the runs of a level: MASKED where they lie in a longer one that is not open.
    let mut closed: Option<(Tensor<5>, usize)> = None;
    for (at, level) in levels.iter().enumerate().rev() {
        let runs = first / level.size..level.direct.end;
        let view = match level.size / attention.block_size {
            1 => statistics.view(runs.clone()),
            blocks => statistics.view_of_runs(runs.clone(), blocks),
        };
        let mass = far_logits(tile, &view, 0.0, options);
        let scores = block_scores(tile, mass.clone(), &view, attention, options);
        let closed_runs = closed.take().map(|(closed, size)| in_longer(closed, size / level.size, &runs, first / size));
        let close = |rows: Tensor<5>| match &closed_runs {
            Some(closed) => rows + closed.clone(),
            None => rows,
        };
        let (mass, scores) = (close(mass), close(scores));
        let choice = choose_per_token(scores, exact.clone(), level.chosen.min(runs.len()));
        if at == 0 {
            parts.push(read_chosen(input, tile, choice.clone(), runs, attention, options));
        } else {
            closed = Some((close(unchosen_mask(choice.clone(), runs.len(), &mass)), level.size));
        }
        if attention.far == Far::Mean {
            parts.push(far_part(tile, mass, &view, Some(choice), attention.far_shift, options));
        }
    }
    combine(parts, None).0
}

/// What `closed` says of runs from `first` on, for the shorter runs `runs`, so many of which lie in one; 0 for those behind.
fn in_longer(closed: Tensor<5>, per_run: usize, runs: &Range<usize>, first: usize) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, count] = closed.dims();
    let each = closed.unsqueeze_dim::<6>(5).expand([batch, kv_heads, group, tokens, count, per_run]);
    let each = each.reshape([batch, kv_heads, group, tokens, count * per_run]);
    // The first of the longer runs can begin with shorter ones that are no candidates.
    let skipped = runs.start - first * per_run;
    let covered = count * per_run - skipped;
    let open = Tensor::zeros([batch, kv_heads, group, tokens, runs.len() - covered], (&each.device(), each.dtype()));
    Tensor::cat(vec![each.narrow(4, skipped, covered), open], 4)
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
    if candidates.len() <= attention.top_k.saturating_mul(GATHER_FROM) {
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
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Tensor<5> {
    let logits = far_logits(tile, &view, attention.covariance_weight, options);
    let logits = match input.gates {
        Some(gates) => logits + by_head(gates, tile),
        None => logits,
    };
    parts.push(far_part(tile, logits, &view, None, attention.far_shift, options));
    let far = parts.len() - 1;
    let (output, weights) = combine(parts, Some(far));
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

/// The query and keys that choose or mix blocks for a whole chunk: the meta projections, or with the `mean-key` selector
/// the chunk's first query and the mean keys.
fn meta_pair(input: &TileInput<'_>, view: &StatisticsView) -> (Tensor<4>, Tensor<4>) {
    let query = input.chunk_query.unwrap_or_else(|| unreachable!("set when the chunk was entered"));
    (query.clone(), view.meta_key.clone().unwrap_or_else(|| view.mean_key.clone()))
}
