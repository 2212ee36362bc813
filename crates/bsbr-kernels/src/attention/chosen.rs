//! The keys that each token of a tile chose: which they are, and reading them.

use pulp::Simd;

use super::{
    CausalOptions,
    limits::{cap_inverse, passes_from},
    retrieval::{Columns, Retrieval, RetrievalScratch},
    sums::Sums,
    tile::QueryTile,
};
use crate::{
    gather,
    heads::Rows,
    index::{
        BLOCK, BLOCKS_OF_SECTION, Codes, SECTION,
        integer::{self, Panels, ROWS},
        positions,
        query::TokenCodes,
    },
    stored::StoredRows,
    vector,
};

/// Keys that the tokens of a tile chose, in order of their tokens.
#[derive(Default)]
pub(super) struct ChosenKeys {
    positions: Vec<u32>,
    /// Where the keys of each token begin, and where those of the last end.
    starts: Vec<usize>,
    /// How many keys of each block a token reads, for the columns of blocks; of the last token.
    counts: Vec<u8>,
    opened: Opened,
    excess: Vec<(f32, u32)>,
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
    opened_masks: Vec<[u16; BLOCKS_OF_SECTION]>,
    contest: Vec<(f32, u32)>,
    sums: Vec<f32>,
}

impl ChosenKeys {
    pub(super) fn clear(&mut self) {
        for starts in [&mut self.starts, &mut self.opened.starts, &mut self.opened.weight_starts] {
            starts.clear();
            starts.push(0);
        }
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
        {
            let data = lay_out(keys, positions, widened, rows);
            for (g, scores) in weights.chunks_exact_mut(count).enumerate() {
                let row = g * tile.tokens + token;
                gather::dots(simd, &tile.rows[row * width..(row + 1) * width], data.data(), rows, scores);
            }
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
            gather::add(simd, weights, data.data(), rows, &mut sums.output[row * width..(row + 1) * width]);
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
        scratch: &mut RetrievalScratch,
    ) -> bool {
        let mut chosen = std::mem::take(&mut scratch.chosen);
        let rows = || (0..tile.group).map(|g| g * tile.tokens + token);
        let union = &mut chosen.token.union;
        union.clear();
        union.extend_from_slice(scratch.mask(token, columns));
        for row in rows().skip(1) {
            for (union, mask) in union.iter_mut().zip(scratch.mask(row, columns)) {
                *union |= mask;
            }
        }
        let position = tile.start + token;
        let hidden = self.sinks.max(self.options.first_visible(position));
        for (at, mask) in union.iter_mut().enumerate().take((hidden / BLOCK + 1).saturating_sub(columns.first_block)) {
            *mask &= visible_lanes(columns.first_block + at, hidden);
        }
        let start = chosen.positions.len();
        if columns.closed > 0 {
            self.open(simd, tile, token, columns, scratch, &mut chosen);
        }
        chosen.opened.starts.push(chosen.opened.sections.len());
        chosen.counts.clear();
        let union = std::mem::take(&mut chosen.token.union);
        push_positions(&union, columns.first_block, &mut chosen.positions);
        chosen.counts.extend(union.iter().map(|mask| mask.count_ones() as u8));
        chosen.token.union = union;
        let capped = chosen.positions.len() - start > self.settings.max_keys;
        if capped {
            self.keep_best(simd, tile, token, columns, scratch, &mut chosen, start);
        }
        self.count_opened(tile, &mut chosen);
        chosen.starts.push(chosen.positions.len());
        scratch.chosen = chosen;
        capped
    }

    /// Opens the sections in which a key may pass, and takes over the keys of theirs that do.
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
        let position = tile.start + token;
        let visible = self.options.first_visible(position);
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
        let count = chosen.opened.sections.len() - opened;
        let first_weight = chosen.opened.weights.len();
        chosen.opened.weights.resize(first_weight + tile.group * count, [0.0; BLOCKS_OF_SECTION]);
        if count == 0 {
            chosen.token.opened_masks.clear();
            return;
        }
        let (index, group) = (self.index, tile.group);
        let TokenScratch { means, residuals, scores, thresholds, masks, opened_masks, .. } = &mut chosen.token;
        let rows = (0..group).map(|g| g * tile.tokens + token);
        means.gather(&scratch.codes.means, rows.clone(), Some(&scratch.codes.centres));
        residuals.gather(&scratch.codes.residuals, rows, None);
        scores.resize(ROWS * BLOCK, 0.0);
        thresholds.resize(ROWS * BLOCKS_OF_SECTION, 0);
        masks.resize(ROWS * BLOCKS_OF_SECTION, 0);
        opened_masks.clear();
        opened_masks.resize(count, [0; BLOCKS_OF_SECTION]);
        let hidden = self.sinks.max(visible);
        for (at, &section) in chosen.opened.sections[opened..].iter().enumerate() {
            let section = section as usize;
            let first_block = section * BLOCKS_OF_SECTION;
            let whole = positions(section, SECTION, self.sinks).start >= visible;
            for first in (0..group).step_by(ROWS) {
                let panel = first_block / BLOCK;
                let panels = Panels { codes: &index.means.codes, range: panel..panel + 1, offset: true };
                let (query, scales) = means.step(first, &index.means.scales);
                integer::score(query, &panels, scales, scores, BLOCK);
                let steps = query.rows;
                for (step, scores) in scores.chunks_exact_mut(BLOCK).enumerate().take(steps) {
                    let g = first + step;
                    let row = g * tile.tokens + token;
                    let scores = &mut scores[first_block % BLOCK..][..BLOCKS_OF_SECTION];
                    for (block, score) in scores.iter().enumerate() {
                        let limit = scratch.limits.limit(row) - self.bias(tile, row, first_block + block, BLOCK);
                        let limit = cap_inverse(limit, self.options.softcap);
                        let inverse = 1.0 / index.residual_scales[first_block + block];
                        let (scale, offset) = residuals.of(g);
                        let bound = (limit - score) * (1.0 / scale) * inverse;
                        thresholds[step * BLOCKS_OF_SECTION + block] = passes_from(bound, offset);
                    }
                    if whole {
                        self.finish(simd, tile, row, first_block, BLOCK, scores);
                        for score in scores.iter_mut() {
                            *score = (*score - scratch.limits.reference(row)).exp();
                        }
                    } else {
                        scores.fill(0.0);
                    }
                    chosen.opened.weights[first_weight + g * count + at].copy_from_slice(scores);
                }
                let (query, _) = residuals.step(first, &index.residual_scales);
                let panels = Panels {
                    codes: &index.residuals,
                    range: first_block..first_block + BLOCKS_OF_SECTION,
                    offset: true,
                };
                integer::compare(query, &panels, thresholds, masks, BLOCKS_OF_SECTION);
                for masks in masks.chunks_exact(BLOCKS_OF_SECTION).take(steps) {
                    for (block, (union, mask)) in opened_masks[at].iter_mut().zip(masks).enumerate() {
                        *union |= mask & visible_lanes(first_block + block, hidden);
                    }
                }
            }
        }
        for (masks, &section) in opened_masks.iter().zip(&chosen.opened.sections[opened..]) {
            push_positions(masks, section as usize * BLOCKS_OF_SECTION, &mut chosen.positions);
        }
    }

