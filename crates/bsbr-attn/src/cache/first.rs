//! The beginning of a text as a text of its own.

use super::{AttentionCache, CacheConfig};
use crate::{Retrieval, index::Counter};

impl AttentionCache {
    /// The cache as it was, bit for bit, when it held the first `tokens` tokens: nothing is read again, and memory is shared until
    /// either of the two grows. What was [retrieved](AttentionCache::retrieved) is counted from here on.
    ///
    /// `None` where that is not known any more: of settings that keep statistics or chosen tokens in place of keys, or that use
    /// meta keys; where tokens were dropped, or moved to positions [further back](crate::FarPositions); where the index of the keys
    /// is founded on more tokens than these, and where it is in plain tensors (on a GPU). All tokens can be had of every cache.
    pub fn first(&self, tokens: usize) -> Option<Self> {
        if tokens == self.length {
            return Some(Self { retrieved: Counter::default(), ..self.clone() });
        }
        let Self { config, length, start, sinks, statistics, kept, chunk_query, far_positions, .. } = self;
        let whole = *start == 0 && sinks.is_none();
        let plain = statistics.is_none() && kept.is_none() && chunk_query.is_none() && far_positions.is_none();
        if tokens > *length || !whole || !plain || !keeps_keys(config) {
            return None;
        }
        let index = match (&self.index, &config.attention) {
            (Some(index), Some(attention)) => {
                let before = attention.local_start(tokens.saturating_sub(1) / attention.chunk_size);
                Some(index.first(tokens, before)?)
            }
            _ => None,
        };
        Some(Self {
            config: config.clone(),
            length: tokens,
            keys: self.keys.first(tokens),
            values: self.values.first(tokens),
            index,
            retrieved: Counter::default(),
            gates: self.gates.clone(),
            sinks: None,
            statistics: None,
            kept: None,
            chunk_query: None,
            pending_meta_keys: Vec::new(),
            far_positions: None,
            near: None,
            watch: None,
            ..*self
        })
    }
}

/// Whether nothing is kept but keys, values and an index of them.
fn keeps_keys(config: &CacheConfig) -> bool {
    let attention = config.attention.as_ref();
    attention.is_none_or(|attention| {
        attention.uses_index() || (attention.retrieval == Retrieval::None && !attention.needs_meta())
    })
}
