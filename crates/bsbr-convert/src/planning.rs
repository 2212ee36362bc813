//! From a directory to a plan.

use std::collections::HashSet;
use std::path::Path;

use bsbr_model::ModelConfig;

use crate::ConvertError;
use crate::arch::{Found, default_stop_token, find_rules};
use crate::checkpoint::Checkpoint;
use crate::hints::Hints;
use crate::json::ConfigFile;
use crate::placeholder::check_file;
use crate::plan::{Plan, SourceTensor};
use crate::rules::{Prefix, SourceModel, expand};
use crate::scaled;
use crate::tensors::{Header, Recipe, TensorEntry, presented};
use crate::tie::{HeadForm, head_form};

/// A checkpoint and how it becomes a decoder.
#[derive(Debug)]
pub struct PlannedCheckpoint {
    /// The files.
    pub checkpoint: Checkpoint,
    /// What becomes what.
    pub plan: Plan,
    /// The decoder with its original attention.
    pub config: ModelConfig,
}

impl PlannedCheckpoint {
    /// What is worth telling a reader about the checkpoint.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        match self.plan.head {
            HeadForm::TiedCopy => {
                notes.push("the output head is in the file and equal to the embedding table: stored once".to_owned());
            }
            HeadForm::Own if self.plan.model.tie_declared == Some(true) => notes.push(
                "config.json ties the output head to the embedding table, the file has another head: the file is \
                 followed"
                    .to_owned(),
            ),
            _ => {}
        }
        if let Some(extras) = self.checkpoint.gguf() {
            notes.extend(extras.notes.iter().cloned());
            notes.extend(
                extras.no_tokenizer.iter().map(|reason| format!("there is no tokenizer that can be used: {reason}")),
            );
        }
        if let Some(name) = self.checkpoint.unread() {
            notes.push(format!("`{name}` is there as well and was not read: safetensors come first"));
        }
        if !self.plan.ignored.is_empty() {
            let count = self.plan.ignored.len();
            notes.push(format!("{count} tensors that are no weights are kept aside for an export"));
        }
        notes
    }

    /// How weight `name` is made of the tensors of the checkpoint; `None` when nothing fills it.
    pub(crate) fn recipe(&self, name: &str) -> Result<Option<Recipe<'_>>, ConvertError> {
        let Some((step, target)) = self.plan.filling(name) else { return Ok(None) };
        let sources = step.sources.iter().map(|source| self.checkpoint.find(&source.name));
        let Some(sources) = sources.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let blocks = self.plan.blocks(step)?.swap_remove(target);
        Ok(Some(Recipe { sources, blocks, dtype: step.dtype, shape: step.targets[target].shape.clone() }))
    }
}

