//! The candidates for retrieval of one tile: which of them there are, how those count that are not chosen, and what is read
//! of those that are.
//!
//! There are two levels. Blocks among the last `fine_tokens` before the local region are scored one by one. What lies
//! further back is scored by whole sections; each token opens the best of these, whose blocks it then scores like the near
//! ones. A section that is not opened counts by its means.

use std::ops::Range;

use pulp::Simd;

use super::{
    BlockOptions, Blocks, CausalOptions,
    readers::{Readers, Runs},
    sums::Sums,
    tile::{HIDDEN, QueryTile},
};
use crate::{heads::Rows, select::Contest, vector};

/// The candidates of the tokens of one chunk.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidates {
    /// Sections that are scored as a whole.
    pub(super) distant: Range<usize>,
    /// Blocks that are scored one by one.
    pub(super) fine: Range<usize>,
}

impl BlockOptions {
    /// Candidates of the chunk `chunk`: complete blocks before the local region that hold a token other than a sink and are
    /// not wholly behind the window of the chunk's first token. `None` where every token reads all of them.
    pub(super) fn candidates(&self, chunk: usize, blocks: &Blocks, options: &CausalOptions) -> Option<Candidates> {
        let first = self.sink_tokens.max(options.first_visible(chunk * self.chunk_size)) / blocks.size;
        let end = self.local_start(chunk) / blocks.size;
        if end.saturating_sub(first) <= blocks.top_k || (chunk + 1) * self.chunk_size <= blocks.exact_tokens {
            return None;
        }
        let per_section = blocks.section_size / blocks.size;
        let border = self.local_start(chunk).saturating_sub(blocks.fine_tokens) / blocks.section_size;
        let distant = first / per_section..border;
        Some(if distant.len() <= blocks.top_sections {
            Candidates { distant: 0..0, fine: first..end }
        } else {
            Candidates { distant, fine: border * per_section..end }
        })
    }
}

#[derive(Default)]
pub(super) struct CandidateScratch {
    /// For each row: log-masses and then weights of the fine blocks, and of those of the opened sections.
    pub(super) blocks: Vec<f32>,
    /// For each row: the same for the distant sections.
    pub(super) distant: Vec<f32>,
    /// For each row: what the radii add to the scores of the columns of `blocks`.
    pub(super) reach: Vec<f32>,
    /// The same for the columns of `distant`.
    pub(super) distant_reach: Vec<f32>,
    /// Absolute values of the queries, times the reach.
    pub(super) magnitudes: Vec<f32>,
    /// Scores of one token.
    pub(super) scores: Vec<f32>,
    /// What is added to the scores of each row: minus the log-mass of what it reads exactly.
    pub(super) shifts: Vec<f32>,
    pub(super) opened: Readers,
    pub(super) contest: Contest,
    pub(super) choice: Vec<u32>,
    /// Chosen blocks, numbered from the first token.
    pub(super) chosen: Readers,
}

/// Means of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<'a> {
    /// Mean keys and values of the blocks.
    pub(super) blocks: (Rows<'a>, Rows<'a>),
    /// Mean keys and values of the sections.
    pub(super) sections: Option<(Rows<'a>, Rows<'a>)>,
}

/// Retrieval among the candidates of a tile.
pub(super) struct Retrieval<'a> {
    pub(super) settings: &'a BlockOptions,
    pub(super) blocks: &'a Blocks,
    pub(super) candidates: Candidates,
    pub(super) options: &'a CausalOptions,
}

