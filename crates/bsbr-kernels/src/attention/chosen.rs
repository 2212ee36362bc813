//! The keys that each token of a tile chose: which they are, and reading them.

use super::{
    opened::Opened,
    reading::Together,
    retrieval::{Columns, Retrieval, RetrievalScratch},
    tile::QueryTile,
};
use crate::index::{
    BLOCK, BLOCKS_OF_SECTION, SECTION,
    integer::{self, Panels, ROWS},
    positions,
    query::TokenCodes,
};

/// Doublings of a threshold after which scores are no numbers to compare.
const MOST_DOUBLINGS: usize = 1000;

/// Keys that the tokens of a tile chose, in order of their tokens.
#[derive(Default)]
pub(super) struct ChosenKeys {
    pub(super) positions: Vec<u32>,
    /// Where the keys of each token begin, and where those of the last end.
    pub(super) starts: Vec<usize>,
    /// How many keys of each block a token reads, for the columns of blocks; of the last token.
    counts: Vec<u8>,
    pub(super) opened: Opened,
    /// Weights of the keys of each token and head, `[heads, keys]`; kept where gradients are to follow.
    pub(super) weights: Vec<f32>,
    /// Where the weights of each token begin.
    pub(super) weight_starts: Vec<usize>,
    /// Whether weights of earlier tokens are kept.
    pub(super) keep: bool,
    pub(super) together: Together,
    pub(super) token: TokenScratch,
}

#[derive(Default)]
pub(super) struct TokenScratch {
    means: TokenCodes,
    residuals: TokenCodes,
    scores: Vec<f32>,
    thresholds: Vec<i32>,
    masks: Vec<u16>,
    union: Vec<u16>,
    /// By how much the bound of each section passes, for the head for which it passes most.
    pub(super) margins: Vec<f32>,
    /// Those margins that do and their sections, and the same once more in any order.
    pub(super) contest: Vec<u64>,
    pub(super) order: Vec<u64>,
}

impl ChosenKeys {
    pub(super) fn clear(&mut self, group: usize) {
        self.starts.clear();
        self.starts.push(0);
        self.opened.clear(group);
        self.positions.clear();
        self.weights.clear();
        self.weight_starts.clear();
    }

    /// Positions of the keys of a token.
    pub(super) fn of(&self, token: usize) -> &[u32] {
        &self.positions[self.starts[token]..self.starts[token + 1]]
    }

    /// How many keys of each block the last token reads.
    pub(super) fn counts(&self, token: usize) -> &[u8] {
        debug_assert_eq!(token + 2, self.starts.len());
        &self.counts
    }

    /// The sections that a token opened.
    pub(super) fn opened(&self, token: usize) -> &[u32] {
        &self.opened.sections[self.opened.of(token)]
    }

    /// Those sections with the weights of their blocks, for a head of the group.
    pub(super) fn opened_weights(&mut self, token: usize, head: usize) -> (&[u32], &mut [[f32; BLOCKS_OF_SECTION]]) {
        let (of_token, of_head) = (self.opened.of(token), self.opened.of_head(token, head));
        (&self.opened.sections[of_token], &mut self.opened.weights[of_head])
    }

    /// Weights of the keys of a token, for a head of the group.
    pub(super) fn weights(&self, token: usize, head: usize) -> &[f32] {
        let (start, count) = (self.weight_starts[token], self.of(token).len());
        &self.weights[start + head * count..start + (head + 1) * count]
    }
}