/// Opens the Hugging Face checkpoint in `dir`, or the GGUF file `dir`, and plans its conversion. Reads headers, and the head and embedding
/// table to compare them; no other weights.
///
/// # Errors
///
/// As [`Checkpoint::open`]; errors of the configuration; [`ConvertError::Plan`] with every tensor that does not fit.
pub fn plan_checkpoint(dir: &Path) -> Result<PlannedCheckpoint, ConvertError> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = checkpoint.config();
    let tensors: Vec<SourceTensor> = checkpoint
        .tensors()
        .map(|(_, t)| SourceTensor { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect();
    let found = find_rules(config)?;
    let model = read_model(&found, tensors.len())?;
    let prefix = find_prefix(dir, &found, &model, &tensors)?;
    let head = head_form(&checkpoint, found.architecture, prefix, &model)?;
    let plan = build(dir, &found, prefix, model, head, tensors)?;
    let mut model_config = ModelConfig::original(plan.model.decoder.clone());
    model_config.stop_tokens = stop_tokens(dir, [config, &found.config], &plan.model)?;
    Ok(PlannedCheckpoint { checkpoint, plan, config: model_config })
}

/// Plans from recorded headers, as an export does: there are no weights to look at, so prefix and head are given.
///
/// # Errors
///
/// As [`plan_checkpoint`].
pub(crate) fn plan_recorded(
    dir: &Path,
    config: &ConfigFile,
    prefix: &str,
    head: HeadForm,
    headers: &[Header],
) -> Result<Plan, ConvertError> {
    let entries: Vec<&TensorEntry> = headers.iter().flat_map(|header| &header.tensors).collect();
    let scaled = scaled::of_checkpoint(dir, config, &entries)?;
    let headers: Vec<Header> = headers.iter().map(|header| presented(header, &scaled)).collect();
    let tensors = headers.iter().flat_map(|header| &header.tensors);
    let tensors: Vec<SourceTensor> =
        tensors.map(|t| SourceTensor { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() }).collect();
    let found = find_rules(config)?;
    let model = read_model(&found, tensors.len())?;
    let known = found.prefixes().into_iter().find(|known| known.body == prefix);
    build(dir, &found, known.unwrap_or(Prefix::of_body("")), model, head, tensors)
}

/// Reads the configuration of a checkpoint with `tensors` tensors.
fn read_model(found: &Found, tensors: usize) -> Result<SourceModel, ConvertError> {
    let config = &found.config;
    let refuse = |key: &str, expected: String, found: usize| {
        let (path, key, found) = (config.path().to_owned(), key.to_owned(), found.to_string());
        Err(ConvertError::ConfigKey { path, key, expected, found })
    };
    // Reading the configuration makes lists with an entry for each layer.
    for key in ["num_hidden_layers", "n_layer", "n_layers", "num_layers"] {
        let layers = config.get(key).and_then(serde_json::Value::as_u64).map(|layers| layers as usize);
        if let Some(layers) = layers.filter(|&layers| layers > tensors) {
            return refuse("number of layers", format!("at most the {tensors} tensors of the checkpoint"), layers);
        }
    }
    let model = found.read()?;
    let d = &model.decoder;
    // Sizes no file could hold would only overflow or fill the memory with names further on.
    if d.layers > tensors {
        return refuse("number of layers", format!("at most the {tensors} tensors of the checkpoint"), d.layers);
    }
    const LARGEST: usize = 1 << 31;
    for (key, size) in [
        ("vocabulary size", d.vocab_size),
        ("hidden size", d.hidden_size),
        ("number of heads", d.heads),
        ("width of a head", d.head_dim),
        ("inner size of the MLP", d.intermediate_size),
        ("number of positions", d.max_positions),
    ] {
        if size > LARGEST {
            return refuse(key, format!("at most {LARGEST}"), size);
        }
    }
    d.validate()?;
    Ok(model)
}

fn build(
    dir: &Path,
    found: &Found,
    prefix: Prefix,
    mut model: SourceModel,
    head: HeadForm,
    tensors: Vec<SourceTensor>,
) -> Result<Plan, ConvertError> {
    model.decoder.tied_head = head.is_tied();
    found.set_layouts(prefix, &mut model, &tensors);
    let Found { architecture, wrapper, config, .. } = found;
    let hints = Hints::new(architecture, prefix, config, &model);
    let d = &model.decoder;
    let sizes = format!(
        "vocab_size {}, hidden_size {}, layers {}, heads {}, kv_heads {}, head_dim {}, intermediate_size {}, \
         max_positions {}",
        d.vocab_size, d.hidden_size, d.layers, d.heads, d.kv_heads, d.head_dim, d.intermediate_size, d.max_positions
    );
    Plan::build((architecture, *wrapper), prefix, model, head, tensors, &hints).map_err(|problems| {
        let rules = format!("the rules `{}`", architecture.id);
        ConvertError::Plan { dir: dir.to_owned(), rules, sizes, problems }
    })
}

/// The first prefix under which the anchor exists. Without the anchor, the one under which most names do: the plan
/// then reports the anchor as missing.
fn find_prefix(
    dir: &Path,
    found: &Found,
    model: &SourceModel,
    tensors: &[SourceTensor],
) -> Result<Prefix, ConvertError> {
    let (architecture, prefixes) = (found.architecture, found.prefixes());
    let names: HashSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let anchors = prefixes.iter().map(|&prefix| (prefix, expand(architecture.anchor, prefix, (0, 0), 0)));
    if let Some((prefix, _)) = anchors.clone().find(|(_, anchor)| names.contains(anchor.as_str())) {
        return Ok(prefix);
    }
    let known = |prefix: Prefix| {
        let sources = architecture.source_names(prefix, &model.decoder);
        sources.iter().filter(|name| names.contains(name.as_str())).count()
    };
    // The first of the best: `max_by_key` would take the last.
    let best = prefixes.iter().rev().map(|&prefix| (known(prefix), prefix)).max_by_key(|(n, _)| *n);
    match best {
        Some((count, prefix)) if count > 0 => Ok(prefix),
        _ => {
            let tried = anchors.map(|(_, anchor)| format!("`{anchor}`")).collect::<Vec<_>>().join(", ");
            let example = tensors.first().map_or("no tensor at all".to_owned(), |tensor| tensor.name.clone());
            let others = tensors.len().saturating_sub(1);
            Err(ConvertError::Prefix { dir: dir.to_owned(), rules: architecture.id, tried, example, others })
        }
    }
}

/// The tokens that end a text: those of `generation_config.json` alone where there is one, as in transformers; else those of
/// `config.json`, those of a model around the decoder first, and where it has no such key at all, not even null, that of the
/// class.
fn stop_tokens(dir: &Path, configs: [&ConfigFile; 2], model: &SourceModel) -> Result<Vec<u32>, ConvertError> {
    const KEY: &str = "eos_token_id";
    let generation = dir.join("generation_config.json");
    check_file(&generation)?;
    let mut tokens = if generation.is_file() {
        ConfigFile::open(&generation)?.token_ids(KEY)?
    } else if let Some(config) = configs.into_iter().find(|config| config.get(KEY).is_some()) {
        config.token_ids(KEY)?
    } else if configs.iter().any(|config| config.contains(KEY)) {
        Vec::new()
    } else {
        let default = configs[1].optional_str("model_type")?.and_then(|kind| default_stop_token(&kind));
        default.filter(|&token| (token as usize) < model.decoder.vocab_size).into_iter().collect()
    };
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}
