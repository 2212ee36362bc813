//! Reading the keys that the tokens of a tile chose.
//!
//! Neighbouring tokens choose much the same keys. So a few tokens first score all keys, one token after the other, and then
//! read all values: most of what a token reads is in the nearest cache from the token before it. Rows that are stored in fewer
//! bytes are widened once for all of those tokens.

use std::ops::Range;

use pulp::Simd;

use super::{CausalOptions, chosen::ChosenKeys, sums::Sums, tile::QueryTile};
use crate::{
    gather::{self, Gathered},
    heads::Rows,
    index::{BLOCK, integer},
    stored::StoredRows,
    vector,
};

/// Tokens that read together.
pub(super) const TOKENS: usize = 32;

/// Keys that any token of those that read together chose, where rows are widened.
#[derive(Default)]
pub(super) struct Together {
    /// Whether rows are.
    widens: bool,
    /// The first block that has a mask.
    first_block: usize,
    masks: Vec<u16>,
    positions: Vec<u32>,
    /// Where the keys of each block begin among them.
    starts: Vec<u32>,
    /// For each key of each token its place among them.
    places: Vec<u32>,
    widened: Vec<f32>,
}

impl Together {
    /// Forgets all keys, for others of the blocks `blocks`.
    #[inline(always)]
    pub(super) fn clear(&mut self, blocks: Range<usize>, (keys, values): (StoredRows<'_>, StoredRows<'_>)) {
        self.widens = !matches!((keys, values), (StoredRows::F32(_), StoredRows::F32(_)));
        self.first_block = blocks.start;
        self.masks.clear();
        self.masks.resize(if self.widens { blocks.len() } else { 0 }, 0);
    }

    /// Adds keys of blocks from `first_block` on; blocks beyond the last have none.
    #[inline(always)]
    pub(super) fn join(&mut self, first_block: usize, masks: &[u16]) {
        if self.widens {
            for (all, mask) in self.masks[first_block - self.first_block..].iter_mut().zip(masks) {
                *all |= mask;
            }
        }
    }

    #[inline(always)]
    fn list(&mut self) {
        self.positions.clear();
        integer::push_positions(&self.masks, self.first_block * BLOCK, &mut self.positions);
    }

    /// The places of `positions`.
    #[inline(always)]
    fn find(&mut self, positions: &[u32]) {
        self.starts.clear();
        let mut start = 0;
        for mask in &self.masks {
            self.starts.push(start);
            start += mask.count_ones();
        }
        self.places.clear();
        for &position in positions {
            let block = position as usize / BLOCK - self.first_block;
            let before = self.masks[block] & ((1 << (position as usize % BLOCK)) - 1);
            self.places.push(self.starts[block] + before.count_ones());
        }
    }
}

impl ChosenKeys {
    /// Reads the keys of `tokens`, which are joined.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        tile: &QueryTile<'_>,
        tokens: Range<usize>,
        (keys, values): (StoredRows<'_>, StoredRows<'_>),
        options: &CausalOptions,
        sums: &mut Sums<'_>,
    ) {
        let Self { positions, starts, weights, weight_starts, keep, together, .. } = self;
        let starts = &starts[tokens.start..=tokens.end];
        let positions = &positions[starts[0]..starts[tokens.len()]];
        let begin = if *keep { weights.len() } else { 0 };
        // Grows only: every weight is written below.
        let end = begin + positions.len() * tile.group;
        weights.resize(if *keep { end } else { end.max(weights.len()) }, 0.0);
        let mut next = begin;
        for keys in starts.windows(2) {
            weight_starts.push(next);
            next += (keys[1] - keys[0]) * tile.group;
        }
        if positions.is_empty() {
            return;
        }
        if together.widens {
            together.list();
            together.find(positions);
        }
        let weights = &mut weights[begin..end];
        let mut list = List { tile, first: tokens.start, starts, places: positions };
        match keys {
            StoredRows::F32(rows) => list.score(simd, rows, weights),
            narrow => {
                list.places = &together.places;
                let rows = narrow.gathered(simd, &together.positions, &mut together.widened);
                list.score(simd, rows, weights);
            }
        }
        for token in tokens.clone() {
            let keys = starts[token - tokens.start] - starts[0]..starts[token - tokens.start + 1] - starts[0];
            for g in 0..tile.group {
                let scores = &mut weights[keys.start * tile.group + g * keys.len()..][..keys.len()];
                if keys.is_empty() {
                    continue;
                }
                if let Some(cap) = options.softcap {
                    vector::softcap(simd, scores, cap);
                }
                if let Some(slopes) = tile.slopes {
                    let token = tile.start + token;
                    for (score, &position) in scores.iter_mut().zip(&positions[keys.clone()]) {
                        *score -= slopes[g] * (token - position as usize) as f32;
                    }
                }
                sums.add(simd, g * tile.tokens + token, scores);
            }
        }
        match values {
            StoredRows::F32(rows) => {
                list.places = positions;
                list.add(simd, rows, weights, sums.output);
            }
            narrow => {
                list.places = &together.places;
                let rows = narrow.gathered(simd, &together.positions, &mut together.widened);
                list.add(simd, rows, weights, sums.output);
            }
        }
    }
}

/// Where the rows lie that tokens read.
struct List<'a> {
    tile: &'a QueryTile<'a>,
    /// The first token.
    first: usize,
    /// Where the keys of each token begin, and where those of the last end.
    starts: &'a [usize],
    /// Rows of the keys of all tokens, ascending in each.
    places: &'a [u32],
}

impl<'a> List<'a> {
    /// Those of the token `token`, and the place of the first among those of all.
    #[inline(always)]
    fn of(&self, token: usize) -> Range<usize> {
        self.starts[token] - self.starts[0]..self.starts[token + 1] - self.starts[0]
    }

    /// Scores of the keys, `[heads, keys]` for each token.
    #[inline(always)]
    fn score<S: Simd>(&self, simd: S, rows: Rows<'_>, scores: &mut [f32]) {
        let (tile, width) = (self.tile, rows.width());
        let all = Gathered::new(rows, self.places);
        for token in 0..self.starts.len() - 1 {
            let own = self.of(token);
            let (from, count) = (own.start * tile.group, own.len());
            let keys = all.part(own);
            for g in 0..tile.group {
                let row = g * tile.tokens + self.first + token;
                let query = &tile.rows[row * width..(row + 1) * width];
                gather::dots(simd, query, keys, &mut scores[from + g * count..][..count]);
            }
        }
    }

    /// Adds the weighted values.
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, rows: Rows<'_>, weights: &[f32], output: &mut [f32]) {
        let (tile, width) = (self.tile, rows.width());
        let all = Gathered::new(rows, self.places);
        for token in 0..self.starts.len() - 1 {
            let own = self.of(token);
            let (from, count) = (own.start * tile.group, own.len());
            let values = all.part(own);
            for g in 0..tile.group {
                let row = g * tile.tokens + self.first + token;
                let output = &mut output[row * width..(row + 1) * width];
                gather::add(simd, &weights[from + g * count..][..count], values, output);
            }
        }
    }
}
