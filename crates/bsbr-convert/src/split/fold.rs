//! Folding: a compressed model to a checkpoint of ordinary weights.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use bsbr_model::{LinearPlace, ModelConfig, weight_specs};
use bsbr_splitlinear::{SavedSplit, Share, StoredFactors};
use safetensors::Dtype;
use serde_json::Value;

use super::numbers::write_numbers;
use super::paths::recorded_plan;
use crate::ConvertError;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX};
use crate::converted::ConvertedModel;
use crate::export::{assembled, check_names, exported_index};
use crate::files::INDEX;
use crate::json::ConfigFile;
use crate::output::{Replaceable, Staging};
use crate::scaled;
use crate::tensors::{
    Recipe, SafetensorsFile, TensorDeclaration, TensorFile, TensorFileWriter, TensorRef, exported_header, header_text,
};

/// What folding did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoldReport {
    /// Files of weights with their bytes and SHA-256.
    pub files: Vec<(String, u64, String)>,
    /// Tensors that were made of factors.
    pub folded: usize,
}

/// Writes the compressed model in `compressed` to `output` as the checkpoint it was made of, its factors multiplied out:
/// names, files and layouts are those of the original. Tensors made of factors are F32, and so says `config.json`; all
/// others are the original ones, in the format they have in the compressed model.
///
/// # Errors
///
/// [`ConvertError::NotConverted`]; [`ConvertError::NotCompressed`]; errors of the record and of the output as in
/// [`crate::export()`]. After an error nothing is left behind.
pub fn fold(
    compressed: &Path,
    output: &Path,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<FoldReport, ConvertError> {
    let model = ConvertedModel::open(compressed)?;
    let Some(split) = &model.config().split else {
        return Err(ConvertError::NotCompressed { dir: compressed.to_owned() });
    };
    let (plan, headers) = recorded_plan(compressed)?;
    let record = model.record();
    check_names(record, &compressed.join(crate::checkpoint::RECORD))?;
    let entries: Vec<_> = headers.iter().flat_map(|header| &header.tensors).collect();
    let source = ConfigFile::open(&compressed.join(SOURCE_CONFIG))?;
    if let Some(scaled) = scaled::of_checkpoint(compressed, &source, &entries)?.into_iter().next() {
        let (dir, found) = (compressed.to_owned(), "factors, or numbers beside some that are".to_owned());
        let weight = plan.reading(&scaled.codes).map_or_else(String::new, |(step, _)| step.targets[0].name.clone());
        return Err(ConvertError::CodesGone { dir, tensor: scaled.codes, weight, found });
    }
    let weights = record.files.iter().map(|file| file.exported().0.to_owned()).collect();
    let staging = Staging::begin(output, force, Replaceable::checkpoint(weights, false))?;
    // Weights that are joined with one made of factors go with it.
    let mut dense = BTreeSet::new();
    let taken = split.taken();
    for step in &plan.steps {
        let folded = |name: &str| name.strip_suffix(".weight").is_some_and(|name| taken.contains_key(name));
        if step.targets.iter().any(|target| folded(&target.name)) {
            dense.extend(step.targets.iter().map(|target| target.name.clone()));
        }
    }
    let scratch = staging.path().join("dense");
    write_dense(&model, split, &dense, &scratch, progress)?;
    let folded = TensorFile::Safetensors(SafetensorsFile::open(&scratch)?);
    let whole = |name: &str| {
        let recipe = match folded.header().find(name) {
            Some(entry) => Some(Recipe::whole(TensorRef { file: &folded, entry })),
            None => model.recipe(name),
        };
        recipe.ok_or_else(|| ConvertError::NoSuchWeight {
            dir: compressed.to_owned(),
            tensor: name.to_owned(),
            shape: Vec::new(),
        })
    };
    let (mut files, mut count, mut total) = (Vec::new(), 0, 0);
    for (file, header) in record.files.iter().zip(&headers) {
        let mut tensors = Vec::new();
        for tensor in &header.tensors {
            let recipe = assembled(&whole, &plan, tensor)?;
            let of_factors = plan.reading(&tensor.name).is_some_and(|(step, _)| dense.contains(&step.targets[0].name));
            count += usize::from(of_factors);
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            tensors.push((TensorDeclaration::plain(name, recipe.dtype, shape), recipe));
        }
        let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
        total += declarations.iter().map(|tensor| tensor.bytes() as u64).sum::<u64>();
        let name = file.exported().0;
        let mut writer = TensorFileWriter::create(&staging.path().join(name), &exported_header(&declarations), true)?;
        for (tensor, recipe) in &tensors {
            recipe.for_each_band(|bytes| writer.write(bytes))?;
            progress(Progress { stage: "writing", item: &tensor.name, done: 0, total: 0 });
        }
        let (bytes, sha256) = writer.finish()?;
        files.push((name.to_owned(), bytes, sha256));
    }
    let mut config = ConfigFile::open(&compressed.join(SOURCE_CONFIG))?;
    for key in ["torch_dtype", "dtype"] {
        if config.get(key).is_some() {
            config = config.with(key, Value::from("float32"));
        }
    }
    staging.write("config.json", config.text().as_bytes())?;
    let index = compressed.join(SOURCE_INDEX);
    if index.is_file() {
        let text = std::fs::read(&index).map_err(ConvertError::io("read", &index))?;
        let text = exported_index(text, record, &index)?;
        staging.write(INDEX, &with_size(&text, total, &index)?)?;
    }
    staging.copy_present(compressed, &COMPANIONS)?;
    drop(folded);
    std::fs::remove_file(&scratch).map_err(ConvertError::io("delete", &scratch))?;
    staging.publish()?;
    Ok(FoldReport { files, folded: count })
}

/// The index with another number of bytes.
fn with_size(text: &[u8], total: u64, path: &Path) -> Result<Vec<u8>, ConvertError> {
    let mut index: Value = serde_json::from_slice(text).map_err(ConvertError::json(path))?;
    if let Some(size) = index.get_mut("metadata").and_then(|metadata| metadata.get_mut("total_size")) {
        *size = total.into();
    }
    let mut text = serde_json::to_vec_pretty(&index).map_err(ConvertError::json(path))?;
    text.push(b'\n');
    Ok(text)
}

/// Writes the weights `names` as F32 to `path`, factors multiplied out.
fn write_dense(
    model: &ConvertedModel,
    split: &SavedSplit,
    names: &BTreeSet<String>,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), ConvertError> {
    let config = ModelConfig { split: None, ..model.config().clone() };
    let specs: HashMap<String, Vec<usize>> =
        weight_specs(&config).into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let shape = |name: &String| specs.get(name).cloned().unwrap_or_default();
    let declare = |name: &String| TensorDeclaration::plain(name.clone(), Dtype::F32, shape(name));
    let declarations: Vec<_> = names.iter().map(declare).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut writer = TensorFileWriter::create(path, &header_text(&declarations), false)?;
    let mut done = 0;
    for tensor in &declarations {
        let numbers = dense_weight(model, split, &tensor.name)?;
        write_numbers(&mut writer, (&tensor.name, tensor.dtype), &numbers)?;
        done += tensor.bytes() as u64;
        progress(Progress { stage: "folding", item: &tensor.name, done, total });
    }
    writer.finish().map(drop)
}

/// A weight `[outputs, inputs]` of parts that are factors and of what remains of it.
fn dense_weight(model: &ConvertedModel, split: &SavedSplit, name: &str) -> Result<Vec<f32>, ConvertError> {
    let read = |name: &str| match model.recipe(name) {
        Some(recipe) => recipe.open()?.read(0..recipe.shape.iter().product()),
        None => Ok(Vec::new()),
    };
    let linear = name.strip_suffix(".weight").unwrap_or(name);
    let rest = read(name)?;
    let shape = linear.parse::<LinearPlace>().ok().and_then(|place| model.config().decoder.linear_shape(place));
    let [inputs, outputs] = shape.unwrap_or_default();
    let mut weight = Vec::with_capacity(inputs * outputs);
    let mut used = 0;
    for part in split.parts_of(linear) {
        let gap = part.columns.start * inputs - weight.len();
        weight.extend_from_slice(&rest[used..used + gap]);
        used += gap;
        let (basis, coefficient) = (read(&part.group.basis())?, read(&part.member.coefficient())?);
        let (left, right) = if part.group.share == Share::Output { (coefficient, basis) } else { (basis, coefficient) };
        let rank = part.group.rank;
        let right = &right[part.from.start * rank..part.from.end * rank];
        let pivots = part.group.pivots().map(|name| read(&name)).transpose()?;
        let factors = StoredFactors { right, left: &left, pivots: pivots.as_deref() };
        let (name, sizes) = (part.group.pivots(), [part.from.len(), rank, inputs]);
        let dense = factors.dense(name.as_ref().unwrap_or(&part.member.part), sizes);
        weight.extend(dense.map_err(bsbr_model::ModelError::from)?);
    }
    weight.extend_from_slice(&rest[used..]);
    Ok(weight)
}
