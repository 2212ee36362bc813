//! Sections far back that tokens open: which they are, and which of their keys pass.
//!
//! Neighbouring tokens open much the same sections. So the rows of a step score every section that any of them opened
//! together, and each keeps what it asked for.

use std::ops::Range;

use pulp::Simd;

use super::{
    chosen::{ChosenKeys, TokenScratch},
    limits::cap_inverse,
    retrieval::{Columns, Retrieval, RetrievalScratch},
    tile::QueryTile,
};
use crate::{
    index::{
        BLOCK, BLOCKS_OF_SECTION, Codes, HeadIndex, SECTION,
        integer::{self, Panels, ROWS},
        positions,
    },
    prefetch::prefetch,
    vector,
};

/// Sections whose mean keys of blocks fill a panel.
const SECTIONS: usize = BLOCK / BLOCKS_OF_SECTION;

/// Sections that the tokens of a tile opened.
#[derive(Default)]
pub(super) struct Opened {
    group: usize,
    /// Token after token, ascending in each.
    pub(super) sections: Vec<u32>,
    /// Where those of each token begin, and where those of the last end.
    starts: Vec<usize>,
    /// Keys of each of them that pass.
    pub(super) masks: Vec<[u16; BLOCKS_OF_SECTION]>,
    /// For each token, head and opened section: scores of its blocks before the softcap, and their weights.
    pub(super) scores: Vec<[f32; BLOCKS_OF_SECTION]>,
    pub(super) weights: Vec<[f32; BLOCKS_OF_SECTION]>,
    /// Rows of a step that opened a section, as bits; and the panels in which there is one.
    rows: Vec<u16>,
    panels: Vec<u32>,
}

impl Opened {
    pub(super) fn clear(&mut self, group: usize) {
        self.group = group;
        self.sections.clear();
        self.starts.clear();
        self.starts.push(0);
    }

    /// Where the sections of a token are.
    pub(super) fn of(&self, token: usize) -> Range<usize> {
        self.starts[token]..self.starts[token + 1]
    }

    /// Where scores and weights of a token and a head of the group are.
    pub(super) fn of_head(&self, token: usize, head: usize) -> Range<usize> {
        let Range { start, end } = self.of(token);
        let from = start * self.group + head * (end - start);
        from..from + end - start
    }
}

/// Numbers of the rows of a step and the blocks of a panel.
struct Step {
    scores: [f32; ROWS * BLOCK],
    thresholds: [i32; ROWS * BLOCK],
    masks: [u16; ROWS * BLOCK],
}

