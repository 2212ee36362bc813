//! StarCoder 2: Llama's names with LayerNorm and a plain MLP.

use bsbr_model::{Activation, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, copy, copy_if, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::When::Flag;
use crate::rules::{Architecture, Rule, SourceModel, When};

pub(super) const STARCODER2: Architecture = Architecture {
    id: "starcoder2",
    version: 1,
    model_types: &["starcoder2"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["use_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![LLAMA_EMBED, LLAMA_NORMS, LLAMA_QKV, LLAMA_OUTPUT, MLP, BIASES, LLAMA_FINAL_NORM, LLAMA_HEAD],
    read_config,
};

const MLP: &[Rule] = &[
    copy("{p}layers.{i}.mlp.c_fc.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}layers.{i}.mlp.c_proj.weight", &["layers.{i}.mlp.down.weight"]),
];

const BIASES: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
    copy("{p}layers.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"]),
    copy("{p}norm.bias", &["final_norm.bias"]),
    copy_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], USE_BIAS),
    copy_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], USE_BIAS),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], USE_BIAS),
    copy_if("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], USE_BIAS),
    copy_if("{p}layers.{i}.mlp.c_fc.bias", &["layers.{i}.mlp.up.bias"], USE_BIAS),
    copy_if("{p}layers.{i}.mlp.c_proj.bias", &["layers.{i}.mlp.down.bias"], USE_BIAS),
];
const USE_BIAS: When = Flag("use_bias");

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Layer,
    eps: ("norm_epsilon", 1e-5),
    activation: ("hidden_act", Activation::GeluTanh),
    kv_heads: Some(2),
    max_positions: 4096,
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let bias = config.bool_or("use_bias", true)?;
    let window = config.optional_usize("sliding_window")?;
    let decoder = &mut model.decoder;
    decoder.gated_mlp = false;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (bias, bias, bias);
    decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); decoder.layers]);
    model.flags.insert("use_bias", bias);
    Ok(model)
}
