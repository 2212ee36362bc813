//! Writing a safetensors file band by band.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::ConvertError;

/// Name, format and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorDeclaration {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl TensorDeclaration {
    /// Bytes of the tensor.
    pub(crate) fn bytes(&self) -> usize {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize()).div_ceil(8)
    }
}

/// The header of a file that holds `tensors` one after the other, padded so that the data starts at a multiple of 8.
pub(crate) fn header_text(tensors: &[TensorDeclaration]) -> String {
    header_with(None, tensors)
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
        let file = File::create_new(path).map_err(ConvertError::io("create", path))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { path: path.to_owned(), out, hash: hashed.then(Sha256::new), written: 0 };
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(header.as_bytes())?;
        Ok(writer)
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
