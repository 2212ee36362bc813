//! Qwen 2, 2.5 and 3: Llama's names. Qwen 2 has biases on queries, keys and values and no key to say so, Qwen 3 norms of
//! queries and keys instead.

use bsbr_model::HeadNorm;

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, LLAMA_QKV_BIASES, table,
};
use super::rope::RopeKeys;
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
    layouts: &[],
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
    layouts: &[],
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

/// The decoder of Qwen2-VL and Qwen2.5-VL.
pub(super) const QWEN2_VL: Architecture = Architecture {
    id: "qwen2_vl_text",
    model_types: &["qwen2_vl_text", "qwen2_5_vl_text"],
    read_config: read_qwen2_vl,
    ..QWEN2
};

/// The decoder of Qwen3-VL.
pub(super) const QWEN3_VL: Architecture =
    Architecture { id: "qwen3_vl_text", model_types: &["qwen3_vl_text"], read_config: read_qwen3_vl, ..QWEN3 };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(32), max_positions: 32768, ..Defaults::LLAMA };

const VL_DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    kv_heads: Some(8),
    rope: RopeKeys { theta: ("rope_theta", 1e6), mrope: true, ..RopeKeys::LLAMA },
    ..DEFAULTS
};

fn read_qwen2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read_biased(config, &DEFAULTS, 28)
}

fn read_qwen2_vl(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read_biased(config, &VL_DEFAULTS, 80)
}

/// `first` is the default of the first layer with a window.
fn read_biased(config: &ConfigFile, defaults: &Defaults, first: usize) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    model.decoder.qkv_bias = true;
    model.flags.insert("qkv_bias", true);
    model.decoder.windows = windows(config, model.decoder.layers, first)?;
    Ok(model)
}

fn read_qwen3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read_normed(config, &Defaults { head_dim: Some(128), ..DEFAULTS })?;
    model.decoder.windows = windows(config, model.decoder.layers, 28)?;
    Ok(model)
}

fn read_qwen3_vl(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = RopeKeys { theta: ("rope_theta", 5e5), ..VL_DEFAULTS.rope };
    read_normed(config, &Defaults { head_dim: Some(128), max_positions: 128_000, rope, ..DEFAULTS })
}

fn read_normed(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}

/// A window only where it is switched on, and then in the upper layers.
fn windows(config: &ConfigFile, layers: usize, first: usize) -> Result<Vec<Option<usize>>, ConvertError> {
    let on = config.bool_or("use_sliding_window", false)?;
    let stated = config.optional_usize("sliding_window")?;
    let window = if config.contains("sliding_window") { stated } else { Some(4096) };
    let first = config.optional_usize("max_window_layers")?.unwrap_or(first);
    keys::layer_windows(config, layers, window.filter(|_| on), |layer| layer >= first)
}
