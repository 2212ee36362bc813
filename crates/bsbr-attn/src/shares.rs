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
    /// Numbers of the blocks: complete ones that end before the local region of the chunk.
    pub blocks: Range<usize>,
    /// Share of full attention that falls on the tokens of each block, sinks left out, as a mean over the tokens of the
    /// chunk, `[batch, heads, blocks]`.
    pub shares: Tensor<3>,
}

/// The attention that each chunk of a whole text pays to the blocks it could retrieve, from the first chunk that has any.
///
/// `query` is `[batch, heads, tokens, head_dim]`, `keys` `[batch, kv_heads, tokens, head_dim]`. The scores of one chunk
/// exist at a time.
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
        let first_seen = options.first_visible(start);
        let first = attention.sink_tokens.max(first_seen).div_ceil(block);
        let blocks = first..attention.local_start(chunk) / block;
        if blocks.is_empty() {
            return None;
        }
        let tile = Tile::new(query.clone().narrow(2, start, end - start), kv_heads, start);
        let seen = keys.clone().narrow(2, first_seen, end - first_seen);
        let part = contiguous_part(&tile, seen.clone(), seen, first_seen..end, options);
        let (from, width) = (blocks.start * block - first_seen, blocks.len() * block);
        let shares = softmax(part.logits, 4).narrow(4, from, width).mean_dim(3);
        let shares = shares.reshape([batch, heads, blocks.len(), block]).sum_dim(3);
        Some(ChunkShares { chunk, shares: shares.reshape([batch, heads, blocks.len()]), blocks })
    };
    (0..tokens.div_ceil(size)).filter_map(of_chunk).collect()
}
