//! The keys that each token of a tile chose: which they are, and reading them.

use pulp::Simd;

use super::{
    CausalOptions,
    limits::cap_inverse,
    retrieval::{Columns, Retrieval, RetrievalScratch},
    sums::Sums,
    tile::QueryTile,
};
use crate::{
    gather,
    heads::Rows,
    index::{
        BLOCK, BLOCKS_OF_SECTION, SECTION,
        integer::{self, Panels, ROWS},
        positions,
        query::TokenCodes,
    },
    stored::StoredRows,
    vector,
};

/// Doublings of a threshold after which scores are no numbers to compare.
const MOST_DOUBLINGS: usize = 1000;

/// Keys that the tokens of a tile chose, in order of their tokens.
#[derive(Default)]
pub(super) struct ChosenKeys {
    positions: Vec<u32>,
    /// Where the keys of each token begin, and where those of the last end.
    starts: Vec<usize>,
    /// How many keys of each block a token reads, for the columns of blocks; of the last token.
    counts: Vec<u8>,
    opened: Opened,
    /// Weights of the keys of each token and head, `[heads, keys]`; kept where gradients are to follow.
    pub(super) weights: Vec<f32>,
    /// Where the weights of each token begin.
    weight_starts: Vec<usize>,
    /// Whether weights of earlier tokens are kept.
    pub(super) keep: bool,
    rows: Vec<usize>,
    widened: Vec<f32>,
    token: TokenScratch,
}

/// Sections that tokens opened.
#[derive(Default)]
struct Opened {
    sections: Vec<u32>,
    starts: Vec<usize>,
    /// For each token, head and opened section: the weights of its blocks. Token after token.
    weights: Vec<[f32; BLOCKS_OF_SECTION]>,
    weight_starts: Vec<usize>,
}

#[derive(Default)]
struct TokenScratch {
    means: TokenCodes,
    residuals: TokenCodes,
    scores: Vec<f32>,
    thresholds: Vec<i32>,
    masks: Vec<u16>,
    union: Vec<u16>,
    /// Scores of the blocks of opened sections, head after head.
    opened_scores: Vec<[f32; BLOCKS_OF_SECTION]>,
    opened_masks: Vec<[u16; BLOCKS_OF_SECTION]>,
    contest: Vec<(f32, u32)>,
}

impl ChosenKeys {
    pub(super) fn clear(&mut self) {
        for starts in [&mut self.starts, &mut self.opened.starts] {
            starts.clear();
            starts.push(0);
        }
        self.opened.weight_starts.clear();
        self.positions.clear();
        self.opened.sections.clear();
        self.opened.weights.clear();
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
        &self.opened.sections[self.opened.starts[token]..self.opened.starts[token + 1]]
    }

    /// Those sections with the weights of their blocks, for a head of the group.
    pub(super) fn opened_weights(&mut self, token: usize, head: usize) -> (&[u32], &mut [[f32; BLOCKS_OF_SECTION]]) {
        let Opened { sections, starts, weights, weight_starts } = &mut self.opened;
        let sections = &sections[starts[token]..starts[token + 1]];
        let start = weight_starts[token] + head * sections.len();
        (sections, &mut weights[start..start + sections.len()])
    }

    /// Weights of the keys of a token, for a head of the group.
    pub(super) fn weights(&self, token: usize, head: usize) -> &[f32] {
        let (start, count) = (self.weight_starts[token], self.of(token).len());
        &self.weights[start + head * count..start + (head + 1) * count]
    }

    /// Reads the keys of a token.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        (keys, values): (StoredRows<'_>, StoredRows<'_>),
        options: &CausalOptions,
        sums: &mut Sums<'_>,
    ) {
        let Self { positions, starts, weights, weight_starts, keep, rows, widened, .. } = self;
        let next = starts.get(token + 2).map_or(&[][..], |&end| &positions[starts[token + 1]..end]);
        let positions = &positions[starts[token]..starts[token + 1]];
        if !*keep {
            weights.clear();
        }
        let start = weights.len();
        weight_starts.resize(token, 0);
        weight_starts.push(start);
        if positions.is_empty() {
            return;
        }
        let (count, width) = (positions.len(), keys.width());
        weights.resize(start + tile.group * count, 0.0);
        let weights = &mut weights[start..];
        let data = lay_out(keys, positions, widened, rows);
        for (g, scores) in weights.chunks_exact_mut(count).enumerate() {
            let row = g * tile.tokens + token;
            // What the next token reads comes into the cache while this one is computed with.
            let ahead = keys.ahead(if g == 0 { next } else { &[] });
            gather::dots(simd, &tile.rows[row * width..(row + 1) * width], data.data(), rows, scores, ahead);
        }
        for (g, scores) in weights.chunks_exact_mut(count).enumerate() {
            if let Some(cap) = options.softcap {
                vector::softcap(simd, scores, cap);
            }
            if let Some(slopes) = tile.slopes {
                let token = tile.start + token;
                for (score, &position) in scores.iter_mut().zip(positions) {
                    *score -= slopes[g] * (token - position as usize) as f32;
                }
            }
            sums.add(simd, g * tile.tokens + token, scores);
        }
        let data = lay_out(values, positions, widened, rows);
        for (g, weights) in weights.chunks_exact(count).enumerate() {
            let row = g * tile.tokens + token;
            let ahead = values.ahead(if g == 0 { next } else { &[] });
            gather::add(simd, weights, data.data(), rows, &mut sums.output[row * width..(row + 1) * width], ahead);
        }
    }
}