impl Retrieval<'_> {
    /// Chooses the keys of a token. Tells whether more passed than it may read.
    #[inline(always)]
    pub(super) fn choose(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        columns: Columns,
        scratch: &RetrievalScratch,
        chosen: &mut ChosenKeys,
    ) -> bool {
        let hidden = self.sinks.max(self.options.first_visible(tile.start + token));
        let union = &mut chosen.token.union;
        union.clear();
        union.extend_from_slice(scratch.mask(token, columns));
        for g in 1..tile.group {
            for (union, mask) in union.iter_mut().zip(scratch.mask(g * tile.tokens + token, columns)) {
                *union |= mask;
            }
        }
        hide(union, columns.first_block, hidden);
        chosen.hide_opened(token, hidden);
        let mut doublings = 0;
        while chosen.passing(token) > self.settings.max_keys && doublings < MOST_DOUBLINGS {
            doublings += 1;
            let raised = doublings as f32 * std::f32::consts::LN_2;
            self.pass_direct(tile, token, columns, (scratch, raised), chosen);
            hide(&mut chosen.token.union, columns.first_block, hidden);
            self.pass_opened(tile, token, (scratch, raised), chosen);
            chosen.hide_opened(token, hidden);
        }
        let ChosenKeys { positions, opened, together, counts, token: TokenScratch { union, .. }, .. } = &mut *chosen;
        let of_token = opened.of(token);
        for (masks, &section) in opened.masks[of_token.clone()].iter().zip(&opened.sections[of_token]) {
            integer::push_positions(masks, section as usize * SECTION, positions);
            together.join(section as usize * BLOCKS_OF_SECTION, masks);
        }
        together.join(columns.first_block, union);
        integer::push_positions(union, columns.first_block * BLOCK, positions);
        counts.resize(union.len(), 0);
        for (count, mask) in counts.iter_mut().zip(&*union) {
            *count = mask.count_ones() as u8;
        }
        self.count_opened(tile, token, chosen);
        chosen.starts.push(chosen.positions.len());
        doublings > 0
    }

    /// Which keys of opened sections pass the threshold, `raised` by so many nats.
    #[inline(always)]
    fn pass_opened(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        (scratch, raised): (&RetrievalScratch, f32),
        chosen: &mut ChosenKeys,
    ) {
        let (index, group) = (self.index, tile.group);
        let TokenScratch { residuals, thresholds, masks, .. } = &mut chosen.token;
        let opened = &mut chosen.opened;
        let of_token = opened.of(token);
        if of_token.is_empty() {
            return;
        }
        residuals.gather(&scratch.codes.residuals, (0..group).map(|g| g * tile.tokens + token), None);
        thresholds.resize(ROWS * BLOCKS_OF_SECTION, 0);
        masks.resize(ROWS * BLOCKS_OF_SECTION, 0);
        for (at, number) in of_token.enumerate() {
            let first_block = opened.sections[number] as usize * BLOCKS_OF_SECTION;
            let blocks = first_block..first_block + BLOCKS_OF_SECTION;
            let mut inverse_scales = [0.0; BLOCKS_OF_SECTION];
            for (inverse, scale) in inverse_scales.iter_mut().zip(&index.residual_scales[blocks.clone()]) {
                *inverse = 1.0 / scale;
            }
            let panels = Panels::keys(&index.residuals, blocks);
            // Only keys that passed the lower threshold pass a higher one.
            if opened.masks[number] == [0; BLOCKS_OF_SECTION] {
                continue;
            }
            opened.masks[number] = [0; BLOCKS_OF_SECTION];
            for first in (0..group).step_by(ROWS) {
                let (query, _) = residuals.step(first, &[]);
                for (g, thresholds) in (first..first + query.rows).zip(thresholds.chunks_exact_mut(BLOCKS_OF_SECTION)) {
                    let row = g * tile.tokens + token;
                    let scores = &opened.scores[opened.of_head(token, g).start + at];
                    let limit = scratch.limits.limit(row) + raised;
                    let scores = (&scores[..], &inverse_scales[..]);
                    self.thresholds_of_blocks(tile, row, limit, first_block, scores, residuals.of(g), thresholds);
                }
                integer::compare(query, &panels, thresholds, masks, BLOCKS_OF_SECTION);
                for masks in masks.chunks_exact(BLOCKS_OF_SECTION).take(query.rows) {
                    for (union, mask) in opened.masks[number].iter_mut().zip(masks) {
                        *union |= mask;
                    }
                }
            }
        }
    }

    /// Which keys of the blocks that every token scores pass the threshold, `raised` by so many nats.
    #[inline(always)]
    fn pass_direct(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        columns: Columns,
        (scratch, raised): (&RetrievalScratch, f32),
        chosen: &mut ChosenKeys,
    ) {
        let (index, stride) = (self.index, columns.blocks);
        let TokenScratch { means, residuals, scores, thresholds, masks, union, .. } = &mut chosen.token;
        let rows = (0..tile.group).map(|g| g * tile.tokens + token);
        means.gather(&scratch.codes.means, rows.clone(), Some(&scratch.codes.centres));
        residuals.gather(&scratch.codes.residuals, rows, None);
        let steps = ROWS.min(tile.group);
        scores.resize(steps * stride, 0.0);
        thresholds.resize(steps * stride, 0);
        masks.resize(steps * stride, 0);
        union.fill(0);
        for first in (0..tile.group).step_by(ROWS) {
            let (query, scales) = means.step(first, &index.means.scales);
            let panels = columns.first_block / BLOCK..(columns.first_block + stride) / BLOCK;
            integer::score(query, &Panels::keys(&index.means.codes, panels), scales, scores, stride);
            for (g, (scores, thresholds)) in (first..first + query.rows)
                .zip(scores.chunks_exact(stride.max(1)).zip(thresholds.chunks_exact_mut(stride.max(1))))
            {
                let row = g * tile.tokens + token;
                let limit = scratch.limits.limit(row) + raised;
                let scores = (scores, scratch.inverse_scales());
                self.thresholds(tile, row, limit, scores, columns, &scratch.codes, thresholds);
            }
            let (query, _) = residuals.step(first, &[]);
            let panels = Panels::keys(&index.residuals, columns.first_block..self.candidates.blocks.end);
            masks.fill(0);
            integer::compare(query, &panels, thresholds, masks, stride);
            for masks in masks.chunks_exact(stride.max(1)).take(query.rows) {
                for (union, mask) in union.iter_mut().zip(masks) {
                    *union |= mask;
                }
            }
        }
    }

    /// Of the weights of blocks of opened sections, what is left beside the keys that are read.
    #[inline(always)]
    fn count_opened(&self, tile: &QueryTile<'_>, token: usize, chosen: &mut ChosenKeys) {
        let opened = &mut chosen.opened;
        let of_token = opened.of(token);
        for g in 0..tile.group {
            let of_head = opened.of_head(token, g);
            let sections = opened.sections[of_token.clone()].iter().zip(&opened.masks[of_token.clone()]);
            for (weights, (&section, masks)) in opened.weights[of_head].iter_mut().zip(sections) {
                for (block, (weight, mask)) in weights.iter_mut().zip(masks).enumerate() {
                    let held = positions(section as usize * BLOCKS_OF_SECTION + block, BLOCK, self.sinks).len();
                    *weight *= held as f32 - mask.count_ones() as f32;
                }
            }
        }
    }
}

