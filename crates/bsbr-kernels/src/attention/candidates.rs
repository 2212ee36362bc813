//! The candidates for retrieval of one tile: which of them there are, what each token chooses, and how the others count.
//!
//! There are two levels. Blocks among the last `fine_tokens` before the local region are scored one by one. What lies
//! further back is scored by whole chunks; each token opens the best of these, whose blocks it then scores like the near
//! ones. A chunk that is not opened counts by its means.

use std::ops::Range;

use pulp::Simd;

use super::{
    BlockOptions, Blocks, CausalOptions,
    readers::{Readers, Runs},
    sums::Sums,
    tile::{HIDDEN, LOWEST_SCORE, QueryTile, read, score},
};
use crate::{heads::Rows, select, vector};

/// The candidates of the tokens of one chunk.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidates {
    /// Chunks that are scored as a whole.
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
        let per_chunk = self.chunk_size / blocks.size;
        let border = self.local_start(chunk).saturating_sub(blocks.fine_tokens) / self.chunk_size;
        let distant = first / per_chunk..border;
        Some(if distant.len() <= blocks.top_chunks {
            Candidates { distant: 0..0, fine: first..end }
        } else {
            Candidates { distant, fine: border * per_chunk..end }
        })
    }
}

#[derive(Default)]
pub(super) struct CandidateScratch {
    /// For each row: log-masses and then weights of the fine blocks, and of those of the opened chunks.
    pub(super) blocks: Vec<f32>,
    /// For each row: the same for the distant chunks.
    pub(super) distant: Vec<f32>,
    shares: Vec<f32>,
    distant_shares: Vec<f32>,
    /// For each row: highest log-mass and sum of the weights relative to it, of everything it could read.
    totals: Vec<(f32, f32)>,
    pub(super) opened: Readers,
    choice: Vec<u32>,
    /// Chosen blocks, numbered from the first token.
    pub(super) chosen: Readers,
}

/// Means of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<'a> {
    /// Mean keys and values of the blocks.
    pub(super) blocks: (Rows<'a>, Rows<'a>),
    /// Mean keys and values of the chunks.
    pub(super) chunks: Option<(Rows<'a>, Rows<'a>)>,
}

/// Retrieval among the candidates of a tile.
pub(super) struct Retrieval<'a> {
    pub(super) settings: &'a BlockOptions,
    pub(super) blocks: &'a Blocks,
    pub(super) candidates: Candidates,
    pub(super) options: &'a CausalOptions,
}

