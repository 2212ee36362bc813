//! Full causal attention: what the original model computes.

use burn::tensor::Tensor;

use crate::{
    AttentionOptions,
    plain::{Tile, combine, contiguous_part},
    seen::Watch,
};

/// Queries handled together. The scores of one tile are `heads x QUERY_TILE x keys` numbers, and tiles above the
/// diagonal are never computed.
const QUERY_TILE: usize = 128;

/// Causal attention of `query` `[batch, heads, n, head_dim]` over `keys` and `values` `[batch, kv_heads, m, head_dim]`,
/// `m >= n`: the queries are the last `n` of the `m` positions. Returns `[batch, heads, n, head_dim]`.
pub(crate) fn full_causal(
    query: Tensor<4>,
    keys: Tensor<4>,
    values: Tensor<4>,
    options: &AttentionOptions,
    mut watch: Option<&mut Watch>,
) -> Tensor<4> {
    let [batch, heads, tokens, width] = query.dims();
    let [_, kv_heads, length, _] = keys.dims();
    let first = length - tokens;
    let tiles = (0..tokens).step_by(QUERY_TILE).map(|at| {
        let count = QUERY_TILE.min(tokens - at);
        let tile = Tile::new(query.clone().narrow(2, at, count), kv_heads, first + at);
        let seen = options.first_visible(tile.start)..first + at + count;
        let of = |rows: &Tensor<4>| rows.clone().narrow(2, seen.start, seen.len());
        let part = contiguous_part(&tile, of(&keys), of(&values), seen.clone(), options);
        combine(vec![part], None, options, (tile.start, watch.as_deref_mut())).0.reshape([batch, heads, count, width])
    });
    Tensor::cat(tiles.collect(), 2)
}
