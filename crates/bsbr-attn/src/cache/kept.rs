//! What becomes of tokens that leave the local region where some are kept.

use std::ops::Range;

use super::AttentionCache;
use crate::{BlockAttentionConfig, buffer::RowBuffer, kept::Watched, plain::contiguous_part};

impl AttentionCache {
    /// Tokens from the start of the rows up to `local_start` are kept, or enter statistics.
    pub(super) fn choose_kept(&mut self, attention: &BlockAttentionConfig, local_start: usize) {
        let leaving = self.start.max(attention.sink_tokens).min(local_start)..local_start;
        let (Some(kept), Some(statistics)) = (&mut self.kept, &mut self.statistics) else { return };
        if leaving.is_empty() {
            return;
        }
        let options = &self.config.options;
        let tile = kept.watchers(self.config.kv_heads, self.length);
        let of = |rows: &RowBuffer, range: Range<usize>| rows.range(range.start - self.start, range.end - self.start);
        let part = |range: Range<usize>| {
            contiguous_part(&tile, of(&self.keys, range.clone()), of(&self.values, range.clone()), range, options)
        };
        let mut others = Vec::with_capacity(2);
        if let Some((keys, values)) = &self.sinks {
            others.push(contiguous_part(&tile, keys.clone(), values.clone(), 0..keys.dims()[2], options));
        }
        if self.start < leaving.start {
            others.push(part(self.start..leaving.start));
        }
        let watched = Watched {
            others,
            rows: part(leaving.start..self.length),
            leaving: (of(&self.keys, leaving.clone()), of(&self.values, leaving.clone()), leaving),
        };
        if let Some(gone) = kept.choose(&tile, watched, self.length, options)
            && attention.max_chunks != Some(0)
        {
            statistics.push_tokens(&gone, attention.block_size, attention.max_chunks);
        }
    }
}
