//! What a chunk chooses from.

use std::ops::Range;

use super::{BLOCK, SECTION};
use crate::{AttentionOptions, BlockAttentionConfig};

/// The sections before the local region of a chunk that its tokens may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidates {
    /// Numbers of all of them.
    pub(crate) sections: Range<usize>,
    /// How many, from the first on, are scored as sections: their blocks are scored where a token opens them.
    pub(crate) far: usize,
}

impl BlockAttentionConfig {
    /// Whether `exact_tokens` has every token of a chunk read everything.
    pub(crate) fn reads_everything(&self, chunk: usize, options: &AttentionOptions) -> bool {
        let start = chunk.saturating_mul(self.chunk_size);
        start.saturating_add(self.chunk_size) - options.first_visible(start) <= self.exact_tokens
    }

    /// What the tokens of a chunk choose keys from; `None` where they read everything.
    pub(crate) fn candidates(&self, chunk: usize, options: &AttentionOptions) -> Option<Candidates> {
        let local_start = self.local_start(chunk);
        let first = options.first_visible(chunk * self.chunk_size);
        if self.reads_everything(chunk, options) || local_start / BLOCK <= self.sink_tokens.max(first) / BLOCK {
            return None;
        }
        let sections = first / SECTION..local_start / SECTION;
        let far = (local_start.saturating_sub(self.fine_tokens) / SECTION).saturating_sub(sections.start);
        Some(Candidates { sections, far: if far <= self.max_sections { 0 } else { far } })
    }

    /// Whether there is a text long enough for a token to choose keys.
    pub(crate) fn can_choose(&self, options: &AttentionOptions) -> bool {
        // A window that lies within the local region of every token, or that is never longer than what is read anyway.
        let within = |window: usize| {
            window <= self.local_chunks.saturating_mul(self.chunk_size).saturating_add(1)
                || window.saturating_add(self.chunk_size - 1) <= self.exact_tokens
        };
        self.uses_index() && !options.window.is_some_and(within)
    }
}
