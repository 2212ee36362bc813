//! A tensor that grows along one axis without copying its past at every step.

use burn::tensor::{DType, Device, Int, Tensor};

/// A copy of rows that were cut from another tensor: a cut shares the memory of the whole, and keeping it would keep
/// that alive.
pub(crate) fn copied(rows: Tensor<4>) -> Tensor<4> {
    let [batch, heads, count, width] = rows.dims();
    rows.zeros_like().slice_assign([0..batch, 0..heads, 0..count, 0..width], rows)
}

/// Room beyond which it no longer doubles.
const DOUBLED_UP_TO: usize = 4096;

/// Rows `[batch, heads, rows, width]` with room to spare: pushing doubles the room when it runs out, beyond 4096 rows it adds a
/// quarter.
///
/// The room is a multiple of `granularity` rows, so that whole blocks of rows can be viewed in place. Rows can be stored in
/// another type than they are given and read in.
#[derive(Debug, Clone)]
pub(crate) struct RowBuffer {
    rows: Tensor<4>,
    length: usize,
    granularity: usize,
    /// What rows are read in.
    dtype: DType,
}

/// The rows in this type.
pub(crate) fn in_type<const D: usize>(rows: Tensor<D>, dtype: DType) -> Tensor<D> {
    if rows.dtype() == dtype { rows } else { rows.cast(dtype) }
}

impl RowBuffer {
    pub(crate) fn new(
        batch: usize,
        heads: usize,
        width: usize,
        granularity: usize,
        device: &Device,
        dtype: DType,
    ) -> Self {
        // One row keeps the shape, type and device until there are more; it is no room.
        Self { rows: Tensor::zeros([batch, heads, 1, width], (device, dtype)), length: 0, granularity, dtype }
    }

    /// The empty buffer with its rows stored in another type.
    pub(crate) fn stored_as(self, dtype: DType) -> Self {
        Self { rows: in_type(self.rows, dtype), ..self }
    }

    /// Makes room for `rows` rows in all, rounded up to the granularity.
    pub(crate) fn reserve(&mut self, rows: usize) {
        let rows = rows.next_multiple_of(self.granularity);
        let [batch, heads, _, width] = self.rows.dims();
        if rows > self.room() {
            let options = (&self.rows.device(), self.rows.dtype());
            let grown = Tensor::zeros([batch, heads, rows, width], options);
            self.rows = if self.length == 0 {
                grown
            } else {
                grown.slice_assign([0..batch, 0..heads, 0..self.length, 0..width], self.stored())
            };
        }
    }

    /// Appends `[batch, heads, n, width]`.
    pub(crate) fn push(&mut self, rows: Tensor<4>) {
        let [batch, heads, added, width] = rows.dims();
        let rows = in_type(rows, self.rows.dtype());
        let end = self.length + added;
        let room = self.room();
        if end > room {
            self.reserve(end.max(if room < DOUBLED_UP_TO { 2 * room } else { room + room / 4 }));
        }
        self.rows.inplace(|all| all.slice_assign([0..batch, 0..heads, self.length..end, 0..width], rows));
        self.length = end;
    }

    /// Appends one row of zeros.
    pub(crate) fn push_zero(&mut self) {
        let [batch, heads, _, width] = self.rows.dims();
        self.push(Tensor::zeros([batch, heads, 1, width], (&self.rows.device(), self.rows.dtype())));
    }

    /// Rows `start..end`.
    pub(crate) fn range(&self, start: usize, end: usize) -> Tensor<4> {
        in_type(self.stored_range(start, end), self.dtype)
    }

    fn stored_range(&self, start: usize, end: usize) -> Tensor<4> {
        debug_assert!(end <= self.length);
        self.rows.clone().narrow(2, start, end - start)
    }

    /// Every row, as it is stored.
    pub(crate) fn stored(&self) -> Tensor<4> {
        self.stored_range(0, self.length)
    }

    pub(crate) fn device(&self) -> Device {
        self.rows.device()
    }

    pub(crate) fn heads(&self) -> usize {
        self.rows.dims()[1]
    }

    /// Every row pushed so far.
    pub(crate) fn all(&self) -> Tensor<4> {
        self.range(0, self.length)
    }

    /// Some of the room as groups of `size` rows, `[groups, size * width]`: the group `(pair * room + r) / size` holds those
    /// from `r` on of the (batch, head) pair `pair`.
    pub(crate) fn groups(&self, size: usize, groups: Tensor<1, Int>) -> Tensor<2> {
        let [batch, heads, room, width] = self.rows.dims();
        let all = self.rows.clone().reshape([batch * heads * room / size, size * width]);
        in_type(all.select(0, groups), self.dtype)
    }

    /// Drops the first `count` rows; the room stays as it is.
    pub(crate) fn drop_front(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let [batch, heads, _, width] = self.rows.dims();
        let length = self.length - count;
        let mut rows = self.rows.zeros_like();
        if length > 0 {
            rows = rows.slice_assign([0..batch, 0..heads, 0..length, 0..width], self.stored_range(count, self.length));
        }
        self.rows = rows;
        self.length = length;
    }

    /// The first `count` rows, in the same memory until either of the two changes.
    pub(crate) fn first(&self, count: usize) -> Self {
        debug_assert!(count <= self.length);
        Self { length: count, ..self.clone() }
    }

    /// Forgets every row; the room stays as it is.
    pub(crate) fn clear(&mut self) {
        self.length = 0;
    }

    /// Replaces the content.
    pub(crate) fn set(&mut self, rows: Tensor<4>) {
        self.length = 0;
        self.push(rows);
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Rows there is room for.
    pub(crate) fn room(&self) -> usize {
        self.rows.dims()[2] / self.granularity * self.granularity
    }

    /// Bytes of the room.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.shape().num_elements() * self.rows.dtype().size()
    }
}
