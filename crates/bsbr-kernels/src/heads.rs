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
    /// If the view reaches beyond `data`, also where its size or its last place is no number of this machine.
    pub fn new(data: &'a [T], dims: [usize; 4], strides: [usize; 3]) -> Self {
        let needed = needed(dims, strides);
        let Some(needed) = needed else {
            panic!("a view of {dims:?} by {strides:?} needs more numbers than can be counted, not {}", data.len());
        };
        assert!(needed <= data.len(), "a view of {dims:?} by {strides:?} needs {needed} numbers, not {}", data.len());
        Self { data, dims, strides }
    }

    /// A view of numbers that lie in the order of `dims`.
    ///
    /// # Panics
    ///
    /// If there are fewer numbers than `dims` says.
    pub fn contiguous(data: &'a [T], dims: [usize; 4]) -> Self {
        let [_, heads, rows, width] = dims;
        // What cannot be counted is never stepped over, or is refused: `new` multiplies on from here.
        let row = rows.saturating_mul(width);
        Self::new(data, dims, [heads.saturating_mul(row), row, width])
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
        let [_, all, rows, width] = self.dims;
        assert!(heads.end <= all && !heads.is_empty(), "no heads {heads:?} in a view of {:?}", self.dims);
        let data = &self.data[self.start(batch, heads.start)..];
        Self { data, dims: [1, heads.len(), rows, width], strides: self.strides }
    }

    /// The rows of one head.
    ///
    /// # Panics
    ///
    /// If there is no such head.
    pub(crate) fn head(&self, batch: usize, head: usize) -> Rows<'a, T> {
        let [_, _, rows, width] = self.dims;
        Rows { data: &self.data[self.start(batch, head)..], rows, stride: self.strides[2], width }
    }

    /// Where a head begins.
    fn start(&self, batch: usize, head: usize) -> usize {
        let [batches, heads, rows, width] = self.dims;
        assert!(batch < batches && head < heads, "no head {head} of batch entry {batch} in a view of {:?}", self.dims);
        // Of a view without numbers nobody knows where its heads would begin. Of any other the last number has been counted.
        if rows == 0 || width == 0 { 0 } else { batch * self.strides[0] + head * self.strides[1] }
    }
}

/// How many numbers there must be for a view to hold: none if it is empty, `None` if they cannot be counted.
fn needed(dims: [usize; 4], strides: [usize; 3]) -> Option<usize> {
    let [batch, heads, rows, width] = dims;
    if dims.contains(&0) {
        return Some(0);
    }
    // A view may show a number many times, but what is made of it is as large as it claims to be.
    batch.checked_mul(heads)?.checked_mul(rows)?.checked_mul(width)?;
    let steps = [batch, heads, rows].into_iter().zip(strides);
    steps.map(|(count, stride)| (count - 1).checked_mul(stride)).try_fold(width, |sum, step| sum.checked_add(step?))
}

/// Rows of one head. Those that are made here lie within their numbers.
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
        let needed = rows.checked_mul(width);
        assert!(needed.is_some_and(|needed| needed <= data.len()), "{} numbers are not {rows} x {width}", data.len());
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

    /// How far apart the rows begin, as a matrix product wants it.
    ///
    /// # Panics
    ///
    /// If the rows do not lie within their numbers. Products read without looking: this is where they are held to it.
    pub(crate) fn checked_stride(&self) -> isize {
        checked_stride(self.data.len(), self.rows, self.stride, self.width)
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        debug_assert!(row < self.rows);
        &self.data[row * self.stride..row * self.stride + self.width]
    }

    pub(crate) fn range(&self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.rows, "no rows {rows:?} among {}", self.rows);
        // Of rows without numbers nobody has counted the places.
        let start = if rows.is_empty() || self.width == 0 { 0 } else { rows.start * self.stride };
        Self { data: &self.data[start..], rows: rows.len(), stride: self.stride, width: self.width }
    }
}

