//! One file of PyTorch tensors, read through `pytorch-reader`.
//!
//! A pickle is a program. The reader runs none of it: it knows the calls that rebuild tensors and keeps every other
//! one as a name, and a file that holds such a name, or anything else that is no tensor, is refused here.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use pytorch_reader::{DType, FileFormat as Container, PickleValue, PytorchError, PytorchReader, Tensor};
use safetensors::Dtype;

use super::header::{Header, TensorEntry};
use super::write::{TensorDeclaration, exported_header};
use crate::ConvertError;
use crate::placeholder::check_file;
use crate::problem::TorchProblem;

/// What a pickled tensor is called when the whole pickle is looked at.
const TENSOR: &str = "torch.Tensor";
/// The key under which PyTorch keeps versions of its modules, no weights.
const MODULE_VERSIONS: &str = "_metadata";

/// An open PyTorch file. Opening reads the pickle alone, which holds names, dtypes, shapes and strides.
#[derive(Debug)]
pub(crate) struct TorchFile {
    path: PathBuf,
    len: u64,
    header: Header,
    tensors: HashMap<String, Tensor>,
}

impl TorchFile {
    /// Opens `path`: a state dict as `torch.save` writes it, in a zip archive or in the format before PyTorch 1.6.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`], or [`ConvertError::Torch`] for a file that is damaged, holds anything but tensors by
    /// name, or claims a tensor larger than itself.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        let torch = |problem| ConvertError::Torch { path: path.to_owned(), problem: Box::new(problem) };
        check_file(path)?;
        let len = File::open(path).and_then(|file| file.metadata()).map_err(ConvertError::io("open", path))?.len();
        let root = PytorchReader::read_pickle_data(path, None).map_err(|error| unreadable(path, error))?;
        check_state_dict(root).map_err(torch)?;
        let reader = PytorchReader::new(path).map_err(|error| unreadable(path, error))?;
        if !matches!(reader.metadata().format_type, Container::Zip | Container::Legacy) {
            return Err(torch(TorchProblem::Container));
        }
        let tensors = reader.into_tensors();
        let header = header(&tensors, len).map_err(torch)?;
        Ok(Self { path: path.to_owned(), len, header, tensors })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the whole file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Reads one tensor: contiguous, row-major, little-endian.
    pub(crate) fn read(&self, tensor: &TensorEntry) -> Result<Vec<u8>, ConvertError> {
        let damaged = |problem| {
            let problem = TorchProblem::Data { tensor: tensor.name.clone(), problem };
            ConvertError::Torch { path: self.path.clone(), problem: Box::new(problem) }
        };
        let Some(found) = self.tensors.get(&tensor.name) else { return Err(damaged("it is not there".to_owned())) };
        let mut bytes = found.read().map_err(|error| match error.kind() {
            ErrorKind::InvalidData | ErrorKind::UnexpectedEof => damaged(error.to_string()),
            _ => ConvertError::io("read", &self.path)(error),
        })?;
        if bytes.len() != tensor.bytes.len() {
            return Err(damaged(format!("it has {} bytes instead of {}", bytes.len(), tensor.bytes.len())));
        }
        if cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(found.dtype().size()).for_each(<[u8]>::reverse);
        }
        Ok(bytes)
    }
}

fn unreadable(path: &Path, error: PytorchError) -> ConvertError {
    match error {
        PytorchError::Io(source) if source.raw_os_error().is_some() => ConvertError::io("read", path)(source),
        error => {
            let problem = Box::new(TorchProblem::Unreadable(error.to_string()));
            ConvertError::Torch { path: path.to_owned(), problem }
        }
    }
}

/// Checks that a pickle is a dictionary of tensors and nothing else.
///
/// The reader of tensors would pass over anything else in silence.
fn check_state_dict(root: PickleValue) -> Result<(), TorchProblem> {
    let PickleValue::Dict(entries) = root else {
        return Err(TorchProblem::NoDictionary { found: describe(&root) });
    };
    let mut entries: Vec<_> = entries.into_iter().filter(|(key, _)| key != MODULE_VERSIONS).collect();
    // The first by name, so that the message does not change from run to run.
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    match entries.iter().find(|(_, value)| !is_tensor(value)) {
        None => Ok(()),
        Some((key, value)) if holds_tensor(value) => Err(TorchProblem::Nested { key: key.clone() }),
        Some((key, value)) => Err(TorchProblem::NoTensor { key: key.clone(), found: describe(value) }),
    }
}

fn is_tensor(value: &PickleValue) -> bool {
    matches!(value, PickleValue::Unsupported(name) if name == TENSOR)
}

fn holds_tensor(value: &PickleValue) -> bool {
    match value {
        PickleValue::Dict(entries) => entries.values().any(holds_tensor),
        PickleValue::List(items) => items.iter().any(holds_tensor),
        value => is_tensor(value),
    }
}

fn describe(value: &PickleValue) -> String {
    match value {
        PickleValue::None => "None".to_owned(),
        PickleValue::Bool(_) => "a truth value".to_owned(),
        PickleValue::Int(_) | PickleValue::Float(_) => "a number".to_owned(),
        PickleValue::String(_) => "a string".to_owned(),
        PickleValue::List(_) => "a list".to_owned(),
        PickleValue::Dict(_) => "a dictionary".to_owned(),
        PickleValue::Bytes(_) => "bytes".to_owned(),
        PickleValue::Unsupported(name) => format!("a `{name}`"),
    }
}

/// The header of the safetensors file that holds the same tensors: wider formats first, then by name, as PyTorch's
/// own writer of that format has it.
fn header(tensors: &HashMap<String, Tensor>, file: u64) -> Result<Header, TorchProblem> {
    if tensors.is_empty() {
        return Err(TorchProblem::Empty);
    }
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by_key(|(name, tensor)| (Reverse(tensor.dtype().size()), *name));
    let mut declarations = Vec::new();
    for (name, tensor) in sorted {
        // A view can repeat the same bytes without end: what is larger than the file was never a weight.
        let bytes = tensor.byte_len() as u64;
        if bytes > file {
            let (tensor, shape) = (name.clone(), tensor.shape().to_vec());
            return Err(TorchProblem::LargerThanFile { tensor, shape, bytes, file });
        }
        declarations.push(TensorDeclaration::plain(name.clone(), dtype(tensor.dtype()), tensor.shape().to_vec()));
    }
    let total = declarations.iter().try_fold(0_usize, |total, tensor| total.checked_add(tensor.bytes()));
    if total.is_none() {
        return Err(TorchProblem::Unreadable("its tensors together are larger than memory can be".to_owned()));
    }
    Header::parse(exported_header(&declarations)).map_err(|problem| TorchProblem::Unreadable(problem.to_string()))
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
    }
}
