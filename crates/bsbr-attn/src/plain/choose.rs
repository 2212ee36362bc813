//! Which blocks a token reads exactly.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::{MASKED, Part, log_mass};

/// The `top_k` blocks of each token and KV head, `[batch, kv_heads, tokens, top_k]`, numbered from 0 in `mass`.
///
/// `mass` is the estimated log-mass of each block, `[batch, kv_heads, group, tokens, blocks]`, masked where the token may
/// not read the block; `exact` is what the token reads anyway.
/// The heads of a group share a choice: a block counts by the sum of the shares of attention it has in each of them.
/// Needs more than `top_k` blocks.
pub(crate) fn choose_per_token(mass: Tensor<5>, exact: &[Part], top_k: usize) -> Tensor<4, Int> {
    let [batch, kv_heads, group, tokens, blocks] = mass.dims();
    let score = if group == 1 {
        mass
    } else {
        let exact_mass = log_mass(exact);
        let highest = mass.clone().max_dim(4).max_pair(exact_mass.clone());
        let weight = (mass - highest.clone()).exp();
        let total = weight.clone().sum_dim(4) + (exact_mass - highest).exp();
        (weight / total).sum_dim(2)
    };
    score.detach().reshape([batch, kv_heads, tokens, blocks]).argtopk(top_k, 3)
}

/// The same choice for every token of the tile, `[batch, kv_heads, 1, top_k]`, from the scores
/// `[batch, kv_heads, group, blocks]` of the chunk's meta query against the blocks' meta keys.
pub(crate) fn choose_per_chunk(scores: Tensor<4>, top_k: usize) -> Tensor<4, Int> {
    scores.detach().sum_dim(2).argtopk(top_k, 3)
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
