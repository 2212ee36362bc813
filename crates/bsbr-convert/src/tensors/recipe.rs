//! One tensor as a rearrangement of tensors in files, read in bands.

use std::ops::Range;
use std::path::PathBuf;

use bsbr_weights::{EncodeError, Format, Matrix};
use safetensors::Dtype;

use super::any::{TensorBytes, TensorFile};
use super::cast::{CastLoss, cast};
use super::copy::{Block, Pattern, bands, fill_block};
use super::float::{first_not_finite, numbers};
use super::header::TensorEntry;
use crate::ConvertError;

/// Bytes of a band: large enough that the cost per band vanishes, small beside a tensor that matters.
pub(crate) const BAND: usize = 8 << 20;

/// A tensor in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorRef<'a> {
    pub(crate) file: &'a TensorFile,
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

    /// Opens the sources: they stay open, and in memory where they cannot be mapped, until the result is dropped.
    pub(crate) fn open(&self) -> Result<OpenRecipe<'_>, ConvertError> {
        let sources = self.sources.iter().map(|source| source.file.read(source.entry).map(Some));
        Ok(OpenRecipe { recipe: self, sources: sources.collect::<Result<_, _>>()? })
    }

    /// Calls `each` with the bytes of consecutive bands.
    pub(crate) fn for_each_band(
        &self,
        mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let bits = self.dtype.bitsize();
        if !bits.is_multiple_of(8) {
            // A format below one byte has no byte per number: such a tensor is only ever copied whole.
            return self.open()?.sources.iter().flatten().try_for_each(|bytes| each(bytes));
        }
        // Of a stack of many tensors only those that a band needs are open.
        let mut open = OpenRecipe { recipe: self, sources: self.sources.iter().map(|_| None).collect() };
        for band in bands(&self.shape, bits / 8, BAND) {
            open.keep_for(&band)?;
            open.bands_of(std::iter::once(band), bits / 8, &mut each)?;
        }
        Ok(())
    }

    /// Fails when a band that starts at number `first` holds a NaN or an infinity.
    fn check_finite(&self, bytes: &[u8], first: usize) -> Result<(), ConvertError> {
        let Some((index, value)) = first_not_finite(self.dtype, bytes) else { return Ok(()) };
        let (path, tensor, element) = self.place(first + index);
        Err(ConvertError::NotFinite { path, tensor, element, value })
    }

    /// File, tensor and element that the number `position` comes from.
    pub(super) fn place(&self, position: usize) -> (PathBuf, String, usize) {
        let (source, element) = self.origin(position);
        let source = &self.sources[source];
        (source.file.path().to_owned(), source.entry.name.clone(), element)
    }

    /// Calls `each` with the bytes of consecutive bands in the format `to`; returns what that changed.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NotFinite`] when a number is NaN or infinite, [`ConvertError::CastOverflow`] when it becomes so.
    pub(crate) fn for_each_cast_band(
        &self,
        to: Dtype,
        mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<CastLoss, ConvertError> {
        let (mut loss, mut out, mut first) = (CastLoss::default(), Vec::new(), 0);
        self.for_each_band(|bytes| {
            self.check_finite(bytes, first)?;
            if self.dtype == to {
                each(bytes)?;
            } else {
                out.clear();
                cast([self.dtype, to], bytes, &mut out, &mut loss).map_err(|overflow| {
                    let (path, tensor, element) = self.place(first + overflow.index);
                    ConvertError::CastOverflow { path, tensor, element, value: overflow.value, to: to.to_string() }
                })?;
                each(&out)?;
            }
            first += bytes.len() * 8 / self.dtype.bitsize();
            Ok(())
        })?;
        Ok(loss)
    }

    /// Calls `each` with the bytes of consecutive bands of rows in a format of codes; returns what that changed. `importance` has a weight
    /// of the squared errors for each input.
    ///
    /// # Errors
    ///
    /// As [`Recipe::for_each_cast_band`].
    pub(crate) fn for_each_encoded_band(
        &self,
        format: Format,
        importance: Option<&[f32]>,
        mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<CastLoss, ConvertError> {
        let (mut loss, mut first) = (CastLoss::default(), 0);
        let inputs = self.shape.last().copied().unwrap_or(0);
        self.for_each_band(|bytes| {
            self.check_finite(bytes, first)?;
            let values: Vec<f32> = numbers(self.dtype, bytes).collect();
            let codes = bsbr_weights::encode(format, inputs, &values, importance).map_err(|error| {
                let (path, tensor, element) = match error {
                    EncodeError::TooLarge { index, .. } => self.place(first + index),
                    _ => self.place(first),
                };
                match error {
                    EncodeError::TooLarge { value, .. } => {
                        ConvertError::CastOverflow { path, tensor, element, value, to: format.to_string() }
                    }
                    problem => ConvertError::Encode { path, tensor, problem },
                }
            })?;
            let matrix = Matrix::new(format, [values.len() / inputs.max(1), inputs], &codes).map_err(|problem| {
                ConvertError::Encode { path: self.place(first).0, tensor: self.place(first).1, problem: problem.into() }
            })?;
            loss.count_codes(&values, matrix);
            first += values.len();
            each(&codes)
        })?;
        Ok(loss)
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
}

/// A recipe with the bytes of its sources at hand.
#[derive(Debug)]
pub(crate) struct OpenRecipe<'a> {
    recipe: &'a Recipe<'a>,
    /// Those that are open.
    sources: Vec<Option<TensorBytes>>,
}

impl OpenRecipe<'_> {
    /// Shape of the tensor.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.recipe.shape
    }

    /// Opens the sources that the numbers `range` come from and closes the others.
    fn keep_for(&mut self, range: &Range<usize>) -> Result<(), ConvertError> {
        let mut needed = vec![false; self.sources.len()];
        for block in &self.recipe.blocks {
            needed[block.source] |= block.to < range.end && range.start < block.end();
        }
        for ((open, needed), source) in self.sources.iter_mut().zip(needed).zip(&self.recipe.sources) {
            match (needed, &open) {
                (true, None) => *open = Some(source.file.read(source.entry)?),
                (false, Some(_)) => *open = None,
                _ => {}
            }
        }
        Ok(())
    }

    /// The numbers `range`, whole rows, as f32.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NotFinite`] when one of them is NaN or infinite.
    pub(crate) fn read(&self, range: Range<usize>) -> Result<Vec<f32>, ConvertError> {
        let Recipe { dtype, shape, .. } = self.recipe;
        let size = dtype.bitsize() / 8;
        let mut values = Vec::with_capacity(range.len());
        let row = if shape.len() < 2 { 1 } else { shape[shape.len() - 1].max(1) };
        let local = bands(&[range.len() / row, row], size, BAND);
        let start = range.start;
        let shifted = local.map(|band| band.start + start..band.end + start);
        let mut done = start;
        self.bands_of(shifted, size, |bytes| {
            self.recipe.check_finite(bytes, done)?;
            done += bytes.len() / size;
            values.extend(numbers(*dtype, bytes));
            Ok(())
        })?;
        Ok(values)
    }

    /// The bytes of the numbers `range` where a source holds them one after the other: most bands need no copy.
    fn as_they_are(&self, range: &Range<usize>, size: usize) -> Option<&[u8]> {
        let (block, from) = self.recipe.blocks.iter().find_map(|block| match block.copy {
            Pattern::Run { len } if block.to <= range.start && range.end <= block.to + len => {
                Some((block, (block.from + range.start - block.to) * size))
            }
            _ => None,
        })?;
        let source: &[u8] = match self.sources[block.source].as_ref()? {
            TensorBytes::Mapped(bytes) => bytes,
            TensorBytes::Copied(bytes) => bytes,
            TensorBytes::Stored(_) | TensorBytes::Formed(_) => return None,
        };
        source.get(from..from + range.len() * size)
    }

    fn bands_of(
        &self,
        ranges: impl Iterator<Item = Range<usize>>,
        size: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let mut out = Vec::new();
        for range in ranges {
            if let Some(bytes) = self.as_they_are(&range, size) {
                each(bytes)?;
                continue;
            }
            out.resize(range.len() * size, 0);
            for block in &self.recipe.blocks {
                // One that is closed has no numbers here.
                match &self.sources[block.source] {
                    Some(TensorBytes::Stored(source)) => source.fill(&mut out, &range, block, size),
                    Some(TensorBytes::Formed(source)) => source.fill(&mut out, &range, block),
                    Some(source) => fill_block(&mut out, range.clone(), block, source, size),
                    None => {}
                }
            }
            each(&out)?;
        }
        Ok(())
    }
}