/// The rows at `positions` in f32, and where each begins: where they lie, or in `widened` one after the other.
#[inline(always)]
fn lay_out<'a>(
    stored: StoredRows<'a>,
    positions: &[u32],
    widened: &'a mut Vec<f32>,
    rows: &mut Vec<usize>,
) -> Rows<'a> {
    rows.clear();
    match stored {
        StoredRows::F32(all) => {
            rows.extend(positions.iter().map(|&position| position as usize * all.stride()));
            all
        }
        narrow => {
            let width = narrow.width();
            rows.extend((0..positions.len()).map(|at| at * width));
            narrow.gathered(positions, widened)
        }
    }
}

impl Retrieval<'_> {
    /// Chooses the keys of a token. Tells whether more passed than it may read.
    #[inline(always)]
    pub(super) fn choose<S: Simd>(
        &self,
        simd: S,
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
        chosen.token.opened_masks.clear();
        if columns.closed > 0 {
            self.open(simd, tile, token, columns, scratch, chosen);
            self.pass_opened(tile, token, (scratch, 0.0), chosen, hidden);
        }
        chosen.opened.starts.push(chosen.opened.sections.len());
        let mut doublings = 0;
        while chosen.token.passing() > self.settings.max_keys && doublings < MOST_DOUBLINGS {
            doublings += 1;
            let raised = doublings as f32 * std::f32::consts::LN_2;
            self.pass_direct(tile, token, columns, (scratch, raised), chosen);
            hide(&mut chosen.token.union, columns.first_block, hidden);
            self.pass_opened(tile, token, (scratch, raised), chosen, hidden);
        }
        let from = chosen.opened.starts[chosen.opened.starts.len() - 2];
        let TokenScratch { union, opened_masks, .. } = &chosen.token;
        for (masks, &section) in opened_masks.iter().zip(&chosen.opened.sections[from..]) {
            integer::push_positions(masks, section as usize * SECTION, &mut chosen.positions);
        }
        integer::push_positions(union, columns.first_block * BLOCK, &mut chosen.positions);
        chosen.counts.clear();
        chosen.counts.extend(union.iter().map(|mask| mask.count_ones() as u8));
        self.count_opened(tile, chosen);
        chosen.starts.push(chosen.positions.len());
        doublings > 0
    }

    /// Opens the sections in which a key may pass, and weighs their blocks.
    #[inline(always)]
    fn open<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        columns: Columns,
        scratch: &RetrievalScratch,
        chosen: &mut ChosenKeys,
    ) {
        let sections = self.candidates.sections.clone();
        let skipped = sections.start % BLOCK;
        let visible = self.options.first_visible(tile.start + token);
        let first_seen = (visible / SECTION).max(sections.start);
        let contest = &mut chosen.token.contest;
        contest.clear();
        for g in 0..tile.group {
            let row = g * tile.tokens + token;
            let (bounds, limit) =
                (&scratch.bound(row, columns)[skipped..][..sections.len()], scratch.limits.limit(row));
            for section in first_seen..sections.end {
                let excess = bounds[section - sections.start] - limit;
                if excess > 0.0 {
                    contest.push((excess, section as u32));
                }
            }
        }
        if tile.group > 1 {
            contest.sort_unstable_by(|a, b| a.1.cmp(&b.1).then(b.0.total_cmp(&a.0)));
            contest.dedup_by_key(|(_, section)| *section);
        }
        keep_largest(contest, self.settings.max_sections);
        let opened = chosen.opened.sections.len();
        chosen.opened.sections.extend(contest.iter().map(|(_, section)| *section));
        let (index, group, count) = (self.index, tile.group, chosen.opened.sections.len() - opened);
        let first_weight = chosen.opened.weights.len();
        chosen.opened.weights.resize(first_weight + group * count, [0.0; BLOCKS_OF_SECTION]);
        let TokenScratch { means, scores, opened_scores, opened_masks, .. } = &mut chosen.token;
        means.gather(&scratch.codes.means, (0..group).map(|g| g * tile.tokens + token), Some(&scratch.codes.centres));
        scores.resize(ROWS * BLOCK, 0.0);
        opened_masks.resize(count, [0; BLOCKS_OF_SECTION]);
        opened_scores.clear();
        opened_scores.resize(group * count, [0.0; BLOCKS_OF_SECTION]);
        for (at, &section) in chosen.opened.sections[opened..].iter().enumerate() {
            let first_block = section as usize * BLOCKS_OF_SECTION;
            let whole = positions(section as usize, SECTION, self.sinks).start >= visible;
            let panels = Panels::keys(&index.means.codes, first_block / BLOCK..first_block / BLOCK + 1);
            for first in (0..group).step_by(ROWS) {
                let (query, scales) = means.step(first, &index.means.scales);
                integer::score(query, &panels, scales, scores, BLOCK);
                for (g, scores) in (first..first + query.rows).zip(scores.chunks_exact_mut(BLOCK)) {
                    let scores = &mut scores[first_block % BLOCK..][..BLOCKS_OF_SECTION];
                    opened_scores[g * count + at].copy_from_slice(scores);
                    if whole {
                        let row = g * tile.tokens + token;
                        self.finish(simd, tile, row, first_block, BLOCK, scores);
                        let reference = scratch.limits.reference(row);
                        for (weight, score) in
                            chosen.opened.weights[first_weight + g * count + at].iter_mut().zip(scores)
                        {
                            *weight = (*score - reference).exp();
                        }
                    }
                }
            }
        }
    }

    /// Which keys of opened sections pass the threshold, `raised` by so many nats.
    #[inline(always)]
    fn pass_opened(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        (scratch, raised): (&RetrievalScratch, f32),
        chosen: &mut ChosenKeys,
        hidden: usize,
    ) {
        let (index, group) = (self.index, tile.group);
        let TokenScratch { residuals, thresholds, masks, opened_scores, opened_masks, .. } = &mut chosen.token;
        let count = opened_masks.len();
        if count == 0 {
            return;
        }
        residuals.gather(&scratch.codes.residuals, (0..group).map(|g| g * tile.tokens + token), None);
        thresholds.resize(ROWS * BLOCKS_OF_SECTION, 0);
        masks.resize(ROWS * BLOCKS_OF_SECTION, 0);
        let sections = &chosen.opened.sections[chosen.opened.sections.len() - count..];
        for (at, (union, &section)) in opened_masks.iter_mut().zip(sections).enumerate() {
            let first_block = section as usize * BLOCKS_OF_SECTION;
            let panels = Panels::keys(&index.residuals, first_block..first_block + BLOCKS_OF_SECTION);
            union.fill(0);
            for first in (0..group).step_by(ROWS) {
                let (query, _) = residuals.step(first, &[]);
                for (g, thresholds) in (first..first + query.rows).zip(thresholds.chunks_exact_mut(BLOCKS_OF_SECTION)) {
                    let (row, (scale, offset)) = (g * tile.tokens + token, residuals.of(g));
                    for (block, threshold) in thresholds.iter_mut().enumerate() {
                        let limit =
                            scratch.limits.limit(row) + raised - self.bias(tile, row, first_block + block, BLOCK);
                        let limit = cap_inverse(limit, self.options.softcap);
                        let inverse = 1.0 / index.residual_scales[first_block + block];
                        let beyond = limit - opened_scores[g * count + at][block];
                        *threshold = integer::floor(beyond * (1.0 / scale) * inverse) + offset;
                    }
                }
                integer::compare(query, &panels, thresholds, masks, BLOCKS_OF_SECTION);
                for masks in masks.chunks_exact(BLOCKS_OF_SECTION).take(query.rows) {
                    for (union, mask) in union.iter_mut().zip(masks) {
                        *union |= mask;
                    }
                }
            }
            hide(union, first_block, hidden);
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
            for (g, (scores, thresholds)) in
                (first..first + query.rows).zip(scores.chunks_exact(stride).zip(thresholds.chunks_exact_mut(stride)))
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
            for masks in masks.chunks_exact(stride).take(query.rows) {
                for (union, mask) in union.iter_mut().zip(masks) {
                    *union |= mask;
                }
            }
        }
    }

    /// Of the weights of blocks of opened sections, what is left beside the keys that are read.
    #[inline(always)]
    fn count_opened(&self, tile: &QueryTile<'_>, chosen: &mut ChosenKeys) {
        let opened = &mut chosen.opened;
        let from = opened.starts[opened.starts.len() - 2];
        let (end, count) = (opened.weights.len(), opened.sections.len() - from);
        opened.weight_starts.push(end - tile.group * count);
        for weights in opened.weights[end - tile.group * count..].chunks_exact_mut(count.max(1)) {
            let sections = opened.sections[from..].iter().zip(&chosen.token.opened_masks);
            for (weights, (&section, masks)) in weights.iter_mut().zip(sections) {
                for (block, (weight, mask)) in weights.iter_mut().zip(masks).enumerate() {
                    let held = positions(section as usize * BLOCKS_OF_SECTION + block, BLOCK, self.sinks).len();
                    *weight *= held as f32 - mask.count_ones() as f32;
                }
            }
        }
    }
}

impl TokenScratch {
    /// How many keys pass.
    fn passing(&self) -> usize {
        let opened = self.opened_masks.as_flattened().iter();
        self.union.iter().chain(opened).map(|mask| mask.count_ones() as usize).sum()
    }
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

/// Keeps the `count` largest, the later of equals, in order of what they belong to.
fn keep_largest(entries: &mut Vec<(f32, u32)>, count: usize) {
    if entries.len() > count {
        entries.select_nth_unstable_by(count, |a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        entries.truncate(count);
        entries.sort_unstable_by_key(|entry| entry.1);
    }
}
