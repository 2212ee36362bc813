//! Taking tokens in, chunk by chunk.

use std::ops::Range;

use burn::tensor::Tensor;

use super::{AttentionCache, Meta};
use crate::{
    BlockAttentionConfig, Retrieval,
    buffer::{RowBuffer, copied},
};

impl AttentionCache {
    /// Goes through new tokens in pieces that end at chunk borders; `visit` sees the cache after each piece is in.
    pub(super) fn walk(
        &mut self,
        attention: &BlockAttentionConfig,
        (keys, near_keys): (Tensor<4>, Option<Tensor<4>>),
        values: Tensor<4>,
        meta: Option<Meta>,
        mut visit: impl FnMut(&mut Self, Range<usize>),
    ) {
        let tokens = keys.dims()[2];
        let (starts, ends) = (self.chunk_starts(tokens), self.block_ends(tokens));
        let (mut next_start, mut next_end, mut at) = (0, 0, 0);
        while at < tokens {
            let in_chunk = self.length % attention.chunk_size;
            let count = (attention.chunk_size - in_chunk).min(tokens - at);
            // In the middle of a chunk there is only something to do where the cache changed to other positions.
            if in_chunk == 0 || at == 0 {
                self.enter_chunk(attention);
            }
            self.push(keys.clone().narrow(2, at, count), values.clone().narrow(2, at, count));
            if let (Some(near), Some(keys)) = (&mut self.near, &near_keys) {
                near.keys.push(keys.clone().narrow(2, at, count));
            }
            let meta = meta.as_ref();
            if let (Some(query), Some(&start)) = (meta.and_then(|m| m.query.as_ref()), starts.get(next_start))
                && start == at
            {
                self.chunk_query = Some(copied(query.clone().narrow(2, next_start, 1)));
                next_start += 1;
            }
            if let Some(key) = meta.and_then(|m| m.key.as_ref()) {
                while ends.get(next_end).is_some_and(|&end| end < at + count) {
                    self.pending_meta_keys.push(copied(key.clone().narrow(2, next_end, 1)));
                    next_end += 1;
                }
            }
            visit(self, at..at + count);
            at += count;
        }
    }

    /// Before the first token of a chunk: blocks that fall out of the local region become statistics, and tokens that
    /// will not be read again are dropped.
    fn enter_chunk(&mut self, attention: &BlockAttentionConfig) {
        let chunk = self.length / attention.chunk_size;
        let local_start = attention.local_start(chunk);
        let block = attention.statistics_block();
        let sinks = attention.sink_tokens;
        self.forget_near(local_start);
        if let Some(index) = &mut self.index {
            index.extend(&self.keys, &self.values, local_start);
        }
        if self.kept.is_some() {
            self.choose_kept(attention, local_start);
        } else if let Some(statistics) = &mut self.statistics {
            while (self.summarised + 1) * block <= local_start {
                let end = (self.summarised + 1) * block;
                let begin = (self.summarised * block).max(sinks).min(end);
                let meta_key = attention.needs_meta().then(|| self.pending_meta_keys.remove(0));
                if begin == end {
                    statistics.push_empty(end);
                } else {
                    let rows = |buffer: &RowBuffer| buffer.range(begin - self.start, end - self.start);
                    statistics.push_block(begin..end, rows(&self.keys), rows(&self.values), meta_key);
                }
                if let Some(limit) = attention.max_chunks {
                    statistics.merge_to(limit);
                }
                self.summarised += 1;
            }
        }
        if attention.retrieval != Retrieval::Blocks && local_start > self.start {
            if self.start == 0 && sinks > 0 {
                let rows = |buffer: &RowBuffer| copied(buffer.range(0, sinks.min(local_start)));
                self.sinks = Some((rows(&self.keys), rows(&self.values)));
            } else if let Some((keys, values)) = self.sinks.take() {
                self.sinks = Some(self.more_sinks(keys, values, sinks.min(local_start)));
            }
            self.keys.drop_front(local_start - self.start);
            self.values.drop_front(local_start - self.start);
            self.start = local_start;
        }
    }

    /// Sinks up to `end`, where there are more of them than one local region holds.
    fn more_sinks(&self, keys: Tensor<4>, values: Tensor<4>, end: usize) -> (Tensor<4>, Tensor<4>) {
        let have = keys.dims()[2];
        if end <= have {
            return (keys, values);
        }
        let more = |rows: Tensor<4>, buffer: &RowBuffer| {
            Tensor::cat(vec![rows, buffer.range(have - self.start, end - self.start)], 2)
        };
        (more(keys, &self.keys), more(values, &self.values))
    }

    pub(super) fn push(&mut self, keys: Tensor<4>, values: Tensor<4>) {
        self.length += keys.dims()[2];
        self.keys.push(keys);
        self.values.push(values);
    }
}
