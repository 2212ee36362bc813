//! Inputs that do not fit a cache.

use burn::tensor::{DType, Tensor};

use super::{AttentionCache, CacheConfig, Meta};
use crate::{AttentionError, BlockAttentionConfig};

impl AttentionCache {
    /// The errors of [`AttentionCache::prefill`].
    pub(crate) fn check_inputs(
        &self,
        query: &Tensor<4>,
        keys: &Tensor<4>,
        values: &Tensor<4>,
        meta: Option<&Meta>,
    ) -> Result<(), AttentionError> {
        let CacheConfig { batch, heads, head_dim, .. } = self.config;
        check_shape("query", query, [batch, heads, keys.dims()[2], head_dim])?;
        self.check_rows(keys, values, meta)?;
        self.check_kind("query", query, false)
    }

    pub(super) fn check_rows(
        &self,
        keys: &Tensor<4>,
        values: &Tensor<4>,
        meta: Option<&Meta>,
    ) -> Result<(), AttentionError> {
        let CacheConfig { batch, heads, kv_heads, head_dim, .. } = self.config;
        let tokens = keys.dims()[2];
        if tokens == 0 {
            return Err(AttentionError::Shape {
                tensor: "keys",
                expected: "at least one token".into(),
                found: keys.dims().to_vec(),
            });
        }
        check_shape("keys", keys, [batch, kv_heads, tokens, head_dim])?;
        check_shape("values", values, [batch, kv_heads, tokens, head_dim])?;
        self.check_kind("keys", keys, true)?;
        self.check_kind("values", values, true)?;
        if !self.has_basis && self.config.attention.as_ref().is_some_and(BlockAttentionConfig::needs_state_basis) {
            let problem = "calibrated_states needs a basis for the states, none was given: see with_state_basis";
            return Err(AttentionError::Input(problem.into()));
        }
        if self.gates.is_none() && self.config.attention.as_ref().is_some_and(BlockAttentionConfig::needs_gates) {
            let problem = "head_gates needs a gate for each query head, none were given: see with_gates";
            return Err(AttentionError::Input(problem.into()));
        }
        let wanted = self.config.attention.as_ref().is_some_and(BlockAttentionConfig::needs_meta);
        match meta {
            Some(meta) if wanted => {
                let check = |tensor, found: &Option<Tensor<4>>, count| match found {
                    Some(found) => check_shape(tensor, found, [batch, heads, count, head_dim])
                        .and_then(|()| self.check_kind(tensor, found, true)),
                    None if count == 0 => Ok(()),
                    None => Err(AttentionError::Input(format!("`{tensor}` is missing, expected {count} tokens"))),
                };
                check("meta.query", &meta.query, self.chunk_starts(tokens).len())?;
                check("meta.key", &meta.key, self.block_ends(tokens).len())
            }
            None if !wanted => Ok(()),
            Some(_) => Err(AttentionError::Input(
                "meta inputs were given, but nothing reads them: that takes selector = meta and a retrieval".into(),
            )),
            None => Err(AttentionError::Input("selector = meta needs meta queries and keys, none were given".into())),
        }
    }
}

impl AttentionCache {
    /// Type and device of an input; `or_narrower` where f16 and bf16 will do as well.
    pub(super) fn check_kind(
        &self,
        tensor: &'static str,
        found: &Tensor<4>,
        or_narrower: bool,
    ) -> Result<(), AttentionError> {
        let dtype = self.config.dtype;
        let narrower = or_narrower && matches!(found.dtype(), DType::F16 | DType::BF16);
        if found.dtype() != dtype && !narrower {
            let expected = if or_narrower { format!("{dtype:?}, F16 or BF16") } else { format!("{dtype:?}") };
            return Err(AttentionError::Type { tensor, expected, found: format!("{:?}", found.dtype()) });
        }
        let (here, device) = (self.keys.device(), found.device());
        if device != here {
            let (expected, found) = (format!("{here:?}"), format!("{device:?}"));
            return Err(AttentionError::Device { tensor, expected, found });
        }
        Ok(())
    }
}

pub(crate) fn check_shape(tensor: &'static str, found: &Tensor<4>, expected: [usize; 4]) -> Result<(), AttentionError> {
    if found.dims() == expected {
        return Ok(());
    }
    Err(AttentionError::Shape { tensor, expected: format!("{expected:?}"), found: found.dims().to_vec() })
}