    /// Of the weights of blocks of opened sections, what is left beside the keys that are read.
    #[inline(always)]
    fn count_opened(&self, tile: &QueryTile<'_>, chosen: &mut ChosenKeys) {
        let opened = &mut chosen.opened;
        let from = opened.starts[opened.starts.len() - 2];
        let count = opened.sections.len() - from;
        let end = opened.weights.len();
        for weights in opened.weights[end - tile.group * count..].chunks_exact_mut(count.max(1)) {
            for ((weights, masks), &section) in
                weights.iter_mut().zip(&chosen.token.opened_masks).zip(&opened.sections[from..])
            {
                for (block, (weight, mask)) in weights.iter_mut().zip(masks).enumerate() {
                    let held = positions(section as usize * BLOCKS_OF_SECTION + block, BLOCK, self.sinks).len();
                    *weight *= held as f32 - mask.count_ones() as f32;
                }
            }
        }
        opened.weight_starts.push(end);
    }

    /// Of the keys from `start` on, those that pass by the most.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn keep_best<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        columns: Columns,
        scratch: &RetrievalScratch,
        chosen: &mut ChosenKeys,
        start: usize,
    ) {
        let index = self.index;
        let ChosenKeys { positions, excess, token: TokenScratch { means, residuals, scores, sums, .. }, .. } = chosen;
        let rows = (0..tile.group).map(|g| g * tile.tokens + token);
        means.gather(&scratch.codes.means, rows.clone(), Some(&scratch.codes.centres));
        residuals.gather(&scratch.codes.residuals, rows, None);
        excess.clear();
        excess.extend(positions[start..].iter().map(|&position| (f32::NEG_INFINITY, position)));
        scores.resize(ROWS * BLOCK, 0.0);
        sums.resize(ROWS * BLOCK, 0.0);
        let panel_bytes = Codes::panel(index.channels.len());
        for keys in excess.chunk_by_mut(|a, b| a.1 / BLOCK as u32 == b.1 / BLOCK as u32) {
            let block = keys[0].1 as usize / BLOCK;
            for first in (0..tile.group).step_by(ROWS) {
                let panels =
                    Panels { codes: &index.means.codes, range: block / BLOCK..block / BLOCK + 1, offset: true };
                let (query, scales) = means.step(first, &index.means.scales);
                integer::score(query, &panels, scales, scores, BLOCK);
                let codes = &index.residuals[block * panel_bytes..(block + 1) * panel_bytes];
                let (query, scales) = residuals.step(first, &[1.0; BLOCK]);
                integer::score(query, &Panels { codes, range: 0..1, offset: true }, scales, sums, BLOCK);
                for step in 0..query.rows {
                    let row = (first + step) * tile.tokens + token;
                    let (base, scale) = (scores[step * BLOCK + block % BLOCK], index.residual_scales[block]);
                    let own = &mut sums[step * BLOCK..(step + 1) * BLOCK];
                    for sum in own.iter_mut() {
                        *sum = base + *sum * scale;
                    }
                    if let Some(cap) = self.options.softcap {
                        vector::softcap(simd, own, cap);
                    }
                    let shift = self.bias(tile, row, block, BLOCK) - scratch.limits.limit(row);
                    for (excess, position) in keys.iter_mut() {
                        *excess = excess.max(own[*position as usize % BLOCK] + shift);
                    }
                }
            }
        }
        keep_largest(excess, self.settings.max_keys);
        positions.truncate(start);
        positions.extend(excess.iter().map(|(_, position)| *position));
        chosen.recount(columns, start);
    }
}

