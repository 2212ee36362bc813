//! Reads the blocks that the tokens of a tile chose, block by block: whoever chose a block is served together.

use pulp::Simd;

use super::{block_tile::Retrieval, tile::QueryTile};
use crate::{gather, heads::Rows, panel, vector};

/// Queries from which on turning the keys of a block pays.
const WORTH_TURNING: usize = 4;

/// The choices of all tokens of a tile and what is computed for them.
#[derive(Default)]
pub(super) struct Chosen {
    /// Candidates, those of one token after those of the other.
    blocks: Vec<u32>,
    /// Where the choices of each token end in `blocks`.
    ends: Vec<u32>,
    /// `(token, place in blocks)` of whoever chose a block, block after block; `starts[c]..starts[c + 1]` chose `c`.
    readers: Vec<(u32, u32)>,
    starts: Vec<u32>,
    /// Scores and then weights: for each token and head of the group the tokens of its blocks side by side.
    scores: Vec<f32>,
    panel: Vec<f32>,
    /// Where the queries (and with them the outputs) and the scores of the readers of one block begin.
    query_starts: Vec<usize>,
    score_starts: Vec<usize>,
    key_rows: Vec<usize>,
}

/// Sums of a softmax in progress: one number for each row, and one row of output.
pub(super) struct Sums<'a> {
    pub(super) highest: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) output: &'a mut [f32],
}

impl Chosen {
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.ends.clear();
    }

    /// Adds the choices of the next token.
    pub(super) fn push(&mut self, blocks: &[u32]) {
        self.blocks.extend_from_slice(blocks);
        self.ends.push(self.blocks.len() as u32);
    }

    /// Who reads what, sorted by block.
    fn sort_readers(&mut self, candidates: usize) {
        self.starts.clear();
        self.starts.resize(candidates + 2, 0);
        for &block in &self.blocks {
            self.starts[block as usize + 2] += 1;
        }
        for candidate in 2..candidates + 2 {
            self.starts[candidate] += self.starts[candidate - 1];
        }
        self.readers.resize(self.blocks.len(), (0, 0));
        let mut place = 0;
        for (token, &end) in self.ends.iter().enumerate() {
            for &block in &self.blocks[place as usize..end as usize] {
                let next = &mut self.starts[block as usize + 1];
                self.readers[*next as usize] = (token as u32, place);
                *next += 1;
                place += 1;
            }
        }
    }

    /// The choices of a token in `blocks`.
    fn places(&self, token: usize) -> std::ops::Range<usize> {
        let begin = if token == 0 { 0 } else { self.ends[token - 1] };
        begin as usize..self.ends[token] as usize
    }

    /// Brings the chosen blocks into the sums of all rows of the tile.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        tile: &QueryTile<'_>,
        retrieval: &Retrieval<'_>,
        (keys, values): (Rows<'_>, Rows<'_>),
        sums: &mut Sums<'_>,
    ) {
        let (size, width, group) = (retrieval.blocks.size, keys.width(), tile.group);
        self.sort_readers(retrieval.candidates.len());
        self.scores.resize(self.blocks.len() * group * size, 0.0);
        self.panel.resize(size * width, 0.0);
        let turns = panel::fits::<S>(size, width);
        for candidate in 0..retrieval.candidates.len() {
            if !self.find_starts(candidate, tile, size, width) {
                continue;
            }
            let first = retrieval.start_of(candidate as u32);
            let rows = keys.range(first..first + size);
            if turns && self.query_starts.len() >= WORTH_TURNING {
                panel::turn(simd, rows.data(), rows.stride(), size, width, &mut self.panel);
                let (queries, scores) = (&self.query_starts, &self.score_starts);
                panel::dots(simd, &self.panel, size, width, tile.rows, queries, &mut self.scores, scores);
            } else {
                self.key_rows.clear();
                self.key_rows.extend((0..size).map(|row| row * rows.stride()));
                for (&query, &score) in self.query_starts.iter().zip(&self.score_starts) {
                    let query = &tile.rows[query..query + width];
                    gather::dots(simd, query, rows.data(), &self.key_rows, &mut self.scores[score..score + size]);
                }
            }
        }
        for token in 0..tile.tokens {
            let places = self.places(token);
            let (chosen, count) = (&self.blocks[places.clone()], places.len() * size);
            for g in 0..group {
                let start = (places.start * group + g * places.len()) * size;
                let scores = &mut self.scores[start..start + count];
                retrieval.finish_scores(simd, tile, token, g, chosen, scores);
                let row = g * tile.tokens + token;
                let highest = vector::max(simd, scores).max(sums.highest[row]);
                let fade = (sums.highest[row] - highest).exp();
                if fade != 1.0 {
                    vector::scale(simd, &mut sums.output[row * width..(row + 1) * width], fade);
                }
                sums.sum[row] = sums.sum[row] * fade + vector::exp_sum(simd, scores, highest);
                sums.highest[row] = highest;
            }
        }
        for candidate in 0..retrieval.candidates.len() {
            if self.find_starts(candidate, tile, size, width) {
                let first = retrieval.start_of(candidate as u32);
                let rows = values.range(first..first + size);
                let (weights, outputs) = (&self.score_starts, &self.query_starts);
                let (data, stride) = (rows.data(), rows.stride());
                panel::add_weighted(simd, &self.scores, weights, data, stride, size, width, sums.output, outputs);
            }
        }
    }

    /// Fills `query_starts` and `score_starts` for those who read a candidate; whether anyone does.
    #[inline(always)]
    fn find_starts(&mut self, candidate: usize, tile: &QueryTile<'_>, size: usize, width: usize) -> bool {
        self.query_starts.clear();
        self.score_starts.clear();
        let readers = self.starts[candidate] as usize..self.starts[candidate + 1] as usize;
        for &(token, place) in &self.readers[readers] {
            let places = self.places(token as usize);
            for g in 0..tile.group {
                self.query_starts.push((g * tile.tokens + token as usize) * width);
                let before = places.start * tile.group + g * places.len() + (place as usize - places.start);
                self.score_starts.push(before * size);
            }
        }
        !self.query_starts.is_empty()
    }
}
