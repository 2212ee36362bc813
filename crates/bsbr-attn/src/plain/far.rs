//! Blocks that are read through their statistics.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use super::{MASKED, Part, Tile, Values, biased, biased_at, choose::chosen_mask, exact::masked, float_tensor, scores};
use crate::{AttentionOptions, seen::Columns, statistics::StatisticsView};

/// The covariance term may add at most this to a log-mass: keys that are rotated through a block are not normally
/// distributed, and without a bound the quadratic estimate of a few of them swallows the rest.
const MOST_COVARIANCE_NATS: f64 = 4.0;

/// Numbers in one intermediate of the quadratic forms, so that they do not grow with the text.
const QUADRATIC_BUDGET: usize = 1 << 22;

/// Estimated log-mass of each block for each token, `[batch, kv_heads, group, tokens, blocks]`:
/// `log n + scale q . mu + (w / 2) scale^2 q^T S q`, ALiBi at the mean position; blocks without tokens are masked.
pub(crate) fn far_logits(
    tile: &Tile,
    statistics: &StatisticsView,
    covariance_weight: f64,
    options: &AttentionOptions,
) -> Tensor<5> {
    let log_count = |block: &Range<usize>| if block.is_empty() { MASKED as f32 } else { (block.len() as f32).ln() };
    let log_counts: Vec<f32> = statistics.blocks.iter().map(log_count).collect();
    let blocks = log_counts.len();
    let log_counts = float_tensor(log_counts, &tile.query.device(), tile.query.dtype()).reshape([1, 1, 1, 1, blocks]);
    let mean_position = |block: &Range<usize>| (block.start + block.end.max(1) - 1) as f64 / 2.0;
    let scores = scores(tile, statistics.mean_key.clone(), options);
    let biased = match &statistics.mean_place {
        Some(places) => biased_at(tile, scores, places.clone(), options),
        None => biased(tile, scores, statistics.blocks.iter().map(mean_position), options),
    };
    let logits = biased + log_counts;
    match &statistics.covariance {
        Some(covariance) if covariance_weight > 0.0 => {
            let spread = quadratic_forms(tile, covariance);
            let factor = 0.5 * covariance_weight * options.scale * options.scale;
            logits + (spread * factor).clamp_max(MOST_COVARIANCE_NATS)
        }
        _ => logits,
    }
}

/// The blocks as columns of the softmax, each with its mean value. Hidden are the blocks in `choice` (they are read
/// exactly) and those of which the model's own window hides any token; the log-mass of the others is moved by `shift`.
pub(crate) fn far_part(
    tile: &Tile,
    logits: Tensor<5>,
    statistics: &StatisticsView,
    choice: Option<Tensor<4, Int>>,
    shift: f64,
    options: &AttentionOptions,
) -> Part {
    let logits = if shift == 0.0 { logits } else { logits + shift };
    let mut logits = match &statistics.hidden {
        Some(hidden) => logits + hidden.clone(),
        None => hide_cut_blocks(tile, logits, &statistics.blocks, options),
    };
    if let Some(choice) = choice {
        let mask = chosen_mask(choice, statistics.blocks.len(), &logits);
        logits = logits + mask;
    }
    Part {
        logits,
        values: Values::Shared(statistics.mean_value.clone()),
        columns: Columns::Runs(statistics.blocks.clone()),
    }
}

/// Hides from each token the blocks that its window cuts or leaves behind.
fn hide_cut_blocks(tile: &Tile, logits: Tensor<5>, blocks: &[Range<usize>], options: &AttentionOptions) -> Tensor<5> {
    if options.window.is_none() {
        return logits;
    }
    masked(
        logits,
        tile.mask(blocks.len(), |token, block| blocks[block].start >= options.first_visible(tile.start + token)),
    )
}

/// `q^T S_j q` for each token and block, `[batch, kv_heads, group, tokens, blocks]`.
fn quadratic_forms(tile: &Tile, covariance: &Tensor<4>) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, width] = tile.query.dims();
    let blocks = covariance.dims()[2];
    let query = tile.flat().unsqueeze_dim::<5>(2);
    let step = blocks_at_once(batch * kv_heads * group * tokens * width);
    let pieces = (0..blocks).step_by(step).map(|first| {
        let count = step.min(blocks - first);
        let matrices = covariance.clone().narrow(2, first, count).reshape([batch, kv_heads, count, width, width]);
        let turned = query.clone().matmul(matrices);
        (turned * query.clone()).sum_dim(4).reshape([batch, kv_heads, count, group * tokens])
    });
    let forms = Tensor::cat(pieces.collect(), 2);
    forms.swap_dims(2, 3).reshape([batch, kv_heads, group, tokens, blocks])
}