impl ChosenKeys {
    /// Counts again how many keys of each block are read, after some were dropped.
    fn recount(&mut self, columns: Columns, start: usize) {
        self.counts.fill(0);
        for masks in &mut self.token.opened_masks {
            masks.fill(0);
        }
        let from = self.opened.starts[self.opened.starts.len() - 2];
        let opened = &self.opened.sections[from..];
        for &position in &self.positions[start..] {
            let block = position as usize / BLOCK;
            if let Some(at) = block.checked_sub(columns.first_block).filter(|_| block >= columns.direct_from) {
                self.counts[at] += 1;
            } else if let Ok(at) = opened.binary_search(&((block / BLOCKS_OF_SECTION) as u32)) {
                self.token.opened_masks[at][block % BLOCKS_OF_SECTION] |= 1 << (position as usize % BLOCK);
            }
        }
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

/// Positions of the bits of consecutive blocks.
#[inline(always)]
fn push_positions(masks: &[u16], first_block: usize, positions: &mut Vec<u32>) {
    let (fours, rest) = masks.as_chunks::<4>();
    for (at, four) in fours.iter().enumerate() {
        let mut bits = four.iter().rev().fold(0_u64, |bits, &mask| bits << BLOCK | u64::from(mask));
        let first = (first_block + 4 * at) * BLOCK;
        while bits != 0 {
            positions.push(first as u32 + bits.trailing_zeros());
            bits &= bits - 1;
        }
    }
    for (at, &mask) in rest.iter().enumerate() {
        let first = (first_block + 4 * fours.len() + at) * BLOCK;
        positions.extend((0..BLOCK).filter(|lane| mask >> lane & 1 == 1).map(|lane| (first + lane) as u32));
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
