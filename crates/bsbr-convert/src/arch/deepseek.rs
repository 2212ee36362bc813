//! Mixtures with the router of DeepSeek-V3 and the attention of others: GLM-4.5 to 4.7 and dots.llm1.

use bsbr_model::{ExpertGroups, HeadNorm, RouterConfig, RouterKind};

use super::experts::{self, CORRECTION, DEEPSEEK_SHARED, DENSE_MLP, EXPERTS, ExpertKeys, LAYOUTS, MLP_GATE};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_NORMS, LLAMA_OUTPUT,
    LLAMA_QKV, LLAMA_QKV_BIASES, copy_if, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::IgnorePart;
use crate::rules::When::{self, Flag};
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const GLM4_MOE: Architecture = Architecture {
    id: "glm4_moe",
    version: 1,
    model_types: &["glm4_moe"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "use_qk_norm"],
    layouts: LAYOUTS,
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_QKV_BIASES,
        HEAD_NORMS,
        LLAMA_OUTPUT,
        DENSE_MLP,
        MLP_GATE,
        GATE_CORRECTION,
        EXPERTS,
        DEEPSEEK_SHARED,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_glm4_moe,
};

pub(super) const DOTS1: Architecture = Architecture {
    id: "dots1",
    model_types: &["dots1"],
    alternatives: &["attention_bias"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        DENSE_MLP,
        MLP_GATE,
        GATE_CORRECTION,
        EXPERTS,
        DEEPSEEK_SHARED,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_dots1,
    ..GLM4_MOE
};

pub(super) const GATE_CORRECTION: &[Rule] =
    &[copy_if("{p}layers.{i}.mlp.gate.e_score_correction_bias", &[CORRECTION], When::Experts)];

const HEAD_NORMS: &[Rule] = &[
    copy_if("{p}layers.{i}.self_attn.q_norm.weight", &["layers.{i}.attention.query_norm.weight"], Flag("use_qk_norm")),
    copy_if("{p}layers.{i}.self_attn.k_norm.weight", &["layers.{i}.attention.key_norm.weight"], Flag("use_qk_norm")),
];

pub(super) const NEXT_TOKENS: &[Rule] =
    &[IgnorePart { start: "{p}layers.{i}.", why: "a layer that predicts the token after next" }];

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    kv_heads: Some(8),
    max_positions: 131_072,
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.5)), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["n_routed_experts", "num_experts", "num_local_experts"], None),
    chosen: (&["num_experts_per_tok"], None),
    size: (&["moe_intermediate_size"], Some(1408)),
};

fn read_glm4_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let (bias, normed) = (config.bool_or("attention_bias", false)?, config.bool_or("use_qk_norm", false)?);
    keys::set_attention_biases(&mut model, bias, false);
    model.flags.extend([("attention_bias", bias), ("use_qk_norm", normed)]);
    model.decoder.block.head_norm = normed.then_some(HeadNorm::Head);
    let keys = ExpertKeys { count: (KEYS.count.0, Some(128)), chosen: (KEYS.chosen.0, Some(8)), ..KEYS };
    read_experts(config, &mut model, &keys, (Some(1), 1, true))?;
    Ok(model)
}

fn read_dots1(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-6),
        kv_heads: Some(32),
        max_positions: 2048,
        rope: RopeKeys::LLAMA,
        ..DEFAULTS
    };
    let mut model = keys::read(config, &defaults)?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    let first = config.optional_usize("max_window_layers")?.unwrap_or(62);
    let window = keys::window(config, 4096)?;
    model.decoder.windows = keys::layer_windows(config, model.decoder.layers, window, |layer| layer >= first)?;
    read_experts(config, &mut model, &KEYS, (None, 0, false))?;
    Ok(model)
}

/// Experts behind some dense layers, with the defaults of the class: shared experts, dense layers, normalised weights.
fn read_experts(
    config: &ConfigFile,
    model: &mut SourceModel,
    keys: &ExpertKeys,
    (shared, dense, normalised): (Option<usize>, usize, bool),
) -> Result<(), ConvertError> {
    let number = |key: &str, default: usize| Ok::<_, ConvertError>(config.optional_usize(key)?.unwrap_or(default));
    let groups = ExpertGroups { count: number("n_group", 1)?, kept: number("topk_group", 1)?, by_highest: false };
    let router = RouterConfig {
        kind: RouterKind::Sigmoid,
        bias: false,
        correction: true,
        groups: Some(groups).filter(|groups| groups.count != 1),
        normalised: experts::read_normalised(config, normalised)?,
        scale: config.optional_f64("routed_scaling_factor")?.filter(|&scale| scale != 1.0),
        expert_scale: false,
        own_norm: false,
    };
    experts::read(config, model, keys, router)?;
    // As many as one that is as many times as wide.
    let shared = config.optional_usize("n_shared_experts")?.or(shared).unwrap_or(0);
    let size = model.decoder.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
    experts::share(model, shared.saturating_mul(size), false);
    let dense = number("first_k_dense_replace", dense)?;
    experts::keep_in(model, |layer| layer >= dense);
    model.next_token_layers =
        keys::optional_usize_of(config, &["num_nextn_predict_layers", "num_mtp_layers"])?.unwrap_or(0);
    Ok(())
}
