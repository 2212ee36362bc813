//! Gradients of what a tile reads through statistics: mean keys of blocks and sections, mean values of sections.

use pulp::Simd;

use super::{
    chosen::ChosenKeys,
    retrieval::{Columns, Retrieval, RetrievalScratch},
    tile_gradient::TileGradient,
};
use crate::{
    heads::Rows,
    index::{BLOCK, BLOCKS_OF_SECTION, HeadIndex, SECTION, positions},
    product, vector,
};

/// Gradients of the statistics of one KV head, and its mean keys as the index has them.
pub(super) struct MeanGradients {
    width: usize,
    block_means: Vec<f32>,
    section_means: Vec<f32>,
    of_block_means: Vec<f32>,
    of_section_means: Vec<f32>,
    of_section_values: Vec<f32>,
    /// Queries of a tile as their codes have them.
    query: Vec<f32>,
    /// `g . v` of each row and section, and gradients of scores.
    products: Vec<f32>,
    scores: Vec<f32>,
    raw: Vec<f32>,
}

impl MeanGradients {
    pub(super) fn new(index: &HeadIndex, tokens: usize) -> Self {
        let (width, sections) = (index.width, tokens / SECTION);
        let sections = sections.min(index.values().len());
        let rows = |count: usize, write: &dyn Fn(usize, &mut [f32])| {
            let mut rows = vec![0.0; count * width];
            rows.chunks_exact_mut(width).enumerate().for_each(|(at, row)| write(at, row));
            rows
        };
        let blocks = sections * BLOCKS_OF_SECTION;
        Self {
            width,
            block_means: rows(blocks, &|block, row| index.mean_row(block, row)),
            section_means: rows(sections, &|section, row| index.section_mean_row(section, row)),
            of_block_means: vec![0.0; blocks * width],
            of_section_means: vec![0.0; sections * width],
            of_section_values: vec![0.0; sections * width],
            query: Vec::new(),
            products: Vec::new(),
            scores: Vec::new(),
            raw: Vec::new(),
        }
    }

    /// What a tile reads of them.
    #[inline(always)]
    pub(super) fn add_tile<S: Simd>(
        &mut self,
        simd: S,
        of_tile: &mut TileGradient<'_>,
        retrieval: &Retrieval<'_>,
        scratch: &mut RetrievalScratch,
    ) {
        let (columns, width) = (retrieval.columns(), self.width);
        let (rows, sections) = (of_tile.tile.count(), retrieval.candidates.all_sections());
        let gradient = Rows::contiguous(of_tile.gradient, rows, width);
        let of_values = &mut self.of_section_values[sections.start * width..sections.end * width];
        let (weights, stride) = (&scratch.section_weights, columns.sections);
        product::add_weighted_transposed(weights, stride, sections.len(), gradient, of_values);
        self.products.resize(rows * stride, 0.0);
        let values = retrieval.index.values().range(sections);
        product::scores(of_tile.gradient, rows, values, &mut self.products, stride);
        self.query.resize(rows * width, 0.0);
        scratch.codes.decode(&mut self.query, width);
        self.closed_sections(simd, of_tile, retrieval, scratch, columns);
        self.blocks(simd, of_tile, retrieval, scratch, columns);
        self.opened_blocks(simd, of_tile, retrieval, &mut scratch.chosen, columns);
    }

    /// Sections that count by their own mean.
    #[inline(always)]
    fn closed_sections<S: Simd>(
        &mut self,
        simd: S,
        of_tile: &mut TileGradient<'_>,
        retrieval: &Retrieval<'_>,
        scratch: &RetrievalScratch,
        columns: Columns,
    ) {
        let (rows, closed) = (of_tile.tile.count(), retrieval.candidates.sections.clone());
        let count = closed.len();
        if count == 0 {
            return;
        }
        self.scores.resize(rows * count, 0.0);
        for (row, scores) in self.scores[..rows * count].chunks_exact_mut(count).enumerate() {
            let weights = &scratch.section_weights[row * columns.sections..][..count];
            let products = &self.products[row * columns.sections..][..count];
            for ((score, weight), product) in scores.iter_mut().zip(weights).zip(products) {
                *score = weight * (product - of_tile.delta[row]);
            }
            for &section in scratch.chosen.opened(row % of_tile.tile.tokens) {
                scores[section as usize - closed.start] = 0.0;
            }
        }
        let numbers = closed.start * self.width..closed.end * self.width;
        let means = Rows::contiguous(&self.section_means[numbers.clone()], count, self.width);
        let of_means = &mut self.of_section_means[numbers];
        add_scores(simd, of_tile, &self.query, means, (&mut self.scores, &mut self.raw), of_means);
    }

