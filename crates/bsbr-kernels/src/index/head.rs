//! The index of one KV head: what is kept, and where.

use super::{BLOCK, BLOCKS_OF_SECTION};
use crate::heads::Rows;

/// Codes of this many items lie together, so that one register holds four channels of each.
pub(crate) const TOGETHER: usize = 16;
/// Channels of an item that lie side by side.
pub(crate) const QUAD: usize = 4;
/// What is added to a signed code, so that stored ones have no sign.
pub(crate) const OFFSET: i32 = 128;

/// Integers of items and their scales: panels of [`TOGETHER`] items, `[panels, channels / 4, 16, 4]`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Codes {
    pub(crate) codes: Vec<u8>,
    /// One for each item, up to whole panels.
    pub(crate) scales: Vec<f32>,
}

impl Codes {
    /// Bytes of a panel of items of so many channels.
    pub(crate) fn panel(channels: usize) -> usize {
        channels.div_ceil(QUAD) * TOGETHER * QUAD
    }

    /// Room for the codes of `items` items: whole panels.
    pub(super) fn resize(&mut self, items: usize, channels: usize) {
        let panels = items.div_ceil(TOGETHER);
        grow(&mut self.codes, panels * Self::panel(channels), OFFSET as u8);
        grow(&mut self.scales, panels * TOGETHER, 0.0);
    }

    fn reserve(&mut self, items: usize, channels: usize) {
        let panels = items.div_ceil(TOGETHER);
        reserve(&mut self.codes, panels * Self::panel(channels));
        reserve(&mut self.scales, panels * TOGETHER);
    }

    fn clear(&mut self) {
        self.codes.clear();
        self.scales.clear();
    }

    fn bytes(&self) -> usize {
        self.codes.capacity() + self.scales.capacity() * size_of::<f32>()
    }
}

/// The index of one KV head.
#[derive(Debug, Clone)]
pub(crate) struct HeadIndex {
    pub(crate) width: usize,
    /// Channels of residuals, ascending; how many before it is founded.
    pub(crate) channels: Vec<u32>,
    /// What a residual is divided by and a query multiplied with, in each of the channels.
    pub(crate) balance: Vec<f32>,
    pub(crate) centre: Vec<f32>,
    /// Sums of squares of the watched queries in each channel.
    pub(super) query_squares: Vec<f32>,
    /// Mean keys of blocks, less the centre.
    pub(crate) means: Codes,
    /// What keys have beyond the mean of their block: a panel for each block, `[blocks, channels / 4, 16, 4]`.
    pub(crate) residuals: Vec<u8>,
    /// Scale of the residuals of each block, up to whole panels of blocks; what thresholds are divided by.
    pub(crate) residual_scales: Vec<f32>,
    /// Mean keys of sections, less the centre.
    pub(crate) section_means: Codes,
    /// Radii of the keys of sections about their mean; without an offset.
    pub(crate) section_radii: Codes,
    /// Mean values of sections, `[sections, width]`.
    pub(crate) section_values: Vec<f32>,
}

impl HeadIndex {
    pub(super) fn new(width: usize, channels: usize) -> Self {
        Self {
            width,
            channels: vec![0; channels],
            balance: Vec::new(),
            centre: Vec::new(),
            query_squares: vec![0.0; width],
            means: Codes::default(),
            residuals: Vec::new(),
            residual_scales: Vec::new(),
            section_means: Codes::default(),
            section_radii: Codes::default(),
            section_values: Vec::new(),
        }
    }

    /// Mean values of the sections.
    pub(crate) fn values(&self) -> Rows<'_> {
        Rows::contiguous(&self.section_values, self.section_values.len() / self.width.max(1), self.width)
    }

    pub(super) fn reserve(&mut self, sections: usize) {
        let (blocks, width) = (sections * BLOCKS_OF_SECTION, self.width);
        self.means.reserve(blocks, width);
        reserve(&mut self.residuals, blocks * Codes::panel(self.channels.len()));
        reserve(&mut self.residual_scales, blocks.next_multiple_of(TOGETHER));
        self.section_means.reserve(sections, width);
        self.section_radii.reserve(sections, width);
        reserve(&mut self.section_values, sections * width);
    }

    pub(super) fn resize(&mut self, sections: usize) {
        let (blocks, width) = (sections * BLOCKS_OF_SECTION, self.width);
        self.means.resize(blocks, width);
        grow(&mut self.residuals, blocks * Codes::panel(self.channels.len()), OFFSET as u8);
        grow(&mut self.residual_scales, blocks.next_multiple_of(TOGETHER), 0.0);
        self.section_means.resize(sections, width);
        self.section_radii.resize(sections, width);
        grow(&mut self.section_values, sections * width, 0.0);
    }

    pub(super) fn clear(&mut self) {
        for codes in [&mut self.means, &mut self.section_means, &mut self.section_radii] {
            codes.clear();
        }
        self.residuals.clear();
        self.residual_scales.clear();
        self.section_values.clear();
    }

    pub(super) fn bytes(&self) -> usize {
        let codes = self.means.bytes() + self.section_means.bytes() + self.section_radii.bytes();
        let floats = [&self.residual_scales, &self.section_values, &self.centre, &self.balance, &self.query_squares];
        let floats = floats.map(Vec::capacity).iter().sum::<usize>() * size_of::<f32>();
        codes + self.residuals.capacity() + floats + self.channels.capacity() * size_of::<u32>()
    }

    /// The mean key of block `block` as the index has it, into `row`.
    pub(crate) fn mean_row(&self, block: usize, row: &mut [f32]) {
        decode(&self.means, block, &self.centre, row);
    }

    /// The mean key of section `section` as the index has it, into `row`.
    pub(crate) fn section_mean_row(&self, section: usize, row: &mut [f32]) {
        decode(&self.section_means, section, &self.centre, row);
    }
}

/// What the codes of an item say.
fn decode(codes: &Codes, item: usize, centre: &[f32], row: &mut [f32]) {
    let panel = &codes.codes[item / TOGETHER * Codes::panel(centre.len())..];
    let scale = codes.scales[item];
    for (channel, (number, centre)) in row.iter_mut().zip(centre).enumerate() {
        let code = panel[place(item % TOGETHER, channel)];
        *number = centre + scale * (i32::from(code) - OFFSET) as f32;
    }
}

/// Where the code of a channel of the item in `lane` lies in its panel.
#[inline(always)]
pub(crate) fn place(lane: usize, channel: usize) -> usize {
    channel / QUAD * (TOGETHER * QUAD) + lane * QUAD + channel % QUAD
}

/// A vector of `length` numbers; the room grows by a quarter.
fn grow<T: Copy>(numbers: &mut Vec<T>, length: usize, value: T) {
    if length > numbers.capacity() {
        reserve(numbers, length.max(numbers.capacity() + numbers.capacity() / 4));
    }
    numbers.resize(length, value);
}

fn reserve<T>(numbers: &mut Vec<T>, length: usize) {
    numbers.reserve_exact(length.saturating_sub(numbers.len()));
}

const _: () = assert!(TOGETHER == BLOCK, "a panel of residuals holds the keys of one block");
