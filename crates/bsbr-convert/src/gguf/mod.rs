//! GGUF files, version 2 and 3, little-endian: read as the Hugging Face checkpoint they were made of.
//!
//! Names, shapes and the order of the numbers become those of the checkpoint, the metadata its configuration, so that
//! the same rules apply to both. Quantised numbers are decoded band by band as they are read.

mod config;
mod file;
mod header;
mod kept;
mod kind;
mod metadata;
mod names;
mod problem;
mod stored;
mod tokenizer;

pub use kind::GgufKind;
pub use problem::GgufProblem;

pub use file::is_gguf;
pub(crate) use file::{GgufExtras, GgufFile, GgufModel, gguf_file};
pub(crate) use kept::{Held, SOURCE_GGUF, held, open_rest, write_rest};
pub(crate) use stored::{Order, Stored, StoredBytes};

#[cfg(test)]
mod tests;
