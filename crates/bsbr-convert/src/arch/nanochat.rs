//! nanochat: norms without weights everywhere, on the embeddings and the heads too; rotary positions that turn backwards; an
//! MLP without a gate.

use bsbr_model::{Activation, HeadNorm, Norm};

use super::keys::{self, Defaults};
use super::names::{LLAMA_EMBED, LLAMA_HEAD, LLAMA_OUTPUT, copy, copy_if, map, map_if, table};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{HeadDim, Heads, KvHeads};
use crate::rules::Op::SwapHalves;
use crate::rules::When::Flag;
use crate::rules::{Architecture, Op, Rule, SourceModel, When};

pub(super) const NANOCHAT: Architecture = Architecture {
    id: "nanochat",
    version: 1,
    model_types: &["nanochat"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![LLAMA_EMBED, ATTENTION, LLAMA_OUTPUT, MLP, LLAMA_HEAD],
    read_config,
};

const BACKWARDS_QUERY: Op = SwapHalves { heads: Heads, head_dim: HeadDim };
const BACKWARDS_KEY: Op = SwapHalves { heads: KvHeads, head_dim: HeadDim };
const BIAS: When = Flag("attention_bias");

const ATTENTION: &[Rule] = &[
    map("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"], &[BACKWARDS_QUERY]),
    map("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], &[BACKWARDS_KEY]),
    copy("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
    map_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], &[BACKWARDS_QUERY], BIAS),
    map_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], &[BACKWARDS_KEY], BIAS),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], BIAS),
    copy_if("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], BIAS),
];

const MLP: &[Rule] = &[
    copy("{p}layers.{i}.mlp.fc1.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}layers.{i}.mlp.fc2.weight", &["layers.{i}.mlp.down.weight"]),
];

const DEFAULTS: Defaults =
    Defaults { norm: Norm::RmsPlain, activation: ("hidden_act", Activation::Relu2), ..Defaults::LLAMA };

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    // What a file says about the width of a head nothing reads.
    let mut model = keys::read(&config.without("head_dim"), &DEFAULTS)?;
    let decoder = &mut model.decoder;
    decoder.gated_mlp = false;
    decoder.embedding.norm = true;
    // After the rotation, which changes no length, or before it: that is the same.
    decoder.block.head_norm = Some(HeadNorm::Head);
    let cap = "final_logit_softcapping";
    decoder.head.softcap = if config.contains(cap) { config.optional_f64(cap)? } else { Some(15.0) };
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
