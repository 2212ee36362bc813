//! How much tokens read: counted from the settings alone.

use std::ops::{AddAssign, Range};

use serde::{Deserialize, Serialize};

use crate::{
    AttentionOptions, BlockAttentionConfig, Far, Retrieval,
    index::{BLOCK, Candidates, SECTION},
};

/// What the tokens of a text read, per KV head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysRead {
    /// Keys that are read exactly as the settings alone say: local ones, sinks, everything where everything is read, those of
    /// the blocks that a `meta` selector retrieves. What an [index](crate::index) retrieves beyond them depends on the text:
    /// [`AttentionCache::retrieved`](crate::AttentionCache::retrieved) has counted it.
    pub exact: u64,
    /// Statistics of blocks, sections or whole chunks that are read or scored; under an index the keys of a block count as one
    /// with it, and sections that are opened only as sections.
    pub summaries: u64,
}

impl BlockAttentionConfig {
    /// The blocks before the local region of a chunk that its tokens choose from or mix: complete ones that hold a token other
    /// than a sink. Those to choose from are not wholly behind the window of the chunk's first token (not of the first query at
    /// hand: how a text is cut into pieces must not matter); those that are mixed are seen whole by its last.
    pub(crate) fn blocks_before(&self, chunk: usize, options: &AttentionOptions) -> Range<usize> {
        let (start, block, sinks) = (chunk * self.chunk_size, self.statistics_block(), self.sink_tokens);
        let first = match self.retrieval {
            Retrieval::None | Retrieval::Blocks => sinks.max(options.first_visible(start)) / block,
            Retrieval::State | Retrieval::Additive => match options.first_visible(start + self.chunk_size - 1) {
                behind if behind > sinks => behind.div_ceil(block),
                _ => sinks / block,
            },
        };
        first..(self.local_start(chunk) / block).max(first)
    }
}

impl AddAssign for KeysRead {
    fn add_assign(&mut self, other: Self) {
        self.exact += other.exact;
        self.summaries += other.summaries;
    }
}

impl KeysRead {
    /// The sum over the tokens of a text of `tokens` tokens. `attention` is `None` for full causal attention; `window` is
    /// the [model's own](AttentionOptions::window).
    ///
    /// Which blocks a chunk chooses with a `meta` selector depends on the text, how many does not. Only where a chosen block
    /// holds sinks, or the window cuts it, are fewer keys read than its size: then this counts the choice that reads the most.
    pub fn of_text(attention: Option<&BlockAttentionConfig>, window: Option<usize>, tokens: usize) -> Self {
        let mut sum = Self::default();
        for token in 0..tokens {
            sum += Self::of_token(attention, window, token);
        }
        sum
    }

    /// The same of the token at position `token` alone.
    pub fn of_token(attention: Option<&BlockAttentionConfig>, window: Option<usize>, token: usize) -> Self {
        let options = AttentionOptions { scale: 1.0, softcap: None, window, alibi: None, sink_logits: None };
        let visible = options.first_visible(token);
        let everything = Self { exact: (token + 1 - visible) as u64, summaries: 0 };
        let Some(attention) = attention else { return everything };
        let chunk = token / attention.chunk_size;
        let local = attention.local_start(chunk);
        let sinks = attention.sink_tokens.min(local).saturating_sub(visible);
        let near = Self { exact: (sinks + token + 1 - local.max(visible)) as u64, summaries: 0 };
        match attention.retrieval {
            Retrieval::None => near,
            Retrieval::Blocks => {
                if attention.uses_index() {
                    return match attention.candidates(chunk, &options) {
                        None => everything,
                        Some(Candidates { sections, far }) => {
                            let blocks = (sections.len() - far) * (SECTION / BLOCK);
                            Self { summaries: (far + blocks) as u64, ..near }
                        }
                    };
                }
                let (candidates, block) = (attention.blocks_before(chunk, &options).len(), attention.block_size);
                if candidates <= attention.meta_blocks || attention.reads_everything(chunk, &options) {
                    return everything;
                }
                let within = local.saturating_sub(attention.sink_tokens.max(visible));
                let chosen = within.min(attention.meta_blocks.saturating_mul(block));
                // The choice is made once for a chunk.
                let summaries = if attention.far == Far::None { 0 } else { candidates };
                Self { exact: near.exact + chosen as u64, summaries: summaries as u64 }
            }
            Retrieval::State | Retrieval::Additive => {
                let block = attention.statistics_block();
                if attention.kept_tokens > 0 {
                    let behind = local.saturating_sub(attention.sink_tokens.max(visible));
                    let kept = behind.min(attention.kept_tokens);
                    let summaries = (behind - kept).div_ceil(block).min(attention.max_chunks.unwrap_or(usize::MAX));
                    return Self { exact: near.exact + kept as u64, summaries: summaries as u64 };
                }
                let kept = attention.blocks_before(chunk, &options).len();
                let kept = attention.max_chunks.map_or(kept, |most| kept.min(most));
                Self { summaries: kept as u64, ..near }
            }
        }
    }
}
