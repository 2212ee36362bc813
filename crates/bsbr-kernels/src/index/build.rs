//! Founding the index of a head, and taking blocks and sections in.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{
    BLOCK, BLOCKS_OF_SECTION, HeadIndex, SECTION,
    head::{Codes, OFFSET, QUAD, TOGETHER, place},
    integer::{self, LARGEST},
    positions,
};
use crate::{heads::Rows, stored::StoredRows};

/// Adds the squares of queries in each channel: token by token, within a token head by head.
pub(super) struct Watch<'a> {
    pub(super) head: &'a mut HeadIndex,
    pub(super) queries: &'a [Rows<'a>],
    pub(super) tokens: Range<usize>,
}

impl WithSimd for Watch<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for token in self.tokens {
            for query in self.queries {
                for (sum, value) in self.head.query_squares.iter_mut().zip(query.row(token)) {
                    *sum += value * value;
                }
            }
        }
    }
}

/// [`HeadIndex::found`], for the best instructions of the machine.
pub(super) struct Found<'a> {
    pub(super) head: &'a mut HeadIndex,
    pub(super) keys: StoredRows<'a>,
    pub(super) blocks: usize,
    pub(super) sinks: usize,
}

impl WithSimd for Found<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.head.found(simd, self.keys, self.blocks, self.sinks);
    }
}

/// Memory for one section at a time.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Mean keys of the blocks of a section, and of the section.
    means: Vec<f32>,
    mean: Vec<f32>,
    /// What a key has beyond the mean of its block.
    beyond: Vec<f32>,
    residuals: Vec<f32>,
    radii: Vec<f32>,
    codes: Vec<i8>,
}

/// [`HeadIndex::extend`], for the best instructions of the machine.
pub(super) struct Extend<'a> {
    pub(super) head: &'a mut HeadIndex,
    pub(super) keys: StoredRows<'a>,
    pub(super) values: StoredRows<'a>,
    pub(super) sections: Range<usize>,
    pub(super) sinks: usize,
}

impl WithSimd for Extend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { head, keys, values, sections, sinks } = self;
        head.resize(sections.end);
        let mut scratch = Scratch::default();
        for section in sections {
            head.take_in(simd, keys, values, section, sinks, &mut scratch);
        }
    }
}

impl HeadIndex {
    #[inline(always)]
    fn found<S: Simd>(&mut self, simd: S, keys: StoredRows<'_>, blocks: usize, sinks: usize) {
        let width = self.width;
        let (mut sum, mut squares) = (vec![0.0; width], vec![0.0_f32; width]);
        let (mut mean, mut widened, mut count) = (vec![0.0; width], Vec::new(), 0);
        for block in 0..blocks {
            let positions = positions(block, BLOCK, sinks);
            if positions.is_empty() {
                continue;
            }
            let rows = keys.range(positions).widened(simd, &mut widened);
            mean_of(&rows, 0..rows.len(), &mut mean);
            count += 1;
            for channel in 0..width {
                sum[channel] += mean[channel];
            }
            for row in 0..rows.len() {
                for ((square, key), mean) in squares.iter_mut().zip(rows.row(row)).zip(&mean) {
                    *square += (key - mean) * (key - mean);
                }
            }
        }
        let share = 1.0 / count.max(1) as f32;
        self.centre = sum.into_iter().map(|sum| sum * share).collect();
        let weight = |channel: usize| squares[channel] * self.query_squares[channel];
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        order.truncate(self.channels.len());
        order.sort_unstable();
        let balance = |channel: usize| {
            let balance = (squares[channel] / self.query_squares[channel]).sqrt().sqrt();
            if balance.is_finite() && balance > 0.0 { balance } else { 1.0 }
        };
        self.balance = order.iter().map(|&channel| balance(channel)).collect();
        self.channels = order.into_iter().map(|channel| channel as u32).collect();
    }

    #[inline(always)]
    fn take_in<S: Simd>(
        &mut self,
        simd: S,
        keys: StoredRows<'_>,
        values: StoredRows<'_>,
        section: usize,
        sinks: usize,
        scratch: &mut Scratch,
    ) {
        let width = self.width;
        let held = positions(section, SECTION, sinks);
        let value = &mut self.section_values[section * width..(section + 1) * width];
        if held.is_empty() {
            value.fill(0.0);
            return;
        }
        let Scratch { keys: key_numbers, values: value_numbers, means, mean, beyond, residuals, radii, codes } =
            scratch;
        let rows = values.range(held.clone()).widened(simd, value_numbers);
        mean_of(&rows, 0..rows.len(), value);
        let rows = keys.range(held.clone()).widened(simd, key_numbers);
        means.resize(BLOCKS_OF_SECTION * width, 0.0);
        mean.clear();
        mean.resize(width, 0.0);
        for (at, of_block) in means.chunks_exact_mut(width).enumerate() {
            let block = section * BLOCKS_OF_SECTION + at;
            let own = positions(block, BLOCK, sinks);
            if own.is_empty() {
                continue;
            }
            let own = own.start - held.start..own.end - held.start;
            mean_of(&rows, own.clone(), of_block);
            let count = own.len() as f32;
            for (sum, of_block) in mean.iter_mut().zip(&*of_block) {
                *sum += of_block * count;
            }
            self.take_in_block(&rows, own, block, of_block, (beyond, residuals), codes);
        }
        let share = 1.0 / held.len() as f32;
        for sum in mean.iter_mut() {
            *sum *= share;
        }
        radii.clear();
        radii.resize(width, 0.0);
        for row in 0..rows.len() {
            for ((radius, key), mean) in radii.iter_mut().zip(rows.row(row)).zip(&*mean) {
                *radius = radius.max((key - mean).abs());
            }
        }
        encode_row(&mut self.section_radii, section, radii, 0, codes);
        for (mean, centre) in mean.iter_mut().zip(&self.centre) {
            *mean -= centre;
        }
        encode_row(&mut self.section_means, section, mean, OFFSET, codes);
    }

