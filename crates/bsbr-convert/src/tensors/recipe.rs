//! One tensor as a rearrangement of tensors in files, read in bands.

use std::ops::Range;

use safetensors::Dtype;

use super::copy::{Block, Pattern, bands, fill};
use super::file::SafetensorsFile;
use super::float::{first_not_finite, numbers};
use super::header::TensorEntry;
use crate::ConvertError;

/// Bytes of a band: large enough that the cost per band vanishes, small beside a tensor that matters.
const BAND: usize = 8 << 20;

/// A tensor in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorRef<'a> {
    pub(crate) file: &'a SafetensorsFile,
    pub(crate) entry: &'a TensorEntry,
}

/// A tensor made of the numbers of others, all of one dtype.
#[derive(Debug, Clone)]
pub(crate) struct Recipe<'a> {
    pub(crate) sources: Vec<TensorRef<'a>>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl<'a> Recipe<'a> {
    /// The tensor as it is.
    pub(crate) fn whole(source: TensorRef<'a>) -> Self {
        let copy = Pattern::Run { len: source.entry.elements() };
        Self {
            blocks: vec![Block { source: 0, from: 0, to: 0, copy }],
            dtype: source.entry.dtype,
            shape: source.entry.shape.clone(),
            sources: vec![source],
        }
    }

    /// Calls `each` with the bytes of consecutive bands.
    pub(crate) fn for_each_band(
        &self,
        each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        // A format below one byte has no byte per number: such a tensor is only ever copied whole.
        let (size, shape) = match self.dtype.bitsize() {
            bits if bits % 8 == 0 => (bits / 8, self.shape.clone()),
            _ => return self.copy_bytes(each),
        };
        self.bands_of(bands(&shape, size, BAND), size, each)
    }

    /// The numbers `range`, whole rows, as f32.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NotFinite`] when one of them is NaN or infinite.
    pub(crate) fn read(&self, range: Range<usize>) -> Result<Vec<f32>, ConvertError> {
        let size = self.dtype.bitsize() / 8;
        let mut values = Vec::with_capacity(range.len());
        let row = if self.shape.len() < 2 { 1 } else { self.shape[self.shape.len() - 1].max(1) };
        let local = bands(&[range.len() / row, row], size, BAND);
        let start = range.start;
        let shifted = local.map(|band| band.start + start..band.end + start);
        let mut done = start;
        self.bands_of(shifted, size, |bytes| {
            self.check_finite(bytes, done)?;
            done += bytes.len() / size;
            values.extend(numbers(self.dtype, bytes));
            Ok(())
        })?;
        Ok(values)
    }

    /// Fails when a band that starts at number `first` holds a NaN or an infinity.
    pub(crate) fn check_finite(&self, bytes: &[u8], first: usize) -> Result<(), ConvertError> {
        let Some((index, value)) = first_not_finite(self.dtype, bytes) else { return Ok(()) };
        let (source, element) = self.origin(first + index);
        let source = &self.sources[source];
        Err(ConvertError::NotFinite {
            path: source.file.path().to_owned(),
            tensor: source.entry.name.clone(),
            element,
            value,
        })
    }

    /// Which number of which source the number `position` is.
    fn origin(&self, position: usize) -> (usize, usize) {
        for block in &self.blocks {
            let Some(offset) = position.checked_sub(block.to) else { continue };
            match block.copy {
                Pattern::Run { len } if offset < len => return (block.source, block.from + offset),
                Pattern::Transpose { rows, cols, from_stride, to_stride } => {
                    let (row, col) = (offset / to_stride, offset % to_stride);
                    if row < rows && col < cols {
                        return (block.source, block.from + col * from_stride + row);
                    }
                }
                Pattern::Run { .. } => {}
            }
        }
        (0, position)
    }

    fn bands_of(
        &self,
        ranges: impl Iterator<Item = Range<usize>>,
        size: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let maps = self.sources.iter().map(|s| s.file.map(s.entry)).collect::<Result<Vec<_>, _>>()?;
        let sources: Vec<&[u8]> = maps.iter().map(|map| &**map).collect();
        let mut out = Vec::new();
        for range in ranges {
            out.resize(range.len() * size, 0);
            fill(&mut out, range, &self.blocks, &sources, size);
            each(&out)?;
        }
        Ok(())
    }

    fn copy_bytes(&self, mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>) -> Result<(), ConvertError> {
        self.sources.iter().try_for_each(|s| each(&s.file.map(s.entry)?))
    }
}
