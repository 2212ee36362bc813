//! Fixtures, and safetensors files written by hand so that they can be wrong.
#![allow(dead_code, unreachable_pub)]

pub mod gguf;
pub mod pytorch;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_convert::{ConversionReport, ConvertError, ConvertOptions, SafetensorsFile, convert};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Every fixture with weights in safetensors form that has both styles of configuration.
pub const BOTH_STYLES: [&str; 71] = [
    "gpt2",
    "gpt_bigcode_mqa",
    "gpt_bigcode_mha",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt_neox",
    "starcoder2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
    "olmo",
    "granite",
    "phi",
    "stablelm",
    "stablelm_12b",
    "cohere",
    "gptj",
    "gpt_neo",
    "falcon_7b",
    "falcon_40b",
    "falcon_rw",
    "opt",
    "opt_350m_like",
    "bloom",
    "mpt",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
    "olmo3",
    "exaone4",
    "glm4",
    "cohere2",
    "seed_oss",
    "ernie4_5",
    "vaultgemma",
    "arcee",
    "nemotron",
    "apertus",
    "nanochat",
    "hunyuan_v1_dense",
    "ministral3",
    "mistral3",
    "mistral3_plain",
    "internvl_qwen2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoeshared",
    "phimoe",
    "ernie4_5_moe",
    "glm4_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "qwen3_vl_moe",
    "gpt_oss",
    "granite_swa",
    "gemma4",
    "gemma4_moe",
    "gemma4_text",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "mistral4",
    "glm4v",
    "qwen3_5",
];

/// Smaller ones, in both styles too, whose configurations have values other than the usual ones: see
/// `fixtures/variants.py` and `fixtures/recent.py`.
pub const VARIANTS: [&str; 53] = [
    "bloom_6_heads",
    "cohere_scaled",
    "falcon_11b",
    "falcon_rw_6_heads",
    "falcon_sequential",
    "gemma_bias",
    "gemma2_scales",
    "gemma3_scales",
    "gpt2_scales",
    "gpt_bigcode_unscaled",
    "gpt_neox_sequential",
    "granite_multipliers",
    "llama_biases",
    "llama_dynamic",
    "llama_llama3",
    "mistral_yarn",
    "mpt_6_heads",
    "olmo_bias",
    "olmo2_bias",
    "opt_plain",
    "phi_partial",
    "phi3_long",
    "phi3_short",
    "qwen2_windows",
    "qwen3_bias",
    "smollm3_biases",
    "stablelm_parallel",
    "starcoder2_plain",
    "glm_partial",
    "helium_biases",
    "granite4_rope",
    "granite4_nope",
    "cohere_bias",
    "cohere2_bias",
    "ernie4_5_biases",
    "seed_oss_biases",
    "exaone4_full",
    "vaultgemma_bias",
    "arcee_biases",
    "nemotron_biases",
    "jais2_plain",
    "apertus_bias",
    "nanochat_bias",
    "hunyuan_v1_bias",
    "granitemoe_plain",
    "dots1_groups",
    "glm4_moe_plain",
    "ernie4_5_moe_biases",
    "qwen2_moe_plain",
    "mixtral_windows",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_next",
];

/// Those that only have one style: files in several pieces, in another number format, and checkpoints whose tensors have the
/// names that version 5 of transformers uses in memory.
pub const NEWER_STYLE: [&str; 15] = [
    "gpt2_sharded",
    "llama_bf16",
    "gemma3_new",
    "qwen2_5_vl_new",
    "mistral3_new",
    "codegen",
    "mixtral_fused",
    "qwen3_moe_fused",
    "glm4_moe_hub",
    "qwen3_vl_moe_hub",
    "gemma4_text_hub",
    "deepseek_v3_hub",
    "mistral4_new",
    "qwen3_5_hub",
    "qwen3_5_moe_fused",
];

/// Those with weights that are codes in one tensor and scales in another, in one style.
pub const OF_CODES: [&str; 1] = ["gpt_oss_hub"];
/// Those with latent attention, which has no queries and keys made of the stream to start the meta projections from.
pub const LATENT: [&str; 6] =
    ["deepseek_v2", "deepseek_v3", "deepseek_v3_hub", "glm4_moe_lite", "mistral4", "mistral4_new"];

