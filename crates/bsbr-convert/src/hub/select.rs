//! Which files of a repository make up a model.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::name::is_plain_name;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, SOURCE_CONFIG, SOURCE_INDEX};
use crate::files::{INDEX, WEIGHTS};

pub(super) const CONFIG: &str = "config.json";
/// Makes a repository an adapter; fetched, so that opening the directory says so.
const ADAPTER: &str = "adapter_config.json";

/// The forms of weights in the order of preference: one file, or the index of several.
const FORMS: [[&str; 2]; 2] = [[WEIGHTS, INDEX], ["pytorch_model.bin", "pytorch_model.bin.index.json"]];

/// What to fetch first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// Whole names of files.
    pub files: Vec<String>,
    /// The one of them that names the shards, if the weights are in several files.
    pub index: Option<&'static str>,
}

/// Why nothing can be selected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lacking {
    /// There is no `config.json`.
    Config,
    /// There are no weights of a known form; files that look like weights.
    Weights(Vec<String>),
}

/// Selects from the files a repository has: configuration, tokenizer, and one form of weights, never two.
///
/// A repository that has weights both in one file and in shards gives the one file, as in Python's `transformers`.
pub(super) fn select(names: &[&str]) -> Result<Selection, Lacking> {
    let has = |name: &str| names.contains(&name);
    let own = [CONFIG, ADAPTER, RECORD, SOURCE_CONFIG, SOURCE_INDEX];
    let mut files: Vec<String> =
        own.iter().chain(&COMPANIONS).filter(|name| has(name)).map(|name| (*name).to_owned()).collect();
    if has(ADAPTER) {
        return Ok(Selection { files, index: None });
    }
    if !has(CONFIG) {
        return Err(Lacking::Config);
    }
    for [single, index] in FORMS {
        if let Some(name) = [single, index].into_iter().find(|name| has(name)) {
            files.push(name.to_owned());
            return Ok(Selection { files, index: (name == index).then_some(index) });
        }
    }
    let endings = [".gguf", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"];
    let weights = names.iter().filter(|name| endings.iter().any(|end| name.ends_with(end)));
    Err(Lacking::Weights(weights.map(|name| (*name).to_owned()).collect()))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files an index names, each once. Those that could lie outside the directory are refused.
pub(super) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: Index = serde_json::from_slice(index).map_err(|error| format!("not the JSON of an index: {error}"))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() {
        return Err("`weight_map` is empty: no file is named".to_owned());
    }
    match shards.iter().find(|shard| !is_plain_name(shard)) {
        Some(shard) => Err(format!("`{}` must be the plain name of a file beside the index", shard.escape_debug())),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_selected() {
        let names = [
            ".gitattributes",
            "README.md",
            "config.json",
            "flax_model.msgpack",
            "generation_config.json",
            "gpt2.gguf",
            "merges.txt",
            "model.safetensors",
            "onnx/config.json",
            "onnx/decoder_model.onnx",
            "pytorch_model.bin",
            "tf_model.h5",
            "tokenizer.json",
            "training_args.bin",
            "vocab.json",
        ];
        let mut selection = select(&names).expect("a model");
        selection.files.sort();
        let expected = "config.json generation_config.json merges.txt model.safetensors tokenizer.json vocab.json";
        assert_eq!(selection.files.join(" "), expected);
        assert_eq!(selection.index, None);
    }

    #[test]
    fn safetensors_come_before_pickles_and_one_file_before_shards() {
        let (safe, index) = ("model.safetensors", "model.safetensors.index.json");
        let (pickle, pickle_index) = ("pytorch_model.bin", "pytorch_model.bin.index.json");
        for (names, file, of_shards) in [
            (&[pickle, safe, index, pickle_index][..], safe, false),
            (&[pickle, index], index, true),
            (&[pickle, pickle_index], pickle, false),
            (&[pickle_index], pickle_index, true),
        ] {
            let selection = select(&[&[CONFIG], names].concat()).expect("a model");
            assert_eq!(selection.files, [CONFIG, file], "{names:?}");
            assert_eq!(selection.index, of_shards.then_some(file), "{names:?}");
        }
    }

    #[test]
    fn a_repository_that_is_no_model_says_what_is_lacking() {
        assert_eq!(select(&["model.safetensors"]), Err(Lacking::Config));
        let found = vec!["a.gguf".to_owned(), "tf_model.h5".to_owned()];
        assert_eq!(select(&[CONFIG, "README.md", "a.gguf", "tf_model.h5"]), Err(Lacking::Weights(found)));
        // An adapter has no weights of its own: opening it says what it is.
        let adapter = Selection { files: vec![ADAPTER.to_owned()], index: None };
        assert_eq!(select(&[ADAPTER, "adapter_model.safetensors"]), Ok(adapter));
    }

    #[test]
    fn a_converted_model_keeps_its_record() {
        let names =
            [CONFIG, "conversion.json", "source_config.json", "source_index.json", "model.safetensors", "README.md"];
        assert_eq!(select(&names).expect("a model").files, names[..5]);
    }

    #[test]
    fn shards_are_plain_names_each_once() {
        let index = |names: &str| shards(format!(r#"{{"metadata": {{}}, "weight_map": {{{names}}}}}"#).as_bytes());
        let found = index(r#""x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors""#).expect("shards");
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a.safetensors", "b.safetensors"]);
        for name in ["../x", "/x", "a/x", "..", "", "a\\\\x", "c:x", "x\\u0000"] {
            let error = index(&format!(r#""x": "{name}""#)).expect_err(name);
            assert!(error.contains("plain name"), "{name}: {error}");
        }
        assert!(index("").expect_err("nothing").contains("empty"));
        assert!(shards(b"[]").expect_err("a list").contains("not the JSON"));
    }
}
