//! Converting: a Hugging Face checkpoint to a converted model directory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use bsbr_attn::BlockAttentionConfig;
use bsbr_model::{ModelConfig, PositionPolicy, parameter_counts};
use bsbr_weights::Format;

use crate::ConvertError;
use crate::card::model_card;
use crate::casts::{CastSummary, RecordedCast};
use crate::checkpoint::RECORD;
use crate::files::WEIGHTS;
use crate::gguf::{self, SOURCE_GGUF};
use crate::hashing::record_files_beside;
use crate::output::{Replaceable, Staging};
use crate::placeholder::check_file;
use crate::planning::{PlannedCheckpoint, plan_checkpoint};
use crate::policy::WeightsPolicy;
use crate::record::{ConversionRecord, HubOrigin, IGNORED_PREFIX, RecordedFile, RecordedTensor};
use crate::tensors::{TensorFile, plain_format};
use crate::weights::{FormatTotal, Written, outputs, write_weights};

/// Files that belong to the tokenizer or to generation and are copied as they are.
pub(crate) const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Name under which the original `config.json` is kept.
pub(crate) const SOURCE_CONFIG: &str = "source_config.json";
/// Name under which the original index is kept.
pub(crate) const SOURCE_INDEX: &str = "source_index.json";

/// How to convert.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    /// Name of the source in the record and the model card; the name of the input directory when absent.
    pub source_name: Option<String>,
    /// Where on a hub the input comes from; for the record and the model card.
    pub hub: Option<HubOrigin>,
    /// BSBR settings; the original attention when absent.
    pub attention: Option<BlockAttentionConfig>,
    /// Layers that keep the original attention.
    pub original_layers: Vec<usize>,
    /// What happens past the last learned position.
    pub position_policy: PositionPolicy,
    /// The number format of the weights.
    pub weights: WeightsPolicy,
    /// By the name of a weight that becomes codes of 4 bits, how much an error of each input counts: mean squares of what the weight is
    /// multiplied with, of any unit. Errors of the others count the same for every input.
    pub importance: HashMap<String, Vec<f32>>,
    /// Replace an earlier conversion in the output directory.
    pub force: bool,
    /// Measures and values for the model card.
    pub measured: Option<Vec<(String, String)>>,
}

/// How far an operation is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// What is being done: `hashing`, `writing`.
    pub stage: &'static str,
    /// The file or tensor just finished.
    pub item: &'a str,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes of this stage.
    pub total: u64,
}

/// What a conversion did.
#[derive(Debug, Clone)]
pub struct ConversionReport {
    /// The converted model.
    pub config: ModelConfig,
    /// The content of `conversion.json`.
    pub record: ConversionRecord,
    /// The mapping table.
    pub mapping: String,
    /// What is worth telling.
    pub notes: Vec<String>,
    /// Bytes of the weight files read.
    pub source_bytes: u64,
    /// Bytes of the weight file written.
    pub output_bytes: u64,
    /// What there is of each number format, tensors kept aside left out.
    pub formats: BTreeMap<String, FormatTotal>,
}

