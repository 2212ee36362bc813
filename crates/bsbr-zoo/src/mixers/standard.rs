//! Causal softmax attention, the yardstick: `o_t = sum_{i <= t} softmax_i(q_t . k_i / sqrt(d)) v_i` (Vaswani et al. 2017).
//!
//! Parallel through [`attend`], whose fused kernel keeps no scores for the backward pass; recurrent through an
//! [`AttentionCache`] of every key and value.

use bsbr_attn::{AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, attend};
use burn::{module::Module, tensor::Tensor};

use crate::{
    DecoderConfig, ZooError,
    heads::{Projections, Rotation},
    init::Init,
};

/// Softmax attention of a whole text; with settings, BSBR attention.
#[derive(Module, Debug)]
pub(crate) struct Softmax {
    projections: Projections,
    #[module(skip)]
    attention: Option<BlockAttentionConfig>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    head_dim: usize,
}

impl Softmax {
    pub(crate) fn new(
        config: &DecoderConfig,
        attention: Option<BlockAttentionConfig>,
        name: &str,
        init: &Init,
    ) -> Self {
        let projections = Projections::new(config, name, init);
        Self { projections, attention, heads: config.heads, head_dim: config.head_dim() }
    }

    pub(crate) fn forward(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Result<Tensor<3>, ZooError> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        let options = AttentionOptions::new(self.head_dim);
        Ok(self.projections.output(attend(query, keys, values, None, self.attention.as_ref(), options)?))
    }

    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> Result<AttentionCache, ZooError> {
        let config = CacheConfig {
            batch,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_dim,
            options: AttentionOptions::new(self.head_dim),
            attention: self.attention.clone(),
            dtype: like.dtype(),
            stored: like.dtype(),
            kernel: Kernel::default(),
        };
        Ok(AttentionCache::new(config, &like.device())?)
    }

    pub(crate) fn step(
        &self,
        x: Tensor<3>,
        rotation: Option<&Rotation>,
        cache: &mut AttentionCache,
    ) -> Result<Tensor<3>, ZooError> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        Ok(self.projections.output(cache.prefill(query, keys, values, None)?))
    }
}
