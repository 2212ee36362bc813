//! One file of weights, whatever its format.

use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::coded::CodedFile;
use super::file::SafetensorsFile;
use super::formed::{FormedBytes, FormedFile};
use super::header::{Header, TensorEntry};
use super::map::{Mapping, SharedPart};
use super::recipe::TensorRef;
use super::torch::TorchFile;
use crate::ConvertError;
use crate::gguf::{GgufFile, GgufKind, Stored, StoredBytes};

/// The format of a file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// Safetensors.
    #[default]
    Safetensors,
    /// PyTorch's own: a pickle and the bytes of its tensors.
    Pytorch,
    /// GGUF.
    Gguf,
}

impl FileFormat {
    /// Whether it is safetensors, the one format that is written.
    pub fn is_safetensors(&self) -> bool {
        *self == Self::Safetensors
    }

    /// The name under which an export writes the tensors of the file `name`; none for safetensors, which keep theirs.
    pub(crate) fn exported_name(self, name: &str) -> Option<String> {
        match self {
            Self::Safetensors => None,
            // As transformers names the two: `pytorch_model-00001-of-00002.bin`, `model-00001-of-00002.safetensors`.
            Self::Pytorch => {
                let stem = name.strip_suffix(".bin").unwrap_or(name);
                Some(format!("{}.safetensors", stem.strip_prefix("pytorch_").unwrap_or(stem)))
            }
            Self::Gguf => Some("model.safetensors".to_owned()),
        }
    }
}

/// An open file of weights. Opening reads names, dtypes and shapes alone.
///
/// A file of another format presents itself as the safetensors file that an export writes in its place: the header
/// lists its tensors in that order, and their bytes are contiguous, row-major and little-endian.
#[derive(Debug)]
pub(crate) enum TensorFile {
    Safetensors(SafetensorsFile),
    Coded(CodedFile),
    Torch(TorchFile),
    Gguf(GgufFile),
    Formed(FormedFile),
}

impl TensorFile {
    pub(crate) fn format(&self) -> FileFormat {
        match self {
            Self::Safetensors(_) | Self::Coded(_) => FileFormat::Safetensors,
            Self::Torch(_) => FileFormat::Pytorch,
            Self::Gguf(_) => FileFormat::Gguf,
            Self::Formed(file) => file.as_it_is().format(),
        }
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Coded(file) => file.file().path(),
            Self::Torch(file) => file.path(),
            Self::Gguf(file) => file.path(),
            Self::Formed(file) => file.as_it_is().path(),
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
            Self::Coded(file) => file.file().len(),
            Self::Torch(file) => file.len(),
            Self::Gguf(file) => file.len(),
            Self::Formed(file) => file.as_it_is().len(),
        }
    }

    /// Its tensors, as the safetensors header that lists them.
    pub(crate) fn header(&self) -> &Header {
        match self {
            Self::Safetensors(file) => file.header(),
            Self::Coded(file) => file.header(),
            Self::Torch(file) => file.header(),
            Self::Gguf(file) => file.header(),
            Self::Formed(file) => file.header(),
        }
    }

    /// The number format of a tensor of a GGUF file, and of one that is codes in a converted model.
    pub(crate) fn kind(&self, tensor: &TensorEntry) -> Option<GgufKind> {
        self.stored(tensor).map(|stored| stored.kind)
    }

    /// How a tensor lies in the file where that is not as [`TensorFile::header`] says.
    pub(crate) fn stored(&self, tensor: &TensorEntry) -> Option<&Stored> {
        match self {
            Self::Gguf(file) => file.stored(tensor),
            Self::Coded(file) => file.stored(tensor),
            Self::Formed(file) => file.stored(tensor),
            Self::Safetensors(_) | Self::Torch(_) => None,
        }
    }

    /// The whole file, mapped for as long as anything holds it, and where in it a tensor is; none of a file whose tensors are not
    /// there as they are.
    pub(crate) fn shared(&self, tensor: &TensorEntry) -> Result<Option<SharedPart>, ConvertError> {
        Ok(match self {
            Self::Safetensors(file) => Some((file.whole()?, file.place(tensor))),
            Self::Coded(file) => Some((file.file().whole()?, file.file().place(tensor))),
            Self::Gguf(file) => file.shared(tensor)?,
            Self::Formed(file) => file.shared(tensor)?,
            Self::Torch(_) => None,
        })
    }

    /// The file without what it presents in place of what stands there.
    pub(crate) fn as_it_is(&self) -> &Self {
        match self {
            Self::Formed(file) => file.as_it_is(),
            file => file,
        }
    }

    /// What stands in the file under this name, where that is not among its tensors.
    pub(crate) fn standing(&self, name: &str) -> Option<TensorRef<'_>> {
        match self {
            Self::Formed(file) => file.standing(name),
            _ => None,
        }
    }

    /// Whether a tensor is read as a copy of all its bytes.
    pub(crate) fn is_copied(&self, tensor: &TensorEntry) -> bool {
        match self {
            Self::Torch(_) => true,
            Self::Formed(file) => !file.is_formed(tensor) && file.as_it_is().is_copied(tensor),
            _ => false,
        }
    }

    /// Whether a tensor lies in the file as it is, to be mapped.
    pub(crate) fn is_mapped(&self, tensor: &TensorEntry) -> bool {
        match self {
            Self::Torch(_) => false,
            Self::Formed(file) => !file.is_formed(tensor) && file.as_it_is().is_mapped(tensor),
            _ => true,
        }
    }

    /// The bytes of a tensor of this file.
    pub(crate) fn read(&self, tensor: &TensorEntry) -> Result<TensorBytes, ConvertError> {
        match self {
            Self::Safetensors(file) => file.map(tensor).map(TensorBytes::Mapped),
            Self::Coded(file) => file.read(tensor),
            Self::Torch(file) => file.read(tensor).map(TensorBytes::Copied),
            Self::Gguf(file) => file.map(tensor),
            Self::Formed(file) => file.read(tensor),
        }
    }
}

/// The bytes of one tensor. Dereferences to the bytes as they are in the file.
#[derive(Debug)]
pub(crate) enum TensorBytes {
    /// Pages of a file, resident as they are touched.
    Mapped(Mapping),
    /// A copy.
    Copied(Vec<u8>),
    /// Numbers of another format or in another order, mapped likewise and decoded where they are read.
    Stored(StoredBytes),
    /// What stands for other numbers, decoded where they are read.
    Formed(FormedBytes),
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(mapping) => mapping,
            Self::Copied(bytes) => bytes,
            Self::Stored(stored) => stored,
            Self::Formed(formed) => formed.standing(),
        }
    }
}
