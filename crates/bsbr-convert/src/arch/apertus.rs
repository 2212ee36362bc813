//! Apertus: Llama's names but for those of the norms, norms of the heads, an MLP without a gate whose non-linearity has four
//! numbers of each layer.

use bsbr_model::{Activation, HeadNorm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_OUTPUT, LLAMA_QKV, copy,
    table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const APERTUS: Architecture = Architecture {
    id: "apertus",
    version: 1,
    model_types: &["apertus"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const NORMS: &[Rule] = &[
    copy("{p}layers.{i}.attention_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.feedforward_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
];

const MLP: &[Rule] = &[
    copy("{p}layers.{i}.mlp.up_proj.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"]),
    copy("{p}layers.{i}.mlp.act_fn.alpha_p", &["layers.{i}.mlp.xielu.alpha_p"]),
    copy("{p}layers.{i}.mlp.act_fn.alpha_n", &["layers.{i}.mlp.xielu.alpha_n"]),
    copy("{p}layers.{i}.mlp.act_fn.beta", &["layers.{i}.mlp.xielu.beta"]),
    copy("{p}layers.{i}.mlp.act_fn.eps", &["layers.{i}.mlp.xielu.eps"]),
];

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    max_positions: 65_536,
    rope: RopeKeys { theta_is_needed: true, ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    keys::stated_rope(config)?;
    if config.optional_str("hidden_act")?.is_some_and(|name| name != "xielu") {
        return Err(config.error("hidden_act", "xielu, the only one there is a rule for"));
    }
    let mut model = keys::read(&config.without("hidden_act"), &DEFAULTS)?;
    model.decoder.gated_mlp = false;
    model.decoder.activation = Activation::Xielu;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
