//! Phi 1, 1.5 and 2: one norm for attention and MLP side by side, partial rotary positions, biases everywhere, the head
//! included.

use bsbr_model::{Activation, BlockForm, Norm};

use super::keys::{self, Defaults};
use super::names::{LLAMA_EMBED, LLAMA_HEAD, LLAMA_QKV, LLAMA_QKV_BIASES, copy, table};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Reject, Rule, SourceModel};

pub(super) const PHI: Architecture = Architecture {
    id: "phi",
    version: 1,
    model_types: &["phi"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[Reject { key: "qk_layernorm", why: "there is no rule for norms of queries and keys" }],
    rules: table![LLAMA_EMBED, LLAMA_QKV, LLAMA_QKV_BIASES, REST, LLAMA_HEAD],
    read_config,
};

const REST: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
    copy("{p}layers.{i}.self_attn.dense.weight", &["layers.{i}.attention.output.weight"]),
    copy("{p}layers.{i}.self_attn.dense.bias", &["layers.{i}.attention.output.bias"]),
    copy("{p}layers.{i}.mlp.fc1.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}layers.{i}.mlp.fc1.bias", &["layers.{i}.mlp.up.bias"]),
    copy("{p}layers.{i}.mlp.fc2.weight", &["layers.{i}.mlp.down.weight"]),
    copy("{p}layers.{i}.mlp.fc2.bias", &["layers.{i}.mlp.down.bias"]),
    copy("{p}final_layernorm.weight", &["final_norm.weight"]),
    copy("{p}final_layernorm.bias", &["final_norm.bias"]),
    copy("lm_head.bias", &["head.bias"]),
];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Layer,
    eps: ("layer_norm_eps", 1e-5),
    activation: ("hidden_act", Activation::GeluTanh),
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.5)), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let decoder = &mut model.decoder;
    decoder.gated_mlp = false;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (true, true, true);
    decoder.head.bias = true;
    decoder.block.form = BlockForm::ParallelSharedNorm;
    model.flags.insert("qkv_bias", true);
    Ok(model)
}