/// `scale sum_j w_j C_j^T q` for each token, with the softmax weights `[batch, kv_heads, group, tokens, blocks]` of the
/// far part: what the centred states add to the mean values.
pub(crate) fn read_states(
    tile: &Tile,
    weights: Tensor<5>,
    states: &Tensor<4>,
    options: &AttentionOptions,
) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, width] = tile.query.dims();
    let blocks = states.dims()[2];
    let query = tile.flat().unsqueeze_dim::<5>(2);
    let weights = weights.reshape([batch, kv_heads, group * tokens, blocks]).swap_dims(2, 3).unsqueeze_dim::<5>(4);
    let step = blocks_at_once(batch * kv_heads * group * tokens * width);
    let mut sum: Option<Tensor<5>> = None;
    for first in (0..blocks).step_by(step) {
        let count = step.min(blocks - first);
        let matrices = states.clone().narrow(2, first, count).reshape([batch, kv_heads, count, width, width]);
        let read = (query.clone().matmul(matrices) * weights.clone().narrow(2, first, count)).sum_dim(2);
        sum = Some(match sum {
            Some(sum) => sum + read,
            None => read,
        });
    }
    let sum = sum.unwrap_or_else(|| unreachable!("a far part has at least one block"));
    sum.reshape([batch, kv_heads, group, tokens, width]) * options.scale
}

/// One mixture of states for a whole chunk, `sum_j softmax_j(scale r . h_j) C_j`, one for each query head:
/// `[batch, kv_heads, group, head_dim, head_dim]`.
///
/// `meta_query` is `[batch, heads, 1, head_dim]`; `meta_keys` `[batch, heads or kv_heads, blocks, head_dim]`; `matrices`
/// `[batch, kv_heads, blocks, head_dim^2]`. Blocks without tokens and those `hidden` take no part.
pub(crate) fn mixed_state(
    meta_query: Tensor<4>,
    meta_keys: Tensor<4>,
    matrices: Tensor<4>,
    (blocks, hidden): (&[Range<usize>], Option<&Tensor<5>>),
    scale: f64,
) -> Tensor<5> {
    let [batch, heads, _, width] = meta_query.dims();
    let kv_heads = matrices.dims()[1];
    let group = heads / kv_heads;
    let scores = meta_scores(meta_query, meta_keys, kv_heads) * scale;
    let empty: Vec<f32> = blocks.iter().map(|block| if block.is_empty() { MASKED as f32 } else { 0.0 }).collect();
    let scores =
        scores.clone() + float_tensor(empty, &scores.device(), scores.dtype()).reshape([1, 1, 1, blocks.len()]);
    let scores = match hidden {
        Some(hidden) => scores + hidden.clone().reshape([batch, kv_heads, 1, blocks.len()]),
        None => scores,
    };
    let weights = burn::tensor::activation::softmax(scores, 3);
    weights.matmul(matrices).reshape([batch, kv_heads, group, width, width])
}

/// `r . h_j`, `[batch, kv_heads, group, blocks]`.
pub(crate) fn meta_scores(meta_query: Tensor<4>, meta_keys: Tensor<4>, kv_heads: usize) -> Tensor<4> {
    let [batch, heads, _, width] = meta_query.dims();
    let [_, key_heads, blocks, _] = meta_keys.dims();
    let query = meta_query.reshape([batch, key_heads, heads / key_heads, width]);
    query.matmul(meta_keys.swap_dims(2, 3)).reshape([batch, kv_heads, heads / kv_heads, blocks])
}

/// `scale q^T C` weighted by the far mass: `mass` is `[batch, kv_heads, group, tokens, 1]`.
pub(crate) fn read_mixed_state(tile: &Tile, mixture: Tensor<5>, mass: Tensor<5>, scale: f64) -> Tensor<5> {
    tile.query.clone().matmul(mixture) * mass * scale
}

/// How many blocks to process together when each needs `numbers_each` intermediate numbers.
fn blocks_at_once(numbers_each: usize) -> usize {
    (QUADRATIC_BUDGET / numbers_each.max(1)).max(1)
}
