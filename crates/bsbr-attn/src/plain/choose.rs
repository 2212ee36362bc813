//! Which blocks the tokens of a chunk read exactly with the `meta` selector.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::{MASKED, float_tensor};

/// How much more a block counts than the one before it where a whole chunk chooses: less than any real difference, more
/// than rounding. Blocks that end in the same token have the same meta key in the first layer, and rounding would choose.
const MORE_FOR_THE_NEXT: f64 = 1e-4;

/// The same choice for every token of the tile, `[batch, kv_heads, 1, count]`, from the scores
/// `[batch, kv_heads, group, blocks]` of the chunk's meta query against the blocks' meta keys; of blocks that score alike
/// the most recent.
pub(crate) fn choose_per_chunk(scores: Tensor<4>, scale: f64, count: usize) -> Tensor<4, Int> {
    let blocks = scores.dims()[3];
    let preference = (0..blocks).map(|block| (block as f64 * MORE_FOR_THE_NEXT) as f32).collect();
    let preference = float_tensor(preference, &scores.device(), scores.dtype()).reshape([1, 1, 1, blocks]);
    (scores.detach().sum_dim(2) * scale + preference).argtopk(count, 3)
}

/// Which blocks were chosen, as a mask to add to the logits of the far part: [`MASKED`] at the chosen ones.
///
/// `choice` is `[batch, kv_heads, choices, count]`; the result `[batch, kv_heads, 1, choices, blocks]`.
pub(super) fn chosen_mask(choice: Tensor<4, Int>, blocks: usize, like: &Tensor<5>) -> Tensor<5> {
    let [batch, kv_heads, choices, count] = choice.dims();
    let options = (&choice.device(), like.dtype());
    let chosen = Tensor::<4>::full([batch, kv_heads, choices, count], MASKED, options);
    let none = Tensor::<4>::zeros([batch, kv_heads, choices, blocks], options);
    none.scatter(3, choice, chosen, IndexingUpdateOp::Add).unsqueeze_dim(2)
}
