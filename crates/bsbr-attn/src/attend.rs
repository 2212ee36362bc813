//! Attention of whole texts, without a cache to keep.

use burn::tensor::Tensor;

use crate::{
    AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Meta, buffer::in_type,
    cache::type_of_computation,
};

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
    let given = query.dtype();
    let computed = type_of_computation(given);
    let query = in_type(query, computed);
    let config = CacheConfig {
        batch,
        heads,
        kv_heads: keys.dims()[1],
        head_dim,
        options,
        attention: attention.cloned(),
        dtype: computed,
        stored: computed,
        kernel: Kernel::default(),
    };
    let mut cache = AttentionCache::new(config, &query.device())?;
    cache.check_inputs(&query, &keys, &values, meta.as_ref())?;
    let [keys, values] = [keys, values].map(|rows| in_type(rows, computed));
    #[cfg(feature = "flex")]
    if let Some(output) = crate::fused::whole::attend(&query, &keys, &values, attention, &cache.config().options) {
        return Ok(in_type(output, given));
    }
    cache.reserve(keys.dims()[2]);
    Ok(in_type(cache.prefill_checked(query, keys, values, meta), given))
}