    /// Codes of the block `block` of the keys `own` of `rows` with their mean; what it leaves in `mean` is less the centre.
    #[inline(always)]
    fn take_in_block(
        &mut self,
        rows: &Rows<'_>,
        own: Range<usize>,
        block: usize,
        mean: &mut [f32],
        (beyond, residuals): (&mut Vec<f32>, &mut Vec<f32>),
        codes: &mut Vec<i8>,
    ) {
        let channels = self.channels.len();
        beyond.resize(self.width, 0.0);
        residuals.clear();
        residuals.resize(BLOCK * channels, 0.0);
        // Keys after sinks are the last of their block.
        let skipped = BLOCK - own.len();
        for (key, residual) in own.zip(residuals[skipped * channels..].chunks_exact_mut(channels)) {
            for ((beyond, key), mean) in beyond.iter_mut().zip(rows.row(key)).zip(&*mean) {
                *beyond = key - mean;
            }
            for (residual, &channel) in residual.iter_mut().zip(&self.channels) {
                *residual = beyond[channel as usize];
            }
            for (residual, balance) in residual.iter_mut().zip(&self.balance) {
                *residual /= balance;
            }
        }
        let largest = largest(residuals);
        let factor = if largest > 0.0 { LARGEST / largest } else { 0.0 };
        let panel = Codes::panel(channels);
        let target = &mut self.residuals[block * panel..(block + 1) * panel];
        for (key, residual) in residuals.chunks_exact(channels).enumerate() {
            encode(residual, factor, OFFSET, codes, key, target);
        }
        self.residual_scales[block] = largest / LARGEST;
        for (mean, centre) in mean.iter_mut().zip(&self.centre) {
            *mean -= centre;
        }
        encode_row(&mut self.means, block, mean, OFFSET, codes);
    }
}

/// Sums in order of position, times the share of each.
#[inline(always)]
fn mean_of(rows: &Rows<'_>, range: Range<usize>, mean: &mut [f32]) {
    let share = 1.0 / range.len() as f32;
    mean.fill(0.0);
    for row in range {
        for (sum, value) in mean.iter_mut().zip(rows.row(row)) {
            *sum += value;
        }
    }
    for sum in mean {
        *sum *= share;
    }
}

/// The largest absolute value.
#[inline(always)]
pub(super) fn largest(numbers: &[f32]) -> f32 {
    let (parts, rest) = numbers.as_chunks::<TOGETHER>();
    let mut highest = [0.0_f32; TOGETHER];
    for part in parts {
        for (highest, value) in highest.iter_mut().zip(part) {
            *highest = highest.max(value.abs());
        }
    }
    highest.iter().chain(rest).fold(0.0, |highest, value| highest.max(value.abs()))
}

/// Codes of the numbers of the item in `lane` of a panel.
#[inline(always)]
fn encode(numbers: &[f32], factor: f32, offset: i32, codes: &mut Vec<i8>, lane: usize, panel: &mut [u8]) {
    codes.clear();
    codes.resize(numbers.len().next_multiple_of(QUAD), 0);
    integer::encode(numbers, factor, codes);
    for code in codes.iter_mut() {
        *code = code.wrapping_add(offset as i8);
    }
    for (quad, codes) in codes.as_chunks::<QUAD>().0.iter().enumerate() {
        let place = place(lane, quad * QUAD);
        let bytes = [codes[0] as u8, codes[1] as u8, codes[2] as u8, codes[3] as u8];
        panel[place..place + QUAD].copy_from_slice(&bytes);
    }
}

/// Codes of an item with a scale of its own.
#[inline(always)]
fn encode_row(codes: &mut Codes, item: usize, row: &[f32], offset: i32, scratch: &mut Vec<i8>) {
    let largest = largest(row);
    let factor = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    let panel = Codes::panel(row.len());
    let target = &mut codes.codes[item / TOGETHER * panel..][..panel];
    encode(row, factor, offset, scratch, item % TOGETHER, target);
    codes.scales[item] = largest / LARGEST;
}
