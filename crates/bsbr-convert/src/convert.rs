//! Converting: a Hugging Face checkpoint to a converted model directory.

use std::cmp::Reverse;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use bsbr_attn::BlockAttentionConfig;
use bsbr_model::{ModelConfig, PositionPolicy, parameter_counts, weight_specs};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::ConvertError;
use crate::card::model_card;
use crate::checkpoint::{INDEX, RECORD, WEIGHTS};
use crate::derive;
use crate::output::{Staging, check_output};
use crate::planning::{PlannedCheckpoint, plan_checkpoint};
use crate::record::{ConversionRecord, HubOrigin, IGNORED_PREFIX, RecordedFile, RecordedTensor};
use crate::tensors::{Recipe, SafetensorsFile, TensorDeclaration, TensorFileWriter, header_text, hex};

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
}

/// Converts the Hugging Face checkpoint in `input` to a converted model in `output`.
///
/// Weights keep their dtype. One band of one tensor is in memory at a time. The output appears whole or not at all,
/// and depends on nothing but the input and the options: converting twice gives the same bytes.
///
/// # Errors
///
/// As [`plan_checkpoint`]; [`ConvertError::Model`] for impossible settings; [`ConvertError::OutputExists`] and
/// [`ConvertError::OutputForeign`] before anything is written; [`ConvertError::NotFinite`] naming the tensor;
/// [`ConvertError::Io`] naming the file. After an error nothing is left behind.
pub fn convert(
    input: &Path,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConversionReport, ConvertError> {
    let planned = plan_checkpoint(input)?;
    let mut config = planned.config.clone();
    config.attention = options.attention.clone();
    config.original_layers = options.original_layers.clone();
    config.position_policy = options.position_policy;
    config.validate()?;
    check_output(output, options.force, |names| names.iter().any(|name| name == RECORD))?;

    let staging = Staging::new(output)?;
    let record = record(&planned, &config, input, options, progress)?;
    let output_bytes = write_weights(&planned, &config, &staging.path().join(WEIGHTS), progress)?;
    staging.write("config.json", &pretty(&config, output)?)?;
    staging.write(RECORD, &pretty(&record, output)?)?;
    keep(input, "config.json", &staging, SOURCE_CONFIG)?;
    if planned.checkpoint.is_indexed() {
        keep(input, INDEX, &staging, SOURCE_INDEX)?;
    }
    staging.copy_present(input, &COMPANIONS)?;
    let notes = planned.notes();
    let measured = options.measured.as_deref().unwrap_or_default();
    staging.write("README.md", model_card(&record, &notes, measured).as_bytes())?;
    staging.publish()?;
    let source_bytes = planned.checkpoint.files().iter().map(SafetensorsFile::len).sum();
    Ok(ConversionReport { config, record, mapping: planned.plan.to_string(), notes, source_bytes, output_bytes })
}

fn pretty(value: &impl serde::Serialize, path: &Path) -> Result<Vec<u8>, ConvertError> {
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

/// Where the numbers of a tensor of the output come from.
enum Origin<'a> {
    Moved(Recipe<'a>),
    Mean([Recipe<'a>; 2]),
    KeptAside(Recipe<'a>),
}

fn write_weights(
    planned: &PlannedCheckpoint,
    config: &ModelConfig,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<u64, ConvertError> {
    let mut tensors = outputs(planned, config)?;
    // Wider formats first, as other writers do: every tensor then starts at a multiple of the size of its numbers.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut done = 0;
    let mut writer = TensorFileWriter::create(path, &header_text(&declarations), false)?;
    for (tensor, origin) in &tensors {
        match origin {
            Origin::Moved(recipe) => {
                let mut first = 0;
                recipe.for_each_band(|bytes| {
                    recipe.check_finite(bytes, first)?;
                    first += bytes.len() * 8 / recipe.dtype.bitsize();
                    writer.write(bytes)
                })?;
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
    Ok(writer.finish()?.0)
}

fn outputs<'a>(
    planned: &'a PlannedCheckpoint,
    config: &ModelConfig,
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
                (recipe.dtype, Origin::Moved(recipe))
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
    Ok(tensors)
}

fn record(
    planned: &PlannedCheckpoint,
    config: &ModelConfig,
    input: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConversionRecord, ConvertError> {
    let PlannedCheckpoint { checkpoint, plan, .. } = planned;
    let directory = || {
        // Resolved, so that `.` has a name too. Only the last part: the rest is nobody else's business.
        let input = std::fs::canonicalize(input).unwrap_or_else(|_| input.to_owned());
        input.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    let becomes = |name: &str| match (plan.reading(name), &plan.tied_copy) {
        (Some((step, _)), _) => step.targets.iter().map(|target| target.name.clone()).collect(),
        (None, Some((copy, embed))) if copy.name == name => {
            plan.reading(embed).map(|(step, _)| step.targets[0].name.clone()).into_iter().collect()
        }
        _ => vec![format!("{IGNORED_PREFIX}{name}")],
    };
    let tensors = checkpoint.tensors().map(|(file, tensor)| RecordedTensor {
        name: tensor.name.clone(),
        file: file.name(),
        dtype: tensor.dtype.to_string(),
        shape: tensor.shape.clone(),
        becomes: becomes(&tensor.name),
    });
    let (before, added) = parameter_counts(config);
    Ok(ConversionRecord {
        format_version: ConversionRecord::FORMAT_VERSION,
        source: options.source_name.clone().unwrap_or_else(directory),
        hub: options.hub.clone(),
        rules: plan.architecture.id.to_owned(),
        rules_version: plan.architecture.version,
        prefix: plan.prefix.clone(),
        head: plan.head,
        settings: options.attention.clone(),
        parameters_before: before,
        parameters_after: before + added,
        tensors: tensors.collect(),
        files: record_files(checkpoint.files(), progress)?,
    })
}

fn record_files(
    files: &[SafetensorsFile],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<RecordedFile>, ConvertError> {
    let total = files.iter().map(SafetensorsFile::len).sum();
    let mut done = 0;
    let mut recorded = Vec::new();
    for file in files {
        let (name, sha256) = (file.name(), sha256(file.path())?);
        done += file.len();
        progress(Progress { stage: "hashing", item: &name, done, total });
        recorded.push(RecordedFile { name, bytes: file.len(), sha256, header: file.header().text.clone() });
    }
    Ok(recorded)
}

fn sha256(path: &Path) -> Result<String, ConvertError> {
    let mut file = File::open(path).map_err(ConvertError::io("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(ConvertError::io("read", path))? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}
