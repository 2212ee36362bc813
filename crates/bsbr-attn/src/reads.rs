//! How much tokens read: counted from the settings alone.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::{
    AttentionOptions, BlockAttentionConfig, Far, Retrieval,
    index::{BLOCK, Candidates, SECTION},
};

/// What the tokens of a text read, per KV head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysRead {
    /// Keys that are read exactly: local ones, sinks, and those of retrieved blocks.
    pub exact: u64,
    /// Statistics of blocks or of whole chunks, each one key and one value wide or more, that are read or scored.
    pub summaries: u64,
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
    /// Which blocks a token chooses depends on the text, how many does not. Only where a chosen block holds sinks, or the
    /// window cuts it, are fewer keys read than its size: then this counts the choice that reads the most.
    pub fn of_text(attention: Option<&BlockAttentionConfig>, window: Option<usize>, tokens: usize) -> Self {
        let mut sum = Self::default();
        for token in 0..tokens {
            sum += Self::of_token(attention, window, token);
        }
        sum
    }

    /// The same of the token at position `token` alone.
    pub fn of_token(attention: Option<&BlockAttentionConfig>, window: Option<usize>, token: usize) -> Self {
        let options = AttentionOptions { scale: 1.0, softcap: None, window, alibi: None };
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
                // As the attention itself decides it: by the first token of the chunk.
                let behind = attention.sink_tokens.max(options.first_visible(chunk * attention.chunk_size));
                let block = attention.block_size;
                let candidates = (local / block).saturating_sub(behind / block);
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
                // One mixture serves the chunk: of the blocks that its last token sees whole.
                let behind = options.first_visible((chunk + 1) * attention.chunk_size - 1);
                let first =
                    if behind > attention.sink_tokens { behind.div_ceil(block) } else { attention.sink_tokens / block };
                let kept = (local / block).saturating_sub(first);
                let kept = attention.max_chunks.map_or(kept, |most| kept.min(most));
                Self { summaries: kept as u64, ..near }
            }
        }
    }
}
