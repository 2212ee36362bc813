//! Which files of a directory hold the weights of a checkpoint.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::ConvertError;
use crate::placeholder::check_file;
use crate::tensors::{SafetensorsFile, TensorFile, TorchFile};

/// Name of the weights file of a checkpoint in one piece, and of a converted model.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Name of the index of a checkpoint in several pieces.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The weights of a checkpoint in one format, in one piece or in several.
struct Layout {
    single: &'static str,
    index: &'static str,
    open: fn(&Path) -> Result<TensorFile, ConvertError>,
}

/// In the order in which they are looked for: a directory that holds both formats holds the same weights twice.
const LAYOUTS: [Layout; 2] = [
    Layout { single: WEIGHTS, index: INDEX, open: |path| SafetensorsFile::open(path).map(TensorFile::Safetensors) },
    Layout {
        single: "pytorch_model.bin",
        index: "pytorch_model.bin.index.json",
        open: |path| TorchFile::open(path).map(TensorFile::Torch),
    },
];

impl Layout {
    /// The file that shows that the weights are there in this layout.
    fn found(&self, dir: &Path) -> Option<&'static str> {
        // A link without a target is found as well, so that opening it can say so.
        [self.index, self.single].into_iter().find(|name| is_there(&dir.join(name)))
    }
}

/// Whether there is a file, or a link to what should be one.
fn is_there(path: &Path) -> bool {
    path.is_file() || (path.is_symlink() && !path.exists())
}

/// The open files of a checkpoint.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    /// In the order of their names.
    pub(crate) files: Vec<TensorFile>,
    /// Name of the index, of a checkpoint in several pieces.
    pub(crate) index: Option<&'static str>,
    /// A file of weights in another format that was left alone.
    pub(crate) unread: Option<&'static str>,
}

impl WeightFiles {
    /// Opens the weights in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Self, ConvertError> {
        let mut present = LAYOUTS.iter().filter_map(|layout| Some((layout, layout.found(dir)?)));
        let Some((layout, found)) = present.next() else { return Err(no_weights(dir)) };
        let unread = present.next().map(|(_, name)| name);
        if found == layout.single {
            return Ok(Self { files: vec![(layout.open)(&dir.join(found))?], index: None, unread });
        }
        Ok(Self { files: open_shards(dir, layout)?, index: Some(layout.index), unread })
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_shards(dir: &Path, layout: &Layout) -> Result<Vec<TensorFile>, ConvertError> {
    let index_path = dir.join(layout.index);
    check_file(&index_path)?;
    let bytes = std::fs::read(&index_path).map_err(ConvertError::io("read", &index_path))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(ConvertError::json(&index_path))?;
    let fail = |problem: String| Err(ConvertError::Index { index: index_path.clone(), problem });
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    if dir.join(layout.single).is_file()
        && let Some(other) = shards.keys().find(|&&shard| shard != layout.single)
    {
        let (single, shard) = (layout.single, (*other).to_owned());
        return Err(ConvertError::TwoCheckpoints { dir: dir.to_owned(), single, shard });
    }
    if shards.is_empty() {
        return fail("`weight_map` is empty: no file is named".into());
    }
    let mut files = Vec::new();
    for (shard, tensors) in shards {
        // A name with a directory in it could point anywhere.
        if Path::new(shard).file_name() != Some(shard.as_ref()) || shard.contains('\\') {
            let mut parts = Path::new(shard).components();
            if !shard.contains('\\') && parts.all(|part| matches!(part, Component::Normal(_))) {
                return fail(format!(
                    "`{shard}` is in a folder of its own, which is not read: move the file beside the index and write \
                     its plain name into `weight_map`"
                ));
            }
            return fail(format!("`{shard}` must be the plain name of a file beside the index"));
        }
        let path = dir.join(shard);
        check_file(&path)?;
        if !path.is_file() {
            return fail(format!(
                "`{shard}` is missing, it holds `{}` and {} other tensors: download it",
                tensors[0],
                tensors.len() - 1
            ));
        }
        let file = (layout.open)(&path)?;
        if let Some(absent) = tensors.iter().find(|tensor| file.header().find(tensor).is_none()) {
            return fail(format!("tensor `{absent}` should be in `{shard}` and is not: index and files do not match"));
        }
        let listed = |name: &str| index.weight_map.contains_key(name);
        if let Some(extra) = file.header().tensors.iter().find(|tensor| !listed(&tensor.name)) {
            return fail(format!("`{shard}` holds `{}`, which the index does not list", extra.name));
        }
        files.push(file);
    }
    Ok(files)
}

fn no_weights(dir: &Path) -> ConvertError {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let ending = |end: &str| names.iter().find(|name| name.ends_with(end));
    let (found, advice) = if let Some(name) = ending(".safetensors") {
        (format!("`{name}`"), "rename it to `model.safetensors`, or add the index that belongs to it")
    } else if let Some(name) = ending(".bin").or_else(|| ending(".pt")).or_else(|| ending(".pth")) {
        (format!("`{name}`"), "if it is a whole state dict, rename it to `pytorch_model.bin`, or add its index")
    } else if let Some(name) = ending(".gguf") {
        (format!("`{name}`"), "name the file itself, or the directory without its `config.json`")
    } else {
        let advice = "expected `model.safetensors` or `pytorch_model.bin`, or the index of either";
        ("no weights".to_owned(), advice)
    };
    ConvertError::NoWeights { dir: dir.to_owned(), found, advice }
}
