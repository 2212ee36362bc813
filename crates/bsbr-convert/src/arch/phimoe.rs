//! Phi-3.5-MoE: Mixtral's layout with LayerNorm, biases, a router of its own and long factors with a temperature each.

use bsbr_model::{Norm, RouterConfig, RouterKind};

use super::experts::{self, ExpertKeys, LAYOUTS, MIXTRAL_EXPERTS, PHI_GATE};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV,
    NORM_BIASES, copy_if, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::When::Flag;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const PHIMOE: Architecture = Architecture {
    id: "phimoe",
    version: 1,
    model_types: &["phimoe"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "lm_head_bias"],
    layouts: LAYOUTS,
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NORM_BIASES,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        PHI_GATE,
        MIXTRAL_EXPERTS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD,
        HEAD_BIAS
    ],
    read_config,
};

pub(super) const HEAD_BIAS: &[Rule] = &[copy_if("{h}lm_head.bias", &["head.bias"], Flag("lm_head_bias"))];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Layer,
    eps: ("rms_norm_eps", 1e-5),
    kv_heads: Some(8),
    max_positions: 4096 * 32,
    rope: RopeKeys { theta: ("rope_theta", 1e6), temperatures: true, ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["num_local_experts", "num_experts"], Some(16)),
    chosen: (&["num_experts_per_tok"], Some(2)),
    size: (&["intermediate_size"], None),
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    keys::read_attention_bias(config, &mut model)?;
    let bias = config.bool_or("lm_head_bias", false)?;
    model.decoder.head.bias = bias;
    model.flags.insert("lm_head_bias", bias);
    let window = config.optional_usize("sliding_window")?;
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    let jitter = config.optional_f64("router_jitter_noise")?.unwrap_or(0.01);
    let router = RouterConfig {
        kind: RouterKind::Sparsemixer { jitter },
        bias: false,
        correction: false,
        groups: None,
        normalised: None,
        scale: None,
        expert_scale: false,
        own_norm: false,
    };
    experts::read(config, &mut model, &KEYS, router)?;
    Ok(model)
}
