//! Reads runs of rows that the tokens of a tile chose for themselves, run by run: whoever chose one is served together.

use std::ops::Range;

use pulp::Simd;

use super::tile::QueryTile;
use crate::{gather, panel, stored::StoredRows};

/// Queries from which on turning the rows of a run pays.
const WORTH_TURNING: usize = 4;
/// How many runs before its turn the memory of a run is asked for.
const AHEAD: usize = 2;
/// Among so many times as many items as choices, sorting the choices takes less than a pass over the items.
const FEW: usize = 16;

/// What each token of a tile chose among numbered items.
#[derive(Default)]
pub(super) struct Readers {
    /// Items, those of one token after those of the other.
    items: Vec<u32>,
    /// Where the items of each token end.
    ends: Vec<u32>,
    /// Items that anyone chose.
    active: Vec<u32>,
    /// `(token, place in items)` of whoever chose one; `bounds[at]..bounds[at + 1]` chose the item `active[at]`.
    readers: Vec<(u32, u32)>,
    bounds: Vec<u32>,
    /// `(item, token, place)`, where there are few.
    order: Vec<(u32, u32, u32)>,
    /// Where the readers of each item go.
    starts: Vec<u32>,
    panel: Vec<f32>,
    /// Where the queries (and with them the outputs) and the scores of the readers of one item begin.
    query_starts: Vec<usize>,
    score_starts: Vec<usize>,
    key_rows: Vec<usize>,
    /// Rows of an item that were stored in fewer bytes.
    widened: Vec<f32>,
}

/// Which rows belong to an item, and where its scores are.
pub(super) struct Runs<'a, F: Fn(u32) -> usize, P: Fn(&Readers, usize, usize, usize) -> usize> {
    pub(super) rows: StoredRows<'a>,
    /// Rows of an item.
    pub(super) size: usize,
    /// First row of an item.
    pub(super) first: F,
    /// Where the scores of a (head of the group, token, place) begin.
    pub(super) place: P,
}