    /// Blocks that every token scores.
    #[inline(always)]
    fn blocks<S: Simd>(
        &mut self,
        simd: S,
        of_tile: &mut TileGradient<'_>,
        retrieval: &Retrieval<'_>,
        scratch: &RetrievalScratch,
        columns: Columns,
    ) {
        let (rows, blocks) = (of_tile.tile.count(), retrieval.candidates.blocks.clone());
        let count = blocks.len();
        if count == 0 {
            return;
        }
        self.scores.resize(rows * count, 0.0);
        let first = blocks.start / BLOCKS_OF_SECTION - columns.first_section;
        for (row, scores) in self.scores[..rows * count].chunks_exact_mut(count).enumerate() {
            let weights = &scratch.weights[row * columns.blocks + blocks.start - columns.first_block..][..count];
            let products = &self.products[row * columns.sections + first..(row + 1) * columns.sections];
            for (at, (score, weight)) in scores.iter_mut().zip(weights).enumerate() {
                *score = weight * (products[at / BLOCKS_OF_SECTION] - of_tile.delta[row]);
            }
        }
        let numbers = blocks.start * self.width..blocks.end * self.width;
        let means = Rows::contiguous(&self.block_means[numbers.clone()], count, self.width);
        let of_means = &mut self.of_block_means[numbers];
        add_scores(simd, of_tile, &self.query, means, (&mut self.scores, &mut self.raw), of_means);
    }

    /// Blocks of the sections that tokens opened.
    #[inline(always)]
    fn opened_blocks<S: Simd>(
        &mut self,
        simd: S,
        of_tile: &mut TileGradient<'_>,
        retrieval: &Retrieval<'_>,
        chosen: &mut ChosenKeys,
        columns: Columns,
    ) {
        let (tile, width) = (of_tile.tile, self.width);
        for token in 0..tile.tokens {
            for at in 0..chosen.opened(token).len() {
                let section = chosen.opened(token)[at] as usize;
                for g in 0..tile.group {
                    let row = g * tile.tokens + token;
                    let product = self.products[row * columns.sections + section - columns.first_section];
                    let weights = chosen.opened_weights(token, g).1[at];
                    let query = &self.query[row * width..(row + 1) * width];
                    for (block, weight) in weights.into_iter().enumerate() {
                        let block = section * BLOCKS_OF_SECTION + block;
                        let numbers = block * width..(block + 1) * width;
                        let mean = &self.block_means[numbers.clone()];
                        let mut score = weight * (product - of_tile.delta[row]);
                        if let Some(cap) = retrieval.options.softcap {
                            score *= 1.0 - (vector::dot(simd, query, mean) / cap).tanh().powi(2);
                        }
                        vector::add(simd, score, mean, &mut of_tile.query[row * width..(row + 1) * width]);
                        vector::add(simd, score, query, &mut self.of_block_means[numbers]);
                    }
                }
            }
        }
    }

    /// Gives every token its part of the gradients of the means it is in.
    pub(super) fn spread(self, sinks: usize, keys: &mut [f32], values: &mut [f32]) {
        spread(&self.of_block_means, BLOCK, sinks, self.width, keys);
        spread(&self.of_section_means, SECTION, sinks, self.width, keys);
        spread(&self.of_section_values, SECTION, sinks, self.width, values);
    }
}

/// From gradients of scores, `[rows, means]`, those of queries and means.
#[inline(always)]
fn add_scores<S: Simd>(
    simd: S,
    of_tile: &mut TileGradient<'_>,
    query: &[f32],
    means: Rows<'_>,
    (scores, raw): (&mut [f32], &mut Vec<f32>),
    of_means: &mut [f32],
) {
    let (rows, count) = (of_tile.tile.count(), means.len());
    let scores = &mut scores[..rows * count];
    if let Some(cap) = of_tile.softcap {
        raw.resize(rows * count, 0.0);
        let raw = &mut raw[..rows * count];
        product::scores(query, rows, means, raw, count);
        vector::softcap_gradient(simd, raw, cap, scores);
    }
    product::add_weighted(scores, count, rows, means, of_tile.query);
    let query = Rows::contiguous(query, rows, means.width());
    product::add_weighted_transposed(scores, count, count, query, of_means);
}

/// The gradient of a mean goes to its rows in equal parts.
fn spread(means: &[f32], size: usize, sinks: usize, width: usize, rows: &mut [f32]) {
    for (index, mean) in means.chunks_exact(width).enumerate() {
        let held = positions(index, size, sinks);
        let share = 1.0 / held.len().max(1) as f32;
        for position in held {
            for (row, mean) in rows[position * width..(position + 1) * width].iter_mut().zip(mean) {
                *row += mean * share;
            }
        }
    }
}
