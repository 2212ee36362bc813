//! Weights as a matrix.

use std::{fmt, ops::Range, sync::Arc};

use crate::{Format, decode};

/// Bytes that are no matrix of a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A row that is no whole number of blocks.
    #[error("rows of {inputs} numbers are no whole blocks of {format}, which has {} to a block", .format.block())]
    Row {
        /// The format.
        format: Format,
        /// Numbers of a row.
        inputs: usize,
    },
    /// Too few or too many bytes.
    #[error("{outputs} rows of {inputs} numbers in {format} are {expected} bytes, there are {found}")]
    Size {
        /// The format.
        format: Format,
        /// Number of rows.
        outputs: usize,
        /// Numbers of a row.
        inputs: usize,
        /// Bytes it should have.
        expected: u128,
        /// Bytes it has.
        found: usize,
    },
}

/// A view of weights `[outputs, inputs]`, row by row.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    outputs: usize,
    inputs: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Weights of `shape` `[outputs, inputs]` in `bytes`.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if the bytes are not those of such a matrix.
    pub fn new(format: Format, shape: [usize; 2], bytes: &'a [u8]) -> Result<Self, LayoutError> {
        let [outputs, inputs] = shape;
        let row = format.row_bytes(inputs).ok_or(LayoutError::Row { format, inputs })?;
        let expected = outputs as u128 * row as u128;
        if expected != bytes.len() as u128 {
            return Err(LayoutError::Size { format, outputs, inputs, expected, found: bytes.len() });
        }
        Ok(Self { format, outputs, inputs, bytes })
    }

    /// Rows of `inputs` numbers in f32.
    ///
    /// # Panics
    ///
    /// If the numbers are no whole rows.
    pub fn of_f32(numbers: &'a [f32], inputs: usize) -> Self {
        let outputs = numbers.len().checked_div(inputs).unwrap_or(0);
        assert_eq!(numbers.len(), outputs * inputs, "weights are not rows of {inputs}");
        Self { format: Format::F32, outputs, inputs, bytes: bytemuck::cast_slice(numbers) }
    }

    /// The format of its numbers.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of rows.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Numbers of a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// All bytes, row by row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.inputs / self.format.block() * self.format.block_bytes()
    }

    /// Some of the rows.
    ///
    /// # Panics
    ///
    /// If there are no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let size = self.row_bytes();
        let bytes = &self.bytes[rows.start * size..rows.end * size];
        Self { outputs: rows.len(), bytes, ..*self }
    }

    /// The numbers themselves, where they are f32 at an address that allows to read them as such.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        if self.format == Format::F32 { bytemuck::try_cast_slice(self.bytes).ok() } else { None }
    }

    /// The numbers of some rows, in f32.
    ///
    /// # Panics
    ///
    /// If there are no such rows or `out` is of another size.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        decode(self.format, self.rows(rows).bytes, out);
    }
}

impl fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} [{}, {}])", self.format, self.outputs, self.inputs)
    }
}

/// Weights `[outputs, inputs]` and what keeps their bytes: a vector, a mapped file, part of either. Clones share them.
#[derive(Clone)]
pub struct StoredMatrix {
    format: Format,
    outputs: usize,
    inputs: usize,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl StoredMatrix {
    /// Weights of `shape` `[outputs, inputs]` in all bytes of `owner`.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if the bytes are not those of such a matrix.
    pub fn new(
        format: Format,
        shape: [usize; 2],
        owner: impl AsRef<[u8]> + Send + Sync + 'static,
    ) -> Result<Self, LayoutError> {
        let range = 0..owner.as_ref().len();
        Self::of_part(format, shape, Arc::new(owner), range)
    }

    /// Weights of `shape` `[outputs, inputs]` in the bytes `range` of an owner that others may share. F32 that does not begin at a
    /// multiple of four bytes is copied.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if the bytes are not those of such a matrix.
    pub fn of_part(
        format: Format,
        shape: [usize; 2],
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
    ) -> Result<Self, LayoutError> {
        let bytes = (*owner).as_ref().get(range.clone()).unwrap_or_default();
        let matrix = Matrix::new(format, shape, bytes)?;
        let [outputs, inputs] = shape;
        if format == Format::F32 && matrix.as_f32().is_none() {
            let numbers: Vec<f32> =
                bytes.as_chunks().0.iter().map(|&number: &[u8; 4]| f32::from_le_bytes(number)).collect();
            return Ok(Self::of_f32(numbers, inputs));
        }
        Ok(Self { format, outputs, inputs, owner, range })
    }

    /// Rows of `inputs` numbers in f32.
    ///
    /// # Panics
    ///
    /// If the numbers are no whole rows.
    pub fn of_f32(numbers: Vec<f32>, inputs: usize) -> Self {
        struct Numbers(Vec<f32>);
        impl AsRef<[u8]> for Numbers {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        let view = Matrix::of_f32(&numbers, inputs);
        let (outputs, range) = (view.outputs, 0..view.bytes.len());
        Self { format: Format::F32, outputs, inputs, owner: Arc::new(Numbers(numbers)), range }
    }

    /// The matrix.
    pub fn view(&self) -> Matrix<'_> {
        let bytes = &(*self.owner).as_ref()[self.range.clone()];
        Matrix { format: self.format, outputs: self.outputs, inputs: self.inputs, bytes }
    }

    /// Some of the rows, of the same owner.
    ///
    /// # Panics
    ///
    /// If there are no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.outputs, "rows {rows:?} of {}", self.outputs);
        let size = self.view().row_bytes();
        let range = self.range.start + rows.start * size..self.range.start + rows.end * size;
        Self { outputs: rows.len(), range, owner: Arc::clone(&self.owner), ..*self }
    }

    /// The format of its numbers.
    pub fn format(&self) -> Format {
        self.format
    }

    /// `[outputs, inputs]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.outputs, self.inputs]
    }

    /// Bytes it takes, in memory or of a mapped file.
    pub fn size(&self) -> usize {
        self.range.len()
    }
}

impl fmt::Debug for StoredMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredMatrix({} [{}, {}])", self.format, self.outputs, self.inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_such_matrix_are_refused() {
        let row = Matrix::new(Format::Q4_0, [1, 33], &[0; 18]);
        assert_eq!(row.unwrap_err(), LayoutError::Row { format: Format::Q4_0, inputs: 33 });
        assert!(matches!(Matrix::new(Format::Q4_0, [2, 32], &[0; 18]), Err(LayoutError::Size { .. })));
        assert!(matches!(Matrix::new(Format::F32, [usize::MAX, usize::MAX / 4], &[]), Err(LayoutError::Size { .. })));
        assert!(StoredMatrix::of_part(Format::F16, [1, 2], Arc::new([0_u8; 3]), 0..4).is_err());
        assert!(Matrix::new(Format::F32, [0, 5], &[]).is_ok());
    }

    #[test]
    fn rows_of_rows_share_their_owner() {
        let numbers: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let matrix = StoredMatrix::of_f32(numbers, 3).rows(1..4).rows(1..2);
        assert_eq!(matrix.view().as_f32(), Some(&[6.0, 7.0, 8.0][..]));
    }

    #[test]
    fn f32_at_any_address_is_read() {
        let mut bytes = vec![0; 3];
        for number in [1.0_f32, -2.5] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for start in 0..4 {
            let bytes = [&vec![0; start][..], &bytes[3..]].concat();
            let matrix = StoredMatrix::of_part(Format::F32, [1, 2], Arc::new(bytes), start..start + 8).unwrap();
            assert_eq!(matrix.view().as_f32(), Some(&[1.0, -2.5][..]));
        }
    }
}
