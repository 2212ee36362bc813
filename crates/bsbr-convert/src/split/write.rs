//! Writing a compressed model: a converted model some of whose weights are factors.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use bsbr_model::{ModelConfig, WeightSpec, weight_specs};
use bsbr_splitlinear::SavedSplit;
use safetensors::Dtype;

use super::numbers::{factor_formats, write_numbers};
use crate::ConvertError;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, ConvertOptions, Progress, SOURCE_CONFIG, SOURCE_INDEX, convert};
use crate::converted::ConvertedModel;
use crate::files::WEIGHTS;
use crate::output::{Replaceable, Staging};
use crate::policy::WeightsPolicy;
use crate::record::IGNORED_PREFIX;
use crate::tensors::{Recipe, TensorDeclaration, TensorFileWriter, header_text};

/// What writing a compressed model did.
#[derive(Debug, Clone)]
pub struct SplitReport {
    /// The model.
    pub config: ModelConfig,
    /// Bytes of the weight file.
    pub bytes: u64,
}

/// Where the numbers of a tensor come from.
enum Origin<'a> {
    /// A weight of the base, or those of its outputs that no part takes.
    Kept(Recipe<'a>),
    Factor,
}

/// Writes the model in `base`, a checkpoint or a converted model, to `output` with the parts of `split` as factors. `factor`
/// gives the tensors of [`SavedSplit::tensors`] by name. Everything else is as a conversion leaves it, and the directory
/// appears whole or not at all.
///
/// `options` are those of the conversion of a checkpoint; of a converted model only `force` and `weights` count, the latter for
/// its factors. Unless it says otherwise, factors have the number format of the weights they are made of. `files`, names
/// and contents, are put beside the model.
///
/// # Errors
///
/// As [`crate::convert()`]; [`ConvertError::Model`] when the parts do not fit the model; [`ConvertError::Compressed`] when
/// it is compressed already; [`ConvertError::Factor`] for factors that are missing, of another size or no numbers.
pub fn write_split(
    base: &Path,
    output: &Path,
    split: &SavedSplit,
    factor: &mut dyn FnMut(&str) -> Option<Vec<f32>>,
    (options, files): (&ConvertOptions, &[(&str, &[u8])]),
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<SplitReport, ConvertError> {
    let staging = Staging::begin(output, options.force, Replaceable::model())?;
    let whole = staging.path().join("base");
    let is_converted = base.join(RECORD).is_file();
    let dir = if is_converted {
        base
    } else {
        convert(base, &whole, options, progress)?;
        &whole
    };
    let model = ConvertedModel::open(dir)?;
    if model.config().split.is_some() {
        return Err(ConvertError::Compressed { dir: base.to_owned(), what: "compress it from the original model" });
    }
    let config = ModelConfig { split: Some(split.clone()), ..model.config().clone() };
    config.validate()?;
    let bytes =
        write_weights(&model, &config, (split, options.weights), factor, &staging.path().join(WEIGHTS), progress)?;
    staging.write("config.json", &crate::convert::pretty(&config, output)?)?;
    staging.copy_present(dir, &[RECORD, SOURCE_CONFIG, SOURCE_INDEX])?;
    staging.copy_present(dir, &COMPANIONS)?;
    staging.write("README.md", card(&model, split).as_bytes())?;
    for (name, content) in files {
        staging.write(name, content)?;
    }
    drop(model);
    if whole.exists() {
        std::fs::remove_dir_all(&whole).map_err(ConvertError::io("delete", &whole))?;
    }
    staging.publish()?;
    Ok(SplitReport { config, bytes })
}

fn write_weights(
    model: &ConvertedModel,
    config: &ModelConfig,
    (split, policy): (&SavedSplit, WeightsPolicy),
    factor: &mut dyn FnMut(&str) -> Option<Vec<f32>>,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<u64, ConvertError> {
    let mut tensors = Vec::new();
    let formats = factor_formats(model, split, policy);
    for spec in weight_specs(config) {
        tensors.push(tensor(model, split, &formats, spec)?);
    }
    for entry in &model.file().header().tensors {
        if let Some(recipe) = model.recipe(&entry.name).filter(|_| entry.name.starts_with(IGNORED_PREFIX)) {
            tensors.push((recipe.declared(entry.name.clone()), Origin::Kept(recipe)));
        }
    }
    // As a conversion does: every tensor starts at a multiple of the size of its numbers.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut writer = TensorFileWriter::create(path, &header_text(&declarations), false)?;
    let mut done = 0;
    for (tensor, origin) in &tensors {
        match origin {
            Origin::Kept(recipe) => recipe.for_each_stored_band(&mut |bytes| writer.write(bytes))?,
            Origin::Factor => {
                let bad = |problem| ConvertError::Factor { tensor: tensor.name.clone(), problem };
                let numbers = factor(&tensor.name).ok_or_else(|| bad("is missing".to_owned()))?;
                let wanted = tensor.shape.iter().product::<usize>();
                if numbers.len() != wanted {
                    return Err(bad(format!("has {} numbers, expected {wanted}", numbers.len())));
                }
                if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
                    return Err(bad(format!("holds {} at element {at}", numbers[at])));
                }
                write_numbers(&mut writer, (&tensor.name, tensor.dtype), &numbers)?;
            }
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    Ok(writer.finish()?.0)
}

fn tensor<'a>(
    model: &'a ConvertedModel,
    split: &SavedSplit,
    formats: &HashMap<String, Dtype>,
    WeightSpec { name, shape, .. }: WeightSpec,
) -> Result<(TensorDeclaration, Origin<'a>), ConvertError> {
    let Some(recipe) = model.recipe(&name) else {
        let dtype = formats.get(&name).copied().unwrap_or(Dtype::F32);
        return Ok((TensorDeclaration::plain(name, dtype, shape), Origin::Factor));
    };
    if recipe.shape == shape {
        return Ok((recipe.declared(name), Origin::Kept(recipe)));
    }
    let linear = name.strip_suffix(".weight").unwrap_or(&name);
    let (mut rows, mut end) = (Vec::new(), 0);
    for part in split.parts_of(linear) {
        if part.columns.start > end {
            rows.push((end, part.columns.start - end));
        }
        end = part.columns.end;
    }
    let outputs = recipe.shape.first().copied().unwrap_or(0);
    if end < outputs {
        rows.push((end, outputs - end));
    }
    let rest = recipe.select(&rows);
    Ok((rest.declared(name), Origin::Kept(rest)))
}

/// The text of `README.md`.
fn card(model: &ConvertedModel, split: &SavedSplit) -> String {
    let record = model.record();
    let taken: usize = split.groups.iter().map(|group| group.members.len() * group.inputs * group.outputs).sum();
    let given: usize = split.groups.iter().map(bsbr_splitlinear::SavedGroup::parameters).sum();
    let mut text = format!(
        "# {}, linear layers compressed\n\nThe weights of `{}` in the layout of BSBR. Linear layers are factors that share \
         bases across layers; `fold` makes a checkpoint of ordinary weights of it.\n\n",
        record.source, record.source
    );
    let _ = writeln!(text, "- compressed weights: {taken} numbers, now {given}");
    let _ = writeln!(text, "- asked for: {} of the parameters", split.keep);
    let _ = writeln!(text, "- groups with one basis: {}", split.groups.len());
    let _ = writeln!(text, "- SHA-256 of the compressed model: `{}`", split.base);
    if !split.calibration.is_empty() {
        let _ = writeln!(text, "- calibration: `{}`", split.calibration);
    }
    text
}
