//! Taking in and reading any number of chunks in one call of the fused kernel.

use burn::tensor::Tensor;

use super::{AttentionCache, CacheConfig};
use crate::{BlockAttentionConfig, buffer::RowBuffer, fused, statistics::Statistics};

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
            let means = |rows: &RowBuffer| fused::means(&rows.all(), block, sinks, new.clone());
            if let (Some(statistics), Some(keys), Some(values)) =
                (&mut self.statistics, means(&self.keys), means(&self.values))
            {
                let radii = attention
                    .needs_radii()
                    .then(|| fused::radii(&self.keys.all(), &keys, block, sinks, new.clone()))
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
        self.extend_section_means(attention, local_start);
        let rows = fused::Rows {
            keys: self.keys.all(),
            values: self.values.all(),
            first: 0,
            sinks: None,
            section_means: self.section_means.as_ref().map(|(keys, values, _)| (keys.all(), values.all())),
            radii: self.statistics.as_ref().filter(|statistics| statistics.len() > 0).and_then(Statistics::radii),
            section_radii: self.section_means.as_ref().and_then(|(.., radii)| radii.as_ref()).map(RowBuffer::all),
            means: self.statistics.as_ref().filter(|statistics| statistics.len() > 0).map(Statistics::means),
            near,
        };
        let output = fused::blocks(query, rows, attention, &self.config.options);
        output.unwrap_or_else(|| unreachable!("every tensor is on the same device and of the same type"))
    }

    /// Means and radii of the sections that lie so far back that they are scored as a whole.
    fn extend_section_means(&mut self, attention: &BlockAttentionConfig, local_start: usize) {
        let CacheConfig { batch, kv_heads, head_dim, dtype, .. } = self.config;
        let border = local_start.saturating_sub(attention.scored_finely()) / attention.section_tokens();
        let new = self.section_means.as_ref().map_or(0, |(keys, ..)| keys.len())..border;
        if new.is_empty() {
            return;
        }
        let means = |rows: &RowBuffer| {
            fused::means(&rows.all(), attention.section_tokens(), attention.sink_tokens, new.clone())
        };
        if let (Some(keys), Some(values)) = (means(&self.keys), means(&self.values)) {
            let device = keys.device();
            let buffer = || RowBuffer::new(batch, kv_heads, head_dim, 1, &device, dtype);
            let of_blocks =
                self.statistics.as_ref().and_then(|statistics| Some((statistics.means().0, statistics.radii()?)));
            let radii = of_blocks.and_then(|of_blocks| fused::section_radii(&keys, of_blocks, attention, new));
            let (all_keys, all_values, all_radii) =
                self.section_means.get_or_insert_with(|| (buffer(), buffer(), attention.needs_radii().then(buffer)));
            if let (Some(all_radii), Some(radii)) = (all_radii, radii) {
                all_radii.push(radii);
            }
            all_keys.push(keys);
            all_values.push(values);
        }
    }
}
