//! The weights of a converted model: a safetensors file, some of whose tensors are rows of codes.
//!
//! Such a tensor is U8 `[outputs, bytes of a row]`, and `__metadata__` has its format under `format.` and its name. Both are in one
//! header, so that they are checked together before anything else is looked at, and the file says by itself what it holds.

use std::collections::HashMap;
use std::path::Path;

use bsbr_weights::Format;
use safetensors::Dtype;
use serde_json::Value;

use super::any::TensorBytes;
use super::file::SafetensorsFile;
use super::header::{Header, TensorEntry};
use crate::ConvertError;
use crate::gguf::{GgufKind, Order, Stored, StoredBytes};
use crate::problem::FormatProblem;

/// What stands before the name of a tensor in the keys of the metadata.
pub(crate) const FORMAT_KEY: &str = "format.";

/// An open file of weights, some of which may be codes. Its header gives those as the F32 tensors that they stand for.
#[derive(Debug)]
pub(crate) struct CodedFile {
    file: SafetensorsFile,
    header: Header,
    stored: HashMap<String, Stored>,
}

impl CodedFile {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// As [`SafetensorsFile::open`]; [`ConvertError::Format`] for a format that is not known or of a tensor that is not there, and
    /// for one of a tensor that is not whole rows of it.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        let file = SafetensorsFile::open(path)?;
        let format = |problem| ConvertError::Format { path: path.to_owned(), problem: Box::new(problem) };
        let mut formats = formats(file.header()).map_err(format)?;
        let (mut header, mut stored) = (file.header().clone(), HashMap::new());
        for entry in &mut header.tensors {
            if let Some(found) = formats.remove(&entry.name) {
                stored.insert(entry.name.clone(), presented(&file, entry, found).map_err(format)?);
            }
        }
        match formats.into_keys().min() {
            Some(tensor) => Err(format(FormatProblem::FormatOfNothing { tensor })),
            None => Ok(Self { file, header, stored }),
        }
    }

    /// The file as it is.
    pub(crate) fn file(&self) -> &SafetensorsFile {
        &self.file
    }

    /// Its tensors, those that are codes as what they stand for; their bytes are those of the codes.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// How a tensor lies in the file, if it is codes.
    pub(crate) fn stored(&self, tensor: &TensorEntry) -> Option<&Stored> {
        self.stored.get(&tensor.name)
    }

    /// Maps the bytes of one tensor.
    pub(crate) fn read(&self, tensor: &TensorEntry) -> Result<TensorBytes, ConvertError> {
        let mapping = self.file.map(tensor)?;
        Ok(match self.stored(tensor) {
            None => TensorBytes::Mapped(mapping),
            Some(stored) => TensorBytes::Stored(StoredBytes { stored: stored.clone(), mapping }),
        })
    }
}

/// The formats that the metadata give to tensors.
fn formats(header: &Header) -> Result<HashMap<String, Format>, FormatProblem> {
    let named = header.metadata.iter().filter_map(|(key, value)| Some((key.strip_prefix(FORMAT_KEY)?, value)));
    let quantised = || Format::ALL.into_iter().filter(|format| format.is_quantised());
    let read = |(tensor, value): (&str, &Value)| {
        let format = value.as_str().and_then(|name| quantised().find(|format| format.name() == name));
        let unknown = || FormatProblem::UnknownFormat {
            tensor: tensor.to_owned(),
            found: value.to_string(),
            known: quantised().map(Format::name).collect::<Vec<_>>().join(", "),
        };
        Ok((tensor.to_owned(), format.ok_or_else(unknown)?))
    };
    named.map(read).collect()
}

/// Makes the entry of a tensor of codes that of its numbers.
fn presented(file: &SafetensorsFile, entry: &mut TensorEntry, format: Format) -> Result<Stored, FormatProblem> {
    let (block, size) = (format.block(), format.block_bytes());
    let problem = |entry: &TensorEntry| FormatProblem::Codes {
        tensor: entry.name.clone(),
        format: format.name(),
        block: size,
        dtype: entry.dtype.to_string(),
        shape: entry.shape.clone(),
    };
    let (Dtype::U8, &[rows, row]) = (entry.dtype, &entry.shape[..]) else { return Err(problem(entry)) };
    let width = (row / size).checked_mul(block).filter(|_| row.is_multiple_of(size));
    // Numbers are counted, and their bytes as F32.
    let width = width.filter(|width| width.checked_mul(rows).and_then(|count| count.checked_mul(4)).is_some());
    let (Some(width), Some(kind)) = (width, GgufKind::of_format(format)) else { return Err(problem(entry)) };
    (entry.dtype, entry.shape) = (Dtype::F32, vec![rows, width]);
    Ok(Stored { kind, order: Order::Same, width, rows, bytes: file.place(entry) })
}
