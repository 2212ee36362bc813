//! Logits that another implementation computed, to compare with.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::ConvertError;

/// Token ids and their expected logits.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpectedLogits {
    /// Token ids of each text.
    pub tokens: Vec<Vec<u32>>,
    /// Logits of each text, `[tokens, vocab_size]` row by row.
    pub logits: Vec<Vec<f32>>,
}

impl ExpectedLogits {
    /// Reads `input_ids` `[batch, tokens]` (I32 or I64) and `logits` `[batch, tokens, vocab_size]` (F32) from a
    /// safetensors file.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`] and [`ConvertError::Expected`], naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let wrong = |problem: String| ConvertError::Expected { path: PathBuf::from(path), problem };
        let bytes = std::fs::read(path).map_err(ConvertError::io("read", path))?;
        let file =
            SafeTensors::deserialize(&bytes).map_err(|error| wrong(format!("is no safetensors file: {error}")))?;
        let tensor = |name: &str| file.tensor(name).map_err(|_| wrong(format!("has no tensor `{name}`")));
        let ids = tensor("input_ids")?;
        let logits = tensor("logits")?;
        let &[batch, length] = ids.shape() else {
            return Err(wrong(format!("`input_ids` has shape {:?}, expected [batch, tokens]", ids.shape())));
        };
        let &[logits_batch, logits_length, vocab_size] = logits.shape() else {
            return Err(wrong(format!("`logits` has shape {:?}, expected [batch, tokens, vocab]", logits.shape())));
        };
        if (batch, length) != (logits_batch, logits_length) || batch * length * vocab_size == 0 {
            let (found, ids) = (logits.shape(), ids.shape());
            return Err(wrong(format!("`logits` has shape {found:?}, which does not go with input_ids {ids:?}")));
        }
        if logits.dtype() != Dtype::F32 {
            return Err(wrong(format!("`logits` is {:?}, expected F32", logits.dtype())));
        }
        let ids = token_ids(&ids).map_err(wrong)?;
        let (numbers, _) = logits.data().as_chunks::<4>();
        let numbers: Vec<f32> = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Self {
            tokens: ids.chunks(length).map(<[u32]>::to_vec).collect(),
            logits: numbers.chunks(length * vocab_size).map(<[f32]>::to_vec).collect(),
        })
    }
}

fn token_ids(tensor: &TensorView<'_>) -> Result<Vec<u32>, String> {
    let ids: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => tensor.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        Dtype::I32 => tensor.data().as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).collect(),
        other => return Err(format!("`input_ids` is {other:?}, expected I64 or I32")),
    };
    ids.into_iter().map(|id| u32::try_from(id).map_err(|_| format!("`input_ids` holds {id}, no token id"))).collect()
}