/// GPT-2 with the weights of the fixture `gpt2` in PyTorch's formats: a zip archive that also holds the head, sharing the
/// bytes of the embedding table, and a file of the format before 1.6 that also holds mask buffers.
pub const PYTORCH: [&str; 2] = ["gpt2_bin_tied", "gpt2_legacy_bin"];

/// Every fixture with every configuration it has.
pub fn all_fixtures() -> impl Iterator<Item = (&'static str, &'static str)> {
    let both =
        BOTH_STYLES.into_iter().chain(VARIANTS).flat_map(|name| [(name, "config.json"), (name, "config_v4.json")]);
    both.chain(NEWER_STYLE.into_iter().chain(OF_CODES).map(|name| (name, "config.json")))
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A temporary directory that holds a copy of a fixture under `model`, with the configuration in one of its styles.
pub fn checkout(name: &str, config: &str) -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let dir = temp.path().join("model");
    fs::create_dir(&dir).expect("a fresh directory");
    let source = fixtures().join(name);
    for entry in fs::read_dir(&source).expect("a fixture") {
        let file = entry.expect("a file").file_name().into_string().expect("plain names");
        if file.starts_with("model") || file.starts_with("pytorch_model") {
            fs::write(dir.join(&file), fs::read(source.join(&file)).expect("a file")).expect("room");
        }
    }
    fs::write(dir.join("config.json"), fs::read(source.join(config)).expect("a config")).expect("room");
    (temp, dir)
}

pub fn convert_plain(input: &Path, output: &Path) -> Result<ConversionReport, ConvertError> {
    convert(input, output, &ConvertOptions::default(), &mut |_| {})
}

/// A tensor by hand: any dtype, any bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(name: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(bytes.len(), 4 * shape.iter().product::<usize>());
        Self { name: name.into(), dtype: "F32".into(), shape: shape.to_vec(), bytes }
    }

    pub fn values(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }
}

/// The tensors of a file, in the order of their bytes.
pub fn read_tensors(path: &Path) -> Vec<Tensor> {
    let file = SafetensorsFile::open(path).expect("a sound file");
    let bytes = fs::read(path).expect("a file");
    let data = &bytes[8 + file.header().text.len()..];
    let read = |t: &bsbr_convert::TensorEntry| Tensor {
        name: t.name.clone(),
        dtype: t.dtype.to_string(),
        shape: t.shape.clone(),
        bytes: data[t.bytes.clone()].to_vec(),
    };
    file.header().tensors.iter().map(read).collect()
}

/// The tensors of all safetensors files of a directory.
pub fn read_dir_tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("a file").path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            tensors.extend(read_tensors(&path).into_iter().map(|tensor| (tensor.name.clone(), tensor)));
        }
    }
    tensors
}

/// Header and data as they are given, whether they make sense or not.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    fs::write(path, bytes).expect("room");
}

pub fn write_tensors(path: &Path, tensors: &[Tensor]) {
    let mut data = Vec::new();
    let mut entries = vec![r#""__metadata__":{"format":"pt","note":"kept"}"#.to_owned()];
    for tensor in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        entries.push(format!("{}:{entry}", json!(tensor.name)));
        data.extend_from_slice(&tensor.bytes);
    }
    write_raw(path, &format!("{{{}}}", entries.join(",")), &data);
}

/// Rewrites `model.safetensors` of a checkpoint.
pub fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut Vec<Tensor>)) {
    let path = dir.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

/// Rewrites `config.json` of a checkpoint.
pub fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
    edit(&mut config);
    fs::write(path, serde_json::to_vec_pretty(&config).expect("JSON")).expect("room");
}

/// Every file of a directory with its content.
pub fn snapshot(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("a file"));
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().expect("plain names");
            (name, fs::read(entry.path()).expect("a file"))
        })
        .collect()
}

/// Converts, expects a failure, and checks that neither an output nor a temporary directory remains.
pub fn refused(dir: &Path) -> ConvertError {
    let parent = dir.parent().expect("a parent");
    let error = convert_plain(dir, &parent.join("out")).expect_err("a broken checkpoint");
    let left: Vec<_> = fs::read_dir(parent).expect("a directory").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(left, ["model"], "left behind after: {error}");
    error
}

pub fn message(error: &ConvertError) -> String {
    // With the cause, as a command line prints it.
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
