//! Keys and values as a cache stores them: f32, or in half the bytes. Arithmetic is f32: what a tile reads is widened then.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use pulp::Simd;

use crate::heads::{Heads, Rows};

/// Numbers of a line of the cache.
const LINE: usize = 16;

/// Keys or values, `[batch, heads, rows, width]`.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'a> {
    /// Numbers as they are computed with.
    F32(Heads<'a>),
    /// IEEE 754 half precision.
    F16(Heads<'a, f16>),
    /// The upper half of an f32.
    Bf16(Heads<'a, bf16>),
}

impl<'a> From<Heads<'a>> for Stored<'a> {
    fn from(heads: Heads<'a>) -> Self {
        Self::F32(heads)
    }
}

impl<'a> From<Heads<'a, f16>> for Stored<'a> {
    fn from(heads: Heads<'a, f16>) -> Self {
        Self::F16(heads)
    }
}

impl<'a> From<Heads<'a, bf16>> for Stored<'a> {
    fn from(heads: Heads<'a, bf16>) -> Self {
        Self::Bf16(heads)
    }
}

impl<'a> Stored<'a> {
    /// `[batch, heads, rows, width]`.
    pub fn dims(&self) -> [usize; 4] {
        match self {
            Self::F32(heads) => heads.dims(),
            Self::F16(heads) => heads.dims(),
            Self::Bf16(heads) => heads.dims(),
        }
    }

    /// The heads `heads` of one batch entry, as a batch of one.
    ///
    /// # Panics
    ///
    /// If there are no such heads.
    pub fn some_heads(&self, batch: usize, heads: Range<usize>) -> Self {
        match self {
            Self::F32(all) => Self::F32(all.some_heads(batch, heads)),
            Self::F16(all) => Self::F16(all.some_heads(batch, heads)),
            Self::Bf16(all) => Self::Bf16(all.some_heads(batch, heads)),
        }
    }

    /// The rows of one head.
    pub(crate) fn head(&self, batch: usize, head: usize) -> StoredRows<'a> {
        match self {
            Self::F32(heads) => StoredRows::F32(heads.head(batch, head)),
            Self::F16(heads) => StoredRows::F16(heads.head(batch, head)),
            Self::Bf16(heads) => StoredRows::Bf16(heads.head(batch, head)),
        }
    }
}

/// Rows of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StoredRows<'a> {
    F32(Rows<'a>),
    F16(Rows<'a, f16>),
    Bf16(Rows<'a, bf16>),
}

impl<'a> StoredRows<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::F16(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
        }
    }

    #[inline(always)]
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::F32(rows) => rows.width(),
            Self::F16(rows) => rows.width(),
            Self::Bf16(rows) => rows.width(),
        }
    }

    #[inline(always)]
    pub(crate) fn range(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(rows) => Self::F32(rows.range(range)),
            Self::F16(rows) => Self::F16(rows.range(range)),
            Self::Bf16(rows) => Self::Bf16(rows.range(range)),
        }
    }

    /// The rows in f32: themselves, or a copy in `numbers`.
    #[inline(always)]
    pub(crate) fn widened<'b, S: Simd>(&self, simd: S, numbers: &'b mut Vec<f32>) -> Rows<'b>
    where
        'a: 'b,
    {
        let (count, width) = (self.len(), self.width());
        if let Self::F32(rows) = self {
            return *rows;
        }
        let numbers = lined_up(numbers, count * width);
        match self {
            Self::F16(rows) if rows.stride() == width => widen_f16(simd, &rows.data()[..count * width], numbers),
            Self::Bf16(rows) if rows.stride() == width => widen_bf16(&rows.data()[..count * width], numbers),
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => {
                for (at, numbers) in numbers.chunks_exact_mut(width.max(1)).enumerate() {
                    self.copy(simd, at, numbers);
                }
            }
        }
        Rows::contiguous(numbers, count, width)
    }

    /// Row `at` in f32.
    #[inline(always)]
    fn copy<S: Simd>(&self, simd: S, at: usize, to: &mut [f32]) {
        match self {
            Self::F32(rows) => to.copy_from_slice(rows.row(at)),
            Self::F16(rows) => widen_f16(simd, rows.row(at), to),
            Self::Bf16(rows) => widen_bf16(rows.row(at), to),
        }
    }

    /// The rows, which must be f32.
    ///
    /// # Panics
    ///
    /// If they are not.
    pub(crate) fn whole(&self) -> Rows<'a> {
        match self {
            Self::F32(rows) => *rows,
            Self::F16(_) | Self::Bf16(_) => panic!("gradients are of keys and values of f32"),
        }
    }

    /// The rows at `positions` in f32, one after the other in `numbers`.
    #[inline(always)]
    pub(crate) fn gathered<'b, S: Simd>(&self, simd: S, positions: &[u32], numbers: &'b mut Vec<f32>) -> Rows<'b> {
        let width = self.width();
        let numbers = lined_up(numbers, positions.len() * width);
        for (to, &at) in numbers.chunks_exact_mut(width.max(1)).zip(positions) {
            self.copy(simd, at as usize, to);
        }
        Rows::contiguous(numbers, positions.len(), width)
    }
}

/// Room for so many numbers that begins where a line of the cache does: registers that lie across two take twice the time.
#[inline(always)]
fn lined_up(room: &mut Vec<f32>, count: usize) -> &mut [f32] {
    room.resize((count + LINE).max(room.len()), 0.0);
    let start = room.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    &mut room[start..start + count]
}

#[inline(always)]
fn widen_f16<S: Simd>(simd: S, row: &[f16], numbers: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::any::Any;
        if let Some(&wide) = (&simd as &dyn Any).downcast_ref::<pulp::x86::V4>() {
            return widen_sixteen(wide, row.reinterpret_cast(), numbers);
        }
    }
    let _ = simd;
    row.convert_to_f32_slice(numbers);
}

/// Sixteen numbers of half precision at a time.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn widen_sixteen(simd: pulp::x86::V4, row: &[u16], numbers: &mut [f32]) {
    let ((row, row_rest), (numbers, rest)) = (row.as_chunks::<16>(), numbers.as_chunks_mut::<16>());
    for (to, from) in numbers.iter_mut().zip(row) {
        *to = pulp::cast(simd.avx512f._mm512_cvtph_ps(pulp::cast(*from)));
    }
    for (to, from) in rest.iter_mut().zip(row_rest) {
        *to = f16::from_bits(*from).to_f32();
    }
}

#[inline(always)]
fn widen_bf16(row: &[bf16], numbers: &mut [f32]) {
    for (number, stored) in numbers.iter_mut().zip(row) {
        *number = f32::from_bits(u32::from(stored.to_bits()) << 16);
    }
}
