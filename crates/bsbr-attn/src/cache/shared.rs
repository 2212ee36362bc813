//! Attention of a layer over the keys and values of another.

use burn::tensor::Tensor;

use super::{AttentionCache, IndexState, check_shape};
use crate::{
    AttentionError, BlockAttentionConfig,
    buffer::in_type,
    full::full_causal,
    tile::{TileInput, attend_tile},
};
#[cfg(feature = "flex")]
use crate::{Kernel, fused};

impl AttentionCache {
    /// What the last tokens of `owner` read with queries of their own, `[batch, heads, tokens, head_dim]` to the same: attention
    /// under the settings of this cache, over keys and values, and an index of them, that are held there alone. These
    /// tokens are in there already. Nothing is kept here but the count of what was
    /// [retrieved](AttentionCache::retrieved).
    ///
    /// # Errors
    ///
    /// [`AttentionError::Shape`], [`AttentionError::Type`] or [`AttentionError::Device`] if the queries do not fit,
    /// [`AttentionError::Input`] if `owner` does not hold what these settings read: they have to be full attention, or `blocks`
    /// with an index, and the owner must have kept every key where it was, in heads of the same number and width, with an
    /// index where one is read.
    pub fn read_shared(&mut self, owner: &Self, query: Tensor<4>) -> Result<Tensor<4>, AttentionError> {
        let (own, held) = (&self.config, &owner.config);
        let tokens = query.dims()[2];
        check_shape("query", &query, [own.batch, own.heads, tokens, own.head_dim])?;
        self.check_kind("query", &query, false)?;
        let fail = |problem: String| Err(AttentionError::Input(problem));
        if (own.batch, own.kv_heads, own.head_dim) != (held.batch, held.kv_heads, held.head_dim) {
            return fail(format!(
                "the keys of another cache are shared: {} texts of {} heads of width {}, expected {} of {} of width {}",
                held.batch, held.kv_heads, held.head_dim, own.batch, own.kv_heads, own.head_dim
            ));
        }
        if tokens == 0 || tokens > owner.length {
            return fail(format!(
                "{tokens} queries read a cache that holds {} tokens, expected 1 up to that",
                owner.length
            ));
        }
        let whole = owner.start == 0 && owner.sinks.is_none() && owner.near.is_none();
        let attention = own.attention.clone();
        let indexed = attention.as_ref().is_none_or(BlockAttentionConfig::uses_index);
        let index = self.index.is_none() || owner.index.is_some();
        if !(whole && indexed && index) || self.far_positions.is_some() {
            return fail(
                "the cache whose keys are shared does not hold what these settings read: take the rows in".into(),
            );
        }
        let (given, query) = (query.dtype(), in_type(query, self.config.computed()));
        let output = match attention {
            None => self.read_all_of(owner, query),
            Some(attention) => self.read_blocks_of(owner, query, &attention),
        };
        Ok(in_type(output, given))
    }

    /// Full attention.
    fn read_all_of(&mut self, owner: &Self, query: Tensor<4>) -> Tensor<4> {
        let options = &self.config.options;
        #[cfg(feature = "flex")]
        if self.config.kernel == Kernel::Fastest
            && let Some(output) = fused::full_causal(&query, &owner.keys.stored(), &owner.values.stored(), options)
        {
            return output;
        }
        full_causal(query, owner.keys.all(), owner.values.all(), options, self.watch.as_mut())
    }

    /// Attention by the index of the owner.
    fn read_blocks_of(&mut self, owner: &Self, query: Tensor<4>, attention: &BlockAttentionConfig) -> Tensor<4> {
        let tokens = query.dims()[2];
        #[cfg(feature = "flex")]
        if owner.reads_fused(&query, attention) && self.config.kernel == Kernel::Fastest {
            let last = (owner.length - 1) / attention.chunk_size;
            if attention.candidates(last, &self.config.options).is_none() {
                return self.read_all_of(owner, query);
            }
            let rows = fused::Rows {
                keys: owner.keys.stored(),
                values: owner.values.stored(),
                first: 0,
                sinks: None,
                near: None,
                index: owner.index.as_ref().and_then(IndexState::fused),
            };
            let Some((output, retrieved)) = fused::blocks(query, rows, attention, &self.config.options) else {
                unreachable!("every tensor is on the same device and of the same type")
            };
            self.retrieved.count(retrieved);
            return output;
        }
        let (first, mut at) = (owner.length - tokens, 0);
        let mut outputs = Vec::new();
        while at < tokens {
            let start = first + at;
            let count = (attention.chunk_size - start % attention.chunk_size).min(tokens - at);
            let input = TileInput {
                query: query.clone().narrow(2, at, count),
                start,
                keys: &owner.keys,
                values: &owner.values,
                rows_start: 0,
                sinks: None,
                kept: None,
                index: owner.index.as_ref().and_then(IndexState::plain),
                statistics: None,
                chunk_query: None,
                gates: None,
                near: None,
            };
            let (output, chosen) = attend_tile(input, attention, &self.config.options, self.watch.as_mut());
            outputs.push(output);
            if let Some(chosen) = chosen {
                self.retrieved.add(chosen);
            }
            at += count;
        }
        Tensor::cat(outputs, 2)
    }
}
