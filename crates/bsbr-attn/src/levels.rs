//! Which runs stand for the text before the local region: blocks nearby, sections further back, pages beyond.

use std::ops::Range;

use crate::BlockAttentionConfig;

/// Runs of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Level {
    /// Tokens of a run.
    pub(crate) size: usize,
    /// Runs that every token scores, numbered from the first token.
    pub(crate) direct: Range<usize>,
    /// How many runs a token chooses: blocks to read, longer ones to open.
    pub(crate) chosen: usize,
    /// How many runs of this size lie in those of the next level that a token opens.
    pub(crate) opened: usize,
}

/// Runs longer than blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coarse {
    /// Tokens of a run.
    pub(crate) size: usize,
    /// They stand for what lies further than this before the local region.
    pub(crate) beyond: usize,
    /// How many of them a token opens.
    pub(crate) opened: usize,
}

impl BlockAttentionConfig {
    /// The kinds of runs that are scored in place of blocks, the shorter first; none where every block is scored.
    pub(crate) fn coarse(&self) -> Vec<Coarse> {
        if !self.scores_sections() {
            return Vec::new();
        }
        let sections = Coarse { size: self.section_tokens(), beyond: self.scored_finely(), opened: self.top_sections };
        let beyond = self.middle_tokens.max(sections.beyond);
        vec![sections, Coarse { size: self.page_tokens(), beyond, opened: self.top_pages }]
    }

    /// The levels of a chunk whose local region begins at `local_start` and that may read from `first` on, blocks first.
    pub(crate) fn levels(&self, first: usize, local_start: usize) -> Vec<Level> {
        let direct = |size: usize, end: usize| (first / size).min(end / size)..end / size;
        let (size, chosen) = (self.block_size, self.top_k);
        let mut levels = vec![Level { size, direct: direct(size, local_start), chosen, opened: 0 }];
        for Coarse { size, beyond, opened } in self.coarse() {
            let distant = direct(size, local_start.saturating_sub(beyond));
            if distant.len() <= opened {
                break;
            }
            if let Some(finer) = levels.last_mut() {
                let ratio = size / finer.size;
                finer.direct.start = distant.end * ratio;
                finer.opened = opened * ratio;
            }
            levels.push(Level { size, direct: distant, chosen: opened, opened: 0 });
        }
        levels
    }
}
