//! GPT-NeoX and Pythia: attention and MLP side by side, each behind its own norm; partial rotary positions; queries, keys
//! and values interleaved head by head.

use bsbr_model::{Activation, BlockForm, Norm};

use super::keys::{self, Defaults};
use super::names::{QKV_BIAS, QKV_PER_HEAD, QKV_WEIGHT, copy, copy_if, map};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Map, Tie};
use crate::rules::When::Flag;
use crate::rules::{Architecture, SourceModel};

pub(super) const GPT_NEOX: Architecture = Architecture {
    id: "gpt_neox",
    version: 1,
    model_types: &["gpt_neox"],
    prefixes: &["gpt_neox.", ""],
    anchor: "{p}embed_in.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[],
    rules: &[
        copy("{p}embed_in.weight", &["embed.weight"]),
        copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
        copy("{p}layers.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
        map("{p}layers.{i}.attention.query_key_value.weight", QKV_WEIGHT, &[QKV_PER_HEAD]),
        Map {
            source: "{p}layers.{i}.attention.query_key_value.bias",
            targets: QKV_BIAS,
            ops: &[QKV_PER_HEAD],
            when: Flag("attention_bias"),
        },
        copy("{p}layers.{i}.attention.dense.weight", &["layers.{i}.attention.output.weight"]),
        copy_if("{p}layers.{i}.attention.dense.bias", &["layers.{i}.attention.output.bias"], Flag("attention_bias")),
        copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
        copy("{p}layers.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"]),
        copy("{p}layers.{i}.mlp.dense_h_to_4h.weight", &["layers.{i}.mlp.up.weight"]),
        copy("{p}layers.{i}.mlp.dense_h_to_4h.bias", &["layers.{i}.mlp.up.bias"]),
        copy("{p}layers.{i}.mlp.dense_4h_to_h.weight", &["layers.{i}.mlp.down.weight"]),
        copy("{p}layers.{i}.mlp.dense_4h_to_h.bias", &["layers.{i}.mlp.down.bias"]),
        copy("{p}final_layer_norm.weight", &["final_norm.weight"]),
        copy("{p}final_layer_norm.bias", &["final_norm.bias"]),
        Tie { head: "embed_out.weight", embed: "{p}embed_in.weight", target: "head.weight" },
        Ignore { name: "{p}layers.{i}.attention.bias", why: "the causal mask" },
        Ignore { name: "{p}layers.{i}.attention.masked_bias", why: "the score of a masked position" },
        Ignore { name: "{p}layers.{i}.attention.rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
        Ignore { name: "{p}rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
    ],
    read_config,
};

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Layer,
    eps: ("layer_norm_eps", 1e-5),
    activation: ("hidden_act", Activation::GeluErf),
    rope: RopeKeys {
        theta: ("rotary_emb_base", 10_000.0),
        part: Some(("rotary_pct", 0.25)),
        repeated: true,
        ..RopeKeys::LLAMA
    },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let bias = config.bool_or("attention_bias", true)?;
    let decoder = &mut model.decoder;
    decoder.gated_mlp = false;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (bias, bias, true);
    if config.bool_or("use_parallel_residual", true)? {
        decoder.block.form = BlockForm::Parallel;
    }
    model.flags.insert("attention_bias", bias);
    Ok(model)
}
