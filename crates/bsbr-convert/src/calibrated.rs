//! Writing a converted model again with other numbers in the weights BSBR added.

use std::cmp::Reverse;
use std::path::Path;

use bsbr_model::{FarLayer, MetaLayer, ModelConfig, StateLayer, parameter_counts, weight_specs};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::ConvertError;
use crate::card::with_calibration;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX, pretty};
use crate::converted::ConvertedModel;
use crate::files::WEIGHTS;
use crate::output::{Staging, check_output};
use crate::record::{ConversionRecord, IGNORED_PREFIX};
use crate::tensors::{Recipe, TensorDeclaration, TensorFileWriter, header_text};

/// What the weights BSBR added were calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedCalibration {
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Tokens of it that were read.
    pub tokens: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Windows that chose between candidates and were not fitted to.
    pub held_out: usize,
    /// What was found for the meta projections of each layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub meta: Vec<MetaLayer>,
    /// What was found for the states of each layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<StateLayer>,
    /// What was found for the far part of each layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub far: Vec<FarLayer>,
}

/// A converted model with new numbers.
#[derive(Debug)]
pub struct Calibrated<'a> {
    /// Its configuration, if that changes too.
    pub config: Option<&'a ModelConfig>,
    /// Names and numbers of added weights, in the layout of [`bsbr_model::WeightSpec::shape`].
    pub weights: &'a [(String, Vec<f32>)],
    /// What they come from.
    pub calibration: RecordedCalibration,
}

/// Where the numbers of a tensor come from.
enum Origin<'a> {
    Kept(Recipe<'a>),
    New(&'a [f32]),
}

/// Writes the converted model in `model` to `output`, which may be `model` itself, with `calibrated` in place of what it
/// had; every other tensor and file stays as it is, so that an export gives back the same. Added weights are stored in F32.
///
/// The output appears whole or not at all, and depends on nothing but the arguments.
///
/// # Errors
///
/// [`ConvertError::NotConverted`] and what else [`crate::ModelSource::open`] refuses; [`ConvertError::NoSuchWeight`] for new
/// numbers of a weight the model does not have in that shape, or that is no added one, and for an added weight
/// that the configuration asks for and nothing gives; errors of the output as in [`crate::convert()`].
pub fn write_calibrated(
    model: &Path,
    output: &Path,
    calibrated: &Calibrated<'_>,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConversionRecord, ConvertError> {
    let source = ConvertedModel::open(model)?;
    let config = calibrated.config.unwrap_or(source.config());
    config.validate()?;
    let tensors = outputs(&source, config, calibrated.weights)?;
    let same = |a: &Path, b: &Path| match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    let force = force || same(model, output);
    check_output(output, force, |names| names.iter().any(|name| name == RECORD))?;

    let staging = Staging::new(output)?;
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut writer = TensorFileWriter::create(&staging.path().join(WEIGHTS), &header_text(&declarations), false)?;
    let mut done = 0;
    for (tensor, origin) in &tensors {
        match origin {
            Origin::Kept(recipe) => recipe.for_each_band(|bytes| writer.write(bytes))?,
            Origin::New(numbers) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.write(&bytes)?;
            }
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    writer.finish()?;

    let (before, added) = parameter_counts(config);
    let record = ConversionRecord {
        settings: config.attention.clone(),
        parameters_before: before,
        parameters_after: before + added,
        calibration: Some(calibrated.calibration.clone()),
        ..source.record().clone()
    };
    staging.write("config.json", &pretty(config, output)?)?;
    staging.write(RECORD, &pretty(&record, output)?)?;
    staging.copy_present(model, &[SOURCE_CONFIG, SOURCE_INDEX])?;
    staging.copy_present(model, &COMPANIONS)?;
    // The card may have been edited, and what was measured stands nowhere else.
    let card = std::fs::read_to_string(model.join("README.md")).unwrap_or_default();
    staging.write("README.md", with_calibration(&card, &record).as_bytes())?;
    drop(tensors);
    drop(source);
    staging.publish()?;
    Ok(record)
}

/// The tensors of the output in the order in which they are written.
fn outputs<'a>(
    source: &'a ConvertedModel,
    config: &ModelConfig,
    weights: &'a [(String, Vec<f32>)],
) -> Result<Vec<(TensorDeclaration, Origin<'a>)>, ConvertError> {
    let missing = |tensor: &str, shape: &[usize]| ConvertError::NoSuchWeight {
        dir: source.dir().to_owned(),
        tensor: tensor.to_owned(),
        shape: shape.to_vec(),
    };
    let specs = weight_specs(config);
    let known = |name: &str, count: usize| {
        specs.iter().any(|spec| spec.name == name && spec.extra && spec.shape.iter().product::<usize>() == count)
    };
    if let Some((name, numbers)) = weights.iter().find(|(name, numbers)| !known(name, numbers.len())) {
        return Err(missing(name, &[numbers.len()]));
    }
    let mut tensors = Vec::with_capacity(specs.len());
    for spec in specs {
        let new = weights.iter().find(|(name, _)| *name == spec.name);
        let origin = match new {
            Some((_, numbers)) => Origin::New(numbers),
            None => Origin::Kept(source.recipe(&spec.name).ok_or_else(|| missing(&spec.name, &spec.shape))?),
        };
        let dtype = match &origin {
            Origin::Kept(recipe) => recipe.dtype,
            Origin::New(_) => Dtype::F32,
        };
        tensors.push((TensorDeclaration { name: spec.name, dtype, shape: spec.shape }, origin));
    }
    for entry in source.file().header().tensors.iter().filter(|entry| entry.name.starts_with(IGNORED_PREFIX)) {
        if let Some(recipe) = source.recipe(&entry.name) {
            let (name, dtype, shape) = (entry.name.clone(), entry.dtype, entry.shape.clone());
            tensors.push((TensorDeclaration { name, dtype, shape }, Origin::Kept(recipe)));
        }
    }
    // As a conversion orders them.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    Ok(tensors)
}
