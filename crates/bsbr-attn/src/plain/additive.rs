//! The published formula, made causal: a retrieved state added to the normalised local output.

use burn::tensor::Tensor;

use super::{Tile, far::mixed_state};
use crate::statistics::StatisticsView;

/// `q^T sum_j softmax_j(scale r . h_j) F_j` with `F_j = K_j^T V_j = n_j (C_j + mu_j vbar_j^T)`,
/// `[batch, kv_heads, group, tokens, head_dim]`. Not scaled and not normalised, as published.
pub(crate) fn retrieved_state(
    tile: &Tile,
    statistics: &StatisticsView,
    meta_query: Tensor<4>,
    meta_keys: Tensor<4>,
    scale: f64,
) -> Tensor<5> {
    let [batch, kv_heads, blocks, width] = statistics.mean_key.dims();
    let mean_key = statistics.mean_key.clone().reshape([batch, kv_heads, blocks, width, 1]);
    let mean_value = statistics.mean_value.clone().reshape([batch, kv_heads, blocks, 1, width]);
    let mut raw = mean_key.matmul(mean_value).reshape([batch, kv_heads, blocks, width * width]);
    if let Some(state) = &statistics.state {
        raw = raw + state.clone();
    }
    let counts: Vec<f32> = statistics.blocks.iter().map(|block| block.len() as f32).collect();
    let counts = super::float_tensor(counts, &raw.device(), raw.dtype()).reshape([1, 1, blocks, 1]);
    let mixture = mixed_state(meta_query, meta_keys, raw * counts, (&statistics.blocks, None), scale);
    tile.query.clone().matmul(mixture)
}