impl Retrieval<'_> {
    /// Blocks of a section.
    pub(super) fn per_section(&self) -> usize {
        self.blocks.section_size / self.blocks.size
    }

    /// Positions of the run `index` of `size` tokens, sinks left out.
    #[inline(always)]
    pub(super) fn positions(&self, index: usize, size: usize) -> Range<usize> {
        (index * size).max(self.settings.sink_tokens)..(index + 1) * size
    }

    /// Turns the log-masses of one token into weights in the softmax: nothing for what it reads exactly, has opened, or
    /// sees in part.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        columns: usize,
        scratch: &mut CandidateScratch,
        sums: &mut Sums<'_>,
    ) {
        let Candidates { distant, fine } = &self.candidates;
        let position = tile.start + token;
        let cut = self.cut(position, fine, self.blocks.size);
        let cut_sections = self.cut(position, distant, self.blocks.section_size);
        for row in (0..tile.group).map(|g| g * tile.tokens + token) {
            let masses = &mut scratch.blocks[row * columns..(row + 1) * columns];
            for &column in &scratch.choice {
                masses[column as usize] = HIDDEN;
            }
            masses[..cut].fill(HIDDEN);
            if distant.is_empty() {
                sums.add(simd, row, &mut [masses]);
                continue;
            }
            if self.options.window.is_some() {
                for (slot, &section) in scratch.opened.of(token).iter().enumerate() {
                    let first = (distant.start + section as usize) * self.per_section();
                    let blocks = first..first + self.per_section();
                    let cut = self.cut(position, &blocks, self.blocks.size);
                    masses[fine.len() + slot * self.per_section()..][..cut].fill(HIDDEN);
                }
            }
            let distant_masses = &mut scratch.distant[row * distant.len()..(row + 1) * distant.len()];
            for &section in scratch.opened.of(token) {
                distant_masses[section as usize] = HIDDEN;
            }
            distant_masses[..cut_sections].fill(HIDDEN);
            sums.add(simd, row, &mut [masses, distant_masses]);
        }
    }

    /// Scores of mean keys become log-masses; what lies behind the window of a token is hidden.
    pub(super) fn finish_masses(
        &self,
        tile: &QueryTile<'_>,
        masses: &mut [f32],
        columns: usize,
        indices: Range<usize>,
        size: usize,
    ) {
        for row in 0..tile.count() {
            self.finish_row(tile, row, &mut masses[row * columns..][..indices.len()], indices.clone(), size);
        }
    }

    /// [`Retrieval::finish_masses`] of one row: `masses` of the runs `indices` of `size` tokens.
    #[inline(always)]
    pub(super) fn finish_row(
        &self,
        tile: &QueryTile<'_>,
        row: usize,
        masses: &mut [f32],
        indices: Range<usize>,
        size: usize,
    ) {
        let whole = (size as f32).ln() + self.blocks.far_shift;
        for mass in masses.iter_mut() {
            *mass += whole;
        }
        // Runs with sinks have fewer tokens, or none.
        let with_sinks = self.settings.sink_tokens.div_ceil(size).saturating_sub(indices.start);
        for (index, mass) in indices.clone().zip(masses.iter_mut()).take(with_sinks) {
            let tokens = self.positions(index, size).len();
            *mass = if tokens == 0 { HIDDEN } else { *mass - (size as f32).ln() + (tokens as f32).ln() };
        }
        let token = tile.position(row);
        if let Some(slopes) = tile.slopes {
            let slope = slopes[row / tile.tokens];
            for (index, mass) in indices.clone().zip(masses.iter_mut()) {
                let positions = self.positions(index, size);
                *mass -= slope * (token as f32 - (positions.start + positions.end).saturating_sub(1) as f32 / 2.0);
            }
        }
        let left = self.left_behind(token, &indices, size);
        masses[..left].fill(HIDDEN);
    }

    /// How many of the runs `indices`, the oldest, the window of the token leaves behind.
    #[inline(always)]
    fn left_behind(&self, token: usize, indices: &Range<usize>, size: usize) -> usize {
        (self.options.first_visible(token) / size).saturating_sub(indices.start).min(indices.len())
    }

    /// How many of the runs `indices`, the oldest, the window of the token hides at least one token of.
    #[inline(always)]
    fn cut(&self, token: usize, indices: &Range<usize>, size: usize) -> usize {
        let visible = self.options.first_visible(token);
        if indices.is_empty() || visible <= self.positions(indices.start, size).start {
            return 0;
        }
        visible.div_ceil(size).saturating_sub(indices.start).min(indices.len())
    }

    /// Reads the chosen blocks exactly.
    #[inline(always)]
    pub(super) fn read_chosen<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        (keys, values): (Rows<'_>, Rows<'_>),
        chosen: &mut Readers,
        scores: &mut Vec<f32>,
        sums: &mut Sums<'_>,
    ) {
        let (size, group) = (self.blocks.size, tile.group);
        chosen.sort(self.candidates.fine.end);
        scores.resize(chosen.len() * group * size, 0.0);
        let runs = |rows| Runs {
            rows,
            size,
            first: move |block| block as usize * size,
            // The blocks of one token and head side by side.
            place: move |chosen: &Readers, g, token, place: usize| {
                let places = chosen.places(token);
                (places.start * group + g * places.len() + (place - places.start)) * size
            },
        };
        chosen.score(simd, tile, &runs(keys), scores);
        for token in 0..tile.tokens {
            let places = chosen.places(token);
            for g in 0..group {
                let start = (places.start * group + g * places.len()) * size;
                let scores = &mut scores[start..start + places.len() * size];
                self.finish_scores(simd, tile, token, g, chosen.of(token), scores);
                sums.add(simd, g * tile.tokens + token, &mut [scores]);
            }
        }
        chosen.read(simd, tile, &runs(values), scores, sums.output);
    }

    /// Softcap, ALiBi, and what is hidden in chosen blocks: sinks, which are read elsewhere, and what the window hides.
    #[inline(always)]
    fn finish_scores<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        head: usize,
        chosen: &[u32],
        scores: &mut [f32],
    ) {
        if let Some(cap) = self.options.softcap {
            vector::softcap(simd, scores, cap);
        }
        let (size, position) = (self.blocks.size, tile.start + token);
        let first = self.options.first_visible(position).max(self.settings.sink_tokens);
        for (&block, scores) in chosen.iter().zip(scores.chunks_exact_mut(size)) {
            let start = block as usize * size;
            if let Some(slopes) = tile.slopes {
                for (at, score) in scores.iter_mut().enumerate() {
                    *score -= slopes[head] * (position - start - at) as f32;
                }
            }
            if start < first {
                scores[..(first - start).min(size)].fill(HIDDEN);
            }
        }
    }
}
