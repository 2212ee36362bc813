//! Past the trained length: everything before the local region is held at the positions of [`FarPositions`].

use burn::tensor::Tensor;

use super::{AttentionCache, CacheConfig, Meta};
use crate::{
    AttentionError, BlockAttentionConfig, FarPositions,
    buffer::{RowBuffer, copied},
    far_positions::Stage,
};

/// What reads the local region, at its own positions, while all else in the cache is at those of a stage.
#[derive(Debug, Clone)]
pub(super) struct Near {
    /// Keys from position `first` up to the last token.
    pub(super) keys: RowBuffer,
    pub(super) first: usize,
    pub(super) stage: Stage,
}

impl AttentionCache {
    /// Reads what lies before the local region at other positions once the text is longer than trained. Queries and keys stay
    /// those of the model, rotated by their true positions.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] without a far part, with states, with ALiBi, where the frequencies do not fit the heads, or
    /// where the local region alone is as long as trained.
    pub fn with_far_positions(self, positions: FarPositions) -> Result<Self, AttentionError> {
        positions.check(self.config.attention.as_ref(), &self.config.options, self.config.head_dim)?;
        Ok(Self { far_positions: Some(positions), ..self })
    }

    /// At which positions far tokens are read, if not at their own.
    pub fn far_positions(&self) -> Option<&FarPositions> {
        self.far_positions.as_ref()
    }

    /// How many of the next `tokens` tokens read at the same stage.
    pub(super) fn of_one_stage(&self, tokens: usize) -> usize {
        match (&self.far_positions, &self.config.attention) {
            (Some(positions), Some(attention)) => tokens.min(positions.stage(attention, self.length).end - self.length),
            _ => tokens,
        }
    }

    /// The meta inputs of the next `count` tokens and those of the tokens after them.
    pub(super) fn split_meta(&self, meta: Option<Meta>, count: usize) -> [Option<Meta>; 2] {
        let Some(Meta { query, key }) = meta else { return [None, None] };
        let parts = |rows: Option<Tensor<4>>, first: usize| {
            let Some(rows) = rows else { return [None, None] };
            let all = rows.dims()[2];
            let some = |from: usize, to: usize| (from < to).then(|| rows.clone().narrow(2, from, to - from));
            [some(0, first), some(first, all)]
        };
        let [query, later_query] = parts(query, self.chunk_starts(count).len());
        let [key, later_key] = parts(key, self.block_ends(count).len());
        [Some(Meta { query, key }), Some(Meta { query: later_query, key: later_key })]
    }

    /// Queries of the next tokens as they meet far keys.
    pub(super) fn far_queries(&self, query: Tensor<4>) -> Tensor<4> {
        match (&self.far_positions, &self.near) {
            (Some(positions), Some(near)) => positions.turn_queries(query, self.length, near.stage),
            _ => query,
        }
    }

    /// Keys of the next tokens as far tokens meet them.
    pub(super) fn far_keys(&self, keys: Tensor<4>) -> Tensor<4> {
        match (&self.far_positions, &self.near) {
            (Some(positions), Some(near)) => positions.turn_keys(keys, self.length, None, near.stage),
            _ => keys,
        }
    }

    /// Before the first token of a stage: moves every key and forgets what was made of them.
    pub(super) fn enter_stage(&mut self, attention: &BlockAttentionConfig) {
        let Some(positions) = &self.far_positions else { return };
        let stage = positions.stage(attention, self.length);
        let before = self.near.as_ref().map(|near| near.stage);
        if stage.group == 1 || before == Some(stage) {
            return;
        }
        let CacheConfig { batch, kv_heads, head_dim, .. } = self.config;
        let dtype = self.config.computed();
        match &mut self.near {
            Some(near) => near.stage = stage,
            None => {
                let first = attention.local_start(self.length / attention.chunk_size);
                let mut keys = RowBuffer::new(batch, kv_heads, head_dim, 1, &self.keys.device(), dtype);
                if first < self.length {
                    keys.push(self.keys.range(first - self.start, self.length - self.start));
                }
                self.near = Some(Near { keys, first, stage });
            }
        }
        let turned = positions.turn_keys(self.keys.all(), self.start, before, stage);
        self.keys.set(turned);
        if let Some((keys, values)) = self.sinks.take() {
            self.sinks = Some((copied(positions.turn_keys(keys, 0, before, stage)), values));
        }
        if let Some(index) = &mut self.index {
            index.forget();
        }
        if let Some(statistics) = &mut self.statistics {
            let mut meta_keys = statistics.clear();
            meta_keys.append(&mut self.pending_meta_keys);
            self.pending_meta_keys = meta_keys;
            self.summarised = 0;
        }
    }

    /// Drops keys before `local_start` that only the local region would read.
    pub(super) fn forget_near(&mut self, local_start: usize) {
        if let Some(near) = &mut self.near
            && local_start > near.first
        {
            near.keys.drop_front(local_start - near.first);
            near.first = local_start;
        }
    }
}

/// Rows cut in two.
pub(super) fn split(rows: &Tensor<4>, first: usize) -> [Tensor<4>; 2] {
    [rows.clone().narrow(2, 0, first), rows.clone().narrow(2, first, rows.dims()[2] - first)]
}
