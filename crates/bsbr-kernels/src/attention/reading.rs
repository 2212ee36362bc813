//! Reading the keys that the tokens of a tile chose.
//!
//! Neighbouring tokens choose much the same keys. So a few tokens read together: a stretch of the keys that any of them chose
//! at a time, each token what it chose of it, so that rows are brought into the nearest cache once for all.

use std::ops::Range;

use pulp::Simd;

use super::{CausalOptions, chosen::ChosenKeys, sums::Sums, tile::QueryTile};
use crate::{
    gather,
    heads::Rows,
    index::{BLOCK, integer},
    prefetch::prefetch,
    stored::StoredRows,
    vector,
};

/// Tokens that read together.
pub(super) const TOKENS: usize = 16;
/// Keys of a stretch.
const STRETCH: usize = 64;
/// Rows of the next stretch that are asked for with each step of a token.
const ASKED: usize = 4;

/// Keys that any token of those that read together chose.
#[derive(Default)]
pub(super) struct Together {
    /// The first block that has a mask.
    first_block: usize,
    masks: Vec<u16>,
    positions: Vec<u32>,
    /// Where the keys of each block begin among them.
    starts: Vec<u32>,
    /// For each key of each token its place among them, where rows are widened.
    places: Vec<u32>,
    widened: Vec<f32>,
}

impl Together {
    /// Forgets all keys, for others of the blocks `blocks`.
    #[inline(always)]
    pub(super) fn clear(&mut self, blocks: Range<usize>) {
        self.first_block = blocks.start;
        self.masks.clear();
        self.masks.resize(blocks.len(), 0);
    }

    /// Adds keys of blocks from `first_block` on; blocks beyond the last have none.
    #[inline(always)]
    pub(super) fn join(&mut self, first_block: usize, masks: &[u16]) {
        for (all, mask) in self.masks[first_block - self.first_block..].iter_mut().zip(masks) {
            *all |= mask;
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
        together.list();
        if !matches!((keys, values), (StoredRows::F32(_), StoredRows::F32(_))) {
            together.find(positions);
        }
        let weights = &mut weights[begin..end];
        let mut list = List { tile, first: tokens.start, starts, places: positions };
        match keys {
            StoredRows::F32(rows) => list.score(simd, rows, Some(&together.positions), weights),
            narrow => {
                list.places = &together.places;
                let rows = narrow.gathered(&together.positions, &mut together.widened);
                list.score(simd, rows, None, weights);
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
                list.add(simd, rows, Some(&together.positions), weights, sums.output);
            }
            narrow => {
                list.places = &together.places;
                let rows = narrow.gathered(&together.positions, &mut together.widened);
                list.add(simd, rows, None, weights, sums.output);
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

impl List<'_> {
    /// Scores of the keys, `[heads, keys]` for each token. Asks for the rows `all`, those of all tokens.
    #[inline(always)]
    fn score<S: Simd>(&self, simd: S, rows: Rows<'_>, all: Option<&[u32]>, scores: &mut [f32]) {
        let (tile, width) = (self.tile, rows.width());
        let mut done = [0; TOKENS];
        let mut ahead = Asked::new(rows, all);
        while let Some(end) = ahead.next_stretch() {
            for (token, done) in done.iter_mut().enumerate().take(self.starts.len() - 1) {
                let start = self.starts[token] - self.starts[0];
                let places = &self.places[start..self.starts[token + 1] - self.starts[0]];
                let scores = &mut scores[start * tile.group..][..places.len() * tile.group];
                let mut at = *done;
                while at < places.len() && places[at] < end {
                    ahead.ask(ASKED);
                    let to = places.len().min(at + gather::TOGETHER);
                    for g in 0..tile.group {
                        let row = g * tile.tokens + self.first + token;
                        let query = &tile.rows[row * width..(row + 1) * width];
                        let scores = &mut scores[g * places.len()..(g + 1) * places.len()];
                        gather::dots(simd, query, rows, &places[at..to], &mut scores[at..to]);
                    }
                    at = to;
                }
                *done = at;
            }
        }
    }

    /// Adds the weighted values.
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, rows: Rows<'_>, all: Option<&[u32]>, weights: &[f32], output: &mut [f32]) {
        let (tile, width) = (self.tile, rows.width());
        let mut done = [0; TOKENS];
        let mut ahead = Asked::new(rows, all);
        while let Some(end) = ahead.next_stretch() {
            for (token, done) in done.iter_mut().enumerate().take(self.starts.len() - 1) {
                let start = self.starts[token] - self.starts[0];
                let places = &self.places[start..self.starts[token + 1] - self.starts[0]];
                let weights = &weights[start * tile.group..][..places.len() * tile.group];
                let mut at = *done;
                while at < places.len() && places[at] < end {
                    ahead.ask(ASKED);
                    let to = places.len().min(at + gather::TOGETHER);
                    for g in 0..tile.group {
                        let row = g * tile.tokens + self.first + token;
                        let weights = &weights[g * places.len()..(g + 1) * places.len()];
                        let output = &mut output[row * width..(row + 1) * width];
                        gather::add(simd, &weights[at..to], rows, &places[at..to], output);
                    }
                    at = to;
                }
                *done = at;
            }
        }
    }
}

/// Goes through rows in stretches, and asks for those of the next while one is read.
struct Asked<'a> {
    rows: Rows<'a>,
    /// None where they lie in the cache already.
    all: Option<&'a [u32]>,
    asked: usize,
    end: usize,
}

impl<'a> Asked<'a> {
    #[inline(always)]
    fn new(rows: Rows<'a>, all: Option<&'a [u32]>) -> Self {
        Self { rows, all, asked: 0, end: 0 }
    }

    /// The first place beyond the next stretch.
    #[inline(always)]
    fn next_stretch(&mut self) -> Option<u32> {
        let count = self.all.map_or(self.rows.len(), <[u32]>::len);
        if self.end >= count {
            return None;
        }
        self.ask(usize::MAX);
        self.end = count.min(self.end + STRETCH);
        let last = self.all.map_or(self.end as u32 - 1, |all| all[self.end - 1]);
        Some(last + 1)
    }

    /// Asks for the next rows, at most `count`, up to the end of the stretch after this.
    #[inline(always)]
    fn ask(&mut self, count: usize) {
        let Some(all) = self.all else { return };
        let end = all.len().min(self.end + STRETCH).min(self.asked.saturating_add(count));
        for &position in &all[self.asked.min(end)..end] {
            prefetch(self.rows.row(position as usize));
        }
        self.asked = self.asked.max(end);
    }
}