impl ChosenKeys {
    /// How many keys pass.
    #[inline(always)]
    fn passing(&self, token: usize) -> usize {
        count(&self.token.union) + count(self.opened.masks[self.opened.of(token)].as_flattened())
    }

    /// Hides the tokens before `first` from the opened sections.
    #[inline(always)]
    fn hide_opened(&mut self, token: usize, first: usize) {
        let of_token = self.opened.of(token);
        let masks = self.opened.masks[of_token.clone()].iter_mut();
        for (masks, &section) in masks.zip(&self.opened.sections[of_token]) {
            if (section as usize) * SECTION >= first {
                return;
            }
            hide(masks, section as usize * BLOCKS_OF_SECTION, first);
        }
    }
}

/// How many bits of masks are set, four masks at a time.
#[inline(always)]
fn count(masks: &[u16]) -> usize {
    let (fours, rest) = masks.as_chunks::<4>();
    let mut count = 0;
    for [a, b, c, d] in fours {
        count += (u64::from(*a) | u64::from(*b) << 16 | u64::from(*c) << 32 | u64::from(*d) << 48).count_ones();
    }
    for mask in rest {
        count += mask.count_ones();
    }
    count as usize
}

/// Hides the tokens before `first` from the masks of blocks.
#[inline(always)]
fn hide(masks: &mut [u16], first_block: usize, first: usize) {
    for (at, mask) in masks.iter_mut().enumerate().take((first / BLOCK + 1).saturating_sub(first_block)) {
        *mask &= visible_lanes(first_block + at, first);
    }
}

/// Lanes of a block whose tokens stand at `first` or later.
#[inline(always)]
fn visible_lanes(block: usize, first: usize) -> u16 {
    match first.saturating_sub(block * BLOCK) {
        hidden if hidden < BLOCK => u16::MAX << hidden,
        _ => 0,
    }
}
