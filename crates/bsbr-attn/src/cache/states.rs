//! Making the statistics of a cache, with a calibrated basis or without.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::{AttentionCache, CacheConfig};
use crate::{
    AttentionError, BlockAttentionConfig, Retrieval,
    buffer::in_type,
    compress::Compression,
    statistics::{Kept, Sizes, Statistics},
};

/// Blocks beyond which room is not made in advance.
const MOST_ROOM: usize = 256;

impl AttentionCache {
    /// The empty cache with a basis for its states: `[kv_heads, head_dim, head_dim]`, orthonormal columns, those that hold
    /// most of the states first.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Shape`] if the basis does not fit, [`AttentionError::Input`] if the cache is not empty or its
    /// settings [use none](BlockAttentionConfig::needs_state_basis).
    pub fn with_state_basis(mut self, basis: Tensor<3>) -> Result<Self, AttentionError> {
        let CacheConfig { kv_heads, head_dim, .. } = self.config;
        let expected = [kv_heads, head_dim, head_dim];
        if basis.dims() != expected {
            let (expected, found) = (format!("{expected:?}"), basis.dims().to_vec());
            return Err(AttentionError::Shape { tensor: "state basis", expected, found });
        }
        let used = self.config.attention.as_ref().is_some_and(BlockAttentionConfig::needs_state_basis);
        if !self.is_empty() || !used {
            let problem = if used { "a basis must be given before the first token" } else { "no state uses a basis" };
            return Err(AttentionError::Input(problem.into()));
        }
        let basis = in_type(basis, self.config.computed());
        self.statistics = new_statistics(&self.config, Some(basis.clone()), &basis.device());
        self.has_basis = true;
        Ok(self)
    }

    /// The empty cache with a [sink](crate::AttentionOptions::sink_logits) for each query head in its options.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] if there are more or fewer than heads, or one that is not finite; [`AttentionError::Input`] if the
    /// cache is not empty.
    pub fn with_sink_logits(mut self, sinks: Arc<[f32]>) -> Result<Self, AttentionError> {
        if !self.is_empty() {
            return Err(AttentionError::Input("sinks must be given before the first token".into()));
        }
        self.config.options.sink_logits = Some(sinks);
        self.config.validate()?;
        Ok(self)
    }

    /// The empty cache with a gate for each query head, `[heads]`.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Shape`] if there are more or fewer, [`AttentionError::Input`] if the cache is not empty or its settings
    /// [use none](BlockAttentionConfig::needs_gates).
    pub fn with_gates(mut self, gates: Tensor<1>) -> Result<Self, AttentionError> {
        if gates.dims() != [self.config.heads] {
            let (expected, found) = (format!("{:?}", [self.config.heads]), gates.dims().to_vec());
            return Err(AttentionError::Shape { tensor: "gates", expected, found });
        }
        let used = self.config.attention.as_ref().is_some_and(BlockAttentionConfig::needs_gates);
        if !self.is_empty() || !used {
            let problem = if used { "gates must be given before the first token" } else { "no head has a gate" };
            return Err(AttentionError::Input(problem.into()));
        }
        self.gates = Some(in_type(gates, self.config.computed()));
        Ok(self)
    }
}

/// Empty statistics where the settings keep any, compressed along `basis` where there is one.
pub(super) fn new_statistics(config: &CacheConfig, basis: Option<Tensor<3>>, device: &Device) -> Option<Statistics> {
    let attention = config
        .attention
        .as_ref()
        .filter(|attention| attention.retrieval != Retrieval::None && !attention.uses_index())?;
    let CacheConfig { batch, heads, kv_heads, head_dim, ref options, .. } = *config;
    let dtype = config.computed();
    let compression = Compression::new(attention.compression_factor);
    let kept = Kept {
        state: attention.needs_states(),
        covariance: attention.needs_covariance(),
        meta_key: attention.needs_meta(),
        places: attention.kept_tokens > 0 && (options.window.is_some() || options.alibi.is_some()),
        // One more than are kept, until they are merged.
        room: attention.max_chunks.map_or(1, |limit| limit.saturating_add(1).min(MOST_ROOM)),
        compression: match basis {
            Some(basis) => compression.along(basis),
            None => compression,
        },
    };
    Some(Statistics::new(Sizes { batch, heads, kv_heads, head_dim, dtype }, kept, device))
}
