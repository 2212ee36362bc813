//! Which directories may be written.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::ConvertError;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, SOURCE_CONFIG, SOURCE_INDEX};
use crate::files::{INDEX, WEIGHTS};
use crate::gguf::SOURCE_GGUF;

use super::place::is_ours;

/// Files of a converted model beside the tokenizer's: those of every model, and what tuning and compressing add.
const MODEL_FILES: [&str; 10] = [
    RECORD,
    "config.json",
    WEIGHTS,
    SOURCE_CONFIG,
    SOURCE_INDEX,
    SOURCE_GGUF,
    "README.md",
    "tune.json",
    "tune.svg",
    "split_report.json",
];

/// What every file system of its own may hold at first.
const OF_THE_FILE_SYSTEM: &str = "lost+found";

/// What a directory is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// A converted model.
    Model,
    /// A Hugging Face checkpoint.
    Checkpoint,
}

/// Which earlier results may be replaced, when that is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Replaceable {
    /// A converted model.
    model: bool,
    /// A checkpoint with weights under these names; `None` is any.
    weights: Option<Vec<String>>,
    checkpoint: bool,
}

impl Replaceable {
    /// A converted model.
    pub(crate) fn model() -> Self {
        Self { model: true, checkpoint: false, weights: None }
    }

    /// A checkpoint with weights under these names, and where `model` says so a converted model.
    pub(crate) fn checkpoint(weights: Vec<String>, model: bool) -> Self {
        Self { model, checkpoint: true, weights: Some(weights) }
    }

    /// What may be replaced by a result of this kind, as far as the kind alone says it.
    pub(super) fn of(kind: OutputKind) -> Self {
        match kind {
            OutputKind::Model => Self::model(),
            OutputKind::Checkpoint => Self { model: true, checkpoint: true, weights: None },
        }
    }

    /// Why the files with these names may not be replaced, if they may not.
    fn problem(&self, names: &[String]) -> Option<String> {
        let is_model = names.iter().any(|name| name == RECORD);
        let foreign = |known: &dyn Fn(&str) -> bool| names.iter().find(|name| !known(name));
        let stranger = if is_model && self.model {
            foreign(&|name| MODEL_FILES.contains(&name) || COMPANIONS.contains(&name))
        } else if self.checkpoint && !is_model {
            let weights = |name: &str| match &self.weights {
                Some(names) => names.iter().any(|known| known == name),
                None => is_weights(name),
            };
            foreign(&|name| name == "config.json" || name == INDEX || COMPANIONS.contains(&name) || weights(name))
        } else {
            names.first()
        };
        stranger.map(|name| {
            format!(
                "it holds `{name}`, which was not written here as far as can be told; move it away if the rest may go"
            )
        })
    }
}

/// What is at the place of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    EmptyDirectory,
    Replaceable,
}

/// The directory that `output` means: links are followed, so that what they lead to is written and they stay.
pub(super) fn resolve(output: &Path) -> Result<PathBuf, ConvertError> {
    match fs::canonicalize(output) {
        Ok(path) => Ok(path),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if fs::symlink_metadata(output).is_ok() {
                return Err(foreign(output, "it is a link to nothing: make the directory it leads to, or remove it"));
            }
            let path = std::path::absolute(output).map_err(ConvertError::io("resolve", output))?;
            if path.file_name().is_none() {
                return Err(ConvertError::io("create", output)(ErrorKind::InvalidInput.into()));
            }
            Ok(path)
        }
        Err(error) => Err(ConvertError::io("create", output)(error)),
    }
}

/// Checks that `output`, resolved, may be written: absent, empty, or, when forced, an earlier result.
pub(super) fn check(output: &Path, force: bool, replaceable: &Replaceable) -> Result<Found, ConvertError> {
    match fs::symlink_metadata(output) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(ConvertError::io("look at", output)(error)),
        Ok(kind) if !kind.is_dir() => return Err(foreign(output, "it is not a directory")),
        Ok(_) => {}
    }
    let names = names(output)?;
    match (names.is_empty(), force) {
        (true, _) => Ok(Found::EmptyDirectory),
        (false, false) => Err(ConvertError::OutputExists { dir: output.to_owned() }),
        (false, true) => match replaceable.problem(&names) {
            None => Ok(Found::Replaceable),
            Some(why) => Err(foreign(output, &why)),
        },
    }
}

fn foreign(dir: &Path, why: &str) -> ConvertError {
    ConvertError::OutputForeign { dir: dir.to_owned(), why: why.to_owned() }
}

/// What a directory holds, but for what is put there while it is written.
fn names(dir: &Path) -> Result<Vec<String>, ConvertError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(ConvertError::io("list", dir))? {
        let entry = entry.map_err(ConvertError::io("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_ours(&name) && name != OF_THE_FILE_SYSTEM {
            // A directory has no place in what is written here, whatever its name.
            names.push(if is_dir { format!("{name}/") } else { name });
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a file of this name may be one that an earlier run wrote.
pub(super) fn is_known(name: &str) -> bool {
    MODEL_FILES.contains(&name) || COMPANIONS.contains(&name) || name == INDEX || is_weights(name)
}

/// Whether a file of this name may be weights.
fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

/// The file that makes a directory what it is: without it nobody takes the others for a whole.
pub(super) fn seal(dir: &Path) -> &'static str {
    if dir.join(RECORD).is_file() { RECORD } else { "config.json" }
}
