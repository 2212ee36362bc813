//! Codes of queries.

use super::{
    HeadIndex,
    build::largest,
    head::{OFFSET, QUAD},
    integer::{self, LARGEST, QueryCodes, ROWS, Scales},
};

/// Codes of the queries of a tile: against means, against their magnitudes for radii, and against residuals.
#[derive(Debug, Default)]
pub(crate) struct TileCodes {
    pub(crate) means: Coded,
    pub(crate) magnitudes: Coded,
    pub(crate) residuals: Coded,
    /// `q . centre` of each row.
    pub(crate) centres: Vec<f32>,
    /// Zeros, as many as a step has rows.
    zeros: [f32; ROWS],
    no_offsets: [i32; ROWS],
    numbers: Vec<f32>,
}

/// Codes of rows in one set of channels, in steps of [`ROWS`] rows.
#[derive(Debug, Default)]
pub(crate) struct Coded {
    words: Vec<i32>,
    quads: usize,
    /// Those of one row.
    codes: Vec<i8>,
    pub(crate) scales: Vec<f32>,
    /// What the offset of the codes of keys adds to each row's sums.
    pub(crate) offsets: Vec<i32>,
}

impl Coded {
    fn clear(&mut self, rows: usize, channels: usize) {
        self.quads = channels.div_ceil(QUAD);
        self.words.clear();
        self.words.resize(rows.div_ceil(ROWS) * ROWS * self.quads, 0);
        self.scales.clear();
        self.scales.resize(rows.next_multiple_of(ROWS), 0.0);
        self.offsets.clear();
        self.offsets.resize(rows.next_multiple_of(ROWS), 0);
    }

    /// Codes of a row, and with `magnitudes` of its absolute values.
    #[inline(always)]
    fn encode(&mut self, row: usize, numbers: &[f32], mut magnitudes: Option<&mut Self>) {
        let largest = largest(numbers);
        let factor = if largest > 0.0 { LARGEST / largest } else { 0.0 };
        self.codes.clear();
        self.codes.resize(self.quads * QUAD, 0);
        integer::encode(numbers, factor, &mut self.codes);
        let first = row / ROWS * ROWS * self.quads + row % ROWS;
        for (quad, bytes) in self.codes.as_chunks::<QUAD>().0.iter().enumerate() {
            let place = first + quad * ROWS;
            self.words[place] = i32::from_le_bytes(bytes.map(|byte| byte as u8));
            if let Some(magnitudes) = &mut magnitudes {
                magnitudes.words[place] = i32::from_le_bytes(bytes.map(i8::unsigned_abs));
            }
        }
        let sum: i32 = self.codes.iter().map(|&code| i32::from(code)).sum();
        self.scales[row] = largest / LARGEST;
        self.offsets[row] = sum * OFFSET;
    }

    /// The codes of up to [`ROWS`] rows from `first` on, a multiple of that.
    pub(crate) fn step(&self, first: usize, rows: usize) -> QueryCodes<'_> {
        let words = &self.words[first * self.quads..(first + ROWS) * self.quads];
        QueryCodes { words, rows: rows.min(ROWS) }
    }
}

impl TileCodes {
    /// Of `rows`, scaled queries of the index's width.
    #[inline(always)]
    pub(crate) fn encode(&mut self, index: &HeadIndex, rows: &[f32], sections: bool) {
        let width = index.width;
        let count = rows.len() / width;
        self.means.clear(count, width);
        self.magnitudes.clear(if sections { count } else { 0 }, width);
        self.residuals.clear(count, index.channels.len());
        self.centres.clear();
        self.centres.resize(count.next_multiple_of(ROWS), 0.0);
        for (row, query) in rows.chunks_exact(width).enumerate() {
            self.means.encode(row, query, sections.then_some(&mut self.magnitudes));
            if sections {
                self.magnitudes.scales[row] = 0.5 * self.means.scales[row];
            }
            self.numbers.clear();
            let chosen = index.channels.iter().zip(&index.balance);
            self.numbers.extend(chosen.map(|(&channel, balance)| query[channel as usize] * balance));
            self.residuals.encode(row, &self.numbers, None);
            // In one order whatever the registers, so that every tile has the same sums.
            let (parts, rest) = query.as_chunks::<16>();
            let (centres, centre_rest) = index.centre.as_chunks::<16>();
            let mut sums = [0.0_f32; 16];
            for (part, centre) in parts.iter().zip(centres) {
                for lane in 0..16 {
                    sums[lane] += part[lane] * centre[lane];
                }
            }
            let rest = rest.iter().zip(centre_rest).map(|(x, y)| x * y);
            self.centres[row] = sums.into_iter().chain(rest).sum();
        }
    }

