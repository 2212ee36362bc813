//! Attention of whole texts, without a cache to keep.

use burn::tensor::Tensor;

use crate::{AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Meta};

/// Attention of whole texts: `query` `[batch, heads, tokens, head_dim]`, `keys` and `values`
/// `[batch, kv_heads, tokens, head_dim]`, to `[batch, heads, tokens, head_dim]`. Differentiable in all three.
///
/// `attention = None` is full causal attention. With the `meta` selector, `meta` holds one query for each chunk
/// (`tokens / chunk_size`, rounded up) and one key for each complete block.
///
/// # Errors
///
/// [`AttentionError`] if settings or shapes do not fit.
pub fn attend(
    query: Tensor<4>,
    keys: Tensor<4>,
    values: Tensor<4>,
    meta: Option<Meta>,
    attention: Option<&BlockAttentionConfig>,
    options: AttentionOptions,
) -> Result<Tensor<4>, AttentionError> {
    let [batch, heads, _, head_dim] = query.dims();
    let config = CacheConfig {
        batch,
        heads,
        kv_heads: keys.dims()[1],
        head_dim,
        options,
        attention: attention.cloned(),
        dtype: query.dtype(),
        stored: query.dtype(),
        kernel: Kernel::default(),
    };
    let mut cache = AttentionCache::new(config, &query.device())?;
    cache.check_inputs(&query, &keys, &values, meta.as_ref())?;
    #[cfg(feature = "flex")]
    if let Some(output) = crate::fused::whole::attend(&query, &keys, &values, attention, &options) {
        return Ok(output);
    }
    cache.prefill(query, keys, values, meta)
}
