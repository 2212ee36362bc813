//! A Hugging Face checkpoint: a directory with `config.json` and one or more safetensors files.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::tensors::{SafetensorsFile, TensorEntry, TensorFile, TensorRef};

/// Name of the weights file of a checkpoint in one piece, and of a converted model.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Name of the index of a checkpoint in several pieces.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The file that makes a directory a converted model.
pub(crate) const RECORD: &str = "conversion.json";

/// An open checkpoint. Opening reads `config.json`, the index and the headers; weights are read tensor by tensor.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ConfigFile,
    files: Vec<TensorFile>,
    indexed: bool,
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`.
    ///
    /// Without an index the weights are `model.safetensors`. With one, the index is the authority: its files, all of
    /// them, with the tensors it lists, no more and no fewer.
    ///
    /// # Errors
    ///
    /// A named error for a directory without `config.json` or safetensors, for an adapter, a quantised or an already
    /// converted model, for an index and files that disagree, and for every damaged file.
    pub fn open(dir: &Path) -> Result<Self, ConvertError> {
        let config_path = dir.join("config.json");
        if dir.join("adapter_config.json").is_file() {
            let evidence = "it holds `adapter_config.json`".to_owned();
            return Err(ConvertError::Adapter { dir: dir.to_owned(), evidence });
        }
        if !config_path.is_file() {
            return Err(ConvertError::NoConfig { dir: dir.to_owned() });
        }
        if dir.join(RECORD).is_file() {
            return Err(ConvertError::AlreadyConverted { dir: dir.to_owned() });
        }
        let config = ConfigFile::open(&config_path)?;
        if let Some(quantisation) = config.object("quantization_config")? {
            let method = quantisation.optional_str("quant_method")?.unwrap_or_else(|| "unknown method".to_owned());
            let evidence = format!("config.json has a `quantization_config`: {method}");
            return Err(ConvertError::Quantised { dir: dir.to_owned(), evidence });
        }
        let (files, indexed) = open_files(dir)?;
        let mut places = HashMap::new();
        for (n, file) in files.iter().enumerate() {
            for (m, tensor) in file.header().tensors.iter().enumerate() {
                if let Some((first, _)) = places.insert(tensor.name.clone(), (n, m)) {
                    let (first, second): (&TensorFile, _) = (&files[first], file.name());
                    let problem = format!(
                        "tensor `{}` is in both `{}` and `{second}`: every tensor must be in one file",
                        tensor.name,
                        first.name()
                    );
                    return Err(ConvertError::Index { index: dir.join(INDEX), problem });
                }
            }
        }
        let checkpoint = Self { dir: dir.to_owned(), config, files, indexed, places };
        checkpoint.refuse_special_names()?;
        Ok(checkpoint)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &ConfigFile {
        &self.config
    }

    /// The files of weights, in the order of their names.
    pub(crate) fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Whether an index names the files.
    pub fn is_indexed(&self) -> bool {
        self.indexed
    }

    /// Every tensor with its file, file by file in the order of the bytes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&TensorFile, &TensorEntry)> {
        self.files.iter().flat_map(|file| file.header().tensors.iter().map(move |tensor| (file, tensor)))
    }

    /// The tensor called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<TensorRef<'_>> {
        let &(file, tensor) = self.places.get(name)?;
        let file = &self.files[file];
        Some(TensorRef { file, entry: &file.header().tensors[tensor] })
    }

    /// Adapters and quantised weights give themselves away by the ends of their names.
    fn refuse_special_names(&self) -> Result<(), ConvertError> {
        const QUANTISED: [&str; 10] = [
            ".weight_scale_inv",
            ".weight_scale",
            ".qweight",
            ".qzeros",
            ".g_idx",
            ".absmax",
            ".quant_map",
            ".quant_state",
            ".weight._scale",
            ".SCB",
        ];
        for (_, tensor) in self.tensors() {
            let name = &tensor.name;
            let evidence = format!("tensor `{name}`");
            if name.starts_with("base_model.model.") {
                return Err(ConvertError::Adapter { dir: self.dir.clone(), evidence });
            }
            if QUANTISED.iter().any(|end| name.ends_with(end)) || name.contains(".quant_state.") {
                return Err(ConvertError::Quantised { dir: self.dir.clone(), evidence });
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_files(dir: &Path) -> Result<(Vec<TensorFile>, bool), ConvertError> {
    let (single, index_path) = (dir.join(WEIGHTS), dir.join(INDEX));
    if !index_path.is_file() {
        if !single.is_file() {
            return Err(no_safetensors(dir));
        }
        return Ok((vec![open_file(&single)?], false));
    }
    let bytes = std::fs::read(&index_path).map_err(ConvertError::io("read", &index_path))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(ConvertError::json(&index_path))?;
    let fail = |problem: String| Err(ConvertError::Index { index: index_path.clone(), problem });
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    if single.is_file()
        && let Some(other) = shards.keys().find(|&&shard| shard != WEIGHTS)
    {
        return Err(ConvertError::TwoCheckpoints { dir: dir.to_owned(), shard: (*other).to_owned() });
    }
    if shards.is_empty() {
        return fail("`weight_map` is empty: no file is named".into());
    }
    let mut files = Vec::new();
    for (shard, tensors) in shards {
        // A name with a directory in it could point anywhere.
        if Path::new(shard).file_name() != Some(shard.as_ref()) || shard.contains('\\') {
            return fail(format!("`{shard}` must be the plain name of a file beside the index"));
        }
        let path = dir.join(shard);
        if !path.is_file() {
            return fail(format!(
                "`{shard}` is missing, it holds `{}` and {} other tensors: download it",
                tensors[0],
                tensors.len() - 1
            ));
        }
        let file = open_file(&path)?;
        if let Some(absent) = tensors.iter().find(|tensor| file.header().find(tensor).is_none()) {
            return fail(format!("tensor `{absent}` should be in `{shard}` and is not: index and files do not match"));
        }
        let listed = |name: &str| index.weight_map.contains_key(name);
        if let Some(extra) = file.header().tensors.iter().find(|tensor| !listed(&tensor.name)) {
            return fail(format!("`{shard}` holds `{}`, which the index does not list", extra.name));
        }
        files.push(file);
    }
    Ok((files, true))
}

fn open_file(path: &Path) -> Result<TensorFile, ConvertError> {
    SafetensorsFile::open(path).map(TensorFile::Safetensors)
}

fn no_safetensors(dir: &Path) -> ConvertError {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let ending = |end: &str| names.iter().find(|name| name.ends_with(end));
    let (found, advice) = if let Some(name) = ending(".bin").or_else(|| ending(".pt")).or_else(|| ending(".pth")) {
        let advice = "load it with transformers and save it with `model.save_pretrained(OUT, safe_serialization=True)`";
        (format!("`{name}`"), advice)
    } else if let Some(name) = ending(".gguf") {
        (format!("`{name}`"), "get the original checkpoint it was made from")
    } else if let Some(name) = ending(".safetensors") {
        (format!("`{name}`"), "rename it to `model.safetensors`, or add the index that belongs to it")
    } else {
        ("no weights".to_owned(), "expected `model.safetensors` or `model.safetensors.index.json`")
    };
    ConvertError::NoSafetensors { dir: dir.to_owned(), found, advice }
}
