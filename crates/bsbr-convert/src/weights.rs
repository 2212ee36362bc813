//! The weights of a converted model: what each is made of, and writing them band by band.

use std::cmp::Reverse;
use std::path::Path;

use bsbr_model::{ModelConfig, weight_specs};
use safetensors::Dtype;

use crate::ConvertError;
use crate::convert::Progress;
use crate::derive;
use crate::dtype::{DtypePolicy, RecordedCast};
use crate::planning::PlannedCheckpoint;
use crate::record::IGNORED_PREFIX;
use crate::tensors::{Recipe, TensorDeclaration, TensorFileWriter, header_text};

/// Where the numbers of a tensor of the output come from.
pub(crate) enum Origin<'a> {
    /// Moved, and cast if its declaration has another format.
    Moved(Recipe<'a>),
    /// The mean of two weights, in F32.
    Mean([Recipe<'a>; 2]),
    /// No weight, only waiting for an export.
    KeptAside(Recipe<'a>),
}

/// Writes the weights to `path`; returns the bytes of the file and what was cast.
pub(crate) fn write_weights(
    planned: &PlannedCheckpoint,
    config: &ModelConfig,
    dtype: DtypePolicy,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(u64, Vec<RecordedCast>), ConvertError> {
    let tensors = outputs(planned, config, dtype)?;
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut done = 0;
    let mut casts = Vec::new();
    let mut writer = TensorFileWriter::create(path, &header_text(&declarations), false)?;
    for (tensor, origin) in &tensors {
        match origin {
            Origin::Moved(recipe) => {
                let loss = recipe.for_each_cast_band(tensor.dtype, |bytes| writer.write(bytes))?;
                if recipe.dtype != tensor.dtype {
                    casts.push(RecordedCast::new(&tensor.name, [recipe.dtype, tensor.dtype], loss));
                }
            }
            Origin::KeptAside(recipe) => recipe.for_each_band(|bytes| writer.write(bytes))?,
            Origin::Mean(recipes) => derive::for_each_head(recipes, &config.decoder, |rows| {
                let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.write(&bytes)
            })?,
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    Ok((writer.finish()?.0, casts))
}

/// The tensors of the output in the order in which they are written.
pub(crate) fn outputs<'a>(
    planned: &'a PlannedCheckpoint,
    config: &ModelConfig,
    policy: DtypePolicy,
) -> Result<Vec<(TensorDeclaration, Origin<'a>)>, ConvertError> {
    let fail = |name: &str| ConvertError::Rules {
        rules: planned.plan.architecture.id,
        problem: format!("nothing gives `{name}`"),
    };
    let recipe = |name: &str| planned.recipe(name)?.ok_or_else(|| fail(name));
    let mut tensors = Vec::new();
    for spec in weight_specs(config) {
        let (dtype, origin) = match derive::sources(&spec.name) {
            Some([a, b]) => (Dtype::F32, Origin::Mean([recipe(&a)?, recipe(&b)?])),
            None => {
                let recipe = recipe(&spec.name)?;
                (policy.apply(recipe.dtype), Origin::Moved(recipe))
            }
        };
        tensors.push((TensorDeclaration { name: spec.name, dtype, shape: spec.shape }, origin));
    }
    for ignored in &planned.plan.ignored {
        let tensor = &ignored.tensor;
        let source = planned.checkpoint.find(&tensor.name).ok_or_else(|| fail(&tensor.name))?;
        let (name, shape) = (format!("{IGNORED_PREFIX}{}", tensor.name), tensor.shape.clone());
        let declaration = TensorDeclaration { name, dtype: tensor.dtype, shape };
        tensors.push((declaration, Origin::KeptAside(Recipe::whole(source))));
    }
    // Wider formats first, as other writers do: every tensor then starts at a multiple of the size of its numbers.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    Ok(tensors)
}
