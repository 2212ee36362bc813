//! Writing a safetensors file band by band.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bsbr_weights::Format;
use safetensors::Dtype;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::coded::FORMAT_KEY;
use super::float::plain_dtype;
use crate::ConvertError;

/// Name, format and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorDeclaration {
    pub(crate) name: String,
    /// As it stands in the header: U8 of codes.
    pub(crate) dtype: Dtype,
    /// As it stands in the header: of codes the rows and the bytes of a row.
    pub(crate) shape: Vec<usize>,
    /// The format of codes.
    pub(crate) codes: Option<Format>,
}

impl TensorDeclaration {
    /// A tensor of numbers.
    pub(crate) fn plain(name: String, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { name, dtype, shape, codes: None }
    }

    /// A weight in `format`. One whose rows are no whole blocks of it has its numbers.
    pub(crate) fn weight(name: String, format: Format, shape: Vec<usize>) -> Self {
        match (&shape[..], shape.last().and_then(|&inputs| format.row_bytes(inputs))) {
            (&[outputs, _], Some(row)) if format.is_quantised() => {
                Self { name, dtype: Dtype::U8, shape: vec![outputs, row], codes: Some(format) }
            }
            _ => Self::plain(name, plain_dtype(format), shape),
        }
    }

    /// Name of its number format.
    pub(crate) fn format(&self) -> String {
        self.codes.map_or_else(|| self.dtype.to_string(), |format| format.to_string())
    }

    /// Shape of the weight.
    pub(crate) fn numbers(&self) -> Vec<usize> {
        match (self.codes, &self.shape[..]) {
            (Some(format), &[outputs, row]) => vec![outputs, row / format.block_bytes() * format.block()],
            _ => self.shape.clone(),
        }
    }

    /// Bytes of the tensor.
    pub(crate) fn bytes(&self) -> usize {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize()).div_ceil(8)
    }
}

/// The header of a file that holds `tensors` one after the other, padded so that the data starts at a multiple of 8. The formats of
/// those that are codes are metadata, as [`super::coded`] reads them.
pub(crate) fn header_text(tensors: &[TensorDeclaration]) -> String {
    let coded = tensors.iter().filter_map(|tensor| Some((tensor, tensor.codes?)));
    let formats: Vec<String> = coded
        .map(|(tensor, format)| format!("{}:{}", json!(format!("{FORMAT_KEY}{}", tensor.name)), json!(format.name())))
        .collect();
    let metadata = format!(r#""__metadata__":{{{}}}"#, formats.join(","));
    header_with(Some(metadata.as_str()).filter(|_| !formats.is_empty()), tensors)
}

/// The same with the metadata without which transformers refuses a checkpoint.
pub(crate) fn exported_header(tensors: &[TensorDeclaration]) -> String {
    header_with(Some(r#""__metadata__":{"format":"pt"}"#), tensors)
}

fn header_with(metadata: Option<&str>, tensors: &[TensorDeclaration]) -> String {
    let mut start = 0;
    // Written by hand to keep the order: a JSON map type would sort the names.
    let entries = tensors.iter().map(|tensor| {
        let end = start + tensor.bytes();
        let entry = json!({ "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end] });
        start = end;
        format!("{}:{entry}", json!(tensor.name))
    });
    let entries = metadata.map(str::to_owned).into_iter().chain(entries);
    let mut text = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    text
}

/// A safetensors file being written. Errors name the file.
#[derive(Debug)]
pub(crate) struct TensorFileWriter {
    path: PathBuf,
    out: BufWriter<File>,
    hash: Option<Sha256>,
    written: u64,
}

impl TensorFileWriter {
    /// Creates `path` and writes the header; `hashed` says whether the SHA-256 is wanted.
    pub(crate) fn create(path: &Path, header: &str, hashed: bool) -> Result<Self, ConvertError> {
        let mut writer = Self::bare(path)?;
        writer.hash = writer.hash.filter(|_| hashed);
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(header.as_bytes())?;
        Ok(writer)
    }

    /// Creates `path` without a header, for a file of another format; its SHA-256 is wanted.
    pub(crate) fn bare(path: &Path) -> Result<Self, ConvertError> {
        let file = File::create_new(path).map_err(ConvertError::io("create", path))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { path: path.to_owned(), out, hash: Some(Sha256::new()), written: 0 })
    }

    /// Appends bytes of a tensor.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ConvertError> {
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(ConvertError::io("write", &self.path))
    }

    /// Flushes to the disk; returns the length of the file and its SHA-256, which is empty unless it was wanted.
    pub(crate) fn finish(mut self) -> Result<(u64, String), ConvertError> {
        let flushed = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        flushed.map_err(ConvertError::io("write", &self.path))?;
        Ok((self.written, self.hash.map(|hash| hex(&hash.finalize())).unwrap_or_default()))
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
