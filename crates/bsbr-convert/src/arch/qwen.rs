//! Qwen 2, 2.5 and 3: Llama's names. Qwen 2 has biases on queries, keys and values and no key to say so, Qwen 3 norms of
//! queries and keys instead.

use bsbr_model::HeadNorm;

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, LLAMA_QKV_BIASES, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const QWEN2: Architecture = Architecture {
    id: "qwen2",
    version: 1,
    model_types: &["qwen2"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_qwen2,
};

pub(super) const QWEN3: Architecture = Architecture {
    id: "qwen3",
    version: 1,
    model_types: &["qwen3"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_qwen3,
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(32), max_positions: 32768, ..Defaults::LLAMA };

fn read_qwen2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.qkv_bias = true;
    model.flags.insert("qkv_bias", true);
    model.decoder.windows = windows(config, model.decoder.layers)?;
    Ok(model)
}

fn read_qwen3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &Defaults { head_dim: Some(128), ..DEFAULTS })?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    model.decoder.windows = windows(config, model.decoder.layers)?;
    Ok(model)
}

/// A window only where it is switched on, and then in the upper layers.
fn windows(config: &ConfigFile, layers: usize) -> Result<Vec<Option<usize>>, ConvertError> {
    let on = config.bool_or("use_sliding_window", false)?;
    let stated = config.optional_usize("sliding_window")?;
    let window = if config.contains("sliding_window") { stated } else { Some(4096) };
    let first = config.optional_usize("max_window_layers")?.unwrap_or(28);
    keys::layer_windows(config, layers, window.filter(|_| on), |layer| layer >= first)
}