/// Converts the Hugging Face checkpoint in `input`, or the GGUF file `input`, to a converted model in `output`.
///
/// One band of one tensor is in memory at a time, from a PyTorch file one whole tensor (twice while it is read with
/// strides that are not row by row; two for the mean that a meta projection starts as). The output appears whole or not
/// at all, and depends on nothing but the input and the options: converting twice gives the same bytes. Other
/// threads hash the source meanwhile.
///
/// Weights keep their number format, codes of a GGUF file as well, unless [`ConvertOptions::weights`] says otherwise. The record then holds what each cast
/// changed; where that is anything at all, [`crate::export()`] refuses the model.
///
/// # Errors
///
/// As [`plan_checkpoint`]; [`ConvertError::Model`] for impossible settings; [`ConvertError::OutputExists`],
/// [`ConvertError::OutputForeign`] and [`ConvertError::OutputBusy`] before anything is written, and where the output changed,
/// when it is published; [`ConvertError::NotFinite`] and
/// [`ConvertError::CastOverflow`] naming the tensor; [`ConvertError::Io`] naming the file. After an error nothing is left behind.
pub fn convert(
    input: &Path,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConversionReport, ConvertError> {
    let planned = plan_checkpoint(input)?;
    for name in COMPANIONS {
        check_file(&input.join(name))?;
    }
    let config = converted_config(&planned, options)?;
    let staging = Staging::begin(output, options.force, Replaceable::model())?;
    let path = staging.path().join(WEIGHTS);
    let (written, files) = record_files_beside(planned.checkpoint.files(), progress, |progress| {
        write_weights(&planned, &config, options, &path, progress)
    })?;
    let Written { bytes: output_bytes, casts, formats, aside } = written;
    let record = record(&planned, &config, input, options, files, (casts, &aside));
    if options.weights == WeightsPolicy::Keep {
        keep_gguf(&planned, &config, &staging)?;
    }
    staging.write("config.json", &pretty(&config, output)?)?;
    staging.write(RECORD, &pretty(&record, output)?)?;
    match planned.checkpoint.gguf() {
        None => {
            keep(input, "config.json", &staging, SOURCE_CONFIG)?;
            staging.copy_present(input, &COMPANIONS)?;
        }
        Some(extras) => {
            staging.write(SOURCE_CONFIG, planned.checkpoint.config().text().as_bytes())?;
            for (name, content) in &extras.companions {
                staging.write(name, content)?;
            }
            let made = |name: &str| extras.companions.iter().any(|(companion, _)| *companion == name);
            let others: Vec<&str> = COMPANIONS.into_iter().filter(|name| !made(name)).collect();
            // Beside a file that was named stands anything.
            if input.is_dir() {
                staging.copy_present(input, &others)?;
            }
        }
    }
    if let Some(index) = planned.checkpoint.index() {
        keep(input, index, &staging, SOURCE_INDEX)?;
    }
    let mut notes = planned.notes();
    if !record.casts.is_empty() {
        notes.push(CastSummary(&record.casts).to_string());
    }
    let measured = options.measured.as_deref().unwrap_or_default();
    staging.write("README.md", model_card(&record, &notes, measured).as_bytes())?;
    staging.publish()?;
    let source_bytes = planned.checkpoint.files().iter().map(TensorFile::len).sum();
    Ok(ConversionReport {
        config,
        record,
        mapping: planned.plan.to_string(),
        notes,
        source_bytes,
        output_bytes,
        formats,
    })
}

/// Keeps what is not in the weights of a GGUF file that stay as they are.
fn keep_gguf(planned: &PlannedCheckpoint, config: &ModelConfig, staging: &Staging) -> Result<(), ConvertError> {
    let [TensorFile::Gguf(file)] = planned.checkpoint.files() else { return Ok(()) };
    let tensors = outputs(planned, config, WeightsPolicy::Keep)?;
    let formats: HashMap<&str, Option<Format>> =
        tensors.iter().map(|(tensor, _)| (tensor.name.as_str(), tensor.codes.or(plain_format(tensor.dtype)))).collect();
    let weights = |name: &str| formats.get(name).copied().flatten();
    let held = gguf::held(&planned.plan, file.all_stored(), &weights)?;
    gguf::write_rest(&*file.whole()?, &held, &staging.path().join(SOURCE_GGUF))
}

/// The configuration of the converted model, checked.
pub(crate) fn converted_config(
    planned: &PlannedCheckpoint,
    options: &ConvertOptions,
) -> Result<ModelConfig, ConvertError> {
    let mut config = planned.config.clone();
    config.attention = options.attention.clone();
    config.original_layers = options.original_layers.clone();
    config.position_policy = options.position_policy;
    config.validate()?;
    Ok(config)
}

pub(crate) fn pretty(value: &impl serde::Serialize, path: &Path) -> Result<Vec<u8>, ConvertError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(ConvertError::json(path))?;
    text.push(b'\n');
    Ok(text)
}

/// Copies `name` of the source byte for byte under another name.
fn keep(input: &Path, name: &str, staging: &Staging, as_name: &str) -> Result<(), ConvertError> {
    let path = input.join(name);
    let content = std::fs::read(&path).map_err(ConvertError::io("read", &path))?;
    staging.write(as_name, &content)
}

fn record(
    planned: &PlannedCheckpoint,
    config: &ModelConfig,
    input: &Path,
    options: &ConvertOptions,
    files: Vec<RecordedFile>,
    (casts, aside): (Vec<RecordedCast>, &HashSet<String>),
) -> ConversionRecord {
    let PlannedCheckpoint { checkpoint, plan, .. } = planned;
    let directory = || {
        // Resolved, so that `.` has a name too. Only the last part: the rest is nobody else's business.
        let input = std::fs::canonicalize(input).unwrap_or_else(|_| input.to_owned());
        input.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    let of_scales: HashMap<&str, &str> =
        checkpoint.scaled().iter().map(|scaled| (scaled.scales.as_str(), scaled.codes.as_str())).collect();
    // What stands in the file is listed, also where the tensors that are read are others.
    let becomes = |name: &str| match (plan.reading(of_scales.get(name).unwrap_or(&name)), &plan.tied_copy) {
        (Some((step, _)), _) => {
            let targets = step.targets.iter().map(|target| target.name.clone());
            let aside = aside.contains(name).then(|| format!("{IGNORED_PREFIX}{name}"));
            targets.chain(aside).collect()
        }
        (None, Some((copy, embed))) if copy.name == name => {
            plan.reading(embed).map(|(step, _)| step.targets[0].name.clone()).into_iter().collect()
        }
        _ => vec![format!("{IGNORED_PREFIX}{name}")],
    };
    let standing = checkpoint.files().iter().map(TensorFile::as_it_is);
    let standing = standing.flat_map(|file| file.header().tensors.iter().map(move |tensor| (file, tensor)));
    let tensors = standing.map(|(file, tensor)| RecordedTensor {
        name: tensor.name.clone(),
        file: file.name(),
        dtype: tensor.dtype.to_string(),
        shape: tensor.shape.clone(),
        stored: file.kind(tensor).map(|kind| kind.name.to_owned()),
        becomes: becomes(&tensor.name),
    });
    let (before, added) = parameter_counts(config);
    ConversionRecord {
        format_version: ConversionRecord::FORMAT_VERSION,
        source: options.source_name.clone().unwrap_or_else(directory),
        hub: options.hub.clone(),
        rules: plan.architecture.id.to_owned(),
        rules_version: plan.architecture.version,
        prefix: plan.prefix.body.to_owned(),
        head: plan.head,
        settings: options.attention.clone(),
        weights: options.weights,
        casts,
        changed: false,
        parameters_before: before,
        parameters_after: before + added,
        calibration: None,
        tensors: tensors.collect(),
        files,
    }
}