impl Retrieval<'_> {
    /// Opens the sections in which a key may pass, for all tokens, weighs their blocks and finds the keys that pass.
    #[inline(always)]
    pub(super) fn open<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        columns: Columns,
        scratch: &RetrievalScratch,
        chosen: &mut ChosenKeys,
    ) {
        for token in 0..tile.tokens {
            if columns.closed > 0 {
                self.choose_sections(tile, token, columns, scratch, chosen);
            }
            chosen.opened.starts.push(chosen.opened.sections.len());
        }
        let opened = &mut chosen.opened;
        let count = opened.sections.len();
        opened.masks.clear();
        opened.masks.resize(count, [0; BLOCKS_OF_SECTION]);
        opened.scores.resize(count * tile.group, [0.0; BLOCKS_OF_SECTION]);
        opened.weights.resize(count * tile.group, [0.0; BLOCKS_OF_SECTION]);
        if count == 0 {
            return;
        }
        for first in (0..tile.count()).step_by(ROWS) {
            self.score_opened(simd, tile, first..tile.count().min(first + ROWS), scratch, opened);
        }
    }

    /// Which sections a token opens.
    #[inline(always)]
    fn choose_sections(
        &self,
        tile: &QueryTile<'_>,
        token: usize,
        columns: Columns,
        scratch: &RetrievalScratch,
        chosen: &mut ChosenKeys,
    ) {
        let Range { start, end } = self.candidates.sections;
        let skipped = start % BLOCK;
        let first_seen = (self.options.first_visible(tile.start + token) / SECTION).max(start);
        let TokenScratch { margins, contest, order, .. } = &mut chosen.token;
        margins.clear();
        margins.resize(end.saturating_sub(first_seen), f32::NEG_INFINITY);
        for g in 0..tile.group {
            let row = g * tile.tokens + token;
            let limit = scratch.limits.limit(row);
            let bounds = &scratch.bound(row, columns)[skipped + first_seen - start..skipped + end - start];
            for (margin, bound) in margins.iter_mut().zip(bounds) {
                let above = bound - limit;
                *margin = if above > *margin { above } else { *margin };
            }
        }
        contest.clear();
        for (number, margins) in margins.chunks(BLOCK).enumerate() {
            let mut any = false;
            for &margin in margins {
                any |= margin > 0.0;
            }
            if !any {
                continue;
            }
            for (at, &margin) in margins.iter().enumerate() {
                if margin > 0.0 {
                    // Bits of positive numbers are in their order, so that these are in that of margins, then of sections.
                    let section = (first_seen + number * BLOCK + at) as u64;
                    contest.push(u64::from(margin.to_bits()) << u32::BITS | section);
                }
            }
        }
        if contest.len() > self.settings.max_sections {
            order.clear();
            order.extend_from_slice(contest);
            let lowest = order.len() - self.settings.max_sections;
            // Those below the lowest that is left, of which there are as many as are too many.
            let first_kept = if lowest < order.len() { *order.select_nth_unstable(lowest).1 } else { u64::MAX };
            contest.retain(|&entry| entry >= first_kept);
        }
        chosen.opened.sections.extend(contest.iter().map(|&entry| entry as u32));
    }

    /// Scores the sections that any row of a step opened.
    #[inline(always)]
    fn score_opened<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        rows: Range<usize>,
        scratch: &RetrievalScratch,
        opened: &mut Opened,
    ) {
        let (index, codes) = (self.index, &scratch.codes);
        let sections = self.candidates.sections.clone();
        let first_panel = sections.start / SECTIONS;
        let count = sections.end.div_ceil(SECTIONS) - first_panel;
        opened.rows.clear();
        opened.rows.resize(count * SECTIONS, 0);
        for (at, row) in rows.clone().enumerate() {
            for &section in &opened.sections[opened.of(row % tile.tokens)] {
                opened.rows[section as usize - first_panel * SECTIONS] |= 1 << at;
            }
        }
        opened.panels.clear();
        for (panel, bits) in opened.rows.as_chunks::<SECTIONS>().0.iter().enumerate() {
            if *bits != [0; SECTIONS] {
                opened.panels.push(panel as u32);
            }
        }
        let mut step = Step { scores: [0.0; ROWS * BLOCK], thresholds: [0; ROWS * BLOCK], masks: [0; ROWS * BLOCK] };
        let mut done = [0; ROWS];
        for number in 0..opened.panels.len() {
            let panel = opened.panels[number] as usize;
            if let Some(&next) = opened.panels.get(number + 1) {
                let next = next as usize;
                ask(index, first_panel + next, &opened.rows[next * SECTIONS..(next + 1) * SECTIONS]);
            }
            let panels = Panels::keys(&index.means.codes, first_panel + panel..first_panel + panel + 1);
            let query = codes.means.step(rows.start, rows.len());
            integer::score(query, &panels, codes.mean_scales(rows.start, &index.means.scales), &mut step.scores, BLOCK);
            let bits: [u16; SECTIONS] = [
                opened.rows[panel * SECTIONS],
                opened.rows[panel * SECTIONS + 1],
                opened.rows[panel * SECTIONS + 2],
                opened.rows[panel * SECTIONS + 3],
            ];
            let any = bits[0] | bits[1] | bits[2] | bits[3];
            let first_block = (first_panel + panel) * BLOCK;
            let mut inverse_scales = [0.0; BLOCK];
            for (inverse, scale) in inverse_scales.iter_mut().zip(&index.residual_scales[first_block..][..BLOCK]) {
                *inverse = 1.0 / scale;
            }
            for (at, row) in rows.clone().enumerate() {
                if any >> at & 1 != 0 {
                    let scores = step.scores.as_chunks::<BLOCK>().0[at];
                    let thresholds = &mut step.thresholds[at * BLOCK..(at + 1) * BLOCK];
                    let scale = (codes.residuals.scales[row], codes.residuals.offsets[row]);
                    let limit = scratch.limits.limit(row);
                    self.thresholds_of_blocks(
                        tile,
                        row,
                        limit,
                        first_block,
                        (&scores, &inverse_scales),
                        scale,
                        thresholds,
                    );
                }
            }
            let query = codes.residuals.step(rows.start, rows.len());
            for (section, bits) in bits.into_iter().enumerate() {
                if bits != 0 {
                    let at = section * BLOCKS_OF_SECTION;
                    let panels = first_block + at..first_block + at + BLOCKS_OF_SECTION;
                    let panels = Panels::keys(&index.residuals, panels);
                    integer::compare(query, &panels, &step.thresholds[at..], &mut step.masks[at..], BLOCK);
                }
            }
            for (at, row) in rows.clone().enumerate() {
                if any >> at & 1 == 0 {
                    continue;
                }
                let (token, head) = (row % tile.tokens, row / tile.tokens);
                let scores = step.scores.as_chunks::<BLOCK>().0[at];
                let mut weights = scores;
                self.finish(simd, tile, row, first_block, BLOCK, &mut weights);
                vector::exp_sum(simd, &mut weights, scratch.limits.reference(row));
                let visible = self.options.first_visible(tile.start + token);
                let (of_token, of_head) = (opened.of(token), opened.of_head(token, head));
                for (section, bits) in bits.into_iter().enumerate() {
                    if bits >> at & 1 == 0 {
                        continue;
                    }
                    let place = done[at];
                    done[at] += 1;
                    let number = (first_panel + panel) * SECTIONS + section;
                    let whole = positions(number, SECTION, self.sinks).start >= visible;
                    opened.scores[of_head.start + place] = scores.as_chunks::<BLOCKS_OF_SECTION>().0[section];
                    opened.weights[of_head.start + place] = if whole {
                        weights.as_chunks::<BLOCKS_OF_SECTION>().0[section]
                    } else {
                        [0.0; BLOCKS_OF_SECTION]
                    };
                    let passing = &step.masks[at * BLOCK + section * BLOCKS_OF_SECTION..][..BLOCKS_OF_SECTION];
                    for (mask, passing) in opened.masks[of_token.start + place].iter_mut().zip(passing) {
                        *mask |= passing;
                    }
                }
            }
        }
    }

    /// What the sums of products of residuals of a row must pass in the blocks from `first_block` on.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) fn thresholds_of_blocks(
        &self,
        tile: &QueryTile<'_>,
        row: usize,
        limit: f32,
        first_block: usize,
        (scores, inverse_scales): (&[f32], &[f32]),
        (scale, offset): (f32, i32),
        thresholds: &mut [i32],
    ) {
        let inverse = 1.0 / scale;
        let each = thresholds.iter_mut().zip(scores).zip(inverse_scales);
        if tile.slopes.is_none() {
            let limit = cap_inverse(limit, self.options.softcap);
            for ((threshold, score), inverse_scale) in each {
                *threshold = integer::floor((limit - score) * inverse * inverse_scale) + offset;
            }
        } else {
            for (at, ((threshold, score), inverse_scale)) in each.enumerate() {
                let limit = cap_inverse(limit - self.bias(tile, row, first_block + at, BLOCK), self.options.softcap);
                *threshold = integer::floor((limit - score) * inverse * inverse_scale) + offset;
            }
        }
    }
}

/// Asks for the codes of the sections of a panel that are to be scored.
#[inline(always)]
fn ask(index: &HeadIndex, panel: usize, rows: &[u16]) {
    let size = Codes::panel(index.width);
    prefetch(&index.means.codes[panel * size..(panel + 1) * size]);
    let size = Codes::panel(index.channels.len()) * BLOCKS_OF_SECTION;
    for (at, &rows) in rows.iter().enumerate() {
        if rows != 0 {
            let section = panel * SECTIONS + at;
            prefetch(&index.residuals[section * size..(section + 1) * size]);
        }
    }
}
