//! ERNIE 4.5: Llama's names with rotary positions that pair neighbours, and one key for all biases.

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS, LLAMA_OUTPUT,
    LLAMA_OUTPUT_BIAS, NEIGHBOURS_QKV, NEIGHBOURS_QKV_BIASES, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const ERNIE: Architecture = Architecture {
    id: "ernie4_5",
    version: 1,
    model_types: &["ernie4_5"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["use_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    head_dim: Some(128),
    kv_heads: Some(2),
    max_positions: 131_072,
    rope: RopeKeys { theta: ("rope_theta", 5e5), ..RopeKeys::LLAMA },
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read(config, &DEFAULTS)
}

/// What ERNIE 4.5 and its mixtures of experts have in common.
pub(super) fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    let bias = config.bool_or("use_bias", false)?;
    keys::set_attention_biases(&mut model, bias, bias);
    model.decoder.mlp_bias = bias;
    model.flags.extend([("mlp_bias", bias), ("use_bias", bias)]);
    Ok(model)
}
