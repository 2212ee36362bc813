//! GLM-4: gate and up in one tensor, rotary positions that pair neighbours in half of each head, biases on queries, keys and
//! values; the later form has a norm on either side of attention and MLP.

use bsbr_model::BlockForm;

use super::keys::{self, Defaults};
use super::names::{
    FUSED_MLP, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, NEIGHBOURS_QKV,
    NEIGHBOURS_QKV_BIASES, copy, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const GLM: Architecture = Architecture {
    id: "glm",
    version: 1,
    model_types: &["glm"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        FUSED_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

pub(super) const GLM4: Architecture = Architecture {
    id: "glm4",
    model_types: &["glm4"],
    rules: table![
        LLAMA_EMBED,
        SANDWICH_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        FUSED_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_glm4,
    ..GLM
};

/// The decoder of GLM-4.1V: that of GLM-4 with biases in every file.
pub(super) const GLM4V: Architecture =
    Architecture { id: "glm4v_text", model_types: &["glm4v_text"], alternatives: &[], read_config: read_glm4v, ..GLM4 };

/// The third stands before the MLP, as in Llama.
const SANDWICH_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.post_self_attn_layernorm.weight", &["layers.{i}.attention_post_norm.weight"]),
    copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
    copy("{p}layers.{i}.post_mlp_layernorm.weight", &["layers.{i}.mlp_post_norm.weight"]),
];

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1.5625e-7),
    head_dim: Some(128),
    kv_heads: Some(2),
    max_positions: 131_072,
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.5)), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let bias = config.bool_or("attention_bias", true)?;
    keys::set_attention_biases(&mut model, bias, false);
    model.flags.insert("attention_bias", bias);
    Ok(model)
}

fn read_glm4(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read_config(config)?;
    model.decoder.block.form = BlockForm::Sandwich;
    Ok(model)
}

fn read_glm4v(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = RopeKeys { part: Some(("partial_rotary_factor", 1.0)), mrope: true, ..RopeKeys::LLAMA };
    let defaults = Defaults { eps: ("rms_norm_eps", 1e-5), head_dim: None, max_positions: 32_768, rope, ..DEFAULTS };
    let mut model = keys::read(config, &defaults)?;
    keys::set_attention_biases(&mut model, true, false);
    model.decoder.block.form = BlockForm::Sandwich;
    Ok(model)
}
