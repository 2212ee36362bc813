//! Hunyuan and its mixtures of experts: Llama's names, heads normalised after they are rotated, and a rotary base that one key raises.

use bsbr_model::HeadNorm;

use super::experts::{self, EXPERTS, ExpertKeys, HUNYUAN_SHARED, LAYOUTS, MLP_GATE_WG, NORMALISED_SOFTMAX};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV,
    copy, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Reject, Rule, SourceModel};

pub(super) const HUNYUAN: Architecture = Architecture {
    id: "hunyuan_v1_dense",
    version: 1,
    model_types: &["hunyuan_v1_dense"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[Reject { key: "use_cla", why: "no layer reads keys and values of another" }],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read,
};

pub(super) const HEAD_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.self_attn.query_layernorm.weight", &["layers.{i}.attention.query_norm.weight"]),
    copy("{p}layers.{i}.self_attn.key_layernorm.weight", &["layers.{i}.attention.key_norm.weight"]),
];

pub(super) const HUNYUAN_MOE: Architecture = Architecture {
    id: "hunyuan_v1_moe",
    model_types: &["hunyuan_v1_moe"],
    layouts: LAYOUTS,
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        MLP_GATE_WG,
        EXPERTS,
        HUNYUAN_SHARED,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_moe,
    ..HUNYUAN
};

fn read_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let config = &["num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size"]
        .iter()
        .try_fold(config.clone(), |config, key| with_one_for_all(&config, key))?;
    let mut model = read(config)?;
    let keys = ExpertKeys {
        count: (&["num_experts", "num_local_experts"], Some(1)),
        chosen: (&["moe_topk", "num_experts_per_tok"], Some(1)),
        size: (&["intermediate_size"], None),
    };
    let size = model.decoder.intermediate_size;
    for key in ["moe_intermediate_size", "num_shared_expert"] {
        let only = if key == "num_shared_expert" { 1 } else { size };
        if config.optional_usize(key)?.is_some_and(|found| found != only) {
            let expected = format!("{only}: experts are as wide as `intermediate_size`, and one is shared");
            return Err(config.error(key, &expected));
        }
    }
    experts::read(config, &mut model, &keys, NORMALISED_SOFTMAX)?;
    experts::share(&mut model, size, false);
    Ok(model)
}

/// A key that may be a list with one number a layer, which must then all be the same.
fn with_one_for_all(config: &ConfigFile, key: &str) -> Result<ConfigFile, ConvertError> {
    let Some(list) = config.get(key).and_then(serde_json::Value::as_array) else { return Ok(config.clone()) };
    match list.split_first() {
        Some((first, others)) if others.iter().all(|other| other == first) => Ok(config.with(key, first.clone())),
        _ => Err(config.error(key, "one number, or the same for every layer")),
    }
}

const DEFAULTS: Defaults =
    Defaults { eps: ("rms_norm_eps", 1e-5), rope: RopeKeys { alpha: true, ..RopeKeys::LLAMA }, ..Defaults::LLAMA };

/// What Hunyuan and its mixtures of experts have in common.
pub(super) fn read(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    if !config.bool_or("use_qk_norm", true)? {
        return Err(config.error("use_qk_norm", "true or absent: heads are always normalised"));
    }
    let width = keys::optional_usize_of(config, &["head_dim", "attention_head_dim"])?;
    let config = &width.map_or_else(|| config.clone(), |width| config.with("head_dim", width.into()));
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    model.decoder.block.head_norm_after_rotary = true;
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