    /// The queries as their codes against means have them, `[rows, width]`.
    pub(crate) fn decode(&self, rows: &mut [f32], width: usize) {
        for (row, numbers) in rows.chunks_exact_mut(width).enumerate() {
            let step = &self.means.words[row / ROWS * ROWS * self.means.quads..];
            for (channel, number) in numbers.iter_mut().enumerate() {
                let bytes = step[channel / QUAD * ROWS + row % ROWS].to_le_bytes();
                *number = self.means.scales[row] * f32::from(bytes[channel % QUAD] as i8);
            }
        }
    }

    /// How scores of means come about, for the rows from `first` on and items with the scales `items`.
    pub(crate) fn mean_scales<'a>(&'a self, first: usize, items: &'a [f32]) -> Scales<'a> {
        Scales {
            items,
            rows: &self.means.scales[first..first + ROWS],
            bases: &self.centres[first..first + ROWS],
            offsets: &self.means.offsets[first..first + ROWS],
        }
    }

    /// The same of what half the radii of sections add.
    pub(crate) fn radius_scales<'a>(&'a self, first: usize, items: &'a [f32]) -> Scales<'a> {
        Scales {
            items,
            rows: &self.magnitudes.scales[first..first + ROWS],
            bases: &self.zeros,
            offsets: &self.no_offsets,
        }
    }
}

/// Codes of the rows of one token, together.
#[derive(Debug, Default)]
pub(crate) struct TokenCodes {
    codes: Coded,
    bases: Vec<f32>,
    rows: usize,
}

impl TokenCodes {
    /// Takes over `rows` of the codes of a tile, and what their scores begin with, 0 where there is nothing.
    pub(crate) fn gather(&mut self, coded: &Coded, rows: impl ExactSizeIterator<Item = usize>, bases: Option<&[f32]>) {
        self.rows = rows.len();
        self.codes.clear(rows.len(), coded.quads * QUAD);
        self.bases.clear();
        self.bases.resize(rows.len().next_multiple_of(ROWS), 0.0);
        for (at, row) in rows.enumerate() {
            for quad in 0..coded.quads {
                let from = (row / ROWS * coded.quads + quad) * ROWS + row % ROWS;
                self.codes.words[(at / ROWS * coded.quads + quad) * ROWS + at % ROWS] = coded.words[from];
            }
            self.codes.scales[at] = coded.scales[row];
            self.codes.offsets[at] = coded.offsets[row];
            if let Some(bases) = bases {
                self.bases[at] = bases[row];
            }
        }
    }

    /// Codes of up to [`ROWS`] rows from `first` on, and how scores of items with the scales `items` come about.
    pub(crate) fn step<'a>(&'a self, first: usize, items: &'a [f32]) -> (QueryCodes<'a>, Scales<'a>) {
        let scales = Scales {
            items,
            rows: &self.codes.scales[first..first + ROWS],
            bases: &self.bases[first..first + ROWS],
            offsets: &self.codes.offsets[first..first + ROWS],
        };
        (self.codes.step(first, self.rows - first), scales)
    }

    /// Scale and offset of a row.
    pub(crate) fn of(&self, row: usize) -> (f32, i32) {
        (self.codes.scales[row], self.codes.offsets[row])
    }
}
