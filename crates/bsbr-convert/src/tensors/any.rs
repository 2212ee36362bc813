//! One file of weights, whatever its format.

use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::SafetensorsFile;
use super::header::{Header, TensorEntry};
use super::map::Mapping;
use crate::ConvertError;

/// The format of a file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// Safetensors.
    #[default]
    Safetensors,
}

impl FileFormat {
    /// Whether it is safetensors, the one format that is written.
    pub fn is_safetensors(&self) -> bool {
        *self == Self::Safetensors
    }
}

/// An open file of weights. Opening reads names, dtypes and shapes alone.
///
/// A file of another format presents itself as the safetensors file that an export writes in its place: the header
/// lists its tensors in that order, and their bytes are contiguous, row-major and little-endian.
#[derive(Debug)]
pub(crate) enum TensorFile {
    Safetensors(SafetensorsFile),
}

impl TensorFile {
    pub(crate) fn format(&self) -> FileFormat {
        match self {
            Self::Safetensors(_) => FileFormat::Safetensors,
        }
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
        }
    }

    /// The last part of the path.
    pub(crate) fn name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Bytes of the whole file.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Safetensors(file) => file.len(),
        }
    }

    /// Its tensors, as the safetensors header that lists them.
    pub(crate) fn header(&self) -> &Header {
        match self {
            Self::Safetensors(file) => file.header(),
        }
    }

    /// The bytes of a tensor of this file.
    pub(crate) fn read(&self, tensor: &TensorEntry) -> Result<TensorBytes, ConvertError> {
        match self {
            Self::Safetensors(file) => file.map(tensor).map(TensorBytes::Mapped),
        }
    }
}

/// The bytes of one tensor.
#[derive(Debug)]
pub(crate) enum TensorBytes {
    /// Pages of a file, resident as they are touched.
    Mapped(Mapping),
    /// A copy.
    #[expect(dead_code, reason = "for formats that cannot be mapped")]
    Copied(Vec<u8>),
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(mapping) => mapping,
            Self::Copied(bytes) => bytes,
        }
    }
}
