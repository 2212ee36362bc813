//! Mixtral: Mistral with experts. MiniMax M2: the same with norms of all queries and all keys, part of each head rotating, and
//! a router that corrects its choice.

use bsbr_model::{HeadNorm, RouterConfig, RouterKind};

use super::experts::{
    self, ExpertKeys, LAYOUTS, LEAST, MIXTRAL_CORRECTION, MIXTRAL_EXPERTS, MIXTRAL_GATE, NORMALISED_SOFTMAX,
};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const MIXTRAL: Architecture = Architecture {
    id: "mixtral",
    version: 1,
    model_types: &["mixtral"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    layouts: LAYOUTS,
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        MIXTRAL_GATE,
        MIXTRAL_EXPERTS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_mixtral,
};

pub(super) const MINIMAX_M2: Architecture = Architecture {
    id: "minimax_m2",
    model_types: &["minimax_m2"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        MIXTRAL_GATE,
        MIXTRAL_CORRECTION,
        MIXTRAL_EXPERTS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_minimax_m2,
    ..MIXTRAL
};

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    kv_heads: Some(8),
    max_positions: 4096 * 32,
    rope: RopeKeys { theta: ("rope_theta", 1e6), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["num_local_experts", "num_experts"], Some(8)),
    chosen: (&["num_experts_per_tok"], Some(2)),
    size: (&["intermediate_size"], None),
};

fn read_mixtral(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let window = config.optional_usize("sliding_window")?;
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    experts::read(config, &mut model, &KEYS, NORMALISED_SOFTMAX)?;
    Ok(model)
}

fn read_minimax_m2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-6),
        head_dim: Some(128),
        max_positions: 196_608,
        rope: RopeKeys { theta: ("rope_theta", 5e6), part: Some(("partial_rotary_factor", 1.0)), ..RopeKeys::LLAMA },
        ..DEFAULTS
    };
    let kind = config.optional_str("qk_norm_type")?;
    if !config.bool_or("use_qk_norm", true)? || kind.is_some_and(|kind| kind != "per_layer") {
        return Err(config.error("qk_norm_type", "per_layer, with `use_qk_norm`: the only one there is a rule for"));
    }
    // The part of a head that rotates stands beside in numbers.
    let rotates = config.optional_usize("rotary_dim")?;
    let width = config.optional_usize("head_dim")?.unwrap_or(128);
    let config = match rotates.filter(|_| config.get("partial_rotary_factor").is_none()) {
        Some(rotates) => &config.with("partial_rotary_factor", (rotates as f64 / width.max(1) as f64).into()),
        None => config,
    };
    let mut model = keys::read(config, &defaults)?;
    model.decoder.block.head_norm = Some(HeadNorm::AllHeads);
    let keys = ExpertKeys {
        count: (&["num_local_experts", "num_experts"], Some(256)),
        chosen: (&["num_experts_per_tok"], Some(8)),
        ..KEYS
    };
    let router = RouterConfig {
        kind: RouterKind::Sigmoid,
        bias: false,
        correction: true,
        groups: None,
        normalised: Some(LEAST),
        scale: None,
        expert_scale: false,
        own_norm: false,
    };
    experts::read(config, &mut model, &keys, router)?;
    Ok(model)
}
