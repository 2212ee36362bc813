//! Which blocks full attention reads: what a choice of blocks is to find.

use std::ops::Range;

use burn::tensor::{Tensor, activation::softmax};

use crate::{
    AttentionOptions, BlockAttentionConfig,
    plain::{Tile, contiguous_part},
};

/// The attention of one chunk to the blocks it could retrieve.
#[derive(Debug, Clone)]
pub struct ChunkShares {
    /// Number of the chunk.
    pub chunk: usize,
    /// Numbers of the blocks: complete ones that end before the local region of the chunk, those that it chooses from or mixes.
    pub blocks: Range<usize>,
    /// Share of full attention that falls on the tokens of each block, sinks left out, as a mean over the tokens of the
    /// chunk, `[batch, heads, blocks]`.
    pub shares: Tensor<3>,
}

/// The attention that each chunk of a whole text pays to the blocks it could retrieve, from the first chunk that has any: what
/// meta projections are calibrated by.
///
/// `query` is `[batch, heads, tokens, head_dim]`, `keys` `[batch, kv_heads, tokens, head_dim]`. The scores of one chunk
/// exist at a time.
///
/// # Panics
///
/// If keys or [sinks](AttentionOptions::sink_logits) do not fit the queries.
pub fn block_shares(
    query: &Tensor<4>,
    keys: &Tensor<4>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Vec<ChunkShares> {
    let [batch, heads, tokens, _] = query.dims();
    let kv_heads = keys.dims()[1];
    let (size, block) = (attention.chunk_size, attention.statistics_block());
    let of_chunk = |chunk: usize| {
        let (start, end) = (chunk * size, ((chunk + 1) * size).min(tokens));
        let blocks = attention.blocks_before(chunk, options);
        if blocks.is_empty() {
            return None;
        }
        let first_seen = options.first_visible(start);
        let tile = Tile::new(query.clone().narrow(2, start, end - start), kv_heads, start);
        let seen = keys.clone().narrow(2, first_seen, end - first_seen);
        let part = contiguous_part(&tile, seen.clone(), seen, first_seen..end, options);
        // Of the first block sinks do not count, and what no token of the chunk sees.
        let from = (blocks.start * block).max(first_seen).max(attention.sink_tokens);
        let to = blocks.end * block;
        let sinks = options.sink_column(&part.logits);
        let logits = Tensor::cat(std::iter::once(part.logits).chain(sinks).collect(), 4);
        let shares = softmax(logits, 4).narrow(4, from - first_seen, to - from).mean_dim(3);
        let shares = shares.reshape([batch, heads, to - from]);
        let missing = from - blocks.start * block;
        let none = Tensor::zeros([batch, heads, missing], (&shares.device(), shares.dtype()));
        let shares = if missing > 0 { Tensor::cat(vec![none, shares], 2) } else { shares };
        let shares = shares.reshape([batch, heads, blocks.len(), block]).sum_dim(3);
        Some(ChunkShares { chunk, shares: shares.reshape([batch, heads, blocks.len()]), blocks })
    };
    (0..tokens.div_ceil(size)).filter_map(of_chunk).collect()
}
