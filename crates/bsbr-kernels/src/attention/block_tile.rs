//! One tile of queries over sinks, the local region, chosen blocks and the means of the rest.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{
    BlockOptions, Blocks, CausalOptions,
    chosen::{Chosen, Sums},
    tile::{HIDDEN, LOWEST_SCORE, QueryTile, mask_positions, read, score},
};
use crate::{heads::Rows, select, vector};

/// What one KV head brings.
pub(super) struct Head<'a> {
    pub(super) keys: Rows<'a>,
    pub(super) values: Rows<'a>,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) sinks: Option<(Rows<'a>, Rows<'a>)>,
    pub(super) means: Option<(Rows<'a>, Rows<'a>)>,
}

#[derive(Default)]
pub(super) struct Scratch {
    pub(super) query: Vec<f32>,
    exact: Vec<f32>,
    blocks: Vec<f32>,
    shares: Vec<f32>,
    output: Vec<f32>,
    highest: Vec<f32>,
    sum: Vec<f32>,
    chosen: Chosen,
    one_choice: Vec<u32>,
}

pub(super) struct BlockTile<'a, 'o> {
    pub(super) tile: &'a QueryTile<'a>,
    pub(super) head: &'a Head<'a>,
    pub(super) settings: &'a BlockOptions,
    pub(super) options: &'a CausalOptions,
    pub(super) scratch: &'a mut Scratch,
    pub(super) outputs: &'a mut [(&'o mut [f32], &'o mut [f32])],
}

/// A run of positions with their rows.
struct Run<'a> {
    positions: Range<usize>,
    keys: Rows<'a>,
    values: Rows<'a>,
}

impl WithSimd for BlockTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, head, settings, options, scratch, outputs } = self;
        let chunk = tile.start / settings.chunk_size;
        let end = tile.start + tile.tokens;
        let local_start = settings.local_start(chunk);
        let retrieval = settings.blocks.as_ref().map(|blocks| (blocks, settings.candidates(chunk, blocks, options)));
        // Where every candidate would be chosen the exact keys are one run of positions.
        let (from, retrieval) = match retrieval {
            Some((blocks, candidates)) if candidates.len() <= blocks.top_k => {
                ((candidates.start * blocks.size).min(local_start), None)
            }
            other => (local_start, other),
        };
        let runs = exact_runs(tile, head, settings, options, from..end);
        let (rows, width) = (tile.count(), head.keys.width());
        scratch.output.clear();
        scratch.output.resize(rows * width, 0.0);
        scratch.highest.clear();
        scratch.highest.resize(rows, f32::NEG_INFINITY);
        scratch.sum.clear();
        scratch.sum.resize(rows, 0.0);
        read_exactly(simd, tile, options, &runs, scratch);
        if let (Some((blocks, candidates)), Some((mean_keys, mean_values))) = (retrieval, head.means) {
            let means = (mean_keys.range(candidates.clone()), mean_values.range(candidates.clone()));
            let retrieval = Retrieval { blocks, candidates, sinks: settings.sink_tokens, options };
            retrieval.weigh_and_choose(simd, tile, means.0, scratch);
            if blocks.far {
                read(simd, &scratch.blocks, means.1.len(), 0, rows, means.1, &mut scratch.output);
            }
            let Scratch { chosen, highest, sum, output, .. } = scratch;
            chosen.read(simd, tile, &retrieval, (head.keys, head.values), &mut Sums { highest, sum, output });
        }
        for (g, (output, log_mass)) in outputs.iter_mut().enumerate() {
            for token in 0..tile.tokens {
                let row = g * tile.tokens + token;
                let output = &mut output[token * width..(token + 1) * width];
                output.copy_from_slice(&scratch.output[row * width..(row + 1) * width]);
                vector::scale(simd, output, 1.0 / scratch.sum[row]);
                log_mass[token] = scratch.sum[row].ln() + scratch.highest[row];
            }
        }
    }
}

