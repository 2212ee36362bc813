//! What the tokens of a tile retrieve through the index of their keys.
//!
//! First, for every row, the masses of blocks and sections by their mean keys, what the row reads in all by that estimate, and
//! from it the score that a key must pass. The keys of a block are held against it as integers, which leaves 16 bits. Then,
//! for every token, the bits of the heads that share a KV head are joined and turned into positions, and those keys are read
//! exactly. What is left of each section counts by its mean value: one product of matrices for the whole tile.

use std::ops::Range;

use pulp::Simd;

use super::{
    CausalOptions, IndexOptions, Retrieved,
    candidates::Candidates,
    chosen::ChosenKeys,
    limits::Limits,
    reading,
    sums::Sums,
    tile::{HIDDEN, LOWEST_SCORE, QueryTile, read},
};
use crate::{
    index::{
        BLOCK, BLOCKS_OF_SECTION, HeadIndex, SECTION,
        integer::{self, Panels, ROWS},
        positions,
        query::TileCodes,
    },
    stored::StoredRows,
    vector,
};

/// Retrieval among the candidates of a tile.
pub(super) struct Retrieval<'a> {
    pub(super) settings: &'a IndexOptions,
    pub(super) sinks: usize,
    pub(super) candidates: Candidates,
    pub(super) options: &'a CausalOptions,
    pub(super) index: &'a HeadIndex,
}

/// Memory of a tile, and what the backward pass asks for afterwards.
#[derive(Default)]
pub(super) struct RetrievalScratch {
    pub(super) codes: TileCodes,
    /// Scores of mean keys of the rows of a step: of blocks, and of sections.
    scores: Vec<f32>,
    section_scores: Vec<f32>,
    thresholds: Vec<i32>,
    /// What thresholds are multiplied by, for each block.
    inverse_scales: Vec<f32>,
    /// For each row and block: weights of mean keys, and in the end those of what was not read of a block.
    pub(super) weights: Vec<f32>,
    /// For each row and section, likewise; in the end the sum over its blocks. From the first candidate on.
    pub(super) section_weights: Vec<f32>,
    /// For each row and section of those that can be opened: the most that a key of it is expected to score.
    bounds: Vec<f32>,
    /// Keys of each row and block that pass.
    masks: Vec<u16>,
    pub(super) limits: Limits,
    pub(super) chosen: ChosenKeys,
}

/// Where the columns of a tile lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns {
    /// The first block that has a column: the first of a panel.
    pub(super) first_block: usize,
    /// Columns of blocks: whole panels.
    pub(super) blocks: usize,
    /// Columns of sections that can be opened: whole panels from `first_panel` on.
    first_panel: usize,
    pub(super) closed: usize,
    /// The first section of the columns of section weights, and how many there are.
    pub(super) first_section: usize,
    pub(super) sections: usize,
}

