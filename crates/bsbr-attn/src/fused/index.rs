//! The index of a cache in the form of the loops.

use bsbr_kernels::index::{KeyIndex, SECTION};
use burn::tensor::Tensor;

use super::{Memory, StoredMemory};
use crate::{BlockAttentionConfig, buffer::RowBuffer, statistics::Sizes};

/// The index of one layer's keys, from the first token on.
#[derive(Debug, Clone)]
pub(crate) struct FusedIndex {
    keys: KeyIndex,
    /// So many tokens found it.
    tokens: usize,
}

impl FusedIndex {
    pub(crate) fn new(sizes: Sizes, attention: &BlockAttentionConfig) -> Self {
        let Sizes { batch, kv_heads, head_dim, .. } = sizes;
        let channels = attention.residual_channels(head_dim);
        let keys = KeyIndex::new([batch, kv_heads, head_dim], channels, attention.sink_tokens);
        Self { keys, tokens: attention.index_founding() }
    }

    /// Takes note of the queries of the tokens from `start` on, `[batch, heads, tokens, head_dim]`, as the model made them.
    pub(crate) fn see(&mut self, queries: &Tensor<4>, start: usize) {
        let count = self.tokens.saturating_sub(start).min(queries.dims()[2]);
        if count > 0
            && let Some(queries) = Memory::new(queries)
        {
            self.keys.watch(queries.heads(), 0..count);
        }
    }

    /// Indexes every section that ends by `end`, from the rows of all tokens, once the tokens that found the index are among them.
    pub(crate) fn extend(&mut self, keys: &RowBuffer, values: &RowBuffer, end: usize) {
        if keys.len() < self.tokens || end / SECTION <= self.keys.sections() {
            return;
        }
        let (Some(keys), Some(values)) = (StoredMemory::new(&keys.stored()), StoredMemory::new(&values.stored()))
        else {
            return;
        };
        if !self.keys.is_founded() {
            self.keys.found(keys.heads(), self.tokens);
        }
        self.keys.extend(keys.heads(), values.heads(), end / SECTION);
    }

    /// The index when `tokens` tokens were in, of which those before `end` could be indexed; `None` if more queries than theirs
    /// found it.
    pub(crate) fn first(&self, tokens: usize, end: usize) -> Option<Self> {
        if tokens < self.tokens {
            return None;
        }
        let mut first = self.clone();
        first.keys.truncate(end / SECTION);
        Some(first)
    }

    /// Forgets everything but what is known of queries: the keys are no longer where they were.
    pub(crate) fn forget(&mut self) {
        self.keys.clear();
    }

    /// Makes room for the index of `tokens` tokens.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        self.keys.reserve(tokens);
    }

    /// How many tokens found it: those must come with their queries.
    pub(crate) fn founding_tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn keys(&self) -> &KeyIndex {
        &self.keys
    }

    pub(crate) fn bytes(&self) -> usize {
        self.keys.bytes()
    }
}
