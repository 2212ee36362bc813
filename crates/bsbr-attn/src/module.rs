//! Attention with its projections, as a layer of burn.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor},
};

use crate::{
    AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Retrieval, Selector,
    attend,
};

/// Sizes and settings of a [`BlockAttention`].
#[derive(Debug, Clone, PartialEq)]
pub struct BlockAttentionLayer {
    /// Numbers of a token, in and out.
    pub width: usize,
    /// Query heads; divides `width`.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Base of the rotary embedding of queries and keys; `None` leaves positions to whoever makes the inputs.
    pub rotary_base: Option<f64>,
    /// BSBR attention; `None` is full causal attention. The `meta` selector needs projections that this layer does not have.
    pub attention: Option<BlockAttentionConfig>,
}

/// Causal self-attention with queries, keys, values and outputs by linear layers without bias: differentiable over whole texts, and
/// token by token with a cache.
#[derive(Module, Debug)]
pub struct BlockAttention {
    /// `[width]` to `[heads, head_dim]`.
    pub query: Linear,
    /// `[width]` to `[kv_heads, head_dim]`.
    pub key: Linear,
    /// `[width]` to `[kv_heads, head_dim]`.
    pub value: Linear,
    /// `[heads, head_dim]` to `[width]`.
    pub output: Linear,
    #[module(skip)]
    layer: BlockAttentionLayer,
}

impl BlockAttentionLayer {
    /// As many key and value heads as query heads, rotary embedding with a base of 10,000, default settings.
    pub fn new(width: usize, heads: usize) -> Self {
        Self {
            width,
            heads,
            kv_heads: heads,
            rotary_base: Some(10_000.0),
            attention: Some(BlockAttentionConfig::default()),
        }
    }

    /// A layer with random weights.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] for impossible sizes or settings.
    pub fn init(&self, device: &Device) -> Result<BlockAttention, AttentionError> {
        let fail = |setting, value: String, expected: &str| {
            Err(AttentionError::Config { setting, value, expected: expected.to_owned() })
        };
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) || self.width == 0 {
            return fail("heads", self.heads.to_string(), "a divisor of the width");
        }
        if self.rotary_base.is_some() && !self.head_dim().is_multiple_of(2) {
            return fail("head_dim", self.head_dim().to_string(), "an even number, to rotate pairs");
        }
        if let Some(attention) = &self.attention
            && (attention.selector == Selector::Meta || attention.retrieval == Retrieval::Additive)
        {
            return fail("attention", "meta or additive".into(), "the index or statistics, which need no projections");
        }
        // Checks heads and settings.
        AttentionCache::new(self.cache(1, DType::F32), device)?;
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).with_bias(false).init(device);
        let (inner, narrow) = (self.heads * self.head_dim(), self.kv_heads * self.head_dim());
        Ok(BlockAttention {
            query: linear(self.width, inner),
            key: linear(self.width, narrow),
            value: linear(self.width, narrow),
            output: linear(inner, self.width),
            layer: self.clone(),
        })
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads.max(1)
    }

    fn cache(&self, batch: usize, dtype: DType) -> CacheConfig {
        CacheConfig {
            batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim(),
            options: AttentionOptions::new(self.head_dim()),
            attention: self.attention.clone(),
            dtype,
            stored: dtype,
            kernel: Kernel::Fastest,
        }
    }
}

impl BlockAttention {
    /// Sizes and settings.
    pub fn layer(&self) -> &BlockAttentionLayer {
        &self.layer
    }

    /// Reads whole texts, `[batch, tokens, width]` to the same shape.
    ///
    /// # Errors
    ///
    /// As [`attend`].
    pub fn forward(&self, x: Tensor<3>) -> Result<Tensor<3>, AttentionError> {
        let [query, keys, values] = self.heads(x, 0);
        let options = AttentionOptions::new(self.layer.head_dim());
        let read = attend(query, keys, values, None, self.layer.attention.as_ref(), options)?;
        Ok(self.projected(read))
    }

    /// An empty cache for `batch` texts of one length.
    ///
    /// # Errors
    ///
    /// As [`AttentionCache::new`].
    pub fn new_cache(&self, batch: usize) -> Result<AttentionCache, AttentionError> {
        let weight = self.query.weight.val();
        AttentionCache::new(self.layer.cache(batch, weight.dtype()), &weight.device())
    }

    /// Reads the next tokens of texts whose beginning `cache` holds: the same as [`BlockAttention::forward`] of all of it.
    ///
    /// # Errors
    ///
    /// As [`AttentionCache::prefill`].
    pub fn step(&self, x: Tensor<3>, cache: &mut AttentionCache) -> Result<Tensor<3>, AttentionError> {
        let [query, keys, values] = self.heads(x, cache.len());
        Ok(self.projected(cache.prefill(query, keys, values, None)?))
    }

    /// Queries, keys and values by head, `[batch, heads, tokens, head_dim]`, rotated from position `first` on.
    fn heads(&self, x: Tensor<3>, first: usize) -> [Tensor<4>; 3] {
        let [batch, tokens, _] = x.dims();
        let width = self.layer.head_dim();
        let split = |x: Tensor<3>, heads| x.reshape([batch, tokens, heads, width]).swap_dims(1, 2);
        let query = split(self.query.forward(x.clone()), self.layer.heads);
        let keys = split(self.key.forward(x.clone()), self.layer.kv_heads);
        let values = split(self.value.forward(x), self.layer.kv_heads);
        match self.layer.rotary_base {
            Some(base) => {
                let rotation = rotation(base, first, tokens, width, &query.device());
                [rotated(query, &rotation), rotated(keys, &rotation), values]
            }
            None => [query, keys, values],
        }
    }

    fn projected(&self, read: Tensor<4>) -> Tensor<3> {
        let [batch, heads, tokens, width] = read.dims();
        self.output.forward(read.swap_dims(1, 2).reshape([batch, tokens, heads * width]))
    }
}

/// Cosines and sines, `[1, 1, tokens, head_dim / 2]` each.
fn rotation(base: f64, first: usize, tokens: usize, width: usize, device: &Device) -> [Tensor<4>; 2] {
    let half = width / 2;
    let angle = |at: usize| {
        let (token, pair) = (at / half.max(1), at % half.max(1));
        (first + token) as f64 * base.powf(-((2 * pair) as f64) / width as f64)
    };
    [f64::cos, f64::sin].map(|of: fn(f64) -> f64| {
        let numbers: Vec<f32> = (0..tokens * half).map(|at| of(angle(at)) as f32).collect();
        Tensor::<1>::from_floats(numbers.as_slice(), device).reshape([1, 1, tokens, half])
    })
}

/// Each pair of numbers half a head apart turned by its angle.
fn rotated(x: Tensor<4>, [cos, sin]: &[Tensor<4>; 2]) -> Tensor<4> {
    let width = x.dims()[3];
    let (a, b) = (x.clone().narrow(3, 0, width / 2), x.narrow(3, width / 2, width / 2));
    let turned = a.clone() * cos.clone() - b.clone() * sin.clone();
    Tensor::cat(vec![turned, a * sin.clone() + b * cos.clone()], 3)
}