impl Readers {
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.ends.clear();
    }

    /// Adds the choices of the next token.
    pub(super) fn push_all(&mut self, items: impl Iterator<Item = u32>) {
        self.items.extend(items);
        self.ends.push(self.items.len() as u32);
    }

    /// Where the choices of a token are in the list of all.
    pub(super) fn places(&self, token: usize) -> Range<usize> {
        let begin = if token == 0 { 0 } else { self.ends[token - 1] };
        begin as usize..self.ends[token] as usize
    }

    /// What a token chose.
    pub(super) fn of(&self, token: usize) -> &[u32] {
        &self.items[self.places(token)]
    }

    /// Choices of all tokens.
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// Sorts the choices by item, once all tokens are in. Items are below `count`.
    pub(super) fn sort(&mut self, count: usize) {
        self.active.clear();
        self.bounds.clear();
        self.readers.clear();
        if self.items.len() * FEW < count {
            self.sort_few();
        } else {
            self.sort_many(count);
        }
        self.bounds.push(self.readers.len() as u32);
    }

    /// [`Readers::sort`] by comparing choices.
    fn sort_few(&mut self) {
        self.order.clear();
        for token in 0..self.ends.len() {
            let places = self.places(token);
            self.order.extend(places.map(|place| (self.items[place], token as u32, place as u32)));
        }
        self.order.sort_unstable();
        for &(item, token, place) in &self.order {
            if self.active.last() != Some(&item) {
                self.active.push(item);
                self.bounds.push(self.readers.len() as u32);
            }
            self.readers.push((token, place));
        }
    }

    /// [`Readers::sort`] by counting those of each item.
    fn sort_many(&mut self, count: usize) {
        self.starts.clear();
        self.starts.resize(count, 0);
        for &item in &self.items {
            self.starts[item as usize] += 1;
        }
        let mut start = 0;
        for (item, next) in self.starts.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
            self.active.push(item as u32);
            self.bounds.push(start);
            start += std::mem::replace(next, start);
        }
        self.readers.resize(self.items.len(), (0, 0));
        for token in 0..self.ends.len() {
            for place in self.places(token) {
                let next = &mut self.starts[self.items[place] as usize];
                self.readers[*next as usize] = (token as u32, place as u32);
                *next += 1;
            }
        }
    }

    /// Scores of every token against the rows it chose.
    #[inline(always)]
    pub(super) fn score<S: Simd>(
        &mut self,
        simd: S,
        tile: &QueryTile<'_>,
        runs: &Runs<'_, impl Fn(u32) -> usize, impl Fn(&Readers, usize, usize, usize) -> usize>,
        scores: &mut [f32],
    ) {
        let (size, width) = (runs.size, runs.rows.width());
        self.panel.resize(size * width, 0.0);
        let turns = panel::fits::<S>(size, width);
        let mut widened = std::mem::take(&mut self.widened);
        for at in 0..self.active.len() {
            let rows = self.rows(at, runs).widened(&mut widened);
            self.find_starts(at, tile, width, &runs.place);
            if turns && self.query_starts.len() >= WORTH_TURNING {
                panel::turn(simd, rows.data(), rows.stride(), size, width, &mut self.panel);
                let (queries, places) = (&self.query_starts, &self.score_starts);
                panel::dots(simd, &self.panel, size, width, tile.rows, queries, scores, places);
            } else if size == gather::FOUR && self.query_starts.len() > 1 {
                let (queries, places) = (&self.query_starts, &self.score_starts);
                gather::dots_of_four(simd, rows.data(), rows.stride(), width, tile.rows, queries, scores, places);
            } else {
                self.key_rows.clear();
                self.key_rows.extend((0..size).map(|row| row * rows.stride()));
                for (&query, &place) in self.query_starts.iter().zip(&self.score_starts) {
                    let query = &tile.rows[query..query + width];
                    gather::dots(simd, query, rows.data(), &self.key_rows, &mut scores[place..place + size]);
                }
            }
        }
        self.widened = widened;
    }

    /// Adds to the output of every token the rows it chose, weighted by what stands in the place of their scores.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        tile: &QueryTile<'_>,
        runs: &Runs<'_, impl Fn(u32) -> usize, impl Fn(&Readers, usize, usize, usize) -> usize>,
        weights: &[f32],
        output: &mut [f32],
    ) {
        let (size, width) = (runs.size, runs.rows.width());
        let mut widened = std::mem::take(&mut self.widened);
        for at in 0..self.active.len() {
            let rows = self.rows(at, runs).widened(&mut widened);
            self.find_starts(at, tile, width, &runs.place);
            let (places, outputs) = (&self.score_starts, &self.query_starts);
            panel::add_weighted(simd, weights, places, rows.data(), rows.stride(), size, width, output, outputs);
        }
        self.widened = widened;
    }

    /// The rows of the active item `at`; those of a later one are asked for.
    #[inline(always)]
    fn rows<'b, P: Fn(&Readers, usize, usize, usize) -> usize>(
        &self,
        at: usize,
        runs: &Runs<'b, impl Fn(u32) -> usize, P>,
    ) -> StoredRows<'b> {
        let of = |item: u32| {
            let first = (runs.first)(item);
            runs.rows.range(first..first + runs.size)
        };
        if let Some(&later) = self.active.get(at + AHEAD) {
            of(later).prefetch();
        }
        of(self.active[at])
    }

    /// Fills `query_starts` and `score_starts` for those who chose the active item `at`.
    #[inline(always)]
    fn find_starts(
        &mut self,
        at: usize,
        tile: &QueryTile<'_>,
        width: usize,
        place_of: &impl Fn(&Readers, usize, usize, usize) -> usize,
    ) {
        self.query_starts.clear();
        self.score_starts.clear();
        for at in self.bounds[at]..self.bounds[at + 1] {
            let (token, place) = self.readers[at as usize];
            for g in 0..tile.group {
                self.query_starts.push((g * tile.tokens + token as usize) * width);
                let place = place_of(self, g, token as usize, place as usize);
                self.score_starts.push(place);
            }
        }
    }
}