/// The stride of `rows` rows of `width` numbers that lie among `length`; that of a single row, which nobody steps over, is
/// its width.
///
/// # Panics
///
/// If they do not lie there.
pub(crate) fn checked_stride(length: usize, rows: usize, stride: usize, width: usize) -> isize {
    let needed = needed([1, 1, rows, width], [0, 0, stride]);
    assert!(
        needed.is_some_and(|needed| needed <= length),
        "{rows} rows of {width} numbers, {stride} apart, are not among {length}"
    );
    // Two rows or more: the stride is at most as long as a slice, which fits.
    (if rows > 1 && width > 0 { stride } else { width.min(length) }) as isize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_that_cannot_be_counted_is_refused() {
        let data = [0.0_f32; 16];
        let half = 1 << (usize::BITS - 1);
        let refused = |dims, strides| std::panic::catch_unwind(|| Heads::new(&data, dims, strides)).is_err();
        // Each of them wraps to something within the data.
        assert!(refused([1, 1, 3, 4], [0, 0, half]));
        assert!(refused([2, 2, 2, 4], [half, half, 0]));
        assert!(refused([1, 1, 2, usize::MAX], [0, 0, 2]));
        assert!(refused([half, 2, 1, 1], [0, 0, 0]));
        assert!(refused([half, half, 4, 4], [0, 0, 0]));
        assert!(refused([1, 1, 5, 4], [0, 0, 4]));
        assert!(!refused([1, 1, 4, 4], [usize::MAX, usize::MAX, 4]));
        assert!(!refused([1, 1, 1, 16], [half, half, half]));
        assert!(std::panic::catch_unwind(|| Heads::contiguous(&data, [1, half, 4, 4])).is_err());
        assert!(std::panic::catch_unwind(|| Rows::contiguous(&data, half, 2)).is_err());
    }

    #[test]
    fn an_empty_view_has_no_rows_wherever_they_would_be() {
        let data = [0.0_f32; 4];
        let far = [usize::MAX; 3];
        let rows = Heads::new(&data, [3, 3, 0, 2], far).head(2, 2);
        assert_eq!((rows.len(), rows.range(0..0).len()), (0, 0));
        let rows = Heads::new(&data, [3, 3, 5, 0], far).some_heads(2, 1..3).head(0, 1);
        assert_eq!((rows.len(), rows.range(4..5).len(), rows.checked_stride()), (5, 1, 0));
    }

    #[test]
    fn a_head_that_is_not_there_is_refused() {
        let data = [0.0_f32; 16];
        let heads = Heads::contiguous(&data, [2, 2, 2, 2]);
        for (batch, head) in [(2, 0), (0, 2), (usize::MAX, 0), (0, usize::MAX)] {
            assert!(std::panic::catch_unwind(|| heads.head(batch, head)).is_err(), "{batch} {head}");
            assert!(std::panic::catch_unwind(|| heads.some_heads(batch, head..head.saturating_add(1))).is_err());
        }
        let none = Heads::new(&data, [0, 2, 3, 4], [1, 1, usize::MAX]);
        assert!(std::panic::catch_unwind(|| none.head(0, 0)).is_err(), "a batch of none has no heads");
    }

    #[test]
    fn strides_are_those_a_product_may_take() {
        assert_eq!(checked_stride(16, 4, 4, 4), 4);
        assert_eq!(checked_stride(16, 1, usize::MAX, 16), 16);
        assert_eq!(checked_stride(0, 0, usize::MAX, 16), 0);
        assert_eq!(checked_stride(16, 9, usize::MAX, 0), 0);
        for (rows, stride) in
            [(2, usize::MAX), (2, usize::MAX - 3), (usize::MAX, 2), (5, 4), ((1 << (usize::BITS - 2)) + 1, 4)]
        {
            assert!(std::panic::catch_unwind(|| checked_stride(16, rows, stride, 4)).is_err(), "{rows} {stride}");
        }
    }
}
