//! Keys that are read exactly: runs of positions, and the blocks a token chose.

use std::ops::Range;

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::{MASKED, Part, Tile, Values, biased, by_choice, by_set, int_tensor, scores};
use crate::{AttentionOptions, buffer::RowBuffer, seen::Columns};

/// The keys at `positions`, given as `[batch, kv_heads, positions, head_dim]`: each token sees those up to itself and
/// inside the model's own window.
pub(crate) fn contiguous_part(
    tile: &Tile,
    keys: Tensor<4>,
    values: Tensor<4>,
    positions: Range<usize>,
    options: &AttentionOptions,
) -> Part {
    let logits = biased(tile, scores(tile, keys, options), positions.clone().map(|at| at as f64), options);
    let all_visible = options.window.is_none() && positions.end <= tile.start + 1;
    let mask = (!all_visible).then(|| {
        tile.mask(positions.len(), |token, column| {
            let position = positions.start + column;
            position <= tile.start + token && position >= options.first_visible(tile.start + token)
        })
    });
    Part { logits: masked(logits, mask.flatten()), values: Values::Shared(values), columns: Columns::Near(positions) }
}

/// The tokens of the chosen blocks.
///
/// `choice` is `[batch, kv_heads, choices, top_k]`, block numbers counted from position 0 of the buffers; `choices` is
/// the number of tokens of the tile, or 1 where all of them read the same blocks. Positions before `first` (sinks, read
/// elsewhere) and outside the window are masked.
pub(crate) fn chosen_part(
    tile: &Tile,
    (keys, values): (&RowBuffer, &RowBuffer),
    choice: Tensor<4, Int>,
    block: usize,
    first: usize,
    options: &AttentionOptions,
) -> Part {
    let [batch, kv_heads, group, tokens, width] = tile.query.dims();
    let [_, _, choices, top_k] = choice.dims();
    let device = choice.device();
    let (sets, columns) = (batch * kv_heads * choices, top_k * block);

    // Which rows of the buffers, seen as one row for each block of each (batch, head) pair.
    let blocks_of_pair = keys.room() / block;
    let pair_start = int_tensor((0..batch * kv_heads).map(|pair| pair * blocks_of_pair), &device);
    let rows = choice.clone() + pair_start.reshape([batch, kv_heads, 1, 1]);
    let rows = rows.reshape([sets * top_k]);
    let gather = |buffer: &RowBuffer| buffer.groups(block, rows.clone()).reshape([sets, columns, width]);
    let (chosen_keys, chosen_values) = (gather(keys), gather(values));

    let query = by_set(tile.query.clone(), choices);
    let logits = options.capped(query.matmul(chosen_keys.swap_dims(1, 2)) * options.scale);
    let columns_of = Columns::Blocks(choice.clone(), block);
    let mut logits = by_choice(logits, [batch, kv_heads, group, tokens, columns], choices);

    let hides = options.window.is_some() || !first.is_multiple_of(block);
    if hides || options.alibi.is_some() {
        let within = int_tensor(0..block, &device).reshape([1, 1, 1, 1, block]);
        let position =
            (choice.unsqueeze_dim::<5>(4) * block as i32 + within).reshape([batch, kv_heads, 1, choices, columns]);
        let shape = [batch, kv_heads, 1, tokens, columns];
        let position = position.expand(shape);
        if let Some(slopes) = options.slopes(kv_heads, group, &logits) {
            let token = int_tensor((0..tokens).map(|token| tile.start + token), &device).reshape([1, 1, 1, tokens, 1]);
            let distance = position.clone() - token.expand(shape);
            logits = logits + distance.float().cast(tile.query.dtype()) * slopes;
        }
        let bounds = (0..tokens).map(|token| options.first_visible(tile.start + token).max(first));
        let bound = int_tensor(bounds, &device).reshape([1, 1, 1, tokens, 1]);
        if hides {
            let hidden = position.lower(bound.expand(shape));
            logits = logits + hidden.float().cast(tile.query.dtype()) * MASKED;
        }
    }
    Part { logits, values: Values::PerChoice(chosen_values), columns: columns_of }
}

/// The same as [`chosen_part`] by way of every candidate: all of them are scored, those not chosen are masked.
///
/// `keys` and `values` `[batch, kv_heads, positions, head_dim]` are the candidates' tokens, sinks left out; `choice`
/// numbers the blocks from the one at `positions.start`.
pub(crate) fn masked_candidates_part(
    tile: &Tile,
    keys: Tensor<4>,
    values: Tensor<4>,
    choice: Tensor<4, Int>,
    block: usize,
    positions: Range<usize>,
    options: &AttentionOptions,
) -> Part {
    let [batch, kv_heads, choices, top_k] = choice.dims();
    let first_block = positions.start / block;
    let blocks = positions.end / block - first_block;
    let like = (&choice.device(), keys.dtype());
    let hidden = Tensor::<4>::full([batch, kv_heads, choices, blocks], MASKED, like);
    let shown = Tensor::<4>::full([batch, kv_heads, choices, top_k], -MASKED, like);
    let hidden = hidden.scatter(3, choice, shown, IndexingUpdateOp::Add).unsqueeze_dim::<5>(4);
    let hidden = hidden.expand([batch, kv_heads, choices, blocks, block]);
    let hidden = hidden.reshape([batch, kv_heads, 1, choices, blocks * block]);
    let hidden = hidden.narrow(4, positions.start - first_block * block, positions.len());
    let part = contiguous_part(tile, keys, values, positions.clone(), options);
    Part { logits: part.logits + hidden, values: part.values, columns: Columns::Chosen(positions) }
}

pub(super) fn masked(logits: Tensor<5>, mask: Option<Tensor<5>>) -> Tensor<5> {
    match mask {
        Some(mask) => logits + mask,
        None => logits,
    }
}
