//! What reading, converting and exporting refuse.

use std::path::{Path, PathBuf};

use bsbr_model::ModelError;

use crate::gguf::GgufProblem;
use crate::placeholder::Placeholder;
use crate::problem::{FormatProblem, PlanProblem, TorchProblem, list};

/// A checkpoint, a directory or a setting that cannot be used.
///
/// Every message names the file, the key or the tensor, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A GGUF file has no tokenizer that can be used.
    #[error(
        "{path}: {reason}; convert the model, put the tokenizer.json of the original beside it, and use that directory",
        path = .path.display()
    )]
    NoTokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A safetensors file is damaged or hostile.
    #[error("{}: {problem}; the file is damaged or not a safetensors file: download or save it again", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<FormatProblem>,
    },
    /// A GGUF file is damaged, hostile, or of a kind that is not read.
    #[error("{}: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<GgufProblem>,
    },
    /// A PyTorch file is damaged, hostile, or no state dict.
    #[error(
        "{}: {problem}; expected a state dict as `torch.save(model.state_dict(), FILE)` writes it: download or save it \
         again, or use the safetensors of the same model", path.display()
    )]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<TorchProblem>,
    },
    /// A model is compressed and should not be.
    #[error("{} is a compressed model: {what}", dir.display())]
    Compressed {
        /// The model.
        dir: PathBuf,
        /// What to do.
        what: &'static str,
    },
    /// A model is not compressed and should be.
    #[error("{} is no compressed model, its config.json has no `split`: there is nothing to fold", dir.display())]
    NotCompressed {
        /// The model.
        dir: PathBuf,
    },
    /// A factor cannot be written.
    #[error("factor `{tensor}` {problem}")]
    Factor {
        /// Name of its tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A converted model has attention settings of an earlier version.
    #[error(
        "{} was written by an earlier version: `{found}` is no setting of attention any more ({instead}); convert {} again \
         with the settings of this version, nothing in its weights has changed",
        path.display(),
        source_name.as_ref().map_or("the original".to_owned(), |name| format!("its original `{name}`"))
    )]
    OldSettings {
        /// Its `config.json`, or its record.
        path: PathBuf,
        /// The setting, as the file has it.
        found: String,
        /// What replaced it.
        instead: &'static str,
        /// What the model was converted from, where the record says so.
        source_name: Option<String>,
    },
    /// A JSON file cannot be parsed.
    #[error("{} is not the JSON expected here", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A key of a configuration file is missing or has the wrong type or value.
    #[error("{}: key `{key}` must be {expected}, found {found}", path.display())]
    ConfigKey {
        /// The file.
        path: PathBuf,
        /// The key; nested keys are joined by dots.
        key: String,
        /// What it must be.
        expected: String,
        /// What is there.
        found: String,
    },
    /// No rules for this kind of model.
    #[error("{}: model type `{found}` is not supported; supported are {supported}", path.display())]
    UnknownModelType {
        /// The configuration file.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
        /// Every type there are rules for.
        supported: String,
    },
    /// No rules of this name.
    #[error(
        "no rules are called `{found}`{}; there are {known}",
        nearest.as_ref().map(|name| format!(", the nearest name is `{name}`")).unwrap_or_default()
    )]
    UnknownRules {
        /// The name asked for.
        found: String,
        /// The nearest name there is.
        nearest: Option<String>,
        /// Every name there is.
        known: String,
    },
    /// A variant of a supported architecture that the decoder does not compute.
    #[error("{}: `{key}` = {value} is not supported: {why}", path.display())]
    Rejected {
        /// The configuration file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is missing.
        why: &'static str,
    },
    /// One setting under two names, with different values.
    #[error("{}: {first} and {second} contradict each other: {advice}", path.display())]
    Contradiction {
        /// The configuration file.
        path: PathBuf,
        /// The one that would be read, with its value.
        first: String,
        /// The other.
        second: String,
        /// What to do.
        advice: String,
    },
    /// Not a model directory.
    #[error(
        "{} holds no `config.json` and no GGUF file: name the directory of a Hugging Face checkpoint or of a converted \
         model, or a GGUF file", dir.display()
    )]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// Several GGUF files in one directory.
    #[error("{} holds no `config.json` and several GGUF files ({}): name one of them", dir.display(), names.join(", "))]
    SeveralGguf {
        /// The directory.
        dir: PathBuf,
        /// The files.
        names: Vec<String>,
    },
    /// A directory without weights under the names they are looked for.
    #[error("{} holds {found} and none of the files a checkpoint has its weights in: {advice}", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// The weights that are there instead, if any.
        found: String,
        /// What to do.
        advice: &'static str,
    },
    /// Two sets of weights in one directory.
    #[error(
        "{} holds both `{single}` and an index naming `{shard}`: which weights are meant is not clear, remove one set",
        dir.display()
    )]
    TwoCheckpoints {
        /// The directory.
        dir: PathBuf,
        /// The file in one piece.
        single: &'static str,
        /// A file the index names.
        shard: String,
    },
    /// A file that stands for another one.
    #[error("{} {problem}", path.display())]
    Placeholder {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        problem: Placeholder,
    },
    /// Names of a model inside another object.
    #[error(
        "{}: the names of the tensors have `{wrapper}` in them (`{example}`), which {left_by} puts there: save the state \
         dict of the model itself, or rename them in Python: `{{k.replace('{wrapper}', ''): v for k, v in \
         state_dict.items()}}`", dir.display()
    )]
    Wrapped {
        /// The directory.
        dir: PathBuf,
        /// What is too much in the names.
        wrapper: &'static str,
        /// What put it there.
        left_by: &'static str,
        /// One of the names.
        example: String,
    },
    /// An adapter instead of a model.
    #[error(
        "{} is a LoRA/PEFT adapter ({evidence}), not a whole model: merge it into its base model first with \
         `PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT)`", dir.display()
    )]
    Adapter {
        /// The directory.
        dir: PathBuf,
        /// What shows it.
        evidence: String,
    },
    /// A quantised checkpoint.
    #[error(
        "{} is quantised ({evidence}): its numbers are codes, not weights; use the original checkpoint in F32, F16 or \
         BF16", dir.display()
    )]
    Quantised {
        /// The directory.
        dir: PathBuf,
        /// What shows it.
        evidence: String,
    },
    /// The index of a sharded checkpoint and its files disagree.
    #[error("{}: {problem}", index.display())]
    Index {
        /// The index file.
        index: PathBuf,
        /// What disagrees and what to do.
        problem: String,
    },
    /// None of the known prefixes occurs.
    #[error(
        "{}: no tensor is named as `{rules}` expects: looked for {tried}; the file has `{example}` and {others} others. \
         Is this the checkpoint that belongs to this config.json?", dir.display()
    )]
    Prefix {
        /// The directory.
        dir: PathBuf,
        /// The rules.
        rules: &'static str,
        /// The names tried.
        tried: String,
        /// A name that is there.
        example: String,
        /// How many other names there are.
        others: usize,
    },
    /// Neither a head nor a reason to share the embedding.
    #[error(
        "{}: there is no `{head}`{}, and {declared} says that the head is not the embedding table `{embed}`: either the \
         file lacks a tensor or config.json needs \"tie_word_embeddings\": true",
        dir.display(),
        nearest.as_ref().map_or_else(String::new, |name| format!(" (nearest unused name: `{name}`)"))
    )]
    HeadMissing {
        /// The directory.
        dir: PathBuf,
        /// Name the head would have.
        head: String,
        /// Name of the embedding table.
        embed: String,
        /// Where the decision comes from.
        declared: &'static str,
        /// The most similar name that no rule reads.
        nearest: Option<String>,
    },
    /// The tensors do not fit the rules. Every problem is listed.
    #[error("{}", list(&format!("{}: the tensors do not fit {rules}", dir.display()), problems, sizes))]
    Plan {
        /// The directory.
        dir: PathBuf,
        /// What they were compared with.
        rules: String,
        /// The sizes the configuration gives.
        sizes: String,
        /// Everything that does not fit.
        problems: Vec<PlanProblem>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{}: tensor `{tensor}` holds {value} at element {element}: the checkpoint is broken, every number must be \
         finite", path.display()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index of the first such number in the tensor, row-major.
        element: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// A number too large for the number format asked for.
    #[error(
        "{}: tensor `{tensor}` holds {value:e} at element {element}, which is beyond the largest {to}: keep the number \
         format or choose one with a larger range (BF16, F32)", path.display()
    )]
    CastOverflow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index of the first such number in the tensor, row-major.
        element: usize,
        /// The number.
        value: f32,
        /// The format.
        to: String,
    },
    /// A weight that cannot be written as codes.
    #[error("{}: tensor `{tensor}` cannot be written as codes", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        #[source]
        problem: bsbr_weights::EncodeError,
    },
    /// An export of codes that the converted model does not hold any more.
    #[error(
        "{}: `{tensor}` of the original is codes with scales of their own, the weight `{weight}` made of it is {found}: convert the \
         original once more with `--weights keep`, or export the numbers with other tools",
        dir.display()
    )]
    CodesGone {
        /// The directory.
        dir: PathBuf,
        /// The codes.
        tensor: String,
        /// A weight made of them.
        weight: String,
        /// Its format in the converted model.
        found: String,
    },
    /// A model that has no GGUF file to give back.
    #[error("{} has no GGUF file to give back: {why}; export it as a Hugging Face checkpoint", dir.display())]
    NoGguf {
        /// The directory.
        dir: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// An export of a model whose original bits are gone.
    #[error(
        "{}: {count} weights were cast with loss when it was converted (`{example}` from {from} to {to}), their original \
         bits are gone and there is nothing to export; convert the original again with its own number format to get a \
         model that can be exported", dir.display()
    )]
    LossyCast {
        /// The directory.
        dir: PathBuf,
        /// How many weights.
        count: usize,
        /// One of them.
        example: String,
        /// Its format in the source.
        from: String,
        /// Its format in the converted model.
        to: String,
    },
    /// The settings do not fit the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The output directory is in use.
    #[error("{} exists and is not empty: choose another directory or force replacing it", dir.display())]
    OutputExists {
        /// The directory.
        dir: PathBuf,
    },
    /// The output is not a directory, or not one of ours to replace.
    #[error("{} cannot be written, even when forced: {why}", dir.display())]
    OutputForeign {
        /// The directory.
        dir: PathBuf,
        /// What protects it.
        why: String,
    },
    /// Another process is writing the output.
    #[error(
        "{} is being written by another process: wait for it, or choose another directory (if none runs, delete {})",
        dir.display(), partial.display()
    )]
    OutputBusy {
        /// The output.
        dir: PathBuf,
        /// What the other one writes.
        partial: PathBuf,
    },
    /// A directory whose files are not all in their places.
    #[error(
        "{} is not complete: a run that wrote it was interrupted while it put its files there; run it again with this output \
         directory, which finishes that first", dir.display()
    )]
    OutputUnfinished {
        /// The directory.
        dir: PathBuf,
    },
    /// A converted model where an original is needed.
    #[error("{} is a converted model already: convert the original checkpoint, or export this one first", dir.display())]
    AlreadyConverted {
        /// The directory.
        dir: PathBuf,
    },
    /// An original where a converted model is needed.
    #[error("{} is not a converted model: it holds no `conversion.json`", dir.display())]
    NotConverted {
        /// The directory.
        dir: PathBuf,
    },
    /// A converted model made by other rules.
    #[error(
        "{}: made with {made}, this version has {have}: export it with the version that made it, or convert the \
         original again", path.display()
    )]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// Version recorded.
        made: String,
        /// Version here.
        have: String,
    },
    /// A tensor the model does not have, or has in another shape.
    #[error("no weight `{tensor}` of shape {shape:?} in {}", dir.display())]
    NoSuchWeight {
        /// The directory.
        dir: PathBuf,
        /// Name asked for.
        tensor: String,
        /// Shape asked for.
        shape: Vec<usize>,
    },
    /// A file of expected logits that holds something else.
    #[error("{} {problem}", path.display())]
    Expected {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A rule table that contradicts itself: a mistake in the program, found before any weight is read.
    #[error("rules `{rules}`: {problem}")]
    Rules {
        /// The rules.
        rules: &'static str,
        /// The contradiction.
        problem: String,
    },
}

impl ConvertError {
    /// For `map_err`: an I/O failure of `action` on `path`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Json { path, source }
    }
}
