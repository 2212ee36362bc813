//! Taking in and reading any number of chunks in one call of the fused kernel.

use burn::tensor::Tensor;

use super::{AttentionCache, IndexState};
use crate::{BlockAttentionConfig, fused};

impl AttentionCache {
    /// [`AttentionCache::prefill`] where keys are chosen by an index, in one call of the fused kernel.
    pub(super) fn prefill_fused(
        &mut self,
        query: Tensor<4>,
        keys: Tensor<4>,
        values: Tensor<4>,
        near: Option<(Tensor<4>, Tensor<4>)>,
        attention: &BlockAttentionConfig,
    ) -> Tensor<4> {
        self.forget_near(attention.local_start(self.length / attention.chunk_size));
        self.push(keys, values);
        let near = near.and_then(|(query, keys)| {
            let near = self.near.as_mut()?;
            near.keys.push(keys);
            Some((query, near.keys.all(), near.first))
        });
        let last = (self.length - 1) / attention.chunk_size;
        if near.is_none() && attention.candidates(last, &self.config.options).is_none() {
            return self.read_all(query);
        }
        if let Some(index) = &mut self.index {
            index.extend(&self.keys, &self.values, attention.local_start(last));
        }
        let rows = fused::Rows {
            keys: self.keys.stored(),
            values: self.values.stored(),
            first: 0,
            sinks: None,
            near,
            index: self.index.as_ref().and_then(IndexState::fused),
        };
        let Some((output, retrieved)) = fused::blocks(query, rows, attention, &self.config.options) else {
            unreachable!("every tensor is on the same device and of the same type")
        };
        self.retrieved.count(retrieved);
        output
    }
}
