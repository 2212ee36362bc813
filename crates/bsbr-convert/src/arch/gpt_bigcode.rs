//! GPT-BigCode (StarCoder 1, SantaCoder): the names of GPT-2 with linear weights `[out, in]`.
//!
//! The fused query, key and value are `[Q; K; V]` with one KV head (`multi_query`), but interleaved head by head
//! otherwise. A wrong choice between the two orders changes no shape, so the configuration alone decides.

use bsbr_model::Activation;

use super::gpt2::{HEADS, read_gpt2_keys};
use super::keys;
use super::names::{QKV, QKV_BIAS, QKV_PER_HEAD, QKV_WEIGHT, copy};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Map, Tie};
use crate::rules::When::{Flag, Not};
use crate::rules::{Architecture, Reject, SourceModel};

pub(super) const GPT_BIGCODE: Architecture = Architecture {
    id: "gpt_bigcode",
    version: 1,
    model_types: &["gpt_bigcode"],
    prefixes: &["transformer.", ""],
    anchor: "{p}wte.weight",
    alternatives: &["multi_query"],
    layouts: &[],
    rejects: &[Reject { key: "add_cross_attention", why: "the decoder has no cross-attention" }],
    rules: &[
        copy("{p}wte.weight", &["embed.weight"]),
        copy("{p}wpe.weight", &["position.weight"]),
        copy("{p}h.{i}.ln_1.weight", &["layers.{i}.attention_norm.weight"]),
        copy("{p}h.{i}.ln_1.bias", &["layers.{i}.attention_norm.bias"]),
        Map { source: C_ATTN_WEIGHT, targets: QKV_WEIGHT, ops: &[QKV], when: Flag("multi_query") },
        Map { source: C_ATTN_BIAS, targets: QKV_BIAS, ops: &[QKV], when: Flag("multi_query") },
        Map { source: C_ATTN_WEIGHT, targets: QKV_WEIGHT, ops: &[QKV_PER_HEAD], when: Not("multi_query") },
        Map { source: C_ATTN_BIAS, targets: QKV_BIAS, ops: &[QKV_PER_HEAD], when: Not("multi_query") },
        copy("{p}h.{i}.attn.c_proj.weight", &["layers.{i}.attention.output.weight"]),
        copy("{p}h.{i}.attn.c_proj.bias", &["layers.{i}.attention.output.bias"]),
        copy("{p}h.{i}.ln_2.weight", &["layers.{i}.mlp_norm.weight"]),
        copy("{p}h.{i}.ln_2.bias", &["layers.{i}.mlp_norm.bias"]),
        copy("{p}h.{i}.mlp.c_fc.weight", &["layers.{i}.mlp.up.weight"]),
        copy("{p}h.{i}.mlp.c_fc.bias", &["layers.{i}.mlp.up.bias"]),
        copy("{p}h.{i}.mlp.c_proj.weight", &["layers.{i}.mlp.down.weight"]),
        copy("{p}h.{i}.mlp.c_proj.bias", &["layers.{i}.mlp.down.bias"]),
        copy("{p}ln_f.weight", &["final_norm.weight"]),
        copy("{p}ln_f.bias", &["final_norm.bias"]),
        Tie { head: "lm_head.weight", embed: "{p}wte.weight", target: "head.weight" },
        Ignore { name: "{p}bias", why: "the causal mask" },
        Ignore { name: "{p}h.{i}.attn.bias", why: "the causal mask" },
        Ignore { name: "{p}h.{i}.attn.masked_bias", why: "the score of a masked position" },
    ],
    read_config,
};

const C_ATTN_WEIGHT: &str = "{p}h.{i}.attn.c_attn.weight";
const C_ATTN_BIAS: &str = "{p}h.{i}.attn.c_attn.bias";

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let multi_query = config.bool_or("multi_query", true)?;
    let kv_heads = if multi_query { 1 } else { keys::usize_of(config, HEADS)? };
    let mut model = read_gpt2_keys(config, kv_heads, Activation::GeluTanh)?;
    model.flags.insert("multi_query", multi_query);
    Ok(model)
}
