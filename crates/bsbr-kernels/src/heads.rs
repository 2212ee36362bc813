//! Views of rows that belong to heads.

use std::ops::Range;

/// Rows of several heads, `[batch, heads, rows, width]`: any strides, but the numbers of a row lie side by side.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, T = f32> {
    data: &'a [T],
    dims: [usize; 4],
    strides: [usize; 3],
}

impl<'a, T> Heads<'a, T> {
    /// A view of `data` with `dims` `[batch, heads, rows, width]`; `strides` are those of batch, head and row, counted
    /// in numbers.
    ///
    /// # Panics
    ///
    /// If the view reaches beyond `data`.
    pub fn new(data: &'a [T], dims: [usize; 4], strides: [usize; 3]) -> Self {
        let [batch, heads, rows, width] = dims;
        if batch * heads * rows * width > 0 {
            let last = (batch - 1) * strides[0] + (heads - 1) * strides[1] + (rows - 1) * strides[2] + width;
            assert!(last <= data.len(), "a view of {dims:?} by {strides:?} needs {last} numbers, not {}", data.len());
        }
        Self { data, dims, strides }
    }

    /// A view of numbers that lie in the order of `dims`.
    ///
    /// # Panics
    ///
    /// If there are fewer numbers than `dims` says.
    pub fn contiguous(data: &'a [T], dims: [usize; 4]) -> Self {
        let [_, heads, rows, width] = dims;
        Self::new(data, dims, [heads * rows * width, rows * width, width])
    }

    /// `[batch, heads, rows, width]`.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The heads `heads` of one batch entry, as a batch of one.
    ///
    /// # Panics
    ///
    /// If there are no such heads.
    pub fn some_heads(&self, batch: usize, heads: Range<usize>) -> Self {
        let [batches, all, rows, width] = self.dims;
        assert!(batch < batches && heads.end <= all && !heads.is_empty());
        let start = (batch * self.strides[0] + heads.start * self.strides[1]).min(self.data.len());
        Self { data: &self.data[start..], dims: [1, heads.len(), rows, width], strides: self.strides }
    }

    /// The rows of one head.
    pub(crate) fn head(&self, batch: usize, head: usize) -> Rows<'a, T> {
        let [_, _, rows, width] = self.dims;
        let start = batch * self.strides[0] + head * self.strides[1];
        let data = if rows * width == 0 { &[] } else { &self.data[start..] };
        Rows { data, rows, stride: self.strides[2], width }
    }
}

/// Rows of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    stride: usize,
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `rows` rows of `width` numbers without gaps.
    pub(crate) fn contiguous(data: &'a [T], rows: usize, width: usize) -> Self {
        assert!(data.len() >= rows * width);
        Self { data, rows, stride: width, width }
    }

    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// From the first number of the first row on.
    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..row * self.stride + self.width]
    }

    pub(crate) fn range(&self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.rows);
        let data = if rows.is_empty() { &[] } else { &self.data[rows.start * self.stride..] };
        Self { data, rows: rows.len(), stride: self.stride, width: self.width }
    }
}
