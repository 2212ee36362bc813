//! Helium: Llama's names with rotary positions that pair neighbours; no bias on the output of attention, whatever the keys.

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS, LLAMA_OUTPUT, NEIGHBOURS_QKV,
    NEIGHBOURS_QKV_BIASES, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const HELIUM: Architecture = Architecture {
    id: "helium",
    version: 1,
    model_types: &["helium"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "mlp_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-8),
    head_dim: Some(128),
    kv_heads: Some(20),
    max_positions: 4096,
    rope: RopeKeys { theta: ("rope_theta", 1e5), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let bias = config.bool_or("attention_bias", false)?;
    keys::set_attention_biases(&mut model, bias, false);
    model.flags.insert("attention_bias", bias);
    keys::read_mlp_bias(config, &mut model)?;
    Ok(model)
}