impl Retrieval<'_> {
    /// Blocks of a chunk.
    pub(super) fn per_chunk(&self) -> usize {
        self.settings.chunk_size / self.blocks.size
    }

    /// Positions of the run `index` of `size` tokens, sinks left out.
    #[inline(always)]
    fn positions(&self, index: usize, size: usize) -> Range<usize> {
        (index * size).max(self.settings.sink_tokens)..(index + 1) * size
    }

    /// The block in a column of the block masses of a token that opened the distant chunks `opened`.
    #[inline(always)]
    fn block(&self, column: usize, opened: &[u32]) -> usize {
        let fine = self.candidates.fine.len();
        if column < fine {
            return self.candidates.fine.start + column;
        }
        let (slot, within) = ((column - fine) / self.per_chunk(), (column - fine) % self.per_chunk());
        (self.candidates.distant.start + opened[slot] as usize) * self.per_chunk() + within
    }

    /// Chooses blocks for each token, leaves them in `scratch.chosen` and brings what is not chosen into the sums.
    #[inline(always)]
    pub(super) fn choose<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        means: &Means<'_>,
        scratch: &mut CandidateScratch,
        sums: &mut Sums<'_>,
    ) {
        let (rows, far) = (tile.count(), self.blocks.far);
        let Candidates { distant, fine } = self.candidates.clone();
        let most_opened = if distant.is_empty() { 0 } else { self.blocks.top_chunks };
        let columns = fine.len() + most_opened * self.per_chunk();
        scratch.blocks.resize(rows * columns, 0.0);
        let fine_keys = means.blocks.0.range(fine.clone());
        score(simd, tile, fine_keys, &mut scratch.blocks, columns, 0, self.options.softcap);
        let size = self.blocks.size;
        self.finish_masses(tile, &mut scratch.blocks, columns, fine.clone(), size);
        if let (Some((chunk_keys, _)), false) = (means.chunks, distant.is_empty()) {
            let keys = chunk_keys.range(distant.clone());
            scratch.distant.resize(rows * distant.len(), 0.0);
            score(simd, tile, keys, &mut scratch.distant, distant.len(), 0, self.options.softcap);
            self.finish_masses(tile, &mut scratch.distant, distant.len(), distant.clone(), self.settings.chunk_size);
        }
        self.open(simd, tile, means, columns, scratch, sums);
        scratch.chosen.clear();
        scratch.shares.resize(columns, 0.0);
        for token in 0..tile.tokens {
            self.choose_for(simd, tile, token, columns, scratch);
            if far {
                self.weigh(simd, tile, token, columns, scratch, sums);
            }
        }
        if !far {
            return;
        }
        let output = &mut *sums.output;
        read(simd, &scratch.blocks, columns, 0, rows, means.blocks.1.range(fine.clone()), output);
        if let (Some((_, chunk_values)), false) = (means.chunks, distant.is_empty()) {
            let values = chunk_values.range(distant.clone());
            read(simd, &scratch.distant, distant.len(), 0, rows, values, output);
            let CandidateScratch { opened, blocks, .. } = scratch;
            opened.read(simd, tile, &self.opened_runs(means.blocks.1, tile.tokens, columns), blocks, output);
        }
    }

    /// The blocks of opened chunks as runs of means, scored behind the fine blocks of each row.
    fn opened_runs<'b>(
        &self,
        rows: Rows<'b>,
        tokens: usize,
        columns: usize,
    ) -> Runs<'b, impl Fn(u32) -> usize + use<>, impl Fn(&Readers, usize, usize, usize) -> usize + use<>> {
        let (per_chunk, fine, first) = (self.per_chunk(), self.candidates.fine.len(), self.candidates.distant.start);
        Runs {
            rows,
            size: per_chunk,
            first: move |chunk| (first + chunk as usize) * per_chunk,
            place: move |opened: &Readers, g, token, place: usize| {
                (g * tokens + token) * columns + fine + (place - opened.places(token).start) * per_chunk
            },
        }
    }

    /// The total of each row, and the chunks each token opens with the masses of their blocks.
    #[inline(always)]
    fn open<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        means: &Means<'_>,
        columns: usize,
        scratch: &mut CandidateScratch,
        sums: &Sums<'_>,
    ) {
        let Candidates { distant, fine } = &self.candidates;
        scratch.totals.clear();
        scratch.opened.clear();
        if tile.group > 1 {
            for row in 0..tile.count() {
                let fine = &scratch.blocks[row * columns..][..fine.len()];
                let distant = &scratch.distant[row * distant.len()..][..distant.len()];
                let highest = vector::max(simd, fine).max(vector::max(simd, distant)).max(sums.highest[row]);
                let exact = sums.sum[row] * (sums.highest[row] - highest).exp();
                let far = vector::sum_of_exp(simd, fine, highest) + vector::sum_of_exp(simd, distant, highest);
                scratch.totals.push((highest, 1.0 / (exact + far)));
            }
        }
        if distant.is_empty() {
            return;
        }
        for token in 0..tile.tokens {
            let (shares, choice) = (&mut scratch.distant_shares, &mut scratch.choice);
            if tile.group == 1 {
                let masses = &scratch.distant[token * distant.len()..][..distant.len()];
                select::largest(simd, masses, self.blocks.top_chunks, LOWEST_SCORE, choice);
            } else {
                shares.clear();
                shares.resize(distant.len(), 0.0);
                for row in (0..tile.group).map(|g| g * tile.tokens + token) {
                    let (highest, factor) = scratch.totals[row];
                    let masses = &scratch.distant[row * distant.len()..][..distant.len()];
                    vector::add_exp(simd, masses, highest, factor, shares);
                }
                let left = self.left_behind(tile.start + token, distant, self.settings.chunk_size);
                shares[..left].fill(-1.0);
                select::largest(simd, shares, self.blocks.top_chunks, -0.5, choice);
            }
            scratch.opened.push_all(choice.iter().copied());
        }
        scratch.opened.sort(distant.len());
        let CandidateScratch { opened, blocks, .. } = scratch;
        opened.score(simd, tile, &self.opened_runs(means.blocks.0, tile.tokens, columns), blocks);
        let per_chunk = self.per_chunk();
        for row in 0..tile.count() {
            let token = row % tile.tokens;
            let masses = &mut blocks[row * columns + fine.len()..(row + 1) * columns];
            let used = opened.of(token).len() * per_chunk;
            masses[used..].fill(HIDDEN);
            if let Some(cap) = self.options.softcap {
                vector::softcap(simd, &mut masses[..used], cap);
            }
            for (&chunk, masses) in opened.of(token).iter().zip(masses.chunks_exact_mut(per_chunk)) {
                let first = (distant.start + chunk as usize) * per_chunk;
                self.finish_row(tile, row, masses, first..first + per_chunk, self.blocks.size);
            }
        }
    }

    /// What one token reads exactly, into `scratch.chosen`, and the columns of it in `scratch.choice`.
    #[inline(always)]
    fn choose_for<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        columns: usize,
        scratch: &mut CandidateScratch,
    ) {
        let choice = &mut scratch.choice;
        if tile.group == 1 {
            let masses = &scratch.blocks[token * columns..][..columns];
            select::largest(simd, masses, self.blocks.top_k, LOWEST_SCORE, choice);
        } else {
            scratch.shares.fill(0.0);
            for row in (0..tile.group).map(|g| g * tile.tokens + token) {
                let (highest, factor) = scratch.totals[row];
                vector::add_exp(
                    simd,
                    &scratch.blocks[row * columns..][..columns],
                    highest,
                    factor,
                    &mut scratch.shares,
                );
            }
            // Hidden for one head, hidden for all.
            for (share, &mass) in scratch.shares.iter_mut().zip(&scratch.blocks[token * columns..]) {
                if mass <= LOWEST_SCORE {
                    *share = -1.0;
                }
            }
            select::largest(simd, &scratch.shares, self.blocks.top_k, -0.5, choice);
        }
        let opened: &[u32] = if self.candidates.distant.is_empty() { &[] } else { scratch.opened.of(token) };
        scratch.chosen.push_all(choice.iter().map(|&column| self.block(column as usize, opened) as u32));
    }

    /// Turns the log-masses of one token into weights in the softmax: nothing for what it reads exactly, has opened, or
    /// sees in part.
    #[inline(always)]
    fn weigh<S: Simd>(
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
        let cut_chunks = self.cut(position, distant, self.settings.chunk_size);
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
                for (slot, &chunk) in scratch.opened.of(token).iter().enumerate() {
                    let first = (distant.start + chunk as usize) * self.per_chunk();
                    let blocks = first..first + self.per_chunk();
                    let cut = self.cut(position, &blocks, self.blocks.size);
                    masses[fine.len() + slot * self.per_chunk()..][..cut].fill(HIDDEN);
                }
            }
            let distant_masses = &mut scratch.distant[row * distant.len()..(row + 1) * distant.len()];
            for &chunk in scratch.opened.of(token) {
                distant_masses[chunk as usize] = HIDDEN;
            }
            distant_masses[..cut_chunks].fill(HIDDEN);
            sums.add(simd, row, &mut [masses, distant_masses]);
        }
    }

    /// Scores of mean keys become log-masses; what lies behind the window of a token is hidden.
    fn finish_masses(
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
    fn finish_row(&self, tile: &QueryTile<'_>, row: usize, masses: &mut [f32], indices: Range<usize>, size: usize) {
        let whole = (size as f32).ln();
        for mass in masses.iter_mut() {
            *mass += whole;
        }
        // Runs with sinks have fewer tokens, or none.
        let with_sinks = self.settings.sink_tokens.div_ceil(size).saturating_sub(indices.start);
        for (index, mass) in indices.clone().zip(masses.iter_mut()).take(with_sinks) {
            let tokens = self.positions(index, size).len();
            *mass = if tokens == 0 { HIDDEN } else { *mass - whole + (tokens as f32).ln() };
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
