//! ERNIE 4.5: Llama's names with rotary positions that pair neighbours, and one key for all biases; its mixtures of experts
//! correct the choice of their router.

use bsbr_model::RouterConfig;

use super::experts::{
    self, CORRECTION, DEEPSEEK_SHARED, DENSE_MLP, EACH, EXPERTS, ExpertKeys, LAYOUTS, MLP_GATE, NORMALISED_SOFTMAX,
    ONLY, SHARED_EXPERT, TOGETHER,
};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS, LLAMA_OUTPUT,
    LLAMA_OUTPUT_BIAS, NEIGHBOURS_QKV, NEIGHBOURS_QKV_BIASES, copy_if, map_if, table,
};
use super::phimoe::HEAD_BIAS;
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::IgnorePart;
use crate::rules::When::{All, Flag};
use crate::rules::{Architecture, Rule, SourceModel, When};

pub(super) const ERNIE: Architecture = Architecture {
    id: "ernie4_5",
    version: 1,
    model_types: &["ernie4_5"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["use_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

pub(super) const ERNIE_MOE: Architecture = Architecture {
    id: "ernie4_5_moe",
    model_types: &["ernie4_5_moe"],
    layouts: LAYOUTS,
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        DENSE_MLP,
        DENSE_BIASES,
        MLP_GATE,
        ROUTER_CORRECTION,
        EXPERTS,
        DEEPSEEK_SHARED,
        SHARED_BIASES,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD,
        HEAD_BIAS
    ],
    read_config: read_moe,
    ..ERNIE
};

const DENSE_BIASED: When = All(&[When::Dense, Flag("mlp_bias")]);
const DENSE_BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.gate_proj.bias", &["layers.{i}.mlp.gate.bias"], DENSE_BIASED),
    copy_if("{p}layers.{i}.mlp.up_proj.bias", &["layers.{i}.mlp.up.bias"], DENSE_BIASED),
    copy_if("{p}layers.{i}.mlp.down_proj.bias", &["layers.{i}.mlp.down.bias"], DENSE_BIASED),
];

const SHARED_BIASED: When = All(&[When::Experts, Flag("mlp_bias"), Flag(SHARED_EXPERT)]);
const SHARED_BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.shared_experts.gate_proj.bias", &["layers.{i}.mlp.shared.gate.bias"], SHARED_BIASED),
    copy_if("{p}layers.{i}.mlp.shared_experts.up_proj.bias", &["layers.{i}.mlp.shared.up.bias"], SHARED_BIASED),
    copy_if("{p}layers.{i}.mlp.shared_experts.down_proj.bias", &["layers.{i}.mlp.shared.down.bias"], SHARED_BIASED),
];

/// In a list of its own in files, and below the router in memory.
const ROUTER_CORRECTION: &[Rule] = &[
    map_if("{p}layers.{i}.mlp.moe_statics.e_score_correction_bias", &[CORRECTION], &[ONLY], EACH),
    map_if("{p}layers.{i}.mlp.gate.moe_statics.e_score_correction_bias", &[CORRECTION], &[ONLY], TOGETHER),
];

/// Under a name of their own, beside the layers.
const NEXT_TOKENS: &[Rule] = &[
    IgnorePart { start: "{p}mtp_block.", why: NEXT },
    IgnorePart { start: "{p}mtp_emb_norm.", why: NEXT },
    IgnorePart { start: "{p}mtp_hidden_norm.", why: NEXT },
    IgnorePart { start: "{p}mtp_linear_proj.", why: NEXT },
];
const NEXT: &str = "a layer that predicts the token after next";

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["moe_num_experts", "num_experts", "num_local_experts"], Some(64)),
    chosen: (&["moe_k", "num_experts_per_tok"], Some(6)),
    size: (&["moe_intermediate_size"], Some(1536)),
};

fn read_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read(config, &Defaults { head_dim: None, kv_heads: Some(4), ..DEFAULTS })?;
    model.decoder.head.bias = model.decoder.mlp_bias;
    model.flags.insert("lm_head_bias", model.decoder.mlp_bias);
    let least = config.optional_f64("moe_norm_min")?.unwrap_or(1e-12);
    let router = RouterConfig { correction: true, normalised: Some(least), ..NORMALISED_SOFTMAX };
    experts::read(config, &mut model, &KEYS, router)?;
    let number = |key: &str, default: usize| Ok::<_, ConvertError>(config.optional_usize(key)?.unwrap_or(default));
    let shared = number("moe_num_shared_experts", 2)?;
    let size = model.decoder.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
    experts::share(&mut model, shared.saturating_mul(size), false);
    let (start, interval) = (number("moe_layer_start_index", 1)?, number("moe_layer_interval", 1)?);
    let end = match config.get("moe_layer_end_index").and_then(serde_json::Value::as_i64) {
        Some(-1) => None,
        _ => config.optional_usize("moe_layer_end_index")?,
    };
    if interval == 0 {
        return Err(config.error("moe_layer_interval", "1 or more"));
    }
    let within = |layer: usize| layer >= start && end.is_none_or(|end| layer <= end);
    experts::keep_in(&mut model, |layer| within(layer) && (layer + 1).is_multiple_of(interval));
    Ok(model)
}

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    head_dim: Some(128),
    kv_heads: Some(2),
    max_positions: 131_072,
    rope: RopeKeys { theta: ("rope_theta", 5e5), ..RopeKeys::LLAMA },
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read(config, &DEFAULTS)
}

/// What ERNIE 4.5 and its mixtures of experts have in common.
pub(super) fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    let bias = config.bool_or("use_bias", false)?;
    keys::set_attention_biases(&mut model, bias, bias);
    model.decoder.mlp_bias = bias;
    model.flags.extend([("mlp_bias", bias), ("use_bias", bias)]);
    Ok(model)
}
