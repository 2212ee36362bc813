//! Phi 3, 3.5 and 4: Llama with queries, keys and values in one tensor, and gate and up in another.

use super::keys::{self, Defaults};
use super::names::{
    FUSED_MLP, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, QKV, QKV_WEIGHT, map, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const PHI3: Architecture = Architecture {
    id: "phi3",
    version: 1,
    model_types: &["phi3"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: table![LLAMA_EMBED, LLAMA_NORMS, FUSED_QKV, LLAMA_OUTPUT, FUSED_MLP, LLAMA_FINAL_NORM, LLAMA_HEAD],
    read_config,
};

const FUSED_QKV: &[Rule] = &[map("{p}layers.{i}.self_attn.qkv_proj.weight", QKV_WEIGHT, &[QKV])];

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    max_positions: 4096,
    rope: RopeKeys {
        part: Some(("partial_rotary_factor", 1.0)),
        trained: Some(4096),
        yarn_is_longrope: true,
        ..RopeKeys::LLAMA
    },
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let window = config.optional_usize("sliding_window")?;
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    Ok(model)
}
