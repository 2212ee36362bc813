//! An index in plain tensors: integers as floats, so that it works on every device.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};

use super::{
    BLOCKS, SECTION,
    founding::{Founding, QuerySquares},
    statistics::{Integers, NewSections},
};
use crate::{BlockAttentionConfig, buffer::RowBuffer, statistics::Sizes};

/// The index of one layer's keys, from the first token on.
#[derive(Debug, Clone)]
pub(crate) struct PlainIndex {
    /// So many tokens found it.
    tokens: usize,
    sinks: usize,
    channels: usize,
    /// Queries that may wait before their squares are summed.
    waiting: usize,
    squares: QuerySquares,
    founding: Option<Founding>,
    sections: usize,
    block_means: IntegerRows,
    residuals: IntegerRows,
    means: IntegerRows,
    radii: IntegerRows,
    /// Mean values of sections.
    values: RowBuffer,
    /// Mean keys of blocks and of sections, once gradients are asked for.
    through: Option<(RowBuffer, RowBuffer)>,
}

impl PlainIndex {
    pub(crate) fn new(sizes: Sizes, attention: &BlockAttentionConfig, device: &Device) -> Self {
        let Sizes { batch, kv_heads, head_dim, dtype, .. } = sizes;
        let channels = attention.residual_channels(head_dim);
        // A choice has no gradients.
        let inner = device.clone().inner();
        let buffer = |width| RowBuffer::new(batch, kv_heads, width, 1, &inner, DType::F32);
        let rows = |width| IntegerRows { rows: buffer(width), scales: buffer(1) };
        Self {
            tokens: attention.index_founding(),
            sinks: attention.sink_tokens,
            channels,
            waiting: attention.chunk_size,
            squares: QuerySquares::new(batch, kv_heads, head_dim),
            founding: None,
            sections: 0,
            block_means: rows(head_dim),
            residuals: rows(channels),
            means: rows(head_dim),
            radii: rows(head_dim),
            values: RowBuffer::new(batch, kv_heads, head_dim, 1, device, dtype),
            through: None,
        }
    }

    /// Takes note of the queries of the tokens from `start` on, `[batch, heads, tokens, head_dim]`, as the model made them.
    pub(crate) fn see(&mut self, queries: &Tensor<4>, start: usize) {
        let count = self.tokens.saturating_sub(start).min(queries.dims()[2]);
        if count > 0 {
            let queries = queries.clone().inner().narrow(2, 0, count).cast(DType::F32);
            self.squares.push(queries, self.waiting);
        }
    }

    /// Indexes every section that ends by `end`, from the rows of all tokens, once the tokens that found the index are among them.
    pub(crate) fn extend(&mut self, keys: &RowBuffer, values: &RowBuffer, end: usize) {
        if keys.len() < self.tokens {
            return;
        }
        let founding = self.founding.get_or_insert_with(|| {
            let first = keys.range(0, self.tokens).inner().cast(DType::F32);
            Founding::new(first, self.squares.sums(), self.sinks, self.channels)
        });
        let new = self.sections..(end / SECTION).max(self.sections);
        if new.is_empty() {
            return;
        }
        let of = |rows: &RowBuffer| rows.range(new.start * SECTION, new.end * SECTION);
        let made = NewSections::new(new.clone(), of(keys), of(values), self.sinks, founding);
        self.sections = new.end;
        self.block_means.push(made.block_means);
        self.residuals.push(made.residuals);
        self.means.push(made.means);
        self.radii.push(made.radii);
        self.values.push(made.values);
        if let Some((of_blocks, of_sections)) = made.through {
            let [batch, kv_heads, _, width] = of_blocks.dims();
            let buffer = || RowBuffer::new(batch, kv_heads, width, 1, &of_blocks.device(), DType::F32);
            let through = self.through.get_or_insert_with(|| (buffer(), buffer()));
            through.0.push(of_blocks);
            through.1.push(of_sections);
        }
    }

    /// Forgets everything but what is known of queries: the keys are no longer where they were.
    pub(crate) fn forget(&mut self) {
        self.founding = None;
        self.sections = 0;
        for rows in [&mut self.block_means, &mut self.residuals, &mut self.means, &mut self.radii] {
            rows.rows.clear();
            rows.scales.clear();
        }
        self.values.clear();
        self.through = None;
    }

    /// Makes room for the index of `tokens` tokens.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        let sections = tokens / SECTION;
        self.block_means.reserve(sections * BLOCKS, sections * BLOCKS);
        self.residuals.reserve(sections * SECTION, sections * BLOCKS);
        self.means.reserve(sections, sections);
        self.radii.reserve(sections, sections);
        self.values.reserve(sections);
    }

    /// Sections `sections`, which have been indexed, as tensors to compute with.
    pub(super) fn view(&self, sections: &Range<usize>) -> Option<View<'_>> {
        let blocks = sections.start * BLOCKS..sections.end * BLOCKS;
        Some(View {
            founding: self.founding.as_ref()?,
            block_means: self.block_means.range(&blocks, &blocks),
            residuals: self.residuals.range(&(sections.start * SECTION..sections.end * SECTION), &blocks),
            means: self.means.range(sections, sections),
            radii: self.radii.range(sections, sections),
            values: self.values.range(sections.start, sections.end),
            through: (self.through.as_ref()).map(|(of_blocks, of_sections)| {
                (of_blocks.range(blocks.start, blocks.end), of_sections.range(sections.start, sections.end))
            }),
        })
    }

    /// How many tokens found it: those must come with their queries.
    pub(crate) fn founding_tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn bytes(&self) -> usize {
        let rows = [&self.block_means, &self.residuals, &self.means, &self.radii];
        let through = self.through.as_ref().map_or(0, |(a, b)| a.bytes() + b.bytes());
        rows.iter().map(|rows| rows.rows.bytes() + rows.scales.bytes()).sum::<usize>()
            + self.values.bytes()
            + through
            + self.squares.bytes()
            + self.founding.as_ref().map_or(0, Founding::bytes)
    }
}

/// Integers and their scales, one for each row or for a number of rows.
#[derive(Debug, Clone)]
struct IntegerRows {
    rows: RowBuffer,
    scales: RowBuffer,
}

impl IntegerRows {
    fn push(&mut self, integers: Integers) {
        self.rows.push(integers.rows);
        self.scales.push(integers.scales);
    }

    fn reserve(&mut self, rows: usize, scales: usize) {
        self.rows.reserve(rows);
        self.scales.reserve(scales);
    }

    fn range(&self, rows: &Range<usize>, scales: &Range<usize>) -> Integers {
        let of = |buffer: &RowBuffer, range: &Range<usize>| buffer.range(range.start, range.end);
        Integers { rows: of(&self.rows, rows), scales: of(&self.scales, scales) }
    }
}

/// Some sections of an index.
pub(super) struct View<'a> {
    pub(super) founding: &'a Founding,
    pub(super) block_means: Integers,
    pub(super) residuals: Integers,
    pub(super) means: Integers,
    pub(super) radii: Integers,
    pub(super) values: Tensor<4>,
    /// Mean keys of blocks and of sections, with their gradients.
    pub(super) through: Option<(Tensor<4>, Tensor<4>)>,
}
