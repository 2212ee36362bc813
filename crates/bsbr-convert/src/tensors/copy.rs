//! Rearranging the numbers of tensors: the one loop that converting, exporting and loading share.

use std::ops::Range;

/// Moves some numbers of one source tensor to one target tensor. Positions count numbers, not bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    /// Which source.
    pub(crate) source: usize,
    /// First number read.
    pub(crate) from: usize,
    /// First number written.
    pub(crate) to: usize,
    /// The pattern.
    pub(crate) copy: Pattern,
}

/// How the numbers of a block lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// `to[n] = from[n]` for `n < len`.
    Run {
        /// Numbers moved.
        len: usize,
    },
    /// `to[r * to_stride + c] = from[c * from_stride + r]` for `r < rows` and `c < cols`.
    Transpose {
        /// Rows in the target.
        rows: usize,
        /// Columns in the target.
        cols: usize,
        /// Width of a row of the source.
        from_stride: usize,
        /// Width of a row of the target.
        to_stride: usize,
    },
}

impl Block {
    /// Numbers moved.
    pub(crate) fn len(&self) -> usize {
        match self.copy {
            Pattern::Run { len } => len,
            Pattern::Transpose { rows, cols, .. } => rows * cols,
        }
    }

    /// Where in the target the last number goes, and one more.
    pub(crate) fn end(&self) -> usize {
        match self.copy {
            Pattern::Run { len } => self.to + len,
            Pattern::Transpose { rows, cols, to_stride, .. } => self.to + rows.saturating_sub(1) * to_stride + cols,
        }
    }

    /// The block that moves the same numbers back, reading from tensor `target`.
    pub(crate) fn inverse(&self, target: usize) -> Self {
        let copy = match self.copy {
            Pattern::Run { len } => Pattern::Run { len },
            Pattern::Transpose { rows, cols, from_stride, to_stride } => {
                Pattern::Transpose { rows: cols, cols: rows, from_stride: to_stride, to_stride: from_stride }
            }
        };
        Self { source: target, from: self.to, to: self.from, copy }
    }
}

/// Ranges of whole rows that cover a tensor of `shape`, each of about `budget` bytes.
pub(crate) fn bands(shape: &[usize], size: usize, budget: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let elements: usize = shape.iter().product();
    let row = if shape.len() < 2 { 1 } else { shape[shape.len() - 1].max(1) };
    let step = (budget / size.max(1) / row).max(1) * row;
    (0..elements).step_by(step).map(move |start| start..(start + step).min(elements))
}

/// All blocks of a target from the bytes of all its sources.
#[cfg(test)]
pub(crate) fn fill(out: &mut [u8], range: Range<usize>, blocks: &[Block], sources: &[&[u8]], size: usize) {
    for block in blocks {
        fill_block(out, range.clone(), block, sources[block.source], size);
    }
}

/// Writes what `block` moves of the numbers `range` of a target into `out`, from the bytes `source`. `range` must be
/// whole rows of the target; `size` is the bytes of a number.
pub(crate) fn fill_block(out: &mut [u8], range: Range<usize>, block: &Block, source: &[u8], size: usize) {
    match block.copy {
        Pattern::Run { len } => {
            let start = block.to.max(range.start);
            let end = (block.to + len).min(range.end);
            if start < end {
                let from = (block.from + start - block.to) * size;
                let bytes = (end - start) * size;
                let to = (start - range.start) * size;
                out[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
            }
        }
        Pattern::Transpose { rows, to_stride, .. } => {
            let row_at = |position: usize| position.saturating_sub(block.to).div_ceil(to_stride).min(rows);
            let rows = row_at(range.start)..row_at(range.end);
            match size {
                2 => transpose::<2>(out, range.start, rows, block, source),
                _ => transpose::<4>(out, range.start, rows, block, source),
            }
        }
    }
}

/// Side of the tiles, in numbers: what a tile touches on either side fits the first-level cache.
const TILE: usize = 32;

/// Writes the rows `rows` of a transposed block; number `first` of the target is the first of `out`.
///
/// Tile by tile through a buffer: with strides of a power of two, which is what weights have, the rows of a tile fall
/// on the same cache lines, and reading each of them more than once would miss every time.
fn transpose<const SIZE: usize>(out: &mut [u8], first: usize, rows: Range<usize>, block: &Block, source: &[u8]) {
    let Pattern::Transpose { cols, from_stride, to_stride, .. } = block.copy else { return };
    let mut tile = [[[0; SIZE]; TILE]; TILE];
    for row in rows.clone().step_by(TILE) {
        let height = TILE.min(rows.end - row);
        for col in (0..cols).step_by(TILE) {
            let width = TILE.min(cols - col);
            for (c, line) in tile.iter_mut().take(width).enumerate() {
                let from = (block.from + (col + c) * from_stride + row) * SIZE;
                let numbers = source[from..from + height * SIZE].chunks_exact(SIZE);
                line.iter_mut().zip(numbers).for_each(|(number, bytes)| number.copy_from_slice(bytes));
            }
            for r in 0..height {
                let to = (block.to + (row + r) * to_stride + col - first) * SIZE;
                let numbers = out[to..to + width * SIZE].chunks_exact_mut(SIZE);
                numbers.zip(&tile).for_each(|(bytes, line)| bytes.copy_from_slice(&line[r]));
            }
        }
    }
}
