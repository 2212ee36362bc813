//! Files of weights: headers, bytes of single tensors, streamed writing.

mod any;
mod cast;
mod coded;
mod copy;
mod file;
mod float;
mod formed;
mod header;
mod map;
mod recipe;
mod rows;
mod torch;
mod write;

pub use any::FileFormat;
pub use file::SafetensorsFile;
pub use header::{Header, TensorEntry};
pub use safetensors::Dtype;

pub(crate) use any::{TensorBytes, TensorFile};
pub(crate) use cast::{CastLoss, cast};
pub(crate) use coded::CodedFile;
pub(crate) use copy::{Block, Pattern};
#[cfg(test)]
pub(crate) use copy::{bands, fill};
pub(crate) use float::{is_weight_dtype, numbers, plain_dtype, plain_format};
pub(crate) use formed::{present, presented};
pub(crate) use map::{Mapping, SharedPart, WholeFile};
pub(crate) use recipe::{BAND, OpenRecipe, Recipe, TensorRef};
pub(crate) use rows::row_runs;
pub(crate) use torch::TorchFile;
pub(crate) use write::{TensorDeclaration, TensorFileWriter, exported_header, header_text, hex};