/// Sinks and the run `positions`, as far as a query of the tile may see them.
fn exact_runs<'a>(
    tile: &QueryTile<'_>,
    head: &Head<'a>,
    settings: &BlockOptions,
    options: &CausalOptions,
    positions: Range<usize>,
) -> Vec<Run<'a>> {
    let visible = options.first_visible(tile.start);
    let rows = |positions: Range<usize>| {
        let rows = positions.start - head.first..positions.end - head.first;
        Run { positions, keys: head.keys.range(rows.clone()), values: head.values.range(rows) }
    };
    let mut runs = Vec::with_capacity(2);
    let mut start = positions.start;
    let sinks = 0..settings.sink_tokens.min(positions.start);
    if sinks.end > visible {
        match head.sinks {
            Some((keys, values)) => {
                let (keys, values) = (keys.range(sinks.clone()), values.range(sinks.clone()));
                runs.push(Run { positions: sinks, keys, values });
            }
            // Sinks that touch the run are part of it.
            None if sinks.end == positions.start => start = 0,
            None => runs.push(rows(sinks)),
        }
    }
    runs.push(rows(start.max(visible)..positions.end));
    runs
}

/// Reads the runs: weights relative to the highest score so far, not yet divided by their sum.
#[inline(always)]
fn read_exactly<S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    options: &CausalOptions,
    runs: &[Run<'_>],
    scratch: &mut Scratch,
) {
    let rows = tile.count();
    let columns: usize = runs.iter().map(|run| run.positions.len()).sum();
    scratch.exact.resize(rows * columns, 0.0);
    let mut column = 0;
    for run in runs {
        score(simd, tile, run.keys, &mut scratch.exact, columns, column, options.softcap);
        mask_positions(tile, options, run.positions.clone(), &mut scratch.exact, columns, column);
        column += run.positions.len();
    }
    for row in 0..rows {
        let scores = &mut scratch.exact[row * columns..(row + 1) * columns];
        scratch.highest[row] = vector::max(simd, scores);
        scratch.sum[row] = vector::exp_sum(simd, scores, scratch.highest[row]);
    }
    let mut column = 0;
    for run in runs {
        read(simd, &scratch.exact, columns, column, rows, run.values, &mut scratch.output);
        column += run.positions.len();
    }
}

/// Retrieval among the candidates of a tile.
pub(super) struct Retrieval<'a> {
    pub(super) blocks: &'a Blocks,
    pub(super) candidates: Range<usize>,
    sinks: usize,
    options: &'a CausalOptions,
}

