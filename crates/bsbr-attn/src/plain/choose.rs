//! Which blocks a token reads exactly.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::{MASKED, Tile, float_tensor};

/// The `top_k` blocks of each token and KV head, `[batch, kv_heads, tokens, top_k]`, numbered from 0 in `mass`.
///
/// `scores` are those of each block, `[batch, kv_heads, group, tokens, blocks]`, masked where the token may not read the
/// block; `exact` the log-mass of what it reads exactly, `[batch, kv_heads, group, tokens, 1]`. The heads of a group share a
/// choice: a block counts by the highest of its scores, each relative to what the head reads exactly. Needs more than
/// `top_k` blocks.
pub(crate) fn choose_per_token(scores: Tensor<5>, exact: Tensor<5>, top_k: usize) -> Tensor<4, Int> {
    let [batch, kv_heads, _, tokens, blocks] = scores.dims();
    let score = (scores - exact).max_dim(2);
    score.detach().reshape([batch, kv_heads, tokens, blocks]).argtopk(top_k, 3)
}

/// What the radii of blocks add to their scores, `reach scale sum_c |q_c| r_c`, `[batch, kv_heads, group, tokens, blocks]`.
/// (With a reach of 1 no key of a block scores more than its mean key and this: Quest, Tang et al. 2024, about the mean.)
pub(crate) fn reach(tile: &Tile, radius: Tensor<4>, factor: f64) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, _] = tile.query.dims();
    let blocks = radius.dims()[2];
    let reach = tile.flat().abs().matmul(radius.swap_dims(2, 3)) * factor;
    reach.reshape([batch, kv_heads, group, tokens, blocks])
}

/// How much more a block counts than the one before it where a whole chunk chooses: less than any real difference, more
/// than rounding. Blocks that end in the same token have the same meta key in the first layer, and rounding would choose.
const MORE_FOR_THE_NEXT: f64 = 1e-4;

/// The same choice for every token of the tile, `[batch, kv_heads, 1, top_k]`, from the scores
/// `[batch, kv_heads, group, blocks]` of the chunk's meta query against the blocks' meta keys; of blocks that score alike
/// the most recent.
pub(crate) fn choose_per_chunk(scores: Tensor<4>, scale: f64, top_k: usize) -> Tensor<4, Int> {
    let blocks = scores.dims()[3];
    let preference = (0..blocks).map(|block| (block as f64 * MORE_FOR_THE_NEXT) as f32).collect();
    let preference = float_tensor(preference, &scores.device(), scores.dtype()).reshape([1, 1, 1, blocks]);
    (scores.detach().sum_dim(2) * scale + preference).argtopk(top_k, 3)
}

/// Which blocks were chosen, as a mask to add to the logits of the far part: [`MASKED`] at the chosen ones.
///
/// `choice` is `[batch, kv_heads, choices, top_k]`; the result `[batch, kv_heads, 1, choices, blocks]`.
pub(super) fn chosen_mask(choice: Tensor<4, Int>, blocks: usize, like: &Tensor<5>) -> Tensor<5> {
    let [batch, kv_heads, choices, top_k] = choice.dims();
    let options = (&choice.device(), like.dtype());
    let chosen = Tensor::<4>::full([batch, kv_heads, choices, top_k], MASKED, options);
    let none = Tensor::<4>::zeros([batch, kv_heads, choices, blocks], options);
    none.scatter(3, choice, chosen, IndexingUpdateOp::Add).unsqueeze_dim(2)
}

/// Which blocks were not chosen, as a mask to add to their logits: [`MASKED`] at those. Arguments and shape as
/// [`chosen_mask`].
pub(crate) fn unchosen_mask(choice: Tensor<4, Int>, blocks: usize, like: &Tensor<5>) -> Tensor<5> {
    let [batch, kv_heads, choices, top_k] = choice.dims();
    let options = (&choice.device(), like.dtype());
    let chosen = Tensor::<4>::full([batch, kv_heads, choices, top_k], -MASKED, options);
    let all = Tensor::<4>::full([batch, kv_heads, choices, blocks], MASKED, options);
    all.scatter(3, choice, chosen, IndexingUpdateOp::Add).unsqueeze_dim(2)
}
