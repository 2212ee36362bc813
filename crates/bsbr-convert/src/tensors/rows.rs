//! Tensors as whole rows of what files hold: weights as they are stored.

use bsbr_weights::{Format, StoredMatrix, first_not_finite};

use super::any::TensorBytes;
use super::copy::{Block, Pattern};
use super::float::plain_format;
use super::map::SharedPart;
use super::recipe::{BAND, Recipe, TensorRef};
use super::write::TensorDeclaration;
use crate::ConvertError;
use crate::gguf::{Order, Stored};

/// Rows that lie one after the other in a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowRun {
    pub(crate) source: usize,
    /// The first, as the file has them.
    pub(crate) row: usize,
    pub(crate) count: usize,
}

/// The rows of sources that make up a tensor of rows of `width` numbers, in its order; none where it is not made of whole rows. Of each
/// source it is told how it lies in its file, where that is not row by row.
pub(crate) fn row_runs(blocks: &[Block], width: usize, sources: &[Option<&Stored>]) -> Option<Vec<RowRun>> {
    let (mut runs, mut next): (Vec<RowRun>, usize) = (Vec::new(), 0);
    let mut push = |source: usize, row: usize, count: usize| match runs.last_mut() {
        Some(last) if last.source == source && last.row + last.count == row => last.count += count,
        _ => runs.push(RowRun { source, row, count }),
    };
    for block in blocks {
        if block.to != next || width == 0 {
            return None;
        }
        next = block.end();
        let stored = sources[block.source];
        let order = stored.map_or(Order::Same, |stored| stored.order);
        match (block.copy, stored) {
            (Pattern::Run { len }, _) if block.from.is_multiple_of(width) && len.is_multiple_of(width) => {
                let (first, count) = (block.from / width, len / width);
                match (order, stored) {
                    (Order::Same, _) => push(block.source, first, count),
                    (Order::RotaryPairs { .. }, Some(stored)) if stored.width == width => {
                        (first..first + count).for_each(|row| push(block.source, stored.file_row(row), 1));
                    }
                    _ => return None,
                }
            }
            // Transposed twice: a row of the target is a row of the file.
            (Pattern::Transpose { rows, cols, from_stride, to_stride }, Some(stored))
                if order == Order::Transposed
                    && from_stride == stored.width
                    && block.from < from_stride
                    && [cols, to_stride] == [width; 2]
                    && stored.rows == width =>
            {
                push(block.source, block.from, rows);
            }
            _ => return None,
        }
    }
    Some(runs)
}