impl Retrieval<'_> {
    /// Positions of a candidate, sinks left out.
    #[inline(always)]
    fn positions(&self, candidate: usize) -> Range<usize> {
        let block = self.candidates.start + candidate;
        (block * self.blocks.size).max(self.sinks)..(block + 1) * self.blocks.size
    }

    /// Chooses blocks for each token, and leaves in `scratch.blocks` the weights of the others, relative to
    /// `scratch.highest`.
    #[inline(always)]
    fn weigh_and_choose<S: Simd>(&self, simd: S, tile: &QueryTile<'_>, mean_keys: Rows<'_>, scratch: &mut Scratch) {
        let (rows, columns, far) = (tile.count(), mean_keys.len(), self.blocks.far);
        scratch.blocks.resize(rows * columns, 0.0);
        score(simd, tile, mean_keys, &mut scratch.blocks, columns, 0, self.options.softcap);
        self.finish_masses(tile, &mut scratch.blocks, columns);
        scratch.chosen.clear();
        scratch.shares.resize(columns, 0.0);
        for token in 0..tile.tokens {
            let group_rows = (0..tile.group).map(|g| g * tile.tokens + token);
            let chosen = &mut scratch.one_choice;
            if tile.group == 1 {
                let masses = &scratch.blocks[token * columns..(token + 1) * columns];
                select::largest(simd, masses, self.blocks.top_k, LOWEST_SCORE, chosen);
            } else {
                scratch.shares.fill(0.0);
                for row in group_rows.clone() {
                    let masses = &scratch.blocks[row * columns..(row + 1) * columns];
                    add_shares(simd, masses, (scratch.highest[row], scratch.sum[row]), &mut scratch.shares);
                }
                let hidden = self.hidden(tile.start + token);
                scratch.shares[..hidden].fill(-1.0);
                select::largest(simd, &scratch.shares, self.blocks.top_k, -0.5, chosen);
            }
            scratch.chosen.push(chosen);
            if !far {
                continue;
            }
            let cut = self.cut(tile.start + token);
            for row in group_rows {
                let masses = &mut scratch.blocks[row * columns..(row + 1) * columns];
                for &block in chosen.iter() {
                    masses[block as usize] = HIDDEN;
                }
                masses[..cut].fill(HIDDEN);
                let highest = vector::max(simd, masses).max(scratch.highest[row]);
                let fade = (scratch.highest[row] - highest).exp();
                if fade != 1.0 {
                    let width = mean_keys.width();
                    vector::scale(simd, &mut scratch.output[row * width..(row + 1) * width], fade);
                }
                scratch.sum[row] = scratch.sum[row] * fade + vector::exp_sum(simd, masses, highest);
                scratch.highest[row] = highest;
            }
        }
    }

    /// Scores of mean keys become log-masses; blocks that lie behind the window of a token are hidden.
    fn finish_masses(&self, tile: &QueryTile<'_>, masses: &mut [f32], columns: usize) {
        let whole = (self.blocks.size as f32).ln();
        let first = (self.positions(0).len() as f32).ln();
        for row in 0..tile.count() {
            let token = tile.position(row);
            let masses = &mut masses[row * columns..(row + 1) * columns];
            // Only the first block can hold sinks.
            for mass in masses.iter_mut() {
                *mass += whole;
            }
            masses[0] += first - whole;
            if let Some(slopes) = tile.slopes {
                let slope = slopes[row / tile.tokens];
                for (candidate, mass) in masses.iter_mut().enumerate() {
                    let positions = self.positions(candidate);
                    *mass -= slope * (token as f32 - (positions.start + positions.end - 1) as f32 / 2.0);
                }
            }
            let hidden = self.hidden(token);
            masses[..hidden].fill(HIDDEN);
        }
    }

    /// How many candidates, the oldest, the window of the token leaves behind.
    fn hidden(&self, token: usize) -> usize {
        let visible = self.options.first_visible(token);
        (visible / self.blocks.size).saturating_sub(self.candidates.start).min(self.candidates.len())
    }

    /// How many candidates, the oldest, the window of the token hides at least one token of.
    fn cut(&self, token: usize) -> usize {
        let visible = self.options.first_visible(token);
        if visible <= self.positions(0).start {
            return 0;
        }
        visible.div_ceil(self.blocks.size).saturating_sub(self.candidates.start).min(self.candidates.len())
    }

    /// Softcap, ALiBi, and what is hidden in chosen blocks: sinks, which are read elsewhere, and what the window hides.
    #[inline(always)]
    pub(super) fn finish_scores<S: Simd>(
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
        let first = self.options.first_visible(position).max(self.sinks);
        if tile.slopes.is_none() && chosen.first().is_none_or(|&block| self.start_of(block) >= first) {
            return;
        }
        for (&block, scores) in chosen.iter().zip(scores.chunks_exact_mut(size)) {
            let start = self.start_of(block);
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

    /// Position of the first token of a candidate, be it a sink.
    #[inline(always)]
    pub(super) fn start_of(&self, candidate: u32) -> usize {
        (self.candidates.start + candidate as usize) * self.blocks.size
    }
}

/// Adds the share of attention that each block would have beside `exact` (highest score, sum of weights relative to it).
#[inline(always)]
fn add_shares<S: Simd>(simd: S, masses: &[f32], exact: (f32, f32), shares: &mut [f32]) {
    let highest = vector::max(simd, masses).max(exact.0);
    let sum = vector::sum_of_exp(simd, masses, highest) + exact.1 * (exact.0 - highest).exp();
    vector::add_exp(simd, masses, highest, 1.0 / sum, shares);
}