impl Retrieval<'_> {
    pub(super) fn columns(&self) -> Columns {
        let Candidates { sections, blocks } = &self.candidates;
        let all = self.candidates.all_sections();
        let first_block = blocks.start / BLOCK * BLOCK;
        let first_panel = sections.start / BLOCK;
        let panels = if sections.is_empty() { 0 } else { sections.end.div_ceil(BLOCK) - first_panel };
        Columns {
            first_block,
            blocks: (blocks.end - first_block).next_multiple_of(BLOCK),
            first_panel,
            closed: panels * BLOCK,
            first_section: all.start,
            sections: all.len(),
        }
    }

    /// The first section of which the token at `position` sees every token that is no sink, among those from `first` on.
    pub(super) fn first_whole(&self, position: usize, first: usize) -> usize {
        let visible = self.options.first_visible(position);
        let cut = |section: usize| positions(section, SECTION, self.sinks).start < visible;
        let mut section = first.max(visible.saturating_sub(1) / SECTION);
        while cut(section) && section * SECTION < visible {
            section += 1;
        }
        section
    }

    /// Chooses keys for each token, reads them, and brings what is left of the candidates into the sums.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        rows: (StoredRows<'_>, StoredRows<'_>),
        scratch: &mut RetrievalScratch,
        sums: &mut Sums<'_>,
    ) -> Retrieved {
        let columns = self.columns();
        let count = tile.count();
        scratch.codes.encode(self.index, tile.rows, columns.closed > 0);
        scratch.prepare(count, columns, &self.index.residual_scales);
        for first in (0..count).step_by(ROWS) {
            self.score_rows(simd, tile, first..count.min(first + ROWS), columns, scratch, sums);
        }
        scratch.chosen.clear(tile.group);
        let mut retrieved = Retrieved { tokens: tile.tokens as u64, ..Retrieved::default() };
        let mut chosen = std::mem::take(&mut scratch.chosen);
        self.open(simd, tile, columns, scratch, &mut chosen);
        let opened = self.candidates.sections.start * BLOCKS_OF_SECTION;
        let first_block = if columns.closed > 0 { opened.min(columns.first_block) } else { columns.first_block };
        for first in (0..tile.tokens).step_by(reading::TOKENS) {
            let tokens = first..tile.tokens.min(first + reading::TOKENS);
            chosen.together.clear(first_block..self.candidates.blocks.end, rows);
            for token in tokens.clone() {
                let capped = self.choose(tile, token, columns, scratch, &mut chosen);
                retrieved.keys += chosen.of(token).len() as u64;
                retrieved.capped += u64::from(capped);
                if self.settings.far {
                    for g in 0..tile.group {
                        self.weigh_rest(tile, g * tile.tokens + token, columns, scratch, &mut chosen);
                    }
                }
            }
            chosen.read(simd, tile, tokens, rows, self.options, sums);
        }
        scratch.chosen = chosen;
        if self.settings.far {
            for row in 0..count {
                self.add_rest(simd, tile, row, columns, scratch, sums);
            }
            let values = StoredRows::F32(self.index.values().range(self.candidates.all_sections()));
            // Nothing is widened: the room stays empty.
            read(simd, &scratch.section_weights, columns.sections, 0, count, (values, &mut Vec::new()), sums.output);
        }
        retrieved
    }

    /// Masses, limits and passing keys of the rows of a step.
    #[inline(always)]
    fn score_rows<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        rows: Range<usize>,
        columns: Columns,
        scratch: &mut RetrievalScratch,
        sums: &Sums<'_>,
    ) {
        let RetrievalScratch { codes, scores, section_scores, thresholds, inverse_scales, weights, .. } = scratch;
        let RetrievalScratch { section_weights, bounds, masks, limits, .. } = scratch;
        let (index, first) = (self.index, rows.start);
        let range = |first: usize, count: usize| first / BLOCK..(first + count) / BLOCK;
        let (query, stride) = (codes.means.step(first, rows.len()), columns.blocks);
        let of_blocks = Panels::keys(&index.means.codes, range(columns.first_block, stride));
        integer::score(query, &of_blocks, codes.mean_scales(first, &index.means.scales), scores, stride);
        let closed = columns.closed;
        if closed > 0 {
            let sections = range(columns.first_panel * BLOCK, closed);
            let of_sections = Panels::keys(&index.section_means.codes, sections.clone());
            let scales = codes.mean_scales(first, &index.section_means.scales);
            integer::score(query, &of_sections, scales, section_scores, closed);
            let of_radii = Panels { codes: &index.section_radii.codes, range: sections, offset: false };
            let scales = codes.radius_scales(first, &index.section_radii.scales);
            let query = codes.magnitudes.step(first, rows.len());
            integer::score(query, &of_radii, scales, &mut bounds[first * closed..], closed);
        }
        for (at, row) in rows.clone().enumerate() {
            let scores = &mut scores[at * stride..(at + 1) * stride];
            let own = &mut weights[row * stride..(row + 1) * stride];
            let mut highest = sums.highest[row];
            self.masses(simd, tile, row, scores, own, columns);
            if closed > 0 {
                let scores = &mut section_scores[at * closed..(at + 1) * closed];
                let bounds = &mut bounds[row * closed..(row + 1) * closed];
                let own = &mut section_weights[row * columns.sections..][..self.candidates.sections.len()];
                self.section_masses(simd, tile, row, (scores, bounds), own, columns);
                if !sums.final_mass {
                    highest = highest.max(vector::max(simd, own));
                }
            }
            if !sums.final_mass {
                highest = highest.max(vector::max(simd, own));
            }
            let fade = if sums.final_mass || sums.sum[row] == 0.0 { 1.0 } else { (sums.highest[row] - highest).exp() };
            let mut total = sums.sum[row] * fade + BLOCK as f32 * vector::exp_sum(simd, own, highest);
            total -= self.held_by_sinks(own, columns.first_block, BLOCK);
            if closed > 0 {
                let own = &mut section_weights[row * columns.sections..][..self.candidates.sections.len()];
                total += SECTION as f32 * vector::exp_sum(simd, own, highest);
                total -= self.held_by_sinks(own, columns.first_section, SECTION);
            }
            let limit = highest + total.max(f32::MIN_POSITIVE).ln() + self.settings.log_threshold;
            limits.set(row, highest, limit);
            let thresholds = &mut thresholds[at * stride..(at + 1) * stride];
            self.thresholds(tile, row, limit, (scores, inverse_scales), columns, codes, thresholds);
        }
        let residuals = Panels::keys(&index.residuals, columns.first_block..self.candidates.blocks.end);
        let query = codes.residuals.step(first, rows.len());
        integer::compare(query, &residuals, thresholds, &mut masks[first * stride..], stride);
        for masks in masks[first * stride..].chunks_exact_mut(stride.max(1)).take(rows.len()) {
            masks[self.candidates.blocks.end - columns.first_block..].fill(0);
        }
    }

    /// What runs of `size` tokens with the weights `weights` count too much because they hold sinks.
    #[inline(always)]
    fn held_by_sinks(&self, weights: &[f32], first: usize, size: usize) -> f32 {
        let with_sinks = self.sinks.div_ceil(size).saturating_sub(first).min(weights.len());
        let missing = |at: usize| (size - positions(first + at, size, self.sinks).len()) as f32;
        weights[..with_sinks].iter().enumerate().map(|(at, weight)| weight * missing(at)).sum()
    }

    /// Log-masses of a key of each block by its mean key, into `masses`, hidden where the section of a block is not whole for
    /// the token. Scores outside the candidates become hidden.
    #[inline(always)]
    fn masses<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        row: usize,
        scores: &mut [f32],
        masses: &mut [f32],
        columns: Columns,
    ) {
        let Range { start, end } = self.candidates.blocks;
        let first = columns.first_block;
        scores[..start - first].fill(HIDDEN);
        scores[end - first..].fill(HIDDEN);
        masses.copy_from_slice(scores);
        self.finish(simd, tile, row, first, BLOCK, masses);
        let whole = self.first_whole(tile.position(row), start / BLOCKS_OF_SECTION) * BLOCKS_OF_SECTION;
        masses[..(whole.max(start).min(end) - first)].fill(HIDDEN);
        masses[end - first..].fill(HIDDEN);
    }

    /// Softcap and the bias at the mean position of runs of `size` tokens from the run `first` on.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        row: usize,
        first: usize,
        size: usize,
        scores: &mut [f32],
    ) {
        if let Some(cap) = self.options.softcap {
            vector::softcap(simd, scores, cap);
        }
        if tile.slopes.is_some() {
            for (at, score) in scores.iter_mut().enumerate() {
                *score += self.bias(tile, row, first + at, size);
            }
        }
    }

    /// What ALiBi adds for the run `index` of `size` tokens at its mean position.
    #[inline(always)]
    pub(super) fn bias(&self, tile: &QueryTile<'_>, row: usize, index: usize, size: usize) -> f32 {
        let Some(slopes) = tile.slopes else { return 0.0 };
        let held = positions(index, size, self.sinks);
        let middle = (held.start + held.end).saturating_sub(1) as f32 / 2.0;
        slopes[row / tile.tokens] * (middle - tile.position(row) as f32)
    }

    /// The same of sections, from the scores of the columns that can be opened; and the bounds of what their keys score.
    #[inline(always)]
    fn section_masses<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        row: usize,
        (scores, bounds): (&mut [f32], &mut [f32]),
        masses: &mut [f32],
        columns: Columns,
    ) {
        let Range { start, end } = self.candidates.sections;
        let skipped = start - columns.first_panel * BLOCK;
        for (bound, score) in bounds.iter_mut().zip(&*scores) {
            *bound += score;
        }
        self.finish(simd, tile, row, columns.first_panel * BLOCK, SECTION, bounds);
        masses.copy_from_slice(&scores[skipped..skipped + masses.len()]);
        self.finish(simd, tile, row, start, SECTION, masses);
        let whole = self.first_whole(tile.position(row), start).min(end);
        masses[..whole - start].fill(HIDDEN);
    }

    /// What the sums of products of residuals must pass.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) fn thresholds(
        &self,
        tile: &QueryTile<'_>,
        row: usize,
        limit: f32,
        (scores, inverse_scales): (&[f32], &[f32]),
        columns: Columns,
        codes: &TileCodes,
        thresholds: &mut [i32],
    ) {
        let scale = (codes.residuals.scales[row], codes.residuals.offsets[row]);
        self.thresholds_of_blocks(tile, row, limit, columns.first_block, (scores, inverse_scales), scale, thresholds);
        // Columns of no candidates: nothing passes.
        let Range { start, end } = self.candidates.blocks;
        thresholds[..start - columns.first_block].fill(i32::MAX);
        thresholds[end - columns.first_block..].fill(i32::MAX);
    }

    /// The weights of what a row does not read of its candidates: by section, and for gradients by block.
    #[inline(always)]
    fn weigh_rest(
        &self,
        tile: &QueryTile<'_>,
        row: usize,
        columns: Columns,
        scratch: &mut RetrievalScratch,
        chosen: &mut ChosenKeys,
    ) {
        let RetrievalScratch { weights, section_weights, .. } = scratch;
        let own = &mut weights[row * columns.blocks..(row + 1) * columns.blocks];
        let sections = &mut section_weights[row * columns.sections..(row + 1) * columns.sections];
        let token = row % tile.tokens;
        let closed = self.candidates.sections.len();
        for weight in &mut sections[..closed] {
            *weight *= SECTION as f32;
        }
        let sections_with_sinks = self.sinks.div_ceil(SECTION).saturating_sub(columns.first_section).min(closed);
        for (at, weight) in sections[..sections_with_sinks].iter_mut().enumerate() {
            *weight *= positions(columns.first_section + at, SECTION, self.sinks).len() as f32 / SECTION as f32;
        }
        let counts = chosen.counts(token);
        let with_sinks = self.sinks.div_ceil(BLOCK).saturating_sub(columns.first_block).min(own.len());
        for (at, weight) in own[..with_sinks].iter_mut().enumerate() {
            // So that the factor below leaves what is no sink.
            let held = positions(columns.first_block + at, BLOCK, self.sinks).len() as f32;
            let read = f32::from(counts[at]);
            *weight *= (held - read) / (BLOCK as f32 - read).max(1.0);
        }
        for (weight, count) in own.iter_mut().zip(counts) {
            *weight *= BLOCK as f32 - f32::from(*count);
        }
        let skipped = self.candidates.blocks.start - columns.first_block;
        let (fours, _) = own[skipped..skipped + self.candidates.blocks.len()].as_chunks::<BLOCKS_OF_SECTION>();
        for (section, weights) in sections[closed..].iter_mut().zip(fours) {
            *section = weights.iter().sum();
        }
        let (opened, opened_weights) = chosen.opened_weights(token, row / tile.tokens);
        for (&section, weights) in opened.iter().zip(opened_weights) {
            sections[section as usize - columns.first_section] = weights.iter().sum();
        }
    }

    /// Brings those weights into the sums, relative to the highest score of the row.
    #[inline(always)]
    fn add_rest<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        row: usize,
        columns: Columns,
        scratch: &mut RetrievalScratch,
        sums: &mut Sums<'_>,
    ) {
        let RetrievalScratch { weights, section_weights, limits, chosen, .. } = scratch;
        let reference = limits.reference(row);
        if reference > LOWEST_SCORE {
            sums.rise(simd, row, reference);
        }
        let factor = (reference - sums.highest[row] + self.settings.far_shift).exp();
        let sections = &mut section_weights[row * columns.sections..(row + 1) * columns.sections];
        vector::scale(simd, sections, factor);
        sums.sum[row] += vector::sum(simd, sections);
        if chosen.keep {
            vector::scale(simd, &mut weights[row * columns.blocks..(row + 1) * columns.blocks], factor);
            let (_, opened_weights) = chosen.opened_weights(row % tile.tokens, row / tile.tokens);
            vector::scale(simd, opened_weights.as_flattened_mut(), factor);
        }
    }
}