impl<'a> Recipe<'a> {
    /// The format in which all sources hold their numbers, where it is one and they are the numbers meant.
    fn source_format(&self) -> Option<Format> {
        let format = |source: &TensorRef<'_>| match source.file.stored(source.entry) {
            Some(stored) if stored.order == Order::OneMore => None,
            Some(stored) => stored.kind.format(),
            None => plain_format(source.entry.dtype),
        };
        let first = format(self.sources.first()?)?;
        self.sources.iter().all(|source| format(source) == Some(first)).then_some(first)
    }

    /// The rows that make it up, and their format, where it is a matrix of whole rows as they are stored.
    fn rows(&self) -> Option<(Format, Vec<RowRun>)> {
        let (format, &[outputs, inputs]) = (self.source_format()?, &self.shape[..]) else { return None };
        format.row_bytes(inputs)?;
        let sources: Vec<_> = self.sources.iter().map(|source| source.file.stored(source.entry)).collect();
        let runs = row_runs(&self.blocks, inputs, &sources)?;
        (runs.iter().map(|run| run.count).sum::<usize>() == outputs).then_some((format, runs))
    }

    /// The format in which it can be had without changing a number: that of the sources, or, where their codes do not lie along its rows,
    /// the one they are decoded to. None of whole numbers.
    pub(crate) fn format(&self) -> Option<Format> {
        match self.source_format() {
            Some(format) if format.is_quantised() => self.rows().map(|(format, _)| format).or(Some(Format::F32)),
            _ => plain_format(self.dtype),
        }
    }

    /// The declaration of a tensor that holds it as it is stored.
    pub(crate) fn declared(&self, name: String) -> TensorDeclaration {
        match self.format() {
            Some(format) if format.is_quantised() => TensorDeclaration::weight(name, format, self.shape.clone()),
            _ => TensorDeclaration::plain(name, self.dtype, self.shape.clone()),
        }
    }

    /// Calls `each` with consecutive bytes of [`Recipe::declared`].
    pub(crate) fn for_each_stored_band(
        &self,
        each: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        match self.rows().filter(|(format, _)| format.is_quantised()) {
            Some((format, runs)) => self.for_each_run(format, &runs, each),
            None => self.for_each_band(each),
        }
    }

    /// The same, after looking for a number that is not finite.
    pub(crate) fn for_each_checked_band(
        &self,
        each: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let Some(format) = self.format() else { return self.for_each_stored_band(each) };
        let mut done = 0;
        self.for_each_stored_band(&mut |bytes| {
            self.check(format, bytes, done)?;
            done += bytes.len() / format.block_bytes() * format.block();
            each(bytes)
        })
    }

    /// Calls `each` with the bytes of rows, at most a band at a time.
    fn for_each_run(
        &self,
        format: Format,
        runs: &[RowRun],
        each: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let row = self.row_bytes(format);
        // Of a stack of many tensors one is open at a time.
        let mut open: Option<(usize, TensorBytes)> = None;
        for run in runs {
            if open.as_ref().is_none_or(|(source, _)| *source != run.source) {
                let source = &self.sources[run.source];
                open = Some((run.source, source.file.read(source.entry)?));
            }
            let Some((_, bytes)) = &open else { continue };
            let step = (BAND / row.max(1)).max(1);
            if let TensorBytes::Formed(formed) = bytes {
                let (mut rows, end) = (Vec::new(), run.row + run.count);
                for first in (run.row..end).step_by(step) {
                    rows.clear();
                    formed.rows(first..end.min(first + step), &mut rows);
                    each(&rows)?;
                }
                continue;
            }
            let bytes = &bytes[run.row * row..(run.row + run.count) * row];
            // Whole rows, as checks count numbers.
            bytes.chunks(step * row.max(1)).try_for_each(&mut *each)?;
        }
        Ok(())
    }

    fn row_bytes(&self, format: Format) -> usize {
        self.shape.last().and_then(|&inputs| format.row_bytes(inputs)).unwrap_or(0)
    }

    /// Fails when a band that starts at number `first` holds a NaN or an infinity.
    fn check(&self, format: Format, bytes: &[u8], first: usize) -> Result<(), ConvertError> {
        let Some(index) = first_not_finite(format, bytes) else { return Ok(()) };
        let (block, size) = (format.block(), format.block_bytes());
        let mut numbers = vec![0.0; block];
        let at = index / block * size;
        bsbr_weights::decode(format, &bytes[at..at + size], &mut numbers);
        let (path, tensor, element) = self.place(first + index);
        Err(ConvertError::NotFinite { path, tensor, element, value: numbers[index % block] })
    }

    /// The matrix as it is stored: in the mapped file where its rows lie there one after the other, else a copy of them in their own
    /// format. Only numbers that do not lie along rows are decoded.
    ///
    /// None for what is no matrix of weights.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NotFinite`] when a number is NaN or infinite: all bytes are read once, or the scales of codes.
    pub(crate) fn matrix(&self) -> Result<Option<StoredMatrix>, ConvertError> {
        let (Some(format), &[outputs, inputs]) = (self.format(), &self.shape[..]) else { return Ok(None) };
        let whole =
            |error: bsbr_weights::LayoutError| ConvertError::io("read", &self.place(0).0)(std::io::Error::other(error));
        let shape = [outputs, inputs];
        let rows = self.rows().filter(|(stored, _)| *stored == format).map(|(_, runs)| runs);
        let matrix = match (rows.as_deref(), self.in_place(rows.as_deref(), format)?) {
            // It was mapped, so its places fit.
            (_, Some((owner, range))) => {
                StoredMatrix::of_part(format, shape, owner, range.start as usize..range.end as usize)
            }
            (Some(&[run]), None) if self.is_all_of(run) => {
                let source = &self.sources[run.source];
                let TensorBytes::Copied(bytes) = source.file.read(source.entry)? else { return Ok(None) };
                StoredMatrix::new(format, shape, bytes)
            }
            (runs, None) => {
                let mut bytes = Vec::with_capacity(outputs * self.row_bytes(format));
                let mut put = |band: &[u8]| {
                    bytes.extend_from_slice(band);
                    Ok(())
                };
                match runs {
                    Some(runs) if format.is_quantised() => self.for_each_run(format, runs, &mut put)?,
                    _ => self.for_each_band(put)?,
                }
                StoredMatrix::new(format, shape, bytes)
            }
        };
        let matrix = matrix.map_err(whole)?;
        self.check(format, matrix.view().bytes(), 0)?;
        Ok(Some(matrix))
    }

    /// Whether the matrix is in a mapped file as it is wanted.
    pub(crate) fn is_in_place(&self) -> bool {
        let mapped = |run: &RowRun| self.sources[run.source].file.is_mapped(self.sources[run.source].entry);
        self.rows().is_some_and(|(_, runs)| matches!(&runs[..], [run] if mapped(run)))
    }

    /// Whether a run is all of a source that is read as a copy.
    fn is_all_of(&self, run: RowRun) -> bool {
        let source = &self.sources[run.source];
        let all = self.shape.iter().product::<usize>() == source.entry.elements();
        run.row == 0 && all && source.file.is_copied(source.entry)
    }

    /// The mapped file and the bytes in it, where they lie there as they are wanted.
    fn in_place(&self, runs: Option<&[RowRun]>, format: Format) -> Result<Option<SharedPart>, ConvertError> {
        let Some(&[RowRun { source, row, count }]) = runs else { return Ok(None) };
        let TensorRef { file, entry } = self.sources[source];
        let size = self.row_bytes(format);
        Ok(file.shared(entry)?.map(|(mapping, place)| {
            let start = place.start + (row * size) as u64;
            (mapping, start..start + (count * size) as u64)
        }))
    }

    /// Some rows of the matrix, starts and counts.
    pub(crate) fn select(&self, rows: &[(usize, usize)]) -> Self {
        let width = self.shape[1..].iter().product::<usize>();
        let (mut blocks, mut to) = (Vec::new(), 0);
        for &(start, count) in rows {
            // Of a tensor as it is.
            let (from, len) = (start * width, count * width);
            blocks.push(Block { source: 0, from, to, copy: Pattern::Run { len } });
            to += len;
        }
        let mut shape = self.shape.clone();
        shape[0] = rows.iter().map(|(_, count)| count).sum();
        Self { blocks, shape, ..self.clone() }
    }
}
