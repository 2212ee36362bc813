//! Writing a converted model again with other numbers in the weights BSBR added.

use std::path::Path;

use bsbr_model::{FarLayer, IndexCalibration, MetaLayer, ModelConfig, StateLayer, parameter_counts};
use serde::{Deserialize, Serialize};

use crate::ConvertError;
use crate::card::with_calibration;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX, pretty};
use crate::converted::ConvertedModel;
use crate::gguf::SOURCE_GGUF;
use crate::output::{Replaceable, Staging};
use crate::record::ConversionRecord;
use crate::rewrite::{Replaced, outputs, same, write_tensors};

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
    /// What was found for the index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexCalibration>,
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
    let tensors = outputs(&source, config, calibrated.weights, Replaced::Added)?;
    let force = force || same(model, output);
    let staging = Staging::begin(output, force, Replaceable::model())?;
    write_tensors(&staging, &tensors, progress)?;

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
    staging.copy_present(model, &[SOURCE_CONFIG, SOURCE_INDEX, SOURCE_GGUF])?;
    staging.copy_present(model, &COMPANIONS)?;
    // The card may have been edited, and what was measured stands nowhere else.
    let card = std::fs::read_to_string(model.join("README.md")).unwrap_or_default();
    staging.write("README.md", with_calibration(&card, &record).as_bytes())?;
    drop(tensors);
    drop(source);
    staging.publish()?;
    Ok(record)
}
