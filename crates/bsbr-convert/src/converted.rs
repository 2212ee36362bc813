//! A converted model directory, opened and checked.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use bsbr_attn::{REPLACED_SELECTOR, REPLACED_SETTINGS};
use bsbr_model::{ModelConfig, weight_specs};
use safetensors::Dtype;

use crate::ConvertError;
use crate::checkpoint::RECORD;
use crate::files::WEIGHTS;
use crate::output::refuse_unfinished;
use crate::placeholder::check_file;
use crate::policy::takes_codes;
use crate::problem::PlanProblem;
use crate::record::{ConversionRecord, IGNORED_PREFIX};
use crate::tensors::{CodedFile, Recipe, TensorFile, TensorRef, is_weight_dtype};

/// Missing tensors for which the nearest name is looked for.
const MOST_HINTS: usize = 256;

/// An open converted model: exactly the tensors that its `config.json` and `conversion.json` ask for.
#[derive(Debug)]
pub(crate) struct ConvertedModel {
    dir: PathBuf,
    config: ModelConfig,
    record: ConversionRecord,
    file: TensorFile,
    /// Where in the header each tensor is: a mixture of experts has tens of thousands.
    places: HashMap<String, usize>,
}

impl ConvertedModel {
    pub(crate) fn open(dir: &Path) -> Result<Self, ConvertError> {
        refuse_unfinished(dir)?;
        let record_path = dir.join(RECORD);
        if !record_path.is_file() {
            return Err(ConvertError::NotConverted { dir: dir.to_owned() });
        }
        let record: ConversionRecord = read_json(&record_path, "settings")?;
        if record.format_version != ConversionRecord::FORMAT_VERSION {
            return Err(ConvertError::Version {
                path: record_path,
                made: format!("format {}", record.format_version),
                have: format!("format {}", ConversionRecord::FORMAT_VERSION),
            });
        }
        let config: ModelConfig = read_json(&dir.join("config.json"), "attention")?;
        config.validate()?;
        let file = TensorFile::Coded(CodedFile::open(&dir.join(WEIGHTS))?);
        let problems = misfits(&config, &record, &file);
        if !problems.is_empty() {
            let rules = "its config.json and conversion.json".to_owned();
            return Err(ConvertError::Plan { dir: dir.to_owned(), rules, sizes: String::new(), problems });
        }
        let names = file.header().tensors.iter().map(|tensor| tensor.name.clone());
        let places = names.enumerate().map(|(at, name)| (name, at)).collect();
        Ok(Self { dir: dir.to_owned(), config, record, file, places })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn record(&self) -> &ConversionRecord {
        &self.record
    }

    pub(crate) fn file(&self) -> &TensorFile {
        &self.file
    }

    /// Where in the header the tensor `name` is.
    pub(crate) fn place(&self, name: &str) -> Option<usize> {
        self.places.get(name).copied()
    }

    /// The tensor `name` as it is.
    pub(crate) fn recipe(&self, name: &str) -> Option<Recipe<'_>> {
        let entry = &self.file.header().tensors[*self.places.get(name)?];
        Some(Recipe::whole(TensorRef { file: &self.file, entry }))
    }
}

/// Reads one of the files; `settings` is the key of the attention settings in it.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path, settings: &str) -> Result<T, ConvertError> {
    check_file(path)?;
    let bytes = std::fs::read(path).map_err(ConvertError::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let file: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        match old_setting(&file[settings]) {
            Some((found, instead)) => {
                let source_name = file["source"].as_str().map(str::to_owned);
                ConvertError::OldSettings { path: path.to_owned(), found, instead, source_name }
            }
            None => ConvertError::json(path)(error),
        }
    })
}

/// A setting of an earlier version among those of attention, and what replaced it.
fn old_setting(attention: &serde_json::Value) -> Option<(String, &'static str)> {
    let gone = REPLACED_SETTINGS.iter().find(|(name, _)| attention.get(name).is_some());
    let (selector, instead) = REPLACED_SELECTOR;
    let selected = attention.get("selector").and_then(serde_json::Value::as_str) == Some(selector);
    let selector = selected.then(|| (format!("selector = {selector}"), instead));
    gone.map(|(name, instead)| ((*name).to_owned(), *instead)).or(selector)
}

/// The number format that a tensor may have.
enum Wanted {
    /// Any of weights.
    Weight,
    /// Any but codes.
    Numbers,
    /// This one.
    Dtype(String),
}

/// The differences between the tensors asked for and the tensors in the file.
fn misfits(config: &ModelConfig, record: &ConversionRecord, file: &TensorFile) -> Vec<PlanProblem> {
    let weights = weight_specs(config).into_iter().map(|spec| {
        let wanted = if spec.whole {
            Wanted::Dtype(Dtype::I32.to_string())
        } else if takes_codes(&spec) {
            Wanted::Weight
        } else {
            Wanted::Numbers
        };
        (spec.name, (spec.shape, wanted))
    });
    let ignored = record.tensors.iter().flat_map(|tensor| {
        let kept = tensor.becomes.iter().filter(|name| name.starts_with(IGNORED_PREFIX));
        kept.map(|name| (name.clone(), (tensor.shape.clone(), Wanted::Dtype(tensor.dtype.clone()))))
    });
    let wanted: BTreeMap<String, (Vec<usize>, Wanted)> = weights.chain(ignored).collect();
    let names: HashSet<&str> = file.header().tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let unused = || names.iter().copied().filter(|name| !wanted.contains_key(*name));
    let mut problems = Vec::new();
    for (at, name) in wanted.keys().filter(|name| !names.contains(name.as_str())).enumerate() {
        // Looking for a name among all others takes time, and of very many misfits nobody reads the last.
        let nearest = (at < MOST_HINTS).then(|| crate::hints::nearest(name, unused())).flatten();
        let tensor = name.clone();
        problems.push(PlanProblem::MissingSource { tensor, targets: Vec::new(), nearest, hint: None });
    }
    for entry in &file.header().tensors {
        let tensor = entry.name.clone();
        let Some((shape, format)) = wanted.get(&tensor) else {
            problems.push(PlanProblem::UnusedSource { tensor, shape: entry.shape.clone(), hint: None });
            continue;
        };
        let kind = file.kind(entry);
        let found = kind.map_or_else(|| entry.dtype.to_string(), |kind| kind.name.to_owned());
        let (fits, expected) = match format {
            Wanted::Weight => (is_weight_dtype(entry.dtype), "F32, F16, BF16 or codes".to_owned()),
            Wanted::Numbers => (kind.is_none() && is_weight_dtype(entry.dtype), "F32, F16 or BF16".to_owned()),
            Wanted::Dtype(dtype) => (*dtype == found, dtype.clone()),
        };
        if !fits {
            problems.push(PlanProblem::Dtype { tensor: tensor.clone(), found, expected });
        }
        if *shape != entry.shape {
            let (expected, found) = (shape.clone(), entry.shape.clone());
            let targets = vec![tensor.clone()];
            problems.push(PlanProblem::Shape { tensor, targets, expected, found, hint: None });
        }
    }
    problems
}
