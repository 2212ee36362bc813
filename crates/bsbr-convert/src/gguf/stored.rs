//! A tensor of a GGUF file read as the Hugging Face tensor it was made of: decoded, and in the original order.

use std::ops::{Deref, Range};

use safetensors::Dtype;

use super::kind::GgufKind;
use crate::tensors::{Block, Mapping, Pattern};

/// How the numbers of the file lie, against the Hugging Face tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The same.
    Same,
    /// `[out, in]` where Hugging Face has `[in, out]`: GPT-2.
    Transposed,
    /// Rows of each head `[x0, y0, x1, y1, ...]` where Hugging Face has `[x0, x1, ..., y0, y1, ...]`: queries and keys
    /// of Llama.
    RotaryPairs {
        /// Rows of a head.
        head_dim: usize,
    },
    /// The same, and every number larger by one: the norms of Gemma.
    OneMore,
}

/// What is needed to read one tensor.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) kind: GgufKind,
    pub(crate) order: Order,
    /// Numbers of a row of the Hugging Face tensor.
    pub(crate) width: usize,
    /// Rows of the Hugging Face tensor.
    pub(crate) rows: usize,
    /// Where in the file.
    pub(crate) bytes: Range<u64>,
}

impl Stored {
    /// The format of its numbers once read.
    pub(crate) fn dtype(&self) -> Dtype {
        // The difference of two numbers needs more bits than they have.
        if self.order == Order::OneMore { Dtype::F32 } else { self.kind.dtype() }
    }

    /// The row of the file that is row `row` of the Hugging Face tensor, of rows that are kept whole.
    pub(crate) fn file_row(&self, row: usize) -> usize {
        match self.order {
            Order::RotaryPairs { head_dim } => {
                let (first, place) = (row - row % head_dim, row % head_dim);
                let (half, pair) = (place / (head_dim / 2), place % (head_dim / 2));
                first + 2 * pair + half
            }
            Order::Same | Order::Transposed | Order::OneMore => row,
        }
    }

    /// Appends the numbers `range` of the Hugging Face tensor, in the bytes of [`Stored::dtype`].
    fn read(&self, data: &[u8], range: Range<usize>, out: &mut Vec<u8>) {
        match self.order {
            Order::Same => self.kind.decode(data, range, out),
            Order::OneMore => range.for_each(|at| {
                let number = self.kind.number(data, at) - 1.0;
                out.extend_from_slice(&number.to_le_bytes());
            }),
            Order::Transposed => range.for_each(|at| {
                let at = at % self.width * self.rows + at / self.width;
                self.kind.decode(data, at..at + 1, out);
            }),
            Order::RotaryPairs { .. } => {
                let mut at = range.start;
                while at < range.end {
                    let (row, skip) = (at / self.width, at % self.width);
                    let len = (self.width - skip).min(range.end - at);
                    let from = self.file_row(row) * self.width + skip;
                    self.kind.decode(data, from..from + len, out);
                    at += len;
                }
            }
        }
    }
}

/// The bytes of such a tensor. Dereferences to the bytes of the file, not decoded.
#[derive(Debug)]
pub(crate) struct StoredBytes {
    pub(crate) stored: Stored,
    pub(crate) mapping: Mapping,
}

impl StoredBytes {
    /// Does for one block what `fill_block` does for plain bytes.
    pub(crate) fn fill(&self, out: &mut [u8], range: &Range<usize>, block: &Block, size: usize) {
        let mut numbers = Vec::new();
        let mut put = |numbers: &[u8], position: usize| {
            let to = (position - range.start) * size;
            out[to..to + numbers.len()].copy_from_slice(numbers);
        };
        match block.copy {
            Pattern::Run { len } => {
                let (start, end) = (block.to.max(range.start), (block.to + len).min(range.end));
                if start < end {
                    let from = block.from + start - block.to;
                    self.stored.read(&self.mapping, from..from + end - start, &mut numbers);
                    put(&numbers, start);
                }
            }
            Pattern::Transpose { rows, cols, from_stride, to_stride } => {
                let row_at = |position: usize| position.saturating_sub(block.to).div_ceil(to_stride).min(rows);
                for row in row_at(range.start)..row_at(range.end) {
                    numbers.clear();
                    let first = block.from + row;
                    // Transposed twice: a row of the target is a row of the file.
                    if self.stored.order == Order::Transposed && from_stride == self.stored.width {
                        let from = first % from_stride * self.stored.rows + first / from_stride;
                        self.stored.kind.decode(&self.mapping, from..from + cols, &mut numbers);
                    } else {
                        for col in 0..cols {
                            let at = first + col * from_stride;
                            self.stored.read(&self.mapping, at..at + 1, &mut numbers);
                        }
                    }
                    put(&numbers, block.to + row * to_stride);
                }
            }
        }
    }
}

impl Deref for StoredBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.mapping
    }
}
