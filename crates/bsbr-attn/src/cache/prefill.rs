//! Taking in and reading any number of chunks in one call of the fused kernel.

use burn::tensor::Tensor;

use super::{AttentionCache, CacheConfig};
use crate::{BlockAttentionConfig, buffer::RowBuffer, fused};

impl AttentionCache {
    /// [`AttentionCache::prefill`] under `retrieval = blocks` in one call of the fused kernel.
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
        let local_start = attention.local_start((self.length - 1) / attention.chunk_size);
        let summarised = (local_start / attention.block_size).max(self.summarised);
        let new = self.summarised..summarised;
        if !new.is_empty() {
            let (block, sinks) = (attention.block_size, attention.sink_tokens);
            let means = |rows: &RowBuffer| fused::means(&rows.stored(), block, sinks, new.clone());
            if let (Some(statistics), Some(keys), Some(values)) =
                (&mut self.statistics, means(&self.keys), means(&self.values))
            {
                let radii = attention
                    .needs_radii()
                    .then(|| fused::radii(&self.keys.stored(), &keys, block, sinks, new.clone()))
                    .flatten();
                statistics.push_means(
                    new.map(|at| (at * block).max(sinks).min((at + 1) * block)..(at + 1) * block),
                    keys,
                    values,
                    radii,
                );
            }
            self.summarised = summarised;
        }
        if near.is_none() && attention.reads_everything(self.length) {
            return self.read_all(query);
        }
        let rows = fused::Rows {
            keys: self.keys.stored(),
            values: self.values.stored(),
            first: 0,
            sinks: None,
            means: self.means(attention, local_start),
            near,
        };
        let output = fused::blocks(query, rows, attention, &self.config.options);
        output.unwrap_or_else(|| unreachable!("every tensor is on the same device and of the same type"))
    }

    /// Means of blocks, and of the longer runs that stand for them before the local region.
    fn means(&mut self, attention: &BlockAttentionConfig, local_start: usize) -> Vec<fused::Means> {
        let Some(statistics) = self.statistics.as_ref().filter(|statistics| statistics.len() > 0) else {
            return Vec::new();
        };
        let ((keys, values), radii) = (statistics.means(), statistics.radii());
        let of_blocks = radii.clone().map(|radii| (keys.clone(), radii));
        let mut means = vec![fused::Means { keys, values, radii }];
        let CacheConfig { batch, kv_heads, head_dim, dtype, .. } = self.config;
        for (at, level) in attention.coarse().into_iter().enumerate() {
            if at == self.coarse_means.len() {
                let device = self.keys.device();
                let buffer = || RowBuffer::new(batch, kv_heads, head_dim, 1, &device, dtype);
                let radii = of_blocks.is_some().then(buffer);
                self.coarse_means.push((buffer(), buffer(), radii));
            }
            let (all_keys, all_values, all_radii) = &mut self.coarse_means[at];
            let new = all_keys.len()..local_start.saturating_sub(level.beyond) / level.size;
            if !new.is_empty() {
                let of =
                    |rows: &RowBuffer| fused::means(&rows.stored(), level.size, attention.sink_tokens, new.clone());
                let (Some(keys), Some(values)) = (of(&self.keys), of(&self.values)) else { break };
                if let (Some(radii), Some(of_blocks)) = (&mut *all_radii, &of_blocks)
                    && let Some(new) = fused::run_radii(&keys, of_blocks, attention, level.size, new)
                {
                    radii.push(new);
                }
                all_keys.push(keys);
                all_values.push(values);
            }
            if all_keys.len() == 0 {
                break;
            }
            let radii = all_radii.as_ref().map(RowBuffer::all);
            means.push(fused::Means { keys: all_keys.all(), values: all_values.all(), radii });
        }
        means
    }
}
