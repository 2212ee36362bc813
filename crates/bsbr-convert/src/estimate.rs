//! What a conversion would write and need, from headers alone.

use std::collections::BTreeMap;

use bsbr_model::parameter_counts;

use crate::ConvertError;
use crate::convert::{ConvertOptions, converted_config};
use crate::planning::PlannedCheckpoint;
use crate::tensors::{BAND, Recipe, TensorFile, header_text};
use crate::weights::{FormatTotal, Origin, format_totals, outputs};

/// The sizes of a conversion that was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// The tensors of the converted model, in the order of their bytes.
    pub tensors: Vec<EstimatedTensor>,
    /// Bytes of the weight files read.
    pub source_bytes: u64,
    /// Bytes of the weight file that would be written.
    pub output_bytes: u64,
    /// Numbers in the weights of the original model.
    pub parameters_before: usize,
    /// Numbers in the weights BSBR adds.
    pub parameters_added: usize,
    /// What there would be of each number format, tensors kept aside left out.
    pub formats: BTreeMap<String, FormatTotal>,
    /// Most bytes of weights in memory at a time: the largest tensor with all it is made of, and the bands it is
    /// written in.
    pub peak_bytes: u64,
}

/// A tensor of a converted model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EstimatedTensor {
    /// Name.
    pub name: String,
    /// Number format in the source; the one it is computed in for a weight BSBR adds.
    pub source_format: String,
    /// Number format in the converted model.
    pub format: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes in the converted model.
    pub bytes: u64,
}

/// What [`crate::convert()`] with `options` would write, to the byte.
///
/// # Errors
///
/// [`ConvertError::Model`] for impossible settings.
pub fn estimate(planned: &PlannedCheckpoint, options: &ConvertOptions) -> Result<Estimate, ConvertError> {
    let config = converted_config(planned, options)?;
    let outputs = outputs(planned, &config, options.weights)?;
    let declarations: Vec<_> = outputs.iter().map(|(tensor, _)| tensor.clone()).collect();
    let data: u64 = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut tensors = Vec::new();
    let mut peak_bytes = 0;
    for (tensor, origin) in outputs {
        let (source_format, sources) = match &origin {
            Origin::Moved(recipe) | Origin::KeptAside(recipe) => {
                (recipe.declared(String::new()).format(), source_bytes(recipe))
            }
            Origin::Mean([a, b]) => (tensor.format(), source_bytes(a) + source_bytes(b)),
        };
        let bytes = tensor.bytes() as u64;
        // A band of numbers that become codes is there as it was read, in f32, as codes and decoded.
        let bands = if tensor.codes.is_some() { 4 } else { 2 };
        peak_bytes = peak_bytes.max(sources + bands * bytes.min(BAND as u64));
        let (format, shape) = (tensor.format(), tensor.numbers());
        tensors.push(EstimatedTensor { name: tensor.name, source_format, format, shape, bytes });
    }
    let (parameters_before, parameters_added) = parameter_counts(&config);
    Ok(Estimate {
        tensors,
        source_bytes: planned.checkpoint.files().iter().map(TensorFile::len).sum(),
        output_bytes: 8 + header_text(&declarations).len() as u64 + data,
        parameters_before,
        parameters_added,
        peak_bytes,
        formats: format_totals(declarations.iter()),
    })
}

fn source_bytes(recipe: &Recipe<'_>) -> u64 {
    recipe.sources.iter().map(|source| source.entry.bytes.len() as u64).sum()
}
