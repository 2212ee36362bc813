//! StableLM: Llama's names with LayerNorm and partial rotary positions. The 12B form runs attention and MLP side by side
//! on one norm and normalises every head with a weight of its own.

use bsbr_model::{BlockForm, HeadNorm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_OUTPUT, LLAMA_QKV, LLAMA_QKV_BIASES, copy, copy_if,
    table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{Heads, KvHeads};
use crate::rules::Op::Stack;
use crate::rules::Rule::Map;
use crate::rules::When::{Flag, Not};
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const STABLELM: Architecture = Architecture {
    id: "stablelm",
    version: 1,
    model_types: &["stablelm"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["use_parallel_residual", "qk_layernorm"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        NORMS,
        LLAMA_QKV,
        LLAMA_QKV_BIASES,
        HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const NORMS: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
    copy_if("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"], SEQUENTIAL),
    copy_if("{p}layers.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"], SEQUENTIAL),
    copy("{p}norm.bias", &["final_norm.bias"]),
];
const SEQUENTIAL: crate::rules::When = Not("use_parallel_residual");

const HEAD_NORMS: &[Rule] = &[
    Map {
        source: "{p}layers.{i}.self_attn.q_layernorm.norms.{j}.weight",
        targets: &["layers.{i}.attention.query_norm.weight"],
        ops: &[Stack { count: Heads }],
        when: Flag("qk_layernorm"),
    },
    Map {
        source: "{p}layers.{i}.self_attn.k_layernorm.norms.{j}.weight",
        targets: &["layers.{i}.attention.key_norm.weight"],
        ops: &[Stack { count: KvHeads }],
        when: Flag("qk_layernorm"),
    },
];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Layer,
    eps: ("layer_norm_eps", 1e-5),
    kv_heads: Some(32),
    max_positions: 4096,
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.25)), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let flag = |key| config.bool_or(key, false);
    let (bias, parallel, norms) = (flag("use_qkv_bias")?, flag("use_parallel_residual")?, flag("qk_layernorm")?);
    model.decoder.qkv_bias = bias;
    if parallel {
        model.decoder.block.form = BlockForm::ParallelSharedNorm;
    }
    model.decoder.block.head_norm = norms.then_some(HeadNorm::EachHead);
    model.flags.extend([("qkv_bias", bias), ("use_parallel_residual", parallel), ("qk_layernorm", norms)]);
    Ok(model)
}
