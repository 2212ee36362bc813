//! One safetensors file, read by its header.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header::{Header, MAX_HEADER, TensorEntry};
use super::map::{Mapping, WholeFile};
use crate::ConvertError;
use crate::placeholder::check_file;
use crate::problem::FormatProblem;

/// An open safetensors file. Opening reads the header alone.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    header: Header,
    whole: WholeFile,
}

impl SafetensorsFile {
    /// Opens `path` and checks its header against the length of the file.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`], or [`ConvertError::Format`] for a file that is too short, cut off, padded, or whose
    /// header is too long, not JSON, or describes overlapping, missing, unknown or wrongly sized tensors.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let format = |problem| ConvertError::Format { path: path.to_owned(), problem: Box::new(problem) };
        check_file(path)?;
        let mut file = File::open(path).map_err(ConvertError::io("open", path))?;
        let len = file.metadata().map_err(ConvertError::io("read", path))?.len();
        if len < 8 {
            return Err(format(FormatProblem::TooShort { len }));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(ConvertError::io("read", path))?;
        let header = u64::from_le_bytes(prefix);
        if header > len - 8 {
            return Err(format(FormatProblem::HeaderBeyondFile { header, available: len - 8 }));
        }
        if header > MAX_HEADER {
            return Err(format(FormatProblem::HeaderTooLarge { header, limit: MAX_HEADER }));
        }
        let mut text = vec![0; header as usize]; // at most MAX_HEADER
        file.read_exact(&mut text).map_err(ConvertError::io("read", path))?;
        let text = String::from_utf8(text).map_err(|e| format(FormatProblem::Header(e.to_string())))?;
        let header = Header::parse(text).map_err(format)?;
        let (expected, found) = (header.data_len, len - 8 - header.text.len() as u64);
        if found < expected as u64 {
            return Err(format(FormatProblem::Truncated { expected, found }));
        }
        if found > expected as u64 {
            return Err(format(FormatProblem::Trailing { expected, found }));
        }
        Ok(Self { path: path.to_owned(), file, header, whole: WholeFile::default() })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last part of the path.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the whole file.
    pub fn len(&self) -> u64 {
        8 + self.header.text.len() as u64 + self.header.data_len as u64
    }

    /// Whether the file holds no tensor.
    pub fn is_empty(&self) -> bool {
        self.header.tensors.is_empty()
    }

    /// Maps the bytes of one tensor of this file.
    pub(crate) fn map(&self, tensor: &TensorEntry) -> Result<Mapping, ConvertError> {
        Mapping::new(&self.file, self.place(tensor)).map_err(ConvertError::io("map", &self.path))
    }

    /// The whole file, mapped for as long as anything holds it.
    pub(crate) fn whole(&self) -> Result<Arc<Mapping>, ConvertError> {
        self.whole.get(&self.file, self.len()).map_err(ConvertError::io("map", &self.path))
    }

    /// Where in the file a tensor is.
    pub(crate) fn place(&self, tensor: &TensorEntry) -> Range<u64> {
        let data = 8 + self.header.text.len() as u64;
        data + tensor.bytes.start as u64..data + tensor.bytes.end as u64
    }
}
