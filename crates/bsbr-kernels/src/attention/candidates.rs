//! The candidates for retrieval of one tile: which of them there are, how those count that are not chosen, and what is read
//! of those that are.
//!
//! Runs of several sizes stand for the text, the shorter the nearer. The first level are blocks. What lies further back is
//! scored by the longer runs of the next level; each token opens the best of these and scores the shorter ones in them like
//! those nearby. A run that is not opened counts by its means.

use std::ops::Range;

use pulp::Simd;

use super::{
    BlockOptions, Blocks, CausalOptions,
    readers::{Readers, Runs},
    sums::Sums,
    tile::{HIDDEN, QueryTile},
};
use crate::{heads::Rows, select::Contest, stored::StoredRows, vector};

/// Runs of one size.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Level {
    /// Tokens of a run.
    pub(super) size: usize,
    /// Runs that every token scores.
    pub(super) direct: Range<usize>,
    /// How many of them a token chooses: blocks to read, longer runs to open.
    pub(super) chosen: usize,
    /// How many runs of the next level a token has opened, and how many of this size lie in one of those.
    pub(super) opened: usize,
    pub(super) per_opened: usize,
}

impl Level {
    /// Runs that one token scores.
    pub(super) fn columns(&self) -> usize {
        self.direct.len() + self.opened * self.per_opened
    }

    /// The run in a column, for a token that opened the runs `opened` of the next level.
    #[inline(always)]
    pub(super) fn run(&self, column: usize, opened: &[u32]) -> usize {
        let Some(behind) = column.checked_sub(self.direct.len()) else { return self.direct.start + column };
        opened[behind / self.per_opened] as usize * self.per_opened + behind % self.per_opened
    }
}

impl BlockOptions {
    /// Candidates of the chunk `chunk`, blocks first: complete ones before the local region that hold a token other than a
    /// sink and are not wholly behind the window of the chunk's first token. `None` where every token reads all of them.
    pub(super) fn candidates(&self, chunk: usize, blocks: &Blocks, options: &CausalOptions) -> Option<Vec<Level>> {
        let first = self.sink_tokens.max(options.first_visible(chunk * self.chunk_size));
        let local_start = self.local_start(chunk);
        let direct = first / blocks.size..local_start / blocks.size;
        if direct.len() <= blocks.top_k || (chunk + 1) * self.chunk_size <= blocks.exact_tokens {
            return None;
        }
        let level = |size, direct, chosen| Level { size, direct, chosen, opened: 0, per_opened: 1 };
        let mut finer = level(blocks.size, direct, blocks.top_k);
        let mut levels = Vec::with_capacity(1 + blocks.coarse.len());
        for coarse in &blocks.coarse {
            let border = local_start.saturating_sub(coarse.beyond) / coarse.size;
            let distant = first / coarse.size..border;
            if distant.len() <= coarse.opened {
                break;
            }
            finer.per_opened = coarse.size / finer.size;
            finer.opened = coarse.opened;
            finer.direct.start = border * finer.per_opened;
            levels.push(finer);
            finer = level(coarse.size, distant, coarse.opened);
        }
        levels.push(finer);
        Some(levels)
    }
}

#[derive(Default)]
pub(super) struct CandidateScratch {
    pub(super) levels: Vec<LevelScratch>,
    /// Absolute values of the queries, times the reach.
    pub(super) magnitudes: Vec<f32>,
    /// Scores of one token.
    pub(super) scores: Vec<f32>,
    /// What is added to the scores of each row: minus the log-mass of what it reads exactly.
    pub(super) shifts: Vec<f32>,
    pub(super) contest: Contest,
    pub(super) choice: Vec<u32>,
    /// Chosen blocks, numbered from the first token.
    pub(super) chosen: Readers,
}

#[derive(Default)]
pub(super) struct LevelScratch {
    /// For each row: log-masses and then weights of the columns.
    pub(super) masses: Vec<f32>,
    /// For each row: what the radii add to the scores.
    pub(super) reach: Vec<f32>,
    /// Opened runs of the next level, numbered from the first token.
    pub(super) opened: Readers,
}

/// Means of the runs of one level of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<'a> {
    pub(super) keys: Rows<'a>,
    pub(super) values: Rows<'a>,
    /// Radii of the keys.
    pub(super) radii: Option<Rows<'a>>,
}

/// Retrieval among the candidates of a tile.
pub(super) struct Retrieval<'a> {
    pub(super) settings: &'a BlockOptions,
    pub(super) blocks: &'a Blocks,
    pub(super) levels: Vec<Level>,
    pub(super) options: &'a CausalOptions,
}

impl Retrieval<'_> {
    /// Positions of the run `index` of `size` tokens, sinks left out.
    #[inline(always)]
    pub(super) fn positions(&self, index: usize, size: usize) -> Range<usize> {
        (index * size).max(self.settings.sink_tokens)..(index + 1) * size
    }

    /// Hides from the masses of one token what does not count by its means: what it has chosen, and what it sees in part.
    #[inline(always)]
    pub(super) fn hide_read(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        level: &Level,
        choice: &[u32],
        scratch: &mut LevelScratch,
    ) {
        let columns = level.columns();
        let position = tile.start + token;
        let cut = self.cut(position, &level.direct, level.size);
        for row in (0..tile.group).map(|g| g * tile.tokens + token) {
            let masses = &mut scratch.masses[row * columns..(row + 1) * columns];
            for &column in choice {
                masses[column as usize] = HIDDEN;
            }
            masses[..cut].fill(HIDDEN);
            if self.options.window.is_none() || level.opened == 0 {
                continue;
            }
            let behind = masses[level.direct.len()..].chunks_exact_mut(level.per_opened);
            for (&opened, masses) in scratch.opened.of(token).iter().zip(behind) {
                let first = opened as usize * level.per_opened;
                let cut = self.cut(position, &(first..first + level.per_opened), level.size);
                masses[..cut].fill(HIDDEN);
            }
        }
    }

    /// Turns the log-masses of one row into weights in the softmax.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&self, simd: S, row: usize, levels: &mut [LevelScratch], sums: &mut Sums<'_>) {
        let columns = || self.levels.iter().map(Level::columns);
        let mut highest = f32::NEG_INFINITY;
        for (columns, scratch) in columns().zip(&*levels) {
            highest = highest.max(vector::max(simd, &scratch.masses[row * columns..(row + 1) * columns]));
        }
        sums.rise(simd, row, highest);
        for (columns, scratch) in columns().zip(levels) {
            sums.weigh(simd, row, &mut scratch.masses[row * columns..(row + 1) * columns]);
        }
    }

    /// Scores of mean keys become log-masses: `masses` of the runs `indices` of `size` tokens in one row. What lies behind the
    /// window of the token is hidden.
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
        (keys, values): (StoredRows<'_>, StoredRows<'_>),
        chosen: &mut Readers,
        scores: &mut Vec<f32>,
        sums: &mut Sums<'_>,
    ) {
        let (size, group) = (self.blocks.size, tile.group);
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
                sums.add(simd, g * tile.tokens + token, scores);
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
