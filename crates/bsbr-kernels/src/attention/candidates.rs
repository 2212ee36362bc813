//! Which tokens a chunk may retrieve, and which of them it scores by sections first.

use std::ops::Range;

use super::{BlockOptions, CausalOptions, IndexOptions};
use crate::index::{BLOCK, BLOCKS_OF_SECTION, SECTION};

/// Candidates of the tokens of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidates {
    /// Sections that a token scores as a whole and whose keys it scores only where it opens them.
    pub(super) sections: Range<usize>,
    /// Blocks whose keys every token scores, from the end of those sections to the local region.
    pub(super) blocks: Range<usize>,
}

impl Candidates {
    /// Every section that holds a candidate.
    pub(super) fn all_sections(&self) -> Range<usize> {
        let direct = self.blocks.start / BLOCKS_OF_SECTION..self.blocks.end / BLOCKS_OF_SECTION;
        if self.sections.is_empty() { direct } else { self.sections.start..direct.end }
    }
}

impl BlockOptions {
    /// Candidates of the chunk `chunk`; `None` where its tokens read everything.
    pub(super) fn candidates(&self, chunk: usize, index: &IndexOptions, options: &CausalOptions) -> Option<Candidates> {
        let start = chunk * self.chunk_size;
        let (visible, local) = (options.first_visible(start), self.local_start(chunk));
        let oldest = self.sink_tokens.max(visible) / BLOCK;
        if start + self.chunk_size - visible <= index.exact_tokens || local / BLOCK <= oldest {
            return None;
        }
        let first = visible / SECTION;
        let far = first..local.saturating_sub(index.fine_tokens) / SECTION;
        let closed = far.len() > index.max_sections;
        let direct = if closed { far.end } else { first };
        let sections = if closed { far } else { first..first };
        Some(Candidates { sections, blocks: direct * BLOCKS_OF_SECTION..local / BLOCK })
    }
}