impl RetrievalScratch {
    /// Makes room for `rows` rows.
    fn prepare(&mut self, rows: usize, columns: Columns, residual_scales: &[f32]) {
        let steps = ROWS.min(rows);
        self.scores.resize(steps * columns.blocks, 0.0);
        self.thresholds.resize(steps * columns.blocks, 0);
        self.section_scores.resize(steps * columns.closed, 0.0);
        self.weights.resize(rows * columns.blocks, 0.0);
        self.masks.resize(rows * columns.blocks, 0);
        self.section_weights.resize(rows * columns.sections, 0.0);
        self.bounds.resize(rows * columns.closed, 0.0);
        self.limits.clear(rows);
        let scales = &residual_scales[columns.first_block..columns.first_block + columns.blocks];
        self.inverse_scales.clear();
        self.inverse_scales.extend(scales.iter().map(|scale| 1.0 / scale));
    }

    pub(super) fn mask(&self, row: usize, columns: Columns) -> &[u16] {
        &self.masks[row * columns.blocks..(row + 1) * columns.blocks]
    }

    pub(super) fn inverse_scales(&self) -> &[f32] {
        &self.inverse_scales
    }

    pub(super) fn bound(&self, row: usize, columns: Columns) -> &[f32] {
        &self.bounds[row * columns.closed..(row + 1) * columns.closed]
    }
}
